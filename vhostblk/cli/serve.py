# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk serve`: run a backend in the foreground, or as a daemon."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys

from vhostblk.cli import options, places
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser
from vhostblk.cli.process import set_up_logging
from vhostblk.cli.serving import Plan, Running, serve

DESCRIPTION = """\
Serve an image, or any tree of block nodes, to QEMU as a vhost-user-blk device.

With only an IMAGE, its sockets are made in a directory of the backend's own,
and the QEMU options to use are printed. SIGTERM, SIGINT and SIGHUP end the
backend in order, with status 0.
"""

EPILOG = """\
examples:
  vhostblk serve disk.img
  vhostblk serve --read-only --serial ROOT01 /dev/vg0/root
  vhostblk serve --blockdev file,node-name=f,filename=disk.img \\
      --blockdev raw,node-name=d,file=f \\
      --export vhost-user-blk,id=d,node-name=d,addr.type=unix,addr.path=/run/d.sock,writable=on \\
      --control /run/d-qmp.sock --pidfile /run/d.pid --daemonize
  vhostblk serve --config web1.yaml
  vhostblk serve --state /var/lib/vhostblk/web1.json --config web1.yaml
  vhostblk serve --blockdev help             the block drivers there are
  vhostblk serve --blockdev file,help        the options of one
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    options.configure_image(parser)
    options.configure_tree(parser)
    options.configure_process(parser)
    group = parser.add_argument_group("daemon")
    group.add_argument(
        "--daemonize",
        action="store_true",
        help="go to the background once ready; the status says whether it worked",
    )
    group.add_argument("--pidfile", metavar="FILE", help="write the process id to FILE when ready")
    group.add_argument(
        "--state",
        metavar="FILE",
        help="keep the tree as last changed in FILE, and start with it if FILE exists: "
        "--blockdev, --export and IMAGE then count for the first start only",
    )
    configure_backend(parser)


def configure_backend(parser: Parser) -> None:
    """QEMU's conventions for vhost-user backend programs."""
    group = parser.add_argument_group("conventions of vhost-user backend programs")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="socket for QEMU to connect to")
    where.add_argument("--fd", metavar="FDNUM", help="the same, as a descriptor we were given")
    group.add_argument("--blk-file", metavar="PATH", help="the image; the same as IMAGE")
    group.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print what this program can do, as JSON, and exit",
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.print_capabilities:
        return print_capabilities()
    written = getattr(args, "steps", None)
    wanted = options.wants_help(written)
    if wanted is not None:
        from vhostblk.cli import describe

        return describe.show(*wanted, args.plugin)
    set_up_logging("vhostblk", args.log_level, args.log_file)
    plan, shown = make_plan(args)
    if args.daemonize or not shown:
        return serve(plan)

    async def show_options(running: Running) -> int:
        from vhostblk.cli import qemu

        exports = qemu.exports(running.backend.query_block_exports())
        installed = await asyncio.to_thread(qemu.version, qemu.DEFAULT_QEMU)
        text = qemu.as_shell(qemu.arguments(exports, qemu_version=installed))
        with contextlib.suppress(OSError):  # nobody may be reading
            print(
                f"QEMU options for this disk (adjust the size of memory):\n\n{text}\n", flush=True
            )
        await running.stop.wait()
        return 0

    return serve(plan, show_options)


def make_plan(args: argparse.Namespace) -> tuple[Plan, bool]:
    """The plan for these options, and whether the user needs QEMU's options shown."""
    plan = Plan(daemonize=args.daemonize)
    steps, settings = options.tree_steps(getattr(args, "steps", None))
    plan.pidfile = args.pidfile or settings.get("pidfile")
    name = options.chosen_name(args, settings)
    image = one_image(args)
    own_socket = args.socket_path is None and args.fd is None
    if image is None:
        if not own_socket:
            raise CliError(
                "--socket-path and --fd need an image: add --blk-file PATH", status=USAGE
            )
        if not steps and args.state is None and "state" not in settings:
            raise CliError(
                "nothing to serve: give an IMAGE, --blockdev and --export, or --state (see "
                "'vhostblk serve --help')",
                status=USAGE,
            )
    elif name is None and own_socket:
        name = places.name_of_image(image)
    if name is not None:
        plan.place = places.place(name)
    plan.steps = steps
    if image is not None:
        plan.steps += options.image_steps(
            image, name or places.name_of_image(image), address(args, plan), args
        )
    options.plan_process(args, plan, settings)
    return plan, image is not None and own_socket


def one_image(args: argparse.Namespace) -> str | None:
    """IMAGE or --blk-file."""
    if args.image is not None and args.blk_file is not None:
        raise CliError("give the image once: as IMAGE or with --blk-file", status=USAGE)
    image: str | None = args.image or args.blk_file
    return image


def address(args: argparse.Namespace, plan: Plan) -> dict[str, str]:
    """Where QEMU connects."""
    if args.fd is not None:
        if not args.fd.isdecimal():
            raise CliError(f"--fd {args.fd}: expected the number of a descriptor", status=USAGE)
        return {"type": "fd", "str": args.fd}
    if args.socket_path is not None:
        return {"type": "unix", "path": os.path.abspath(args.socket_path)}
    assert plan.place is not None
    return {"type": "unix", "path": plan.place.vhost_socket}


def print_capabilities() -> int:
    """As docs/interop/vhost-user.rst of QEMU asks."""
    print('{\n  "type": "block",\n  "features": [\n    "read-only",\n    "blk-file"\n  ]\n}')
    sys.stdout.flush()
    return 0
