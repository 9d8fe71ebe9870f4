# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves blocks: out of segments that are nearly empty, and together where a disk reads them.

A block that is moved is written once more at the head of the log, and a record says so. Its old
place stays as it is until a checkpoint later, when all maps have forgotten it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from vhostblk.dedup.format import Block, Record, Stored
from vhostblk.dedup.futures import all_done
from vhostblk.dedup.interface import Data
from vhostblk.dedup.runs import joined
from vhostblk.dedup.space import GUESTS_RESERVE, NoSpace
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.dedup.store import Store

logger = logging.getLogger(__name__)

UNMOVABLE_INTERVAL = 5.0
"""Seconds until a segment that could not be read is tried again."""
_PORTION = 1 << 20


class Collector:
    """Garbage collection and defragmentation of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Segments of which not everything could be read, and when that may be tried again.
        self._unmovable: dict[int, float] = {}
        self.lock = asyncio.Lock()
        """Of whoever moves blocks, or needs them where they are."""
        self.running = False
        """Garbage collection has begun by itself."""
        self.moved = False
        """Since maps have last forgotten places."""

    async def collect_soon(self) -> None:
        """As long as there is too little space, and something to be had."""
        store = self._store
        try:
            while store.members:
                async with store.step() as data:
                    if data is None:
                        return
                    if not await self.empty(data, store.super.segment_size // 2, most=1):
                        return
                if store.space.free >= 2 * store.tuning.garbage * store.space.size:
                    return
        except OSError as error:
            logger.warning("dedup store '%s': garbage collection: %s", store.directory, error)
            store.postpone()
        finally:
            store.look_again()
            self.running = False

    async def collect(self, used: float = 0.75) -> int:
        """Empty segments of which at most this part is in use; how many became free."""
        store = self._store
        freed = 0
        await store.checkpoint()
        tried: set[int] = set()
        limit = int(used * store.super.segment_size)
        while worst := [s for s in self.worst(limit) if s not in tried]:
            tried.update(worst[:4])
            async with store.step() as data:
                if data is None:
                    break
                freed += await self.empty(data, limit, most=4)
        return freed

    def worst(self, limit: int) -> list[int]:
        """Segments with at most `limit` bytes in use that can be emptied, the emptiest first."""
        now = time.monotonic()
        worst = self._store.space.worst(limit)
        return [segment for segment in worst if self._unmovable.get(segment, now) <= now]

    async def empty(self, data: Data, limit: int, most: int = 4) -> int:
        """Move what is in the emptiest segments to the head of the log; segments made free."""
        return await self._store.to_the_end(self._empty_segments(data, limit, most))

    async def _empty_segments(self, data: Data, limit: int, most: int) -> int:
        store = self._store
        async with self.lock:
            before = store.space.free_segments
            budget = store.super.segment_size
            for segment in self.worst(limit)[:most]:
                if segment not in self.worst(limit):
                    continue  # it has become free meanwhile, or is filled again
                budget -= store.space.used[segment]
                if budget < 0 and most > 1:
                    break
                await store.checkpoint_now(data)  # the places of all blocks are in the database
                try:
                    await self._move_segment(data, segment)
                except NoSpace:
                    raise
                except (OSError, VhostblkError) as error:
                    # Other segments can be emptied.
                    self._unmovable[segment] = time.monotonic() + UNMOVABLE_INTERVAL
                    logger.warning(
                        "dedup store '%s': segment %d cannot be emptied: %s",
                        store.directory,
                        segment,
                        error,
                    )
            await store.checkpoint_now(data)
            return store.space.free_segments - before

    async def _move_segment(self, data: Data, segment: int) -> None:
        store = self._store
        start, end = store.super.segment_at(segment), store.super.segment_at(segment + 1)
        numbers = [number for _, number in store.tables.places(start, end)]
        most = max(1, _PORTION >> store.super.block_bits)
        for at in range(0, len(numbers), most):
            await self._move_blocks(data, numbers[at : at + most], start, end, 0)

    async def _move_blocks(
        self, data: Data, numbers: list[int], start: int, end: int, reserve: int
    ) -> int:
        """Copy blocks that are between two offsets to the log, in this order; how many."""
        store = self._store
        blocks = [(number, store.tables.block(number)) for number in numbers]
        wanted = [(n, block) for n, block in blocks if block and start <= block.offset < end]
        with store.reading():
            contents = await all_done(data.read(block.offset, block.space) for _, block in wanted)
        offsets: list[int] = []
        try:
            for _, block in wanted:
                offsets.append(store.space.allocate(block.length, moving=True, reserve=reserve)[0])
            await all_done(data.write(at, piece) for at, piece in joined(offsets, contents))
            moved: list[Record] = [
                Stored(number, at, block.length, block.fingerprint)
                for (number, block), at in zip(wanted, offsets, strict=True)
                if self._is_still(number, block)  # else it has gone meanwhile
            ]
            if moved:
                store.record(moved)
        finally:
            for at in offsets:
                store.space.landed(at)
        self.moved = True
        store.counters.moved += len(moved)
        return len(moved)

    def _is_still(self, number: int, block: Block) -> bool:
        now = self._store.tables.block(number)
        return now is not None and now.offset == block.offset

    # ---- defragmentation

    def scattered(self, disk: int, page: int) -> list[int]:
        """The blocks that a page of a disk shows, if they are in more pieces than need be."""
        store = self._store
        numbers = [number for number in store.tables.page(disk, page) if number]
        pieces, end, segment = 0, -1, -1
        for number in numbers:
            block = store.tables.block(number)
            if block is None or block.offset == end:
                end = block.offset + block.space if block else end
                continue
            # The end of a segment is nobody's fault.
            follows = block.offset == store.super.segment_at(segment + 1)
            pieces += 0 if follows and pieces else 1
            segment = store.super.segment_of(block.offset)
            end = block.offset + block.space
        return list(dict.fromkeys(numbers)) if pieces > 1 else []

    async def gather(self, data: Data, numbers: list[int]) -> int:
        """Write blocks again, one after the other; how many bytes."""
        return await self._store.to_the_end(self._gather(data, numbers))

    async def _gather(self, data: Data, numbers: list[int]) -> int:
        store = self._store
        store.refuse_if_stopped()
        async with self.lock:
            moved = await self._move_blocks(data, numbers, 0, 1 << 63, GUESTS_RESERVE)
        store.watch()
        return moved << store.super.block_bits
