# SPDX-License-Identifier: GPL-2.0-or-later
"""What an encrypted disk does in Python: the few requests that its engine half hands up.

The engine encrypts and decrypts whole sectors by itself. Up come requests to a range that is
*held*, because something is being done to it that nobody may see half of; they wait here
and go back to the engine afterwards. And up come writes of less than a whole sector, which only
sectors of more than 512 bytes have: the rest of the sector is read and written with it, while
that range is held. Only one range is held at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from vhostblk.engine import OP_DISCARD, OP_READ, OP_WRITE
from vhostblk.engine.crypt import WHOLE, CryptHandle, Half, new_crypt
from vhostblk.nodes.hooks import HookedNode, Request


class CryptNode(HookedNode):
    """A node whose data are encrypted on its child `file`."""

    handle: CryptHandle | None

    def start_crypt(
        self, low: Half, high: Half | None = None, *, boundary: int = WHOLE, discard: bool = False
    ) -> None:
        """Make the engine half. Below the boundary `low` counts, from there on `high`."""
        self._prepare_hooks()
        self._hooks = [self._handed_up] * 5
        self._holding = asyncio.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        self._halves = (low, low if high is None else high)
        self.boundary = boundary
        self.handle = new_crypt(
            self.engine, self._start, low, high, boundary=boundary, discard=discard
        )

    def set_layout(
        self, low: Half, high: Half | None = None, *, boundary: int = WHOLE, discard: bool = False
    ) -> None:
        """Other halves. Nothing is in flight."""
        assert self.handle is not None
        self._halves = (low, low if high is None else high)
        self.boundary = boundary
        self.handle.set(low, high, boundary=boundary, discard=discard)

    @property
    def sector_size(self) -> int:
        """The larger one, while there are two."""
        ciphers = [half.cipher for half in self._halves if half.cipher is not None]
        return max((cipher.sector_size for cipher in ciphers), default=512)

    @contextlib.asynccontextmanager
    async def held(self, begin: int, end: int) -> AsyncIterator[None]:
        """Nobody reads or writes this range meanwhile. Whoever moves `boundary` does so in here."""
        assert self.handle is not None
        async with self._holding:
            await self.handle.hold(begin, end)
            try:
                yield
            finally:
                self.handle.release(self.boundary)
                waiting, self._waiting = self._waiting, []
                for future in waiting:
                    if not future.done():
                        future.set_result(None)

    # ---- data, for whoever holds them

    async def read_sectors(self, half: Half, offset: int, into: memoryview) -> None:
        """Decrypted."""
        await self.child("file").read(offset + half.offset, into)
        if half.cipher is not None:
            half.cipher.apply(False, offset, into)

    async def write_sectors(self, half: Half, offset: int, data: memoryview) -> None:
        """Encrypts in place what is then written."""
        if half.cipher is not None:
            half.cipher.apply(True, offset, data)
        await self.child("file").write(offset + half.offset, data)

    # ---- requests

    def _handed_up(self, request: Request) -> Awaitable[None]:
        size = self.sector_size
        partial = (request.offset | request.length) % size
        if request.op in (OP_READ, OP_DISCARD) or not partial:
            return self._wait_until_free(request)
        return self._write_partly(request)

    async def _wait_until_free(self, request: Request) -> None:
        if self._holding.locked():
            future: asyncio.Future[Any] = self.engine.loop.create_future()
            self._waiting.append(future)
            await future
        request.retry()

    async def _write_partly(self, request: Request) -> None:
        size = self.sector_size
        begin = request.offset // size * size
        end = -(-(request.offset + request.length) // size) * size
        async with self.held(begin, end):
            buffer = memoryview(bytearray(end - begin))
            pieces = self._pieces(begin, end)
            for half, at, length in pieces:
                await self.read_sectors(half, at, buffer[at - begin : at - begin + length])
            data = request.data() if request.op == OP_WRITE else bytes(request.length)
            buffer[request.offset - begin : request.offset - begin + request.length] = data
            for half, at, length in pieces:
                await self.write_sectors(half, at, buffer[at - begin : at - begin + length])
            if request.fua:
                await self.child("file").flush()

    def _pieces(self, begin: int, end: int) -> list[tuple[Half, int, int]]:
        """The range on either side of the boundary: its half, offset, length."""
        low, high = self._halves
        middle = min(max(self.boundary, begin), end)
        pieces = [(low, begin, middle - begin), (high, middle, end - middle)]
        return [piece for piece in pieces if piece[2]]
