# SPDX-License-Identifier: GPL-2.0-or-later
"""throttle-group: limits on operations and bytes, shared by all nodes that name it.

The limits are QAPI's ThrottleLimits, with QEMU's meaning and rules (qapi/block-core.json,
docs/throttle.txt, util/throttle.c), and one of our own for flushes. A change holds at once, also
for requests that wait, and forgets nothing of what has passed. Engine half:
cffi_build/engine/nodes/throttle_group.c.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from vhostblk.engine.throttle import (
    DIRECTIONS,
    LIMITS,
    Limit,
    ThrottleGroupHandle,
    ThrottleHandle,
)
from vhostblk.objects import BackendObject, ObjectOptions, register
from vhostblk.schema import Model, UInt64

VALUE_MAX = 10**15
"""Largest limit, and largest burst in units; QEMU's THROTTLE_VALUE_MAX."""
LENGTH_MAX = (1 << 32) - 1
"""Longest burst, in seconds."""
_DIRECTION_OF = {
    "read": "read",
    "write": "write",
    "discard": "write",
    "write_zeroes": "write",
    "flush": "flush",
}


_Counts = dict[str, tuple[int, int]]
"""Requests and bytes by direction."""


def _counts(member: ThrottleHandle) -> _Counts:
    """All that has passed through a node."""
    counts = dict.fromkeys(DIRECTIONS, (0, 0))
    stats = member.stats()
    for name, direction in _DIRECTION_OF.items():
        done, (requests, length) = getattr(stats, name), counts[direction]
        counts[direction] = (requests + done.ops, length + done.bytes)
    return counts


def _sum(one: _Counts, other: _Counts) -> _Counts:
    return {name: (one[name][0] + other[name][0], one[name][1] + other[name][1]) for name in one}


def _difference(one: _Counts, other: _Counts) -> _Counts:
    return {name: (one[name][0] - other[name][0], one[name][1] - other[name][1]) for name in one}


class ThrottleLimits(Model):
    """Limits of a group; 0 is none."""

    iops_total: UInt64 = 0
    """Operations a second, all requests together."""
    iops_total_max: UInt64 = 0
    """The same in a burst."""
    iops_total_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    iops_read: UInt64 = 0
    """Operations a second, reads."""
    iops_read_max: UInt64 = 0
    """The same in a burst."""
    iops_read_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    iops_write: UInt64 = 0
    """Operations a second, writes, discards and zero writes."""
    iops_write_max: UInt64 = 0
    """The same in a burst."""
    iops_write_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    iops_flush: UInt64 = 0
    """Operations a second, flushes."""
    iops_flush_max: UInt64 = 0
    """The same in a burst."""
    iops_flush_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    bps_total: UInt64 = 0
    """Bytes a second, all requests together."""
    bps_total_max: UInt64 = 0
    """The same in a burst."""
    bps_total_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    bps_read: UInt64 = 0
    """Bytes a second, reads."""
    bps_read_max: UInt64 = 0
    """The same in a burst."""
    bps_read_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    bps_write: UInt64 = 0
    """Bytes a second, writes, discards and zero writes."""
    bps_write_max: UInt64 = 0
    """The same in a burst."""
    bps_write_max_length: UInt64 = 1
    """Longest burst, in seconds."""
    iops_size: UInt64 = 0
    """Bytes that count as one operation, for larger requests; 0: each counts once."""

    def limit(self, name: str) -> Limit:
        """The limit that QAPI calls `name`."""
        name = name.replace("-", "_")
        values = (getattr(self, name), getattr(self, f"{name}_max"))
        return Limit(*values, getattr(self, f"{name}_max_length"))

    @model_validator(mode="after")
    def _is_valid(self) -> ThrottleLimits:
        """The rules of QEMU's throttle_is_valid()."""
        for unit in ("iops", "bps"):
            for suffix in ("", "-max"):
                total, read, write = (
                    getattr(self, f"{unit}-{what}{suffix}".replace("-", "_"))
                    for what in ("total", "read", "write")
                )
                if total and (read or write):
                    raise ValueError(
                        f"{unit}-total{suffix} cannot be used together with {unit}-read{suffix} or "
                        f"{unit}-write{suffix}"
                    )
        for name in LIMITS:
            _check(name, self.limit(name))
        if self.iops_size and not (self.iops_total or self.iops_read or self.iops_write):
            raise ValueError("iops-size requires iops-total, iops-read or iops-write")
        return self


def _check(name: str, limit: Limit) -> None:
    if max(limit.avg, limit.max) > VALUE_MAX:
        raise ValueError(f"{name} and {name}-max must be from 0 to {VALUE_MAX}")
    if limit.burst_length < 1:
        raise ValueError(f"{name}-max-length cannot be 0")
    if limit.burst_length > LENGTH_MAX:
        raise ValueError(f"{name}-max-length must be from 1 to {LENGTH_MAX}")
    if limit.burst_length > 1 and not limit.max:
        raise ValueError(f"{name}-max-length requires {name}-max")
    if limit.max and not limit.avg:
        raise ValueError(f"{name}-max requires {name}")
    if limit.max and limit.max < limit.avg:
        raise ValueError(f"{name}-max ({limit.max}) cannot be lower than {name} ({limit.avg})")
    if limit.max * limit.burst_length > VALUE_MAX:
        raise ValueError(
            f"{name}-max-length is too high for this {name}-max: their product must not exceed "
            f"{VALUE_MAX}"
        )


class ThrottleGroupOptions(ObjectOptions):
    """Options of throttle-group."""

    limits: ThrottleLimits = ThrottleLimits()
    """What must not be exceeded."""

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        """`x-iops-total` for `limits.iops-total`, as QEMU's command line has it."""
        if not isinstance(data, dict) or not isinstance(data.get("limits", {}), dict):
            return data
        flat = {name.removeprefix("x-"): data[name] for name in data if name.startswith("x-")}
        rest = {name: value for name, value in data.items() if not name.startswith("x-")}
        return {**rest, "limits": {**data.get("limits", {}), **flat}} if flat else data


@register
class ThrottleGroup(BackendObject):
    """Limits on operations and bytes, shared by all throttle nodes that name it."""

    qom_type = "throttle-group"
    Options = ThrottleGroupOptions
    settable = frozenset({"limits"})
    options: ThrottleGroupOptions

    async def open(self) -> None:
        self.handle = ThrottleGroupHandle(self.engine)
        self._members: dict[ThrottleHandle, _Counts] = {}  # with what they had done before
        self._gone = dict.fromkeys(DIRECTIONS, (0, 0))
        self._set(self.options.limits)

    async def close(self) -> None:
        self.handle.free()

    def _set(self, limits: ThrottleLimits) -> None:
        self.handle.set([limits.limit(name) for name in LIMITS], limits.iops_size)

    # ---- members

    def join(self, member: ThrottleHandle) -> None:
        """A node of this group. What it has done elsewhere does not count here."""
        self._members[member] = _counts(member)

    def leave(self, member: ThrottleHandle) -> None:
        """It is not any more; what it has done here still counts."""
        self._gone = _sum(self._gone, _difference(_counts(member), self._members.pop(member)))

    def _passed(self) -> _Counts:
        passed = self._gone
        for member, before in self._members.items():
            passed = _sum(passed, _difference(_counts(member), before))
        return passed

    # ---- properties

    def merged(self, property: str, value: Any) -> Any:
        # Limits that are not named stay, as in QEMU.
        if isinstance(value, dict):
            return {**self.options.limits.model_dump(by_alias=True), **value}
        return value

    async def apply(self, options: ThrottleGroupOptions) -> None:
        self._set(options.limits)

    def statistics(self) -> dict[str, Any]:
        """What has passed, what waits and what has had to wait, by direction."""
        waiting, passed = self.handle.stats(), self._passed()
        return {
            name: {
                "requests": passed[name][0],
                "bytes": passed[name][1],
                "queued": waiting[name].queued,
                "waited": waiting[name].waited,
                "waited-ns": waiting[name].waited_ns,
            }
            for name in DIRECTIONS
        }
