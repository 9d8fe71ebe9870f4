# SPDX-License-Identifier: GPL-2.0-or-later
"""A block graph, as `query-block-graph` gives it, as text, DOT and SVG.

The SVG layout is the simplest that works for trees: every node stands in the
row that its longest way from a root gives it, above the middle of its children;
one with several parents stands under the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from vhostblk.cli.table import size

_BOX_WIDTH, _BOX_HEIGHT = 190, 58
_GAP_X, _GAP_Y = 24, 56
_MARGIN = 20


class _Graph:
    """The answer, by name."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.drives: list[dict[str, Any]] = answer["drives"]
        self.nodes: dict[str, dict[str, Any]] = {
            node["node-name"]: {**node, "file": _printable(node["file"])}
            for node in answer["nodes"]
        }
        self.edges: list[dict[str, Any]] = answer["edges"]
        used = {edge["node-name"] for edge in self.edges}
        self.unused = [name for name in self.nodes if name not in used]
        self.below_filters = {
            name
            for drive in self.drives
            for name in (drive["top-node-below-filters"], *drive["siblings"])
        }

    def children(self, parent: str, kind: str) -> list[dict[str, Any]]:
        """The edges from a parent (`drive` or `node`), in the order of indices."""
        found = [e for e in self.edges if e["parent"] == parent and e["parent-type"] == kind]
        return sorted(found, key=_place)

    def marks(self, node: dict[str, Any]) -> list[str]:
        """What is worth saying about a node besides its name, driver and size."""
        marks = []
        if node["filter"]:
            marks.append("filter")
        if node["ro"]:
            marks.append("ro")
        if node["engine"]["kind"] == "none":
            marks.append("passive")
        if node["engine"]["kind"] == "upcall":
            marks.append("python: " + " ".join(node["engine"]["operations"]))
        return marks


def _printable(text: str) -> str:
    """File names may hold anything; terminals and XML may not."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _place(edge: dict[str, Any]) -> tuple[str, int]:
    role, _, index = edge["child"].partition(".")
    return role, int(index or 0)


def _edge_text(edge: dict[str, Any], permissions: bool) -> str:
    if not permissions:
        return str(edge["child"])
    return f"{edge['child']} ({' '.join(edge['perm']) or 'nothing'})"


# ---- text


def tree(answer: dict[str, Any], *, permissions: bool, lines: tuple[str, str, str, str]) -> str:
    """For a terminal."""
    graph = _Graph(answer)
    seen: set[str] = set()
    text: list[str] = []
    for drive in graph.drives:
        access = "writable" if drive["writable"] else "read-only"
        text.append(f"{drive['type']} {drive['id']}  {size(drive['size'])}, {access}")
        text += _branch(graph, drive["node-name"], lines[1], lines[3], seen, permissions, lines)
    if graph.unused:
        text.append("not exported:" if graph.drives else "nothing is exported:")
        for name in graph.unused:
            text += _branch(graph, name, "  ", "  ", seen, permissions, lines)
    return "".join(line + "\n" for line in text) or "there are no nodes\n"


def _branch(
    graph: _Graph,
    name: str,
    first: str,
    rest: str,
    seen: set[str],
    permissions: bool,
    lines: tuple[str, str, str, str],
) -> Iterator[str]:
    # A chain of overlays may be longer than Python likes to recurse.
    waiting = [(name, "", first, rest)]
    while waiting:
        name, role, first, rest = waiting.pop()
        node = graph.nodes[name]
        words = [f"{role}{node['drv']} {name}", size(node["size"])]
        words += graph.marks(node)
        if node["file"] and not graph.children(name, "node"):
            words.append(node["file"])
        if name in graph.below_filters:
            words.append("<- snapshots here")
        if name in seen:
            yield f"{first}{role}{node['drv']} {name}  (see above)"
            continue
        seen.add(name)
        yield first + "  ".join(words)
        child, last, down, nothing = lines
        edges = graph.children(name, "node")
        for edge in reversed(edges):
            final = edge is edges[-1]
            waiting.append(
                (
                    edge["node-name"],
                    f"{_edge_text(edge, permissions)}: ",
                    rest + (last if final else child),
                    rest + (nothing if final else down),
                )
            )


# ---- DOT


def dot(answer: dict[str, Any], *, permissions: bool) -> str:
    """For Graphviz."""
    graph = _Graph(answer)
    text = [
        "digraph vhostblk {",
        '  node [shape=box, style="rounded,filled", fillcolor="#f4f4f4", fontname="sans-serif"];',
        '  edge [fontname="sans-serif", fontsize=10];',
    ]
    for drive in graph.drives:
        label = f"{drive['type']} {drive['id']}\n{size(drive['size'])}"
        text.append(
            f"  {_quoted('drive:' + drive['id'])} [label={_quoted(label)}, shape=oval, "
            'fillcolor="#d8e8f8"];'
        )
    for name, node in graph.nodes.items():
        label = "\n".join(_lines_of(graph, node))
        text.append(
            f"  {_quoted('node:' + name)} [label={_quoted(label)}, "
            f'fillcolor="{_colour(graph, node)}"];'
        )
    for edge in graph.edges:
        start = _quoted(f"{edge['parent-type']}:{edge['parent']}")
        end = _quoted("node:" + edge["node-name"])
        label = _quoted(_edge_text(edge, permissions))
        text.append(f"  {start} -> {end} [label={label}];")
    siblings: set[frozenset[str]] = set()
    for name, node in graph.nodes.items():
        for other in node["siblings"]:
            if (pair := frozenset((name, other))) not in siblings:
                siblings.add(pair)
                text.append(
                    f"  {_quoted('node:' + name)} -> {_quoted('node:' + other)} "
                    "[dir=none, style=dashed, constraint=false];"
                )
    return "\n".join([*text, "}", ""])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _lines_of(graph: _Graph, node: dict[str, Any]) -> list[str]:
    return [
        f"{node['drv']} {node['node-name']}",
        size(node["size"]),
        ", ".join(graph.marks(node)),
    ]


def _colour(graph: _Graph, node: dict[str, Any]) -> str:
    if node["filter"]:
        return "#fdf0d0"
    return "#d9f2d9" if node["node-name"] in graph.below_filters else "#f4f4f4"


# ---- SVG


def svg(answer: dict[str, Any], *, permissions: bool) -> str:
    """For a browser."""
    graph = _Graph(answer)
    places = _layout(graph)
    columns = max((x for x, _ in places.values()), default=0) + 1
    rows = max((y for _, y in places.values()), default=0) + 1
    width = round(2 * _MARGIN + columns * (_BOX_WIDTH + _GAP_X) - _GAP_X)
    height = 2 * _MARGIN + rows * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
    ]
    for edge in graph.edges:
        text += _svg_edge(
            places[edge["parent-type"], edge["parent"]],
            places["node", edge["node-name"]],
            _edge_text(edge, permissions),
        )
    for drive in graph.drives:
        access = "writable" if drive["writable"] else "read-only"
        lines = [f"{drive['type']} {drive['id']}", f"{size(drive['size'])}, {access}", ""]
        text += _svg_box(places["drive", drive["id"]], lines, "#d8e8f8", radius=28, title="")
    for name, node in graph.nodes.items():
        text += _svg_box(
            places["node", name],
            _lines_of(graph, node),
            _colour(graph, node),
            radius=6,
            title=node["file"],
        )
    return "\n".join([*text, "</svg>", ""])


def _layout(graph: _Graph) -> dict[tuple[str, str], tuple[float, int]]:
    """Column (whole or half) and row of each drive and node."""
    below: dict[tuple[str, str], list[tuple[str, str]]] = {}
    parents: dict[tuple[str, str], int] = {("node", name): 0 for name in graph.nodes}
    roots = [("drive", drive["id"]) for drive in graph.drives]
    roots += [("node", name) for name in graph.unused]
    for key in [*roots[: len(graph.drives)], *parents]:
        kind, name = key
        below[key] = [("node", edge["node-name"]) for edge in graph.children(name, kind)]
        for child in below[key]:
            parents[child] += 1
    rows = dict.fromkeys(below, 0)
    ready = list(roots)
    for key in ready:  # parents before children; grows while it is walked
        for child in below[key]:
            rows[child] = max(rows[child], rows[key] + 1)
            parents[child] -= 1
            if parents[child] == 0:
                ready.append(child)
    columns: dict[tuple[str, str], float] = {}
    own: dict[tuple[str, str], list[tuple[str, str]]] = {}
    free = 0
    for root in roots:
        waiting, order = [root], []
        seen = {root}
        while waiting:
            key = waiting.pop()
            order.append(key)
            own[key] = [c for c in below[key] if c not in columns and c not in seen]
            own[key] = list(dict.fromkeys(own[key]))
            seen.update(own[key])
            waiting += reversed(own[key])
        for key in order:  # leaves from left to right
            if not own[key]:
                columns[key] = free
                free += 1
        for key in reversed(order):
            if own[key]:
                columns[key] = (columns[own[key][0]] + columns[own[key][-1]]) / 2
    return {key: (columns[key], rows[key]) for key in rows}


def _corner(place: tuple[float, int]) -> tuple[float, float]:
    column, row = place
    return _MARGIN + column * (_BOX_WIDTH + _GAP_X), _MARGIN + row * (_BOX_HEIGHT + _GAP_Y)


def _svg_box(
    place: tuple[float, int], lines: list[str], colour: str, *, radius: int, title: str
) -> Iterator[str]:
    x, y = _corner(place)
    yield "<g>"
    if title:
        yield f"<title>{escape(title)}</title>"
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="{radius}" '
        f'fill="{colour}" stroke="#555"/>'
    )
    for number, line in enumerate(lines):
        weight = ' font-weight="bold"' if number == 0 else ""
        yield (
            f'<text x="{x + _BOX_WIDTH / 2:g}" y="{y + 18 + 16 * number:g}" '
            f'text-anchor="middle"{weight}>{escape(_shortened(line))}</text>'
        )
    yield "</g>"


def _svg_edge(start: tuple[float, int], end: tuple[float, int], label: str) -> Iterator[str]:
    x1, y1 = _corner(start)
    x2, y2 = _corner(end)
    x1, y1, x2 = x1 + _BOX_WIDTH / 2, y1 + _BOX_HEIGHT, x2 + _BOX_WIDTH / 2
    yield (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#333" '
        'marker-end="url(#arrow)"/>'
    )
    yield (
        f'<text x="{(x1 + x2) / 2 + 4:g}" y="{(y1 + y2) / 2 + 4:g}" font-size="10" '
        f'fill="#333" stroke="#fff" stroke-width="3" paint-order="stroke">{escape(label)}</text>'
    )


def _shortened(line: str) -> str:
    return line if len(line) <= 30 else line[:29] + "…"
