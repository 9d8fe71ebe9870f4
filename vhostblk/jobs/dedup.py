# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup-defragment: the blocks of a disk are written again, in its order.

Blocks that other disks show, too, move for these as well. A job that a restart has ended can be
begun again: it passes over what is in order already.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from vhostblk.dedup.tables import PAGE
from vhostblk.jobs._attached import attached
from vhostblk.jobs.block_job import BlockJob

if TYPE_CHECKING:
    from vhostblk.backend import Backend
    from vhostblk.nodes.dedup import Dedup


class DefragmentJob(BlockJob):
    """Puts the blocks of one disk in order."""

    job_type = "dedup-defragment"

    def __init__(self, id: str, backend: Backend, node: Dedup, **options: Any) -> None:
        super().__init__(id, **options)
        self._backend = backend
        self._node = node

    async def run(self) -> None:
        async with attached(self._backend, self.id, self._node, writes=False):
            await self._run()

    async def _run(self) -> None:
        node, store = self._node, self._node.store
        page_bytes = PAGE << store.super.block_bits
        self.total_progress = node.size
        for page in range(-(-node.size // page_bytes)):
            moved = 0
            async with node.working():
                numbers = store.scattered(node.number, page)
                if numbers:
                    moved = await self._gather(numbers)
            self.current_progress = min(node.size, (page + 1) * page_bytes)
            await self.pace(moved)

    async def _gather(self, numbers: list[int]) -> int:
        store = self._node.store
        try:
            return await store.gather(self._node.data, numbers)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        await store.make_room(self._node.data)  # what was moved has left holes behind
        return await store.gather(self._node.data, numbers)
