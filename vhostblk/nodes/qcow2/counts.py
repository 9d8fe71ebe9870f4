# SPDX-License-Identifier: GPL-2.0-or-later
"""All reference counts of an image in memory, and exchanging those on disk as a whole.

What changes many counts at once (snapshots, repairs) does not change them in place. It

1. writes everything new (tables, and all reference counts as they are to be) to clusters that
   nothing on disk uses,
2. sets a barrier,
3. writes the header once: 80 bytes in one sector, which names the new tables instead of the old,
4. sets a barrier.

A crash before 3 leaves the image as it was, one after it the image as it is to be. No state is
in between, so nothing can be corrupt, and nothing is leaked either: what was written in vain
counts as free.

Counts are kept in pieces of 4096, and only for clusters that have one, so that a large sparse file
does not need memory for what is not in it.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from functools import partial

from vhostblk.nodes.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, BadImage, Header
from vhostblk.nodes.qcow2.layout import (
    Storage,
    WriteHeader,
    bytes_of,
    clusters_of,
    commit_header,
    words_of,
)
from vhostblk.nodes.qcow2.refcounts import pack_counts, unpack_counts

PIECE_BITS = 12
PIECE = 1 << PIECE_BITS
_INDEX = PIECE - 1
_EMPTY = bytes(4 * PIECE)
MOST = (1 << 32) - 1
MAX_PIECES = (1 << 30) // (4 * PIECE)  # 1 GiB


class Counts:
    """Numbers by cluster, from 0 to 2**32-1 (where they stay)."""

    def __init__(self) -> None:
        self.pieces: dict[int, array[int]] = {}

    def piece(self, number: int) -> array[int]:
        """The counts from cluster `number << PIECE_BITS` on, to be changed."""
        piece = self.pieces.get(number)
        if piece is None:
            if len(self.pieces) >= MAX_PIECES:
                raise BadImage("The image needs more than 1 GiB of memory for its reference counts")
            piece = self.pieces[number] = array("I", _EMPTY)
        return piece

    def __getitem__(self, cluster: int) -> int:
        piece = self.pieces.get(cluster >> PIECE_BITS)
        return piece[cluster & _INDEX] if piece is not None else 0

    def add(self, cluster: int, by: int = 1) -> None:
        """Change one; it never leaves what is possible."""
        piece = self.piece(cluster >> PIECE_BITS)
        try:
            piece[cluster & _INDEX] += by
        except OverflowError:
            piece[cluster & _INDEX] = MOST if by > 0 else 0

    def set(self, cluster: int, value: int) -> None:
        """Replace one."""
        self.piece(cluster >> PIECE_BITS)[cluster & _INDEX] = min(value, MOST)

    def same(self, first: int, count: int) -> int | None:
        """What all of `count` clusters in a row have, if it is the same."""
        values = self.slice(first, count)
        return values[0] if values.count(values[0]) == count else None

    def fill(self, first: int, count: int, value: int) -> None:
        """Give them all the same."""
        end = first + count
        while first < end:
            index = first & _INDEX
            take = min(PIECE - index, end - first)
            self.piece(first >> PIECE_BITS)[index : index + take] = array("I", [value]) * take
            first += take

    def slice(self, first: int, count: int) -> array[int]:
        """`count` of them in a row."""
        result = array("I")
        end = first + count
        while first < end:
            number, index = first >> PIECE_BITS, first & _INDEX
            take = min(PIECE - index, end - first)
            piece = self.pieces.get(number)
            result.extend(piece[index : index + take] if piece else array("I", _EMPTY[: 4 * take]))
            first += take
        return result

    def used(self) -> Iterator[int]:
        """Numbers of the pieces in which something is not 0, in order."""
        return (number for number in sorted(self.pieces) if any(self.pieces[number]))

    @property
    def end(self) -> int:
        """One more than the last cluster whose count is not 0."""
        for number in sorted(self.pieces, reverse=True):
            piece = self.pieces[number]
            if any(piece):
                last = next(index for index in range(PIECE - 1, -1, -1) if piece[index])
                return (number << PIECE_BITS) + last + 1
        return 0


async def load_table(storage: Storage, header: Header) -> array[int]:
    """The reference count table."""
    length = header.refcount_table_clusters << header.cluster_bits
    # What lies beyond the end of the file is nothing, and must not cost memory.
    length = min(length, max(0, storage.size - header.refcount_table_offset) // 8 * 8)
    return words_of(await storage.read(header.refcount_table_offset, length))


async def load(storage: Storage, header: Header) -> Counts:
    """The counts on disk; they have to be well-formed."""
    counts = Counts()
    cluster = header.cluster_size
    per_block = cluster * 8 // header.refcount_bits
    for number, offset in enumerate(await load_table(storage, header)):
        if not offset:
            continue
        if offset % cluster or offset + cluster > storage.size + cluster - 1:
            raise _corrupt(f"refcount table entry {number} ({offset:#x}) is not valid")
        block = unpack_counts(await storage.read(offset, cluster), header.refcount_bits)
        if any(block):
            _store(counts, number * per_block, block)
    return counts


def _store(counts: Counts, first: int, block: array[int]) -> None:
    at = 0
    while at < len(block):
        index = first + at & _INDEX
        take = min(PIECE - index, len(block) - at)
        part = block[at : at + take]
        if any(part):
            if part.typecode == "Q":
                part = array("I", [min(value, MOST) for value in part])
            elif part.typecode != "I":
                part = array("I", list(part))
            counts.piece(first + at >> PIECE_BITS)[index : index + take] = part
        at += take


class Rewrite:
    """An operation that ends with one write of the header (see the top of this module)."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        busy: Counts,
        counts: Counts,
        write_header: WriteHeader | None = None,
    ) -> None:
        self.storage = storage
        self.header = header
        self._write_header = write_header or partial(commit_header, storage, header)
        self.counts = counts
        """How often each cluster is to be used, without the reference counts' own clusters."""
        self._taken: dict[int, bytearray] = {}
        self._from = 0
        for source in (busy, counts):
            for number, piece in source.pieces.items():
                mark = self._taken.get(number)
                if 0 not in piece:
                    self._taken[number] = bytearray(b"\1" * PIECE)
                elif mark is None:
                    self._taken[number] = bytearray(map(bool, piece))
                else:
                    for index, value in enumerate(piece):
                        if value:
                            mark[index] = 1
        self._end = max(busy.end, counts.end, -(-storage.size // header.cluster_size))
        self._max = (1 << header.refcount_bits) - 1

    @classmethod
    async def begin(
        cls, storage: Storage, header: Header, write_header: WriteHeader | None = None
    ) -> Rewrite:
        """Change the counts that are on disk."""
        busy = await load(storage, header)
        counts = Counts()
        counts.pieces = {number: piece[:] for number, piece in busy.pieces.items()}
        rewrite = cls(storage, header, busy, counts, write_header)
        # The counts' own clusters go.
        where = header.refcount_table_offset
        length = header.refcount_table_clusters << header.cluster_bits
        rewrite.change(where, length, -1)
        for offset in await load_table(storage, header):
            if offset:
                rewrite.change(offset, header.cluster_size, -1)
        return rewrite

    # ---- counts

    def change(self, offset: int, length: int, by: int) -> None:
        """`by` users more for every cluster that a range touches."""
        for cluster in clusters_of(self.header, offset, length):
            after = self.counts[cluster] + by
            if after < 0:
                raise _corrupt(f"the cluster at {offset:#x} is in use and not counted")
            if after > self._max:
                raise OSError(
                    errno.ERANGE,
                    f"a reference count of more than {self._max}, which {self.header.refcount_bits}"
                    " bit(s) cannot hold; `qemu-img amend -o refcount_bits=…` makes them wider",
                )
            self.counts.set(cluster, after)

    # ---- clusters

    def take(self, count: int = 1) -> int:
        """Clusters in a row that neither the old nor the new image uses; the first's offset."""
        first = self._find(count)
        for cluster in range(first, first + count):
            mark = self._taken.setdefault(cluster >> PIECE_BITS, bytearray(PIECE))
            mark[cluster & _INDEX] = 1
            self.counts.set(cluster, 1)
        self._end = max(self._end, first + count)
        return first << self.header.cluster_bits

    def _find(self, count: int) -> int:
        if count <= PIECE:
            free = bytes(count)
            number = self._from
            while number << PIECE_BITS < self._end:
                mark = self._taken.get(number)
                at = 0 if mark is None else mark.find(free)
                if at >= 0:
                    if count == 1:
                        self._from = number
                    return (number << PIECE_BITS) + at
                number += 1
        return self._end

    async def put(self, data: bytes) -> int:
        """Write something new; its offset."""
        size = self.header.cluster_size
        count = max(1, -(-len(data) // size))
        offset = self.take(count)
        await self.storage.write(offset, data + bytes(count * size - len(data)))
        return offset

    # ---- the end

    async def commit(self, **changes: int) -> Header:
        """Write the reference counts, then the header; that is when all of it happens."""
        size, bits = self.header.cluster_size, self.header.refcount_bits
        per_block = size * 8 // bits
        blocks, offset, length = self._place_blocks(per_block)
        for number, at in blocks.items():
            values = self.counts.slice(number * per_block, per_block)
            typecode = unpack_counts(b"", bits).typecode
            if typecode != values.typecode:
                values = array(typecode, list(values))
            await self.storage.write(at, pack_counts(values, bits))
        table = array("Q", bytes(length * size))
        for number, at in blocks.items():
            table[number] = at
        await self.storage.write(offset, bytes_of(table))
        await self.storage.flush()
        return await self._write_header(
            refcount_table_offset=offset, refcount_table_clusters=length, **changes
        )

    def _place_blocks(self, per_block: int) -> tuple[dict[int, int], int, int]:
        """Clusters for blocks and table, which count themselves."""
        size = self.header.cluster_size
        blocks: dict[int, int] = {}
        needed: set[int] = set()
        for number in self.counts.used():
            first = number << PIECE_BITS
            if per_block >= PIECE:
                needed.add(first // per_block)
                continue
            for block in range(first // per_block, (first + PIECE) // per_block):
                if any(self.counts.slice(block * per_block, per_block)):
                    needed.add(block)
        offset, length = 0, 0
        while True:
            while waiting := sorted(needed - blocks.keys()):
                for block in waiting:
                    at = blocks[block] = self.take()
                    needed.add((at // size) // per_block)
            wanted = max(-(-(max(needed, default=0) + 1) * 8 // size), 1)
            if length >= wanted:
                return blocks, offset, length
            if length:
                self.change(offset, length * size, -1)
            length = max(wanted, self.header.refcount_table_clusters if not length else 0)
            if wanted * size > MAX_REFCOUNT_TABLE_BYTES:
                raise OSError(errno.EFBIG, "the image has reached the largest size of its format")
            offset = self.take(length)
            needed.update(at // per_block for at in clusters_of(self.header, offset, length * size))


def _corrupt(text: str) -> OSError:
    return OSError(
        errno.EIO, f"the image is corrupt: {text}; `qemu-img check -r all` may repair it"
    )
