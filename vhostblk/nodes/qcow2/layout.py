# SPDX-License-Identifier: GPL-2.0-or-later
"""What the format modules ask of the file that holds an image, which is the `file` child
(storage.py). Reads beyond the end give zeroes; writes beyond it make the file longer.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from vhostblk.nodes.qcow2.header import BadImage, Header

SECTOR = 512
_CHUNK = 1 << 20

# Offsets in the header ("Header"). Everything that an operation commits with lies between 24
# and 104, in one sector: one write exchanges all of it or nothing.
_FIELDS = {
    "size": (24, ">Q"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
}


class Storage(Protocol):
    """The file that holds an image."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes; zeroes beyond the end."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write, enlarging the file if need be."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length of the file."""

    async def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeroes afterwards, and need not take any space."""


def words_of(data: bytes | bytearray | memoryview) -> array[int]:
    """Big-endian 64-bit numbers."""
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def bytes_of(words: array[int]) -> bytes:
    """The same back."""
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()


async def read_header(storage: Storage) -> Header:
    """Header of the image in `storage`."""
    # The extensions may take a whole cluster; its size is at byte 20.
    start = await storage.read(0, min(SECTOR, storage.size))
    bits = int.from_bytes(start[20:24], "big")
    length = 1 << bits if SECTOR <= 1 << min(bits, 30) <= 1 << 21 else SECTOR
    header = Header.parse(await storage.read(0, min(max(length, SECTOR), storage.size)))
    end = storage.size
    for what, offset in (
        ("Reference count table", header.refcount_table_offset),
        ("Active L1 table", header.l1_table_offset if header.l1_size else 0),
        ("Snapshot table", header.snapshots_offset if header.nb_snapshots else 0),
    ):
        if offset >= end:
            raise BadImage(f"{what} ({offset:#x}) is outside the image file ({end} bytes)")
    return header


async def patch_header(storage: Storage, header: Header, **changes: int) -> Header:
    """Change numbers in the header with a single write, which is atomic; sets no barrier."""
    end = 104 if header.version >= 3 else 72
    for name in changes:
        if _FIELDS[name][0] >= end:
            raise BadImage(f"version {header.version} of the format has no field {name}")
    if len(changes) == 1:
        [(name, value)] = changes.items()
        at, form = _FIELDS[name]
        await storage.write(at, struct.pack(form, value))
    else:
        raw = bytearray(await storage.read(0, end))
        for name, value in changes.items():
            at, form = _FIELDS[name]
            struct.pack_into(form, raw, at, value)
        await storage.write(24, bytes(raw[24:]))
    given: dict[str, Any] = dict(changes)
    return header.replace(**given)


WriteHeader = Callable[..., Awaitable[Header]]
"""Changes numbers in the header of one image, durably; the header as it is then."""


async def commit_header(storage: Storage, header: Header, **changes: int) -> Header:
    """`patch_header()`, and a barrier."""
    header = await patch_header(storage, header, **changes)
    await storage.flush()
    return header


async def rewrite_header(storage: Storage, header: Header) -> None:
    """Write all numbers that `patch_header()` can change, as `header` has them; no barrier."""
    end = 104 if header.version >= 3 else 72
    numbers = {name: getattr(header, name) for name, (at, _) in _FIELDS.items() if at < end}
    await patch_header(storage, header, **numbers)


def clusters_of(header: Header, offset: int, length: int) -> range:
    """The clusters that a range of the file touches."""
    if length <= 0:
        return range(0)
    return range(offset >> header.cluster_bits, (offset + length - 1 >> header.cluster_bits) + 1)


def compressed_range(cluster_bits: int, word: int) -> tuple[int, int]:
    """Where a compressed cluster is: offset, bytes ("Compressed Clusters Descriptor")."""
    shift = 62 - (cluster_bits - 8)
    offset = word & ((1 << shift) - 1)
    sectors = ((word & ((1 << 62) - 1)) >> shift) + 1
    return offset, sectors * SECTOR - (offset & (SECTOR - 1))


def entry_words(header: Header) -> int:
    """64-bit words of an L2 entry."""
    return 2 if header.extended_l2 else 1
