# SPDX-License-Identifier: GPL-2.0-or-later
"""Replaying frames on top of a database: of the journal after a crash, of the ledger in a rebuild.

Blocks of the last frames may not have reached the data device. One that is not there is left out
together with all that shows it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vhostblk.dedup.format import Mapped, Record, Stored
from vhostblk.dedup.tables import Tables


class Replay:
    """Takes frames, one after the other."""

    def __init__(
        self, tables: Tables, trusted: int, is_there: Callable[[Stored], Awaitable[bool]]
    ) -> None:
        self._tables = tables
        self._trusted = trusted
        self._is_there = is_there
        self._missing: set[int] = set()
        self.dropped = 0
        """Blocks of disks that show what they have shown before."""

    async def frame(self, number: int, records: list[Record]) -> list[Record]:
        """What of it holds, and is in the tables now."""
        tables, missing = self._tables, self._missing
        held: list[Record] = []
        for record in records:
            if isinstance(record, Stored):
                if number < self._trusted or await self._is_there(record):
                    missing.discard(record.number)
                elif tables.block(record.number) is None:
                    missing.add(record.number)
                    state = tables.state
                    state.next_block = max(state.next_block, record.number + 1)
                    continue
                else:
                    continue  # it has not moved
            elif isinstance(record, Mapped) and record.number in missing:
                self.dropped += record.blocks
                continue
            tables.apply(record)
            held.append(record)
        return held
