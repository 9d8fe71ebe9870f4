# SPDX-License-Identifier: GPL-2.0-or-later
"""The header of a QED image: what it says, what it may not say, and its bytes.

Facts: QEMU's docs/interop/qed_spec, sections "Header" and "Tables". All numbers are
little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Protocol

MAGIC = b"QED\0"
BACKING = 1
NEED_CHECK = 2
NO_PROBE = 4
KNOWN = BACKING | NEED_CHECK | NO_PROBE
SECTOR = 512
LENGTH = 64
MAX_NAME = 1023
MAX_L1_BYTES = 32 << 20
"""More of an L1 table is not kept in memory; QEMU's own images have at most 16 clusters."""

_FIELDS = struct.Struct("<4sIIIQQQQQII")


class BadImage(Exception):
    """What is wrong with an image."""

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class Reader(Protocol):
    """Something that holds an image."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes; zeroes beyond the end."""


@dataclass(frozen=True)
class Header:
    """A header that has been checked."""

    cluster_size: int
    table_size: int
    """Clusters of an L1 or L2 table."""
    header_size: int
    """Clusters before the first regular one."""
    features: int
    compat: int
    autoclear: int
    l1_table_offset: int
    size: int
    backing_offset: int = 0
    backing_size: int = 0
    backing_file: str | None = None

    @property
    def cluster_bits(self) -> int:
        """log2 of the cluster size."""
        return self.cluster_size.bit_length() - 1

    @property
    def table_bytes(self) -> int:
        """Bytes of a table."""
        return self.table_size * self.cluster_size

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return self.table_bytes // 8

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table that this size of the disk needs."""
        covers = self.entries * self.cluster_size
        return -(-self.size // covers)

    @property
    def max_size(self) -> int:
        """The largest disk that the tables can describe."""
        return min(self.entries * self.entries * self.cluster_size, 1 << 62)

    @property
    def need_check(self) -> bool:
        """The image was not closed: tables may name what is not there."""
        return bool(self.features & NEED_CHECK)

    @property
    def backing_format(self) -> str | None:
        """Format of the backing file, if the header says: it can only say raw."""
        return "raw" if self.backing_file and self.features & NO_PROBE else None

    def with_(self, **changes: int) -> Header:
        """The same with other numbers."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def pack(self) -> bytes:
        """The fixed part, as it is on disk."""
        return _FIELDS.pack(
            MAGIC,
            self.cluster_size,
            self.table_size,
            self.header_size,
            self.features,
            self.compat,
            self.autoclear,
            self.l1_table_offset,
            self.size,
            self.backing_offset,
            self.backing_size,
        )


def check_sizes(cluster_size: int, table_size: int) -> None:
    """Refuse sizes that the format does not have."""
    if not _is_power_of_two(cluster_size) or not 1 << 12 <= cluster_size <= 1 << 26:
        raise BadImage(
            f"QED cluster size must be a power of two from 4 KiB to 64 MiB, not {cluster_size}"
        )
    if not _is_power_of_two(table_size) or table_size > 16:
        raise BadImage(f"QED table size must be 1, 2, 4, 8 or 16 clusters, not {table_size}")


async def read_header(storage: Reader) -> Header:
    """The header of the image in `storage`."""
    if storage.size < LENGTH:
        raise BadImage(f"not a QED image: the file has only {storage.size} bytes")
    raw = await storage.read(0, LENGTH)
    magic, cluster, table, clusters, features, *rest = _FIELDS.unpack(raw[: _FIELDS.size])
    compat, autoclear, l1, size, name_offset, name_size = rest
    if magic != MAGIC:
        raise BadImage("not a QED image: it does not begin with 'QED'")
    unknown = features & ~KNOWN
    if unknown:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise BadImage(f"unsupported QED features: bits {bits} ({unknown:#x})")
    check_sizes(cluster, table)
    header = Header(
        cluster, table, clusters, features, compat, autoclear, l1, size, name_offset, name_size
    )
    _check_places(header, storage.size)
    if features & BACKING:
        header = replace(header, backing_file=await _read_name(storage, header))
    return header


def _check_places(header: Header, end: int) -> None:
    if header.header_size < 1 or header.header_size * header.cluster_size > max(
        end, header.cluster_size
    ):
        raise BadImage(f"QED header size ({header.header_size} clusters) does not fit the file")
    l1 = header.l1_table_offset
    if l1 % header.cluster_size:
        raise BadImage(f"L1 table offset {l1:#x} is not a multiple of the cluster size")
    if l1 < header.header_size * header.cluster_size or l1 + header.table_bytes > end:
        raise BadImage(f"L1 table ({l1:#x}) is outside the image file ({end} bytes)")
    if header.size % SECTOR:
        raise BadImage(f"image size {header.size} is not a multiple of {SECTOR}")
    if header.size > header.max_size:
        raise BadImage(f"image size {header.size} is more than the tables can describe")
    if header.l1_entries * 8 > MAX_L1_BYTES:
        raise BadImage(f"the L1 table is larger than the {MAX_L1_BYTES} bytes supported")


async def _read_name(storage: Reader, header: Header) -> str:
    offset, size = header.backing_offset, header.backing_size
    if not 0 < size <= MAX_NAME:
        raise BadImage(f"length of the backing file name ({size}) is not from 1 to {MAX_NAME}")
    if offset < LENGTH or offset + size > header.header_size * header.cluster_size:
        raise BadImage(f"backing file name (at {offset:#x}) is outside the header")
    name = (await storage.read(offset, size)).decode("utf-8", "surrogateescape")
    if "\0" in name:
        raise BadImage("backing file name contains a null byte")
    return name


class Writer(Reader, Protocol):
    """Something that a header can be written to."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length of the file."""


async def write_header(storage: Writer, header: Header) -> None:
    """Exchange the fixed part, durably. One sector: it is there, or it is not."""
    rest = (await storage.read(0, SECTOR))[LENGTH:]
    await storage.write(0, header.pack() + rest)
    await storage.flush()


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)
