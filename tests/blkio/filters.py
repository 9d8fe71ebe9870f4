# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters in Python for the data tests: nothing they do may be seen from outside."""

from __future__ import annotations

import asyncio

from vhostblk.filter import Filter, Request


class Wait(Filter):
    """Waits for the child, in turns of the event loop that shuffle the order of requests."""

    driver = "test-wait"

    async def _pass(self, request: Request) -> None:
        if request.offset // 512 % 3 == 0:
            await asyncio.sleep(0)
        await self.file.forward(request)

    async def read(self, request: Request) -> None:
        await self._pass(request)

    async def write(self, request: Request) -> None:
        await self._pass(request)

    async def flush(self, request: Request) -> None:
        await self._pass(request)

    async def discard(self, request: Request) -> None:
        await self._pass(request)

    async def write_zeroes(self, request: Request) -> None:
        await self._pass(request)


class Invert(Filter):
    """Stores the complement of every byte, through buffers of its own: an encryption of sorts."""

    driver = "test-invert"
    table = bytes(255 - i for i in range(256))

    async def read(self, request: Request) -> None:
        data = bytearray(request.length)
        await self.file.read(request.offset, data)
        request.fill(data.translate(self.table))

    async def write(self, request: Request) -> None:
        data = request.data().translate(self.table)
        await self.file.write(request.offset, data, fua=request.fua)

    async def write_zeroes(self, request: Request) -> None:
        await self.file.write(request.offset, b"\xff" * request.length, fua=request.fua)

    async def discard(self, request: Request) -> None:
        """Zeroes below would be 0xff above."""
