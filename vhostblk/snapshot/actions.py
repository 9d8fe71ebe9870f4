# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-snapshot-sync and blockdev-snapshot: what they ask of a change of the graph.

With a node's name they do what QEMU's do. With the id of an export they look for
the nodes below its filters, and cover all of them in one pause; filters stay where
they are. Several of them in one `transaction` share that pause: one point in time.

    overlays created, synced, opened                               guests run
    covered nodes flushed                                          guests run
    file systems frozen, if asked for                              guests wait for writes
    pause begins
      overlays take the place of the covered nodes
      state file written
    pause ends, file systems thawed
    covered nodes flushed: what was written since the first time   guests' flushes wait
    covered nodes become read-only
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from vhostblk.engine import OP_FLUSH, finish
from vhostblk.fault import fault_point
from vhostblk.graph import PAUSE_PATIENCE, Change
from vhostblk.nodes.driver import NodeDriver, Perm, RoleKind
from vhostblk.schema import Model, NodeName, UInt32, VhostblkError
from vhostblk.snapshot import names, overlay
from vhostblk.snapshot.freeze import DEFAULT_TIMEOUT, Freeze
from vhostblk.transaction import action

if TYPE_CHECKING:
    from vhostblk.backend import Backend

logger = logging.getLogger(__name__)

_FLUSH_PATIENCE = 300.0  # seconds, while guests run: a disk may have a lot to write
_REST_PATIENCE = 30.0  # after that, for what has been written since; the graph is locked meanwhile


class FreezeOptions(Model):
    """What both commands have for guests with an agent."""

    guest_agent: str | None = None
    """Socket of the guest's agent: freeze its file systems for the time of the pause (ours)."""
    freeze_timeout: UInt32 = DEFAULT_TIMEOUT
    """Seconds that freezing may take (ours)."""


class BlockdevSnapshotSync(FreezeOptions):
    """Arguments of blockdev-snapshot-sync."""

    device: str | None = None
    """An export: all nodes below its filters."""
    node_name: str | None = None
    """One node."""
    snapshot_file: str | None = None
    """Path of the new image; for an export with several legs see snapshot-file-template."""
    snapshot_file_template: str | None = None
    """The same with fields in braces; {directory}/{stem}.{node}.{timestamp}.{format} if absent."""
    snapshot_node_name: str | None = None
    """Name of the new node, or a template; {node}-{number} if absent."""
    format: str = "qcow2"
    """Driver of the new image."""
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"
    """Create the image, or take one that has been prepared."""
    create_options: dict[str, Any] | None = None
    """How to create it: options of blockdev-create for the format (ours)."""


class BlockdevSnapshot(FreezeOptions):
    """Arguments of blockdev-snapshot."""

    node: str | None = None
    """One node."""
    overlay: NodeName | None = None
    """The node that is to cover it: one without a backing node (`backing: null`)."""
    device: str | None = None
    """An export: all nodes below its filters (ours)."""
    overlays: list[str] | None = None
    """With device: one overlay for each of them, in the order of query-block (ours)."""


# ---- the actions


@action("blockdev-snapshot-sync", BlockdevSnapshotSync)
async def blockdev_snapshot_sync(
    backend: Backend, change: Change, arguments: BlockdevSnapshotSync
) -> dict[str, Any]:
    """Make overlays, and put them on top of a node or of all legs of a drive."""
    legs = _legs(backend, change, arguments.device, arguments.node_name, "node-name")
    _check_file(arguments, legs)
    create_options = _create_options(arguments)
    common = _common(change)
    covers: list[Cover] = []
    for leg in legs:
        named = names.Names(
            leg,
            device=arguments.device,
            format=arguments.format,
            moment=common.moment,
            taken=backend.graph.nodes,
        )
        if arguments.snapshot_file is not None:
            filename = names.absolute(arguments.snapshot_file)
        else:
            filename = named.file(arguments.snapshot_file_template or names.DEFAULT_FILE)
        wanted = overlay.Wanted(
            below=leg,
            filename=filename,
            node_name=named.node(arguments.snapshot_node_name or names.DEFAULT_NODE),
            format=arguments.format,
            existing=arguments.mode == "existing",
            create_options=create_options,
        )
        new = await overlay.make(backend, change, wanted)
        _put_above(change, leg, new)
        covers.append(Cover(leg, new, {"filename": wanted.filename}))
    await _cover(backend, change, covers)
    result = {"snapshots": [cover.report for cover in covers]}
    _freeze(backend, change, arguments, result)
    return result


@action("blockdev-snapshot", BlockdevSnapshot)
async def blockdev_snapshot(
    backend: Backend, change: Change, arguments: BlockdevSnapshot
) -> dict[str, Any]:
    """Put overlays that are open already on top of a node or of all legs of a drive."""
    legs = _legs(backend, change, arguments.device, arguments.node, "node")
    wanted = arguments.overlays
    if arguments.overlay is not None:
        if wanted is not None:
            raise _unexpected("overlays")
        wanted = [arguments.overlay]
    if wanted is None:
        raise VhostblkError(
            "Parameter 'overlay' is missing",
            data={"code": "missing-parameter", "parameter": "overlay"},
        )
    if len(wanted) != len(legs):
        raise VhostblkError(
            f"{len(wanted)} overlays for {len(legs)} nodes: {', '.join(n.name for n in legs)}",
            data={"code": "wrong-number", "nodes": [node.name for node in legs]},
        )
    covers: list[Cover] = []
    for leg, name in zip(legs, wanted, strict=True):
        new = change.node(name)
        _put_above(change, leg, new)
        covers.append(Cover(leg, new))
        await overlay.expect(change, new, leg)
    await _cover(backend, change, covers)
    result = {"snapshots": [cover.report for cover in covers]}
    _freeze(backend, change, arguments, result)
    return result


def _legs(
    backend: Backend, change: Change, device: str | None, node: str | None, parameter: str
) -> list[NodeDriver]:
    """What is to be covered."""
    if (device is None) == (node is None):
        raise VhostblkError(
            f"One of 'device' (an export) and '{parameter}' must be given",
            data={"code": "missing-parameter", "parameter": parameter},
        )
    if node is not None:
        return [change.node(node)]
    assert device is not None
    try:
        drive = backend.graph.backend(device)
    except VhostblkError as error:
        if device in backend.graph.nodes:
            error.desc += f"; '{device}' is a node: use {parameter}={device}"
        raise
    return change.top_nodes_below_filters(drive)


def _create_options(arguments: BlockdevSnapshotSync) -> dict[str, Any]:
    """How overlays are created if nobody says: for a node as QEMU does.

    Subclusters make the first write of 4 KiB to a place cost that and not a copy of 64 KiB, on each
    leg, at the moment when a guest meets that most. Clusters of 128 KiB have them of 4 KiB, with as
    much metadata as the default has.
    """
    given = arguments.create_options
    if given is None:
        plain = arguments.format != "qcow2" or arguments.device is None
        return {} if plain else {"cluster-size": 128 << 10, "extended-l2": True}
    if arguments.mode == "existing":
        raise _unexpected("create-options")
    for name in given:
        if name.replace("_", "-") in overlay.SET_BY_US:
            raise _unexpected(f"create-options.{name}")
    return given


def _check_file(arguments: BlockdevSnapshotSync, legs: list[NodeDriver]) -> None:
    if arguments.snapshot_file is None:
        return
    if arguments.snapshot_file_template is not None:
        raise _unexpected("snapshot-file-template")
    if len(legs) > 1:
        raise VhostblkError(
            f"Parameter 'snapshot-file' is one name, and '{arguments.device}' has {len(legs)} "
            f"nodes below its filters: {', '.join(leg.name for leg in legs)}; use "
            "snapshot-file-template",
            data={"code": "several-legs", "nodes": [leg.name for leg in legs]},
        )


def _put_above(change: Change, leg: NodeDriver, new: NodeDriver) -> None:
    """An overlay takes the place of a node with all its parents, and gets it as backing node."""
    change.set_child(new, _backing_role(change, new), leg)
    change.replace_node(leg, new)


def _backing_role(change: Change, node: NodeDriver) -> str:
    """Where an overlay has what it covers; refused if it cannot or must not cover anything."""
    role = next(
        (name for name, kind in node.child_roles.items() if kind.kind is RoleKind.BACKING), None
    )
    if role is None:
        raise VhostblkError(
            f"The overlay '{node.name}' ({node.driver}) does not support backing images",
            data={"code": "no-overlay", "node": node.name},
        )
    if change.parents_of(node):
        raise VhostblkError(
            f"The overlay '{node.name}' is already in use",
            data={"code": "node-in-use", "node": node.name},
        )
    if role in change.children_of(node):
        raise VhostblkError(
            f"The overlay '{node.name}' already has a backing image; open it with backing=null",
            data={"code": "has-backing", "node": node.name},
        )
    return role


def _unexpected(parameter: str) -> VhostblkError:
    return VhostblkError(
        f"Parameter '{parameter}' is unexpected",
        data={"code": "unexpected-parameter", "parameter": parameter},
    )


# ---- what happens around and inside the pause


class _Common:
    """What the actions of one transaction share."""

    def __init__(self) -> None:
        self.moment = names.timestamp()
        self.freezes: dict[str, Freeze] = {}
        self.covered: list[NodeDriver] = []


_commons: WeakKeyDictionary[Change, _Common] = WeakKeyDictionary()


def _common(change: Change) -> _Common:
    if change not in _commons:
        _commons[change] = _Common()
    return _commons[change]


class Cover:
    """A node and the overlay that is to cover it."""

    def __init__(self, node: NodeDriver, overlay: NodeDriver, more: dict[str, Any] | None = None):
        self.node = node
        self.overlay = overlay
        self.report: dict[str, Any] = {"node": node.name, "overlay": overlay.name, **(more or {})}
        """What the command says of it."""


async def _cover(backend: Backend, change: Change, covers: list[Cover]) -> None:
    """Flush what is covered: most of it now, the rest when guests run again.

    A guest's next flush reaches the overlay only, and promises what has been written below, too. So
    the overlay owes that flush from the pause on, until one has succeeded.
    """
    legs = [cover.node for cover in covers]

    async def flush(nodes: list[NodeDriver], patience: float) -> None:
        for error in (await _flush_all(backend, nodes, patience)).values():
            error.desc = (
                f"No snapshot was taken: {error.desc}. If it is a leg of a quorum, take it away "
                "with x-blockdev-change, or put another one in its place"
            )
            raise error

    async def in_the_pause() -> None:
        fault_point("snapshot-paused")
        await flush([c.node for c in covers if not c.overlay.owe_flush()], PAUSE_PATIENCE)
        fault_point("snapshot-flushed")

    async def not_covered() -> None:
        backend.covered.difference_update(legs)

    async def afterwards() -> None:
        fault_point("snapshot-covered")
        for node, error in (await finish_covered(backend, legs)).items():
            next(c for c in covers if c.node is node).report["error"] = error.desc

    async def check() -> None:
        backend.graph.check_snapshot(covered)

    covered = _common(change).covered
    if not covered:
        change.inside(check)  # when all actions have said what they cover
    covered += legs
    await flush(legs, _FLUSH_PATIENCE)
    # A process that finds the new tree in the state file has to do what comes afterwards.
    backend.covered.update(legs)
    change.on_failure(not_covered)
    change.inside(in_the_pause)
    change.after(afterwards)


def expect_to_finish(backend: Backend, nodes: Iterable[NodeDriver]) -> None:
    """A process before this one has covered these nodes, and may not have flushed them."""
    for node in nodes:
        for above in _overlays_of(backend, node):
            above.owe_flush()


async def finish_covered(
    backend: Backend, nodes: Iterable[NodeDriver]
) -> dict[NodeDriver, VhostblkError]:
    """What has been covered is brought to its disk, and becomes read-only; guests run.

    What cannot be flushed stays as it is, its overlay still owes that, and the error is returned.
    """
    covered = list(nodes)
    failed = await _flush_all(backend, covered, _REST_PATIENCE)
    for node, error in failed.items():
        error.desc = f"a power failure may still damage the snapshot: {error.desc}"
        logger.error("%s", error.desc)
        backend.covered.add(node)
    for node in covered:
        if node not in failed:
            for above in _overlays_of(backend, node):
                above.flush_paid()
            await _make_read_only(backend, node)
            backend.covered.discard(node)
    return failed


def _overlays_of(backend: Backend, node: NodeDriver) -> list[NodeDriver]:
    """Who has the node as its backing node."""
    return [
        edge.parent
        for edge in backend.graph.parents_of(node)
        if isinstance(edge.parent, NodeDriver)
        and edge.parent.child_roles[edge.role.split(".")[0]].kind is RoleKind.BACKING
    ]


async def _flush_all(
    backend: Backend, nodes: Iterable[NodeDriver], patience: float
) -> dict[NodeDriver, VhostblkError]:
    """Those that cannot be flushed, and why."""
    written = [node for node in nodes if not node.read_only]
    errors = await asyncio.gather(*(_flush(backend, node, patience) for node in written))
    return {node: error for node, error in zip(written, errors, strict=True) if error is not None}


async def _flush(backend: Backend, leg: NodeDriver, patience: float) -> VhostblkError | None:
    """Of a quorum's legs, too, all: one that is out may still have what it had before."""
    try:
        await finish(backend.engine.submit(leg.effective, OP_FLUSH, 0, None), patience)
    except TimeoutError:
        code, why = errno.ETIMEDOUT, f"it has taken more than {patience:g} s"
    except OSError as error:
        code = error.errno or errno.EIO
        why = os.strerror(code)
    else:
        return None
    return VhostblkError(
        f"node '{leg.name}' cannot be flushed: {why}",
        data={
            "code": "no-flush",
            "node": leg.name,
            "errno": errno.errorcode.get(code, "EIO"),
        },
    )


async def _make_read_only(backend: Backend, leg: NodeDriver) -> None:
    """As QEMU does: others may look at a snapshot. What cannot be read-only is left as it is."""
    graph = backend.graph
    perm, _ = graph.permissions_of(leg)
    if perm & (Perm.WRITE | Perm.RESIZE):
        return
    try:
        if await leg.become_read_only():
            graph.set_given_options(leg, {**graph.given_options(leg), "read-only": True})
            graph.update_permissions(leg)
    except (VhostblkError, OSError) as error:
        logger.warning("snapshot '%s' stays open for writing: %s", leg.name, error)


def _freeze(
    backend: Backend, change: Change, arguments: FreezeOptions, result: dict[str, Any]
) -> None:
    if arguments.guest_agent is None:
        return
    freezes = _common(change).freezes
    path = names.absolute(arguments.guest_agent)
    if path not in freezes:
        freezes[path] = Freeze(path, arguments.freeze_timeout, backend.frozen_guests)
        change.around(freezes[path])
    # Filled in when it has happened.
    result["freeze"] = freezes[path].report
