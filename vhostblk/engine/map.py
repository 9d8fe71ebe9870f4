# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `map` node (cffi_build/engine/nodes/map.c): where guest data live."""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, NodeHandle, UpcallSink

MAP_MISS: int = lib.VB_MAP_MISS
MAP_DATA: int = lib.VB_MAP_DATA
MAP_ZERO: int = lib.VB_MAP_ZERO
MAP_BACKING: int = lib.VB_MAP_BACKING
MAP_PENDING: int = lib.VB_MAP_PENDING
MAP_TYPE: int = lib.VB_MAP_TYPE
MAP_WRITABLE: int = lib.VB_MAP_WRITABLE
MAP_OFFSET = 0xFFFF_FFFF_FFFF_FE00
_SLICES = 512  # told of at once
_RUN_WANTED: int = lib.VB_MAP_RUN_WANTED

_FEW = 1 << 16


class MapLog(Protocol):
    """Memory for a map's log (struct vb_map_log in map.api.h), which may outlive the process."""

    address: int
    records: int
    """How many it has room for: a power of two."""


class MapHandle(NodeHandle):
    """Where guest data live: entries by unit, in tables. See map.api.h for what an entry is.

    Units are numbered from the start of the disk; guest and host offsets are bytes.
    """

    def __init__(self, engine: Engine, pointer: Any, cookie: int, log: MapLog | None) -> None:
        super().__init__(engine, pointer)
        self._cookie = cookie
        self.log = log

    def install(self, table: int, entries: array[int]) -> None:
        """Make the entries (`array("Q")`, as many as a table has) of a table known."""
        result = lib.vb_map_install(self.pointer, table, ffi.from_buffer("uint64_t[]", entries))
        if result < 0:
            raise OSError(-result, f"table {table} of a map: {os.strerror(-result)}")

    def evict(self, table: int) -> bool:
        """Forget a table: requests for its units come up. Whether it was there."""
        return bool(lib.vb_map_evict(self.pointer, table))

    def used(self, table: int) -> bool:
        """Whether the table has been looked at since the last call."""
        return bool(lib.vb_map_used(self.pointer, table))

    def get(self, unit: int) -> int:
        """An entry; MAP_MISS if its table is not there."""
        return int(lib.vb_map_get(self.pointer, unit))

    def set(self, unit: int, count: int, entry: int, step: int) -> None:
        """Set entries, the host offset growing by `step` from one to the next."""
        lib.vb_map_set(self.pointer, unit, count, entry, step)

    def claim(self, unit: int, expected: int) -> bool:
        """Exchange an entry for MAP_PENDING; False if it is not (any more) as expected."""
        return bool(lib.vb_map_claim(self.pointer, unit, expected))

    def give(self, host: int, length: int) -> bool:
        """Let the engine allocate from here, zeroes that are nobody's. False: it has enough."""
        result = lib.vb_map_give(self.pointer, host, length)
        if result < 0 and result != -errno.EBUSY:
            raise OSError(-result, os.strerror(-result))
        return bool(result == 0)

    def take(self, clusters: int) -> tuple[int, int]:
        """Up to `clusters` of those that the engine was given: host offset, number (0: none)."""
        host = ffi.new("uint64_t *")
        count = lib.vb_map_take(self.pointer, clusters, host)
        return int(host[0]), int(count)

    def unused(self) -> Iterator[tuple[int, int]]:
        """Clusters that the engine has taken in vain, since the last time: host offset, number."""
        host, count = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        while lib.vb_map_unused(self.pointer, host, count):
            yield int(host[0]), int(count[0])

    def reclaim(self) -> list[tuple[int, int]]:
        """Take back what the engine has not allocated: host offset, bytes. Nothing is in flight."""
        left = ffi.new("uint64_t[4]")
        lib.vb_map_reclaim(self.pointer, left)
        return [(left[i], left[i + 1]) for i in (0, 2) if left[i + 1]]

    def add_to_log(self, guest: int, entry: int, extra: int) -> bool:
        """A record of our own, behind all that happened before; False if the log is full."""
        return bool(lib.vb_map_log(self.pointer, guest, entry, extra) == 0)

    def log_taken(self) -> int:
        """How many records have been taken, ever."""
        return int(lib.vb_map_log_taken(self.pointer))

    def log_done(self, taken: int) -> None:
        """All records before this one are on disk."""
        lib.vb_map_log_done(self.pointer, taken)

    def set_dirty(self, dirty: bool) -> None:
        """While dirty, and while the log has records, flushes come up."""
        lib.vb_map_set_dirty(self.pointer, dirty)

    async def grace(self) -> None:
        """Done when all requests that had looked at an entry before have completed."""
        cookie, io = self._engine.expect_done(self.address)
        lib.vb_map_grace(self.pointer, cookie)
        await io

    def set_size(self, size: int, backing_size: int) -> None:
        """The disk, and what is below it, have these sizes now. Nothing is in flight."""
        lib.vb_map_set_size(self.pointer, size, backing_size)

    def set_log(self, log: MapLog | None) -> None:
        """Another log, an empty one; all in the present one is on disk, and nothing in flight."""
        place = (0, 0) if log is None else (log.address, log.records)
        result = lib.vb_map_set_log(self.pointer, *place)
        if result < 0:
            raise OSError(-result, f"the log of a map: {os.strerror(-result)}")
        self.log = log

    def set_detect_zeroes(self, detect: int) -> None:
        """What becomes of writes of zeroes (struct vb_map_options). Nothing is in flight."""
        lib.vb_map_set_detect_zeroes(self.pointer, detect)

    def free(self) -> None:
        """No request is on its way up or down."""
        self._engine.forget(self._cookie)
        super().free()


class MapWords:
    """L2 tables of a qcow2 image in memory, into which the log of its map is entered.

    A slice of a table is an `array("Q")` in the machine's byte order, and belongs to one table of
    the map; the caller keeps it, and its length, while it is here.
    """

    def __init__(self, unit_bits: int, cluster_bits: int, slice_entries: int) -> None:
        pointer = lib.vb_map_words_new(unit_bits, cluster_bits, slice_entries)
        if pointer == ffi.NULL:
            raise MemoryError
        self._pointer = ffi.gc(pointer, lib.vb_map_words_free)
        self._slices = ffi.new("uint64_t[]", _SLICES)
        self._change = ffi.new("struct vb_map_change *")

    def add(self, slice: int, words: array[int]) -> None:
        """Words of a slice."""
        address = ffi.cast("uint64_t *", words.buffer_info()[0])
        if lib.vb_map_words_set(self._pointer, slice, address) < 0:
            raise MemoryError

    def remove(self, slice: int) -> None:
        """They are forgotten. Nothing in the log is about them."""
        lib.vb_map_words_set(self._pointer, slice, ffi.NULL)

    def enter(self, guest: int, entry: int, units: int) -> None:
        """One change (struct vb_map_change)."""
        self._change.guest, self._change.entry, self._change.units = guest, entry, units
        lib.vb_map_words_enter(self._pointer, self._change)

    def take_log(self, handle: MapHandle) -> Iterator[int]:
        """Enter what the map has allocated since the last time; the slices that have changed."""
        while True:
            count = lib.vb_map_words_take_log(self._pointer, handle.pointer, self._slices, _SLICES)
            if not count:
                return
            yield from ffi.unpack(self._slices, count)


async def sorted_numbers(numbers: array[int], mask: int) -> array[int]:
    """What is left of `numbers` (`array("Q")`) with `mask`, in order, zeroes left out."""
    found = numbers[:]

    def sort() -> None:
        left = lib.vb_map_sort(ffi.from_buffer("uint64_t[]", found), len(found), mask)
        del found[left:]

    if len(found) < _FEW:
        sort()
    else:
        await asyncio.to_thread(sort)
    return found


def _nothing() -> None:
    """For maps that do not allocate."""


def new_map(
    engine: Engine,
    *,
    size: int,
    unit_bits: int,
    cluster_bits: int,
    table_bits: int,
    has_backing: bool,
    backing_size: int,
    allocate: bool,
    detect_zeroes: int = 0,
    sink: UpcallSink,
    low: Callable[[], None] = _nothing,
    log_half: Callable[[], None] = _nothing,
    log: MapLog | None = None,
) -> MapHandle:
    """A `map` node; requests it has no answer for go to `sink`.

    `low` is called for new runs, `log_half` when half of the log is full: once, until something is
    taken out of it. `log` is memory for that record of allocations, which the map has of its own
    otherwise.
    """
    cookie = engine.new_cookie()
    options = ffi.new(
        "struct vb_map_options *",
        {
            "cookie": cookie,
            "size": size,
            "backing_size": backing_size,
            "log": 0 if log is None else log.address,
            "log_records": 0 if log is None else log.records,
            "unit_bits": unit_bits,
            "cluster_bits": cluster_bits,
            "table_bits": table_bits,
            "has_backing": has_backing,
            "allocate": allocate,
            "detect_zeroes": detect_zeroes,
        },
    )
    pointer = engine.made(lib.vb_node_map_new(engine.pointer, options, engine.error))

    def told(_request: int, _ret: int, what: int, *_: int) -> None:
        (low if what == _RUN_WANTED else log_half)()

    engine.listen(cookie, told=told, upcalls=sink)
    return MapHandle(engine, pointer, cookie, log)
