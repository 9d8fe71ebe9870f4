# SPDX-License-Identifier: GPL-2.0-or-later
"""raw: the child as it is, or a part of it (`offset`, `size`).

Without an offset there is nothing to do to a request, so the node is left out
of the engine's picture: its size is enforced where requests enter.
Engine half: cffi_build/engine/nodes/raw.c.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import ClassVar

from vhostblk.engine import NodeHandle
from vhostblk.engine.raw import new_raw
from vhostblk.image import Extent
from vhostblk.nodes.driver import ChildRole, NodeDriver, NodeOptions, Perm
from vhostblk.schema import BlockdevRef, Size, VhostblkError

SECTOR = 512


class RawOptions(NodeOptions):
    """Options of raw."""

    file: BlockdevRef
    """The node that holds the data."""
    offset: Size = 0
    """Where in the child the disk starts."""
    size: Size | None = None
    """Size of the disk; up to the end of the child if absent."""


class Raw(NodeDriver):
    """A disk without a format."""

    driver = "raw"
    Options = RawOptions
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole()}
    reopenable = NodeDriver.reopenable | {"offset", "size"}
    options: RawOptions

    async def open(self) -> None:
        self.children_changed()
        self.handle = self._make_half(self.options)

    def children_changed(self) -> None:
        offset, size = self.options.offset, self.options.size
        below = self.child("file").size
        if offset > below:
            raise self._error(
                f"Offset ({offset}) cannot be greater than size of the containing file ({below})"
            )
        if size is not None and offset + size > below:
            raise self._error(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to "
                f"the actual size of the containing file ({below})"
            )
        if size is not None and size % SECTOR:
            raise self._error(f"Specified size ({size}) is not multiple of {SECTOR}")

    def _make_half(self, options: RawOptions) -> NodeHandle | None:
        return new_raw(self.engine, offset=options.offset) if options.offset else None

    async def reopen_prepare(self, options: RawOptions) -> None:
        await super().reopen_prepare(options)
        if options.offset != self.options.offset:
            self.prepared["handle"] = self._make_half(options)

    @property
    def size(self) -> int:
        if self.options.size is not None:
            return self.options.size
        return max(0, self.child("file").size - self.options.offset)

    def filename(self) -> str:
        return self.child("file").node.filename()

    def data_shift(self) -> int:
        return self.options.offset

    @property
    def discard_granularity(self) -> int | None:
        below = self.child("file").node.discard_granularity
        # Where units begin in the middle of those below, none would be a whole one.
        return None if below is None or self.options.offset % below else below

    @property
    def keeps_zeroes(self) -> bool:
        return True

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        base = self.options.offset
        async for extent in self.child("file").node.extents(offset + base, length):
            yield extent.moved(-base)

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if self.options.offset or self.options.size is not None:
            # A window must not be pulled away from under us.
            shared &= ~Perm.RESIZE
        return super().child_permissions(role, perm, shared)

    async def become_read_only(self) -> bool:
        if self.read_only:
            return False
        self.options = self.options.model_copy(update={"read_only": True})
        return True

    async def truncate(self, size: int) -> None:
        if self.options.size is not None:
            raise self._error("Cannot resize fixed-size raw disks")
        await self.child("file").node.truncate(size + self.options.offset)

    def _error(self, text: str) -> VhostblkError:
        return VhostblkError(text, data={"code": "bad-raw", "node": self.name})
