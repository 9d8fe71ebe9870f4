# SPDX-License-Identifier: GPL-2.0-or-later
"""What a dedup store is given: its data device, the disks that are in use, and how to behave."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

CHANGE_BYTES = 256
"""Memory for a change that waits for the database, at most (tests/test_dedup_space.py)."""
HOLD_INTERVAL = 0.5
"""Seconds until something that failed for want of space is tried again."""
BACKLOG = 4
"""Writes wait when there are so many times more changes than begin a checkpoint."""


class Data(Protocol):
    """The data device."""

    size: int

    def read(self, offset: int, into: int | bytearray | memoryview) -> Awaitable[Any]:
        """The buffer, or a new one of that many bytes."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> Awaitable[Any]:
        """Write."""

    def flush(self) -> Awaitable[Any]:
        """What was written before is on stable storage."""

    def discard(self, offset: int, length: int) -> Awaitable[Any]:
        """The range is not needed."""


Send = Callable[[int, int, int], Awaitable[Any]]
"""Writes to an offset of the data device: where in the content, how many bytes."""


class Member(Protocol):
    """A disk of the store that is in use."""

    @property
    def disk(self) -> str:
        """Which one."""

    @property
    def data(self) -> Data:
        """The data device, as this disk reaches it."""

    def set_dirty(self, dirty: bool) -> None:
        """Whether there is something to be flushed."""

    def is_patient(self) -> bool:
        """Whether its writes may wait for space."""

    def forget_places(self) -> None:
        """Blocks have moved."""

    async def grace(self) -> None:
        """Done when no request under way uses a place that it has learnt before."""

    def working(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A step of background work."""

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the control clients."""


@dataclass
class Tuning:
    """How a store behaves, apart from what is on disk."""

    metadata_size: int = 256 << 30
    """The most that the database may grow to."""
    changes: int = 32768
    """A checkpoint is made after that many changes."""
    journal: int = 64 << 20
    """Or when the journal has that many bytes."""
    compress: bool = False
    """Blocks are compressed with zstd if that makes them smaller."""
    verify: bool = False
    """Compare what has the same fingerprint byte by byte."""
    hold: bool = False
    """Writes wait when there is no space, instead of failing."""
    discard: bool = False
    """Free segments are discarded on the data device."""
    garbage: float = 0.25
    """Garbage collection begins when less than this part of the data device is free."""

    @staticmethod
    def changes_in(memory: int) -> int:
        """After how many changes to begin a checkpoint so that all that wait fit into memory.

        Two layers of them: one on its way to the database, and one that takes new ones.
        """
        return max(64, memory // (2 * BACKLOG * CHANGE_BYTES))


@dataclass
class Counters:
    """Since the store was opened."""

    written: int = 0
    """Blocks that guests have written."""
    hits: int = 0
    """Of them, those that were there."""
    zeroes: int = 0
    stored: int = 0
    moved: int = 0
    checkpoints: int = 0
