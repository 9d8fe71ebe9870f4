# SPDX-License-Identifier: GPL-2.0-or-later
"""The drive: what the guest uses, on top of a tree of nodes.

A `BlockBackend` knows its root, the filters at the top of the tree, and the
nodes below those filters. A snapshot of the drive replaces the latter, all of
them, and touches none of the filters.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol

from vhostblk.engine import NodeHandle
from vhostblk.nodes.driver import Child, NodeDriver, NodeHost, Perm, Relations, RoleKind, present


class Device(Protocol):
    """What sends requests into the tree: an export."""

    def pause(self) -> Awaitable[None]:
        """Done when nothing is in flight and nothing will be."""

    def resume(self) -> None:
        """Undo one pause()."""

    def set_root(self, node: NodeHandle) -> None:
        """Where requests enter; only while paused, or before the first one."""

    def set_capacity(self, size: int) -> None:
        """The drive has `size` bytes now."""

    def drain_begin(self) -> None:
        """Hold no requests back until drain_end(), as in `NodeDriver`."""

    def drain_end(self) -> None:
        """The end of that."""


class BlockBackend:
    """A drive. Its name is that of the export (or job) that uses it."""

    def __init__(
        self,
        host: NodeHost,
        name: str,
        root: NodeDriver,
        *,
        perm: Perm,
        shared: Perm,
        what: str = "block device",
        pinned: bool = False,
    ) -> None:
        self.name = name
        self.what = what  # for messages: "export", "block device", …
        self.pinned = pinned
        """It is about this very node (a job's): no change gives it another one."""
        self.perm = perm
        self.shared = shared
        self.root_child = Child(host, "root", root)
        self.device: Device | None = None
        self._linked: NodeHandle | None = None
        self._size: int | None = None

    def __repr__(self) -> str:
        return f"<BlockBackend {self.name}>"

    @property
    def root(self) -> NodeDriver:
        """The node that requests enter at."""
        return self.root_child.node

    @property
    def children(self) -> Mapping[str, Child]:
        """The root, as a child."""
        return {"root": self.root_child}

    @property
    def filters(self) -> list[NodeDriver]:
        """The filters at the top of the tree, from the root down."""
        return self._split()[0]

    @property
    def top_node_below_filters(self) -> NodeDriver:
        """The first node that is no filter: what a snapshot replaces, with its siblings."""
        return self._split()[1][0]

    @property
    def top_nodes_below_filters(self) -> list[NodeDriver]:
        """That node and its siblings: the other legs under the same filters."""
        return self._split()[1]

    def _split(self) -> tuple[list[NodeDriver], list[NodeDriver]]:
        return split(self.root, present)

    def relink(self) -> None:
        """Tell the device where its tree begins. Called by the graph."""
        self.root_child.refresh()
        handle = self.root.effective
        if self.device is not None and handle is not self._linked:
            self.device.set_root(handle)
            self._linked = handle

    def refresh_size(self) -> None:
        """Tell the device how large it is. Called by the graph."""
        self.root_child.refresh()
        size = self.root_child.size
        if self.device is not None and size != self._size:
            self._size = size
            self.device.set_capacity(size)

    def drain_begin(self) -> None:
        """Nothing may hold requests back now. Called by the graph."""
        if self.device is not None:
            self.device.drain_begin()

    def drain_end(self) -> None:
        """The end of that. Called by the graph."""
        if self.device is not None:
            self.device.drain_end()

    def attach(self, device: Device) -> None:
        """Give the drive to `device`."""
        self.device = device
        self._size = self.root.size
        self.relink()


def split(
    root: NodeDriver, children_of: Relations[NodeDriver]
) -> tuple[list[NodeDriver], list[NodeDriver]]:
    """The filters at the top of a tree, and the nodes right below them; each once, in order.

    What only describes the data, such as the detached header of a LUKS volume, is not below.
    """
    filters: dict[NodeDriver, None] = {}
    below: dict[NodeDriver, None] = {}
    level = [root]
    while level:
        following: list[NodeDriver] = []
        for node in level:
            if not node.is_filter:
                below[node] = None
            elif node not in filters:
                filters[node] = None
                for role, child in children_of(node).items():
                    if node.child_roles[role.split(".")[0]].kind is not RoleKind.METADATA:
                        following.append(child)
        level = following
    return list(filters), list(below)
