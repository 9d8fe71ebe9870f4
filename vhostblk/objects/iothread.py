# SPDX-License-Identifier: GPL-2.0-or-later
"""iothread: a thread that serves virtqueues and does I/O."""

from __future__ import annotations

from typing import Any, Literal

from vhostblk.engine import AIO_NAMES, Aio, EngineError, IOThread
from vhostblk.objects import BackendObject, ObjectOptions, register
from vhostblk.schema import UInt32, UInt63, VhostblkError


class IOThreadOptions(ObjectOptions):
    """Options of iothread."""

    poll_max_ns: UInt63 = 100_000
    """Longest busy wait for new requests before sleeping, in nanoseconds; 0: none."""
    poll_grow: UInt63 = 0
    """Factor by which the busy wait grows; 0 means 2."""
    poll_shrink: UInt63 = 0
    """Divisor by which the busy wait shrinks; 0: straight to none."""
    aio: Literal["auto", "io_uring", "threads"] = "auto"
    """How files are read and written; auto takes io_uring where the kernel allows it."""
    thread_pool_max: UInt32 = 0
    """Largest number of threads with aio=threads; 0 means 16."""
    thread_pool_min: UInt32 = 0
    """Accepted for QEMU's sake."""
    aio_max_batch: UInt32 = 0
    """Accepted for QEMU's sake."""


@register
class IOThreadObject(BackendObject):
    """A thread that serves virtqueues and does I/O."""

    qom_type = "iothread"
    Options = IOThreadOptions
    settable = frozenset({"poll-max-ns", "poll-grow", "poll-shrink"})
    options: IOThreadOptions

    async def open(self) -> None:
        options = self.options
        try:
            self.thread: IOThread = self.engine.new_iothread(
                options.id,
                poll_max_ns=options.poll_max_ns,
                poll_grow=options.poll_grow,
                poll_shrink=options.poll_shrink,
                aio=next(aio for aio, name in AIO_NAMES.items() if name == options.aio),
                threads_max=options.thread_pool_max,
            )
        except EngineError as error:
            hint = ""
            if options.aio == "io_uring":
                hint = "; aio=auto or aio=threads does without io_uring"
            raise VhostblkError(
                f"I/O thread '{options.id}' cannot be started: {error.strerror}{hint}",
                data={"code": "iothread-failed", "id": options.id},
            ) from None

    async def close(self) -> None:
        self.thread.free()

    async def apply(self, options: IOThreadOptions) -> None:
        self.thread.set_poll(options.poll_max_ns, options.poll_grow, options.poll_shrink)

    def properties(self) -> dict[str, Any]:
        info = self.thread.info()
        return {
            **super().properties(),
            "thread-id": info.thread_id,
            "aio-used": AIO_NAMES[Aio(info.aio)],
        }
