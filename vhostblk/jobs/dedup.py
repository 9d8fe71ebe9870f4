# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs about dedup stores.

dedup-defragment: the blocks of a disk are written again, in its order. Blocks that other disks
show, too, move for these as well. A job that a restart has ended can be begun again: it passes
over what is in order already.

dedup-rebuild: the metadata of a store that nobody uses are made anew from its data device.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhostblk.dedup.rebuild import Rebuild
from vhostblk.dedup.tables import PAGE
from vhostblk.jobs.block_job import BlockJob
from vhostblk.jobs.job import Job

if TYPE_CHECKING:
    from vhostblk.backend import Backend
    from vhostblk.jobs.create import Creator
    from vhostblk.nodes.dedup import Dedup


logger = logging.getLogger(__name__)


class DefragmentJob(BlockJob):
    """Puts the blocks of one disk in order."""

    job_type = "dedup-defragment"

    def __init__(self, id: str, backend: Backend, node: Dedup, **options: Any) -> None:
        super().__init__(id, **options)
        self._backend = backend
        self._node = node

    async def run(self) -> None:
        async with self._backend.graph.using(self._node, self.id, "job"):
            await self._run()

    async def _run(self) -> None:
        node, store = self._node, self._node.store
        page_bytes = PAGE << store.super.block_bits
        self.total_progress = node.size
        for page in range(-(-node.size // page_bytes)):
            moved = 0
            async with node.working():
                numbers = store.collector.scattered(node.number, page)
                if numbers:
                    moved = await self._gather(numbers)
            self.current_progress = min(node.size, (page + 1) * page_bytes)
            await self.pace(moved)

    async def _gather(self, numbers: list[int]) -> int:
        store = self._node.store
        try:
            return await store.collector.gather(self._node.data, numbers)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        await store.make_room(self._node.data)  # what was moved has left holes behind
        return await store.collector.gather(self._node.data, numbers)


class RebuildJob(Job):
    """Makes the metadata of a store anew. As jobs that create, it stays until it is dismissed."""

    job_type = "dedup-rebuild"

    def __init__(
        self, id: str, creator: Creator, file: str | dict[str, Any], directory: Path
    ) -> None:
        super().__init__(id, auto_dismiss=False)
        self._creator = creator
        self._file = file
        self._directory = directory

    async def run(self) -> None:
        async with self._creator.image(self._file) as data:
            report = await Rebuild(self._directory, data, self._progress).run()
        for message in report.messages:
            logger.warning("job '%s': %s", self.id, message)
        self._events.emit(
            "DEDUP_REBUILT",
            {
                "id": self.id,
                "metadata": str(self._directory),
                "disks": report.disks,
                "blocks": report.blocks,
                "time": report.time,
                "dropped": report.dropped,
                "lost": report.lost,
            },
        )

    def _progress(self, done: int, total: int) -> None:
        self.current_progress, self.total_progress = done, total
