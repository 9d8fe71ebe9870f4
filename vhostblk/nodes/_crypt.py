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
import errno
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from vhostblk.engine import OP_DISCARD, OP_READ, OP_WRITE
from vhostblk.engine.crypt import WHOLE, CryptHandle, Half, new_crypt
from vhostblk.nodes._zone_log import ZoneLog
from vhostblk.nodes.hooks import HookedNode, Request
from vhostblk.schema import VhostblkError

BLOCK = 4096
"""Zones are multiples of this, which is the largest sector."""


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
        self._stuck = False
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
            self._check_not_stuck()
            try:
                await self.handle.hold(begin, end)
                yield
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """Of what is held, unless it must not be seen; whoever waits looks again."""
        assert self.handle is not None
        if not self._stuck:
            self.handle.release(self.boundary)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _check_not_stuck(self) -> None:
        if self._stuck:
            raise OSError(errno.EIO, "a zone that is being re-encrypted could not be written")

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

    # ---- re-encryption (_zone_log.py says why this order)

    async def recover(self, log: ZoneLog, low: Half) -> int:
        """Before start_crypt(): finish what a crash has left half done; the boundary."""
        assert low.cipher is not None
        boundary, content = await log.load()
        if (boundary | len(content or b"")) % low.cipher.sector_size:
            raise VhostblkError(
                "The state of a re-encryption cannot be read: its log speaks of half sectors",
                data={"code": "bad-reencryption-log"},
            )
        if content is not None:
            if self.read_only:
                raise OSError(
                    errno.EROFS,
                    "a crash has interrupted its re-encryption; it has to be opened writable once",
                )
            await self._write_again(log, low, boundary, content)
            boundary += len(content)
        return boundary

    async def _write_again(self, log: ZoneLog, low: Half, boundary: int, content: bytes) -> None:
        await self.child("file").write(boundary + low.offset, content)
        await self.child("file").flush()
        await log.done(boundary + len(content))

    async def move_boundary(self, log: ZoneLog, length: int) -> int:
        """The next bytes, up to `length`, get the new key; how many did."""
        low, high = self._halves
        assert low.cipher is not None
        if self._stuck:
            return await self._unstick(log, low)
        begin = self.boundary
        end = min(begin + min(length, log.most) // BLOCK * BLOCK, self.size)
        async with self.held(begin, end):
            content = memoryview(bytearray(end - begin))
            await self.read_sectors(high, begin, content)
            low.cipher.apply(True, begin, content)
            await self._announce(log, begin, content)
            try:
                await self.child("file").write(begin + low.offset, content)
                await self.child("file").flush()
                await log.done(end)
            except BaseException:
                # Half old, half new perhaps: only the log knows what belongs there.
                self._stuck = True
                raise
            self.boundary = end
        return end - begin

    async def _announce(self, log: ZoneLog, begin: int, content: memoryview) -> None:
        try:
            await log.begin(begin, content)
        except BaseException:
            # The announcement may have reached the disk. It must not be believed any more.
            self._stuck = True
            await log.done(begin)
            self._stuck = False
            raise

    async def _unstick(self, log: ZoneLog, low: Half) -> int:
        """Another try, with what the log says."""
        async with self._holding:
            before = self.boundary
            self.boundary = await self.recover(log, low)
            self._stuck = False
            self._let_go()
            return self.boundary - before

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
        self._check_not_stuck()
        request.retry()

    async def _write_partly(self, request: Request) -> None:
        """The parts of sectors at either end here; what is between goes to the engine again."""
        assert self.handle is not None
        begin, end, size = request.offset, request.offset + request.length, self.sector_size
        first, last = -(-begin // size) * size, end // size * size
        if first >= last:
            await self._write_edge(request, begin, end)
        else:
            if begin < first:
                await self._write_edge(request, begin, first)
            if last < end:
                await self._write_edge(request, last, end)
            length, position = last - first, first - begin
            await request.submit_part(self.handle, request.op, first, length, position)
        if request.fua:
            await self.child("file").flush()

    async def _write_edge(self, request: Request, begin: int, end: int) -> None:
        """Less than a sector, or parts of two: they are read and written with the rest."""
        size = self.sector_size
        start, stop = begin // size * size, -(-end // size) * size
        async with self.held(start, stop):
            buffer = memoryview(bytearray(stop - start))
            pieces = self._pieces(start, stop)
            for half, at, length in pieces:
                await self.read_sectors(half, at, buffer[at - start : at - start + length])
            data = bytes(end - begin)
            if request.op == OP_WRITE:
                data = _part_of(request.buffers, begin - request.offset, end - begin)
            buffer[begin - start : end - start] = data
            for half, at, length in pieces:
                await self.write_sectors(half, at, buffer[at - start : at - start + length])

    def _pieces(self, begin: int, end: int) -> list[tuple[Half, int, int]]:
        """The range on either side of the boundary: its half, offset, length."""
        low, high = self._halves
        middle = min(max(self.boundary, begin), end)
        pieces = [(low, begin, middle - begin), (high, middle, end - middle)]
        return [piece for piece in pieces if piece[2]]


def _part_of(buffers: list[memoryview], position: int, length: int) -> bytes:
    """A copy of some bytes of buffers in a row."""
    parts: list[memoryview] = []
    for buffer in buffers:
        parts.append(buffer[position : position + length])
        length -= len(parts[-1])
        position = max(0, position - len(buffer))
    return b"".join(parts)
