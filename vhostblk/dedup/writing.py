# SPDX-License-Identifier: GPL-2.0-or-later
"""One write of whole blocks: which are there already, and where those go that are not."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vhostblk.dedup.compression import compress
from vhostblk.dedup.format import Record, Stored
from vhostblk.dedup.futures import all_done, done, new_future
from vhostblk.dedup.interface import HOLD_INTERVAL, Data, Send
from vhostblk.dedup.runs import joined

if TYPE_CHECKING:
    from vhostblk.dedup.store import Store

logger = logging.getLogger(__name__)


class Writing:
    """Blocks on their way into the store."""

    def __init__(
        self,
        store: Store,
        data: Data,
        content: memoryview,
        prints: Sequence[bytes],
        send: Send | None,
    ) -> None:
        self._store = store
        self._data = data
        self._content = content
        self._prints = prints
        self._send = send or self._send_content
        self._numbers = [0] * len(prints)
        self._same: dict[bytes, int] = {}  # where in this request content was first seen
        self._fresh: list[tuple[int, int, int]] = []  # index, offset, length: not published yet
        self._flying: list[int] = []
        self._futures: dict[bytes, asyncio.Future[None]] = {}
        self._pinned: list[int] = []

    async def prepare(self) -> None:
        """Find or store every block."""
        store = self._store
        pending: Sequence[int] = range(len(self._prints))
        while True:
            fresh: list[int] = []
            waiting: list[int] = []
            for index in pending:
                self._classify(index, fresh, waiting)
            if store.tuning.verify:
                fresh += await self._verify(pending, fresh, waiting)
            if fresh and store.tuning.compress:
                await self._store_compressed(sorted(fresh))
            elif fresh:
                await self._store_blocks(sorted(fresh))
            if not waiting:
                return
            # Others may be waiting for ours while we wait for theirs.
            if self._fresh:
                await store.until_moving()
                await store.with_room(self._data, lambda: store.record(self.stored_records()))
                self.published()
            futures = [store.being_written.get(self._prints[index]) for index in waiting]
            await asyncio.wait([future for future in futures if future is not None] or [done()])
            pending = waiting

    def _classify(self, index: int, fresh: list[int], waiting: list[int]) -> None:
        store, name = self._store, self._prints[index]
        if name == store.zero or name in self._same:
            return
        number = store.tables.find(name)
        if number:
            self._same[name] = index
            self._pin(number)
            self._numbers[index] = number
        elif name in store.being_written:
            waiting.append(index)
        else:
            self._same[name] = index
            self._futures[name] = store.being_written[name] = new_future()
            fresh.append(index)

    def _pin(self, number: int) -> None:
        pins = self._store.tables.pins
        pins[number] = pins.get(number, 0) + 1
        self._pinned.append(number)

    async def _verify(
        self, pending: Sequence[int], fresh: list[int], waiting: list[int]
    ) -> list[int]:
        """Which of the blocks that seem to be there are something else."""
        store, size = self._store, self._store.super.block_size
        wrong = []
        for index in pending:
            number = self._numbers[index]
            block = store.tables.block(number) if number else None
            if block is None or index in fresh or index in waiting:
                continue
            with store.reading():
                content = await store.read(self._data, block)
            if bytes(content) != self._content[index * size : (index + 1) * size]:
                logger.error(
                    "dedup store '%s': block %d at %d is not what its fingerprint says",
                    store.directory,
                    number,
                    block.offset,
                )
                self._numbers[index] = 0
                wrong.append(index)
        return wrong

    async def _store_blocks(self, fresh: list[int]) -> None:
        """Write new blocks to the log, neighbours in one piece."""
        store, size = self._store, self._store.super.block_size
        at = 0
        parts: list[tuple[int, int, int]] = []  # offset, where in the content, bytes
        while at < len(fresh):
            end = at + 1
            while end < len(fresh) and fresh[end] == fresh[end - 1] + 1:
                end += 1
            offset, length = await store.allocate(self._data, (end - at) * size)
            self._flying.append(offset)
            count = length // size
            self._fresh += [(fresh[at + i], offset + i * size, size) for i in range(count)]
            parts.append((offset, fresh[at] * size, length))
            at += count
        await all_done(self._write(partial(self._send, *part)) for part in parts)

    async def _store_compressed(self, fresh: list[int]) -> None:
        """The same, each block for itself, and neighbours in the log in one piece."""
        store, size, content = self._store, self._store.super.block_size, self._content
        pieces = await asyncio.to_thread(
            lambda: [compress(content[index * size : (index + 1) * size]) for index in fresh]
        )
        offsets: list[int] = []
        for index, (piece, length) in zip(fresh, pieces, strict=True):
            offset, _ = await store.allocate(self._data, len(piece))
            self._flying.append(offset)
            offsets.append(offset)
            self._fresh.append((index, offset, length))
        parts = joined(offsets, [piece for piece, _ in pieces])
        await all_done(self._write(partial(self._data.write, *part)) for part in parts)

    async def _write(self, attempt: Callable[[], Awaitable[Any]]) -> None:
        store = self._store
        while True:
            try:
                await attempt()
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                store.tell_full("data")
                if not store.holds(self._data):
                    raise
                await asyncio.sleep(HOLD_INTERVAL)

    def _send_content(self, offset: int, begin: int, length: int) -> Awaitable[Any]:
        return self._data.write(offset, self._content[begin : begin + length])

    def numbers(self) -> list[int]:
        """The stored block of each block, once they are published (or about to be)."""
        zero, same, numbers = self._store.zero, self._same, self._numbers
        next_block = self._store.tables.state.next_block
        for at, (index, _, _) in enumerate(self._fresh):
            numbers[index] = next_block + at
        return [0 if name == zero else numbers[same[name]] for name in self._prints]

    def stored_records(self) -> list[Record]:
        """What the journal has to say about new blocks."""
        next_block = self._store.tables.state.next_block
        return [
            Stored(next_block + at, offset, length, self._prints[index])
            for at, (index, offset, length) in enumerate(self._fresh)
        ]

    def published(self) -> None:
        """The journal has said it."""
        first = self._store.tables.state.next_block - len(self._fresh)
        for at, (index, _, _) in enumerate(self._fresh):
            self._numbers[index] = first + at
            self._pin(first + at)
        self._fresh.clear()
        self._land()

    def _land(self) -> None:
        for offset in self._flying:
            self._store.space.landed(offset)
        self._flying.clear()
        for name, future in self._futures.items():
            if self._store.being_written.get(name) is future:
                del self._store.being_written[name]
            future.set_result(None)
        self._futures.clear()

    def end(self) -> None:
        """Whether all went well or not."""
        self._land()
        pins = self._store.tables.pins
        for number in self._pinned:
            left = pins[number] - 1
            if left:
                pins[number] = left
            else:
                del pins[number]
        self._pinned.clear()
