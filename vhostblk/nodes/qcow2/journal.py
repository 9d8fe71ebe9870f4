# SPDX-License-Identifier: GPL-2.0-or-later
"""What a killed backend knew and had not put on disk: found again by the next one.

The L2 tables in memory are ahead of the disk until a flush. A guest that survives
the death of its backend must not see a completed write vanish, so every change is
also a record in memory that survives the process (nodes/_map_log.py): the engine's
allocations, and those of Python's changes, with the whole L2 entry.

The log is of use only for the image as its owner left it. An image with a log says so
in auto-clear feature bits that no other program knows, hence clears before it writes
(docs/interop/qcow2.txt, "autoclear_features"); some of them are random, so that an
older copy of the image does not pass for it. One write of eight bytes sets them all.
Version 2 has no such bits, hence no log.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vhostblk.engine.map import MAP_OFFSET
from vhostblk.nodes._map_log import LogFile, Record, open_log
from vhostblk.nodes.qcow2.geometry import COMPRESSED, COPIED, OFFSET_MASK
from vhostblk.nodes.qcow2.header import Header

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.driver import Qcow2

_MARK = 1 << 58
_RANDOM = ((1 << 32) - 1) << 26
HAS_LOG = _MARK | _RANDOM
"""Auto-clear features: there may be a log. None of them is one of the specification's."""


async def open_for(live: Qcow2, header: Header) -> tuple[LogFile | None, int, list[Record]]:
    """The image's log, its next token (auto-clear bits), what is to be entered into the tables."""
    storage = live.child("file").node
    while storage.keeps_data:  # such filters come and go; the image is the same without them
        storage = storage.children["file"].node
    if header.version < 3 or storage.driver != "file":
        return None, 0, []
    before = header.autoclear & HAS_LOG
    token = _MARK | int.from_bytes(os.urandom(4), "big") << 26

    def find() -> LogFile | None:
        return open_log(storage.filename(), before.to_bytes(8, "big"), fresh=not before & _MARK)

    log = await asyncio.to_thread(find)
    return log, token, [] if log is None else log.pending()


async def replay(live: Qcow2, records: Sequence[Record]) -> None:
    """Enter the records in the tables. The guest is not there yet."""
    geometry = live.geometry
    final: dict[int, tuple[int, int | None]] = {}
    for record in records:
        cluster = record.guest >> geometry.cluster_bits
        if record.python:
            final[cluster] = record.entry, record.extra
        else:
            final[cluster] = record.entry & MAP_OFFSET | COPIED, None
    wanted = {
        cluster: entry for cluster, entry in final.items() if cluster < geometry.clusters(live.size)
    }
    if not geometry.external:
        # Before anything is reserved: counts of these may not have got to the disk.
        named = [word & OFFSET_MASK for word, _ in wanted.values() if not word & COMPRESSED]
        await live.refcounts.adopt(host >> geometry.cluster_bits for host in named if host)
    # None may be written before all have been entered: a flush ends the log.
    limit, live.l2.limit = live.l2.limit, len(wanted) + live.l2.limit
    for cluster, (word, bitmap) in sorted(wanted.items()):
        slice = await live.l2.pin(cluster // geometry.slice_entries)
        at = cluster % geometry.slice_entries * geometry.words
        old = slice.words[at]
        slice.words[at] = word
        if geometry.extended and bitmap is not None:
            slice.words[at + 1] = bitmap
        if (old ^ word) & OFFSET_MASK or (old & COMPRESSED and old != word):
            live.let_go(old)
        live.l2.mark_dirty(slice)
        live.l2.unpin(slice)
    live.l2.limit = limit
    live.l2.install_again()
    await live.writeback.flush()
