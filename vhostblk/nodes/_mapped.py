# SPDX-License-Identifier: GPL-2.0-or-later
"""An image whose guest data are where tables say, and whose tables the engine's `map` node knows.

What qcow2 and QED have in common: a `file` with the image, perhaps a `backing` node that shows
through where the image has nothing, and a map that answers most requests in C. The rest comes up
to the data path (nodes/qcow2/datapath.py), which serves both; this is also what it may ask of an
image.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from vhostblk.engine import IO
from vhostblk.engine.map import MAP_BACKING, MAP_ZERO, MapHandle
from vhostblk.nodes._writable import WritableLater
from vhostblk.nodes.driver import DETECT_ZEROES, Child, ChildRole, NodeDriver, Perm, RoleKind
from vhostblk.nodes.hooks import HookedChild, Request
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.datapath import Claim, DataPath
    from vhostblk.nodes.qcow2.geometry import Geometry
    from vhostblk.nodes.qcow2.l2cache import L2Cache
    from vhostblk.nodes.qcow2.storage import ChildStorage


class Clusters(Protocol):
    """Where new clusters come from."""

    @property
    def most(self) -> int:
        """How many may come in one piece."""

    async def reserve_pieces(self, count: int) -> list[tuple[int, int]]:
        """`count` clusters, in as few pieces as can be: offset and clusters."""

    async def free_pieces(self, pieces: Iterable[tuple[int, int]]) -> None:
        """They were not needed."""

    async def more_runs(self) -> bool:
        """Give the engine clusters; false if it still has none."""


class Flushes(Protocol):
    """Brings the metadata in memory to disk."""

    async def flush(self) -> None:
        """All of them, as they are now."""


class MappedImage(WritableLater, abc.ABC):
    """A format on top of the engine's map."""

    detects_zeroes = True
    file: ChildStorage
    data: ChildStorage
    """Where guest data are: `file`, unless the format has another place."""
    data_role: str
    geometry: Geometry
    map: MapHandle
    l2: L2Cache
    path: DataPath
    allocator: Clusters
    writeback: Flushes
    stopped: bool
    """Nothing is written any more: the image is corrupt."""
    engine_allocates: bool
    """The engine has clusters of its own to give to what has none."""
    _size: int

    def _know_backing(self, expected: NodeDriver | None = None) -> None:
        child: Child | NodeDriver | None = expected or self.children.get("backing")
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
        self._backing_changed(None)

    def _backing_changed(self, expected: NodeDriver | None) -> None:
        """Nothing is in flight."""
        before = self.has_backing, self.backing_size
        self._know_backing(expected)
        if (self.has_backing, self.backing_size) != before:
            self.map.set_size(self._size, self.backing_size)
        if self.has_backing != before[0]:
            self.l2.install_again()  # what has no place shows something else now

    async def expect_writes(self, below: NodeDriver) -> None:
        self._backing_changed(below)  # with many tables that would take long in a pause

    def forget_expected(self) -> None:
        self._backing_changed(None)

    async def move(self, before: Mapping[str, NodeDriver]) -> None:
        if not self.read_only:
            for role in before:  # what a guest was told is durable must be so in a copy, too
                await self.child(role).flush()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if role.kind is RoleKind.BACKING:
            return Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        return super().child_permissions(role, perm, shared)

    def _exchange(self) -> None:
        super()._exchange()
        self.map.set_detect_zeroes(DETECT_ZEROES[self.options.detect_zeroes])

    # ---- for the data path

    @abc.abstractmethod
    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Inside, clusters that are named now are not reused."""

    @abc.abstractmethod
    def let_go(self, word: int) -> None:
        """No L2 entry in memory names the cluster(s) of `word` any more."""

    async def record(self, claim: Claim) -> None:
        """A change of an L2 entry in memory, about to be seen, is to survive a kill."""

    @property
    def map_records(self) -> int:
        """How many changes the map's log has room for."""
        return 1

    def waiting_records(self) -> int:
        """Records in the map's log of what is not on disk."""
        return 0

    async def decompress(self, word: int) -> bytes:
        """The contents of a compressed cluster."""
        raise NotImplementedError("this format has none")

    def transfer(self, role: str, request: Request, offset: int, length: int, position: int) -> IO:
        """Read from a child into a guest's memory, `position` bytes from its beginning."""
        child = self.children[role]
        assert isinstance(child, HookedChild)
        return child.forward_part(request, offset, position, length)

    def read_backing(self, offset: int, into: memoryview) -> IO:
        """Read what the image does not have."""
        return self.children["backing"].read(offset, into)

    async def make_durable(self) -> None:
        """What has been written by now is on stable storage afterwards."""
        await self.writeback.flush()

    async def again(self, request: Request, op: int) -> None:
        """Carry out a request through the engine's map once more, without its flags."""
        await request.submit_part(self.map, op, request.offset, request.length)

    def not_a_copy(self, text: str) -> VhostblkError:
        """The image cannot be where it is to be now: an error to raise."""
        return self._error(
            f"Node '{self.child('file').node.name}' cannot become the file of node '{self.name}': "
            f"it has no copy of the image as it is now ({text})",
            "not-a-copy",
        )

    def _error(self, text: str, code: str = "bad-image") -> VhostblkError:
        return VhostblkError(
            text, data={"code": code, "node": self.name, "filename": self.filename()}
        )
