# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest of one node: requests, many at a time, with a record of what must be on the disk."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from in_process import Host

from crash.history import SECTOR, ZERO, History, Kind, WrongContentError
from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_WRITE, OP_WRITE_ZEROES, REQ_FUA, REQ_MAY_UNMAP

ALL: tuple[Kind, ...] = ("write", "write", "write", "write-zeroes", "discard", "flush")
PIECE = 1 << 20


class Drive:
    """Reads and writes a node of a host and keeps the history up to date."""

    def __init__(
        self, host: Host, node: str, history: History, rnd: random.Random, cluster: int = 4096
    ) -> None:
        self.host = host
        self.node = node
        self.history = history
        self.rnd = rnd
        self.cluster = cluster
        self.discards_show: bytes | None = None
        """What may show through where something was discarded, instead of zeroes (version 2)."""

    @property
    def size(self) -> int:
        return len(self.history.content)

    def _submit(
        self, op: int, offset: int, data: bytes | None = None, length: int = 0, flags: int = 0
    ) -> Any:
        handle = self.host.backend.graph.node(self.node).effective
        return self.host.backend.engine.submit(
            handle, op, offset, data, len(data) if data is not None else length, flags=flags
        )

    # ---- one request

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        with self.history.during("write", offset, len(data), data, fua=fua):
            await self._submit(OP_WRITE, offset, data, flags=REQ_FUA if fua else 0)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        with self.history.during("write-zeroes", offset, length):
            flags = REQ_MAY_UNMAP if unmap else 0
            await self._submit(OP_WRITE_ZEROES, offset, length=length, flags=flags)

    async def discard(self, offset: int, length: int) -> None:
        before = bytes(self.history.content[offset : offset + length])
        with self.history.during("discard", offset, length):
            await self._submit(OP_DISCARD, offset, length=length)
        # What it reads as now is what it must go on to read as.
        now = await self.read(offset, length)
        for at in range(0, length, SECTOR):
            found, old = now[at : at + SECTOR], before[at : at + SECTOR]
            through = self.discards_show
            shows = through[offset + at : offset + at + SECTOR] if through is not None else ZERO
            if found not in (ZERO, old, shows):
                raise WrongContentError(f"a discard has changed byte {offset + at:#x} to something")
        self.history.content[offset : offset + length] = now

    async def flush(self) -> None:
        with self.history.during("flush"):
            await self._submit(OP_FLUSH, 0)

    async def resize(self, size: int) -> None:
        with self.history.during("resize", length=size):
            await self.host.backend.block_resize(self.node, size)

    async def read(self, offset: int, length: int) -> bytes:
        return await self.host.read(self.node, offset, length)

    # ---- many

    async def batch(self, count: int, kinds: Sequence[Kind] = ALL, biggest: int = 0) -> None:
        """`count` random requests at once, no two of them on one sector."""
        taken: list[tuple[int, int]] = []
        running = []
        for _ in range(count):
            kind = self.rnd.choice(kinds)
            if kind == "flush":
                running.append(self.flush())
                continue
            offset, length = self._range(biggest or 4 * self.cluster)
            if any(offset < end and begin < offset + length for begin, end in taken):
                continue
            taken.append((offset, offset + length))
            if kind == "write":
                data = self.rnd.randbytes(length)
                running.append(self.write(offset, data, fua=self.rnd.random() < 0.05))
            elif kind == "write-zeroes":
                unmap = self.rnd.random() < 0.5
                running.append(self.write_zeroes(offset, length, unmap=unmap))
            else:
                running.append(self.discard(offset, length))
        await asyncio.gather(*running)

    def _range(self, biggest: int) -> tuple[int, int]:
        """Single sectors, whole clusters, a few clusters, anything."""
        rnd, cluster = self.rnd, self.cluster
        how = rnd.random()
        if how < 0.3:
            length = SECTOR * rnd.randint(1, 8)
        elif how < 0.6:
            length = cluster * rnd.randint(1, max(1, biggest // cluster))
        else:
            length = SECTOR * rnd.randint(1, max(1, biggest // SECTOR))
        length = min(length, self.size)
        step = cluster if 0.3 <= how < 0.5 and cluster < self.size else SECTOR
        offset = rnd.randint(0, (self.size - length) // step) * step
        return offset, length

    async def check(self) -> None:
        """All of it, through the node."""
        read = b"".join(
            [await self.read(at, min(PIECE, self.size - at)) for at in range(0, self.size, PIECE)]
        )
        if read != self.history.content:
            at = next(i for i in range(self.size) if read[i] != self.history.content[i])
            raise WrongContentError(
                f"byte {at:#x} reads as {read[at : at + 8].hex()} instead of"
                f" {self.history.content[at : at + 8].hex()}"
            )


async def read_all(host: Host, driver: str, path: Path, **options: Any) -> bytes:
    """What our driver reads from an image, opened for writing and closed again."""
    await host.add(driver, "judged", file={"driver": "file", "filename": str(path)}, **options)
    try:
        size = host.backend.graph.node("judged").size
        return b"".join(
            [await host.read("judged", at, min(PIECE, size - at)) for at in range(0, size, PIECE)]
        )
    finally:
        await host.backend.blockdev_del("judged")
