# SPDX-License-Identifier: GPL-2.0-or-later
"""Reference counts: how often each cluster of an image is used.

Source: docs/interop/qcow2.txt, "Host cluster management". A table of big-endian offsets
points to blocks, a cluster each, of counts of 1 to 64 bits.

Counts are changed in memory; `write_dirty()` puts them on disk. Order:

* A new block is written, and a barrier set, before the table points to it: a table entry whose
  block is not there yet would make clusters in use look free.
* A count that has gone up must be on disk before anything there names the cluster: callers
  write the counts, set a barrier, and write the name then.
* A count goes down only after nothing on disk names the cluster any more.

A crash in between leaves counts that are too high, clusters that nobody uses: leaks.
"""

from __future__ import annotations

import asyncio
import errno
import struct
import sys
from array import array
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial

from vhostblk.nodes.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, Header
from vhostblk.nodes.qcow2.layout import Storage, WriteHeader, commit_header

SECTOR = 512
# Array types by width; narrower counts are unpacked into bytes.
_TYPES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class InconsistentCounts(OSError):
    """What the image says about its clusters cannot be."""


def unpack_counts(data: bytes, bits: int) -> array[int]:
    """The counts in a block."""
    if bits in _TYPES:
        counts = array(_TYPES[bits], data)
        if sys.byteorder == "little":
            counts.byteswap()
        return counts
    # The least significant bits of a byte come first.
    mask = (1 << bits) - 1
    return array("B", [byte >> shift & mask for byte in data for shift in range(0, 8, bits)])


def pack_counts(counts: array[int], bits: int) -> bytes:
    """A block of counts."""
    if bits in _TYPES:
        packed = counts[:]
        if sys.byteorder == "little":
            packed.byteswap()
        return packed.tobytes()
    per_byte = 8 // bits
    return bytes(
        sum(counts[at + i] << i * bits for i in range(per_byte))
        for at in range(0, len(counts), per_byte)
    )


class Refcounts:
    """The reference counts of one image. Clusters are numbered from the start of the file."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        write_header: WriteHeader | None = None,
    ) -> None:
        self._storage = storage
        self._write_header = write_header or partial(commit_header, storage, header)
        self._bits = header.refcount_bits
        self.cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self.table_offset = header.refcount_table_offset
        self.table_clusters = header.refcount_table_clusters
        self.per_block = self._cluster_size * 8 // self._bits
        self.table = array("Q")
        """Host offset of each block; 0: there is none, its clusters are free."""
        self._blocks: dict[int, array[int]] = {}
        self._read: dict[int, int] = {}  # from where, those that were not made here
        self._dirty: set[int] = set()
        self._table_dirty: set[int] = set()
        self._unsure: tuple[set[int], set[int]] = set(), set()
        """Blocks and table entries that have been written, and no barrier since."""
        self._free_from = 0  # no cluster below is free
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Read the table; blocks are read when they are needed."""
        length = self.table_clusters << self.cluster_bits
        data = await self._storage.read(self.table_offset, length)
        self.table = unpack_counts(data, 64)

    async def _block(self, number: int) -> array[int]:
        block = self._blocks.get(number)
        if block is None:
            offset = self.table[number]
            if offset % self._cluster_size or offset >= self._storage.size:
                raise _corrupt(f"refcount table entry {number} ({offset:#x}) is not valid")
            if offset and self._read.setdefault(offset, number) != number:
                # A million times the same one must not take a million times the memory either.
                raise _corrupt(f"refcount table entries name the same block ({offset:#x})")
            data = await self._storage.read(offset, self._cluster_size) if offset else None
            block = self._blocks.get(number)  # somebody may have been faster
            if block is None:
                empty = bytes(self._cluster_size)
                block = unpack_counts(empty if data is None else data, self._bits)
                self._blocks[number] = block
        return block

    async def get(self, cluster: int) -> int:
        """The count of a cluster."""
        number, index = divmod(cluster, self.per_block)
        return (await self._counts(number, index, 1))[0]

    # ---- taking

    async def reserve(self, count: int) -> int:
        """Take `count` free clusters in a row, as low as possible; the offset of the first."""
        async with self._lock:
            first, _ = await self._take(count, count)
            return first << self.cluster_bits

    async def reserve_some(self, most: int) -> tuple[int, int]:
        """Take the first free clusters there are, up to `most` in a row; offset and number."""
        async with self._lock:
            first, count = await self._take(1, most)
            return first << self.cluster_bits, count

    async def _take(self, least: int, most: int) -> tuple[int, int]:
        while True:
            first, count = await self._find(least, most)
            if await self._cover(first, count):
                break
            # Blocks have taken some of the clusters: look again.
        await self._fill(first, count)
        if first <= self._free_from:
            self._free_from = first + count
        return first, count

    async def adopt(self, clusters: Iterable[int]) -> None:
        """These are in use, whatever is on disk: what a killed process had not written."""
        async with self._lock:
            wanted = set(clusters)
            for cluster in sorted(wanted):
                number = cluster // self.per_block
                if number >= len(self.table):
                    raise _corrupt(f"cluster {cluster} lies beyond the refcount table")
                if not self.table[number] and number not in self._blocks:
                    place = await self._place_beside(wanted, number)
                    self._blocks[number] = unpack_counts(bytes(self._cluster_size), self._bits)
                    self.table[number] = place << self.cluster_bits
                    self._table_dirty.add(number)
                    await self._put(place, 1)
                if await self.get(cluster) == 0:
                    await self._put(cluster, 1)

    async def _place_beside(self, wanted: set[int], number: int) -> int:
        """A cluster for the block with this number that the log does not need."""
        # Nothing else is in use where there is no block.
        start = number * self.per_block
        for cluster in range(start, start + self.per_block):
            if cluster not in wanted:
                return cluster
        # Or one that a block in front counts, which gets to the disk first.
        for cluster in range(start):
            if not self.table[cluster // self.per_block] or cluster in wanted:
                continue
            if await self.get(cluster) == 0:
                return cluster
        for cluster in range(start, len(self.table) * self.per_block):
            if cluster in wanted or await self.get(cluster):
                continue
            await self._cover(cluster, 1)
            if await self.get(cluster) == 0:
                return cluster
        raise OSError(errno.ENOSPC, "the image has no place for a block of reference counts")

    async def _find(self, least: int, most: int) -> tuple[int, int]:
        """The first row of at least `least` free clusters, up to `most` of it; first, count.

        They may lie beyond the table.
        """
        start, row = self._free_from, 0
        while row < most:
            number, index = divmod(start + row, self.per_block)
            rest = self.per_block - index
            if number >= len(self.table) or not (self.table[number] or number in self._blocks):
                row += rest  # all of them are free
                continue
            block = await self._block(number)
            free = _zeroes(block, index, min(rest, most - row))
            row += free
            if row >= most or free == rest:
                continue
            if row >= least:
                break
            used = index + free
            start, row = number * self.per_block + _first_zero(block, used), 0
        return start, min(row, most)

    async def _fill(self, first: int, count: int) -> None:
        """Clusters that were free have one user."""
        end = first + count
        while first < end:
            number, index = divmod(first, self.per_block)
            block = await self._block(number)
            here = min(self.per_block - index, end - first)
            block[index : index + here] = array(block.typecode, [1]) * here
            self._dirty.add(number)
            first += here

    async def _cover(self, first: int, count: int) -> bool:
        """Make blocks for these clusters; False if that has taken some of them."""
        last = (first + count - 1) // self.per_block
        if last >= len(self.table):
            await self._grow_table(last + 1)
            return False
        missing = [n for n in range(first // self.per_block, last + 1) if not self.table[n]]
        # In front of the run, not inside it: a run may need many blocks.
        for number, cluster in zip(missing, range(first, first + len(missing)), strict=True):
            self._blocks[number] = unpack_counts(bytes(self._cluster_size), self._bits)
            self.table[number] = cluster << self.cluster_bits
            self._dirty.add(number)
            self._table_dirty.add(number)
        for cluster in range(first, first + len(missing)):
            await self._put(cluster, 1)
        return not missing

    async def _grow_table(self, blocks: int) -> None:
        """A longer table, behind everything that the old one knows; then the header names it."""
        size = self._cluster_size
        start = len(self.table) * self.per_block
        wanted = max(blocks + 1, len(self.table) * 3 // 2)
        while True:
            clusters = -(-wanted * 8 // size)
            entries = clusters * size // 8
            # The new table, and the blocks that describe it and themselves.
            own = 1
            while own * self.per_block < clusters + own:
                own += 1
            if entries >= len(self.table) + own:
                break
            wanted = len(self.table) + own
        if clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the image has reached the largest size of its format")
        old_offset, old_clusters = self.table_offset, self.table_clusters
        first_own = len(self.table)
        table = self.table + array("Q", bytes(8 * (entries - len(self.table))))
        fresh: dict[int, array[int]] = {}
        for number in range(first_own, first_own + own):
            fresh[number] = unpack_counts(bytes(size), self._bits)
            table[number] = (start + number - first_own) << self.cluster_bits
        for cluster in range(start, start + own + clusters):
            fresh[cluster // self.per_block][cluster % self.per_block] = 1
        offset = (start + own) << self.cluster_bits
        # What the old table points to, and what it is to point to, first.
        await self._write_dirty()
        for number, block in fresh.items():
            await self._storage.write(table[number], pack_counts(block, self._bits))
        await self._storage.write(offset, struct.pack(f">{entries}Q", *table))
        await self._storage.flush()
        # A crash before this leaves the old table, which knows nothing of the new clusters.
        await self._write_header(refcount_table_offset=offset, refcount_table_clusters=clusters)
        self.table, self.table_offset, self.table_clusters = table, offset, clusters
        self._blocks.update(fresh)
        await self._free(old_offset >> self.cluster_bits, old_clusters)

    async def end(self, known: Collection[int]) -> int:
        """Where the last cluster in use ends, but for those at `known` offsets and our own."""
        own = {self.table[number] for number in self._blocks}
        own.update(self.table_offset + n * self._cluster_size for n in range(self.table_clusters))
        for number in reversed(range(len(self.table))):
            if not self.table[number]:
                continue
            block = await self._block(number)
            for index in reversed(range(self.per_block)):
                host = (number * self.per_block + index) << self.cluster_bits
                if block[index] and host not in own and host not in known:
                    return host + self._cluster_size
        return 0

    # ---- changing

    async def _put(self, cluster: int, value: int) -> None:
        number, index = divmod(cluster, self.per_block)
        (await self._block(number))[index] = value
        self._dirty.add(number)

    async def _counts(self, number: int, index: int, count: int) -> Sequence[int]:
        """Those of some clusters that share a block; no block: nobody uses any of them."""
        if number >= len(self.table) or not (self.table[number] or number in self._blocks):
            return bytes(count)
        return (await self._block(number))[index : index + count]

    async def _free(self, first: int, count: int) -> bool:
        end, left = first + count, False
        while first < end:
            number, index = divmod(first, self.per_block)
            here = min(self.per_block - index, end - first)
            counts = await self._counts(number, index, here)
            if not min(counts):
                cluster = first + counts.index(0)
                raise _corrupt(f"cluster {cluster} is given back and was not in use")
            block = self._blocks[number]
            block[index : index + here] = array(block.typecode, [users - 1 for users in counts])
            self._dirty.add(number)
            if 1 in counts:
                self._free_from = min(self._free_from, first + counts.index(1))
            left = left or max(counts) > 1
            first += here
        return not left

    async def free(self, host: int, count: int) -> bool:
        """One user less for `count` clusters; whether nobody uses any of them any more."""
        async with self._lock:
            return await self._free(host >> self.cluster_bits, count)

    # ---- to disk

    async def write_dirty(self) -> None:
        """Write what has changed. Blocks that are new get a barrier; the rest is the caller's."""
        async with self._lock:
            await self._write_dirty()

    async def _write_dirty(self) -> None:
        dirty, self._dirty = self._dirty, set()
        try:
            for number in sorted(dirty):
                data = pack_counts(self._blocks[number], self._bits)
                await self._storage.write(self.table[number], data)
        except BaseException:
            self._dirty |= dirty
            raise
        self._unsure[0].update(dirty)
        if not self._table_dirty:
            return
        sector = None
        for number in sorted(self._table_dirty):
            at = self.table_offset + 8 * number
            if at // SECTOR != sector:
                # The blocks, then the table; and in the table first the sectors that come first,
                # since a new block may be counted in one before it, which is new, too.
                await self.barrier(self._storage.flush)
                sector = at // SECTOR
            await self._storage.write(at, struct.pack(">Q", self.table[number]))
        self._unsure[1].update(self._table_dirty)
        self._table_dirty.clear()

    async def write_again(self) -> None:
        """Write all that is in memory once more: the storage has become another one. No barrier."""
        async with self._lock:
            for number, block in sorted(self._blocks.items()):
                if self.table[number]:
                    await self._storage.write(self.table[number], pack_counts(block, self._bits))
            table = struct.pack(f">{len(self.table)}Q", *self.table)
            await self._storage.write(self.table_offset, table)

    async def barrier(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Flush. If that fails, what was written before is written once more.

        Linux takes pages for clean that it could not write: another flush would not write them.
        """
        (blocks, entries), self._unsure = self._unsure, (set(), set())
        try:
            await flush()
        except BaseException:
            self._dirty |= blocks
            self._table_dirty |= entries
            raise


def _zeroes(counts: array[int], start: int, most: int) -> int:
    """How many counts from `start` on are zero; looks at no more than `most`."""
    data = counts[start : start + most].tobytes()
    return (len(data) - len(data.lstrip(b"\0"))) // counts.itemsize


def _first_zero(counts: array[int], start: int) -> int:
    """Where the first zero from `start` on is; the end if there is none."""
    data, size = counts.tobytes(), counts.itemsize
    at = data.find(bytes(size), start * size)
    while at >= 0 and at % size:  # the end of one count and the beginning of the next
        at = data.find(bytes(size), at + 1)
    return at // size if at >= 0 else len(counts)


def _corrupt(text: str) -> InconsistentCounts:
    return InconsistentCounts(errno.EIO, f"the image is corrupt: {text}")
