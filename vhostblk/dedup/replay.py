# SPDX-License-Identifier: GPL-2.0-or-later
"""Replaying frames on top of a database: of the journal after a crash, of the ledger in a rebuild.

Blocks of the last frames may not have reached the data device. One that is not there is left out
together with all that shows it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

from vhostblk.dedup.format import Mapped, Marked, Record, Stored, Taken
from vhostblk.dedup.futures import Turns, in_thread
from vhostblk.dedup.tables import Tables

Frame = tuple[int, list[Record]]
_PORTION = 1024
"""Records that are in memory at a time, about."""


@dataclass
class Survey:
    """What has to be known of a journal before it is replayed."""

    frames: int = 0
    mark: int = 0
    """The last one: the blocks of all frames before this are on stable storage."""
    taken: list[int] = field(default_factory=list)
    """Segments that have become the ledger's."""


def look_through(frames: Iterable[Frame]) -> Survey:
    """The first time through a journal. Any thread."""
    survey = Survey()
    for _, records in frames:
        survey.frames += 1
        for record in records:
            if isinstance(record, Marked):
                survey.mark = max(survey.mark, record.frame)
            elif isinstance(record, Taken):
                survey.taken.append(record.segment)
    return survey


async def in_slices(frames: Iterator[Frame]) -> AsyncIterator[Frame]:
    """The same frames, read in a thread, a few at a time; others go on meanwhile."""
    while portion := await in_thread(lambda: _portion(frames)):
        turns = Turns()
        for frame in portion:
            yield frame
            await turns.others()


def _portion(frames: Iterator[Frame]) -> list[Frame]:
    portion, count = [], 0
    for frame in frames:
        portion.append(frame)
        count += len(frame[1])
        if count >= _PORTION:
            break
    return portion


class Replay:
    """Takes frames, one after the other."""

    def __init__(
        self, tables: Tables, trusted: int, is_there: Callable[[Stored], Awaitable[bool]]
    ) -> None:
        self._tables = tables
        self._trusted = trusted
        self._is_there = is_there
        self._missing: set[int] = set()
        self._dropped: set[tuple[int, int]] = set()
        self.whole = True
        """All of the blocks were there."""

    @property
    def dropped(self) -> int:
        """Blocks of disks that show what they have shown before."""
        return len(self._dropped)

    async def frame(self, number: int, records: list[Record]) -> list[Record]:
        """What of it holds, and is in the tables now."""
        tables, missing = self._tables, self._missing
        held: list[Record] = []
        for record in records:
            if isinstance(record, Stored):
                if number < self._trusted or await self._is_there(record):
                    missing.discard(record.number)
                else:
                    self.whole = False
                    self._leave_out(record)
                    continue
            elif isinstance(record, Mapped):
                if record.number in missing:
                    self._dropped.update(_shown(record))
                    continue
                if self._dropped:
                    self._dropped.difference_update(_shown(record))
            tables.apply(record)
            held.append(record)
        return held

    def _leave_out(self, record: Stored) -> None:
        if self._tables.block(record.number) is not None:
            return  # it has not moved
        self._missing.add(record.number)
        state = self._tables.state
        state.next_block = max(state.next_block, record.number + 1)


def _shown(record: Mapped) -> Iterator[tuple[int, int]]:
    """Disk and number of each block."""
    return ((record.disk, record.first + at) for at in range(record.blocks))
