# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the L2 tables that is in memory, here and as tables of the engine's map.

An L2 table is read in *slices* of 4 KiB. A slice is one table of the engine's
map: while it is here, it is there, and requests that it answers never come up.
The words here are the metadata as they will be on disk; the engine's entries
are made from them. What the engine allocates by itself it writes to a log, from
which `apply_log()` brings the words up to date.

The number of slices is bounded. Which one goes is decided by a clock: a hand
walks round, slices used since it last passed stay. A slice goes in three steps:
its table is unlinked from the map, then every request that may have found
something in it before must end (it may still allocate), and only then are the
words forgotten. Until then nobody may load it again.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from vhostblk.engine.map import MapHandle, MapWords
from vhostblk.nodes.qcow2.geometry import Geometry
from vhostblk.nodes.qcow2.storage import background


class Slice:
    """A part of an L2 table. `words` are in the machine's byte order."""

    __slots__ = ("fresh", "index", "leaving", "pins", "words")

    def __init__(self, index: int, words: array[int]) -> None:
        self.index = index
        self.words = words
        self.pins = 0
        # The request that it was loaded for has not had the time to look at it.
        self.fresh = True
        self.leaving = False

    def image(self) -> bytes:
        """A copy as it is on disk (big-endian)."""
        return words_to(self.words)


def words_from(data: bytes) -> array[int]:
    """64-bit big-endian numbers."""
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def words_to(words: array[int]) -> bytes:
    """The opposite; the words stay as they are."""
    copy = words[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()


class Source(Protocol):
    """Where slices come from."""

    async def load_slice(self, index: int) -> array[int]:
        """The words of a slice as they are on disk; zeroes if there is no table."""

    def map_entries(self, slice: Slice) -> array[int] | None:
        """What the engine is to know of it; None: nothing, all requests shall come up."""

    def grace(self) -> Awaitable[None]:
        """Done when all requests that have begun by now have ended."""

    async def write_back(self) -> None:
        """Write all dirty slices."""


class L2Cache:
    """The slices in memory."""

    def __init__(
        self,
        geometry: Geometry,
        handle: MapHandle,
        source: Source,
        limit: int,
        made_dirty: Callable[[], None],
    ) -> None:
        self.handle = handle
        self.words = MapWords(geometry.unit_bits, geometry.cluster_bits, geometry.slice_entries)
        self._source = source
        self.limit = limit
        self._made_dirty = made_dirty
        self._slices: dict[int, Slice] = {}
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._clock: list[int] = []
        self._hand = 0
        self._evicting: asyncio.Task[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._cleared = 0
        self.dirty: dict[int, Slice] = {}

    def __len__(self) -> int:
        return len(self._slices)

    def get(self, index: int) -> Slice | None:
        """A slice if it is there and stays."""
        found = self._slices.get(index)
        return None if found is None or found.leaving else found

    def indexes(self) -> Iterable[int]:
        """Of all slices in memory."""
        return self._slices

    def mark_dirty(self, slice: Slice) -> None:
        """Its words are ahead of the disk."""
        self.dirty[slice.index] = slice
        self._made_dirty()

    async def pin(self, index: int) -> Slice:
        """The slice, loaded if necessary; it stays until unpin()."""
        while True:
            found = self._slices.get(index)
            if found is not None and not found.leaving:
                found.pins += 1
                return found
            if found is not None:
                assert self._gone is not None
                await self._gone
            elif index in self._loading:
                await self._loading[index]
            else:
                await self._load(index)

    def unpin(self, slice: Slice) -> None:
        """The opposite of pin()."""
        slice.pins -= 1

    async def _load(self, index: int) -> None:
        done = asyncio.get_running_loop().create_future()
        self._loading[index] = done
        cleared = self._cleared
        try:
            words = await self._source.load_slice(index)
            if cleared != self._cleared:
                return  # it may have been a part of a table that is none any more
            slice = Slice(index, words)
            self.words.add(index, words)
            self._slices[index] = slice
            self._clock.append(index)
            try:
                self.install(slice)
            except BaseException:
                self._forget(index)
                self._clock.remove(index)
                raise
        finally:
            # Those who wait look again, and load it themselves if this failed.
            del self._loading[index]
            done.set_result(None)
        if len(self._slices) > self.limit and self._evicting is None:
            self._evicting = background(self._evict())

    def install(self, slice: Slice) -> None:
        """Tell the engine."""
        entries = self._source.map_entries(slice)
        if entries is not None:
            self.handle.install(slice.index, entries)

    def _forget(self, index: int) -> None:
        self.words.remove(index)
        del self._slices[index]

    # ---- what the engine did

    def apply_log(self) -> None:
        """Enter what the engine has allocated by itself. Never waits."""
        # None of the slices can have gone: that waits for all who may allocate in it.
        changed = list(self.words.take_log(self.handle))
        self.dirty.update((number, self._slices[number]) for number in changed)
        if changed:
            self._made_dirty()

    # ---- eviction

    async def _evict(self) -> None:
        try:
            while len(self._slices) > self.limit:
                count = max(1, self.limit // 8, len(self._slices) - self.limit)
                victims = self._choose(count)
                if not victims:
                    if not self.dirty:
                        return  # all pinned: the next load tries again
                    await self._source.write_back()
                    victims = self._choose(count)
                    if not victims:
                        return
                await self._drop(victims)
        except OSError:
            return  # written back later, or reported by the guest's flush
        finally:
            self._evicting = None

    def _choose(self, count: int) -> list[Slice]:
        victims: list[Slice] = []
        self.apply_log()
        for _ in range(2 * len(self._clock)):
            if len(victims) >= count:
                break
            self._hand = (self._hand + 1) % len(self._clock)
            slice = self._slices[self._clock[self._hand]]
            if slice.pins or slice.leaving or slice.index in self.dirty:
                continue
            if self.handle.used(slice.index) or slice.fresh:
                slice.fresh = False
                continue
            slice.leaving = True
            victims.append(slice)
        return victims

    async def _drop(self, victims: Iterable[Slice]) -> None:
        self._gone = asyncio.get_running_loop().create_future()
        try:
            for slice in victims:
                self.handle.evict(slice.index)
            await self._source.grace()
            self.apply_log()
        finally:
            for slice in victims:
                slice.leaving = False
                if self._slices.get(slice.index) is not slice:
                    continue  # all have been forgotten meanwhile
                if slice.index in self.dirty or slice.pins:
                    self.install(slice)  # somebody allocated in it at the last moment
                else:
                    self._forget(slice.index)
            self._clock = list(self._slices)
            self._gone.set_result(None)

    async def drop_unused(self) -> None:
        """Forget what nobody has used since the last time (cache-clean-interval)."""
        if self._evicting is None:
            self._evicting = background(self._clean())
            # It must end in order, even if whoever waits here is not to wait any longer.
            await asyncio.shield(self._evicting)

    async def _clean(self) -> None:
        try:
            victims = [
                slice
                for slice in self._slices.values()
                if not (slice.pins or slice.leaving or slice.index in self.dirty)
                and not self.handle.used(slice.index)
                and not slice.fresh
            ]
            for slice in victims:
                slice.leaving = True
            if victims:
                await self._drop(victims)
        finally:
            self._evicting = None

    # ---- all of it

    async def settle(self) -> None:
        """Wait until nothing is being evicted or loaded."""
        while self._evicting is not None or self._loading:
            if self._evicting is not None:
                await self._evicting
            for loading in list(self._loading.values()):
                await loading

    def clear(self) -> None:
        """Forget everything: nothing is dirty, and no request is in flight."""
        for index in list(self._slices):
            self.handle.evict(index)
            self._forget(index)
        self._clock.clear()
        self.dirty.clear()
        self._cleared += 1

    def install_again(self) -> None:
        """What unallocated means has changed; no request is in flight."""
        self.apply_log()  # or what the engine has allocated would be nowhere
        for slice in self._slices.values():
            self.handle.evict(slice.index)
            if not slice.leaving:
                self.install(slice)

    def stop_serving(self) -> None:
        """Take every table away from the engine: all requests come up from now on."""
        for index in self._slices:
            self.handle.evict(index)
