# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of the control socket.

Names and arguments are QEMU's wherever the meaning is. Those marked `oob` may
also be run out of band, while another command of the same client is waiting.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from vhostblk.control import dedup, introspect, luks, quorum, stream, throttle
from vhostblk.control.events import EVENTS
from vhostblk.control.registry import Context, NoArguments, Registry
from vhostblk.control.version import version_info
from vhostblk.schema import Model, OnOff, Size, UInt32, UInt64, VhostblkError
from vhostblk.snapshot.actions import BlockdevSnapshot, BlockdevSnapshotSync
from vhostblk.transaction import (
    BlockdevDel,
    BlockdevReopen,
    BlockdevReplace,
    BlockFilterInsert,
    BlockFilterRemove,
    TransactionAction,
    TransactionProperties,
)

registry = Registry()
registry.include(dedup.registry)
registry.include(luks.registry)
registry.include(quorum.registry)
registry.include(stream.registry)
registry.include(throttle.registry)
command = registry.command


# ---- about the backend ------------------------------------------------------------------


@command("query-version", oob=True)
async def query_version(context: Context, arguments: NoArguments) -> Any:
    """Version of this backend, in the members where QMP clients look for QEMU's."""
    return version_info()


@command("query-commands", oob=True)
async def query_commands(context: Context, arguments: NoArguments) -> Any:
    """Names of all commands."""
    names = ["qmp_capabilities", *context.registry.commands]
    return [{"name": name} for name in names]


@command("query-events", oob=True)
async def query_events(context: Context, arguments: NoArguments) -> Any:
    """Names of all events."""
    return [{"name": name} for name in EVENTS]


@command("query-qmp-schema", oob=True)
async def query_qmp_schema(context: Context, arguments: NoArguments) -> Any:
    """All commands, events and types in QAPI's introspection format."""
    return introspect.schema(context.backend, context.registry, EVENTS)


@command("query-status", oob=True)
async def query_status(context: Context, arguments: NoArguments) -> Any:
    """Whether the backend is running, and what it is made of."""
    return context.backend.query_status()


@command("quit", oob=True)
async def quit_backend(context: Context, arguments: NoArguments) -> None:
    """End the backend in order, as SIGTERM does. Guests see their disks pause."""
    context.quit()


# ---- nodes ------------------------------------------------------------------------------


class QueryNamedBlockNodes(Model):
    """Arguments of query-named-block-nodes."""

    flat: OnOff = False


@command("query-named-block-nodes", oob=True)
async def query_named_block_nodes(context: Context, arguments: QueryNamedBlockNodes) -> Any:
    """All block nodes. With `flat` as with QEMU: no descriptions of children's images."""
    return context.backend.query_named_block_nodes(await context.backend.actual_sizes())


@command("blockdev-add", union=introspect.blockdev_options)
async def blockdev_add(context: Context, arguments: dict[str, Any]) -> None:
    """Add a block node, and those defined inside its options."""
    await context.backend.blockdev_add(arguments)


@command("blockdev-del")
async def blockdev_del(context: Context, arguments: BlockdevDel) -> None:
    """Remove a block node that nothing uses."""
    await context.backend.blockdev_del(arguments.node_name)


@command("blockdev-reopen")
async def blockdev_reopen(context: Context, arguments: BlockdevReopen) -> Any:
    """Give nodes other options and children. What is left out goes back to its default."""
    return await context.run_action("blockdev-reopen", arguments)


@command("blockdev-replace")
async def blockdev_replace(context: Context, arguments: BlockdevReplace) -> Any:
    """Put another node in the place of a child, of a node or of an export."""
    return await context.run_action("blockdev-replace", arguments)


@command("block-filter-insert")
async def block_filter_insert(context: Context, arguments: BlockFilterInsert) -> Any:
    """Insert a filter: above an export's root, above a node, or between a node and its child."""
    return await context.run_action("block-filter-insert", arguments)


@command("block-filter-remove")
async def block_filter_remove(context: Context, arguments: BlockFilterRemove) -> Any:
    """Take a filter out and delete it; its users get its child instead."""
    return await context.run_action("block-filter-remove", arguments)


@command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(context: Context, arguments: BlockdevSnapshotSync) -> Any:
    """Make an overlay and put it on a node; with `device` on all legs of a drive at once."""
    return await context.run_action("blockdev-snapshot-sync", arguments)


@command("blockdev-snapshot")
async def blockdev_snapshot(context: Context, arguments: BlockdevSnapshot) -> Any:
    """Put an overlay that is open on a node; with `device` one on each leg of a drive."""
    return await context.run_action("blockdev-snapshot", arguments)


class InternalSnapshot(Model):
    """Arguments of the commands for snapshots inside an image."""

    device: str
    name: str


@command("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(context: Context, arguments: InternalSnapshot) -> None:
    """Keep the present state inside the image; `device` is a node or an export."""
    await context.backend.internal_snapshot(arguments.device, "create", arguments.name)


class InternalSnapshotDelete(Model):
    """Arguments of blockdev-snapshot-delete-internal-sync."""

    device: str
    id: str | None = None
    name: str | None = None


@command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    context: Context, arguments: InternalSnapshotDelete
) -> Any:
    """Delete a snapshot inside an image; what it was."""
    wanted = arguments.id or arguments.name
    if wanted is None:
        raise VhostblkError("Name or id must be provided", data={"code": "missing-parameter"})
    return await context.backend.internal_snapshot(arguments.device, "delete", wanted)


@command("blockdev-snapshot-internal-apply")
async def blockdev_snapshot_internal_apply(context: Context, arguments: InternalSnapshot) -> Any:
    """Make a node, which no export uses, what it was when a snapshot inside it was taken."""
    return await context.backend.internal_snapshot(arguments.device, "apply", arguments.name)


class BlockImageMap(Model):
    """Arguments of block-image-map."""

    device: str
    offset: UInt64 = 0
    length: UInt64 | None = None
    limit: UInt32 = 10_000


@command("block-image-map")
async def block_image_map(context: Context, arguments: BlockImageMap) -> Any:
    """Where the data of a node, or of an export's image, are; `limit` extents at a time."""
    return await context.backend.block_image_map(
        arguments.device, arguments.offset, arguments.length, max(1, arguments.limit)
    )


class BlockImageCheck(Model):
    """Arguments of block-image-check."""

    device: str


@command("block-image-check")
async def block_image_check(context: Context, arguments: BlockImageCheck) -> Any:
    """Check an image in use, changing nothing; guests are paused until it is done (pause-us)."""
    return await context.backend.block_image_check(arguments.device)


class Transaction(Model):
    """Arguments of transaction."""

    actions: list[Annotated[TransactionAction, "TransactionAction"]]
    properties: TransactionProperties = TransactionProperties()


@command("transaction")
async def transaction(context: Context, arguments: Transaction) -> Any:
    """Several changes of the graph at one moment: all of them, or none."""
    actions = [(entry.type, entry.data) for entry in arguments.actions]
    return await context.backend.transaction(actions)


@command("query-block", oob=True)
async def query_block(context: Context, arguments: NoArguments) -> Any:
    """All drives: what exports use, with their filters and what is below those."""
    return context.backend.query_block(await context.backend.actual_sizes())


@command("query-block-graph", oob=True)
async def query_block_graph(context: Context, arguments: NoArguments) -> Any:
    """Drives, nodes, and the relations between them, in one answer."""
    return context.backend.query_block_graph()


class BlockResize(Model):
    """Arguments of block_resize."""

    device: str | None = None
    """An export, whose root is meant."""
    node_name: str | None = None
    size: Size


@command("block_resize")
async def block_resize(context: Context, arguments: BlockResize) -> None:
    """Change the size of a node; the guests that use it are told."""
    await context.backend.block_resize(arguments.node_name, arguments.size, arguments.device)


class QueryBlockstats(Model):
    """Arguments of query-blockstats."""

    query_nodes: OnOff = False


@command("query-blockstats", oob=True)
async def query_blockstats(context: Context, arguments: QueryBlockstats) -> Any:
    """Counters and latencies: of the exports, or with `query-nodes` of the nodes."""
    wanted = "node" if arguments.query_nodes else "export"
    return [
        entry
        for entry in context.backend.query_blockstats()
        if ("export" in entry) == (wanted == "export")
    ]


# ---- exports ----------------------------------------------------------------------------


@command("query-block-exports", oob=True)
async def query_block_exports(context: Context, arguments: NoArguments) -> Any:
    """All exports."""
    return context.backend.query_block_exports()


@command("block-export-add", union=introspect.export_options)
async def block_export_add(context: Context, arguments: dict[str, Any]) -> None:
    """Export a node."""
    await context.backend.block_export_add(arguments)


class BlockExportDel(Model):
    """Arguments of block-export-del."""

    id: str
    mode: Literal["safe", "hard"] = "safe"


@command("block-export-del")
async def block_export_del(context: Context, arguments: BlockExportDel) -> None:
    """Remove an export: `safe` only if no front-end is connected, `hard` in any case."""
    await context.backend.block_export_del(arguments.id, arguments.mode)


class BlockExportSetThrottleGroup(Model):
    """Arguments of block-export-set-throttle-group."""

    id: str
    throttle_group: str | None = None


@command("block-export-set-throttle-group")
async def block_export_set_throttle_group(
    context: Context, arguments: BlockExportSetThrottleGroup
) -> None:
    """Give an export the limits of a throttle-group, or, without `throttle-group`, none."""
    await context.backend.block_export_set_throttle_group(arguments.id, arguments.throttle_group)


# ---- jobs -------------------------------------------------------------------------------


class BlockdevCreate(Model):
    """Arguments of blockdev-create."""

    job_id: str
    options: introspect.BlockdevCreateOptions


@command("blockdev-create")
async def blockdev_create(context: Context, arguments: BlockdevCreate) -> None:
    """Begin a job that creates an image; it stays until it is dismissed."""
    await context.backend.blockdev_create(arguments.job_id, arguments.options)


@command("query-jobs", oob=True)
async def query_jobs(context: Context, arguments: NoArguments) -> Any:
    """All jobs."""
    return context.backend.query_jobs()


class JobArguments(Model):
    """Arguments of the commands for one job."""

    id: str


@command("job-cancel")
async def job_cancel(context: Context, arguments: JobArguments) -> None:
    """Have a job end as soon as it can; what it has done so far does not count."""
    context.backend.jobs.get(arguments.id).cancel()


@command("job-finalize")
async def job_finalize(context: Context, arguments: JobArguments) -> None:
    """Let a job in state pending end."""
    context.backend.jobs.get(arguments.id).finalize()


@command("job-dismiss")
async def job_dismiss(context: Context, arguments: JobArguments) -> None:
    """Remove a job that has ended."""
    context.backend.jobs.get(arguments.id).dismiss()


@command("job-pause")
async def job_pause(context: Context, arguments: JobArguments) -> None:
    """Have a job that moves data wait."""
    context.backend.jobs.get(arguments.id).pause()
    await context.backend.job_changed()


@command("job-resume")
async def job_resume(context: Context, arguments: JobArguments) -> None:
    """Have a paused job go on."""
    context.backend.jobs.get(arguments.id).resume()
    await context.backend.job_changed()


@command("query-block-jobs", oob=True)
async def query_block_jobs(context: Context, arguments: NoArguments) -> Any:
    """The jobs that move data, with their speed."""
    return context.backend.query_block_jobs()


class BlockJobArguments(Model):
    """Arguments of the commands for one job that moves data."""

    device: str
    """The job's id."""


class BlockJobCancel(BlockJobArguments):
    """Arguments of block-job-cancel."""

    force: OnOff = False


@command("block-job-cancel")
async def block_job_cancel(context: Context, arguments: BlockJobCancel) -> None:
    """The same as job-cancel; `force` is accepted for QEMU's sake."""
    context.backend.block_job(arguments.device).cancel()


@command("block-job-pause")
async def block_job_pause(context: Context, arguments: BlockJobArguments) -> None:
    """The same as job-pause."""
    context.backend.block_job(arguments.device).pause()
    await context.backend.job_changed()


@command("block-job-resume")
async def block_job_resume(context: Context, arguments: BlockJobArguments) -> None:
    """The same as job-resume."""
    context.backend.block_job(arguments.device).resume()
    await context.backend.job_changed()


@command("block-job-finalize")
async def block_job_finalize(context: Context, arguments: JobArguments) -> None:
    """The same as job-finalize."""
    context.backend.block_job(arguments.id).finalize()


@command("block-job-dismiss")
async def block_job_dismiss(context: Context, arguments: JobArguments) -> None:
    """The same as job-dismiss."""
    context.backend.block_job(arguments.id).dismiss()


class BlockJobSetSpeed(BlockJobArguments):
    """Arguments of block-job-set-speed."""

    speed: int
    """Bytes per second; 0: no limit."""


@command("block-job-set-speed")
async def block_job_set_speed(context: Context, arguments: BlockJobSetSpeed) -> None:
    """Change how fast a job may be; counts at once."""
    context.backend.block_job(arguments.device).set_speed(arguments.speed)
    await context.backend.job_changed()


# ---- objects ----------------------------------------------------------------------------


@command("query-iothreads", oob=True)
async def query_iothreads(context: Context, arguments: NoArguments) -> Any:
    """All I/O threads."""
    return context.backend.query_iothreads()


@command("object-add", union=introspect.object_options)
async def object_add(context: Context, arguments: dict[str, Any]) -> None:
    """Add an object, such as an I/O thread."""
    await context.backend.object_add(arguments)


class ObjectDel(Model):
    """Arguments of object-del."""

    id: str


@command("object-del")
async def object_del(context: Context, arguments: ObjectDel) -> None:
    """Remove an object that nothing uses."""
    await context.backend.object_del(arguments.id)


class QomList(Model):
    """Arguments of qom-list."""

    path: str


@command("qom-list", oob=True)
async def qom_list(context: Context, arguments: QomList) -> Any:
    """The properties of an object, or the objects there are (path /objects)."""
    return context.backend.qom_list(arguments.path)


class QomGet(Model):
    """Arguments of qom-get."""

    path: str
    property: str


@command("qom-get", oob=True)
async def qom_get(context: Context, arguments: QomGet) -> Any:
    """The value of a property of an object."""
    return context.backend.qom_get(arguments.path, arguments.property)


class QomSet(Model):
    """Arguments of qom-set."""

    path: str
    property: str
    value: Any


@command("qom-set")
async def qom_set(context: Context, arguments: QomSet) -> None:
    """Change a property of an object."""
    await context.backend.qom_set(arguments.path, arguments.property, arguments.value)
