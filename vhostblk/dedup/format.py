# SPDX-License-Identifier: GPL-2.0-or-later
"""What a dedup store looks like on its data device, and the records of its journal.

docs/dedup.md describes all of it. The data device begins with a superblock, written once, and a
sector that is written whenever the store is opened. After 64 KiB come the segments, which are
filled from front to back, one after the other: with blocks, some of them with the ledger.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from vhostblk.engine.dedup import blake3
from vhostblk.schema import VhostblkError

SUPERBLOCK = 4096
FIRST_SEGMENT = 64 << 10
SECTOR = 512
BLOCK_BITS = range(12, 17)
"""Blocks have 4 KiB to 64 KiB."""
SEGMENT_BITS = range(18, 29)
"""Segments have 256 KiB to 256 MiB."""
_MAGIC = b"vhostblk dedup\0\0"
_VERSION = 2
"""Version 1 had no ledger. A store stays what it was made as."""
_SUPERBLOCK = struct.Struct("<16sIIII16s16s")

HASHES: dict[str, Callable[[bytes | bytearray | memoryview], bytes]] = {
    "blake3": blake3,
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
"""Fingerprints that a store may use; 32 bytes each. The engine has all of them."""
_HASH_NUMBERS = {1: "sha256", 3: "blake3"}


@dataclass(frozen=True)
class Superblock:
    """What never changes about a store."""

    block_bits: int
    segment_bits: int
    hash: str
    uuid: bytes
    version: int = _VERSION

    @property
    def has_ledger(self) -> bool:
        """Whether the data device has records of the metadata, too (vhostblk/dedup/ledger.py)."""
        return self.version > 1

    @property
    def block_size(self) -> int:
        return 1 << self.block_bits

    @property
    def segment_size(self) -> int:
        return 1 << self.segment_bits

    def pack(self) -> bytes:
        number = next(n for n, name in _HASH_NUMBERS.items() if name == self.hash)
        body = _SUPERBLOCK.pack(
            _MAGIC, self.version, self.block_bits, self.segment_bits, number, self.uuid, bytes(16)
        )
        return (body + hashlib.sha256(body).digest()).ljust(SUPERBLOCK, b"\0")

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Superblock:
        body = bytes(data[: _SUPERBLOCK.size])
        magic, version, block_bits, segment_bits, number, uuid, _ = _SUPERBLOCK.unpack(body)
        if magic != _MAGIC:
            raise VhostblkError(
                "there is no dedup store on the data device; create one with blockdev-create",
                data={"code": "not-dedup"},
            )
        if hashlib.sha256(body).digest() != bytes(data[len(body) : len(body) + 32]):
            raise VhostblkError(
                "the superblock of the dedup store is damaged", data={"code": "corrupt"}
            )
        if not 1 <= version <= _VERSION or number not in _HASH_NUMBERS:
            raise VhostblkError(
                f"the dedup store has version {version} and hash {number}; this program knows "
                f"versions 1 to {_VERSION} and hashes {', '.join(map(str, _HASH_NUMBERS))}",
                data={"code": "unsupported"},
            )
        if block_bits not in BLOCK_BITS or segment_bits not in SEGMENT_BITS:
            raise VhostblkError(
                f"the superblock of the dedup store says blocks of 2^{block_bits} bytes and "
                f"segments of 2^{segment_bits}: there are none like that",
                data={"code": "corrupt"},
            )
        return cls(block_bits, segment_bits, _HASH_NUMBERS[number], uuid, version)

    def segments(self, size: int) -> int:
        """How many fit on a data device of that size."""
        return max(0, size - FIRST_SEGMENT) >> self.segment_bits

    def segment_at(self, number: int) -> int:
        """Where one begins."""
        return FIRST_SEGMENT + (number << self.segment_bits)

    def segment_of(self, offset: int) -> int:
        """The segment that an offset on the data device belongs to."""
        return (offset - FIRST_SEGMENT) >> self.segment_bits


LIFE_AT = SUPERBLOCK
"""Behind the superblock: which life of the store has last written to the data device."""
_LIFE_MAGIC = b"vhostblk life\0\0\0"
_LIFE = struct.Struct("<16sQ")


def pack_life(uuid: bytes, life: int) -> bytes:
    """The sector there."""
    body = _LIFE.pack(_LIFE_MAGIC, life)
    return (body + hashlib.sha256(uuid + body).digest()).ljust(SUPERBLOCK, b"\0")


def parse_life(uuid: bytes, data: bytes | bytearray) -> int:
    """What it says; 0: nothing."""
    body = bytes(data[: _LIFE.size])
    if bytes(data[len(body) : len(body) + 32]) != hashlib.sha256(uuid + body).digest():
        return 0
    magic, life = _LIFE.unpack(body)
    return int(life) if magic == _LIFE_MAGIC else 0


class Block(NamedTuple):
    """A stored block. A `length` below the block size says that it is compressed."""

    offset: int
    length: int
    refs: int
    fingerprint: bytes

    @property
    def space(self) -> int:
        """Bytes of the data device."""
        return stored_space(self.length)


def stored_space(length: int) -> int:
    """Bytes of the data device for a block of that stored length."""
    return -(-length // SECTOR) * SECTOR


_BLOCK = struct.Struct("<QII32s")
BLOCK_VALUE = _BLOCK.size


def pack_block(block: Block) -> bytes:
    """As the metadata store keeps it."""
    return _BLOCK.pack(*block)


def unpack_block(value: bytes) -> Block:
    """The opposite."""
    return Block._make(_BLOCK.unpack(value))


# ---- records of the journal and the ledger -----------------------------------------------


class Stored(NamedTuple):
    """A block is at this place: a new one, or one that has moved."""

    number: int
    offset: int
    length: int
    fingerprint: bytes


class Mapped(NamedTuple):
    """Blocks of a disk from `first` on show the stored block `number` (0: zeroes)."""

    disk: int
    first: int
    blocks: int
    number: int


class Marked(NamedTuple):
    """All frames before this one speak of blocks that are on stable storage."""

    frame: int


DISK_NAME_MAX = 255
"""Bytes of UTF-8."""


class Disk(NamedTuple):
    """A disk has this size and name; without a name it is gone."""

    disk: int
    size: int
    name: str


class Taken(NamedTuple):
    """A segment is the ledger's from now on."""

    segment: int


class Gone(NamedTuple):
    """Stored blocks from `first` on have ended: nothing showed them. In the ledger only."""

    first: int
    blocks: int


class Kept(NamedTuple):
    """A stored block as the database has it. In snapshots in the ledger only."""

    number: int
    value: bytes


class Page(NamedTuple):
    """A page of a disk's map as the database has it. In snapshots in the ledger only."""

    disk: int
    page: int
    value: bytes


Record = Stored | Mapped | Marked | Disk | Taken | Gone | Kept | Page

_STORED = struct.Struct("<BQQI32s")
_MAPPED = struct.Struct("<BIQQQ")
_MARKED = struct.Struct("<BQ")
_DISK = struct.Struct("<BIQB")
_TAKEN = struct.Struct("<BQ")
_GONE = struct.Struct("<BQQ")
_KEPT = struct.Struct("<BQ48s")
_PAGE = struct.Struct("<BIQH")
_PLAIN: dict[int, tuple[struct.Struct, Callable[[Iterable[Any]], Record]]] = {
    1: (_MAPPED, Mapped._make),
    2: (_STORED, Stored._make),
    3: (_MARKED, Marked._make),
    5: (_TAKEN, Taken._make),
    6: (_GONE, Gone._make),
    7: (_KEPT, Kept._make),
}
assert BLOCK_VALUE == 48


def pack_record(record: Record) -> bytes:
    """As it is in a frame."""
    if isinstance(record, Mapped):
        return _MAPPED.pack(1, *record)
    if isinstance(record, Stored):
        return _STORED.pack(2, *record)
    if isinstance(record, Disk):
        name = record.name.encode()
        return _DISK.pack(4, record.disk, record.size, len(name)) + name
    if isinstance(record, Page):
        return _PAGE.pack(8, record.disk, record.page, len(record.value)) + record.value
    if isinstance(record, Kept):
        return _KEPT.pack(7, *record)
    if isinstance(record, Gone):
        return _GONE.pack(6, *record)
    if isinstance(record, Taken):
        return _TAKEN.pack(5, *record)
    return _MARKED.pack(3, *record)


def pack_records(records: Iterable[Record]) -> bytes:
    """A frame's content."""
    return b"".join(map(pack_record, records))


def unpack_records(data: bytes) -> Iterator[Record]:
    """All records of a frame."""
    at = 0
    while at < len(data):
        kind = data[at]
        if kind in _PLAIN:
            layout, make = _PLAIN[kind]
            yield make(layout.unpack_from(data, at)[1:])
            at += layout.size
        elif kind == 4:
            _, disk, size, length = _DISK.unpack_from(data, at)
            at += _DISK.size
            yield Disk(disk, size, data[at : at + length].decode())
            at += length
        elif kind == 8:
            _, disk, page, length = _PAGE.unpack_from(data, at)
            at += _PAGE.size
            yield Page(disk, page, data[at : at + length])
            at += length
        else:
            raise VhostblkError(
                f"the journal of the dedup store has a record of unknown kind {kind}",
                data={"code": "corrupt"},
            )
