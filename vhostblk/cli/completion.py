# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk completion`: a script that completes our options in a shell."""

from __future__ import annotations

import argparse
import importlib

from vhostblk.cli.errors import CliError
from vhostblk.cli.parser import Parser

DESCRIPTION = "Print a completion script for a shell."

EPILOG = """\
examples:
  vhostblk completion bash | sudo tee /usr/share/bash-completion/completions/vhostblk
  vhostblk completion zsh > ~/.zfunc/_vhostblk        (with ~/.zfunc in fpath)
  vhostblk completion fish > ~/.config/fish/completions/vhostblk.fish
"""

_FILES = (
    "image",
    "blk_file",
    "config",
    "plugin",
    "socket",
    "socket_path",
    "control",
    "pidfile",
    "log_file",
)


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def whole_parser() -> argparse.ArgumentParser:
    """All subcommands as one parser, which in daily use is never needed."""
    from vhostblk.cli import COMMANDS

    parser = argparse.ArgumentParser(prog="vhostblk", description="serve disks to QEMU")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(parser_class=Parser)
    for name, text in COMMANDS.items():
        module = importlib.import_module("vhostblk.cli." + name.replace("-", "_"))
        module.configure(commands.add_parser(name, help=text, description=module.DESCRIPTION))
    return parser


def run(args: argparse.Namespace) -> int:
    """Do it."""
    import shtab

    parser = whole_parser()
    _mark_files(parser, shtab.FILE)
    if args.shell not in shtab.SUPPORTED_SHELLS:
        raise CliError(
            f"the installed shtab cannot write for {args.shell}; update it with "
            "'pip install --upgrade shtab'"
        )
    print(shtab.complete(parser, args.shell))
    return 0


def _mark_files(parser: argparse.ArgumentParser, mark: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark_files(below, mark)
        elif action.dest in _FILES or action.metavar in ("FILE", "PATH", "FILE.py", "IMAGE"):
            action.complete = mark  # type: ignore[attr-defined]
