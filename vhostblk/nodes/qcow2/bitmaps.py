# SPDX-License-Identifier: GPL-2.0-or-later
"""Persistent dirty bitmaps: where they are, and which of them our writes make invalid.

Source: docs/interop/qcow2.txt, "Bitmaps extension" and "Bitmaps". We do not record our writes in
bitmaps. Who does not has two ways to say so: clear the auto-clear bit (then all bitmaps are out of
date, nobody can name them any more, and their clusters leak as soon as somebody drops the
extension), or set `in_use` in the directory, which says it of one bitmap. We do the second before
the first write: *enabled* bitmaps (flag `auto`), which would have to record it, become in-use, and
`qemu-img bitmap --remove` gets rid of them. Disabled ones record nothing and stay valid. A bitmap
is as long as the disk, so a resize makes all of them in-use.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vhostblk.nodes.qcow2.header import BITMAPS, EXT_BITMAPS, BadImage, Header
from vhostblk.nodes.qcow2.layout import Storage, patch_header, words_of

MAX_BITMAPS = 65535
MAX_DIRECTORY = 64 << 20
MAX_NAME = 1023
MAX_BITMAP_BYTES = 512 << 20
MAX_GRANULARITY = 31
_CHUNK = 1 << 20
_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_FLAGS_AT = 12
IN_USE = 1
AUTO = 2
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00


@dataclass(frozen=True)
class Bitmap:
    """One bitmap, as the directory describes it."""

    name: str
    table_offset: int
    table_entries: int
    flags: int
    granularity: int
    flags_at: int
    """Where in the file its flags are."""

    @property
    def in_use(self) -> bool:
        """Somebody had it in memory when he ended: what is stored is out of date."""
        return bool(self.flags & IN_USE)

    @property
    def enabled(self) -> bool:
        """Writes are to be recorded in it."""
        return bool(self.flags & AUTO)

    def describe(self) -> dict[str, Any]:
        """QAPI's Qcow2BitmapInfo."""
        flags = [name for bit, name in ((IN_USE, "in-use"), (AUTO, "auto")) if self.flags & bit]
        return {"name": self.name, "granularity": self.granularity, "flags": flags}


@dataclass(frozen=True)
class Directory:
    """All bitmaps of an image."""

    offset: int
    size: int
    bitmaps: tuple[Bitmap, ...]


def consistent(header: Header) -> bool:
    """Whether the bitmaps extension is to be believed."""
    return bool(header.autoclear & BITMAPS)


async def read_directory(storage: Storage, header: Header) -> Directory | None:
    """The bitmaps; None if the image has none that are to be believed."""
    data = header.extension(EXT_BITMAPS)
    if data is None:
        if consistent(header):
            raise BadImage("The bitmaps feature bit is set, and there is no bitmaps extension")
        return None
    if not consistent(header):
        return None
    if len(data) < _EXTENSION.size:
        raise BadImage("The bitmaps extension is too short")
    count, reserved, size, offset = _EXTENSION.unpack_from(data)
    if reserved:
        raise BadImage("Reserved bits are set in the bitmaps extension")
    if not 1 <= count <= MAX_BITMAPS or not size or size > MAX_DIRECTORY:
        raise BadImage(f"A bitmap directory of {count} bitmaps in {size} bytes is not valid")
    if offset % header.cluster_size or not offset or offset + size > storage.size:
        raise BadImage(f"Bitmap directory offset invalid: {offset:#x}")
    found = _parse(await storage.read(offset, size), offset, count, header)
    return Directory(offset, size, tuple(found))


def _parse(raw: bytes, base: int, count: int, header: Header) -> list[Bitmap]:
    found: list[Bitmap] = []
    names: set[bytes] = set()
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(raw):
            raise BadImage("The bitmap directory is cut off")
        offset, entries, flags, _, granularity, length, extra = _ENTRY.unpack_from(raw, at)
        start = at + _ENTRY.size + extra
        name = raw[start : start + length]
        if start + length > len(raw) or not 1 <= length <= MAX_NAME or name in names:
            raise BadImage("A bitmap directory entry is not valid: its name")
        too_large = entries * header.cluster_size > MAX_BITMAP_BYTES
        if offset % header.cluster_size or granularity > MAX_GRANULARITY or too_large:
            raise BadImage(f"Bitmap '{name.decode(errors='replace')}' is not valid")
        names.add(name)
        found.append(
            Bitmap(
                name=name.decode(errors="replace"),
                table_offset=offset,
                table_entries=entries,
                flags=flags,
                granularity=1 << granularity,
                flags_at=base + at + _FLAGS_AT,
            )
        )
        at = -(-(start + length) // 8) * 8
    if at < len(raw):
        raise BadImage("The bitmap directory is longer than its entries")
    return found


async def table_entries(storage: Storage, bitmap: Bitmap) -> AsyncIterator[tuple[int, int]]:
    """Number and contents of what is not 0 in the table of a bitmap, as far as the file goes."""
    end = min(bitmap.table_offset + 8 * bitmap.table_entries, storage.size // 8 * 8)
    for at in range(bitmap.table_offset, end, _CHUNK):
        raw = await storage.read(at, min(_CHUNK, end - at))
        if raw.count(0) < len(raw):
            for number, entry in enumerate(words_of(raw), (at - bitmap.table_offset) // 8):
                if entry:
                    yield number, entry


async def mark_in_use(
    storage: Storage, header: Header, *, every: bool = False, known: int = 0
) -> Header:
    """We are going to write (or, `every`, to resize): which bitmaps do not know of it.

    Durable when this returns. Unknown auto-clear bits are cleared, as the specification asks of
    who does not know what they stand for (`known`: bits that the caller does know). A directory
    that cannot be read makes the bitmaps as a whole out of date. Returns the header as it is now.
    """
    keep = header.autoclear & (3 | known)
    changed = False
    try:
        directory = await read_directory(storage, header)
    except BadImage:
        directory, keep = None, keep & ~BITMAPS
    for bitmap in directory.bitmaps if directory is not None else ():
        if (bitmap.enabled or every) and not bitmap.in_use:
            flags = struct.pack(">I", bitmap.flags | IN_USE)
            await storage.write(bitmap.flags_at, flags)
            changed = True
    if keep != header.autoclear:
        header = await patch_header(storage, header, autoclear=keep)
        changed = True
    if changed:
        await storage.flush()
    return header


async def still_good(storage: Storage, header: Header, before: Directory | None) -> None:
    """Nothing has been written since `before`: bitmaps that were not in use then are not now."""
    directory = await read_directory(storage, header) if before is not None else None
    if before is None or directory is None:
        return
    good = {bitmap.flags_at for bitmap in before.bitmaps if not bitmap.in_use}
    for bitmap in directory.bitmaps:
        if bitmap.in_use and bitmap.flags_at in good:
            await storage.write(bitmap.flags_at, struct.pack(">I", bitmap.flags & ~IN_USE))
    await storage.flush()
