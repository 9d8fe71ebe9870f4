# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking a QED image: every cluster named once, and all that is named is in the file.

Facts: QEMU's docs/interop/qed_spec, section "Consistency checking". What a crash leaves is an
entry that names what never got into the file: repaired by making it unallocated, which is
what it was before. Clusters that nobody names are leaked: cut off at the end of the file,
harmless elsewhere.
A cluster named twice is no crash's work, and nothing says who is right.

Hostile images: a file may be as long as its file system allows, and contain nothing. Memory is a
bit for each cluster, where there are clusters in use, and the L1 table's entries.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass

from vhostblk.image.check import ImageCheck, Repair
from vhostblk.nodes.qed.header import NEED_CHECK, BadImage, Header, Writer, write_header
from vhostblk.nodes.qed.tables import entries_from

_CHUNK = 1 << 20
_MOST_CLUSTERS = 1 << 33


@dataclass(kw_only=True)
class QedCheck(ImageCheck):
    """What a check of a QED image has found."""

    header: Header
    """As it is now, after a repair."""
    end: int = 0
    """Where the last cluster that is named ends."""


async def check(storage: Writer, header: Header, repair: Repair = "none") -> QedCheck:
    """Look at all tables. `repair=all` also clears the need-check bit if all is well then."""
    found = _Check(storage, header, repair == "all")
    await found.run()
    result = found.result
    if repair != "none" and not result.corruptions and result.end < storage.size:
        leaked = -(-(storage.size - result.end) // header.cluster_size)
        await storage.truncate(result.end)
        result.leaks_fixed = min(leaked, result.leaks)
        result.leaks -= result.leaks_fixed
        result.image_end_offset = result.end
    if repair == "all" and not result.corruptions:
        await storage.flush()  # the repairs, before the image claims to be sound
        if header.need_check:
            header = header.with_(features=header.features & ~NEED_CHECK)
            await write_header(storage, header)
        result.header = header
    return result


class _Check:
    def __init__(self, storage: Writer, header: Header, fix: bool) -> None:
        self._storage = storage
        self._header = header
        self._fix = fix
        self._end = storage.size
        size = header.cluster_size
        self.result = QedCheck(header=header)
        self.result.total_clusters = -(-header.size // size)
        self.result.image_end_offset = self._end
        self._last = 0
        if self._end // size > _MOST_CLUSTERS:
            raise BadImage(f"the file is too large to be checked ({self._end} bytes)")
        # Those of the header cannot be named; pages of zeroes take no memory.
        self._bits = bytearray(self._end // size // 8 + 1)
        self._used = header.header_size

    async def run(self) -> None:
        header, result = self._header, self.result
        self._use(header.l1_table_offset, header.table_size)
        numbers, tables = array("Q"), array("Q")
        async for at, number, entry in self._entries(header.l1_table_offset):
            if not self._valid(entry, header.table_bytes):
                await self._bad(at, f"L1 entry {number} ({entry:#x}) names no table in the file")
            elif not self._use(entry, header.table_size):
                self.result.say(f"L1 entry {number} ({entry:#x}) names clusters that are in use")
                result.corruptions += 1
            else:
                numbers.append(number)
                tables.append(entry)
        for number, table in zip(numbers, tables, strict=True):
            async for at, index, entry in self._entries(table):
                if entry == 1:
                    continue
                where = f"L2 entry {index} of table {number} ({entry:#x})"
                if not self._valid(entry, header.cluster_size):
                    await self._bad(at, f"{where} names no cluster in the file")
                elif not self._use(entry, 1):
                    self.result.say(f"{where} names a cluster that is in use")
                    result.corruptions += 1
                else:
                    result.allocated_clusters += 1
                    if self._last and entry != self._last + header.cluster_size:
                        result.fragmented_clusters += 1
                    self._last = entry
        result.leaks = max(0, self._end // header.cluster_size - self._used)

    async def _entries(self, table: int) -> AsyncIterator[tuple[int, int, int]]:
        for start in range(0, self._header.table_bytes, _CHUNK):
            length = min(_CHUNK, self._header.table_bytes - start)
            raw = await self._storage.read(table + start, length)
            if raw.count(0) == length:
                continue
            for index, entry in enumerate(entries_from(raw)):
                if entry:
                    yield table + start + 8 * index, start // 8 + index, entry

    def _valid(self, entry: int, length: int) -> bool:
        header = self._header
        return (
            entry % header.cluster_size == 0
            and entry >= header.header_size * header.cluster_size
            and entry + length <= self._end
        )

    def _use(self, offset: int, count: int) -> bool:
        """Whether nobody has named them before."""
        first, free = offset // self._header.cluster_size, True
        for cluster in range(first, first + count):
            at, bit = cluster >> 3, 1 << (cluster & 7)
            if self._bits[at] & bit:
                free = False
            else:
                self._bits[at] |= bit
                self._used += 1
        end = (first + count) * self._header.cluster_size
        self.result.end = max(self.result.end, end)
        return free

    async def _bad(self, at: int, text: str) -> None:
        self.result.say(text)
        if not self._fix:
            self.result.corruptions += 1
            return
        # A sector at a time, as everybody else writes tables.
        sector = at // 512 * 512
        raw = bytearray(await self._storage.read(sector, 512))
        struct.pack_into("<Q", raw, at - sector, 0)
        await self._storage.write(sector, bytes(raw))
        self.result.corruptions_fixed += 1
