# SPDX-License-Identifier: GPL-2.0-or-later
"""One change of the graph under running guests: all of it happens, or nothing.

    async with graph.change() as change:
        overlay = await change.add({"driver": "qcow2", …})
        change.replace_node(old, overlay)
        change.set_child(overlay, "backing", old)
    print(change.pause_us)

Each step is checked against the graph as the steps before it will have left it,
and changes nothing yet. At the end of the block the change is carried out:

1. Nodes that are to have other options prepare for that (files are opened, …).
2. All drives above whatever is concerned are paused, at the same time.
3. Relations are changed, options are put in force, the engine's picture is
   linked anew, sizes and permissions are looked at.
4. The drives go on. What is not needed any more is closed.

Whatever is raised in 1 to 3, and in the block itself, brings back the old tree:
relations, options, permissions, and no node that was made for the change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.graph.block_backend import BlockBackend, split
from vhostblk.graph.edge import Edge, Parent
from vhostblk.graph.options import check_detect_zeroes, inherit, sentence
from vhostblk.nodes.driver import (
    Child,
    NodeDriver,
    NodeOptions,
    Perm,
    Relations,
    RoleKind,
    changed_options,
    present,
)
from vhostblk.origin import origin
from vhostblk.schema import VhostblkError, json_types, validate

if TYPE_CHECKING:
    from vhostblk.graph.graph import Graph

logger = logging.getLogger(__name__)

_INDEX = re.compile("0|[1-9][0-9]{0,3}")
Step = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Reopening:
    """New options for a node: checked, and as they were given."""

    options: NodeOptions
    given: dict[str, Any]


class Change:
    """What is asked of the graph. Made by `Graph.change()`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.allow_resize = False
        """Whether drives may have another size afterwards."""
        self.pause_us = 0
        """How long guests were held up, in microseconds; known afterwards."""
        self._plan: dict[Parent, dict[str, NodeDriver]] = {}
        self._reopenings: dict[NodeDriver, Reopening] = {}
        self._added: list[NodeDriver] = []
        self._deleted: list[NodeDriver] = []
        self._empty: set[NodeDriver] = set()
        self._inside: list[tuple[Step, Step | None]] = []
        self._around: list[AbstractAsyncContextManager[None]] = []
        self._after: list[Step] = []
        self._undo: list[Step] = []
        # While it is carried out:
        self._prepared: list[NodeDriver] = []
        self._writing: list[NodeDriver] = []
        self._moved: list[NodeDriver] = []
        self._undo_inside: list[Step] = []
        self._restore: Callable[[], None] | None = None
        self._disturbed: set[NodeDriver] = set()
        self._left: dict[NodeDriver, None] = {}
        self._untied: list[Child] = []
        self._tied: list[Child] = []

    # ---- the graph as it will be

    def node(self, name: str) -> NodeDriver:
        """The node called `name`."""
        node = self.graph.node(name)
        if node in self._deleted:
            raise VhostblkError(
                f"Failed to find node with node-name='{name}'; it is being deleted",
                data={"code": "no-such-node", "node": name},
            )
        return node

    def children_of(self, parent: Parent) -> Mapping[str, NodeDriver]:
        """The children of a node (or of a drive, which has one: `root`) by role."""
        if parent in self._plan:
            return self._plan[parent]
        return present(parent)

    def child(self, parent: Parent, role: str) -> NodeDriver:
        """One child, or an error that names those there are."""
        children = self.children_of(parent)
        if role not in children:
            raise _no_child(parent, role, children)
        return children[role]

    def parents_of(self, node: NodeDriver) -> list[tuple[Parent, str]]:
        """Who will use a node, and in what role."""
        found = [
            (edge.parent, edge.role)
            for edge in self.graph.parents_of(node)
            if self.children_of(edge.parent).get(edge.role) is node
        ]
        for parent, children in self._plan.items():
            for role, child in children.items():
                if child is node and (parent, role) not in found:
                    found.append((parent, role))
        return [(parent, role) for parent, role in found if parent not in self._deleted]

    def below(self, node: NodeDriver) -> list[NodeDriver]:
        """A node and everything it will reach."""
        found = {node: None}
        waiting = [node]
        while waiting:
            for child in self.children_of(waiting.pop()).values():
                if child not in found:
                    found[child] = None
                    waiting.append(child)
        return list(found)

    def top_nodes_below_filters(self, backend: BlockBackend) -> list[NodeDriver]:
        """What `BlockBackend.top_nodes_below_filters` will be."""
        root = self.children_of(backend)["root"]
        return split(root, self.children_of)[1]

    # ---- steps

    async def add(self, options: dict[str, Any], *, owned: bool = True) -> NodeDriver:
        """Make a node, now; it goes again if the change fails."""
        node = await self.graph.add(options, owned=owned)
        self._added.append(node)
        return node

    def delete(self, node: NodeDriver) -> None:
        """Remove a node that nobody will use."""
        self.node(node.name)
        users = [self._edge(parent, role) for parent, role in self.parents_of(node)]
        self.graph.check_deletable(node, users)
        self._deleted.append(node)

    def replace_child(self, parent: Parent, role: str, new: NodeDriver) -> None:
        """Put another node in the place of a child."""
        self.child(parent, role)
        self._planned(parent)[role] = self.node(new.name)

    def set_child(self, parent: NodeDriver, role: str, new: NodeDriver | None) -> None:
        """Add, replace or (with None) remove a child, where the driver's roles allow that."""
        name, _, index = role.partition(".")
        kind = parent.child_roles.get(name)
        children = self.children_of(parent)
        if kind is None or kind.many != (_INDEX.fullmatch(index) is not None):
            raise _no_child(parent, role, children if new is None else parent.child_roles)
        if new is not None:
            self._planned(parent)[role] = self.node(new.name)
            return
        if role not in children:
            raise _no_child(parent, role, children)
        if not kind.optional and not kind.many:
            raise VhostblkError(
                f"Child '{role}' of node '{parent.name}' cannot be removed: driver "
                f"'{parent.driver}' needs it",
                data={"code": "child-needed", "node": parent.name, "child": role},
            )
        del self._planned(parent)[role]

    def replace_node(
        self,
        old: NodeDriver,
        new: NodeDriver,
        *,
        only: Iterable[Parent] | None = None,
        keep: Iterable[Parent] = (),
    ) -> None:
        """Put `new` in the place of `old` with all parents, or with `only` some.

        Parents in `keep` keep `old`, and so does whatever is below `new`: else it
        would become its own child. A job that is about `old` stays there.
        """
        stay = [*keep, *self.below(new), *(edge.parent for edge in self._pinned(old))]
        for parent, role in self.parents_of(old):
            if parent not in stay and (only is None or parent in list(only)):
                self.replace_child(parent, role, new)

    def insert_filter(
        self, filter: NodeDriver, parent: Parent, role: str, inner: str = "file"
    ) -> None:
        """Put a filter between a parent and its child in `role`."""
        self._set_inner(filter, inner, self.child(parent, role))
        self.replace_child(parent, role, filter)

    def insert_filter_above(
        self, filter: NodeDriver, node: NodeDriver, inner: str = "file"
    ) -> None:
        """Put a filter between a node and all its parents."""
        self._set_inner(filter, inner, node)
        self.replace_node(node, filter)

    def remove_filter(self, filter: NodeDriver, inner: str | None = None) -> NodeDriver:
        """Give a filter's parents its child (in role `inner`) instead; the child."""
        if pinned := self._pinned(filter):
            self.graph.check_deletable(filter, pinned)
        children = {
            role: node
            for role, node in self.children_of(filter).items()
            if filter.child_roles[role.split(".")[0]].kind is RoleKind.FILTERED
        }
        if inner is None and len(children) != 1:
            raise VhostblkError(
                f"Node '{filter.name}' ({filter.driver}) has "
                + (f"{len(children)} children; which one stays?" if children else "no child")
                + (f" One of: {', '.join(children)}" if children else " that could take its place"),
                data={"code": "which-child", "node": filter.name, "allowed": list(children)},
            )
        inner = inner or next(iter(children))
        if inner not in children:
            raise _no_child(filter, inner, children)
        self.replace_node(filter, children[inner])
        return children[inner]

    def _pinned(self, node: NodeDriver) -> list[Edge]:
        """The jobs and commands that hold on to a node."""
        return [
            edge
            for edge in self.graph.parents_of(node)
            if isinstance(edge.parent, BlockBackend) and edge.parent.pinned
        ]

    def reopen(self, node: NodeDriver, options: dict[str, Any], *, keep: bool = False) -> None:
        """Give a node other options, as `blockdev-reopen` does.

        What `options` leave out goes back to its default, or with `keep` stays as it is. An
        option named like a child replaces that (the name of a node), removes it (None), or gives
        the child itself other options (an object).
        """
        if keep:
            options = {"driver": node.driver, **self._given(node), **options}
        self._reopen(node, options, "", frozenset(), keep_children=keep, asked=True)

    def _given(self, node: NodeDriver) -> dict[str, Any]:
        """The options of a node without those that name children, as planned so far."""
        reopening = self._reopenings.get(node)
        given = reopening.given if reopening else self.graph.given_options(node)
        return {name: value for name, value in given.items() if name not in node.child_roles}

    def _reopen(
        self,
        node: NodeDriver,
        options: dict[str, Any],
        where: str,
        inherited: frozenset[str],
        *,
        keep_children: bool,
        asked: bool,
    ) -> None:
        prefix = f"{where}." if where else ""
        if options.get("node-name", node.name) != node.name:
            raise _cannot_change(f"{prefix}node-name", node)
        if options.get("driver", node.driver) != node.driver:
            raise _cannot_change(f"{prefix}driver", node)
        whole = {name: value for name, value in options.items() if name != "node-name"}
        if keep_children:  # as what is said about them is not needed, but must not be missing
            whole = {**self._references(node), **whole}
        # What was given earlier may have been key=value, where numbers are text.
        with json_types(False) if keep_children else contextlib.nullcontext():
            checked = validate(type(node).Options, whole, where)
        check_detect_zeroes(type(node), checked, prefix)
        changed = [n for n in changed_options(node.options, checked) if n not in node.child_roles]
        if asked or changed or node in self._reopenings:
            given = {name: value for name, value in options.items() if name not in inherited}
            self._reopenings[node] = Reopening(checked, given)
        wanted = _wanted_children(node, options)
        for role in list(self.children_of(node)):
            name = role.partition(".")[0]
            if role in wanted:
                self._reopen_child(node, role, wanted.pop(role), options, prefix)
            elif name in options and not keep_children:
                self.set_child(node, role, None)
            elif keep_children or node.child_roles[name].kind is not RoleKind.BACKING:
                self._reopen_child(node, role, None, options, prefix)
            else:
                raise VhostblkError(
                    f"{role} is missing for '{node.name}': name the node, or null for none",
                    data={"code": "missing-parameter", "parameter": f"{prefix}{role}"},
                )
        for role, reference in wanted.items():
            if isinstance(reference, dict):
                raise VhostblkError(
                    f"Node '{node.name}' has no child '{role}' to reopen; "
                    "add a node with blockdev-add and name it here",
                    data={"code": "no-such-child", "node": node.name, "child": role},
                )
            self.set_child(node, role, self.node(reference))

    def _reopen_child(
        self,
        parent: NodeDriver,
        role: str,
        reference: str | dict[str, Any] | None,
        options: dict[str, Any],
        prefix: str,
    ) -> None:
        """`reference` is what the parent's new `options` say about it, if anything."""
        child = self.children_of(parent)[role]
        if isinstance(reference, str) and reference != child.name:
            self.set_child(parent, role, self.node(reference))
            return
        if isinstance(reference, dict):
            wanted, inherited = inherit(reference, options, type(parent))
            wanted.setdefault("driver", child.driver)
            self._reopen(
                child, wanted, f"{prefix}{role}", inherited, keep_children=False, asked=True
            )
        elif not self.graph.is_owned(child) and self.parents_of(child) == [(parent, role)]:
            # Defined inside its parent: what it does not say itself it takes from there.
            wanted, inherited = inherit(
                {"driver": child.driver, **self._given(child)}, options, type(parent)
            )
            self._reopen(
                child, wanted, f"{prefix}{role}", inherited, keep_children=True, asked=False
            )

    def _references(self, node: NodeDriver) -> dict[str, Any]:
        """A node's children as options would name them."""
        references: dict[str, Any] = {}
        for role, child in self.children_of(node).items():
            name, _, index = role.partition(".")
            if index:
                references.setdefault(name, []).append(child.name)
            else:
                references[name] = child.name
        return references

    def is_empty(self, overlay: NodeDriver) -> None:
        """Nothing has ever been written to this node: with a backing node it reads as that does."""
        self._empty.add(overlay)

    def inside(self, do: Step, undo: Step | None = None) -> None:
        """Run `do` in the pause, before anything is changed; `undo` if something fails later."""
        self._inside.append((do, undo))

    def around(self, context: AbstractAsyncContextManager[None]) -> None:
        """Enter `context` before the pause, and leave it at once after it, whatever happened."""
        self._around.append(context)

    def after(self, do: Step) -> None:
        """Run `do` when the change is complete and guests run again. It cannot fail."""
        self._after.append(do)

    def on_failure(self, undo: Step) -> None:
        """Run `undo` if the change fails, when the old tree is back."""
        self._undo.append(undo)

    def _planned(self, parent: Parent) -> dict[str, NodeDriver]:
        if parent not in self._plan:
            self._plan[parent] = dict(self.children_of(parent))
        return self._plan[parent]

    def _set_inner(self, filter: NodeDriver, inner: str, node: NodeDriver) -> None:
        kind = filter.child_roles.get(inner.split(".")[0])
        # What has nothing but the disk in its storage (luks, with its header elsewhere) can be
        # put above that as well.
        whole = filter.is_filter and filter.data_shift() == 0
        if kind is None or not (
            kind.kind is RoleKind.FILTERED or (kind.kind is RoleKind.STORAGE and whole)
        ):
            raise VhostblkError(
                f"Node '{filter.name}' cannot be put above '{node.name}': driver "
                f"'{filter.driver}' has no child '{inner}' whose data it passes on",
                data={"code": "not-a-filter", "node": filter.name},
            )
        self.set_child(filter, inner, node)

    def _edge(self, parent: Parent, role: str) -> Edge:
        return Edge(parent, Child(self.graph, role, self.children_of(parent)[role]))

    # ---- carrying it out

    async def carry_out(self) -> None:
        """Called by the graph. Goes on to its end, whichever it is, also if it is cancelled."""
        await _to_the_end(self._carry_out())

    async def abandon(self) -> None:
        """Called by the graph: the change is not to be."""
        await _to_the_end(self._abandon())

    async def _carry_out(self) -> None:
        try:
            self._forget_what_stays()
            self._check_cycles()
            try:
                for node, reopening in self._reopenings.items():
                    with sentence(f"Could not reopen node '{node.name}'", "reopen-failed", node):
                        await node.reopen_prepare(reopening.options)
                    self._prepared.append(node)
                if self._plan or self._reopenings or self._inside:
                    await self._expect_children()
                    async with AsyncExitStack() as around:
                        for context in self._around:
                            await around.enter_async_context(context)
                        await self._record_and_switch()
            except BaseException:
                await self._abort_reopenings()
                raise
        except BaseException:
            await self._abandon()
            raise
        await self._finish()

    async def _expect_children(self) -> None:
        """Guests run still: whoever will see other children does what is slow."""
        parents = [parent for parent in self._plan if isinstance(parent, NodeDriver)]
        for node in self.graph.above(parents)[0]:
            await node.expect_children(self.children_of)

    def _forget_what_stays(self) -> None:
        for parent, children in list(self._plan.items()):
            if children == present(parent):
                del self._plan[parent]

    def _check_cycles(self) -> None:
        for parent, children in self._plan.items():
            if isinstance(parent, BlockBackend):
                continue
            for role, node in children.items():
                if parent in self.below(node):
                    raise VhostblkError(
                        f"Making '{node.name}' a {role} child of '{parent.name}' would create "
                        "a cycle",
                        data={"code": "cycle", "node": node.name, "parent": parent.name},
                    )

    async def _record_and_switch(self) -> None:
        """What can be recorded before the pause does not make it longer."""
        undo: Step | None = None
        if self.graph.on_expected is not None and self._reads_the_same():
            undo = await self.graph.on_expected(self)
        try:
            await self._pause_and_switch()
        except BaseException:
            if undo is not None:
                with _logged("recording the old tree again"):
                    await undo()
            raise

    def _reads_the_same(self) -> bool:
        """Whether the new tree has the data of the old one, whatever guests write until the pause.

        So it is if empty overlays are put above nodes that do not grow, and nothing else is done.
        """
        if not self._empty or self._reopenings or self._deleted:
            return False
        return all(self._only_covers(parent, children) for parent, children in self._plan.items())

    def _only_covers(self, parent: Parent, children: Mapping[str, NodeDriver]) -> bool:
        before = present(parent)
        if parent in self._empty:
            return before.items() <= children.items()
        return before.keys() == children.keys() and all(
            node is before[role] or self._covers(node, before[role])
            for role, node in children.items()
        )

    def _covers(self, node: NodeDriver, below: NodeDriver) -> bool:
        grows = self.graph.permissions_of(below)[0] & Perm.RESIZE
        return (
            node in self._empty
            and below in self.children_of(node).values()
            and node.size == below.size
            and not grows
        )

    async def _pause_and_switch(self) -> None:
        graph = self.graph
        drives = [parent for parent in self._plan if isinstance(parent, BlockBackend)]
        nodes = [parent for parent in self._plan if isinstance(parent, NodeDriver)]
        nodes += [node for node in self._reopenings if node not in nodes]
        self._restore = graph.save_relations()
        async with graph.drained(nodes, drives, self):
            try:
                for do, undo in self._inside:
                    await do()
                    if undo is not None:
                        self._undo_inside.append(undo)
                await self._switch(nodes)
            except BaseException:
                await self._switch_back()
                raise

    async def _switch(self, nodes: list[NodeDriver]) -> None:
        graph = self.graph
        self._disturbed.update(graph.above(nodes)[0])
        places = dict.fromkeys([*nodes, *self._children_now_and_then()])
        # What has grown in use is not of this change's making.
        graph.refresh_sizes(graph.bottom_up(graph.above(places)[0]))
        sizes = {backend: backend.root.size for backend in graph.backends}
        moves = self._moves(nodes)
        for node in reversed(moves):
            with sentence(f"Could not move the data of node '{node.name}'", "move-failed", node):
                await node.before_move()
        for parent, children in self._plan.items():
            self._retie(parent, children)
        self._disturbed.update(graph.above(nodes)[0])
        for node, reopening in self._reopenings.items():
            graph.set_given_options(node, reopening.given)
        for node in self._deleted:
            graph.disown(node)
        for node in graph.bottom_up(graph.above(places)[0]):
            for child in graph.children_of(node).values():
                child.refresh()
            if node not in self._disturbed:
                continue
            text = f"Could not reopen node '{node.name}' ({node.driver})"
            with sentence(text, "reopen-failed", node):
                if node in self._reopenings:
                    await node.reopen_commit()
                node.children_changed()
                node.relink()
        self._check_sizes(sizes)
        graph.reconsider(self._disturbed)
        with graph.new_permissions():
            await self._begin_writing()
            await self._move(moves)
            for backend in graph.backends:
                backend.relink()
        graph.release_newcomers(places)
        if graph.on_switched is not None:
            # What guests write from now on must be found again after a crash.
            await graph.on_switched()
        for backend in graph.backends:
            backend.refresh_size()

    def _children_now_and_then(self) -> Iterator[NodeDriver]:
        for parent, children in self._plan.items():
            yield from present(parent).values()
            yield from children.values()

    async def _begin_writing(self) -> None:
        for node in self._reopenings:
            with sentence(f"Could not reopen node '{node.name}'", "reopen-failed", node):
                await node.begin_writing()
            self._writing.append(node)
        for node in self.graph.bottom_up(self._disturbed) if self._writing else ():
            node.relink()  # an engine half may be another one

    def _moves(self, nodes: list[NodeDriver]) -> dict[NodeDriver, dict[str, NodeDriver]]:
        """Formats whose data others will hold, and who does so now, by role; children first."""
        moves: dict[NodeDriver, dict[str, NodeDriver]] = {}

        for node in self.graph.above(nodes)[0]:
            planned = self.children_of(node)
            for role, child in present(node).items():
                if node.child_roles[role.split(".")[0]].kind is not RoleKind.STORAGE:
                    continue
                if role in planned and _holders(child, present) != _holders(
                    planned[role], self.children_of
                ):
                    moves.setdefault(node, {})[role] = child
        return moves

    async def _move(self, moves: Mapping[NodeDriver, Mapping[str, NodeDriver]]) -> None:
        for node, before in moves.items():
            self._moved.append(node)
            with sentence(f"Could not move the data of node '{node.name}'", "move-failed", node):
                await node.move(before)

    def _retie(self, parent: Parent, wanted: dict[str, NodeDriver]) -> None:
        for role, child in list(parent.children.items()):
            if role not in wanted:
                assert isinstance(parent, NodeDriver)
                self._untied.append(self.graph.untie(parent, role))
                self._left[child.node] = None
            elif wanted[role] is not child.node:
                self._left[child.node] = None
                self.graph.retie(child, wanted[role])
        if isinstance(parent, NodeDriver):
            for role, node in wanted.items():
                if role not in parent.children:
                    self._tied.append(self.graph.tie(parent, role, node))
            self.graph.sort_children(parent)

    def _check_sizes(self, before: Mapping[BlockBackend, int]) -> None:
        if self.allow_resize:
            return
        for backend, size in before.items():
            if backend.root.size != size:
                raise VhostblkError(
                    f"The size of {backend.what} '{backend.name}' would change from {size} to "
                    f"{backend.root.size} bytes; resize the new node first, or allow the change",
                    data={
                        "code": "size-mismatch",
                        "export": backend.name,
                        "size": size,
                        "new-size": backend.root.size,
                    },
                )

    async def _switch_back(self) -> None:
        """Still in the pause: the old tree again."""
        graph = self.graph
        while self._writing:
            node = self._writing.pop()
            with _logged(f"undoing the reopening of node '{node.name}'"):
                await node.stop_writing()
        await self._abort_reopenings()
        if self._restore is not None:
            self._restore()
            for child in self._tied:
                child.detach()
            for node in graph.bottom_up():
                for child in graph.children_of(node).values():
                    child.refresh()
                if node not in self._disturbed:
                    continue
                with _logged(f"putting back node '{node.name}'"):
                    node.children_changed()
                    node.relink()
            while self._moved:
                node = self._moved.pop()
                with _logged(f"moving back the data of node '{node.name}'"):
                    await node.move_back()
            for backend in graph.backends:
                backend.relink()
                backend.refresh_size()
            with _logged("putting back permissions"):
                graph.update_permissions()
        for undo in reversed(self._undo_inside):
            with _logged("undoing a change"):
                await undo()

    async def _abort_reopenings(self) -> None:
        while self._prepared:
            node = self._prepared.pop()
            with _logged(f"undoing the reopening of node '{node.name}'"):
                await node.reopen_abort()

    async def _abandon(self) -> None:
        for node in reversed(self._added):
            if node.name in self.graph.nodes:
                await self.graph.unmake(node)
        # Images that were created for the change are closed, and not written to any more.
        for undo in reversed(self._undo):
            with _logged("undoing a change"):
                await undo()
        with _logged("working out permissions"):
            self.graph.update_permissions()

    async def _finish(self) -> None:
        graph = self.graph
        # What Python itself began in the pause may still be on its way through the old tree.
        handles = {node.handle.address for node in self._disturbed if node.handle is not None}
        await asyncio.gather(*graph.engine.pending(handles), return_exceptions=True)
        for node in self._reopenings:
            with _logged(f"cleaning up after the reopening of node '{node.name}'"):
                await node.reopen_clean()
        for node in self._moved:
            with _logged(f"cleaning up after the move of the data of node '{node.name}'"):
                await node.moved()
        for child in self._untied:
            child.detach()
        await graph.drop(self._left)
        for node in self._deleted:
            await graph.unmake(node)
        with _logged("working out permissions"):
            graph.update_permissions()
        for do in self._after:
            with _logged("finishing a change"):
                await do()


class _logged:
    """What fails in here is reported; it must not keep the rest from being done."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        text = f"{type(error).__name__}: {error}{origin(error)}"
        logger.error("%s failed: %s", self._what, text, exc_info=logger.isEnabledFor(logging.DEBUG))
        return True


def _holders(node: NodeDriver, children_of: Relations[NodeDriver]) -> tuple[NodeDriver, NodeDriver]:
    """Who has the data that a node has: below filters that keep them, and at the very bottom."""
    while node.keeps_data:
        node = children_of(node)["file"]
    bottom = node
    while len(children := children_of(bottom)) == 1:
        [bottom] = children.values()
    return node, bottom


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; who is cancelled meanwhile waits for its end before he goes."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()  # nobody is there to be told
        raise


def _wanted_children(node: NodeDriver, options: dict[str, Any]) -> dict[str, str | dict[str, Any]]:
    """Children by role and index that options name or describe; None (no child) is left out."""
    found: dict[str, str | dict[str, Any]] = {}
    for name, kind in node.child_roles.items():
        value = options.get(name)
        if value is None:
            continue
        if kind.many:
            found.update({f"{name}.{index}": entry for index, entry in enumerate(value)})
        else:
            found[name] = value
    return found


def _cannot_change(option: str, node: NodeDriver) -> VhostblkError:
    return VhostblkError(
        f"Cannot change the option '{option}' of node '{node.name}' ({node.driver})",
        data={"code": "cannot-change", "node": node.name, "parameter": option},
    )


def _no_child(parent: Parent, role: str, known: Iterable[str]) -> VhostblkError:
    what = parent.what if isinstance(parent, BlockBackend) else "Node"
    names = list(known)
    text = f"{what[0].upper()}{what[1:]} '{parent.name}' has no child '{role}'"
    text += f"; its children: {', '.join(names)}" if names else ""
    data: dict[str, Any] = {"code": "no-such-child", "node": parent.name, "child": role}
    return VhostblkError(text, data=data).suggest(role, names)
