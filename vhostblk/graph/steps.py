# SPDX-License-Identifier: GPL-2.0-or-later
"""Steps of background work, and changes of the graph: they take turns.

A job copies data in steps: some I/O that belongs together and goes through one tree.
A change of that tree waits for the steps under way, and steps that would begin
during the change wait for its end. What guests do is not concerned: they are paused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator

from vhostblk.nodes.driver import NodeDriver
from vhostblk.schema import VhostblkError


class Steps:
    """The steps under way in one graph."""

    def __init__(self) -> None:
        self._under_way: dict[asyncio.Future[None], NodeDriver] = {}
        self._held: dict[asyncio.Future[None], set[NodeDriver]] = {}

    @contextlib.asynccontextmanager
    async def step(self, node: NodeDriver) -> AsyncIterator[None]:
        """One step on `node`, which may do I/O on whatever is below that."""
        while waiting := [end for end, nodes in self._held.items() if node in nodes]:
            await asyncio.wait(waiting)
        end = asyncio.get_running_loop().create_future()
        self._under_way[end] = node
        try:
            yield
        finally:
            del self._under_way[end]
            end.set_result(None)

    @contextlib.contextmanager
    def held(self, nodes: Iterable[NodeDriver]) -> Iterator[None]:
        """Inside, no step begins on any of the nodes."""
        end = asyncio.get_running_loop().create_future()
        self._held[end] = set(nodes)
        try:
            yield
        finally:
            del self._held[end]
            end.set_result(None)

    async def ended(self, nodes: Iterable[NodeDriver], patience: float) -> None:
        """Wait for the steps under way on these nodes; raise if one takes too long."""
        concerned = set(nodes)
        ends = [end for end, node in self._under_way.items() if node in concerned]
        if not ends:
            return
        await asyncio.wait(ends, timeout=patience)
        late = [node.name for end, node in self._under_way.items() if end in ends]
        if late:
            raise VhostblkError(
                f"Nothing was changed: background work on node '{late[0]}' has not finished for "
                f"{patience:g} s; does the storage hang?",
                data={"code": "pause-timeout", "nodes": late},
            )
