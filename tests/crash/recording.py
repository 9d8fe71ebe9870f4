# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that was done to some files, and what a power cut may leave of it.

The model of a disk is that of its specification, not of a well-behaved one: what had completed
before the last completed flush began is durable, and so is a completed FUA write. Of everything
else that had begun before the cut, any part may be there, sector by sector.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

SECTOR = 512

Kind = Literal["write", "write-zeroes", "discard", "truncate", "flush"]

Mode = Literal["all", "none", "one missing", "one only", "few", "half", "most", "torn"]
MODES: tuple[Mode, ...] = ("all", "none", "one missing", "one only", "few", "half", "most", "torn")
_CHANCE = {"few": 0.15, "half": 0.5, "most": 0.85}


class Clock:
    """Counts what begins and ends, in every file and in the guest: the order of all events."""

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now


@dataclass(eq=False)
class Change:
    """One request to a file. Of a truncate, `length` is the new size."""

    file: str
    kind: Kind
    offset: int
    length: int
    data: bytes = field(repr=False)
    fua: bool
    begin: int
    end: int | None = None  # None: it has not ended, or failed: anything may have happened


class Survival:
    """Which of the changes that are not durable have reached the disk."""

    def __init__(self, mode: Mode, rnd: random.Random) -> None:
        self.mode = mode
        self._rnd = rnd

    def sectors(self, volatile: list[Change]) -> dict[Change, list[bool] | bool]:
        """For each change: whether it is there, or which of its sectors are."""
        rnd = self._rnd
        if self.mode in ("all", "none"):
            fate: dict[Change, list[bool] | bool] = dict.fromkeys(volatile, self.mode == "all")
        elif self.mode in ("one missing", "one only"):
            fate = dict.fromkeys(volatile, self.mode == "one missing")
            if volatile:
                fate[rnd.choice(volatile)] = self.mode == "one only"
        elif self.mode == "torn":
            fate = {change: self._tear(change) for change in volatile}
        else:
            chance = _CHANCE[self.mode]
            fate = {change: rnd.random() < chance for change in volatile}
        return self._truncates_in_order(volatile, fate)

    def toss(self) -> bool:
        return self._rnd.random() < 0.5

    def _tear(self, change: Change) -> list[bool] | bool:
        first = change.offset // SECTOR
        count = -(-(change.offset + change.length) // SECTOR) - first
        how = self._rnd.random()
        if change.kind == "truncate" or count < 2 or how < 0.3:
            return self._rnd.random() < 0.5
        if how < 0.6:
            there = self._rnd.randint(0, count)
            return [number < there for number in range(count)]
        return [self._rnd.random() < 0.5 for _ in range(count)]

    def _truncates_in_order(
        self, volatile: list[Change], fate: dict[Change, list[bool] | bool]
    ) -> dict[Change, list[bool] | bool]:
        """File systems journal sizes: a size that is lost takes all later ones with it."""
        lost = False
        for change in volatile:
            if change.kind == "truncate":
                lost = lost or not fate[change]
                fate[change] = not lost
        return fate


class Recording:
    """The changes of some files since they were added, against one clock."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.changes: list[Change] = []
        self._initial: dict[str, bytes] = {}

    @property
    def files(self) -> list[str]:
        return list(self._initial)

    def add_file(self, name: str, content: bytes) -> None:
        """A file as it is, durably, before anything happens."""
        self._initial[name] = content

    def begin(
        self,
        file: str,
        kind: Kind,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        *,
        fua: bool = False,
    ) -> Change:
        assert file in self._initial
        change = Change(file, kind, offset, length, data, fua, self.clock.tick())
        self.changes.append(change)
        return change

    def end(self, change: Change) -> None:
        change.end = self.clock.tick()

    @contextlib.contextmanager
    def during(
        self,
        file: str,
        kind: Kind,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        *,
        fua: bool = False,
    ) -> Iterator[None]:
        """A change that begins now, and has ended if the block is left without an exception."""
        change = self.begin(file, kind, offset, length, data, fua=fua)
        yield
        self.end(change)

    # ---- shorthands for sequences made by hand

    def write(self, file: str, offset: int, data: bytes) -> None:
        with self.during(file, "write", offset, len(data), data):
            pass

    def flush(self, file: str) -> None:
        with self.during(file, "flush"):
            pass

    # ---- the cut

    def split(self, file: str, time: int) -> tuple[list[Change], list[Change]]:
        """What a cut right after tick `time` leaves for certain, and what it may leave."""
        flushed = max(
            (
                change.begin
                for change in self.changes
                if change.file == file and change.kind == "flush" and _ended(change, time)
            ),
            default=0,
        )
        durable: list[Change] = []
        volatile: list[Change] = []
        for change in self.changes:
            if change.file != file or change.kind == "flush" or change.begin > time:
                continue
            safe = _ended(change, time) and (change.fua or _ended(change, flushed))
            (durable if safe else volatile).append(change)
        return durable, volatile

    def image(self, file: str, time: int, survival: Survival) -> bytes:
        """The file as it may be on disk after a cut right after tick `time`."""
        durable, volatile = self.split(file, time)
        fate = _in_order_within_sectors(volatile, survival.sectors(volatile))
        # A discard promises nothing, however durable it is.
        fate.update((change, change.kind != "discard" or survival.toss()) for change in durable)
        image = bytearray(self._initial[file])
        for change in self.changes:
            if there := fate.get(change):
                _apply(image, change, there)
        return bytes(image)

    def times(self, rnd: random.Random, count: int, first: int = 1) -> list[int]:
        """Moments worth a cut: half of them right before a flush ends, when most is at stake."""
        flushes = [
            change.end - 1
            for change in self.changes
            if change.kind == "flush" and change.end is not None and change.end > first
        ]
        chosen = [
            rnd.choice(flushes)
            if flushes and rnd.random() < 0.5
            else rnd.randint(first, self.clock.now)
            for _ in range(count - 1)
        ]
        return [*chosen, self.clock.now]


def _in_order_within_sectors(
    volatile: list[Change], fate: dict[Change, list[bool] | bool]
) -> dict[Change, list[bool] | bool]:
    """Writes to parts of one sector meet in a cache: who has the last of them has them all."""
    there: set[int] = set()
    for change in reversed(volatile):
        if change.kind == "truncate":
            continue
        first = change.offset // SECTOR
        count = -(-(change.offset + change.length) // SECTOR) - first
        present = fate[change]
        if present is not True:
            parts = [False] * count if present is False else list(present)
            parts += [False] * (count - len(parts))
            fate[change] = [part or first + number in there for number, part in enumerate(parts)]
        now = fate[change]
        there.update(
            first + number for number in range(count) if now is True or (now and now[number])
        )
    return fate


def _ended(change: Change, time: int) -> bool:
    return change.end is not None and change.end <= time


def _apply(image: bytearray, change: Change, there: list[bool] | bool) -> None:
    if change.kind == "truncate":
        if change.length < len(image):
            del image[change.length :]
        else:
            image.extend(bytes(change.length - len(image)))
        return
    data = change.data if change.kind == "write" else bytes(change.length)
    if there is True:
        _put(image, change.offset, data)
        return
    assert not isinstance(there, bool)
    start = change.offset // SECTOR * SECTOR
    for number, present in enumerate(there):
        if present:
            at = start + number * SECTOR
            begin, end = max(at, change.offset), min(at + SECTOR, change.offset + len(data))
            _put(image, begin, data[begin - change.offset : end - change.offset])


def _put(image: bytearray, offset: int, data: bytes) -> None:
    if offset > len(image):
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data
