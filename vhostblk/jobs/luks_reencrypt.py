# SPDX-License-Identifier: GPL-2.0-or-later
"""luks-reencrypt: gives an encrypted disk another key, or its first one, while it is used.

Zone by zone: the guest waits for a zone only while that is being written. How far it is stands
in the header (vhostblk/nodes/_zone_log.py), so a job that was stopped, cancelled or killed goes on
where it was, and the disk can be used meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from vhostblk.jobs.block_job import BlockJob, reason
from vhostblk.jobs.restart import restartable
from vhostblk.luks.options import KdfOptions
from vhostblk.objects.secret import Secret
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.backend import Backend
    from vhostblk.nodes._reencrypt import ReencryptingNode

logger = logging.getLogger(__name__)

BLOCK = 4096
ZONE = 1 << 20
_RETRY = 0.1  # seconds after an error: no zone can be left out


def find_node(backend: Backend, name: str) -> ReencryptingNode:
    """The encrypted node called `name`, if its header can be changed altogether."""
    from vhostblk.nodes._reencrypt import ReencryptingNode

    node = backend.graph.node(name)
    if not isinstance(node, ReencryptingNode):
        raise VhostblkError(
            f"Node '{name}' is a '{node.driver}', and not a luks node",
            data={"code": "not-luks", "node-name": name},
        )
    if node.read_only:
        raise VhostblkError(
            f"Node '{name}' is read-only", data={"code": "read-only", "node-name": name}
        )
    return node


class ReencryptJob(BlockJob):
    """Re-encrypts one node, which it keeps from being removed."""

    job_type = "luks-reencrypt"

    def __init__(
        self,
        id: str,
        backend: Backend,
        node: ReencryptingNode,
        secrets: list[str],
        kdf: KdfOptions | None = None,
        *,
        force: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(id, **options)
        self._kdf = kdf
        self._force = force
        self._backend = backend
        self.node = node
        self._secrets = secrets

    def state_options(self) -> dict[str, Any] | None:
        if self.node.log is None:
            return None  # nothing has begun, or all is done
        return {"node-name": self.node.name, **self.block_options()}

    async def run(self) -> None:
        backend, node = self._backend, self.node
        async with backend.graph.using(node, self.id, "job", writes=True):
            self.total_progress = node.size
            if node.log is None:
                async with backend.graph.lock:  # no snapshot comes in between
                    node.check_reencryption(self._force)
                    node.preparing = True
                try:
                    await self._begin()
                finally:
                    node.preparing = False
            self.busy = True
            while not await self._finish():
                await self._pass()
            await node.destroy_old_slots()
        self.current_progress = self.total_progress
        # The state file need not know of it any more.
        await backend.job_changed()
        logger.info("node '%s': re-encrypted, %d bytes", node.name, node.size)

    async def _begin(self) -> None:
        graph, node = self._backend.graph, self.node
        with contextlib.ExitStack() as used:
            passphrases = []
            for id in self._secrets:
                secret = self._backend.objects.use(id, Secret, f"job '{self.id}'")
                used.callback(self._backend.objects.release, f"job '{self.id}'", secret)
                passphrases.append(secret.data)
            await node.prepare_reencryption(passphrases, self._kdf)
        async with graph.lock, graph.drained([node]):
            node.begin_reencryption()
        await self._backend.job_changed()

    async def _pass(self) -> None:
        """All zones that there are; the disk may grow meanwhile."""
        node = self.node
        while not node.is_reencrypted:
            assert node.log is not None
            moved = 0
            length = max(BLOCK, self.portion(ZONE) // BLOCK * BLOCK)
            try:
                async with self._backend.graph.working(node):
                    moved = await node.move_boundary(node.log, length)
            except OSError as error:
                if not self.failed(error, "write"):
                    raise VhostblkError(
                        f"Re-encryption of node '{node.name}' has stopped at {node.boundary}: "
                        f"{reason(error)}; the disk can be used, and luks-reencrypt goes on",
                        data={"code": "reencrypt-failed", "node-name": node.name},
                    ) from None
                await asyncio.sleep(_RETRY)
            self.total_progress = node.size
            self.current_progress = min(node.boundary, node.size)
            await self.pace(moved)

    async def _finish(self) -> bool:
        """Unless the disk has grown."""
        graph, node = self._backend.graph, self.node
        async with graph.lock:
            if not node.is_reencrypted:
                return False
            async with graph.drained([node]):
                await node.finish_reencryption()
            return True


def start_reencryption(
    backend: Backend,
    node: ReencryptingNode,
    secrets: list[str],
    job_id: str | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> ReencryptJob:
    """Begin, or go on. `force`: although images behind an overlay need the header as it is."""
    for job in backend.jobs:
        if isinstance(job, ReencryptJob) and job.node is node:
            raise VhostblkError(
                f"Node '{node.name}' is being re-encrypted by job '{job.id}'",
                data={"code": "job-exists", "job": job.id},
            )
    id = job_id or f"reencrypt-{node.name}"
    backend.jobs.check_id(id)
    for secret in secrets:
        backend.objects.find(secret, Secret)
    if node.log is None:
        node.check_reencryption(force)
    job = ReencryptJob(id, backend, node, secrets, force=force, **options)
    backend.jobs.start(job)
    return job


@restartable("luks-reencrypt")
async def _restart(backend: Backend, id: str, options: dict[str, Any]) -> None:
    node = find_node(backend, options.pop("node-name"))
    if node.log is None:
        return  # it was done
    paused = options.pop("paused", False)
    given = {name.replace("-", "_"): value for name, value in options.items()}
    job = start_reencryption(backend, node, [], id, **given)
    job.paused = paused
