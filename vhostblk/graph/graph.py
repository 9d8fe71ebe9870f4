# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes and edges, and the rules for changing them.

Relations live here, not in the drivers: a driver asks for its children by
role, and only the graph knows parents. Whatever requests may be travelling
through is changed inside a drained section only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from vhostblk.engine import MAX_CHILDREN, Engine
from vhostblk.events import EventBus
from vhostblk.garbage import no_collection
from vhostblk.graph.block_backend import BlockBackend, Device, split
from vhostblk.graph.change import Change
from vhostblk.graph.edge import Edge, enumerate_edges
from vhostblk.graph.options import check_detect_zeroes, inherit, references, sentence
from vhostblk.graph.steps import Steps
from vhostblk.nodes import DriverRegistry
from vhostblk.nodes.driver import Child, NodeDriver, Perm, RoleKind, perm_names, present
from vhostblk.objects import BackendObject, ObjectStore
from vhostblk.origin import origin
from vhostblk.schema import VhostblkError, json_types, validate
from vhostblk.schema.validation import wrong_type_error

logger = logging.getLogger(__name__)

MAX_DEPTH = 64
# How long guests may be held up by one that has requests which do not finish.
PAUSE_PATIENCE = 10.0
_WRITING = int(Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE)
MAX_CHAIN = 256  # of images that name their backing file
ObjectT = TypeVar("ObjectT", bound=BackendObject)
_NO_CHILDREN: Mapping[str, Child] = MappingProxyType({})
_Permissions = dict[NodeDriver, tuple[Perm, Perm]]


@dataclass(eq=False)
class _Releasing:
    """A section in which drives, nodes, and all under them hold no requests back."""

    reached: dict[BlockBackend | NodeDriver, None]


def _user(node: NodeDriver) -> str:
    """Who uses an object, for messages."""
    return f"node '{node.name}'"


class Pause:
    """How long guests were held up: from the first pause to the last resume."""

    pause_us = 0


class Graph:
    """All nodes of one backend. Everything here runs on the event loop's thread."""

    def __init__(
        self, engine: Engine, events: EventBus, drivers: DriverRegistry, objects: ObjectStore
    ) -> None:
        self.engine = engine
        self._events = events
        self._drivers = drivers
        self.objects = objects
        self._nodes: dict[str, NodeDriver] = {}
        self._names = itertools.count()
        self._owned: set[NodeDriver] = set()  # by the operator; the rest by their parents
        self._active: set[NodeDriver] = set()  # opened with success
        self._children: dict[NodeDriver, dict[str, Child]] = {}
        self._parents: dict[NodeDriver, list[Edge]] = {}
        self._backends: list[BlockBackend] = []
        self._perms: _Permissions = {}
        self._reconsidered: dict[NodeDriver, None] = {}
        self._drains: dict[BlockBackend | NodeDriver, int] = {}
        self._releasing: list[_Releasing] = []
        self._late_pauses: dict[asyncio.Future[None], Device] = {}
        self._steps = Steps()
        self._given: dict[NodeDriver, dict[str, Any]] = {}
        self._chain: list[str] = []  # images whose backing files are being opened
        self.lock = asyncio.Lock()
        """Held by whoever changes the graph: one change at a time."""
        self.state_path: str | None = None
        self.closing = False
        """The state file, beside which nodes may have files of their own."""
        self.on_switched: Callable[[], Awaitable[None]] | None = None
        """Called when a change is in force and guests are still paused; may refuse by raising."""
        self.on_expected: (
            Callable[[Change], Awaitable[Callable[[], Awaitable[None]] | None]] | None
        ) = None
        """Called while guests run, before a change after which all data are as before; its undo."""

    # ---- looking

    @property
    def nodes(self) -> Mapping[str, NodeDriver]:
        """All nodes by name, in order of creation."""
        return MappingProxyType(self._nodes)

    @property
    def backends(self) -> list[BlockBackend]:
        """All drives."""
        return list(self._backends)

    def node(self, name: str) -> NodeDriver:
        """The node called `name`."""
        node = self._nodes.get(name)
        if node is None:
            raise VhostblkError(
                f"Failed to find node with node-name='{name}'",
                data={"code": "no-such-node", "node": name},
            ).suggest(name, self._nodes)
        return node

    def children_of(self, node: NodeDriver) -> Mapping[str, Child]:
        """The children of a node, by role and index, in order."""
        return self._children.get(node, _NO_CHILDREN)

    def parents_of(self, node: NodeDriver) -> list[Edge]:
        """Who uses a node, and as what."""
        return list(self._parents[node])

    @property
    def open_nodes(self) -> list[NodeDriver]:
        """Those that can be asked things: not the ones that are being opened at the moment."""
        return [node for node in self._nodes.values() if node in self._active]

    def is_owned(self, node: NodeDriver) -> bool:
        """Whether the operator made it; else it goes with its parent."""
        return node in self._owned

    def backend(self, name: str) -> BlockBackend:
        """The drive of the export called `name`; a job may have the same name."""
        drives = {backend.name: backend for backend in self._backends if not backend.pinned}
        if name not in drives:
            raise VhostblkError(
                f"Export '{name}' is not found", data={"code": "no-such-export", "export": name}
            ).suggest(name, drives)
        return drives[name]

    def siblings(self, node: NodeDriver) -> list[NodeDriver]:
        """The nodes that stand where this one stands, under other legs of the same tree.

        For a node below filters: the others right below the same filters, however
        many filters are in between. For a filter: the other children of a parent
        that has it in a list. The relation is the same seen from each of them.
        """
        found: dict[NodeDriver, None] = {}
        if node.is_filter:
            for edge in self._parents[node]:
                name, _, index = edge.role.partition(".")
                if index and isinstance(edge.parent, NodeDriver):
                    for role, child in self.children_of(edge.parent).items():
                        if role.startswith(f"{name}.") and child.node.is_filter:
                            found[child.node] = None
        else:
            filters, waiting = set[NodeDriver](), [node]
            while waiting:
                for edge in self._parents[waiting.pop()]:
                    parent = edge.parent
                    if isinstance(parent, BlockBackend) or not parent.is_filter:
                        continue
                    if parent not in filters:
                        filters.add(parent)
                        waiting.append(parent)
            for parent in self._nodes.values():
                if parent in filters:
                    found.update(dict.fromkeys(split(parent, present)[1]))
        found.pop(node, None)
        return list(found)

    def given_options(self, node: NodeDriver) -> dict[str, Any]:
        """The options a node was last given, without what it took from its parent.

        Those of children are as they were written: `children_of()` knows the children.
        """
        return dict(self._given[node])

    def below(self, node: NodeDriver) -> list[NodeDriver]:
        """A node and everything it reaches."""
        found = [node]
        seen = {node}
        for current in found:  # grows while it is walked
            for child in self.children_of(current).values():
                if child.node not in seen:
                    seen.add(child.node)
                    found.append(child.node)
        return found

    def above(self, nodes: Iterable[NodeDriver]) -> tuple[list[NodeDriver], list[BlockBackend]]:
        """The nodes and everything that reaches them: nodes, drives."""
        found = list(nodes)
        seen = set(found)
        backends: dict[BlockBackend, None] = {}
        for current in found:  # grows while it is walked
            for edge in self._parents[current]:
                if isinstance(edge.parent, BlockBackend):
                    backends[edge.parent] = None
                elif edge.parent not in seen:
                    seen.add(edge.parent)
                    found.append(edge.parent)
        return found, list(backends)

    def check_snapshot(self, covered: Collection[NodeDriver]) -> None:
        """Whether the nodes above can do with this moment of nodes below. In a drained section."""
        for node in self.above(covered)[0]:
            node.check_snapshot(covered)

    def permissions_of(self, node: NodeDriver) -> tuple[Perm, Perm]:
        """What a node's parents do to it together, and what all of them let others do."""
        return self._perms.get(node, (Perm.NONE, Perm.ALL))

    # ---- what drivers ask for (nodes.driver.NodeHost)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the control clients."""
        self._events.emit(name, data)

    def passive_changed(self, node: NodeDriver) -> None:
        """The engine half of `node` has appeared or gone."""
        self.reconsider([node])
        self.relink()

    def use_object(self, node: NodeDriver, id: str, kind: type[ObjectT]) -> ObjectT:
        """An object, which cannot be deleted until it is released, or the node closed."""
        return self.objects.use(id, kind, _user(node))

    def release_object(self, node: NodeDriver, object: BackendObject) -> None:
        """The node does not need the object any more."""
        self.objects.release(_user(node), object)

    def side_file(self, node: NodeDriver, what: str) -> str | None:
        """A file for what a node must know after a restart (nodes.driver.NodeHost)."""
        return None if self.state_path is None else f"{self.state_path}.{what}-{node.name}"

    def is_drained(self, node: NodeDriver) -> bool:
        """Whether the node has been told to hold no requests back."""
        return node in self._drains

    def working(self, node: NodeDriver) -> AbstractAsyncContextManager[None]:
        """A step of background work on a node (nodes.driver.NodeHost)."""
        return self._steps.step(node)

    # ---- adding and removing nodes

    async def add(self, options: dict[str, Any], *, owned: bool = True) -> NodeDriver:
        """Make a node, and those of its children that are defined inside its options.

        One that is not `owned` needs no name, and goes when its last parent does.
        """
        made: list[NodeDriver] = []
        try:
            node = await self._make(options, "", made)
            named = options.get("node-name") is not None or options.get("node_name") is not None
            if owned and not named:
                raise VhostblkError(
                    "'node-name' must be specified for the root node",
                    data={"code": "missing-parameter", "parameter": "node-name"},
                )
            self.update_permissions()
        except BaseException:
            for node in reversed(made):
                await self.unmake(node)
            with contextlib.suppress(VhostblkError):
                self.update_permissions()  # what formats needed to look into nodes that exist
            raise
        if owned:
            self._owned.add(node)
        return node

    async def restore(
        self,
        name: str,
        options: dict[str, Any],
        *,
        owned: bool,
        inherited: frozenset[str] = frozenset(),
    ) -> NodeDriver:
        """Make a node as it was before a restart; its children, named in `options`, are there."""
        made: list[NodeDriver] = []
        try:
            node = await self._make(options, "", made, inherited, name)
            self.update_permissions()
        except BaseException:
            for node in reversed(made):
                await self.unmake(node)
            raise
        if owned:
            self._owned.add(node)
        return node

    async def delete(self, name: str) -> None:
        """Remove a node that nobody uses, and the children that were defined inside it."""
        node = self.node(name)
        self.check_deletable(node, self._parents[node])
        await self.unmake(node)
        self.update_permissions()

    def check_deletable(self, node: NodeDriver, users: list[Edge]) -> None:
        """Raise unless a node with these users may be deleted by the operator."""
        name = node.name
        if users:
            raise VhostblkError(
                f"Node '{name}' is in use: by {enumerate_edges(users)}",
                data={
                    "code": "node-in-use",
                    "node": name,
                    "users": [edge.parent.name for edge in users],
                    "hint": "remove those first",
                },
            )
        if node not in self._owned:
            raise VhostblkError(
                f"Node {name} is not owned by the monitor", data={"code": "not-owned", "node": name}
            )

    async def close(self) -> None:
        """Remove all nodes; no drive is left."""
        self._owned.clear()
        while self._nodes:
            top = [node for node in self._nodes.values() if not self._parents[node]]
            for node in reversed(top):
                await self.unmake(node)

    def _new_name(self, wanted: str | None) -> str:
        if wanted is None:
            while (name := f"#block{next(self._names)}") in self._nodes:
                pass
            return name
        if wanted in self._nodes:
            raise VhostblkError(
                f"Duplicate nodes with node-name='{wanted}'",
                data={"code": "duplicate-node", "node": wanted},
            )
        return wanted

    async def _make(
        self,
        options: dict[str, Any],
        where: str,
        made: list[NodeDriver],
        inherited: frozenset[str] = frozenset(),
        restored: str | None = None,
    ) -> NodeDriver:
        """Make a node and its inner children; all that was made is in `made`, also on failure."""
        if where.count(".") > MAX_DEPTH:
            raise VhostblkError(f"Parameter '{where}': nodes are nested too deeply")
        prefix = f"{where}." if where else ""
        name = options.get("driver")
        if name is None:
            raise VhostblkError(
                f"Parameter '{prefix}driver' is missing",
                data={"code": "missing-parameter", "parameter": f"{prefix}driver"},
            )
        if not isinstance(name, str):
            raise wrong_type_error(f"{prefix}driver", "string")
        driver = self._drivers.get(name, f"{prefix}driver")
        checked = validate(driver.Options, options, where)
        if checked.node_name is not None:
            self._new_name(checked.node_name)  # refused before anything is opened
        if restored is None:
            check_detect_zeroes(driver, checked, prefix)
        children: dict[str, NodeDriver] = {}
        for role, reference in references(driver, checked):
            kind = driver.child_roles[role.split(".")[0]].kind
            children[role] = await self._child_node(
                driver, options, reference, f"{prefix}{role}", made, kind
            )
        # Names may have been taken while the children were made.
        node = driver(self, self._new_name(restored or checked.node_name), checked)
        self._nodes[node.name] = node
        self._given[node] = {key: options[key] for key in options if key not in inherited}
        self._parents[node] = []
        self._children[node] = {}
        self.reconsider([node])
        made.append(node)
        for role, child_node in children.items():
            self.tie(node, role, child_node)
        if any(kind.kind is RoleKind.STORAGE for kind in driver.child_roles.values()):
            # What a format reads from its file must not change behind its back any more.
            self.update_permissions()
        await self._add_implied(node, options, made)
        await self._activate(node)
        return node

    async def _add_implied(
        self, node: NodeDriver, options: dict[str, Any], made: list[NodeDriver]
    ) -> None:
        """Make the children that the image itself names: a chain of backing files."""
        implied = await node.implied_children()
        if not implied:
            return
        path = os.path.realpath(node.filename())
        if path in self._chain:
            raise VhostblkError(
                f"Image '{node.filename()}' is its own backing file: the chain of backing files "
                "is a loop; 'backing' in the options (null for none) overrides what the image says",
                data={"code": "backing-loop", "node": node.name, "filename": node.filename()},
            )
        if len(self._chain) >= MAX_CHAIN:
            raise VhostblkError(
                f"Image '{node.filename()}': more than {MAX_CHAIN} images back one another",
                data={"code": "backing-too-deep", "node": node.name},
            )
        self._chain.append(path)
        try:
            with json_types(False):  # an image may say json:{"offset": "512"}
                for role, reference in implied.items():
                    kind = node.child_roles[role].kind
                    child = await self._child_node(type(node), options, reference, "", made, kind)
                    self.tie(node, role, child)
        finally:
            self._chain.pop()

    def tie(self, parent: NodeDriver, role: str, node: NodeDriver) -> Child:
        """Make `node` a child."""
        if len(self._children[parent]) >= MAX_CHILDREN:
            raise VhostblkError(
                f"Node '{parent.name}' cannot have more than {MAX_CHILDREN} children",
                data={"code": "too-many-children", "node": parent.name},
            )
        self._refresh_below(node)
        child = parent.child_class(self, role, node)
        self._children[parent][role] = child
        self._parents[node].append(Edge(parent, child))
        self.reconsider([node, parent])
        child.refresh()
        return child

    def _refresh_below(self, node: NodeDriver) -> None:
        """What has grown below a node that nobody used yet is not known there.

        A format knows how large its file is, and its own size is not that: no need to go deeper.
        """
        seen: set[NodeDriver] = set()
        waiting = [(node, False)]
        while waiting:  # children before parents; a chain may be too long to recurse
            current, below_done = waiting.pop()
            children = self._children[current].values()
            if below_done:
                for child in children:
                    child.size = child.node.size
            elif current not in seen and not current.is_format:
                seen.add(current)
                waiting.append((current, True))
                waiting += [(child.node, False) for child in children]

    def untie(self, parent: NodeDriver, role: str) -> Child:
        """Undo tie(); the child still does I/O until it is detached."""
        child = self._children[parent].pop(role)
        edges = self._parents[child.node]
        self._parents[child.node] = [edge for edge in edges if edge.child is not child]
        self.reconsider([child.node, parent])
        return child

    def retie(self, child: Child, node: NodeDriver) -> None:
        """Make `child` stand for another node."""
        self._refresh_below(node)
        edges = self._parents[child.node]
        [edge] = [edge for edge in edges if edge.child is child]
        self._parents[child.node] = [other for other in edges if other is not edge]
        self._parents[node] = [*self._parents[node], edge]
        self.reconsider([child.node, node])
        child.node = node

    def sort_children(self, parent: NodeDriver) -> None:
        """Bring children in the order of the driver's roles, and lists in that of the index."""
        order = list(parent.child_roles)

        def place(role: str) -> tuple[int, int]:
            name, _, index = role.partition(".")
            return order.index(name), int(index or 0)

        children = self._children[parent]
        self._children[parent] = {role: children[role] for role in sorted(children, key=place)}

    def save_relations(self) -> Callable[[], None]:
        """How to bring back the relations, and what goes with them, as they are now."""
        children = {node: dict(below) for node, below in self._children.items()}
        parents = {node: list(edges) for node, edges in self._parents.items()}
        nodes = [(child, child.node) for below in children.values() for child in below.values()]
        nodes += [(backend.root_child, backend.root) for backend in self._backends]
        given, owned = dict(self._given), set(self._owned)

        def restore() -> None:
            self._children, self._parents = children, parents
            self._given, self._owned = given, owned
            for child, node in nodes:
                child.node = node
            self.reconsider(self._nodes.values())

        return restore

    def set_given_options(self, node: NodeDriver, options: dict[str, Any]) -> None:
        """The node has been given other options."""
        self._given[node] = options

    def disown(self, node: NodeDriver) -> None:
        """The operator gives the node up: it goes when nobody uses it."""
        self._owned.discard(node)

    async def _activate(self, node: NodeDriver) -> None:
        with sentence(f"Could not open node '{node.name}' ({node.driver})", "open-failed", node):
            await node.activate()
            self._active.add(node)
            node.relink()
            self.reconsider([node])  # opening may have needed more than it will from now on

    async def _child_node(
        self,
        driver: type[NodeDriver],
        parent: dict[str, Any],
        reference: str | dict[str, Any],
        where: str,
        made: list[NodeDriver],
        kind: RoleKind,
    ) -> NodeDriver:
        if isinstance(reference, str):
            return self.node(reference)
        if kind is RoleKind.BACKING:
            # Overlays live from a backing file's not changing.
            reference = {"read-only": True, **reference}
        options, inherited = inherit(reference, parent, driver)
        return await self._make(options, where, made, inherited)

    async def drop(self, nodes: Iterable[NodeDriver]) -> None:
        """Remove those of the nodes that are neither the operator's nor anybody's child."""
        for node in nodes:
            if node not in self._owned and self._parents.get(node) == []:
                await self.unmake(node)

    async def unmake(self, node: NodeDriver) -> None:
        """Close a node without parents, then the children that belonged to it."""
        waiting = [node]
        while waiting:
            waiting += await self._unmake_one(waiting.pop())

    async def _unmake_one(self, node: NodeDriver) -> list[NodeDriver]:
        """Close one node; its children that are nobody's now."""
        if self._nodes.pop(node.name, None) is None:
            return []
        children = self._children.pop(node)
        self._owned.discard(node)
        self._given.pop(node, None)
        # The name is free and the node unreachable before anything is waited for.
        try:
            await self._close_node(node, children)
        finally:
            del self._parents[node]
            self._perms.pop(node, None)
            self._reconsidered.pop(node, None)
        left: list[NodeDriver] = []
        for child in children.values():
            edges = self._parents.get(child.node)
            if edges is None:
                continue
            self._parents[child.node] = edges = [e for e in edges if e.child is not child]
            self.reconsider([child.node])
            if not edges and child.node not in self._owned:
                left.append(child.node)
        return left

    async def _close_node(self, node: NodeDriver, children: dict[str, Child]) -> None:
        self._children[node] = children  # a driver may need them to close
        try:
            if node in self._active:
                self._active.discard(node)
                await self.engine.settle(_handles([node]))
                await node.deactivate()
        except (Exception, SystemExit) as error:
            _log_failure(f"closing node '{node.name}' ({node.driver})", error)
        finally:
            for child in children.values():
                child.detach()
            del self._children[node]
            self.objects.release(_user(node))

    # ---- drives

    def attach(self, backend: BlockBackend) -> None:
        """Put a drive on top of its root node; refused if others use that incompatibly."""
        self._refresh_below(backend.root)
        edge = Edge(backend, backend.root_child)
        self._parents[backend.root].append(edge)
        self._backends.append(backend)
        self.reconsider([backend.root])
        backend.relink()
        try:
            self.update_permissions()
        except BaseException:
            self._parents[backend.root].remove(edge)
            self._backends.remove(backend)
            raise

    def detach(self, backend: BlockBackend) -> None:
        """Take a drive off; nothing is in flight."""
        self._backends.remove(backend)
        edges = self._parents[backend.root]
        self._parents[backend.root] = [e for e in edges if e.child is not backend.root_child]
        self.reconsider([backend.root])
        backend.device = None
        self.update_permissions()

    @contextlib.asynccontextmanager
    async def using(
        self, node: NodeDriver, id: str, what: str, *, writes: bool = False
    ) -> AsyncIterator[None]:
        """Inside, `node` cannot be removed, and with `writes` all below it is open for writing.

        For a job or a command, which holds on to its node as an export does.
        """
        perm = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED if writes else Perm.NONE
        drive = BlockBackend(self, id, node, perm=perm, shared=Perm.ALL, what=what, pinned=True)
        async with self.lock:
            if self._nodes.get(node.name) is not node:
                raise VhostblkError(
                    f"Node '{node.name}' has been removed",
                    data={"code": "no-such-node", "node": node.name},
                )
            self.attach(drive)
        try:
            yield
        finally:
            async with self.lock:
                self.detach(drive)
                await self.drop([node])
                self.update_permissions()

    # ---- permissions

    def reconsider(self, nodes: Iterable[NodeDriver]) -> None:
        """The next update of permissions looks at these nodes and at their children.

        Any other node is looked at only if the permissions of a parent change, so that the work
        follows what is changed and not how large the tree is.
        """
        self._reconsidered.update(dict.fromkeys(nodes))

    def update_permissions(self, *changed: NodeDriver) -> None:
        """Work out permissions anew and put them in force; undone if there is a conflict.

        `changed` may want other things of their children than they did.
        """
        self.reconsider(changed)
        with self.new_permissions():
            pass

    @contextlib.contextmanager
    def new_permissions(self) -> Iterator[None]:
        """The same; what is done inside happens when they can be had, before they are in force."""
        concerned, self._reconsidered = self._reconsidered, {}
        prepared: list[NodeDriver] = []
        try:
            wanted = self._wanted_permissions(concerned)
            for node in wanted:
                self._check_uses(node, wanted)
            for node, permissions in wanted.items():
                if permissions == self._perms.get(node) and node not in concerned:
                    continue
                text = f"Node '{node.name}' ({node.driver}) cannot be used like that"
                with sentence(text, "permissions-failed", node):
                    node.prepare_permissions(*permissions)
                prepared.append(node)
            yield
        except BaseException:
            for node in prepared:
                node.abort_permissions()
            self._reconsidered = {**concerned, **self._reconsidered}
            raise
        for node in prepared:
            node.commit_permissions(*wanted[node])
        self._perms.update(wanted)

    def _wanted_permissions(self, concerned: Iterable[NodeDriver]) -> _Permissions:
        """Those of the nodes concerned, and of all below whose permissions change with them."""
        # Parents are made after their children: so most nodes come up once, after their parents.
        waiting = {node: None for node in reversed([*concerned]) if node in self._parents}
        passing_on = set(waiting)
        wanted: _Permissions = {}
        while waiting:
            node = next(iter(waiting))
            del waiting[node]
            before = wanted.get(node, self._perms.get(node))
            wanted[node] = _together(self._uses(node, wanted))
            if wanted[node] != before or node in passing_on:
                passing_on.discard(node)
                for child in self.children_of(node).values():
                    waiting[child.node] = None
        return wanted

    def _uses(self, node: NodeDriver, wanted: _Permissions) -> list[tuple[Edge, tuple[Perm, Perm]]]:
        """What each parent does to a node, and lets others do."""
        return [(edge, self._edge_permissions(edge, wanted)) for edge in self._parents[node]]

    def _check_uses(self, node: NodeDriver, wanted: _Permissions) -> None:
        """Raise if parents of a node do what others of them, or the node itself, do not allow."""
        if len(self._parents[node]) > 1:
            # The newest first: it is the one that gets told that it cannot have what it wants.
            uses = self._uses(node, wanted)[::-1]
            for (one, (perm, _)), (other, (_, shared)) in itertools.permutations(uses, 2):
                conflict = perm & ~shared & ~_between(one, other)
                if conflict:
                    raise VhostblkError(
                        f"Permission conflict on node '{node.name}': permissions "
                        f"'{perm_names(conflict)}' are both required by {one.describe()} (uses "
                        f"node '{node.name}' as '{one.role}' child) and unshared by "
                        f"{other.describe()} (uses node '{node.name}' as '{other.role}' child).",
                        data={"code": "permission-conflict", "node": node.name},
                    )
        if int(wanted[node][0]) & _WRITING and node.read_only:
            raise VhostblkError(
                f"Block node '{node.name}' is read-only",
                data={
                    "code": "read-only",
                    "node": node.name,
                    "users": [edge.parent.name for edge in self._parents[node]],
                },
            )

    def permissions_of_edge(self, edge: Edge) -> tuple[Perm, Perm]:
        """What one parent does to a node, and lets others do."""
        return self._edge_permissions(edge, {})

    def _edge_permissions(self, edge: Edge, wanted: _Permissions) -> tuple[Perm, Perm]:
        parent = edge.parent
        if isinstance(parent, BlockBackend):
            return parent.perm, parent.shared
        above = wanted.get(parent) or self.permissions_of(parent)
        return parent.child_permissions(parent.child_roles[edge.role.split(".")[0]], *above)

    # ---- changes under a running guest

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[Change]:
        """Change relations and options: all that is asked of the `Change` inside, or nothing.

        What is asked is checked at once and carried out at the end, in one drained
        section. Whoever calls this holds `lock`. See graph/change.py.
        """
        change = Change(self)
        try:
            yield change
        except BaseException:
            await change.abandon()
            raise
        await change.carry_out()

    @contextlib.asynccontextmanager
    async def drained(
        self,
        nodes: Iterable[NodeDriver],
        backends: Iterable[BlockBackend] = (),
        pause: Pause | Change | None = None,
    ) -> AsyncIterator[None]:
        """Inside, no request is in flight in what reaches `nodes`, and none will start.

        All drives above, and `backends`, are paused at the same time, and resumed on the
        way out whatever happens. Sections nest.
        """
        above, reaching = self.above(nodes)
        drives = list(dict.fromkeys([*backends, *reaching]))
        concerned = dict.fromkeys(above)
        for backend in drives:
            concerned.update(dict.fromkeys(self.below(backend.root)))
        # Background work on these nodes is let go of, too, where no drive is above.
        with self._steps.held(concerned), self.releasing(drives, above):
            await self._steps.ended(concerned, PAUSE_PATIENCE)
            handles = _handles(concerned)
            with no_collection():
                begun = time.perf_counter_ns()
                devices = await self._pause(drives)
                try:
                    # Python's own requests, too, have ended.
                    await self.engine.settle(handles)
                    yield
                finally:
                    for device in devices:
                        device.resume()
                    if pause is not None and devices:
                        pause.pause_us = (time.perf_counter_ns() - begun) // 1000

    async def _pause(self, drives: list[BlockBackend]) -> list[Device]:
        """Pause all of them, or give up if requests of one do not finish (storage hangs)."""
        pauses = {
            asyncio.ensure_future(_wait_for(drive.device.pause())): drive
            for drive in drives
            if drive.device is not None
        }
        late: list[BlockBackend] = []
        try:
            if pauses:
                await asyncio.wait(pauses, timeout=PAUSE_PATIENCE)
            late = [drive for pause, drive in pauses.items() if not pause.done()]
            if late:
                names = ", ".join(f"{drive.what} '{drive.name}'" for drive in late)
                raise VhostblkError(
                    f"Nothing was changed: requests of {names} have not finished for "
                    f"{PAUSE_PATIENCE:g} s; does the storage hang?",
                    data={"code": "pause-timeout", "exports": [drive.name for drive in late]},
                )
        except BaseException:
            for pause, drive in pauses.items():
                assert drive.device is not None
                # A pause that has begun must have happened to be undone.
                self._late_pauses[pause] = drive.device
                pause.add_done_callback(self._resume_late)
            raise
        return [drive.device for drive in drives if drive.device is not None]

    def _resume_late(self, pause: asyncio.Future[None]) -> None:
        self._late_pauses.pop(pause).resume()

    async def unpaused(self, device: Device) -> None:
        """Wait until no pause that was given up is still on its way."""
        late = [pause for pause, owner in self._late_pauses.items() if owner is device]
        if late:
            await asyncio.wait(late)
            await asyncio.sleep(0)  # for _resume_late()

    @contextlib.contextmanager
    def releasing(
        self, backends: Iterable[BlockBackend], nodes: Iterable[NodeDriver] = ()
    ) -> Iterator[None]:
        """Inside, none of these drives and nodes, and none below them, holds requests back."""
        section = _Releasing({})
        self._releasing.append(section)
        try:
            self._release(section, [*backends, *nodes])
            yield
        finally:
            self._releasing.remove(section)
            for place in section.reached:
                self._drains[place] -= 1
                if self._drains[place] == 0:
                    del self._drains[place]
                    _call(place.drain_end, f"drain_end() of '{place.name}'")

    def _release(self, section: _Releasing, places: Iterable[BlockBackend | NodeDriver]) -> None:
        """These, and all below them, belong to the section from now on."""
        waiting = list(places)
        for place in waiting:  # grows while it is walked
            if place in section.reached:
                continue
            section.reached[place] = None
            self._drains[place] = self._drains.get(place, 0) + 1
            if self._drains[place] == 1:
                _call(place.drain_begin, f"drain_begin() of '{place.name}'")
            waiting += [child.node for child in place.children.values()]

    def release_newcomers(self, nodes: Iterable[NodeDriver]) -> None:
        """These have other parents now: some may have come under drives that hold nothing back."""
        for section in self._releasing:
            for node in nodes:
                if any(edge.parent in section.reached for edge in self._parents[node]):
                    self._release(section, [node])

    def bottom_up(self, nodes: Iterable[NodeDriver] | None = None) -> list[NodeDriver]:
        """All nodes, or some and all that is above them: children before parents."""
        among = dict.fromkeys(self._nodes.values() if nodes is None else nodes)
        waiting = {
            node: sum(edge.parent in among for edge in self._parents[node]) for node in among
        }
        top_down = [node for node, parents in waiting.items() if parents == 0]
        for node in top_down:  # grows while it is walked
            for child in self._children[node].values():
                if child.node in waiting:
                    waiting[child.node] -= 1
                    if waiting[child.node] == 0:
                        top_down.append(child.node)
        return top_down[::-1]

    def relink(self) -> None:
        """Make the engine's picture that of the graph. What has changed is drained."""
        for node in self.bottom_up():
            node.relink()
        for backend in self._backends:
            backend.relink()

    async def resize(self, node: NodeDriver, size: int) -> None:
        """Change the size of a node, down to its storage, and tell everyone above."""
        if node.read_only:
            raise VhostblkError(
                f"Block node '{node.name}' is read-only",
                data={"code": "read-only", "node": node.name},
            )
        growing, parents = size > node.size, self._parents[node]
        for edge in parents:
            _, shared = self.permissions_of_edge(edge)
            if not shared & Perm.RESIZE and not (growing and edge.takes_growth):
                raise VhostblkError(
                    f"Node '{node.name}' cannot be resized: {edge.describe()} does not allow it",
                    data={"code": "permission-conflict", "node": node.name},
                )
        if growing and node.grows_in_use and parents and all(e.takes_growth for e in parents):
            # Requests that wait for room would never let a pause begin.
            await node.truncate(size)
            for edge in parents:
                _call(edge.grown, f"grown() of {edge.describe()}")
            return
        affected = self.below(node)
        async with self.drained(affected):
            above = self.bottom_up(self.above(affected)[0])
            try:
                await node.truncate(size)
            finally:
                self.refresh_sizes(above)
                for other in above:
                    _call(other.resized, f"resized() of node '{other.name}'")

    def refresh_sizes(self, nodes: Iterable[NodeDriver]) -> None:
        """Children of these nodes (in this order) may have other sizes; their drives are paused."""
        for node in nodes:
            for child in self._children[node].values():
                child.refresh()
        for backend in self._backends:
            backend.refresh_size()


def _together(uses: Iterable[tuple[Edge, tuple[Perm, Perm]]]) -> tuple[Perm, Perm]:
    """What all parents of a node do to it, and what none of them forbids to others."""
    perm, shared = Perm.NONE, Perm.ALL
    for _, (used, allowed) in uses:
        perm |= used
        shared &= allowed
    return perm, shared


def _between(one: Edge, other: Edge) -> Perm:
    """What the parent of `other` lets that of `one` do, besides what it lets everybody do."""
    if isinstance(one.parent, BlockBackend) or isinstance(other.parent, BlockBackend):
        return Perm.NONE
    return other.parent.shared_with(one.parent)


def _handles(nodes: Iterable[NodeDriver]) -> set[int]:
    """The engine halves."""
    return {node.handle.address for node in nodes if node.handle is not None}


def _log_failure(what: str, error: BaseException) -> None:
    """One line for the operator; the traceback for who wants it."""
    text = f"{type(error).__name__}: {error}{origin(error)}"
    logger.error("%s failed: %s", what, text, exc_info=logger.isEnabledFor(logging.DEBUG))


def _call(method: Callable[[], None], what: str) -> None:
    """Call what may be somebody else's code; its mistakes must not stop ours."""
    try:
        method()
    except (Exception, SystemExit) as error:
        _log_failure(what, error)


async def _wait_for(awaitable: Any) -> None:
    await awaitable
