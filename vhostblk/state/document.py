# SPDX-License-Identifier: GPL-2.0-or-later
"""What the state file says: objects, nodes, exports and jobs, as the options that make them.

Nodes are listed one by one, children first, and name their children: whatever
has become of the tree, each node is made once, and a chain of any length needs
no nesting. A node that went with its parent (`owned: false`: it was defined
inside the parent's options, or named by an image) does so again afterwards.

Secrets are not in it. An object that holds one is only mentioned, and must be
given on the command line again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from vhostblk import __version__
from vhostblk.graph import Graph, Parent
from vhostblk.nodes.driver import NodeDriver, Relations, RoleKind, present
from vhostblk.schema import Model, VhostblkError, validate
from vhostblk.state.file import StateFile

if TYPE_CHECKING:
    from vhostblk.backend import Backend

logger = logging.getLogger(__name__)

FORMAT = "vhostblk-state"
VERSION = 1


class NodeEntry(Model):
    """One node."""

    name: str
    owned: bool
    """Made by the operator; else it goes when its last parent does."""
    options: dict[str, Any]
    inherited: tuple[str, ...] = ()
    """Options that it took from its parent."""
    covered: bool = False
    """It is below a snapshot's overlay, and is to become read-only."""


class MentionedObject(Model):
    """An object with a secret."""

    qom_type: str
    id: str


class Document(Model):
    """The whole file."""

    format: Literal["vhostblk-state"]
    version: int
    program: str = ""
    objects: tuple[dict[str, Any], ...] = ()
    objects_with_secrets: tuple[MentionedObject, ...] = ()
    nodes: tuple[NodeEntry, ...] = ()
    exports: tuple[dict[str, Any], ...] = ()
    jobs: tuple[dict[str, Any], ...] = ()
    frozen_guests: tuple[str, ...] = ()
    """Sockets of agents that may have been asked to freeze, and not to thaw yet."""

    @classmethod
    def parse(cls, text: str, file: StateFile) -> Document:
        """The document in a state file, or an error that says what is wrong with it."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise file.error(
                f"it is broken, or no state file: {error}",
                hint="restore it from a copy, or remove it to start with the command line's tree",
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise file.error(
                f'it is the file of another program (no "format": "{FORMAT}")',
                hint="choose another file",
            )
        version = data.get("version")
        if version != VERSION:
            raise file.error(
                f"it has version {version!r}, and this vhostblk knows version {VERSION} only",
                hint="use the vhostblk that wrote it",
            )
        try:
            return validate(cls, data)
        except VhostblkError as error:
            raise file.error(
                error.desc,
                hint="restore it from a copy, or remove it to start with the command line's tree",
            ) from None

    def has_object(self, id: str) -> bool:
        """Whether an object can be made from what is written here."""
        return any(options.get("id") == id for options in self.objects)


# ---- writing


def describe(backend: Backend, children_of: Relations[Parent] = present) -> str:
    """The state of a backend, as the text of a state file; with other relations, if given."""
    objects, mentioned = [], []
    exports = [
        (export, children_of(export.backend)["root"])
        for export in backend.exports()
        if export.backend is not None
    ]
    for entry in backend.objects:
        options = entry.state_options()
        if options is None:
            mentioned.append({"qom-type": entry.qom_type, "id": entry.id})
        else:
            objects.append(options)
    members = {
        "format": json.dumps(FORMAT),
        "version": json.dumps(VERSION),
        "program": json.dumps(f"vhostblk {__version__}"),
        "objects": _array(map(_compact, objects)),
        "objects-with-secrets": _array(map(_compact, mentioned)),
        "nodes": _array(
            _node_text(backend, node, children_of(node))
            for node in _kept_nodes(backend.graph, [root for _, root in exports], children_of)
        ),
        "exports": _array(_compact(export.state_options(root)) for export, root in exports),
        "jobs": _array(_compact(entry) for entry in unfinished(backend)),
    }
    return _laid_out(members, backend.frozen_guests)


def with_frozen_guests(text: str, frozen: Iterable[str]) -> str:
    """The same document with other frozen guests: of a tree that is in the middle of a change."""
    members = json.loads(text)
    members.pop("frozen-guests", None)
    for name, value in members.items():
        members[name] = _array(map(_compact, value)) if isinstance(value, list) else _compact(value)
    return _laid_out(members, frozen)


def _laid_out(members: dict[str, str], frozen: Iterable[str]) -> str:
    sockets = [_compact(path) for path in frozen]
    if sockets:
        members["frozen-guests"] = _array(sockets)
    text = ",\n".join(f' "{name}": {value}' for name, value in members.items())
    return f"{{\n{text}\n}}\n"


def unfinished(backend: Backend) -> Iterable[dict[str, Any]]:
    """The jobs that are to go on after a restart."""
    for job in backend.jobs:
        options = job.state_options()
        if options is not None:
            yield {"type": job.job_type, "id": job.id, **options}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _array(entries: Iterable[str]) -> str:
    """One line each."""
    lines = ",\n  ".join(entries)
    return f"[\n  {lines}\n ]" if lines else "[]"


def _kept_nodes(
    graph: Graph, roots: Iterable[NodeDriver], children_of: Relations[NodeDriver]
) -> list[NodeDriver]:
    """Children first, else in the order in which they were made.

    Without those that are about to go with the parent they had.
    """
    needed: dict[NodeDriver, None] = {}
    waiting = [*(node for node in graph.nodes.values() if graph.is_owned(node)), *roots]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed[node] = None
            waiting += children_of(node).values()
    kept: dict[NodeDriver, None] = {}
    for top in graph.nodes.values():
        waiting = [top] if top in needed else []
        while waiting:
            node = waiting[-1]
            missing = [child for child in children_of(node).values() if child not in kept]
            if missing:
                waiting += reversed(missing)
            else:
                kept[waiting.pop()] = None
    return list(kept)


# Guests wait while this is written, and of a long chain only the end changes.
_texts: WeakKeyDictionary[NodeDriver, tuple[Any, Any, str]] = WeakKeyDictionary()


def _node_text(backend: Backend, node: NodeDriver, children: Mapping[str, NodeDriver]) -> str:
    graph, covered = backend.graph, node in backend.covered
    names = tuple((role, child.name) for role, child in children.items())
    given = tuple(graph.given_options(node))
    key = (node.name, names, graph.is_owned(node), given, covered)
    known = _texts.get(node)
    if known is None or known[0] is not node.options or known[1] != key:
        entry = _describe_node(graph, node, children)
        if covered:
            entry["covered"] = True
        known = _texts[node] = (node.options, key, _compact(entry))
    return known[2]


def _describe_node(
    graph: Graph, node: NodeDriver, children: Mapping[str, NodeDriver]
) -> dict[str, Any]:
    options = node.state_options()
    if not node.name.startswith("#"):
        options["node-name"] = node.name
    # Where it came from does not matter any more: children are the nodes they are now.
    for role, kind in node.child_roles.items():
        options.pop(role, None)
        if kind.many:
            options[role] = [
                child.name for name, child in children.items() if name.startswith(f"{role}.")
            ]
        elif role in children:
            options[role] = children[role].name
        elif kind.kind is RoleKind.BACKING:
            options[role] = None  # not the one that the image names
    given = graph.given_options(node)
    inherited = [
        name
        for name in options
        if name not in given
        and name not in node.child_roles
        and name not in ("driver", "node-name")
    ]
    entry: dict[str, Any] = {
        "name": node.name,
        "owned": graph.is_owned(node),
        "options": options,
    }
    if inherited:
        entry["inherited"] = inherited
    return entry


# ---- reading


async def restore(document: Document, backend: Backend, file: StateFile) -> None:
    """Make what the document describes, in a backend without nodes and exports."""
    for options in document.objects:
        with _about(file, f"object '{options.get('id')}'"):
            await backend.object_add(options)
    for mentioned in document.objects_with_secrets:
        if not backend.objects.has(mentioned.id, mentioned.qom_type):
            raise file.error(
                f"it refers to object '{mentioned.id}' of type '{mentioned.qom_type}', which "
                "holds a secret and is therefore not in the file",
                hint=f"give it again: --object {mentioned.qom_type},id={mentioned.id},…",
            )
    for node in document.nodes:
        with _about(file, f"node '{node.name}'"):
            if not node.name.startswith("#") and node.options.get("node-name") != node.name:
                raise VhostblkError("its options have another 'node-name'")
            await backend.restore_node(
                node.name, node.options, owned=node.owned, inherited=frozenset(node.inherited)
            )
    covered = [entry.name for entry in document.nodes if entry.covered]
    backend.expect_covered(covered)
    for options in document.exports:
        with _about(file, f"export '{options.get('id')}'"):
            await backend.block_export_add(options)
    for entry in document.jobs:
        try:
            with _about(file, f"job '{entry.get('id')}'"):
                await backend.restart_job(entry)
        except VhostblkError as error:  # which is no reason not to serve the disks
            logger.error("%s; it does not go on", error.desc)
    await backend.restore_covered(covered)
    backend.frozen_guests.take_over(document.frozen_guests)


class _about:
    """Errors say which entry of the file they are about."""

    def __init__(self, file: StateFile, what: str) -> None:
        self._file = file
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, VhostblkError):
            found = self._file.error(f"{self._what}: {error.desc}")
            found.data = {**(found.data or {}), **(error.data or {})}
            raise found from None
