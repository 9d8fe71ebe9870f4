# SPDX-License-Identifier: GPL-2.0-or-later
"""What a LUKS header is written to: a file at rest, or a node of a running backend."""

from __future__ import annotations

from typing import Protocol


class Storage(Protocol):
    """Bytes at offsets. `read` is asked for what lies within `size` only."""

    @property
    def size(self) -> int:
        """How many there are."""

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write, enlarging the file if need be."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""


_CHUNK = 1 << 20


async def read_up_to(storage: Storage, offset: int, length: int) -> bytes:
    """The same, less at the end of what there is."""
    length = min(length, storage.size - offset)
    return await storage.read(offset, length) if length > 0 else b""


async def write_zeroes(storage: Storage, offset: int, end: int) -> None:
    """Make this range read as zeroes, leaving alone what does already."""
    for at in range(offset, min(end, storage.size), _CHUNK):
        there = await read_up_to(storage, at, min(_CHUNK, end - at))
        if there.strip(b"\0"):
            await storage.write(at, bytes(len(there)))
    if storage.size < end:
        await storage.write(end - 512, bytes(512))
