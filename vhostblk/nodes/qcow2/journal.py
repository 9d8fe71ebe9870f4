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
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vhostblk.nodes._map_log import LogFile, Record, open_log
from vhostblk.nodes.qcow2.geometry import (
    ALL_ALLOCATED,
    COMPRESSED,
    OFFSET_MASK,
    Geometry,
)
from vhostblk.nodes.qcow2.header import Header
from vhostblk.nodes.qcow2.l2cache import Slice

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


def known_of(bitmap: int, units: Iterable[int], of: int) -> int:
    """The bitmap of a record of ours that is about some of the units of a cluster.

    The engine may have changed the others, and its records may be before or behind this one. They
    are both allocated and zero here, which no L2 entry says: what they are, others say, and what
    the place of the cluster is.
    """
    others = ((1 << of) - 1) & ~sum(1 << unit for unit in units)
    return bitmap | others << 32 | others


def _enter_ours(geometry: Geometry, words: array[int], index: int, record: Record) -> None:
    """A record of ours."""
    at = index * geometry.words
    if not geometry.extended:
        words[at] = record.entry
        return
    others = record.extra & record.extra >> 32 & ALL_ALLOCATED
    others |= others << 32
    if not others:
        words[at] = record.entry
    words[at + 1] = (words[at + 1] & others) | (record.extra & ~others)


async def replay(live: Qcow2, records: Sequence[Record]) -> None:
    """Enter the records in the tables. The guest is not there yet."""
    geometry, l2 = live.geometry, live.l2
    bits, per_slice = geometry.cluster_bits, geometry.slice_entries
    records = [record for record in records if record.guest < live.size]
    slices: dict[int, Slice] = {}
    before: dict[int, int] = {}  # the word of each cluster that has changed
    # None may be written before all have been entered: a flush ends the log.
    limit, l2.limit = l2.limit, l2.limit + len(records)
    for cluster in sorted({record.guest >> bits for record in records}):
        number, index = divmod(cluster, per_slice)
        if number not in slices:
            slices[number] = await l2.pin(number)
        before[cluster] = slices[number].words[index * geometry.words]
    for record in records:
        number, index = divmod(record.guest >> bits, per_slice)
        if record.python:
            _enter_ours(geometry, slices[number].words, index, record)
        else:
            l2.words.enter(record.guest, record.entry, record.extra + 1)
    now = {
        cluster: slices[cluster // per_slice].words[cluster % per_slice * geometry.words]
        for cluster in before
    }
    if not geometry.external:
        # Before anything is reserved: counts of these may not have got to the disk.
        named = [word & OFFSET_MASK for word in now.values() if not word & COMPRESSED]
        await live.refcounts.adopt(host >> bits for host in named if host)
    for cluster, old in before.items():
        if (old ^ now[cluster]) & OFFSET_MASK or (old & COMPRESSED and old != now[cluster]):
            live.let_go(old)
    for slice in slices.values():
        l2.mark_dirty(slice)
        l2.unpin(slice)
    l2.limit = limit
    l2.install_again()
    await live.writeback.flush()
