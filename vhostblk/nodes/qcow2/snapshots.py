# SPDX-License-Identifier: GPL-2.0-or-later
"""Internal snapshots: list, create, apply, delete.

Source: docs/interop/qcow2.txt, "Snapshots". A snapshot is an L1 table of its own; what several L1
tables reach is counted several times, and must not be written in place: the COPIED flags in the
active tables say where that is allowed.

Each operation prepares everything in clusters that nobody uses and takes effect with one write of
the header (see counts.py), so a crash leaves the image as before or as after:

* create: the active L1 table becomes the snapshot's; the image gets a new one.
* apply: the image gets a new L1 table that reaches what the snapshot's does.
* delete: what only the snapshot reached counts as free.

In all three, active L2 tables whose COPIED flags are to change are written anew elsewhere, never
changed where they are. Nobody else may be using the image; a live image is drained and
flushed before, and takes the new tables from the disk (internal.py).
"""

from __future__ import annotations

import errno
import struct
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vhostblk.nodes.qcow2.bitmaps import mark_in_use
from vhostblk.nodes.qcow2.counts import MOST, PIECE, PIECE_BITS, Rewrite
from vhostblk.nodes.qcow2.geometry import COMPRESSED, COPIED, OFFSET_MASK
from vhostblk.nodes.qcow2.header import MAX_L1_BYTES, MAX_SNAPSHOTS, BadImage, Header
from vhostblk.nodes.qcow2.layout import (
    Storage,
    WriteHeader,
    bytes_of,
    compressed_range,
    entry_words,
    words_of,
)
from vhostblk.schema import VhostblkError

# QEMU's limits (block/qcow2.h), so that what is written here can be read there.
MAX_TABLE_BYTES = 1024 * MAX_SNAPSHOTS
MAX_EXTRA = 1024
_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQ")
_NO_ICOUNT = struct.pack(">q", -1)


@dataclass(frozen=True)
class Snapshot:
    """An entry of the snapshot table."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    seconds: int
    nanoseconds: int
    vm_clock: int
    vm_state_size: int
    disk_size: int
    extra: bytes = b""
    """What follows the extra data known here."""

    def pack(self) -> bytes:
        """The table entry."""
        extra = _EXTRA.pack(self.vm_state_size, self.disk_size) + self.extra
        id, name = (
            self.id.encode(errors="surrogateescape"),
            self.name.encode(errors="surrogateescape"),
        )
        entry = _ENTRY.pack(
            self.l1_offset, self.l1_size, len(id), len(name), self.seconds, self.nanoseconds,
            self.vm_clock, min(self.vm_state_size, 0xFFFFFFFF), len(extra),
        )  # fmt: skip
        entry += extra + id + name
        return entry + bytes(-len(entry) % 8)

    def describe(self) -> dict[str, Any]:
        """QAPI's SnapshotInfo."""
        facts = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.seconds,
            "date-nsec": self.nanoseconds,
            "vm-clock-sec": self.vm_clock // 1_000_000_000,
            "vm-clock-nsec": self.vm_clock % 1_000_000_000,
        }
        if len(self.extra) >= 8 and self.extra[:8] != _NO_ICOUNT:
            facts["icount"] = int.from_bytes(self.extra[:8], "big")
        return facts


@dataclass(frozen=True)
class SnapshotTable:
    """All internal snapshots of an image."""

    snapshots: tuple[Snapshot, ...]
    length: int
    """Bytes of the table."""


class _Window:
    """Reads a file from some place on, a piece at a time."""

    def __init__(self, storage: Storage, offset: int) -> None:
        self._storage = storage
        self._start = offset
        self._data = b""

    async def at(self, offset: int, length: int) -> bytes:
        if offset < self._start or offset + length > self._start + len(self._data):
            self._start = offset
            self._data = await self._storage.read(offset, max(length, 65536))
        begin = offset - self._start
        return self._data[begin : begin + length]


async def read_table(storage: Storage, header: Header) -> SnapshotTable:
    """The snapshot table; BadImage if it is broken."""
    found: list[Snapshot] = []
    window = _Window(storage, header.snapshots_offset)
    at = header.snapshots_offset
    for number in range(header.nb_snapshots):
        if at + _ENTRY.size > storage.size:
            raise BadImage(f"The snapshot table is cut off after {number} snapshots")
        fixed = await window.at(at, _ENTRY.size)
        l1, l1_size, id_length, name_length, sec, nsec, clock, state, extra = _ENTRY.unpack(fixed)
        if extra > MAX_EXTRA:
            raise BadImage(f"Snapshot table entry {number}: too much extra data ({extra} bytes)")
        length = extra + id_length + name_length
        rest = await window.at(at + _ENTRY.size, length)
        disk = header.size
        if extra >= 8:
            (state,) = struct.unpack_from(">Q", rest)
        if extra >= _EXTRA.size:
            state, disk = _EXTRA.unpack_from(rest)
        found.append(
            Snapshot(
                id=rest[extra : extra + id_length].decode(errors="surrogateescape"),
                name=rest[extra + id_length : length].decode(errors="surrogateescape"),
                l1_offset=l1,
                l1_size=l1_size,
                seconds=sec,
                nanoseconds=nsec,
                vm_clock=clock,
                vm_state_size=state,
                disk_size=disk,
                extra=rest[_EXTRA.size : extra],
            )
        )
        at += -(-(_ENTRY.size + length) // 8) * 8
        if at - header.snapshots_offset > MAX_TABLE_BYTES:
            raise BadImage("The snapshot table is too large")
    return SnapshotTable(tuple(found), at - header.snapshots_offset if found else 0)


def find(table: SnapshotTable, wanted: str) -> Snapshot:
    """The snapshot with this id, or else this name."""
    for attribute in ("id", "name"):
        for snapshot in table.snapshots:
            if getattr(snapshot, attribute) == wanted:
                return snapshot
    known = ", ".join(f"'{one.name}'" for one in table.snapshots[:20]) or "there are none"
    raise VhostblkError(
        f"Snapshot '{wanted}' does not exist in the image; snapshots: {known}",
        data={"code": "no-such-snapshot", "snapshot": wanted},
    )


async def create(
    storage: Storage,
    header: Header,
    name: str,
    *,
    when: float | None = None,
    vm_clock: int = 0,
    write_header: WriteHeader | None = None,
) -> tuple[Header, Snapshot]:
    """Keep the present state as a snapshot; the header as it is now, and the new entry.

    `write_header` is how an image in use commits, here and below.
    """
    table = await _prepare(storage, header)
    if not name or len(name.encode(errors="surrogateescape")) > 0xFFFF:
        raise VhostblkError("A snapshot needs a name of 1 to 65535 bytes")
    if any(name in (one.name, one.id) for one in table.snapshots):
        raise VhostblkError(
            f"Snapshot '{name}' exists already",
            data={"code": "snapshot-exists", "snapshot": name},
        )
    if len(table.snapshots) >= MAX_SNAPSHOTS:
        raise VhostblkError(f"An image cannot have more than {MAX_SNAPSHOTS} snapshots")
    rewrite = await Rewrite.begin(storage, header, write_header)
    entries = await _read_l1(storage, header, header.l1_table_offset, header.l1_size)
    await _count(rewrite, entries, 1)
    entries = await _flags(rewrite, entries)
    now = time.time_ns() if when is None else int(when * 1_000_000_000)
    numbers = [int(one.id) for one in table.snapshots if one.id.isdecimal()]
    snapshot = Snapshot(
        id=str(max(numbers, default=0) + 1),
        name=name,
        l1_offset=header.l1_table_offset,
        l1_size=header.l1_size,
        seconds=now // 1_000_000_000,
        nanoseconds=now % 1_000_000_000,
        vm_clock=vm_clock,
        vm_state_size=0,
        disk_size=header.size,
        extra=_NO_ICOUNT,
    )
    l1_offset = await rewrite.put(bytes_of(entries)) if header.l1_size else header.l1_table_offset
    changes = await _put_table(rewrite, table, (*table.snapshots, snapshot))
    return await rewrite.commit(l1_table_offset=l1_offset, **changes), snapshot


async def delete(
    storage: Storage, header: Header, wanted: str, *, write_header: WriteHeader | None = None
) -> tuple[Header, Snapshot]:
    """Forget a snapshot and free what only it used."""
    table = await _prepare(storage, header)
    snapshot = find(table, wanted)
    rewrite = await Rewrite.begin(storage, header, write_header)
    gone = await _read_l1(storage, header, snapshot.l1_offset, snapshot.l1_size)
    await _count(rewrite, gone, -1)
    rewrite.change(snapshot.l1_offset, 8 * snapshot.l1_size, -1)
    before = await _read_l1(storage, header, header.l1_table_offset, header.l1_size)
    entries = await _flags(rewrite, before)
    changes = {}
    if entries != before:
        rewrite.change(header.l1_table_offset, 8 * header.l1_size, -1)
        changes["l1_table_offset"] = await rewrite.put(bytes_of(entries))
    left = tuple(one for one in table.snapshots if one is not snapshot)
    changes |= await _put_table(rewrite, table, left)
    return await rewrite.commit(**changes), snapshot


async def apply(
    storage: Storage,
    header: Header,
    wanted: str,
    *,
    known: int = 0,
    write_header: WriteHeader | None = None,
) -> tuple[Header, Snapshot]:
    """Make the image what it was when the snapshot was taken, its size included.

    `known`: auto-clear bits that the caller knows and takes care of.
    """
    table = await _prepare(storage, header)
    snapshot = find(table, wanted)
    reach = header.cluster_size * (header.cluster_size // (8 * entry_words(header)))
    if snapshot.disk_size > 1 << 63 or -(-snapshot.disk_size // reach) > snapshot.l1_size:
        raise _corrupt(f"snapshot '{snapshot.name}' is larger than its L1 table allows")
    if header.version < 3 and snapshot.disk_size != header.size:
        raise VhostblkError(
            f"Snapshot '{wanted}' has {snapshot.disk_size} bytes and the image {header.size}; "
            "resize it first (version 2 of the format)"
        )
    # What the bitmaps say of the image is not true of the snapshot.
    resized = snapshot.disk_size != header.size
    header = await mark_in_use(storage, header, every=resized, known=known)
    rewrite = await Rewrite.begin(storage, header, write_header)
    entries = await _read_l1(storage, header, snapshot.l1_offset, snapshot.l1_size)
    await _count(rewrite, entries, 1)
    old = await _read_l1(storage, header, header.l1_table_offset, header.l1_size)
    await _count(rewrite, old, -1)
    if header.l1_size:
        rewrite.change(header.l1_table_offset, 8 * header.l1_size, -1)
    entries = await _flags(rewrite, entries)
    offset = await rewrite.put(bytes_of(entries)) if entries else header.l1_table_offset
    return (
        await rewrite.commit(l1_table_offset=offset, l1_size=len(entries), size=snapshot.disk_size),
        snapshot,
    )


class Editor:
    """Changes the snapshots of one image, whose header it keeps."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        *,
        known: int = 0,
        write_header: WriteHeader | None = None,
    ) -> None:
        self._storage = storage
        self._known = known
        self._write_header = write_header
        self.header = header

    async def create(self, name: str) -> Snapshot:
        """Keep the present state as a snapshot."""
        self.header, snapshot = await create(
            self._storage, self.header, name, write_header=self._write_header
        )
        return snapshot

    async def delete(self, wanted: str) -> Snapshot:
        """Forget a snapshot and free what only it used."""
        self.header, snapshot = await delete(
            self._storage, self.header, wanted, write_header=self._write_header
        )
        return snapshot

    async def apply(self, wanted: str) -> Snapshot:
        """Make the image what it was when the snapshot was taken."""
        self.header, snapshot = await apply(
            self._storage,
            self.header,
            wanted,
            known=self._known,
            write_header=self._write_header,
        )
        return snapshot


# ---- parts


async def _prepare(storage: Storage, header: Header) -> SnapshotTable:
    if header.has_data_file:
        raise VhostblkError("Images with an external data file cannot have internal snapshots")
    if header.corrupt or header.dirty:
        state = "corrupt" if header.corrupt else "dirty"
        raise VhostblkError(
            f"The image is marked {state}; repair it first", data={"code": "bad-image"}
        )
    return await read_table(storage, header)


async def _read_l1(storage: Storage, header: Header, offset: int, count: int) -> array[int]:
    length = 8 * count
    if length > MAX_L1_BYTES or offset % header.cluster_size or (count and not offset):
        raise _corrupt(f"the L1 table at {offset:#x} is not valid")
    if offset + length > storage.size:
        raise _corrupt(f"the L1 table at {offset:#x} reaches beyond the end of the file")
    entries = words_of(await storage.read(offset, length))
    tables = Counter(entry & OFFSET_MASK for entry in entries if entry & OFFSET_MASK)
    for table, times in tables.items():
        if table % header.cluster_size or table + header.cluster_size > storage.size:
            raise _corrupt(f"the L2 table at {table:#x} is outside the file or not aligned")
        if times > 1:
            raise _corrupt(f"an L1 table names the L2 table at {table:#x} {times} times")
    return entries


async def _count(rewrite: Rewrite, l1: array[int], by: int) -> None:
    """Everything an L1 table reaches has one user more or less."""
    header, storage = rewrite.header, rewrite.storage
    size, bits = header.cluster_size, header.cluster_bits
    step = entry_words(header)
    unusual = COMPRESSED | (size - 1 & OFFSET_MASK)
    end = storage.size
    most = min((1 << header.refcount_bits) - 1, MOST)
    number, piece = -1, array("I")
    for entry in l1:
        table = entry & OFFSET_MASK
        if not table:
            continue
        # An image of a tebibyte has 16 million entries: this loop is the pause of a live snapshot.
        words = words_of(await storage.read(table, size))[::step]
        first = words[0] & OFFSET_MASK
        if _is_run(words, size) and not first % size and first + len(words) * size <= end:
            now = rewrite.counts.same(first >> bits, len(words))
            if now is not None and 0 <= now + by <= most:
                rewrite.counts.fill(first >> bits, len(words), now + by)
                rewrite.change(table, size, by)
                continue
        for word in words:
            host = word & OFFSET_MASK
            if word & unusual or host >= end:
                if word & COMPRESSED:
                    rewrite.change(*compressed_range(bits, word), by)
                    continue
                if host % size:
                    raise _corrupt(f"L2 entry {word:#x} does not point to a whole cluster")
                raise _corrupt(f"L2 entry {word:#x} points beyond the end of the file")
            if not host:
                continue
            cluster = host >> bits
            if cluster >> PIECE_BITS != number:
                number = cluster >> PIECE_BITS
                piece = rewrite.counts.piece(number)
            after = piece[cluster & PIECE - 1] + by
            if 0 <= after <= most:
                piece[cluster & PIECE - 1] = after
            else:
                rewrite.change(host, size, by)  # which says what is wrong
        rewrite.change(table, size, by)


def _is_run(words: array[int], size: int) -> bool:
    """Whether a table is full, and its clusters lie behind each other in the file."""
    first = words[0]
    if first & COMPRESSED or not first & OFFSET_MASK:
        return False
    last = first + (len(words) - 1) * size
    return words[-1] == last and words == array("Q", range(first, last + 1, size))


async def _flags(rewrite: Rewrite, l1: array[int]) -> array[int]:
    """What the active L1 table is to be, now that the counts are; copies L2 tables if need be."""
    header, storage = rewrite.header, rewrite.storage
    size, bits = header.cluster_size, header.cluster_bits
    step = entry_words(header)
    counts = rewrite.counts
    result = l1[:]
    number, piece = -1, array("I")
    for index, entry in enumerate(l1):
        table = entry & OFFSET_MASK
        if not table:
            continue
        words = words_of(await storage.read(table, size))
        changed = False
        todo = range(0, len(words), step)
        if step == 1 and _is_run(words, size):
            now = counts.same((words[0] & OFFSET_MASK) >> bits, len(words))
            if now is not None:
                todo = range(0)
                if (now == 1) != words[0] >> 63:
                    first = words[0] ^ COPIED
                    words = array("Q", range(first, first + len(words) * size, size))
                    changed = True
        for at in todo:
            word = words[at]
            host = word & OFFSET_MASK
            if word & COMPRESSED or not host:
                continue
            cluster = host >> bits
            if cluster >> PIECE_BITS != number:
                number = cluster >> PIECE_BITS
                piece = counts.piece(number)
            if (piece[cluster & PIECE - 1] == 1) != word >> 63:
                words[at] = word ^ COPIED
                changed = True
        if changed:
            rewrite.change(table, size, -1)
            result[index] = await rewrite.put(bytes_of(words)) | COPIED
        elif counts[table >> bits] == 1:
            result[index] = table | COPIED
        else:
            result[index] = table
    return result


async def _put_table(
    rewrite: Rewrite, old: SnapshotTable, new: tuple[Snapshot, ...]
) -> dict[str, int]:
    """A new snapshot table; the header's fields that name it."""
    if old.length:
        rewrite.change(rewrite.header.snapshots_offset, old.length, -1)
    if not new:
        return {"nb_snapshots": 0, "snapshots_offset": 0}
    # Version 3 asks for the disk's size in every entry, which entries of version 2 need not have.
    packed = b"".join(one.pack() for one in new)
    if len(packed) > MAX_TABLE_BYTES:
        raise VhostblkError("The snapshot table would be too large")
    return {"nb_snapshots": len(new), "snapshots_offset": await rewrite.put(packed)}


def _corrupt(text: str) -> OSError:
    return OSError(
        errno.EIO, f"the image is corrupt: {text}; `qemu-img check -r all` may repair it"
    )
