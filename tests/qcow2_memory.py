# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in memory that knows what would be left of its contents if the power failed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class MemoryDisk:
    """Storage for the format's modules; every write is kept in order, and so are the barriers."""

    data: bytearray
    log: list[tuple[int, bytes] | None] = field(default_factory=list)
    """Writes; None is a barrier."""
    reads: int = 0
    bytes_read: int = 0

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        self.bytes_read += length
        found = bytes(self.data[offset : offset + length])
        return found + bytes(length - len(found))

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.log.append((offset, bytes(data)))
        _put(self.data, offset, bytes(data))

    async def flush(self) -> None:
        self.log.append(None)

    async def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))

    def cut(self, before: bytes, events: int, rng: random.Random | None) -> bytes:
        """Contents after a power cut behind `events` events.

        What a barrier follows is there. Of the rest, everything is, or, with `rng`, any part.
        """
        happened = self.log[:events]
        barrier = max((i for i, event in enumerate(happened) if event is None), default=-1)
        left = bytearray(before)
        for number, event in enumerate(happened):
            if event is not None and (number < barrier or rng is None or rng.random() < 0.5):
                _put(left, *event)
        return bytes(left)


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    if offset + len(piece) > len(data):
        data.extend(bytes(offset + len(piece) - len(data)))
    data[offset : offset + len(piece)] = piece
