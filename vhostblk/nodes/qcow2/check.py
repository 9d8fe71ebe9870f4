# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking an image: every reference is counted and compared with the counts on disk.

Findings are classified, and counted, as `qemu-img check` does it: a *leak* is a cluster that is
counted more often than it is used, and costs space only; a *corruption* is anything that can
cost data. Repairing exchanges all reference counts for those that were found (see counts.py: one
write of the header, so a crash leaves the old ones or the new ones), then sets the COPIED flags
that follow from them, then, behind a barrier, clears the dirty and the corrupt bit. What cannot be
repaired (entries that point nowhere) is left alone, and then nothing is freed either: what such an
entry was to point to may be among what looks leaked.

Hostile images: an L2 table is read once, however many entries name it; tables outside the
file are not read; memory is 4 bytes for each cluster of the file, and bounded (counts.py); a sparse
file may have room for any number of tables, and there is a limit to those, too.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import groupby

from vhostblk.engine.map import sorted_numbers
from vhostblk.image.check import ImageCheck, Repair
from vhostblk.nodes.qcow2 import bitmaps, snapshots
from vhostblk.nodes.qcow2.counts import PIECE, PIECE_BITS, Counts, Rewrite, load_table
from vhostblk.nodes.qcow2.geometry import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    RESERVED,
    ZERO,
)
from vhostblk.nodes.qcow2.header import (
    CORRUPT,
    DIRTY,
    EXT_ENCRYPTION,
    MAX_L1_BYTES,
    BadImage,
    Header,
)
from vhostblk.nodes.qcow2.layout import (
    Storage,
    bytes_of,
    clusters_of,
    compressed_range,
    entry_words,
    patch_header,
    words_of,
)
from vhostblk.nodes.qcow2.refcounts import unpack_counts

ALL_BITS = (1 << 64) - 1
MAX_TABLES = 1 << 22
"""Clusters of tables. With clusters of 4 KiB, L2 tables of 8 TiB of disks, snapshots included."""
MAX_ALL_L1_BYTES = 1 << 30
"""The same of 64 PiB with clusters of 64 KiB."""
MAX_ALL_BITMAP_TABLE_BYTES = 256 << 20
_KINDS = (
    "header",
    "L1 table",
    "snapshot table",
    "L2 table",
    "refcount table",
    "refcount block",
)
_TURN = 4096  # entries after which others get a turn of the event loop


@dataclass(kw_only=True)
class CheckResult(ImageCheck):
    """What a check of a qcow2 image has found."""

    header: Header | None = None
    """As it is now, after a repair."""


async def check(storage: Storage, header: Header, repair: Repair = "none") -> CheckResult:
    """Check the whole image. To repair it, nobody else may be using it."""
    result = CheckResult(header=header)
    found = _Findings(storage, header, result)
    await found.count_tables()
    await found.count_refcounts()
    disk = await found.disk_counts()
    wrong = found.compare(disk, repair=repair)
    if repair == "none":
        await found.check_flags(disk)
        return result
    await _repair(found, disk, wrong, repair)
    return result


async def repair_dirty(storage: Storage, header: Header) -> Header:
    """Make the reference counts of an image right that was not closed in order; its header then."""
    result = await check(storage, header, "all")
    assert result.header is not None
    if result.corruptions or result.check_errors or result.header.dirty:
        first = result.messages[0] if result.messages else "it is still marked dirty"
        raise BadImage(f"The image was not closed in order and cannot be repaired: {first}")
    return result.header


class _Findings:
    """References found so far."""

    def __init__(self, storage: Storage, header: Header, result: CheckResult) -> None:
        self.storage = storage
        self.header = header
        self.result = result
        self.found = Counts()
        self.file_size = storage.size
        self.file_clusters = -(-self.file_size // header.cluster_size)
        self.structure: list[tuple[int, int]] = []
        """Where the reference counts themselves are."""
        self.rebuild = False
        self.fixable = 0
        """Corruptions that writing new reference counts repairs, whatever the counts are."""
        self.bad_blocks: set[int] = set()
        """Those that cannot be read."""
        self.faulty_blocks: set[int] = set()
        """Those whose contents are not to be kept."""
        self.tables: dict[int, int] = {}
        """What must not share its cluster with anything: how often it is counted, times 8, + kind.

        The kind is an index of _KINDS.
        """
        self._active: dict[int, None] = {}  # offsets of L2 tables
        result.total_clusters = -(-header.size // header.cluster_size)

    def corrupt(self, text: str, times: int = 1) -> None:
        """A corruption."""
        self.result.corruptions += times
        self.result.say(f"ERROR {text}")

    def use(self, what: str, offset: int, length: int, times: int = 1) -> bool:
        """A range is in use; False if it is not in the file.

        The last cluster of a file may be cut short.
        """
        if length <= 0:
            return True
        if offset + length - self.file_size >= self.header.cluster_size:
            self.corrupt(
                f"{what} at {offset:#x} ({length} bytes) lies beyond the end of the file", times
            )
            return False
        for cluster in clusters_of(self.header, offset, length):
            self.found.add(cluster, times)
        return True

    def use_table(self, kind: str, offset: int, length: int, times: int = 1) -> bool:
        """The same for metadata, which share clusters with nothing."""
        if not self.use(kind, offset, length, times):
            return False
        index = _KINDS.index(kind)
        for cluster in clusters_of(self.header, offset, length):
            before = self.tables.get(cluster, index)
            self.tables[cluster] = before + (8 * times if before & 7 == index else 0)
        if len(self.tables) > MAX_TABLES:
            raise BadImage(f"The image has more than {MAX_TABLES} clusters of tables")
        return True

    # ---- counting

    async def count_tables(self) -> None:
        """Everything but the reference counts."""
        header, size = self.header, self.header.cluster_size
        self.use_table("header", 0, size)
        where = [(header.l1_table_offset, header.l1_size, "active L1 table")]
        where += await self._snapshots()
        total = 0
        times: Counter[int] = Counter()
        # The same table several times over is wrong, and must not take several times as long.
        for (offset, count), number in Counter((at, count) for at, count, _ in where).items():
            what = next(what for at, size_, what in where if (at, size_) == (offset, count))
            if not self.use_table("L1 table", offset, 8 * count, number):
                continue
            # Those that are right do not overlap, so all together are not longer than the file.
            total += 8 * count
            if total > self.file_size + MAX_L1_BYTES:
                raise BadImage("The L1 tables of the snapshots overlap each other")
            if total > MAX_ALL_L1_BYTES:
                raise BadImage(f"The L1 tables have more than {MAX_ALL_L1_BYTES} bytes together")
            entries = words_of(await self.storage.read(offset, 8 * count))
            await self._count_l1(entries, what, times, number)
            if what is where[0][2]:
                inside = (word & OFFSET_MASK for word in entries)
                self._active = dict.fromkeys(
                    table for table in inside if 0 < table < self.file_size
                )
        active = self._active
        for offset in active:
            await self._count_l2(offset, times[offset], active=True)
        for offset, number in times.items():
            if offset not in active:
                await self._count_l2(offset, number, active=False)
        await self._bitmaps()
        encryption = header.extension(EXT_ENCRYPTION)
        if encryption is not None and len(encryption) >= 16:
            start = int.from_bytes(encryption[:8], "big")
            self.use("encryption header", start, int.from_bytes(encryption[8:16], "big"))

    async def _snapshots(self) -> list[tuple[int, int, str]]:
        header = self.header
        if not header.nb_snapshots:
            return []
        if header.has_data_file:
            self.corrupt(f"{header.nb_snapshots} snapshots in image with data file")
        try:
            table = await snapshots.read_table(self.storage, header)
        except BadImage as error:
            self.corrupt(error.desc)
            return []
        self.use_table("snapshot table", header.snapshots_offset, table.length)
        found = []
        for one in table.snapshots:
            what = f"L1 table of snapshot '{one.name}'"
            if one.l1_offset % header.cluster_size:
                self.corrupt(f"{what} at {one.l1_offset:#x} is not cluster aligned")
            elif 8 * one.l1_size > MAX_L1_BYTES:
                self.corrupt(f"{what} is too large")
            else:
                found.append((one.l1_offset, one.l1_size, what))
        return found

    async def _count_l1(
        self, entries: array[int], what: str, times: Counter[int], number: int
    ) -> None:
        size = self.header.cluster_size
        for turn, (entry, same) in enumerate(groupby(await sorted_numbers(entries, ALL_BITS))):
            if turn % _TURN == _TURN - 1:
                await asyncio.sleep(0)
            named = number * sum(1 for _ in same)
            if entry & L1_RESERVED:
                self.corrupt(f"{what}: entry {entry:#x} has reserved bits set", named)
            offset = entry & OFFSET_MASK
            if offset % size:
                self.corrupt(f"{what}: entry {entry:#x} is not cluster aligned", named)
                self.use("L2 table", offset, size, named)
            elif self.use_table("L2 table", offset, size, named) and offset:
                times[offset] += named

    async def _count_l2(self, table: int, times: int, *, active: bool) -> None:
        header, result = self.header, self.result
        size, bits = header.cluster_size, header.cluster_bits
        words = words_of(await self.storage.read(table, size))
        if not any(words):
            return
        step = entry_words(header)
        reserved = RESERVED | ZERO if header.version < 3 or step == 2 else RESERVED
        special = COMPRESSED | reserved | (size - 1 & OFFSET_MASK)
        counted = not header.has_data_file
        end = self.file_size + size - 1  # a host offset must be less than this, minus a cluster
        pieces, piece_of, by = self.found.pieces, self.found.piece, times
        following = allocated = fragmented = 0
        for index in range(0, len(words), step):
            word = words[index]
            bitmap = words[index + 1] if step == 2 else 0
            host = word & OFFSET_MASK
            if word & special:
                if word & COMPRESSED:
                    if self._count_compressed(word, bitmap, table, index // step, times) and active:
                        allocated += 1
                        fragmented += 1
                        result.compressed_clusters += 1
                    continue
                where = f"L2 table at {table:#x}, entry {index // step}"
                if word & RESERVED or (step == 2 and word & ZERO):
                    self.corrupt(f"{where} ({word:#x}) has reserved bits set", times)
                elif word & ZERO and header.version < 3:
                    self.corrupt(f"{where} ({word:#x}): zero cluster in version 2", times)
                if host & (size - 1):
                    self.corrupt(f"{where} ({word:#x}): the cluster is not properly aligned", times)
            if not host and not (word & COPIED and header.has_data_file):
                if bitmap & ALL_ALLOCATED:
                    self.corrupt(
                        f"L2 table at {table:#x}, entry {index // step}: subclusters are "
                        f"allocated ({bitmap:#x}) and the cluster is not",
                        times,
                    )
                continue
            if bitmap & bitmap >> 32:
                self.corrupt(
                    f"L2 table at {table:#x}, entry {index // step}: subclusters are both "
                    f"allocated and zero ({bitmap:#x})",
                    times,
                )
            allocated += 1
            if following and host != following:
                fragmented += 1
            following = host + size
            if not counted:
                continue
            if host + size > end or host & (size - 1):
                self.use("data cluster", host, size, times)
                continue
            cluster = host >> bits
            piece = pieces.get(cluster >> PIECE_BITS)
            if piece is None:
                piece = piece_of(cluster >> PIECE_BITS)
            try:
                piece[cluster & PIECE - 1] += by
            except OverflowError:
                self.found.add(cluster, by)
        if active:
            result.allocated_clusters += allocated
            result.fragmented_clusters += fragmented

    def _count_compressed(self, word: int, bitmap: int, table: int, index: int, times: int) -> bool:
        where = f"L2 table at {table:#x}, entry {index} ({word:#x})"
        if word & COPIED:
            self.corrupt(f"{where}: copied flag must never be set for compressed clusters", times)
        if self.header.has_data_file:
            self.corrupt(f"{where}: compressed cluster with data file", times)
            return False
        if bitmap:
            self.corrupt(f"{where}: compressed cluster with subclusters", times)
            return False
        offset, length = compressed_range(self.header.cluster_bits, word)
        self.use("compressed cluster", offset, length, times)
        return True

    async def _bitmaps(self) -> None:
        header, size = self.header, self.header.cluster_size
        try:
            directory = await bitmaps.read_directory(self.storage, header)
        except BadImage as error:
            self.corrupt(error.desc)
            return
        if directory is None:
            return
        self.use("bitmap directory", directory.offset, directory.size)
        # The same table several times over is wrong, and must not take several times as long.
        tables = {(one.table_offset, one.table_entries): one for one in directory.bitmaps}
        times = Counter((one.table_offset, one.table_entries) for one in directory.bitmaps)
        if sum(8 * count for _, count in tables) > MAX_ALL_BITMAP_TABLE_BYTES:
            raise BadImage(
                f"The tables of the bitmaps have more than {MAX_ALL_BITMAP_TABLE_BYTES} bytes"
            )
        for (offset, count), bitmap in tables.items():
            what, by = f"bitmap '{bitmap.name}'", times[offset, count]
            if not self.use(f"table of {what}", offset, 8 * count, by):
                continue
            async for number, entry in bitmaps.table_entries(self.storage, bitmap):
                host = entry & OFFSET_MASK
                if entry & ~OFFSET_MASK & ~ZERO or host % size or (host and entry & ZERO):
                    self.corrupt(f"{what}: table entry {number} ({entry:#x})", by)
                elif host:
                    self.use(what, host, size, by)

    async def count_refcounts(self) -> None:
        """The reference counts' own clusters."""
        header, size = self.header, self.header.cluster_size
        length = header.refcount_table_clusters * size
        if self.use_table("refcount table", header.refcount_table_offset, length):
            self.structure.append((header.refcount_table_offset, length))
        for number, entry in enumerate(await load_table(self.storage, header)):
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)
            if not entry:
                continue
            fault = None
            if entry & 0x1FF:
                fault = "has reserved bits set"
            elif entry % size:
                fault = "is not cluster aligned"
            elif entry >> header.cluster_bits >= self.file_clusters:
                fault = "is outside image"
            else:
                self.use_table("refcount block", entry, size)
                self.structure.append((entry, size))
                if self.found[entry >> header.cluster_bits] != 1:
                    fault = "shares its cluster with something else"
                    self._fault(number, entry, fault, readable=True)
                continue
            self._fault(number, entry, fault, readable=False)

    def _fault(self, number: int, entry: int, fault: str, *, readable: bool) -> None:
        self.corrupt(f"refcount block {number} ({entry:#x}) {fault}")
        self.fixable += 1
        self.rebuild = True
        self.faulty_blocks.add(number)
        if not readable:
            self.bad_blocks.add(number)

    async def disk_counts(self) -> Counts:
        """The counts on disk, as far as they can be read."""
        header, size = self.header, self.header.cluster_size
        per_block = size * 8 // header.refcount_bits
        counts = Counts()
        async for number, block in self._blocks():
            # What is counted beyond the end of the file does not matter to anybody.
            first = number * per_block
            for at in range(0, len(block), PIECE):
                part = block[at : at + PIECE]
                if first + at > self.file_clusters or not any(part):
                    continue
                for index, value in enumerate(part):
                    if value and first + at + index <= self.file_clusters:
                        counts.set(first + at + index, value)
        return counts

    async def _blocks(self) -> AsyncIterator[tuple[int, array[int]]]:
        header, size = self.header, self.header.cluster_size
        for number, entry in enumerate(await load_table(self.storage, header)):
            if entry and number not in self.bad_blocks:
                yield (
                    number,
                    unpack_counts(await self.storage.read(entry, size), header.refcount_bits),
                )

    # ---- comparing

    def compare(self, disk: Counts, *, repair: Repair) -> bool:
        """Counts on disk with those found; whether there is a difference."""
        result, found = self.result, self.found
        most = (1 << self.header.refcount_bits) - 1
        limit = max(self.file_clusters, found.end)
        highest = 0
        wrong = False
        empty = array("I", bytes(4 * PIECE))
        for number in sorted(found.pieces.keys() | disk.pieces.keys()):
            used = found.pieces.get(number, empty)
            said = disk.pieces.get(number, empty)
            first = number << PIECE_BITS
            if used == said:
                if any(used):
                    last = max(index for index, value in enumerate(used) if value)
                    highest = max(highest, first + last)
                continue
            for index in range(PIECE):
                if not (used[index] or said[index]) or first + index >= limit:
                    continue
                highest = first + index
                if used[index] == said[index]:
                    continue
                wrong = True
                self._differs(first + index, said[index], used[index], most)
        result.image_end_offset = highest + 1 << self.header.cluster_bits
        # Tables and what shares their clusters. Reference counts get another place in a repair.
        own = Counter(
            cluster
            for offset, length in self.structure
            for cluster in clusters_of(self.header, offset, length)
        )
        for cluster, value in self.tables.items():
            times, kind = value >> 3, _KINDS[value & 7]
            moves = kind.startswith("refcount")
            if found[cluster] - own[cluster] <= (0 if moves else times):
                continue
            # Where the counts differ that has been said, and counting right does not mend it.
            if found[cluster] == disk[cluster] or (repair == "all" and not moves):
                self.corrupt(f"the {kind} in cluster {cluster} overlaps with something else")
                self.fixable += moves
                self.rebuild |= moves
        return wrong

    def _differs(self, cluster: int, said: int, used: int, most: int) -> None:
        if used > most:
            self.corrupt(
                f"cluster {cluster} refcount={said} reference={used}, more than can be counted; "
                "`qemu-img amend -o refcount_bits=…` or a copy of the image helps"
            )
        elif used > said:
            self.fixable += 1
            self.corrupt(f"cluster {cluster} refcount={said} reference={used}")
        else:
            self.result.leaks += 1
            self.result.say(f"Leaked cluster {cluster} refcount={said} reference={used}")

    # ---- COPIED

    async def check_flags(self, counts: Counts, *, repair: bool = False) -> None:
        """COPIED says that the count is one; only the active tables have to be right."""
        header, size, bits = self.header, self.header.cluster_size, self.header.cluster_bits
        if header.l1_table_offset + 8 * header.l1_size - self.file_size >= size:
            return
        l1 = words_of(await self.storage.read(header.l1_table_offset, 8 * header.l1_size))
        step = entry_words(header)
        seen: set[int] = set()
        changed = 0
        for index, entry in enumerate(l1):
            if index % _TURN == _TURN - 1:
                await asyncio.sleep(0)
            table = entry & OFFSET_MASK
            if not table or table % size or table >= self.file_size:
                continue
            if (counts[table >> bits] == 1) != bool(entry & COPIED):
                changed += self._flag_is_wrong(f"L2 table: L1 entry {index}", entry, repair)
                l1[index] ^= COPIED
            if table in seen:
                continue
            seen.add(table)
            words = words_of(await self.storage.read(table, size))
            here = self._check_table_flags(words, step, counts, repair) if any(words) else 0
            if here and repair:
                await self.storage.write(table, bytes_of(words))
        if changed and repair:
            await self.storage.write(header.l1_table_offset, bytes_of(l1))

    def _check_table_flags(self, words: array[int], step: int, counts: Counts, repair: bool) -> int:
        header, bits = self.header, self.header.cluster_bits
        external, pieces = header.has_data_file, counts.pieces
        changed = 0
        for at in range(0, len(words), step):
            word = words[at]
            host = word & OFFSET_MASK
            if word & COMPRESSED or not (host or (external and word & COPIED)):
                continue
            if external:
                single = True
            else:
                piece = pieces.get(host >> bits >> PIECE_BITS)
                single = piece is not None and piece[(host >> bits) & PIECE - 1] == 1
            if single != word >> 63:
                changed += self._flag_is_wrong("data cluster: L2 entry", word, repair)
                words[at] ^= COPIED
        return changed

    def _flag_is_wrong(self, what: str, entry: int, repair: bool) -> int:
        if repair:
            self.result.corruptions_fixed += 1
            self.result.say(f"Repaired COPIED flag of {what} ({entry:#x})")
        else:
            self.corrupt(f"COPIED flag of {what} ({entry:#x}) does not fit the reference count")
        return 1


async def _repair(found: _Findings, disk: Counts, wrong: bool, repair: Repair) -> None:
    header, result, storage = found.header, found.result, found.storage
    raise_ = repair == "all"
    # An entry that points nowhere may have pointed to what looks leaked.
    lower = result.corruptions == found.fixable
    counts = disk
    if (wrong or found.rebuild) and (raise_ or (result.leaks and not found.rebuild)):
        header = await _write_counts(found, disk, raise_=raise_, lower=lower)
    found.header = header
    safe = lower and not found.fixable
    flags = result.corruptions_fixed
    await found.check_flags(counts, repair=raise_ or safe)
    flags = result.corruptions_fixed - flags
    await storage.flush()
    # What is left, by looking again.
    after = await check(storage, header)
    result.corruptions_fixed = max(result.corruptions - after.corruptions, 0) + flags
    result.leaks_fixed = max(result.leaks - after.leaks, 0)
    result.corruptions, result.leaks = after.corruptions, after.leaks
    result.check_errors, result.image_end_offset = after.check_errors, after.image_end_offset
    if raise_ and not after.corruptions and header.incompatible & (DIRTY | CORRUPT):
        header = await patch_header(
            storage, header, incompatible=header.incompatible & ~(DIRTY | CORRUPT)
        )
        await storage.flush()
    result.header = header


async def _write_counts(found: _Findings, disk: Counts, *, raise_: bool, lower: bool) -> Header:
    """New reference counts; `disk` becomes what is on disk then."""
    new = Counts()
    per_block = found.header.cluster_size * 8 // found.header.refcount_bits
    for block in found.faulty_blocks:
        first = block * per_block
        for cluster in range(first, min(first + per_block, found.file_clusters + 1)):
            if disk[cluster]:
                disk.set(cluster, 0)
    for number in found.found.pieces.keys() | disk.pieces.keys():
        used, said = found.found.pieces.get(number), disk.pieces.get(number)
        if used is None or said is None:
            value = used if used is not None else said
            keep = raise_ if said is None else not lower
            assert value is not None
            if keep:
                new.piece(number)[:] = value
            continue
        merged = [
            (u if raise_ else s) if u > s else (u if lower else s)
            for u, s in zip(used, said, strict=True)
        ]
        new.piece(number)[:] = array("I", merged)
    for offset, length in found.structure:
        for cluster in clusters_of(found.header, offset, length):
            new.add(cluster, -1)
    most = (1 << found.header.refcount_bits) - 1
    for number in list(new.pieces):
        piece = new.pieces[number]
        if max(piece) > most:
            new.pieces[number] = array("I", [min(value, most) for value in piece])
    rewrite = Rewrite(found.storage, found.header, found.found, new)
    header = await rewrite.commit()
    disk.pieces = rewrite.counts.pieces
    return header
