# SPDX-License-Identifier: GPL-2.0-or-later
"""How a job holds on to the node it works on: as an export does, with a place in the graph."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostblk.backend import Backend
    from vhostblk.nodes.driver import NodeDriver


@contextlib.asynccontextmanager
async def attached(
    backend: Backend, id: str, node: NodeDriver, *, writes: bool
) -> AsyncIterator[None]:
    """Inside, `node` cannot be removed, and with `writes` all below it is open for writing."""
    # Not before a job starts: the graph knows jobs, which would be a circle.
    from vhostblk.graph import BlockBackend
    from vhostblk.nodes.driver import Perm

    graph = backend.graph
    perm = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED if writes else Perm.NONE
    drive = BlockBackend(graph, id, node, perm=perm, shared=Perm.ALL, what="job")
    async with graph.lock:
        graph.attach(drive)
    try:
        yield
    finally:
        async with graph.lock:
            graph.detach(drive)
