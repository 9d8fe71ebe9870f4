# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command gets a passphrase: from a file, an open file, a credential, or the terminal.

Never as an option: the command line of a process can be read by everybody on the machine.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from typing import Any

from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser
from vhostblk.secret import SecretBytes, forbid_core_dumps, source

HELP = """\
A passphrase is asked for on the terminal, or read, to the last byte, from a file: a newline at its
end belongs to it ('echo -n' makes files without). '-' is standard input.
"""


def configure(parser: Parser, prefix: str, what: str) -> None:
    """Declare the options about one passphrase; their names begin with `prefix`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(f"--{prefix}file", metavar="FILE", help=f"{what}: in this file")
    group.add_argument(f"--{prefix}fd", metavar="N", type=int, help=f"{what}: in this open file")
    group.add_argument(
        f"--{prefix}credential", metavar="NAME", help=f"{what}: this credential of systemd"
    )


def get(args: argparse.Namespace, prefix: str, what: str, *, twice: bool = False) -> SecretBytes:
    """The passphrase."""
    forbid_core_dumps()
    where = _where(args, prefix)
    if "file" in where:
        return source.read_file(where["file"])
    if "fd" in where:
        return source.read_fd(where["fd"])
    if "credential" in where:
        return source.read_credential(where["credential"])
    return SecretBytes(_ask(what, f"--{prefix}file", twice).encode())


def as_object(
    args: argparse.Namespace, prefix: str, what: str, *, twice: bool = False
) -> dict[str, Any]:
    """Options of a secret object that has it, but for the id."""
    forbid_core_dumps()
    where = _where(args, prefix) or {"data": _ask(what, f"--{prefix}file", twice)}
    return {"qom-type": "secret", **where}


def _where(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """What an option says, if one does."""
    name = prefix.replace("-", "_")
    given = {end: getattr(args, name + end) for end in ("file", "fd", "credential")}
    if given["file"] == "-":
        return {"fd": 0}
    return {end: value for end, value in given.items() if value is not None}


def is_given(args: argparse.Namespace, prefix: str) -> bool:
    """Whether an option says where the passphrase is."""
    return bool(_where(args, prefix))


def _ask(what: str, option: str, twice: bool) -> str:
    if not sys.stdin.isatty():
        raise CliError(
            f"there is no terminal to ask for the {what}; say where it is with {option} "
            "('-' is standard input)",
            status=USAGE,
        )
    words = getpass.getpass(f"{what[0].upper()}{what[1:]}: ")
    if twice and getpass.getpass("The same again: ") != words:
        raise CliError("the two are not the same")
    return words
