# SPDX-License-Identifier: GPL-2.0-or-later
"""Metadata to disk, in the order that survives a crash at any moment.

In memory the tables are ahead of the disk until a flush. One flush does, for
everything that was dirty when it began:

1. copies the dirty slices (what changes from here on belongs to the next flush);
2. finds clusters for L2 tables that do not exist yet (they read as zeroes) or that
   a snapshot shares (they get the old contents);
3. writes the reference counts;
4. barrier: the data, the new tables and the counts are on disk before anything names them;
5. writes the slices, and the L1 entries of new tables;
6. barrier;
7. what the entries named before is free when requests under way have ended.

A crash before 5 has leaked clusters at worst. In the middle of 5 some entries
are new and some old; both name clusters that are counted and hold what they
should, since the old ones have not been reused.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections.abc import Callable
from typing import Protocol

from vhostblk.engine.map import MapHandle
from vhostblk.nodes.qcow2.allocator import Allocator
from vhostblk.nodes.qcow2.datapath import gather
from vhostblk.nodes.qcow2.geometry import COPIED, OFFSET_MASK, Geometry
from vhostblk.nodes.qcow2.l2cache import L2Cache
from vhostblk.nodes.qcow2.storage import ChildStorage

L1_PIECE = 64  # entries that are written at once: a sector
_AT_ONCE = 64  # slices in flight


class Live(Protocol):
    """What of the image this needs."""

    geometry: Geometry
    map: MapHandle
    file: ChildStorage
    data: ChildStorage
    allocator: Allocator
    l2: L2Cache
    l1: array[int]
    l1_offset: int
    owes_flush: bool
    """The next flush has to come up whatever is dirty here."""

    async def settle_header(self) -> None:
        """The disk has the header that is in force."""


class Writeback:
    """Writes metadata of one image; one flush at a time."""

    def __init__(self, live: Live, failed: Callable[[OSError], None]) -> None:
        self._live = live
        self._failed = failed
        self._lock = asyncio.Lock()
        self._begun = 0
        self._done = 0
        self._l1_dirty: set[int] = set()
        self.begin_log()

    async def flush(self) -> None:
        """What has completed by now is on stable storage afterwards."""
        # One that is under way may have begun too early; the next serves all who wait.
        wanted = self._begun + 1
        async with self._lock:
            if self._done >= wanted:
                return
            self._begun += 1
            serves = self._begun
            await self._live.settle_header()
            await self._flush()
            self._done = serves

    async def _flush(self) -> None:
        live = self._live
        # Whatever the engine allocates from here on sends the next flush up as well.
        live.map.set_dirty(True)
        live.l2.apply_log()
        recorded = live.map.log_taken()
        slices = list(live.l2.dirty.values())
        live.l2.dirty.clear()
        freed, live.allocator.freed = live.allocator.freed, []
        copies = [(slice.index, slice.image()) for slice in slices]
        for slice in slices:
            slice.pins += 1  # read again before it is written, it would be an old one
        try:
            await self._write(copies, freed)
        except BaseException as error:
            for slice in slices:
                live.l2.dirty.setdefault(slice.index, slice)
            live.allocator.freed = freed + live.allocator.freed
            if isinstance(error, OSError):
                self._failed(error)
            raise
        finally:
            for slice in slices:
                slice.pins -= 1
        if live.map.log is not None:
            live.map.log_done(recorded)
            self.recorded = recorded
        live.allocator.free_after_grace(freed)
        if not (live.l2.dirty or self._l1_dirty or live.owes_flush):
            live.map.set_dirty(False)

    async def _write(
        self, copies: list[tuple[int, bytes]], freed: list[tuple[int, int, bool]]
    ) -> None:
        live = self._live
        tables = {index // live.geometry.slices_per_table for index, _ in copies}
        changed = await self._own_tables(sorted(tables))
        try:
            await live.allocator.write_counts()
            await live.allocator.refcounts.barrier(self._barrier)
        except BaseException:
            for entry in changed.values():
                await live.allocator.refcounts.free(entry & OFFSET_MASK, 1)
            raise
        for table, entry in changed.items():
            if live.l1[table]:
                freed.append((live.l1[table] & OFFSET_MASK, 1, False))
            live.l1[table] = entry
            self._l1_dirty.add(table)
        if copies or self._l1_dirty:
            await self._write_all(copies)
            await live.file.flush()
            self._l1_dirty.clear()

    def known_tables(self) -> list[int]:
        """L2 tables of which memory knows a part, and which are not a snapshot's, too: offsets."""
        live = self._live
        per_table = live.geometry.slices_per_table
        entries = (live.l1[table] for table in {i // per_table for i in live.l2.indexes()})
        return sorted(entry & OFFSET_MASK for entry in entries if entry & COPIED)

    async def write_again(self, old: ChildStorage) -> None:
        """Write what memory knows to other storage than the `old`. No barrier.

        Nothing is dirty, and nothing in flight.
        """
        live = self._live
        await live.allocator.refcounts.write_again()
        for host in self.known_tables():
            await live.file.write(host, await old.read(host, live.geometry.cluster_size))
        self._l1_dirty.update(range(len(live.l1)))
        await self._write_all([])
        self._l1_dirty.clear()

    def begin_log(self) -> None:
        """The map has this log now."""
        self.recorded = self._live.map.log_taken()
        """Records of it, since it exists, that are on disk."""

    async def _barrier(self) -> None:
        live = self._live
        if live.data is live.file:
            await live.file.flush()
        else:
            await gather([live.file.flush(), live.data.flush()])

    async def _own_tables(self, tables: list[int]) -> dict[int, int]:
        """Give every table a cluster of its own; the L1 entries that are new."""
        live = self._live
        size = live.geometry.cluster_size
        changed: dict[int, int] = {}
        try:
            for table in tables:
                old = live.l1[table]
                if old & COPIED:
                    continue
                host = await live.allocator.reserve_table()
                changed[table] = host | COPIED
                if old:
                    await live.file.write(host, await live.file.read(old & OFFSET_MASK, size))
                else:
                    await live.file.write_zeroes(host, size)
        except BaseException:
            # Leaked if this fails as well; nothing names them.
            for entry in changed.values():
                await live.allocator.refcounts.free(entry & OFFSET_MASK, 1)
            raise
        return changed

    async def _write_all(self, copies: list[tuple[int, bytes]]) -> None:
        live = self._live
        per_table, size = live.geometry.slices_per_table, live.geometry.slice_bytes
        writes: list[tuple[int, bytes]] = []
        for index, data in sorted(copies):
            table, part = divmod(index, per_table)
            offset = (live.l1[table] & OFFSET_MASK) + part * size
            if writes and writes[-1][0] + len(writes[-1][1]) == offset and part:
                writes[-1] = (writes[-1][0], writes[-1][1] + data)
            else:
                writes.append((offset, data))
        for piece in sorted({table // L1_PIECE for table in self._l1_dirty}):
            first = piece * L1_PIECE
            entries = live.l1[first : first + L1_PIECE]
            writes.append((live.l1_offset + 8 * first, struct.pack(f">{len(entries)}Q", *entries)))
        for start in range(0, len(writes), _AT_ONCE):
            some = writes[start : start + _AT_ONCE]
            await gather([live.file.write(offset, data) for offset, data in some])
