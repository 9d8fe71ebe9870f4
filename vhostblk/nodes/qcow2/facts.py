# SPDX-License-Identifier: GPL-2.0-or-later
"""What an image is, as QAPI's ImageInfo says it: its header, and the tables beside the disk."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from vhostblk.nodes.qcow2 import bitmaps, snapshots
from vhostblk.nodes.qcow2.bitmaps import Bitmap
from vhostblk.nodes.qcow2.header import BadImage, Header
from vhostblk.nodes.qcow2.layout import Storage
from vhostblk.nodes.qcow2.snapshots import Snapshot


@dataclass(frozen=True)
class Tables:
    """What an image has beside its disk; what is broken is left out (a check tells of it)."""

    snapshots: tuple[Snapshot, ...] = ()
    bitmaps: tuple[Bitmap, ...] | None = None
    """None: no bitmaps that are to be believed."""


async def read_tables(storage: Storage, header: Header) -> Tables:
    """Read them; they change seldom, and only with the header."""
    listed: tuple[Snapshot, ...] = ()
    directory = None
    if header.nb_snapshots:
        with contextlib.suppress(BadImage):
            listed = (await snapshots.read_table(storage, header)).snapshots
    with contextlib.suppress(BadImage):
        directory = await bitmaps.read_directory(storage, header)
    return Tables(listed, None if directory is None else directory.bitmaps)


def info(header: Header, tables: Tables) -> dict[str, Any]:
    """Members of ImageInfo that the image itself knows."""
    facts: dict[str, Any] = {
        "format": "qcow2",
        "virtual-size": header.size,
        "cluster-size": header.cluster_size,
        "dirty-flag": header.dirty,
        "format-specific": {"type": "qcow2", "data": _specific(header, tables)},
    }
    if header.crypt_method:
        facts["encrypted"] = True
    if header.backing_file is not None:
        facts["backing-filename"] = header.backing_file
        if header.backing_format is not None:
            facts["backing-filename-format"] = header.backing_format
    if tables.snapshots:
        facts["snapshots"] = [snapshot.describe() for snapshot in tables.snapshots]
    return facts


def _specific(header: Header, tables: Tables) -> dict[str, Any]:
    if header.version < 3:
        return {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
    specific: dict[str, Any] = {
        "compat": "1.1",
        "compression-type": header.compression,
        "lazy-refcounts": header.lazy_refcounts,
        "refcount-bits": header.refcount_bits,
        "corrupt": header.corrupt,
        "extended-l2": header.extended_l2,
    }
    if tables.bitmaps is not None:
        specific["bitmaps"] = [bitmap.describe() for bitmap in tables.bitmaps]
    if header.has_data_file:
        specific["data-file-raw"] = header.data_file_raw
        if header.data_file is not None:
            specific["data-file"] = header.data_file
    return specific
