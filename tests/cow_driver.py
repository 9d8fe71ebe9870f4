# SPDX-License-Identifier: GPL-2.0-or-later
"""Drivers for tests of snapshots and state, also loaded as a plug-in (`--plugin`).

`cow` is an overlay format as simple as can be: data, one byte for each sector that it
has, and a last sector that says how large it is. `mirror` has many children and is a filter.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from vhostblk.filter import ChildRole, Filter, FilterChild, Request
from vhostblk.nodes.driver import CreateHost, NodeOptions, RoleKind
from vhostblk.schema import BlockdevRef, Model, Size, VhostblkError

SECTOR = 512
TRAILER = struct.Struct("<8sQ")
MAGIC = b"VBTESTCO"


class CowCreateOptions(Model):
    driver: Literal["cow"]
    file: BlockdevRef
    size: Size
    backing_file: str | None = None
    backing_fmt: str | None = None


class CowOptions(NodeOptions):
    file: BlockdevRef
    backing: BlockdevRef | None = None


class Cow(Filter):
    """An overlay."""

    driver = "cow"
    Options = CowOptions
    CreateOptions: ClassVar[type[Model] | None] = CowCreateOptions
    is_filter = False
    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole(RoleKind.STORAGE),
        "backing": ChildRole(RoleKind.BACKING, optional=True),
    }

    @classmethod
    async def create(cls, host: CreateHost, options: CowCreateOptions) -> None:
        async with host.image(options.file) as child:
            sectors = options.size // SECTOR
            whole = options.size + -(-sectors // SECTOR) * SECTOR + SECTOR
            await child.node.truncate(whole)
            child.refresh()
            trailer = TRAILER.pack(MAGIC, options.size).ljust(SECTOR, b"\0")
            await child.write(whole - SECTOR, trailer)
            await child.flush()

    async def open(self) -> None:
        trailer = await self.file.read(self.file.size - SECTOR, TRAILER.size)
        magic, self._size = TRAILER.unpack(trailer)
        if magic != MAGIC:
            raise VhostblkError(f"'{self.filename()}' is not an image of driver cow")
        self._has = bytearray(await self.file.read(self._size, self._size // SECTOR))

    @property
    def size(self) -> int:
        return self._size

    def filename(self) -> str:
        return self.file.node.filename()

    async def read(self, request: Request) -> None:
        first, count = request.offset // SECTOR, request.length // SECTOR
        parts = []
        for has, start, length in _runs(self._has, first, count):
            child = self.file if has else self.children.get("backing")
            if child is None:
                parts.append(bytes(length))
            else:
                parts.append(bytes(await child.read(start, length)))
        request.fill(b"".join(parts))

    async def write(self, request: Request) -> None:
        await self._store(request.offset, request.data())

    async def write_zeroes(self, request: Request) -> None:
        await self._store(request.offset, bytes(request.length))

    async def discard(self, request: Request) -> None:
        pass

    async def _store(self, offset: int, data: bytes) -> None:
        await self.file.write(offset, data)
        first, count = offset // SECTOR, len(data) // SECTOR
        if not all(self._has[first : first + count]):
            self._has[first : first + count] = b"\1" * count
            await self.file.write(self._size + first, b"\1" * count)


def _runs(has: bytearray, first: int, count: int) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    for sector in range(first, first + count):
        if runs and runs[-1][0] == has[sector]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + SECTOR)
        else:
            runs.append((has[sector], sector * SECTOR, SECTOR))
    return runs


class MirrorOptions(NodeOptions):
    children: list[BlockdevRef]


class Mirror(Filter):
    """Writes to all of its children, reads from the first."""

    driver = "mirror"
    Options = MirrorOptions
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"children": ChildRole(many=True)}

    async def read(self, request: Request) -> None:
        await self.legs()[0].forward(request)

    async def write(self, request: Request) -> None:
        await asyncio.gather(*(child.forward(request) for child in self.legs()))

    async def flush(self, request: Request) -> None:
        await asyncio.gather(*(child.flush() for child in self.legs()))

    async def discard(self, request: Request) -> None:
        await asyncio.gather(*(child.forward(request) for child in self.legs()))

    write_zeroes = discard

    def legs(self) -> list[FilterChild]:
        return [self.child(role) for role in self.children]

    def filename(self) -> str:
        return ""


class Through(Filter):
    """A filter that does nothing, but sees everything."""

    driver = "through"

    async def open(self) -> None:
        self.seen = 0

    async def read(self, request: Request) -> Any:
        self.seen += 1
        request.forward()

    write = read
