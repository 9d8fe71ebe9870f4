# SPDX-License-Identifier: GPL-2.0-or-later
"""The `vhostblk` command: one module for each subcommand, loaded when it is used."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

# name -> one line for the overview. The module is vhostblk.cli.NAME ('-' is '_').
COMMANDS = {
    "serve": "serve an image, or a tree of block nodes, to QEMU",
    "run": "start a backend and QEMU together, end with QEMU",
    "qemu-args": "print the QEMU options for a running backend",
    "status": "show exports, nodes, rates and latencies of running backends",
    "graph": "draw the block graph of a running backend",
    "create": "make a new image",
    "info": "say what an image in use is",
    "map": "print where the data of an image in use are",
    "check": "check an image in use",
    "throttle": "show or change how many operations and bytes a second a disk may do",
    "luks": "list, add, test, remove and replace the passphrases of an encrypted disk",
    "ls": "list running backends",
    "qmp": "send one command to a running backend's control socket",
    "doctor": "check this machine and say how to repair what is wrong",
    "completion": "print a completion script for bash, zsh or fish",
}

_EXAMPLES = """\
examples:
  vhostblk serve disk.img
      Serve an image; the QEMU options to use are printed.
  vhostblk run disk.img -- qemu-system-x86_64 -m 2G -nographic @VHOSTBLK@
      The same, and start QEMU with those options in place of the mark.
  vhostblk status
      What the running backend does, and how long requests take.

'vhostblk COMMAND --help' explains each command.
"""


def overview() -> str:
    """The text of `vhostblk --help`."""
    width = max(len(name) for name in COMMANDS) + 2  # (`map` is a module here, once loaded)
    lines = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: vhostblk [--version] [--help] COMMAND ...\n\n"
        "vhostblk serves disks to QEMU virtual machines as vhost-user-blk devices.\n\n"
        f"commands:\n{lines}\n\n{_EXAMPLES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vhostblk`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("vhostblk", lambda: _dispatch(arguments))


def backend_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vhostblk-backend`: QEMU's conventions for backend programs."""
    from vhostblk.cli import backend

    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("vhostblk-backend", lambda: backend.run(arguments))


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        if len(arguments) > 1 and name == "help":
            return _dispatch([arguments[1], "--help"])
        print(overview(), end="")
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        from vhostblk.cli import version

        version.show("--json" in arguments[1:])
        return 0
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'vhostblk --help' lists the commands"
        kind = "option" if name.startswith("-") else "command"
        print(f"vhostblk: unknown {kind} '{name}'; {hint}", file=sys.stderr)
        return 2
    from vhostblk.cli.parser import Parser

    module = importlib.import_module("vhostblk.cli." + name.replace("-", "_"))
    parser = Parser(prog=f"vhostblk {name}", description=module.DESCRIPTION, epilog=module.EPILOG)
    module.configure(parser)
    words = arguments[1:]
    command: list[str] = []
    if name == "run" and "--" in words:  # what follows is somebody else's
        place = words.index("--")
        words, command = words[:place], words[place + 1 :]
    args = parser.parse_args(words)
    args.command = command
    return int(module.run(args))


def guarded(program: str, action: Callable[[], int]) -> int:
    """Run `action`; whatever goes wrong ends as one line and a status."""
    try:
        try:
            return action()
        finally:
            sys.stdout.flush()
    except SystemExit as error:
        if not error.code:  # argparse, after --help
            return 0
        # Nothing of ours does that: a plugin, and whoever looks for the reason finds it here.
        from vhostblk.origin import origin

        print(f"{program}: ended by sys.exit({error.code!r}){origin(error)}", file=sys.stderr)
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has had enough: nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if os.environ.get("VHOSTBLK_TRACEBACK"):
            raise
        return _report(program, error)


def _report(program: str, error: Exception) -> int:
    from vhostblk.cli.process import tell_caller

    text, status = _explained(error)
    line = f"{program}: {text}"
    print(line, file=sys.stderr)
    tell_caller(line)
    return status


def _explained(error: Exception) -> tuple[str, int]:
    """What went wrong, and the status that says so."""
    from vhostblk.cli.errors import FAILED, NOT_RUNNING, REFUSED, TIMEOUT, CliError, error_text
    from vhostblk.control.client import NotRunning, Refused
    from vhostblk.schema import VhostblkError

    if isinstance(error, VhostblkError):
        text = error_text(error)
        if isinstance(error, CliError):
            return text, error.status
        if isinstance(error, NotRunning):
            return text, NOT_RUNNING
        return text, REFUSED if isinstance(error, Refused) else FAILED
    if isinstance(error, TimeoutError):
        return str(error) or "timed out", TIMEOUT
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", FAILED
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"internal error: {kind}: {text} (VHOSTBLK_TRACEBACK=1 shows where)", FAILED
