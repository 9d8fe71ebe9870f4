# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `throttle` node and its groups (cffi_build/engine/nodes/throttle*.c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, NodeHandle

LIMITS = (
    "bps-total",
    "bps-read",
    "bps-write",
    "iops-total",
    "iops-read",
    "iops-write",
    "iops-flush",
)
"""The limits of a group, in the engine's order."""
DIRECTIONS = ("read", "write", "flush")


@dataclass(frozen=True)
class Limit:
    """One limit. Units are bytes or operations."""

    avg: int
    """Units a second; 0: no limit."""
    max: int = 0
    """Units a second in a burst; 0: none."""
    burst_length: int = 1
    """Seconds."""


@dataclass(frozen=True)
class Waiting:
    """Requests of one direction that had to wait."""

    queued: int
    """Wait now."""
    waited: int
    """Have waited."""
    waited_ns: int
    """For how long, all together."""


class ThrottleGroupHandle:
    """Limits that nodes share."""

    def __init__(self, engine: Engine) -> None:
        self.pointer = engine.made(lib.vb_throttle_group_new(engine.error))

    def set(self, limits: Sequence[Limit], iops_size: int) -> None:
        """Other limits, from now on, also for requests that wait."""
        given = ffi.new("struct vb_throttle_limits *")
        for index, limit in enumerate(limits):
            given.avg[index] = limit.avg
            given.max[index] = limit.max
            given.burst_length[index] = limit.burst_length
        given.iops_size = iops_size
        lib.vb_throttle_group_set(self.pointer, given)

    def stats(self) -> dict[str, Waiting]:
        """By direction."""
        raw = ffi.new("struct vb_throttle_stats *")
        lib.vb_throttle_group_stats(self.pointer, raw)
        return {
            name: Waiting(raw.queued[index], raw.waited[index], raw.waited_ns[index])
            for index, name in enumerate(DIRECTIONS)
        }

    def free(self) -> None:
        """No node has it."""
        lib.vb_throttle_group_free(self.pointer)
        self.pointer = ffi.NULL


class ThrottleHandle(NodeHandle):
    """A member of a group."""

    def __init__(self, engine: Engine, pointer: Any, group: ThrottleGroupHandle) -> None:
        super().__init__(engine, pointer)
        self.group = group

    def set_group(self, group: ThrottleGroupHandle) -> None:
        """Only while every export that reaches this node is paused."""
        lib.vb_throttle_set_group(self.pointer, group.pointer)
        self.group = group

    def drain(self, begin: bool) -> None:
        """From `begin` until its end nothing waits here."""
        lib.vb_throttle_drain(self.pointer, begin)


def new_throttle(engine: Engine, group: ThrottleGroupHandle) -> ThrottleHandle:
    """A `throttle` node."""
    pointer = engine.made(lib.vb_node_throttle_new(engine.pointer, group.pointer, engine.error))
    return ThrottleHandle(engine, pointer, group)
