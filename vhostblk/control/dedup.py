# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about dedup stores, each named by a node that is a disk of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vhostblk.control.registry import Context, Registry
from vhostblk.schema import BlockdevRef, Model, OnOff, UInt64, VhostblkError

if TYPE_CHECKING:
    from vhostblk.nodes.dedup import Dedup

_Result = TypeVar("_Result")

registry = Registry()
command = registry.command


class DedupNode(Model):
    """Arguments of the commands that need nothing but a disk of the store."""

    node_name: str
    """A disk of the store."""


@command("query-dedup")
async def query_dedup(context: Context, arguments: DedupNode) -> Any:
    """What a dedup store holds, how much that saves, and its disks with their fragmentation."""
    node = _dedup(context, arguments.node_name)
    store = node.store

    async def query() -> dict[str, Any]:
        with contextlib.suppress(OSError):  # the numbers are those of the last one, then
            await store.checkpoint()
        disks = [
            {"disk": name, "size": size, **(await store.fragmentation(number))}
            for number, (size, name) in store.tables.disks().items()
        ]
        return {**store.stats(), "disks": disks}

    return await context.backend.use(node, "query-dedup", query)


@command("dedup-collect")
async def dedup_collect(context: Context, arguments: DedupNode) -> Any:
    """Collect garbage now: empty segments that are three quarters full at most."""
    node = _dedup(context, arguments.node_name)
    return {"segments": await _use(context, node, "dedup-collect", node.store.collector.collect)}


class DedupCheck(DedupNode):
    """Arguments of dedup-check."""

    repair: OnOff = False
    """Put right what can be recomputed."""
    content: OnOff = False
    """Read all blocks, and compare them with their fingerprints."""


@command("dedup-check")
async def dedup_check(context: Context, arguments: DedupCheck) -> Any:
    """Recompute everything that can be: references, index, places, segments."""
    node = _dedup(context, arguments.node_name)
    found = await _use(
        context,
        node,
        "dedup-check",
        partial(node.store.check, node.data, repair=arguments.repair, content=arguments.content),
    )
    return {
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        "wrong": found.wrong,
        "repaired": found.repaired,
        "messages": found.messages,
    }


class DedupBackup(DedupNode):
    """Arguments of dedup-backup."""

    directory: str
    """Where to copy the metadata; must not exist."""


@command("dedup-backup")
async def dedup_backup(context: Context, arguments: DedupBackup) -> None:
    """Copy the metadata of a store while it is in use."""
    node = _dedup(context, arguments.node_name)
    backup = partial(node.store.backup, node.data, Path(arguments.directory))
    await _use(context, node, "dedup-backup", backup)


class DedupDiskDelete(DedupNode):
    """Arguments of dedup-disk-delete."""

    disk: str
    """Which disk of the store; no node may be it."""


@command("dedup-disk-delete")
async def dedup_disk_delete(context: Context, arguments: DedupDiskDelete) -> None:
    """Delete a disk of a store, for good, and give its space back."""
    node = _dedup(context, arguments.node_name)
    delete = partial(node.store.delete_disk, node.data, arguments.disk)
    await _use(context, node, "dedup-disk-delete", delete)


class DedupDefragment(DedupNode):
    """Arguments of dedup-defragment."""

    job_id: str | None = None
    """What the job is called."""
    speed: UInt64 = 0
    """Bytes per second; 0: no limit."""


@command("dedup-defragment")
async def dedup_defragment(context: Context, arguments: DedupDefragment) -> Any:
    """Begin a job that writes the blocks of a disk again, in its order."""
    from vhostblk.jobs.dedup import DefragmentJob

    node = _dedup(context, arguments.node_name)
    id = arguments.job_id or f"defragment-{node.name}"
    context.backend.jobs.start(DefragmentJob(id, context.backend, node, speed=arguments.speed))
    return {"job-id": id}


class DedupRebuild(Model):
    """Arguments of dedup-rebuild."""

    job_id: str
    """What the job is called."""
    file: BlockdevRef
    """The data device: a node that nobody else writes to, or options of one."""
    metadata: str
    """The directory to put them in; without metadata of a store."""


@command("dedup-rebuild")
async def dedup_rebuild(context: Context, arguments: DedupRebuild) -> None:
    """Begin a job that makes lost metadata of a store anew, from what is on its data device."""
    from vhostblk.jobs.dedup import RebuildJob

    id, backend = arguments.job_id, context.backend
    directory = Path(arguments.metadata)
    backend.jobs.start(RebuildJob(id, backend.creator(id), arguments.file, directory))


async def _use(
    context: Context, node: Dedup, what: str, work: Callable[[], Coroutine[Any, Any, _Result]]
) -> _Result:
    """Do something with a store whose node stays meanwhile."""
    try:
        return await context.backend.use(node, what, work)
    except OSError as error:
        hint = "make room for its metadata" if error.errno in (ENOSPC, EDQUOT) else "see the log"
        raise VhostblkError(
            f"The dedup store '{node.store.directory}' cannot do it now: {error.strerror}; {hint}",
            data={"code": "dedup-store", "node-name": node.name},
        ) from None


def _dedup(context: Context, name: str) -> Dedup:
    from vhostblk.nodes.dedup import Dedup

    node = context.backend.graph.node(name)
    if not isinstance(node, Dedup):
        raise VhostblkError(
            f"Node '{name}' (driver {node.driver}) is no disk of a dedup store",
            data={"code": "not-dedup", "node-name": name},
        )
    return node
