# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of requests that the engine cannot carry out by itself.

Most come up because a slice of an L2 table is not in memory: it is loaded and
the request handed back. The rest is work for here: compressed clusters, and
writes that need a copy of something (a backing file's data, a cluster that a
snapshot shares) or a new place.

Such a write *claims* what it touches: it exchanges the engine's entries for
`pending`, whereupon every other request for them waits in the engine. Then it
gathers the old contents around the guest's data, writes them to their new
place, enters that in the L2 table in memory, and puts the new entries in.
Nothing waits for a claim while it holds one, so there is no deadlock: what is
claimed by others is left to another try, in the engine.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.engine import OP_READ, OP_WRITE
from vhostblk.engine.map import (
    MAP_BACKING,
    MAP_DATA,
    MAP_MISS,
    MAP_PENDING,
    MAP_TYPE,
    MAP_WRITABLE,
    MAP_ZERO,
)
from vhostblk.nodes.hooks import Request
from vhostblk.nodes.qcow2.geometry import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO,
    units_of,
)
from vhostblk.nodes.qcow2.l2cache import Slice
from vhostblk.nodes.qcow2.storage import SECTOR

if TYPE_CHECKING:
    from vhostblk.nodes._mapped import MappedImage

_IN_PLACE = MAP_DATA | MAP_WRITABLE
_MANY_RUNS = 16


@dataclass
class Claim:
    """Units of one cluster that are ours until `release()` or new entries are set."""

    cluster: int
    slice: Slice
    index: int  # of the cluster in the slice
    units: dict[int, int]  # unit in the cluster: what the engine's entry was
    moves: bool  # to a new place in the file


class DataPath:
    """Reads and writes of one live image."""

    def __init__(self, live: MappedImage) -> None:
        self._live = live

    # ---- slices

    def _clusters(self, offset: int, length: int) -> range:
        bits = self._live.geometry.cluster_bits
        return range(offset >> bits, ((offset + max(length, 1) - 1) >> bits) + 1)

    def _entries_of(self, slice: Slice, index: int) -> list[int]:
        """What the engine is to know of one cluster."""
        live = self._live
        return units_of(live.geometry, slice.words, index, live.nothing, not live.read_only)

    async def pin(self, clusters: range) -> dict[int, Slice]:
        """All slices that describe these clusters, loaded; undone by unpin()."""
        per_slice = self._live.geometry.slice_entries
        pinned: dict[int, Slice] = {}
        try:
            for number in range(clusters[0] // per_slice, clusters[-1] // per_slice + 1):
                pinned[number] = await self._live.l2.pin(number)
        except BaseException:
            self.unpin(pinned)
            raise
        return pinned

    def unpin(self, pinned: dict[int, Slice]) -> None:
        """The opposite."""
        for slice in pinned.values():
            self._live.l2.unpin(slice)

    def loaded(self, clusters: range) -> bool:
        """Whether the engine has had its chance."""
        per_slice = self._live.geometry.slice_entries
        return all(
            self._live.l2.get(number) is not None
            for number in range(clusters[0] // per_slice, clusters[-1] // per_slice + 1)
        )

    # ---- reading

    async def read(self, request: Request) -> None:
        """A read that the engine had no answer for."""
        live = self._live
        clusters = self._clusters(request.offset, request.length)
        missing = not self.loaded(clusters)
        pinned = await self.pin(clusters)
        try:
            if not live.stopped and (missing or not self._unusual(request)):
                request.retry()
                return
            with live.reading():
                live.l2.apply_log()
                await self._read_here(request, pinned)
        finally:
            self.unpin(pinned)

    def _unusual(self, request: Request) -> bool:
        """Whether the engine would only hand it up again."""
        bits = self._live.geometry.unit_bits
        first = request.offset >> bits
        last = (request.offset + request.length - 1) >> bits
        get = self._live.map.get
        return any(get(unit) & MAP_TYPE == MAP_MISS for unit in range(first, last + 1))

    async def _read_here(self, request: Request, pinned: dict[int, Slice]) -> None:
        live = self._live
        transfers = []
        position = 0
        for kind, where, guest, length in self.extents(request.offset, request.length, pinned):
            if kind == MAP_DATA:
                there = max(0, min(length, live.data.size - where))
                if there:
                    transfers.append(live.transfer(live.data_role, request, where, there, position))
                fill(request, position + there, bytes(length - there))
            elif kind == MAP_BACKING:
                there = max(0, min(length, live.backing_size - guest))
                if there:
                    transfers.append(live.transfer("backing", request, guest, there, position))
                fill(request, position + there, bytes(length - there))
            elif kind == MAP_MISS:
                data = await live.decompress(where)
                begin = guest & (live.geometry.cluster_size - 1)
                fill(request, position, memoryview(data)[begin : begin + length])
            else:
                fill(request, position, bytes(length))
            position += length
        errors = await asyncio.gather(*transfers, return_exceptions=True)
        for error in errors:
            if isinstance(error, BaseException):
                raise error

    def extents(
        self, offset: int, length: int, pinned: dict[int, Slice]
    ) -> Iterator[tuple[int, int, int, int]]:
        """What a range consists of: kind, host offset (or L2 word), guest offset, bytes.

        The kind is one of the map's; MAP_MISS stands for a compressed cluster.
        """
        live = self._live
        geometry = live.geometry
        per_slice, unit_size = geometry.slice_entries, 1 << geometry.unit_bits
        end = offset + length
        pending: tuple[int, int, int, int] | None = None
        for cluster in self._clusters(offset, length):
            slice = pinned[cluster // per_slice]
            index = cluster % per_slice
            word = slice.words[index * geometry.words]
            start = cluster << geometry.cluster_bits
            if word & COMPRESSED:
                pieces = [(MAP_MISS, word, start, geometry.cluster_size)]
            else:
                pieces = [
                    (
                        entry & MAP_TYPE,
                        entry & OFFSET_MASK,
                        start + unit * unit_size,
                        unit_size,
                    )
                    for unit, entry in enumerate(self._entries_of(slice, index))
                ]
            for kind, where, guest, size in pieces:
                begin, stop = max(guest, offset), min(guest + size, end)
                if begin >= stop:
                    continue
                if kind == MAP_DATA:
                    where += begin - guest
                if pending is not None:
                    same = pending[0] == kind and (
                        kind in (MAP_ZERO, MAP_BACKING)
                        or (kind == MAP_DATA and pending[1] + pending[3] == where)
                    )
                    if same:
                        pending = (*pending[:3], pending[3] + stop - begin)
                        continue
                    yield pending
                pending = (kind, where, begin, stop - begin)
        if pending is not None:
            yield pending

    async def read_old(self, offset: int, into: memoryview, pinned: dict[int, Slice]) -> None:
        """The guest's data of a range whose slices are pinned, into memory full of zeroes."""
        live = self._live
        if not len(into):
            return
        reads: list[Awaitable[Any]] = []
        position = 0
        for kind, where, guest, length in self.extents(offset, len(into), pinned):
            part = into[position : position + length]
            position += length
            if kind == MAP_DATA:
                reads.append(live.data.read_into(where, part))
            elif kind == MAP_BACKING:
                there = max(0, min(length, live.backing_size - guest))
                if there:
                    reads.append(live.read_backing(guest, part[:there]))
            elif kind == MAP_MISS:
                data = await live.decompress(where)
                begin = guest & (live.geometry.cluster_size - 1)
                part[:] = memoryview(data)[begin : begin + length]
        await gather(reads)

    # ---- writing

    async def write(self, request: Request) -> None:
        """A write that the engine could not carry out in place."""
        live = self._live
        if live.stopped:
            raise OSError(errno.EIO, "the image is corrupt, nothing is written to it")
        if request.fua:
            # The engine's own part first, then everything with a flush.
            await live.again(request, OP_WRITE)
            await live.make_durable()
            return
        clusters = self._clusters(request.offset, request.length)
        missing = not self.loaded(clusters)
        pinned = await self.pin(clusters)
        try:
            if missing or await self._write(request, clusters, pinned):
                request.retry()
        finally:
            self.unpin(pinned)

    async def _write(self, request: Request, clusters: range, pinned: dict[int, Slice]) -> bool:
        """Do what the engine cannot; whether there is something left for it."""
        live = self._live
        left, run_wanted = False, False
        claims: list[Claim] = []
        for cluster in clusters:
            claim = self._consider(request, cluster, pinned)
            if claim is None:
                left = True
            elif isinstance(claim, Claim):
                claims.append(claim)
                # An entry beside those that were claimed may be the engine's to write to.
                left = left or not self._covers(claim, request)
            else:
                left = run_wanted = True
        if claims:
            live.l2.apply_log()
            groups = list(_groups(claims, live.geometry.extended))
            await gather([self._place(request, group, pinned) for group in groups])
        if run_wanted and not await live.allocator.more_runs():
            # It has clusters, perhaps since a moment ago; or its log is full.
            live.l2.apply_log()
            # The engine may want room for a 16th and one more, or for two: where it finds too
            # little, there is an eighth left at most, and it would come up for ever.
            if live.waiting_records() * 8 >= live.map_records * 7:
                await live.writeback.flush()
        return left

    def _units(self, offset: int, length: int, cluster: int) -> range:
        """Units of a cluster that a range touches."""
        geometry = self._live.geometry
        start = cluster << geometry.cluster_bits
        begin = max(offset, start) - start
        end = min(offset + length, start + geometry.cluster_size) - start
        return range(begin >> geometry.unit_bits, ((end - 1) >> geometry.unit_bits) + 1)

    def _covers(self, claim: Claim, request: Request) -> bool:
        touched = self._units(request.offset, request.length, claim.cluster)
        return all(unit in claim.units for unit in touched)

    def _consider(
        self, request: Request, cluster: int, pinned: dict[int, Slice]
    ) -> Claim | bool | None:
        """A claim; None if the engine can go on with the cluster; True if it needs a run."""
        live = self._live
        geometry, get = live.geometry, live.map.get
        base = cluster * geometry.units
        touched = self._units(request.offset, request.length, cluster)
        entries = [get(base + unit) for unit in touched]
        slice = pinned[cluster // geometry.slice_entries]
        index = cluster % geometry.slice_entries
        if all(
            entry & _IN_PLACE == _IN_PLACE and entry & MAP_TYPE == MAP_DATA for entry in entries
        ):
            return None
        if any(entry & MAP_TYPE == MAP_PENDING for entry in entries):
            return None
        nowhere = not entries[0] & OFFSET_MASK and entries[0] & MAP_TYPE in (MAP_ZERO, MAP_BACKING)
        if geometry.extended:  # or its cluster has a place, even a compressed one
            nowhere = nowhere and not slice.words[index * geometry.words]
        if nowhere and live.engine_allocates and not self._takes_many_runs(request):
            return True  # the engine copies what is around the guest's data, too
        word = slice.words[index * geometry.words]
        own = bool(word & COPIED and not word & COMPRESSED)
        if geometry.extended and own:
            wanted = [u for u in touched if get(base + u) & MAP_TYPE != MAP_DATA]
        else:
            wanted = list(range(geometry.units))
        claim = self.claim(cluster, slice, index, wanted)
        if claim is not None and not own and not claim.moves and geometry.extended:
            # The engine has given it a place, which the words did not say yet. Some of the units
            # are data, then, and may be being written to: they must not be copied.
            self.release(claim)
            return None
        return claim

    def _takes_many_runs(self, request: Request) -> bool:
        """Tiny clusters have tiny runs: then a large request is better off with Python's."""
        live = self._live
        return request.length >> live.geometry.cluster_bits > _MANY_RUNS * live.allocator.most

    def claim(self, cluster: int, slice: Slice, index: int, wanted: list[int]) -> Claim | None:
        """Make units pending; None if somebody else has one of them."""
        live = self._live
        base = cluster * live.geometry.units
        units: dict[int, int] = {}
        for unit in wanted:
            entry = live.map.get(base + unit)
            if entry & MAP_TYPE == MAP_PENDING or not live.map.claim(base + unit, entry):
                for taken, old in units.items():
                    live.map.set(base + taken, 1, old, 0)
                return None
            units[unit] = entry
        # What the engine allocated before the claim is in the words now.
        live.l2.apply_log()
        word = slice.words[index * live.geometry.words]
        own = bool(word & COPIED and not word & COMPRESSED)
        return Claim(cluster, slice, index, units, not own)

    def release(self, claim: Claim) -> None:
        """Put back what was there."""
        base = claim.cluster * self._live.geometry.units
        for unit, old in claim.units.items():
            self._live.map.set(base + unit, 1, old, 0)

    def settle(self, claim: Claim) -> None:
        """Put in what the L2 entry in memory says now."""
        live = self._live
        base = claim.cluster * live.geometry.units
        entries = self._entries_of(claim.slice, claim.index)
        for unit in claim.units:
            live.map.set(base + unit, 1, entries[unit], 0)

    async def _place(self, request: Request, claims: list[Claim], pinned: dict[int, Slice]) -> None:
        """Give adjacent clusters a place, with the guest's data and what was around them."""
        try:
            with self._live.reading():
                if claims[0].moves:
                    await self._move(request, claims, pinned)
                else:
                    await self._fill(request, claims[0], pinned)
        except BaseException:
            for claim in claims:
                self.release(claim)
            raise
        await self.publish(claims)

    async def publish(self, claims: list[Claim]) -> None:
        """The L2 entries have been changed: let the engine see them."""
        try:
            for claim in claims:
                await self._live.record(claim)
        finally:
            for claim in claims:
                self.settle(claim)

    async def _move(self, request: Request, claims: list[Claim], pinned: dict[int, Slice]) -> None:
        """To new clusters."""
        live = self._live
        geometry = live.geometry
        size = geometry.cluster_size
        start = claims[0].cluster * size
        buffer = await self._merged(request, start, len(claims) * size, pinned)
        if geometry.external:
            pieces = [(start, len(claims))]
        else:
            pieces = await live.allocator.reserve_pieces(len(claims))
        try:
            view, at, writes = self._on_disk(start, buffer), 0, []
            for host, count in pieces:
                writes.append(live.data.write(host, view[at : at + count * size]))
                at += count * size
            await gather(writes)
        except BaseException:
            if not geometry.external:
                await live.allocator.free_pieces(pieces)
            raise
        hosts = [host + number * size for host, count in pieces for number in range(count)]
        for claim, host in zip(claims, hosts, strict=True):
            words, at = claim.slice.words, claim.index * geometry.words
            old = words[at]
            if geometry.extended:
                touched = self._units(request.offset, request.length, claim.cluster)
                allocated = sum(1 << unit for unit in touched)
                if old & COMPRESSED:
                    words[at + 1] = ALL_ALLOCATED
                else:
                    allocated |= words[at + 1] & ALL_ALLOCATED
                    words[at + 1] = (words[at + 1] & ~(allocated << 32)) | allocated
            words[at] = host | COPIED
            live.let_go(old)
            live.l2.mark_dirty(claim.slice)

    async def _fill(self, request: Request, claim: Claim, pinned: dict[int, Slice]) -> None:
        """Into the cluster that is there already: preallocated, or other subclusters' too."""
        live = self._live
        geometry = live.geometry
        words, at = claim.slice.words, claim.index * geometry.words
        host = words[at] & OFFSET_MASK
        start = claim.cluster << geometry.cluster_bits
        unit_size = 1 << geometry.unit_bits
        for units in _runs(sorted(claim.units)):
            begin = start + units[0] * unit_size
            buffer = await self._merged(request, begin, len(units) * unit_size, pinned)
            await live.data.write(host + units[0] * unit_size, self._on_disk(begin, buffer))
        if geometry.extended:
            allocated = sum(1 << unit for unit in claim.units)
            words[at + 1] = (words[at + 1] & ~(allocated << 32)) | allocated
        else:
            words[at] = host | COPIED
        live.l2.mark_dirty(claim.slice)

    def _on_disk(self, start: int, buffer: bytearray) -> memoryview:
        """What is to be written of clusters: a data file need not be longer than the disk."""
        view = memoryview(buffer)
        if self._live.geometry.external:
            view = view[: -(-(self._live.size - start) // SECTOR) * SECTOR]
        return view

    async def _merged(
        self, request: Request, start: int, length: int, pinned: dict[int, Slice]
    ) -> bytearray:
        """The old contents of a range with the request's data on top."""
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            begin = max(request.offset - start, 0)
            end = min(request.offset + request.length - start, length)
            last = min(length, self._live.size - start)
            await self.read_old(start, view[:begin], pinned)
            if end < last:
                await self.read_old(start + end, view[end:last], pinned)
            copy_from(request, start + begin - request.offset, view[begin:end])
        return buffer

    # ---- waiting

    async def wait_for(self, cluster: int, unit: int) -> None:
        """Until nobody has claimed a unit: a read waits for that in the engine."""
        live = self._live
        offset = (cluster << live.geometry.cluster_bits) + (unit << live.geometry.unit_bits)
        length = min(512, live.size - offset)
        # Who claims a part of the last cluster that lies behind the end claims those before, too.
        if length > 0:
            await live.engine.submit(live.map, OP_READ, offset, bytearray(length))


def fill(request: Request, position: int, data: bytes | memoryview) -> None:
    """Copy into a read's memory, `position` bytes from its beginning."""
    source = memoryview(data)
    for view in request.buffers:
        if not len(source):
            return
        if position >= len(view):
            position -= len(view)
            continue
        count = min(len(view) - position, len(source))
        view[position : position + count] = source[:count]
        source = source[count:]
        position = 0


def copy_from(request: Request, position: int, into: memoryview) -> None:
    """Copy from a write's memory, `position` bytes from its beginning."""
    done = 0
    for view in request.buffers:
        if done >= len(into):
            return
        if position >= len(view):
            position -= len(view)
            continue
        count = min(len(view) - position, len(into) - done)
        into[done : done + count] = view[position : position + count]
        done += count
        position = 0


async def gather(work: Sequence[Awaitable[Any]]) -> None:
    """Wait for all, then raise the first error: nobody writes to our memory afterwards."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _groups(claims: list[Claim], extended: bool) -> Iterator[list[Claim]]:
    """Adjacent clusters that move are moved together."""
    group: list[Claim] = []
    for claim in claims:
        joins = (
            group
            and not extended
            and claim.moves
            and group[-1].moves
            and claim.cluster == group[-1].cluster + 1
        )
        if group and not joins:
            yield group
            group = []
        group.append(claim)
    if group:
        yield group


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Adjacent numbers together."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


__all__ = ["ZERO", "Claim", "DataPath", "copy_from", "fill", "gather"]
