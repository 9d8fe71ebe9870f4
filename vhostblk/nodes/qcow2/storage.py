# SPDX-License-Identifier: GPL-2.0-or-later
"""A child node as the format modules see it: bytes at offsets, in coroutines.

Reads beyond the end give zeroes, writes beyond it make the file longer, as both
do with a plain file.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

from vhostblk.nodes.driver import Child
from vhostblk.schema import VhostblkError

SECTOR = 512
T = TypeVar("T")


class ChildStorage:
    """Metadata I/O on the node that holds the image."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._growing = asyncio.Lock()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.child.size

    @property
    def grows(self) -> bool:
        """Whether what is written behind its end makes it longer: not a device, nor a part."""
        node = self.child.node
        while getattr(node.options, "size", None) is None and "file" in node.children:
            node = node.children["file"].node
        return node.driver == "file"

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes."""
        there = max(0, min(length, self.child.size - offset))
        data = bytes(await self.child.read(offset, there)) if there else b""
        return data + bytes(length - there)

    async def read_into(self, offset: int, into: memoryview) -> None:
        """The same into memory full of zeroes."""
        there = max(0, min(len(into), self.child.size - offset))
        if there:
            await self.child.read(offset, into[:there])

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write, enlarging the file if need be."""
        await self.ensure(offset + len(data))
        await self.child.write(offset, data)

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""
        await self.child.flush()

    async def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeroes afterwards, and need not take any space."""
        await self.ensure(offset + length)
        await self.child.write_zeroes(offset, length, unmap=True)

    async def ensure(self, end: int) -> None:
        """Make the file at least `end` bytes long."""
        if end <= self.child.size:
            return
        async with self._growing:
            if end > self.child.size:
                await self.truncate(end)

    async def truncate(self, size: int) -> None:
        """Set the length of the file."""
        size = -(-size // SECTOR) * SECTOR
        try:
            await self.child.node.truncate(size)
        except VhostblkError as error:
            # What cannot grow is full.
            raise OSError(errno.ENOSPC, error.desc) from error
        self.child.refresh_all()
        if self.child.size < size:
            raise OSError(errno.ENOSPC, f"node {self.child.node.name} cannot grow to {size}")


def background(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task of its own: the request that happens to be running now need not wait for its I/O."""
    return asyncio.get_running_loop().create_task(work, context=Context())
