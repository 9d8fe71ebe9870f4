# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `quorum` node (cffi_build/engine/nodes/quorum.c) and its legs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, NodeHandle, NodeSink, UpcallSink, finish

QUORUM_ALL: int = lib.VB_QUORUM_ALL
QUORUM_UNEVEN: int = lib.VB_QUORUM_UNEVEN
QUORUM_RETIRED: int = lib.VB_QUORUM_RETIRED

LEG_IN_SYNC: int = lib.VB_LEG_IN_SYNC
LEG_STALE: int = lib.VB_LEG_STALE
LEG_FAILED: int = lib.VB_LEG_FAILED
LEG_REBUILDING: int = lib.VB_LEG_REBUILDING
LEG_STATE: int = lib.VB_LEG_STATE
LEG_WHOLE: int = lib.VB_LEG_WHOLE

LATE_SIZE: int = lib.VB_QUORUM_LATE_SIZE
LATE_ENTRY = 32


class LegHandle:
    """A leg's state and dirty map, in memory that the caller keeps."""

    def __init__(self, state: int, dirty: int, bits: int, region_bits: int) -> None:
        self.pointer = lib.vb_quorum_leg_new(state, dirty, bits, region_bits)
        if self.pointer == ffi.NULL:
            raise MemoryError("no memory for a leg")

    def move(self, state: int, dirty: int, bits: int) -> None:
        """They are at other addresses now. Nothing is in flight."""
        lib.vb_quorum_leg_move(self.pointer, state, dirty, bits)

    def free(self) -> None:
        """Its quorum does not know it any more."""
        lib.vb_quorum_leg_free(self.pointer)
        self.pointer = ffi.NULL

    @property
    def word(self) -> int:
        """The state with its flags."""
        return int(lib.vb_quorum_leg_state(self.pointer))

    def change(self, old: int, new: int) -> bool:
        """Another state; False if it is not (any more) as expected."""
        return bool(lib.vb_quorum_leg_change(self.pointer, old, new))

    def set_forgets(self, forgets: bool) -> None:
        """Whether it may lose what it has acknowledged when it fails."""
        lib.vb_quorum_leg_set_forgets(self.pointer, forgets)

    @property
    def recorded(self) -> bool:
        """Whether it is on disk that the leg is out."""
        return bool(lib.vb_quorum_leg_is_recorded(self.pointer))

    @recorded.setter
    def recorded(self, recorded: bool) -> None:
        lib.vb_quorum_leg_set_recorded(self.pointer, recorded)

    def mark(self, region: int, count: int, dirty: bool) -> None:
        """Regions are dirty, or are not any more."""
        lib.vb_quorum_leg_mark(self.pointer, region, count, dirty)

    def next_dirty(self, region: int, end: int) -> int:
        """The first dirty region from `region` on; `end` if there is none before."""
        return int(lib.vb_quorum_leg_next(self.pointer, region, end))

    def count_dirty(self, end: int) -> int:
        """How many regions are dirty."""
        return int(lib.vb_quorum_leg_count(self.pointer, end))

    @property
    def strays(self) -> int:
        """Requests that were given up and are still on their way."""
        return int(lib.vb_quorum_leg_strays(self.pointer))


@dataclass(frozen=True)
class QuorumSettings:
    """What the engine's half goes by."""

    threshold: int
    write_threshold: int
    timeout_ns: int
    fifo: bool
    lates: int
    """Address of LATE_SIZE bytes."""
    discard_unit: int
    """Of a discard, whole units are zeroed; 0: nothing is done."""
    size: int
    """The quorum's: where the last unit ends."""


class QuorumHandle(NodeHandle):
    """Legs with the same data."""

    def __init__(self, engine: Engine, pointer: Any, cookie: int) -> None:
        super().__init__(engine, pointer)
        self._cookie = cookie

    def set(self, settings: QuorumSettings, legs: Sequence[LegHandle]) -> None:
        """Other options; only while every export that reaches this node is paused."""
        lib.vb_node_quorum_set(self.pointer, *_options(self._cookie, settings, legs))

    def hold_early(self, hold: bool) -> None:
        """While it is held, no write is acknowledged before all legs have it."""
        lib.vb_quorum_hold_early(self.pointer, hold)

    @property
    def late(self) -> int:
        """Writes that have been acknowledged and have not reached all legs."""
        return int(lib.vb_quorum_late(self.pointer))

    async def lock(self, offset: int, length: int, patience: float) -> int:
        """Let no change of a range begin, and wait for those in flight; for unlock().

        TimeoutError, and nothing is locked, if they take longer than `patience` (seconds).
        """
        cookie, io = self._engine.expect_done(self.address)
        lock = int(lib.vb_quorum_lock(self.pointer, offset, length, cookie))
        if lock < 0:
            self._engine.forget_done(cookie)
            raise OSError(-lock, os.strerror(-lock))
        try:
            await finish(io, patience)
        except BaseException:
            self.unlock(lock)
            raise
        return lock

    def unlock(self, lock: int) -> None:
        """Let changes go on."""
        lib.vb_quorum_unlock(self.pointer, lock)

    def free(self) -> None:
        """Nothing reaches it any more."""
        self._engine.forget(self._cookie)
        super().free()


def new_quorum(
    engine: Engine,
    settings: QuorumSettings,
    legs: Sequence[LegHandle],
    *,
    told: NodeSink,
    upcalls: UpcallSink,
) -> QuorumHandle:
    """A `quorum` node; see quorum.api.h for what it tells and hands up."""
    cookie = engine.new_cookie()
    options, pointers = _options(cookie, settings, legs)
    pointer = engine.made(lib.vb_node_quorum_new(engine.pointer, options, pointers, engine.error))
    engine.listen(cookie, told=told, upcalls=upcalls)
    return QuorumHandle(engine, pointer, cookie)


def _options(cookie: int, settings: QuorumSettings, legs: Sequence[LegHandle]) -> tuple[Any, Any]:
    options = ffi.new(
        "struct vb_quorum_options *",
        {
            "cookie": cookie,
            "legs": len(legs),
            "threshold": settings.threshold,
            "write_threshold": settings.write_threshold,
            "timeout_ns": settings.timeout_ns,
            "lates": settings.lates,
            "discard_unit": settings.discard_unit,
            "size": settings.size,
            "fifo": settings.fifo,
        },
    )
    return options, ffi.new("vb_quorum_leg *[]", [leg.pointer for leg in legs])
