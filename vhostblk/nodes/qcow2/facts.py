# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts about an image at rest: what it is (`info`), and where its data are (`allocation`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from vhostblk.engine.map import MAP_DATA, MAP_TYPE, MAP_ZERO
from vhostblk.nodes.qcow2 import bitmaps, snapshots
from vhostblk.nodes.qcow2.geometry import (
    L1_RESERVED,
    OFFSET_MASK,
    BrokenEntry,
    Geometry,
    translate,
)
from vhostblk.nodes.qcow2.header import BadImage, Header
from vhostblk.nodes.qcow2.layout import Storage, words_of

_NOTHING = 7  # a type that no entry has
_OFFSET = ~0x1FF

Kind = Literal["data", "zero", "compressed", "unallocated"]


@dataclass(frozen=True)
class Allocation:
    """A range of the disk that is stored in one way, in this image (not in those below)."""

    start: int
    length: int
    kind: Kind
    offset: int | None = None
    """Where the data are in the file (or the external data file)."""


async def info(storage: Storage, header: Header) -> dict[str, Any]:
    """Members of QAPI's ImageInfo that the image itself knows."""
    specific: dict[str, Any] = {"compat": "1.1" if header.version >= 3 else "0.10"}
    if header.version >= 3:
        specific |= {
            "compression-type": header.compression,
            "lazy-refcounts": header.lazy_refcounts,
            "refcount-bits": header.refcount_bits,
            "corrupt": header.corrupt,
            "extended-l2": header.extended_l2,
        }
        directory = await bitmaps.read_directory(storage, header)
        if directory is not None:
            specific["bitmaps"] = [bitmap.describe() for bitmap in directory.bitmaps]
        if header.has_data_file:
            specific["data-file-raw"] = header.data_file_raw
            if header.data_file is not None:
                specific["data-file"] = header.data_file
    else:
        specific |= {"compression-type": "zlib", "refcount-bits": 16}
    facts: dict[str, Any] = {
        "format": "qcow2",
        "virtual-size": header.size,
        "cluster-size": header.cluster_size,
        "dirty-flag": header.dirty,
        "encrypted": header.crypt_method != 0,
        "format-specific": {"type": "qcow2", "data": specific},
    }
    if header.backing_file is not None:
        facts["backing-filename"] = header.backing_file
        if header.backing_format is not None:
            facts["backing-filename-format"] = header.backing_format
    if header.nb_snapshots:
        table = await snapshots.read_table(storage, header)
        facts["snapshots"] = [snapshot.describe() for snapshot in table.snapshots]
    return facts


async def allocation(storage: Storage, header: Header) -> AsyncIterator[Allocation]:
    """All of the disk in order; neighbours that belong together are one.

    Memory is bounded by one L2 table; what no L1 entry describes costs no time.
    """
    current: Allocation | None = None
    async for piece in _pieces(storage, header):
        if current is not None and _continues(current, piece):
            length = current.length + piece.length
            current = Allocation(current.start, length, current.kind, current.offset)
            continue
        if current is not None:
            yield current
        current = piece
    if current is not None:
        yield current


def _continues(first: Allocation, second: Allocation) -> bool:
    if first.kind != second.kind or first.kind == "compressed":
        return False
    if first.offset is None or second.offset is None:
        return first.offset is second.offset
    return first.offset + first.length == second.offset


async def _pieces(storage: Storage, header: Header) -> AsyncIterator[Allocation]:
    size = header.cluster_size
    geometry = Geometry(
        cluster_bits=header.cluster_bits,
        extended=header.extended_l2,
        version=header.version,
        slice_bytes=size,
        external=header.has_data_file,
    )
    reach = geometry.slice_entries * size
    count = -(-header.size // reach)
    l1 = words_of(await storage.read(header.l1_table_offset, 8 * count))
    for index, entry in enumerate(l1):
        start, end = index * reach, min((index + 1) * reach, header.size)
        table = entry & OFFSET_MASK
        if not table:
            yield Allocation(start, end - start, "unallocated")
            continue
        if entry & L1_RESERVED or table % size or table >= storage.size:
            raise BadImage(f"L1 entry {index} ({entry:#x}) is not a valid offset")
        words = words_of(await storage.read(table, size))
        try:
            entries = translate(geometry, words, _NOTHING, False)
        except BrokenEntry as error:
            raise BadImage(f"{error} (L2 table at {table:#x})") from None
        unit = 1 << geometry.unit_bits
        for number, value in enumerate(entries):
            at = start + number * unit
            if at >= end:
                break
            kind, offset = _kind(value)
            if kind == "compressed" and number % geometry.units:
                continue  # the whole cluster has been told of
            length = size if kind == "compressed" else unit
            yield Allocation(at, min(length, end - at), kind, offset)


def _kind(value: int) -> tuple[Kind, int | None]:
    what = value & MAP_TYPE
    if what == MAP_DATA:
        return "data", value & _OFFSET
    if what == MAP_ZERO:
        return "zero", None
    if what == _NOTHING:
        return "unallocated", None
    return "compressed", None
