# SPDX-License-Identifier: GPL-2.0-or-later
"""delay: makes a disk slower. Also the example of a filter to copy from.

Only the operations that are to be delayed come to Python; with all delays 0
the filter costs nothing. See docs/filters.md.
"""

from __future__ import annotations

import asyncio
import random

from vhostblk.filter import Filter, FilterOptions, Request
from vhostblk.schema import UInt64


class DelayOptions(FilterOptions):
    """Options of delay: how long each kind of operation is held back, in nanoseconds."""

    read_ns: UInt64 = 0
    """Delay of reads."""
    write_ns: UInt64 = 0
    """Delay of writes and zero writes."""
    flush_ns: UInt64 = 0
    """Delay of flushes."""
    discard_ns: UInt64 = 0
    """Delay of discards."""
    jitter_ns: UInt64 = 0
    """A random time up to this is added to each, also where the delay is 0."""


class Delay(Filter):
    """Holds requests back for a while."""

    driver = "delay"
    keeps_data = True
    Options = DelayOptions
    options: DelayOptions

    async def open(self) -> None:
        self._draining = False
        self._held: set[asyncio.Future[None]] = set()

    def hooked_operations(self) -> set[str]:
        options = self.options
        delays = {
            "read": options.read_ns,
            "write": options.write_ns,
            "write-zeroes": options.write_ns,
            "flush": options.flush_ns,
            "discard": options.discard_ns,
        }
        return {name for name, delay in delays.items() if delay or options.jitter_ns}

    async def read(self, request: Request) -> None:
        await self._hold(self.options.read_ns)
        request.forward()

    async def write(self, request: Request) -> None:
        await self._hold(self.options.write_ns)
        request.forward()

    async def write_zeroes(self, request: Request) -> None:
        await self._hold(self.options.write_ns)
        request.forward()

    async def flush(self, request: Request) -> None:
        await self._hold(self.options.flush_ns)
        request.forward()

    async def discard(self, request: Request) -> None:
        await self._hold(self.options.discard_ns)
        request.forward()

    async def _hold(self, nanoseconds: int) -> None:
        if self._draining:
            return
        if self.options.jitter_ns:
            nanoseconds += random.randrange(self.options.jitter_ns + 1)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        timer = loop.call_later(nanoseconds / 1e9, _release, future)
        self._held.add(future)
        try:
            await future
        finally:
            timer.cancel()
            self._held.discard(future)

    def drain_begin(self) -> None:
        # Somebody waits for all requests to finish: an artificial delay must not stop him.
        self._draining = True
        for future in list(self._held):
            _release(future)

    def drain_end(self) -> None:
        self._draining = False


def _release(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
