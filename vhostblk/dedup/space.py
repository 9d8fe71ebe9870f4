# SPDX-License-Identifier: GPL-2.0-or-later
"""The data device: a log that goes from segment to segment, and which of them are free.

New blocks are appended at the head. A segment is free again when the database says that no block
is in it; until then nothing is written where something has been, because a crash could bring back
the metadata that lead there.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterable, Iterator

from vhostblk.dedup.errors import InconsistentError
from vhostblk.dedup.format import SECTOR, Superblock

RESERVE = 2
"""Segments that only garbage collection may use: it needs room to make room."""
GUESTS_RESERVE = RESERVE + 2
"""Segments that guests' writes may not use: the ledger goes on when these have to stop, and in
another segment after a crash."""


class NoSpace(OSError):
    """There is no free segment."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the data device of the dedup store is full")


class FreeSegments:
    """Numbers of segments, of which the first is taken next."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._heap: list[int] = []  # all of these, and some that have been taken out of the middle

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def add(self, number: int) -> None:
        """One more is free."""
        if number not in self._numbers:
            self._numbers.add(number)
            heapq.heappush(self._heap, number)

    def discard(self, number: int) -> None:
        """This one is not, if it was."""
        self._numbers.discard(number)

    def pop(self) -> int:
        """The first one, which is not free any more. There must be one."""
        while (number := heapq.heappop(self._heap)) not in self._numbers:
            pass
        self._numbers.remove(number)
        return number


class Space:
    """The segments of one store."""

    def __init__(
        self, super: Superblock, size: int, used: dict[int, int], head: int, ledger: Iterable[int]
    ) -> None:
        self._super = super
        self.ledger = set(ledger)
        """Segments of the ledger, which are never in `used`."""
        self.used = used
        """Bytes of each segment that blocks need; those not here are free, or the head's."""
        self._flying: dict[int, int] = {}
        self.head = head
        """Where the next block goes, unless it does not fit into the segment."""
        self._moving_head = 0  # the same for blocks that are moved
        self.count = 0
        self._free = FreeSegments()
        if head:
            used.setdefault(self._segment_before(head), 0)
        self.resize(size)

    def _segment_before(self, head: int) -> int:
        """The segment that is being filled; -1 if there is none."""
        # A head at the end of a segment is that segment's, not the next one's.
        return self._super.segment_of(head - 1) if head else -1

    def _is_being_filled(self, segment: int) -> bool:
        return segment in (
            self._segment_before(self.head),
            self._segment_before(self._moving_head),
        )

    def resize(self, size: int) -> None:
        """The data device has this size now."""
        count = self._super.segments(size)
        taken = self.used.keys() | self.ledger
        for number in range(self.count, count):
            if number not in taken:
                self._free.add(number)
        self.count = max(self.count, count)

    @property
    def free(self) -> int:
        """Bytes in free segments."""
        return len(self._free) << self._super.segment_bits

    @property
    def free_segments(self) -> int:
        """How many there are."""
        return len(self._free)

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return self.count << self._super.segment_bits

    def allocate(
        self, wanted: int, *, moving: bool = False, reserve: int = GUESTS_RESERVE
    ) -> tuple[int, int]:
        """Up to `wanted` bytes at the head, at least a block if one is wanted: offset, bytes.

        Blocks that are moved have a head of their own: guests' writes would fill up what the
        reserve has opened for these.
        """
        super = self._super
        head = self._moving_head if moving else self.head
        segment = self._segment_before(head)
        left = super.segment_at(segment + 1) - head if segment >= 0 else 0
        block = min(wanted, super.block_size)
        if left < block:
            if len(self._free) <= reserve:
                raise NoSpace
            segment = self._free.pop()
            self.used[segment] = 0
            head = super.segment_at(segment)
            left = super.segment_size
        length = min(wanted, left // super.block_size * super.block_size or left)
        end = head + -(-length // SECTOR) * SECTOR
        if moving:
            self._moving_head = end
        else:
            self.head = end
        self._flying[segment] = self._flying.get(segment, 0) + 1
        return head, length

    def fits(self, length: int) -> bool:
        """Whether so many bytes, of whole blocks, have room in one piece at the head."""
        head = self.head
        if head:
            left = self._super.segment_at(self._super.segment_of(head - 1) + 1) - head
            if left >= self._super.block_size:
                return left >= length
        return length <= self._super.segment_size and len(self._free) > GUESTS_RESERVE

    def take(self) -> int:
        """A segment for the ledger."""
        if len(self._free) <= RESERVE:
            raise NoSpace
        segment = self._free.pop()
        self.ledger.add(segment)
        return segment

    def give_back(self, segment: int) -> None:
        """The ledger does not need one any more; add_free() makes it free."""
        if segment in self.used or segment not in self.ledger:
            raise InconsistentError(f"segment {segment} is given back, but was not the ledger's")
        self.ledger.remove(segment)

    def taken(self, segment: int) -> None:
        """The journal says that one is the ledger's."""
        self.ledger.add(segment)
        self._free.discard(segment)
        if self.used.get(segment) == 0:
            # The database's head may be at the end of a segment that has become free since.
            del self.used[segment]
        if self._segment_before(self.head) == segment:
            self.head = 0

    def check(self) -> None:
        """Nobody has what is somebody else's."""
        free, used = set(self._free), self.used.keys()
        if twice := sorted((self.ledger & used) | (free & used) | (free & self.ledger)):
            raise InconsistentError(f"segments {twice[:10]} are used for two things")

    def landed(self, offset: int) -> None:
        """What was allocated there is written and recorded, or has failed."""
        segment = self._super.segment_of(offset)
        left = self._flying[segment] - 1
        if left:
            self._flying[segment] = left
        else:
            del self._flying[segment]

    def use(self, offset: int, length: int) -> None:
        """A block is there."""
        segment = self._super.segment_of(offset)
        self.used[segment] = self.used.get(segment, 0) + length

    def lose(self, lost: list[tuple[int, int]]) -> None:
        """The database says that these bytes of segments are not needed."""
        for segment, length in lost:
            left = self.used.get(segment, 0) - length
            if left < 0:
                raise InconsistentError(f"segment {segment} would have {left} bytes in use")
            self.used[segment] = left

    def recount(self, used: dict[int, int]) -> None:
        """What is in use was wrong. Segments that are being written to stay what they are."""
        for number in self.used:
            self.used[number] = used.get(number, 0)
        self.used.update(used)
        for number in used:
            self._free.discard(number)

    def empty(self) -> list[int]:
        """Segments that nothing needs and that are not free yet."""
        return [
            number
            for number, used in self.used.items()
            if used == 0 and number not in self._flying and not self._is_being_filled(number)
        ]

    def release(self, segment: int) -> None:
        """Nobody has one of those any more; add_free() makes it free."""
        if self.used.get(segment) != 0 or segment in self.ledger:
            raise InconsistentError(f"segment {segment} is released, but something is there")
        del self.used[segment]

    def add_free(self, segment: int) -> None:
        """Whoever needs a segment may have this one."""
        self._free.add(segment)

    def replayed(self, offset: int, length: int) -> None:
        """The journal has a block there, after what the database knows."""
        segment = self._super.segment_of(offset)
        self._free.discard(segment)
        # Blocks are recorded when they are written, in any order: where the log ended is not known.
        self.head = 0
        self.use(offset, length)

    def worst(self, limit: int) -> list[int]:
        """Segments with at most `limit` bytes in use, the emptiest first."""
        found = [
            (used, number)
            for number, used in self.used.items()
            if 0 < used <= limit
            and number not in self._flying
            and not self._is_being_filled(number)
        ]
        return [number for _, number in sorted(found)]
