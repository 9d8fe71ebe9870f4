# SPDX-License-Identifier: GPL-2.0-or-later
"""Bitmaps that are not kept up to date are marked as in use, all of them, before the first write.

Source: docs/interop/qcow2.txt, "Bitmap directory": flag bit 0 (in_use) means that the bitmap
was not saved properly and is inconsistent. The auto-clear bit stays: the directory itself is
right, and without the bit its clusters would be leaked.
"""

from __future__ import annotations

import struct

from vhostblk.nodes.qcow2.bitmaps import Directory
from vhostblk.nodes.qcow2.storage import ChildStorage

_IN_USE = 1
# Table offset, table size, flags, type, granularity, length of the name, of the extra data.
_ENTRY = struct.Struct(">QIIBBHI")
_FLAGS_AT = 12


async def mark_in_use(file: ChildStorage, directory: Directory) -> None:
    """Set the flag in every entry of the directory."""
    data = bytearray(await file.read(directory.offset, directory.size))
    at = 0
    for _ in directory.bitmaps:
        *_, flags, _, _, name, extra = _ENTRY.unpack_from(data, at)
        struct.pack_into(">I", data, at + _FLAGS_AT, flags | _IN_USE)
        at += -(-(_ENTRY.size + extra + name) // 8) * 8
    await file.write(directory.offset, data)
    await file.flush()
