# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk qemu-args`: the QEMU options for a running backend."""

from __future__ import annotations

import argparse
import json
import shlex

from vhostblk.cli import places, qemu
from vhostblk.cli.errors import CliError
from vhostblk.cli.parser import Parser, number
from vhostblk.control.client import ControlClient

DESCRIPTION = """\
Print the options that make QEMU use a running backend: memory it shares with
the backend, a socket it connects to again when the backend restarts, and one
device for each export.
"""

EPILOG = """\
examples:
  vhostblk qemu-args
  vhostblk qemu-args web1 --memory 4G --one-line
  qemu-system-x86_64 -m 2G $(vhostblk qemu-args web1 --memory 2G --one-line)

--memory must be the size given to QEMU's -m: all of the guest's memory is
shared with the backend (share=on), which reads and writes it directly.
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a backend (see 'vhostblk ls')")
    parser.add_argument("--socket", metavar="PATH", help="its control socket, instead of NAME")
    parser.add_argument("--export", metavar="ID", help="only this export")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=qemu.memory,
        default="1G",
        help="size of the guest's memory (default: 1G)",
    )
    parser.add_argument(
        "--queues",
        metavar="N",
        type=number,
        help="virtqueues (default: QEMU makes one for each vCPU)",
    )
    parser.add_argument(
        "--qemu",
        metavar="PROGRAM",
        default=qemu.DEFAULT_QEMU,
        help=f"the QEMU to write options for (default: {qemu.DEFAULT_QEMU})",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--one-line", action="store_true", help="on one line, to paste or expand")
    output.add_argument("--json", action="store_true", help="as a JSON list of arguments")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with ControlClient(places.find_socket(args.name, args.socket)) as client:
        served = qemu.exports(client.execute("query-block-exports"))
    if args.export is not None:
        served = [export for export in served if export.id == args.export]
    if not served:
        what = "such export" if args.export is not None else "export with a socket path"
        raise CliError(f"the backend has no {what}")
    words = qemu.arguments(
        served,
        memory=args.memory,
        queues=args.queues,
        qemu_version=qemu.version(args.qemu),
    )
    if args.json:
        print(json.dumps(words))
    else:
        print(shlex.join(words) if args.one_line else qemu.as_shell(words))
    return 0
