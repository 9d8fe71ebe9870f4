# SPDX-License-Identifier: GPL-2.0-or-later
"""An image whose guest data are where tables say, and whose tables the engine's `map` node knows.

What qcow2 and QED have in common: a `file` with the image, perhaps a `backing` node that shows
through where the image has nothing, and a map that answers most requests in C. The rest comes up
to the data path (nodes/qcow2/datapath.py), which serves both.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

from vhostblk.engine import IO
from vhostblk.engine.map import MAP_BACKING, MAP_ZERO, MapHandle
from vhostblk.nodes._writable import WritableLater
from vhostblk.nodes.driver import ChildRole, Perm, RoleKind
from vhostblk.nodes.hooks import HookedChild, Request
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.l2cache import L2Cache
    from vhostblk.nodes.qcow2.storage import ChildStorage


class MappedImage(WritableLater, abc.ABC):
    """A format on top of the engine's map."""

    file: ChildStorage
    map: MapHandle
    l2: L2Cache
    _size: int

    def _know_backing(self) -> None:
        child = self.children.get("backing")
        self.has_backing = child is not None
        self.backing_size = child.size if child is not None else 0
        self.nothing = MAP_BACKING if self.has_backing else MAP_ZERO

    # ---- what it is

    @property
    def size(self) -> int:
        return self._size

    def filename(self) -> str:
        return self.child("file").node.filename()

    def _describe(self, image: dict[str, Any]) -> dict[str, Any]:
        """`image`: QAPI's ImageInfo, as far as the image itself knows it."""
        image = {"filename": self.filename(), **image}
        facts: dict[str, Any] = {"image": image}
        if "backing-filename" in image:
            facts["backing_file"] = image["backing-filename"]
        depth, node = 0, self.children.get("backing")
        if node is not None:
            image["full-backing-filename"] = node.node.filename()
        while node is not None:
            depth += 1
            node = node.node.children.get("backing")
        facts["backing_file_depth"] = depth
        return facts

    # ---- the graph changes

    def children_changed(self) -> None:
        before = self.has_backing, self.backing_size
        self._know_backing()
        if (self.has_backing, self.backing_size) != before:
            self.map.set_size(self._size, self.backing_size)
            self.l2.install_again()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if role.kind is RoleKind.BACKING:
            return Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        return super().child_permissions(role, perm, shared)

    # ---- for the data path

    def transfer(self, role: str, request: Request, offset: int, length: int, position: int) -> IO:
        """Read from a child into a guest's memory, `position` bytes from its beginning."""
        child = self.children[role]
        assert isinstance(child, HookedChild)
        return child.forward_part(request, offset, position, length)

    def read_backing(self, offset: int, into: memoryview) -> IO:
        """Read what the image does not have."""
        return self.children["backing"].read(offset, into)

    async def again(self, request: Request, op: int) -> None:
        """Carry out a request through the engine's map once more, without its flags."""
        await request.submit_part(self.map, op, request.offset, request.length)

    def _error(self, text: str, code: str = "bad-image") -> VhostblkError:
        return VhostblkError(
            text, data={"code": code, "node": self.name, "filename": self.filename()}
        )
