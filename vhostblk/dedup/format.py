# SPDX-License-Identifier: GPL-2.0-or-later
"""What a dedup store looks like on its data device, and the records of its journal.

docs/dedup.md describes all of it. The data device begins with a superblock, written once. After
64 KiB come the segments, which are filled with blocks from front to back, one after the other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vhostblk.engine.dedup import blake3
from vhostblk.schema import VhostblkError

SUPERBLOCK = 4096
FIRST_SEGMENT = 64 << 10
SECTOR = 512
_MAGIC = b"vhostblk dedup\0\0"
_VERSION = 1
_SUPERBLOCK = struct.Struct("<16sIIII16s16s")
FINGERPRINT = 32

HASHES: dict[str, Callable[[bytes | bytearray | memoryview], bytes]] = {
    "blake3": blake3,
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data, digest_size=FINGERPRINT).digest(),
}
"""Fingerprints that a store may use; 32 bytes each."""
_HASH_NUMBERS = {1: "sha256", 2: "blake2b", 3: "blake3"}


@dataclass(frozen=True)
class Superblock:
    """What never changes about a store."""

    block_bits: int
    segment_bits: int
    hash: str
    uuid: bytes

    @property
    def block_size(self) -> int:
        return 1 << self.block_bits

    @property
    def segment_size(self) -> int:
        return 1 << self.segment_bits

    def pack(self) -> bytes:
        number = next(n for n, name in _HASH_NUMBERS.items() if name == self.hash)
        body = _SUPERBLOCK.pack(
            _MAGIC, _VERSION, self.block_bits, self.segment_bits, number, self.uuid, bytes(16)
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
        if version != _VERSION or number not in _HASH_NUMBERS:
            raise VhostblkError(
                f"the dedup store has version {version} and hash {number}; this program knows "
                f"version {_VERSION} only",
                data={"code": "unsupported"},
            )
        return cls(block_bits, segment_bits, _HASH_NUMBERS[number], uuid)

    def segments(self, size: int) -> int:
        """How many fit on a data device of that size."""
        return max(0, size - FIRST_SEGMENT) >> self.segment_bits

    def segment_at(self, number: int) -> int:
        """Where one begins."""
        return FIRST_SEGMENT + (number << self.segment_bits)

    def segment_of(self, offset: int) -> int:
        """The segment that an offset on the data device belongs to."""
        return (offset - FIRST_SEGMENT) >> self.segment_bits


class Block(NamedTuple):
    """A stored block. A `length` below the block size says that it is compressed."""

    offset: int
    length: int
    refs: int
    fingerprint: bytes

    @property
    def space(self) -> int:
        """Bytes of the data device."""
        return -(-self.length // SECTOR) * SECTOR


_BLOCK = struct.Struct("<QII32s")
BLOCK_VALUE = _BLOCK.size


def pack_block(block: Block) -> bytes:
    """As the metadata store keeps it."""
    return _BLOCK.pack(*block)


def unpack_block(value: bytes) -> Block:
    """The opposite."""
    return Block._make(_BLOCK.unpack(value))


# ---- records of the journal --------------------------------------------------------------


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


class Disk(NamedTuple):
    """A disk has this size and name; without a name it is gone."""

    disk: int
    size: int
    name: str


Record = Stored | Mapped | Marked | Disk

_STORED = struct.Struct("<BQQI32s")
_MAPPED = struct.Struct("<BIQQQ")
_MARKED = struct.Struct("<BQ")
_DISK = struct.Struct("<BIQB")


def pack_record(record: Record) -> bytes:
    """As it is in a frame."""
    if isinstance(record, Mapped):
        return _MAPPED.pack(1, *record)
    if isinstance(record, Stored):
        return _STORED.pack(2, *record)
    if isinstance(record, Marked):
        return _MARKED.pack(3, *record)
    name = record.name.encode()
    return _DISK.pack(4, record.disk, record.size, len(name)) + name


def unpack_records(data: bytes) -> Iterator[Record]:
    """All records of a frame."""
    at = 0
    while at < len(data):
        kind = data[at]
        if kind == 1:
            yield Mapped._make(_MAPPED.unpack_from(data, at)[1:])
            at += _MAPPED.size
        elif kind == 2:
            yield Stored._make(_STORED.unpack_from(data, at)[1:])
            at += _STORED.size
        elif kind == 3:
            yield Marked(_MARKED.unpack_from(data, at)[1])
            at += _MARKED.size
        elif kind == 4:
            _, disk, size, length = _DISK.unpack_from(data, at)
            at += _DISK.size
            yield Disk(disk, size, data[at : at + length].decode())
            at += length
        else:
            raise VhostblkError(
                f"the journal of the dedup store has a record of unknown kind {kind}",
                data={"code": "corrupt"},
            )
