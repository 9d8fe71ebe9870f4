# SPDX-License-Identifier: GPL-2.0-or-later
"""A relation between a node and one of those who use it."""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.graph.block_backend import BlockBackend
from vhostblk.nodes.driver import Child, NodeDriver

Parent = NodeDriver | BlockBackend


@dataclass(eq=False)
class Edge:
    """One parent's use of a node."""

    parent: Parent
    child: Child

    @property
    def role(self) -> str:
        """`file`, `children.0`, `root`, …"""
        return self.child.role

    @property
    def takes_growth(self) -> bool:
        """Whether the node may become larger though the parent does not share its size."""
        return isinstance(self.parent, NodeDriver) and self.parent.takes_growth

    def grown(self) -> None:
        """The node is larger; tell the parent, which takes that."""
        assert isinstance(self.parent, NodeDriver)
        self.child.refresh()
        self.parent.grown()

    def describe(self) -> str:
        """The parent, for messages."""
        if isinstance(self.parent, BlockBackend):
            return f"{self.parent.what} '{self.parent.name}'"
        return f"node '{self.parent.name}'"


def enumerate_edges(edges: list[Edge]) -> str:
    """Users of a node, for messages."""
    return ", ".join(f"{edge.describe()} as '{edge.role}'" for edge in edges)
