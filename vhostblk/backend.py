# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole backend behind one façade: what the control socket and the command line call.

Options come in as plain data with QAPI's names and are checked here; results go
out as plain data that can be written as JSON. Everything runs on the event
loop's thread. Changes are made one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vhostblk.engine import AIO_NAMES, Engine, IOThread, OpStats, Stats
from vhostblk.events import EventBus
from vhostblk.export import Export, export_type
from vhostblk.export import export_types as known_export_types
from vhostblk.graph import Change, Graph
from vhostblk.graph.describe import describe_drive, describe_graph
from vhostblk.image import Extent, merged
from vhostblk.jobs import JobStore
from vhostblk.jobs import quorum as quorum_jobs
from vhostblk.nodes import DriverRegistry
from vhostblk.nodes.driver import NodeDriver, RoleKind
from vhostblk.objects import ObjectStore, object_types
from vhostblk.objects.iothread import IOThreadObject, IOThreadOptions
from vhostblk.schema import DeviceNotActive, Model, VhostblkError, validate
from vhostblk.snapshot import actions as snapshot_actions  # known to transactions once loaded
from vhostblk.snapshot.freeze import FrozenGuests
from vhostblk.state import Document, StateFile, describe, restore, unfinished, with_frozen_guests
from vhostblk.transaction import run_actions

if TYPE_CHECKING:
    from vhostblk.jobs.block_job import BlockJob
    from vhostblk.jobs.create import Creator

logger = logging.getLogger(__name__)

# How long a locked image is waited for, and how often it is looked at.
LOCK_PATIENCE = 5.0
LOCK_INTERVAL = 0.02
_SIZES_PATIENCE = 1.0
# How long guests may be paused by a check of their image.
CHECK_PATIENCE = 30.0

ResultT = TypeVar("ResultT")

PERCENTILES = (("p50-ns", 50), ("p90-ns", 90), ("p99-ns", 99), ("p99.9-ns", 99.9))


class Backend:
    """One engine, its objects, its graph and its exports."""

    def __init__(self, *, plugins: Sequence[Path] = ()) -> None:
        self.events = EventBus()
        self._registry = DriverRegistry()
        self._plugins = plugins
        self._exports: dict[str, Export] = {}
        self.covered: set[NodeDriver] = set()
        """What snapshots have covered and is not read-only yet."""
        self._started: float | None = None
        self._closing = False
        self._uses: set[asyncio.Task[Any]] = set()
        self._state: StateFile | None = None
        self._sizing: asyncio.Future[dict[NodeDriver, int]] | None = None
        self.jobs = JobStore(self.events)
        self.frozen_guests = FrozenGuests(self._record_frozen, self._settle_frozen)
        # Made by start(), which has a running event loop.
        self.engine: Engine
        self.graph: Graph
        self.objects: ObjectStore

    # ---- life

    async def start(self) -> None:
        """Load the plug-ins and start the engine."""
        for plugin in self._plugins:
            for driver in self._registry.load_plugin(plugin):
                logger.info("driver '%s' loaded from '%s'", driver.driver, plugin)
        self.engine = Engine()
        self.objects = ObjectStore(self.engine)
        self.graph = Graph(self.engine, self.events, self._registry, self.objects)
        quorum_jobs.attend(self)
        self._started = time.time()

    async def close(self) -> None:
        """Disconnect all front-ends, let requests finish, free everything."""
        if self._started is None:
            return
        self._closing = self.graph.closing = True
        await self.jobs.close()
        for use in self._uses:
            use.cancel()
        await asyncio.gather(*self._uses, return_exceptions=True)
        async with self.graph.lock:
            closing = [self._close_export(export) for export in self._exports.values()]
            await asyncio.gather(*closing)
            await self.graph.close()
            await self.objects.close()
        self.frozen_guests.close()
        self.engine.close()
        self._started = None

    # ---- changes, and the state file

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[list[Callable[[], Coroutine[Any, Any, None]]]]:
        """Inside, whatever there is may be changed; on the way out that is recorded.

        What is put into the list undoes the change, and is done if it cannot be recorded.
        """
        undo: list[Callable[[], Coroutine[Any, Any, None]]] = []
        async with self.graph.lock:
            self._refuse_when_closing()
            try:
                yield undo
            except BaseException:
                await self._record_again()
                raise
            try:
                await self.save_state()
            except VhostblkError as error:
                for step in reversed(undo):
                    await step()
                if undo:
                    await self._record_again()
                    raise
                error.desc = f"The change is in force, but would not survive a restart: {error}"
                raise

    async def save_state(self) -> None:
        """Bring the state file up to date, if there is one and anything has changed."""
        if self._state is not None:
            await self._state.write(describe(self))

    async def _record_expected(self, change: Change) -> Callable[[], Awaitable[None]] | None:
        """Record the tree as it will be: what reads the same may be served from now on.

        Not with jobs, which say of themselves what they are in the present tree.
        """
        assert self._state is not None
        if any(unfinished(self)):
            return None
        file, before = self._state, self._state.safe
        await file.write(describe(self, change.children_of))

        async def undo() -> None:
            if before is not None:
                await file.write(before)

        return undo

    async def _record_again(self) -> None:
        """After a failure: the state file may be ahead of what there is."""
        try:
            await self.save_state()
        except VhostblkError as error:
            logger.error("%s", error.desc)

    async def _record_frozen(self) -> None:
        """In the middle of a change: what is recorded of the tree stays as it is."""
        if self._state is not None and (text := self._state.safe):
            await self._state.write(with_frozen_guests(text, self.frozen_guests))

    async def _settle_frozen(self) -> None:
        async with self.graph.lock:
            if not self._closing:
                await self._record_again()

    async def keep_state(self, file: StateFile) -> None:
        """From now on, record every change in a state file before it counts."""
        self._state = file
        self.graph.on_switched = self.save_state
        self.graph.on_expected = self._record_expected
        async with self.graph.lock:  # a quorum may have begun to rebuild a leg
            await self.save_state()

    async def restore_state(self, document: Document, file: StateFile) -> None:
        """Make all that a state file describes."""
        await restore(document, self, file)

    async def restore_node(
        self, name: str, options: dict[str, Any], *, owned: bool, inherited: frozenset[str]
    ) -> None:
        """Make one node as it was; waits a little for an image that is locked."""

        async def attempt() -> None:
            async with self.changing():
                await self.graph.restore(name, options, owned=owned, inherited=inherited)

        await self._when_unlocked(attempt)

    async def restore_covered(self, names: Sequence[str]) -> None:
        """Finish snapshots: what they have covered becomes read-only."""
        async with self.changing():
            await snapshot_actions.finish_covered(self, map(self.graph.node, names))

    def expect_covered(self, names: Sequence[str]) -> None:
        """Before anybody writes: what restore_covered() is going to do has not been done yet."""
        snapshot_actions.expect_to_finish(self, map(self.graph.node, names))

    def exports(self) -> list[Export]:
        """All exports."""
        return list(self._exports.values())

    # ---- objects

    async def object_add(self, options: dict[str, Any]) -> None:
        """object-add."""
        async with self.changing() as undo:
            added = await self.objects.add(options)
            undo.append(lambda: self.objects.delete(added.id))

    async def object_del(self, id: str) -> None:
        """object-del."""
        async with self.changing():
            await self.objects.delete(id)

    def qom_list(self, path: str) -> list[dict[str, Any]]:
        """qom-list."""
        return self.objects.qom_list(path)

    def qom_get(self, path: str, property: str) -> Any:
        """qom-get."""
        return self.objects.qom_get(path, property)

    async def qom_set(self, path: str, property: str, value: Any) -> None:
        """qom-set."""
        async with self.changing():
            await self.objects.qom_set(path, property, value)

    # ---- nodes

    async def blockdev_add(self, options: dict[str, Any]) -> None:
        """blockdev-add; waits a little for an image that is locked."""

        async def attempt() -> None:
            async with self.changing() as undo:
                node = await self.graph.add(options)
                undo.append(lambda: self.graph.delete(node.name))

        await self._when_unlocked(attempt)

    async def _when_unlocked(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Try again for a while if an image is locked.

        The requests that a killed process had in an io_uring go on without it, and
        until the last has finished the kernel keeps the file open, and its locks. A
        successor must not start before that: an old write could land on top of a new one.
        """
        loop = asyncio.get_running_loop()
        begun, told = loop.time(), False
        while True:
            try:
                return await attempt()
            except VhostblkError as error:
                waited = loop.time() - begun
                if (error.data or {}).get("code") != "image-locked" or waited > LOCK_PATIENCE:
                    raise
                if waited > 1 and not told:
                    told = True
                    logger.info("waiting for the lock: %s", error.desc)
            await asyncio.sleep(LOCK_INTERVAL)

    async def blockdev_del(self, node_name: str) -> None:
        """blockdev-del."""
        async with self.changing():
            await self.graph.delete(node_name)

    async def transaction(self, actions: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """All of these actions (vhostblk/transaction.py) in one change, or none."""
        async with self.changing():
            return await run_actions(self, actions)

    async def blockdev_reopen(self, options: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """blockdev-reopen."""
        return await self.transaction([("blockdev-reopen", {"options": options, **more})])

    async def block_resize(
        self, node_name: str | None, size: int, device: str | None = None
    ) -> None:
        """block_resize: of a node, or of the root of an export."""
        async with self.changing():
            if (node_name is None) == (device is None):
                raise VhostblkError(
                    "One of 'device' (an export) and 'node-name' must be given",
                    data={"code": "missing-parameter", "parameter": "node-name"},
                )
            if device is not None:
                node = self.graph.backend(device).root
            else:
                node = self.graph.node(str(node_name))
            await self.graph.resize(node, size)

    async def internal_snapshot(self, device: str, what: Any, name: str) -> dict[str, Any]:
        """Create, delete or go back to (`apply`) a snapshot inside an image."""
        async with self.changing():
            node = self._node_of(device)
            change = getattr(node, "change_snapshots", None)
            if change is None:
                raise VhostblkError(
                    f"Block format '{node.driver}' used by node '{node.name}' does not support "
                    "internal snapshots",
                    data={"code": "no-internal-snapshots", "node": node.name},
                )
            if what == "apply" and self.graph.above([node])[1]:
                raise VhostblkError(
                    f"Node '{node.name}' is in use by an export: a guest would see its disk "
                    "change under its feet",
                    data={"code": "node-in-use", "node": node.name},
                )
            if what == "apply":
                self._check_headers_above(node)
            async with self.graph.drained([node]):
                if what == "create":
                    self.graph.check_snapshot([node])
                snapshot = await change(what, name)
            described: dict[str, Any] = snapshot.describe()
            return described

    def _check_headers_above(self, node: NodeDriver) -> None:
        """A LUKS header inside the image would become an older one, with another key perhaps."""
        for above in self.graph.above([node])[0]:
            if getattr(above, "volume", None) is not None and above is not node:
                raise VhostblkError(
                    f"Node '{node.name}' is in use by the encrypted node '{above.name}', whose "
                    "header may lie in it: delete that node first, and make it again afterwards",
                    data={"code": "node-in-use", "node": node.name, "users": [above.name]},
                )

    async def block_image_map(
        self, device: str, offset: int, length: int | None, limit: int
    ) -> dict[str, Any]:
        """block-image-map: the extents of a range, and where to go on if they are too many."""
        async with self.graph.lock:
            node = self._node_of(device)
            end = node.size if length is None else offset + length
            if not 0 <= offset <= end <= node.size:
                raise VhostblkError(
                    f"Bytes {offset} to {end} are not inside node '{node.name}' of {node.size} "
                    "bytes",
                    data={"code": "bad-range", "node": node.name},
                )
            found: list[Extent] = []
            async for extent in node.extents(offset, end - offset):
                found.append(extent)
                if len(found) > 2 * limit:
                    found = merged(found)
                    if len(found) > limit:
                        break
        found = merged(found)
        result: dict[str, Any] = {"node-name": node.name, "size": node.size}
        if len(found) > limit:
            result["next-offset"] = found[limit].start
        result["extents"] = [extent.describe() for extent in found[:limit]]
        return result

    async def block_image_check(self, device: str) -> dict[str, Any]:
        """block-image-check: guests are paused while the tables are walked."""
        async with self.graph.lock:
            node = self._node_of(device)
            begun = time.monotonic()
            patience = CHECK_PATIENCE if self.graph.above([node])[1] else None
            async with self.graph.drained([node]):
                try:
                    result: dict[str, Any] = await node.check_image(patience)
                except TimeoutError:
                    raise VhostblkError(
                        f"The check of node '{node.name}' has taken more than {patience:g} s, and "
                        "guests were waiting; take a snapshot, and check what it has covered",
                        data={"code": "check-too-long", "node": node.name},
                    ) from None
            pause = round((time.monotonic() - begun) * 1e6)
        return {"node-name": node.name, **result, "pause-us": pause}

    async def use(
        self, node: NodeDriver, command: str, work: Callable[[], Coroutine[Any, Any, ResultT]]
    ) -> ResultT:
        """A command's work on a node, which cannot be removed meanwhile.

        Ends with an error when the backend closes: nodes wait for nobody then.
        """

        async def run() -> ResultT:
            async with self.graph.using(node, command, "command"):
                return await work()

        self._refuse_when_closing()
        task = asyncio.create_task(run())
        self._uses.add(task)
        task.add_done_callback(self._uses.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled():
                self._refuse_when_closing()
            raise

    def _node_of(self, device: str) -> Any:
        """A node by its name, or the top node below the filters of an export."""
        if device in self.graph.nodes:
            return self.graph.node(device)
        drives = [drive.name for drive in self.graph.backends if not drive.pinned]
        if device not in drives:
            raise VhostblkError(
                f"There is no node or export '{device}'", data={"code": "no-such-node"}
            ).suggest(device, [*self.graph.nodes, *drives])
        return self.graph.backend(device).top_node_below_filters

    # ---- jobs

    async def blockdev_create(self, job_id: str, options: dict[str, Any]) -> None:
        """blockdev-create: begins the job."""
        from vhostblk.jobs.create import CreateJob

        self._refuse_when_closing()
        self.jobs.check_id(job_id)
        self.jobs.start(CreateJob(job_id, self.graph, self._registry, options))

    def creator(self, job_id: str) -> Creator:
        """What gives a job that creates something the nodes to write to."""
        from vhostblk.jobs.create import Creator

        self._refuse_when_closing()
        self.jobs.check_id(job_id)
        return Creator(self.graph, self._registry, job_id, locked=False)

    async def restart_job(self, entry: dict[str, Any]) -> None:
        """Begin a job that a predecessor had not finished."""
        from vhostblk.jobs.restart import restart

        await restart(self, entry)

    def block_job(self, id: str) -> BlockJob:
        """The job called `id`, if it is one that moves data."""
        from vhostblk.jobs.block_job import BlockJob

        jobs = {job.id: job for job in self.jobs if isinstance(job, BlockJob)}
        if id in jobs:
            return jobs[id]
        raise DeviceNotActive(
            f"Block job '{id}' not found", data={"code": "no-such-job", "job": id}
        ).suggest(id, jobs)

    async def job_changed(self) -> None:
        """A job's options are others now: that is recorded."""
        async with self.changing():
            pass

    def query_block_jobs(self) -> list[dict[str, Any]]:
        """query-block-jobs."""
        from vhostblk.jobs.block_job import BlockJob

        return [job.describe_block() for job in self.jobs if isinstance(job, BlockJob)]

    def query_jobs(self) -> list[dict[str, Any]]:
        """query-jobs."""
        return [job.describe() for job in self.jobs]

    # ---- exports

    async def block_export_add(self, options: dict[str, Any]) -> None:
        """block-export-add; waits a little for an image that is locked."""

        async def attempt() -> None:
            async with self.changing() as undo:
                export = await self._add_export(options)
                undo.append(lambda: self._close_export(export))

        await self._when_unlocked(attempt)

    async def _add_export(self, options: dict[str, Any]) -> Export:
        kind = export_type(options)
        checked: Model = validate(kind.Options, options)
        export = kind(self.engine, self.graph, self.objects, self.events, checked)
        if export.id in self._exports:
            raise VhostblkError(
                f"Block export id '{export.id}' is already in use",
                data={"code": "duplicate-export", "export": export.id},
            )
        await export.open()
        self._exports[export.id] = export
        return export

    async def block_export_del(self, id: str, mode: Literal["safe", "hard"] = "safe") -> None:
        """block-export-del; returns when the export has gone."""
        export = self._export(id)
        if mode == "safe" and export.in_use:
            raise VhostblkError(
                f"export '{id}' still in use: a front-end is connected",
                data={
                    "code": "export-in-use",
                    "export": id,
                    "hint": "Use mode='hard' to force client disconnect",
                },
            )
        async with self.changing():
            if id in self._exports:
                await self._close_export(export)

    async def block_export_set_throttle_group(self, id: str, group: str | None) -> None:
        """Other limits for an export."""
        async with self.changing() as undo:
            export = self._export(id)
            before = export.describe().get("throttle-group")
            await export.set_throttle_group(group)
            undo.append(lambda: export.set_throttle_group(before))

    async def _close_export(self, export: Export) -> None:
        assert export.backend is not None
        root = export.backend.root
        if export.backend.device is not None:
            with self.graph.releasing([export.backend]):
                await self.graph.unpaused(export.backend.device)
        await export.close()
        await self.graph.drop([root])
        self.graph.update_permissions()
        del self._exports[export.id]
        self.events.emit("BLOCK_EXPORT_DELETED", {"id": export.id})

    def _export(self, id: str) -> Export:
        export = self._exports.get(id)
        if export is None:
            raise VhostblkError(
                f"Export '{id}' is not found", data={"code": "no-such-export", "export": id}
            ).suggest(id, self._exports)
        return export

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise VhostblkError("The backend is shutting down", data={"code": "closing"})

    # ---- what there is to know

    @property
    def driver_registry(self) -> DriverRegistry:
        """Where drivers are found by name."""
        return self._registry

    def drivers(self) -> dict[str, type[NodeDriver]]:
        """All block drivers by name."""
        return self._registry.all()

    def object_types(self) -> dict[str, type[Model]]:
        """Options of all object types by name."""
        return {name: kind.Options for name, kind in object_types().items()}

    def export_types(self) -> dict[str, type[Model]]:
        """Options of all export types by name."""
        return {name: kind.Options for name, kind in known_export_types().items()}

    def query_status(self) -> dict[str, Any]:
        """query-status."""
        return {
            "running": not self._closing,
            "status": "shutdown" if self._closing else "running",
            "started": self._started,
            "nodes": len(self.graph.nodes),
            "exports": len(self._exports),
            "connected": sum(export.in_use for export in self._exports.values()),
            "iothreads": len(self.engine.iothreads),
        }

    async def actual_sizes(self) -> dict[NodeDriver, int]:
        """Bytes that nodes' files take on the host.

        Nothing, if one of them does not answer: then a file server has gone, and who asks
        wants to know the rest.
        """
        if self._sizing is None or self._sizing.done():
            self._sizing = asyncio.ensure_future(
                asyncio.to_thread(_allocated, self.graph.open_nodes)
            )
        done, _ = await asyncio.wait({self._sizing}, timeout=_SIZES_PATIENCE)
        return self._sizing.result() if done else {}

    def query_named_block_nodes(
        self, sizes: Mapping[NodeDriver, int] | None = None
    ) -> list[dict[str, Any]]:
        """query-named-block-nodes; with `sizes` they say what they take on the host."""
        return [self._describe_node(node, sizes or {}) for node in self.graph.open_nodes]

    def query_block(self, sizes: Mapping[NodeDriver, int] | None = None) -> list[dict[str, Any]]:
        """query-block: the drives, which are called as their exports."""
        return [
            {
                "device": drive.name,
                "type": drive.what,
                "removable": False,
                "locked": False,
                "inserted": self._describe_node(drive.root, sizes or {}),
                **describe_drive(self.graph, drive),
            }
            for drive in self.graph.backends
        ]

    def query_block_graph(self) -> dict[str, Any]:
        """query-block-graph."""
        return describe_graph(self.graph)

    def query_block_exports(self) -> list[dict[str, Any]]:
        """query-block-exports."""
        return [export.describe() for export in self._exports.values()]

    def query_blockstats(self) -> list[dict[str, Any]]:
        """query-blockstats: exports first, then nodes."""
        entries: list[dict[str, Any]] = []
        for export in self._exports.values():
            assert export.backend is not None
            entries.append(
                {
                    "export": export.id,
                    "node-name": export.backend.root.name,
                    **_stats_entry(export.stats()),
                }
            )
        for node in self.graph.open_nodes:
            entries.append(
                {"node-name": node.name, "driver": node.driver, **_stats_entry(node.stats())}
            )
        return entries

    def query_iothreads(self) -> list[dict[str, Any]]:
        """query-iothreads."""
        options = {
            entry.thread: entry.options
            for entry in self.objects
            if isinstance(entry, IOThreadObject)
        }
        default = IOThreadOptions(qom_type="iothread", id="default")
        return [_describe_iothread(t, options.get(t, default)) for t in self.engine.iothreads]

    def _describe_node(self, node: NodeDriver, sizes: Mapping[NodeDriver, int]) -> dict[str, Any]:
        options = node.options
        perm, shared = self.graph.permissions_of(node)
        filename = node.filename()
        described: dict[str, Any] = {
            "node-name": node.name,
            "drv": node.driver,
            "file": filename,
            "ro": node.read_only,
            "active": True,
            "encrypted": False,
            "backing_file_depth": 0,
            "detect_zeroes": options.detect_zeroes,
            "cache": {
                "writeback": True,
                "direct": options.cache.direct,
                "no-flush": options.cache.no_flush,
            },
            "write_threshold": 0,
            **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
            "image": {
                "filename": filename,
                "format": node.driver,
                "virtual-size": node.size,
            },
            "filter": node.is_filter,
            "passive": node.handle is None,
            "children": [
                {"child": role, "node-name": child.node.name}
                for role, child in node.children.items()
            ],
            "parents": [
                {"parent": edge.parent.name, "child": edge.role}
                for edge in self.graph.parents_of(node)
            ],
            "permissions": {"used": int(perm), "shared": int(shared)},
            **node.describe(),
        }
        actual = _actual_size(node, sizes)
        if actual is not None:
            described["image"]["actual-size"] = actual
        return described


def _allocated(nodes: list[NodeDriver]) -> dict[NodeDriver, int]:
    found: dict[NodeDriver, int] = {}
    for node in nodes:
        with contextlib.suppress(OSError):  # closed meanwhile
            allocated = node.allocated()
            if allocated is not None:
                found[node] = allocated
    return found


def _actual_size(node: NodeDriver, sizes: Mapping[NodeDriver, int]) -> int | None:
    """What a node takes with all below it except for backing files, as QEMU counts."""
    if node in sizes:
        return sizes[node]
    below = [
        _actual_size(child.node, sizes)
        for role, child in node.children.items()
        if node.child_roles[role.split(".")[0]].kind is not RoleKind.BACKING
    ]
    known = [size for size in below if size is not None]
    return sum(known) if known else None


def _describe_iothread(thread: IOThread, options: IOThreadOptions) -> dict[str, Any]:
    info = thread.info()
    entry: dict[str, Any] = {
        "id": thread.name,
        "thread-id": info.thread_id,
        "poll-max-ns": options.poll_max_ns,
        "poll-grow": options.poll_grow,
        "poll-shrink": options.poll_shrink,
        "aio-max-batch": options.aio_max_batch,
        "aio": AIO_NAMES[info.aio],
        "poll-ns": info.poll_ns,
        "loops": info.loops,
        "sleeps": info.sleeps,
        "requests": info.requests,
        "notifies": info.notifies,
        "inline-ios": info.inline_ios,
        "queued-ios": info.queued_ios,
        "shared-requests": info.shared_requests,
    }
    if thread.fallback_reason:
        entry["fallback-reason"] = thread.fallback_reason
    return entry


def _stats_entry(stats: Stats) -> dict[str, Any]:
    # QEMU has no counters of zero writes: they are writes.
    written = stats.write, stats.write_zeroes
    qapi: dict[str, Any] = {
        "rd_bytes": stats.read.bytes,
        "wr_bytes": sum(op.bytes for op in written),
        "zone_append_bytes": 0,
        "unmap_bytes": stats.discard.bytes,
        "rd_operations": stats.read.ops,
        "wr_operations": sum(op.ops for op in written),
        "zone_append_operations": 0,
        "flush_operations": stats.flush.ops,
        "unmap_operations": stats.discard.ops,
        "rd_total_time_ns": stats.read.total_ns,
        "wr_total_time_ns": sum(op.total_ns for op in written),
        "zone_append_total_time_ns": 0,
        "flush_total_time_ns": stats.flush.total_ns,
        "unmap_total_time_ns": stats.discard.total_ns,
        "wr_highest_offset": 0,
        **dict.fromkeys(("rd_merged", "wr_merged", "zone_append_merged", "unmap_merged"), 0),
        "failed_rd_operations": stats.read.errors,
        "failed_wr_operations": sum(op.errors for op in written),
        "failed_zone_append_operations": 0,
        "failed_flush_operations": stats.flush.errors,
        "failed_unmap_operations": stats.discard.errors,
        "invalid_rd_operations": stats.read.invalid,
        "invalid_wr_operations": sum(op.invalid for op in written),
        "invalid_zone_append_operations": 0,
        "invalid_flush_operations": stats.flush.invalid,
        "invalid_unmap_operations": stats.discard.invalid,
        "account_invalid": False,
        "account_failed": True,
        "timed_stats": [],
    }
    latency = {
        "read": _latency(stats.read),
        "write": _latency(stats.write),
        "flush": _latency(stats.flush),
        "discard": _latency(stats.discard),
        "write-zeroes": _latency(stats.write_zeroes),
    }
    return {"stats": qapi, "latency": latency}


def _latency(op: OpStats) -> dict[str, Any]:
    return {
        "count": op.ops,
        "mean-ns": op.mean_ns,
        **{name: op.percentile(percent) for name, percent in PERCENTILES},
        "histogram": [list(bucket) for bucket in op.buckets()],
    }
