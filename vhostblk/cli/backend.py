# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk-backend`: one image, QEMU's conventions for backend programs.

Management software that knows how to start vhost-user backends starts this
one: never a daemon, one of --socket-path and --fd, ends on SIGTERM.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vhostblk.cli import options, places
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser
from vhostblk.cli.process import LOG_LEVELS, set_up_logging
from vhostblk.cli.serve import address, configure_backend, print_capabilities
from vhostblk.cli.serving import Plan, Running, serve

if TYPE_CHECKING:
    from vhostblk.events import Event

DESCRIPTION = "Serve one raw image to QEMU, started the way vhost-user backends are started."

EPILOG = """\
example:
  vhostblk-backend --socket-path /run/disk.sock --blk-file disk.img

'vhostblk serve' can do much more.
"""


def make_parser() -> Parser:
    """The parser of this program."""
    parser = Parser(prog="vhostblk-backend", description=DESCRIPTION, epilog=EPILOG)
    configure_backend(parser)
    parser.add_argument("--read-only", action="store_true", help="the guest may not write")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="what to log")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Do it."""
    if "--print-capabilities" in arguments:  # whatever else is said
        return print_capabilities()
    args: argparse.Namespace = make_parser().parse_args(arguments)
    if args.blk_file is None:
        raise CliError("no image: add --blk-file PATH", status=USAGE)
    if args.socket_path is None and args.fd is None:
        raise CliError("nowhere to listen: add --socket-path PATH or --fd FDNUM", status=USAGE)
    set_up_logging("vhostblk-backend", args.log_level, None)
    plan = Plan()
    plan.steps = options.image_steps(
        args.blk_file, places.name_of_image(args.blk_file), address(args, plan), args
    )
    return serve(plan, _while_needed)


async def _while_needed(running: Running) -> int:
    """Until told to stop; if --fd is a connection and not a listener, until that ends."""

    def look(_: Event | None = None) -> None:
        if all(export.finished for export in running.backend.exports()):
            running.stop.set()

    running.backend.events.listen(look)
    look()
    await running.stop.wait()
    return 0
