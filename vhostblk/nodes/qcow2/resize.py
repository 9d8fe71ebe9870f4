# SPDX-License-Identifier: GPL-2.0-or-later
"""Another size for a live image, both ways. Nothing is in flight meanwhile.

Growing: a larger L1 table, if one is needed, comes first, and one write to the
header makes it valid. What appears reads as zeroes, whatever the backing file or
an earlier, larger disk has there; that is on disk before the header has the new
size. A data file of its own is made longer before anything else.
Shrinking: what is beyond the new end is freed first, and the header follows; a
crash in between has lost data that were to be lost.
"""

from __future__ import annotations

import logging
import struct
from array import array
from typing import TYPE_CHECKING

from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.driver import Qcow2

logger = logging.getLogger(__name__)

SECTOR = 512
MAX_L1_BYTES = 32 << 20


async def resize(live: Qcow2, size: int) -> None:
    """Make the disk `size` bytes large."""
    _check(live, size)
    old = live.size
    if size == old:
        return
    if size > old and live.geometry.external:
        await live.data.ensure(size)  # if there is no room nothing has changed
    await live.settle_header()
    await live.outdate_bitmaps(every=True)  # they are as long as the disk was
    if size < old:
        await _cut(live, size, old)
    await live.writeback.flush()
    await live.allocator.settle()
    try:
        if size > old:
            await _make_room(live, old, size)
        await live.write_header(size=size)
    except BaseException:
        live.set_size(old)  # or the next attempt would find nothing left to do
        raise
    live.set_size(size)
    if size < old and live.geometry.external:
        await _shorten_data(live, size)


def _check(live: Qcow2, size: int) -> None:
    name = live.filename()
    if size % SECTOR:
        raise _error(live, "The new size must be a multiple of 512")
    if live.stopped:
        raise _error(live, f"Image '{name}' is corrupt and cannot be resized")
    if live.header.nb_snapshots and live.geometry.version < 3:
        raise _error(live, f"Cannot resize version 2 image '{name}', which has snapshots")
    if live.geometry.l1_entries(size) * 8 > MAX_L1_BYTES:
        raise _error(live, f"{size} bytes need an L1 table of more than {MAX_L1_BYTES} bytes")


async def _cut(live: Qcow2, size: int, old: int) -> None:
    """Free what is beyond the new end."""
    geometry = live.geometry
    first, last = geometry.clusters(size), geometry.clusters(old)
    if first < last:
        await live.discarder.free(range(first, last))


async def _shorten_data(live: Qcow2, size: int) -> None:
    """The disk ends there already; what its data file has behind that is of no use."""
    try:
        await live.data.truncate(size)
    except OSError as error:
        logger.debug("the data file of '%s' stays as long as it is: %s", live.filename(), error)


async def _make_room(live: Qcow2, old: int, size: int) -> None:
    """What will appear reads as zeroes already when the header says that it is there."""
    if live.geometry.l1_entries(size) > len(live.l1):
        await _longer_l1(live, size)
    live.set_size(size)
    await _zero_what_appears(live, old, size)
    await live.writeback.flush()


async def _longer_l1(live: Qcow2, size: int) -> None:
    geometry = live.geometry
    count = geometry.l1_entries(size)
    clusters = geometry.clusters(8 * count)
    entries = live.l1 + array("Q", bytes(8 * (count - len(live.l1))))
    host = await live.allocator.reserve(clusters)
    data = struct.pack(f">{count}Q", *entries)
    try:
        await live.file.write(host, data + bytes((clusters << geometry.cluster_bits) - len(data)))
        await live.allocator.write_counts()
        await live.file.flush()
        await live.write_header(l1_size=count, l1_table_offset=host)
    except BaseException:
        await live.allocator.free_pieces([(host, clusters)])
        raise
    old, old_clusters = live.l1_offset, geometry.clusters(8 * len(live.l1))
    live.l1, live.l1_offset = entries, host
    live.moved_metadata(old, host, clusters)
    await live.allocator.refcounts.free(old, old_clusters)


async def _zero_what_appears(live: Qcow2, old: int, size: int) -> None:
    """The rest of what was the last cluster, and what a larger backing file has there."""
    end = min(-(-old // live.geometry.cluster_size) * live.geometry.cluster_size, size)
    if live.has_backing and live.backing_size > old:
        end = max(end, min(live.backing_size, size))
    if end > old:
        await live.discarder.zero(old, end - old, unmap=True)


def _error(live: Qcow2, text: str) -> VhostblkError:
    return VhostblkError(text, data={"code": "cannot-resize", "node": live.name})
