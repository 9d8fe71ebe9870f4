# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole graph as plain data: `query-block-graph`, and what draws it."""

from __future__ import annotations

from typing import Any

from vhostblk.engine import UpcallHandle
from vhostblk.graph.block_backend import BlockBackend
from vhostblk.graph.edge import Edge
from vhostblk.graph.graph import Graph
from vhostblk.nodes.driver import NodeDriver, Perm

_PERMS = (
    (Perm.CONSISTENT_READ, "consistent-read"),
    (Perm.WRITE, "write"),
    (Perm.WRITE_UNCHANGED, "write-unchanged"),
    (Perm.RESIZE, "resize"),
)


def describe_graph(graph: Graph) -> dict[str, Any]:
    """Drives, nodes and the relations between them."""
    nodes = dict.fromkeys(graph.open_nodes)
    return {
        "drives": [
            {"id": drive.name, "type": drive.what, **describe_drive(graph, drive)}
            for drive in graph.backends
        ],
        "nodes": [_describe_node(graph, node) for node in nodes],
        "edges": [
            _describe_edge(graph, edge, node)
            for node in nodes
            for edge in graph.parents_of(node)
            if isinstance(edge.parent, BlockBackend) or edge.parent in nodes
        ],
    }


def describe_drive(graph: Graph, drive: BlockBackend) -> dict[str, Any]:
    """Root, filters, and what is below them."""
    return {
        "node-name": drive.root.name,
        "size": drive.root.size,
        "writable": bool(drive.perm & Perm.WRITE),
        "filters": [node.name for node in drive.filters],
        "top-node-below-filters": drive.top_node_below_filters.name,
        "siblings": [node.name for node in drive.top_nodes_below_filters[1:]],
    }


def _describe_node(graph: Graph, node: NodeDriver) -> dict[str, Any]:
    perm, shared = graph.permissions_of(node)
    return {
        "node-name": node.name,
        "drv": node.driver,
        "file": node.filename(),
        "size": node.size,
        "ro": node.read_only,
        "filter": node.is_filter,
        "owned": graph.is_owned(node),
        "passive": node.handle is None,
        "engine": _engine_half(node),
        "draining": graph.is_drained(node),
        "siblings": [sibling.name for sibling in graph.siblings(node)],
        "perm": perm_list(perm),
        "shared-perm": perm_list(shared),
    }


def _engine_half(node: NodeDriver) -> dict[str, Any]:
    """Who serves requests: C alone, Python for some operations, or a node below."""
    entry = node
    while entry.handle is None:
        entry = next(iter(entry.children.values())).node
    if entry is not node:
        return {"kind": "none", "entry": entry.name}
    if isinstance(node.handle, UpcallHandle):
        return {"kind": "upcall", "entry": node.name, "operations": list(node.handle.operations)}
    return {"kind": "native", "entry": node.name}


def _describe_edge(graph: Graph, edge: Edge, node: NodeDriver) -> dict[str, Any]:
    perm, shared = graph.permissions_of_edge(edge)
    described = {
        "parent": edge.parent.name,
        "parent-type": "drive",
        "child": edge.role,
        "node-name": node.name,
        "perm": perm_list(perm),
        "shared-perm": perm_list(shared),
    }
    if isinstance(edge.parent, NodeDriver):
        role = edge.parent.child_roles[edge.role.partition(".")[0]]
        described.update({"parent-type": "node", "kind": role.kind.value})
    return described


def perm_list(perm: Perm) -> list[str]:
    """Permissions by the names of QEMU's BlockPermission."""
    return [name for bit, name in _PERMS if perm & bit]
