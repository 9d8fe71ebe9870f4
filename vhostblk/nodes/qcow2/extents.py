# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the data of a live image are (`block-image-map`).

The tables in memory are asked, which know what is not on disk yet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from vhostblk.engine.map import MAP_BACKING, MAP_DATA, MAP_MISS
from vhostblk.image import Extent

if TYPE_CHECKING:
    from vhostblk.nodes._mapped import MappedImage


async def extents(live: MappedImage, offset: int, length: int) -> AsyncIterator[Extent]:
    """The extents of a range, one slice of an L2 table after the other."""
    bits = live.geometry.cluster_bits
    step = live.geometry.slice_entries << bits
    end = offset + length
    filename = live.children[live.data_role].node.filename()
    while offset < end:
        stop = min(end, (offset // step + 1) * step)
        clusters = range(offset >> bits, ((stop - 1) >> bits) + 1)
        pinned = await live.path.pin(clusters)
        try:
            live.l2.apply_log()
            pieces = list(live.path.extents(offset, stop - offset, pinned))
        finally:
            live.path.unpin(pinned)
        for kind, where, guest, size in pieces:
            if kind == MAP_DATA:
                yield Extent(guest, size, offset=where, filename=filename)
            elif kind == MAP_MISS:
                yield Extent(guest, size, compressed=True)
            elif kind == MAP_BACKING:
                async for extent in _below(live, guest, size):
                    yield extent
            else:
                for begin, length, said in _zeroes(live, guest, size):
                    yield Extent(begin, length, present=said, zero=True, data=False)
        offset = stop


def _zeroes(live: MappedImage, guest: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """A range of zeroes, cut where what makes them changes."""
    end, cluster = guest + size, live.geometry.cluster_size
    while guest < end:
        stop = min(end, (guest // cluster + 1) * cluster)
        yield guest, stop - guest, _is_said(live, guest)
        guest = stop


def _is_said(live: MappedImage, guest: int) -> bool:
    """Whether zeroes are what an entry says, or what the lack of one means."""
    if live.has_backing:
        return True
    cluster = guest >> live.geometry.cluster_bits
    slice = live.l2.get(cluster // live.geometry.slice_entries)
    at = cluster % live.geometry.slice_entries * live.geometry.words
    return slice is not None and any(slice.words[at : at + live.geometry.words])


async def _below(live: MappedImage, guest: int, size: int) -> AsyncIterator[Extent]:
    there = max(0, min(size, live.backing_size - guest))
    if there:
        async for extent in live.child("backing").node.extents(guest, there):
            yield extent.moved(0, depth=1)
    if there < size:
        yield Extent(guest + there, size - there, present=False, zero=True, data=False)
