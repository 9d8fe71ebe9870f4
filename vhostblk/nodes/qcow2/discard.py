# SPDX-License-Identifier: GPL-2.0-or-later
"""Discards and zero writes: whole clusters are freed or marked, the rest is written.

A version 3 image can say that a cluster (or subcluster) reads as zeroes; a
version 2 image cannot, so zeroes are written there unless there is nothing
below that could show through. Discarded clusters read as zeroes, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from vhostblk.engine import OP_WRITE, REQ_LITERAL
from vhostblk.engine.map import MAP_TYPE, MAP_WRITABLE, MAP_ZERO
from vhostblk.nodes.hooks import Request
from vhostblk.nodes.qcow2.datapath import Claim
from vhostblk.nodes.qcow2.geometry import ALL_ZERO, COMPRESSED, COPIED, ZERO
from vhostblk.nodes.qcow2.l2cache import Slice

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.driver import Qcow2

_TURN = 256  # clusters after which others get a turn of the event loop
_ZEROES = bytes(1 << 20)


class Discarder:
    """Discards and zero writes of one live image."""

    def __init__(self, live: Qcow2) -> None:
        self._live = live

    async def discard(self, request: Request) -> None:
        """The range is not needed any more."""
        live = self._live
        live.refuse_writes()
        if live.options.discard != "unmap":
            return
        geometry = live.geometry
        size = geometry.cluster_size
        end = request.offset + request.length
        first = -(-request.offset // size)
        last = end // size if end < live.size else geometry.clusters(live.size)
        if geometry.version < 3 and live.has_backing:
            return  # stale data of the backing file would show through
        if first < last and live.data_is_raw:
            await live.data.write_zeroes(first * size, min(last * size, live.size) - first * size)
        elif first < last:
            keep = live.options.discard_no_unref
            whole = range(geometry.units)
            await self._each(
                range(first, last),
                lambda _: whole,
                lambda claim: self._zero_one(claim, keep=keep, discard=live.pass_discard_request),
            )

    async def write_zeroes(self, request: Request) -> None:
        """The range reads as zeroes afterwards."""
        live = self._live
        live.refuse_writes()
        await self.zero(request.offset, request.length, unmap=request.may_unmap)
        if request.fua:
            await live.make_durable()

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """The same for a range."""
        live = self._live
        geometry = live.geometry
        if live.data_is_raw:
            # Whoever reads the data file without the qcow2 metadata is to see zeroes, too.
            await live.data.write_zeroes(offset, length)
            return
        end = offset + length
        unit = 1 << geometry.unit_bits
        first = -(-offset // unit) * unit
        last = end // unit * unit if end < live.size else -(-end // unit) * unit
        if last <= first or (geometry.version < 3 and live.has_backing):
            await self._write(offset, length)
            return
        await self._write(offset, first - offset)
        if end > last:
            await self._write(last, end - last)
        bits, units = geometry.cluster_bits, geometry.units
        head, tail = first >> geometry.unit_bits, last >> geometry.unit_bits
        keep = not unmap or live.options.discard_no_unref
        await self._each(
            range(first >> bits, ((last - 1) >> bits) + 1),
            lambda cluster: range(
                max(head - cluster * units, 0), min(tail - cluster * units, units)
            ),
            lambda claim: self._zero_one(claim, keep=keep, discard=live.pass_discard_request),
        )

    async def _each(
        self,
        clusters: range,
        units_of: Callable[[int], range],
        change: Callable[[Claim], bool],
    ) -> None:
        """Claim units of one cluster after the other and change what their L2 entry says."""
        live = self._live
        geometry, path = live.geometry, live.path
        per_slice = geometry.slice_entries
        for start in range(clusters[0] // per_slice, clusters[-1] // per_slice + 1):
            part = range(
                max(clusters[0], start * per_slice),
                min(clusters[-1] + 1, (start + 1) * per_slice),
            )
            written: list[tuple[int, int]] = []
            pinned = await path.pin(part)
            try:
                slice = pinned[start]
                for number, cluster in enumerate(part):
                    if number % _TURN == _TURN - 1:
                        await asyncio.sleep(0)
                    units = units_of(cluster)
                    if self._is_nothing(cluster, slice, cluster % per_slice):
                        continue
                    while True:
                        live.refuse_writes()  # else nothing can be claimed any more, ever
                        wanted = list(units)
                        claim = path.claim(cluster, slice, cluster % per_slice, wanted)
                        if claim is not None:
                            break
                        for unit in wanted:
                            await path.wait_for(cluster, unit)
                    if change(claim):
                        await path.publish([claim])
                        continue
                    path.release(claim)
                    unit_size = 1 << geometry.unit_bits
                    begin = (cluster << geometry.cluster_bits) + units[0] * unit_size
                    written.append((begin, len(units) * unit_size))
            finally:
                path.unpin(pinned)
            for begin, length in written:
                await self._write(begin, min(length, live.size - begin))

    def _is_nothing(self, cluster: int, slice: Slice, index: int) -> bool:
        """Whether a cluster takes no space and reads as zeroes already."""
        live = self._live
        geometry = live.geometry
        word = slice.words[index * geometry.words]
        if geometry.extended:
            bitmap = slice.words[index * geometry.words + 1]
            done = not word and (bitmap == ALL_ZERO or (not bitmap and not live.has_backing))
        else:
            done = word == ZERO or (not word and not live.has_backing)
        # The engine may have allocated it just now.
        units = range(cluster * geometry.units, (cluster + 1) * geometry.units)
        return done and all(live.map.get(unit) & ~MAP_WRITABLE == MAP_ZERO for unit in units)

    def _zero_one(self, claim: Claim, *, keep: bool, discard: bool) -> bool:
        """Make claimed units read as zeroes; False if that cannot be said in an L2 entry."""
        live = self._live
        geometry = live.geometry
        words, at = claim.slice.words, claim.index * geometry.words
        word = words[at]
        own = bool(word & COPIED and not word & COMPRESSED)
        if len(claim.units) < geometry.units:
            if word & COMPRESSED:
                return False
            mask = sum(1 << unit for unit in claim.units)
            words[at + 1] = (words[at + 1] & ~mask) | mask << 32
        elif keep and own and geometry.version >= 3:
            if geometry.extended:
                words[at + 1] = ALL_ZERO
            else:
                words[at] = word | ZERO
        else:
            if geometry.extended:
                words[at], words[at + 1] = 0, ALL_ZERO
            else:
                words[at] = ZERO if geometry.version >= 3 else 0
            live.let_go(word, discard=discard)
        live.l2.mark_dirty(claim.slice)
        return True

    async def free(self, clusters: range) -> None:
        """The same for clusters that are to disappear."""
        whole = range(self._live.geometry.units)
        await self._each(
            clusters,
            lambda _: whole,
            lambda claim: self._zero_one(
                claim, keep=False, discard=self._live.options.pass_discard_other
            ),
        )

    async def _write(self, offset: int, length: int) -> None:
        """Zeroes as data, through the engine's map; nothing where there are zeroes already."""
        live = self._live
        while length > 0:
            part = min(length, len(_ZEROES))
            if not await self._reads_zero(offset, part):
                data = memoryview(_ZEROES)[:part]
                await live.engine.submit(live.map, OP_WRITE, offset, data, flags=REQ_LITERAL)
            offset += part
            length -= part

    async def _reads_zero(self, offset: int, length: int) -> bool:
        live = self._live
        bits = live.geometry.unit_bits
        clusters = range(
            offset >> live.geometry.cluster_bits,
            ((offset + length - 1) >> live.geometry.cluster_bits) + 1,
        )
        pinned = await live.path.pin(clusters)
        try:
            units = range(offset >> bits, ((offset + length - 1) >> bits) + 1)
            return all(live.map.get(unit) & MAP_TYPE == MAP_ZERO for unit in units)
        finally:
            live.path.unpin(pinned)
