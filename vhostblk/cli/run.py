# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk run`: a backend that lives exactly as long as its QEMU."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable

from vhostblk.cli import options, places, qemu
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser, number
from vhostblk.cli.process import set_up_logging, terminal
from vhostblk.cli.serving import Plan, Running, serve

DESCRIPTION = """\
Start a backend for IMAGE, then the command after '--' with the QEMU options for
that backend in place of the mark @VHOSTBLK@. When the command ends, so does the
backend; the status is that of the command (128 + number for a signal). If the
backend is killed, the command gets a SIGTERM.

A size given with QEMU's -m is used for the shared memory too; without one the
guest gets the size of --memory. Memory the command line shares itself
(-machine memory-backend=...) is left as it is.
"""

EPILOG = """\
examples:
  vhostblk run disk.img -- qemu-system-x86_64 -m 2G -smp 2 -nographic @VHOSTBLK@
  vhostblk run --read-only disk.img -- sh -c 'exec qemu-system-x86_64 -m 1G @VHOSTBLK@'
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.usage = "vhostblk run [options] IMAGE -- COMMAND ... @VHOSTBLK@ ..."
    options.configure_image(parser)
    options.configure_tree(parser)
    options.configure_process(parser)
    group = parser.add_argument_group("QEMU")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        type=qemu.memory,
        default="1G",
        help="memory of the guest if COMMAND has no -m (default: 1G)",
    )
    group.add_argument(
        "--queues",
        metavar="N",
        type=number,
        help="virtqueues (default: QEMU makes one for each vCPU)",
    )


def run(args: argparse.Namespace) -> int:
    """Do it. `args.command` is what stood after '--'."""
    command: list[str] = args.command
    written = getattr(args, "steps", None)
    wanted = options.wants_help(written)
    if wanted is not None:
        from vhostblk.cli import describe

        return describe.show(*wanted, args.plugin)
    if not command:
        raise CliError(
            "no command to run: add '-- qemu-system-x86_64 ... @VHOSTBLK@'", status=USAGE
        )
    if not any(qemu.MARK in word for word in command):
        raise CliError(
            f"the command has no mark {qemu.MARK} where the disk's options belong", status=USAGE
        )
    set_up_logging("vhostblk", args.log_level, args.log_file)
    steps, settings = options.tree_steps(written)
    name = options.chosen_name(args, settings)
    if args.image is None and not steps:
        raise CliError("nothing to serve: give an IMAGE, or --blockdev and --export", status=USAGE)
    if name is None and args.image is not None:
        name = places.name_of_image(args.image)
    # SIGINT from the terminal reaches QEMU too: what becomes of it is QEMU's choice.
    plan = Plan(steps, stop_on_signals=(signal.SIGTERM, signal.SIGHUP))
    if name is not None:
        plan.place = places.place(name)
    if args.image is not None:
        assert name is not None and plan.place is not None
        addr = {"type": "unix", "path": plan.place.vhost_socket}
        plan.steps += options.image_steps(args.image, name, addr, args)
    options.plan_process(args, plan, settings)
    return serve(plan, lambda running: _run_command(args, running))


async def _run_command(args: argparse.Namespace, running: Running) -> int:
    served = qemu.exports(running.backend.query_block_exports())
    if not served:
        raise CliError("there is no export for QEMU to use: add --export")
    words: list[str] = args.command
    told = qemu.CommandLine.read(words)
    insert = qemu.arguments(
        served,
        memory=None if told.shared_already else told.memory or args.memory,
        queues=args.queues,
        qemu_version=await asyncio.to_thread(qemu.version, told.program),
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    try:
        child = await asyncio.create_subprocess_exec(
            *qemu.substitute(words, insert), stderr=terminal(), preexec_fn=_end_with_us()
        )
    except OSError as error:
        raise CliError(f"cannot run '{words[0]}': {error.strerror}", status=127) from None
    ended = asyncio.create_task(child.wait())
    stopped = asyncio.create_task(running.stop.wait())
    await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        # Told to stop, by a signal or over the control socket: QEMU first.
        child.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(ended), 10)
        except TimeoutError:
            print("vhostblk: QEMU does not end: killing it", file=sys.stderr, flush=True)
            child.kill()
    stopped.cancel()
    code = await ended
    return code if code >= 0 else 128 - code


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_us() -> Callable[[], None]:
    """What the command's process does before it becomes the command.

    Even kill -9 of the backend may not leave a QEMU behind whose disk nobody will serve
    again: the kernel sends it SIGTERM, on which QEMU ends in order.
    """
    # Everything is looked up before the fork; after it a lock may be held for ever.
    prctl = ctypes.CDLL(None).prctl
    getppid, leave, parent, ending = os.getppid, os._exit, os.getpid(), int(signal.SIGTERM)

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, ending)
        if getppid() != parent:  # it was killed meanwhile
            leave(1)

    return prepare
