# SPDX-License-Identifier: GPL-2.0-or-later
"""Events: what they carry, and how often they are sent.

Events a guest can cause at will reach clients at most once a second for each
source. The first one is sent at once. Of those that follow within a second only the
last is kept, and sent when the second is over; so the latest state is always
seen, and a guest cannot fill anybody's memory or log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vhostblk.schema import Model

PERIOD = 1.0


class BlockExportDeleted(Model):
    """An export has gone."""

    id: str


class ExportConnected(Model):
    """A front-end has started to use an export."""

    id: str


class ExportDisconnected(Model):
    """A front-end has gone; `reason` if we dropped it."""

    id: str
    reason: str | None = None


class FilterError(Model):
    """A filter written in Python failed a request; `error` says how, and where in the filter."""

    node_name: str
    driver: str
    operation: str
    offset: int
    length: int
    error: str
    errno: int | None = None


class QuorumReportBad(Model):
    """A leg of a quorum failed or was outvoted (then without `error`)."""

    type: Literal["read", "write", "flush"]
    error: str | None = None
    node_name: str
    sector_num: int
    sectors_count: int


class QuorumFailure(Model):
    """Not enough legs of a quorum agreed, or succeeded; the request has failed."""

    reference: str
    sector_num: int
    sectors_count: int


class QuorumLeg(Model):
    """A leg of a quorum is in another state now."""

    node_name: str
    """The quorum."""
    leg: str
    state: Literal["in-sync", "stale", "failed", "rebuilding"]
    reason: str | None = None


class QuorumUnclean(Model):
    """A quorum was not closed in order: its legs may differ in what was not flushed."""

    node_name: str
    power_cut: bool
    """The host has gone down; a quorum-scrub begins."""


class DedupFull(Model):
    """One of the two devices of a dedup store is full: writes fail (`report`) or wait (`hold`)."""

    metadata: str
    """The directory of the store."""
    device: Literal["data", "metadata"]
    action: Literal["report", "hold"]


class DedupSpace(Model):
    """The data device of a dedup store is this full; at 80, 90 and 95 per cent."""

    metadata: str
    percent: int


class DedupLedger(Model):
    """Lost metadata of a dedup store could not be rebuilt any more, or can be again (`sound`)."""

    metadata: str
    """The directory of the store."""
    ledger: Literal["sound", "broken"]
    reason: str | None = None
    """What has failed."""


class DedupStatistics(Model):
    """Every ten seconds in which a guest has written to a dedup store; as `query-dedup` has it."""

    metadata: str
    """The directory of the store."""
    block_size: int
    hash: str
    logical: int
    """Bytes that disks show, zeroes aside."""
    unique: int
    """Bytes of these that are different."""
    compressed: int
    """Bytes of the data device that hold them."""
    physical: int
    """Bytes of the data device that are not free, with holes that nothing needs any more."""
    ratio: float
    """`logical` / `compressed`."""
    data_size: int
    data_free: int
    metadata_size: int
    ledger_size: int
    """Bytes of the data device that hold records of the metadata."""
    ledger: Literal["sound", "incomplete", "broken", "none"]
    """What could be made anew from these records: see DEDUP_LEDGER."""
    written_blocks: int
    """Since the store was opened."""
    hits: int
    """Of them, those that were there."""
    hits_per_second: float
    zero_blocks: int
    stored_blocks: int
    moved_blocks: int
    checkpoints: int
    full: bool


class DedupDamaged(Model):
    """Something in the database of a dedup store is not what was written there; each page once."""

    metadata: str
    reason: str


class DedupRebuilt(Model):
    """The job `dedup-rebuild` has made the metadata of a dedup store anew."""

    id: str
    """The job."""
    metadata: str
    """The directory where they are."""
    disks: list[str]
    """Disks of the store."""
    blocks: int
    """Stored blocks."""
    time: int
    """When the last record was written that was found: seconds since 1970."""
    dropped: int
    """Blocks of disks whose last, unflushed write was not on the data device."""
    lost: int
    """Records that could not be used, since some before them are missing."""


class BlockImageCorrupted(Model):
    """An image is broken; with `fatal` nothing is written to it any more."""

    device: str
    node_name: str | None = None
    msg: str
    offset: int | None = None
    size: int | None = None
    fatal: bool


class JobStatusChange(Model):
    """A job has entered another state."""

    id: str
    status: str


class BlockJobEnded(Model):
    """A job that moves data has ended (`error` if it failed), or was cancelled."""

    type: str
    device: str
    len: int
    offset: int
    speed: int
    error: str | None = None


class BlockJobError(Model):
    """A job met an error; `action` says what it does about it."""

    device: str
    operation: Literal["read", "write"]
    action: Literal["report", "ignore", "stop"]


class BlockJobPending(Model):
    """A job waits for job-finalize."""

    type: str
    id: str


EVENTS: dict[str, type[Model]] = {
    "BLOCK_EXPORT_DELETED": BlockExportDeleted,
    "BLOCK_IMAGE_CORRUPTED": BlockImageCorrupted,
    "BLOCK_JOB_CANCELLED": BlockJobEnded,
    "BLOCK_JOB_COMPLETED": BlockJobEnded,
    "BLOCK_JOB_ERROR": BlockJobError,
    "BLOCK_JOB_PENDING": BlockJobPending,
    "JOB_STATUS_CHANGE": JobStatusChange,
    "QUORUM_FAILURE": QuorumFailure,
    "QUORUM_REPORT_BAD": QuorumReportBad,
    "VHOSTBLK_EXPORT_CONNECTED": ExportConnected,
    "VHOSTBLK_EXPORT_DISCONNECTED": ExportDisconnected,
    "VHOSTBLK_FILTER_ERROR": FilterError,
    "VHOSTBLK_QUORUM_LEG": QuorumLeg,
    "VHOSTBLK_QUORUM_UNCLEAN": QuorumUnclean,
    "DEDUP_DAMAGED": DedupDamaged,
    "DEDUP_FULL": DedupFull,
    "DEDUP_LEDGER": DedupLedger,
    "DEDUP_REBUILT": DedupRebuilt,
    "DEDUP_SPACE": DedupSpace,
    "DEDUP_STATISTICS": DedupStatistics,
}


@dataclass(frozen=True)
class Limit:
    """Events of one group share a limit; each value of `members` has its own."""

    group: str
    members: tuple[str, ...]


# Coming and going share a limit, so that the last event told is the last thing that happened.
_CONNECTION = Limit("VHOSTBLK_EXPORT", ("id",))
LIMITED: dict[str, Limit] = {
    "DEDUP_LEDGER": Limit("DEDUP_LEDGER", ("metadata",)),
    "QUORUM_FAILURE": Limit("QUORUM_FAILURE", ("reference",)),
    "QUORUM_REPORT_BAD": Limit("QUORUM_REPORT_BAD", ("node-name", "type")),
    "VHOSTBLK_EXPORT_CONNECTED": _CONNECTION,
    "VHOSTBLK_EXPORT_DISCONNECTED": _CONNECTION,
    "VHOSTBLK_FILTER_ERROR": Limit("VHOSTBLK_FILTER_ERROR", ("node-name", "operation")),
}

_Key = tuple[str, ...]


class RateLimiter:
    """Passes events on to `send`, the limited ones not too often."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._waiting: dict[_Key, dict[str, Any]] = {}
        self._timers: dict[_Key, asyncio.TimerHandle] = {}

    def emit(self, name: str, data: dict[str, Any], event: dict[str, Any]) -> None:
        """Send `event` now, or when its turn comes."""
        limit = LIMITED.get(name)
        if limit is None:
            self._send(event)
            return
        key = (limit.group, *(str(data.get(member, "")) for member in limit.members))
        if key in self._timers:
            self._waiting[key] = event
            return
        self._send(event)
        self._start(key)

    def close(self) -> None:
        """Send what waits and stop."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for event in self._waiting.values():
            self._send(event)
        self._waiting.clear()

    def _start(self, key: _Key) -> None:
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(PERIOD, self._elapsed, key)

    def _elapsed(self, key: _Key) -> None:
        del self._timers[key]
        event = self._waiting.pop(key, None)
        if event is not None:
            self._send(event)
            self._start(key)
