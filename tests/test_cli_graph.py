# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk graph`: the tree of a running backend as text, DOT and SVG."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vhostblk.cli.drawing import dot, svg, tree

LINES = ("├─ ", "└─ ", "│  ", "   ")
ASCII = ("|- ", "`- ", "|  ", "   ")


def node(name: str, drv: str = "raw", **members: Any) -> dict[str, Any]:
    return {
        "node-name": name,
        "drv": drv,
        "file": "",
        "size": 1 << 30,
        "ro": False,
        "filter": False,
        "engine": {"kind": "native", "entry": name},
        "siblings": [],
        **members,
    }


def edge(parent: str, child: str, role: str = "file", kind: str = "node") -> dict[str, Any]:
    return {
        "parent": parent,
        "parent-type": kind,
        "child": role,
        "node-name": child,
        "perm": ["consistent-read", "write"],
    }


LEGS = ("a", "b", "c")
GRAPH: dict[str, Any] = {
    "drives": [
        {
            "id": "web1",
            "type": "export",
            "node-name": "q",
            "size": 1 << 30,
            "writable": True,
            "filters": ["q", "t"],
            "top-node-below-filters": "a",
            "siblings": ["b", "c"],
        }
    ],
    "nodes": [
        *(node(name, siblings=[n for n in LEGS if n != name]) for name in LEGS),
        *(node(f"{name}-file", "file", file=f"/srv/<{name}>.img", ro=name == "c") for name in LEGS),
        node("q", "quorum", filter=True),
        node(
            "t", "delay", filter=True,
            engine={"kind": "upcall", "entry": "t", "operations": ["read", "write"]},
        ),
        node("spare", "delay", filter=True, engine={"kind": "none", "entry": "a"}),
    ],
    "edges": [
        edge("web1", "q", "root", "drive"),
        edge("q", "c", "children.10"),
        edge("q", "a", "children.2"),
        edge("q", "t", "children.9"),
        edge("t", "b"),
        *(edge(name, f"{name}-file") for name in LEGS),
        edge("spare", "a"),
    ],
}  # fmt: skip

TREE = """\
export web1  1 GiB, writable
└─ quorum q  1 GiB  filter
   ├─ children.2: raw a  1 GiB  <- snapshots here
   │  └─ file: file a-file  1 GiB  /srv/<a>.img
   ├─ children.9: delay t  1 GiB  filter  python: read write
   │  └─ file: raw b  1 GiB  <- snapshots here
   │     └─ file: file b-file  1 GiB  /srv/<b>.img
   └─ children.10: raw c  1 GiB  <- snapshots here
      └─ file: file c-file  1 GiB  ro  /srv/<c>.img
not exported:
  delay spare  1 GiB  filter  passive
  └─ file: raw a  (see above)
"""


def test_tree() -> None:
    assert tree(GRAPH, permissions=False, lines=LINES) == TREE
    plain = tree(GRAPH, permissions=True, lines=ASCII)
    assert plain.isascii() and "|- children.2 (consistent-read write): raw a" in plain
    empty = {"drives": [], "nodes": [], "edges": []}
    assert tree(empty, permissions=False, lines=LINES) == "there are no nodes\n"


def test_dot() -> None:
    text = dot(GRAPH, permissions=False)
    edges = re.findall(r'"(\S+)" -> "(\S+)" \[label="(\S+)"\]', text)
    expected = {
        (f"{e['parent-type']}:{e['parent']}", f"node:{e['node-name']}", e["child"])
        for e in GRAPH["edges"]
    }
    assert set(edges) == expected
    siblings = re.findall(r'"node:(\S+)" -> "node:(\S+)" \[dir=none', text)
    assert sorted(siblings) == [("a", "b"), ("a", "c"), ("b", "c")]
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=text, text=True, check=True, capture_output=True)


def boxes(text: str) -> dict[str, tuple[float, float, float, float]]:
    root = ElementTree.fromstring(text)
    space = {"s": "http://www.w3.org/2000/svg"}
    found = {}
    for group in root.findall("s:g", space):
        rect, name = group.find("s:rect", space), group.find("s:text", space)
        assert rect is not None and name is not None and name.text is not None
        x, y, width, height = (float(rect.attrib[a]) for a in ("x", "y", "width", "height"))
        found[name.text.split()[1]] = (x, y, x + width, y + height)
    assert all(
        right <= float(root.attrib["width"]) and bottom <= float(root.attrib["height"])
        for _, _, right, bottom in found.values()
    )
    return found


def test_svg() -> None:
    text = svg(GRAPH, permissions=True)
    places = boxes(text)
    assert set(places) == {"web1"} | {n["node-name"] for n in GRAPH["nodes"]}
    names = list(places)
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            (x1, y1, x2, y2), (u1, v1, u2, v2) = places[one], places[other]
            assert x2 <= u1 or u2 <= x1 or y2 <= v1 or v2 <= y1, (one, other)
    for relation in GRAPH["edges"]:  # parents above their children
        assert places[relation["parent"]][3] < places[relation["node-name"]][1]
    assert places["a"][0] < places["t"][0] < places["c"][0]
    assert "/srv/&lt;a&gt;.img" in text


def test_file_names_of_any_kind() -> None:
    graph = {"drives": [], "nodes": [node("n", file='/x/\x1b[2J\n"\x00<')], "edges": []}
    text = tree(graph, permissions=False, lines=LINES)
    assert text.endswith('/x/?[2J?"?<\n') and text.count("\n") == 2
    assert set(boxes(svg(graph, permissions=False))) == {"n"}


def test_a_long_chain() -> None:
    """More overlays than Python would recurse into."""
    names = [f"n{number}" for number in range(1500)]
    graph = {
        "drives": [],
        "nodes": [node(name) for name in names],
        "edges": [edge(*pair) for pair in pairwise(names)],
    }
    assert tree(graph, permissions=False, lines=LINES).count("\n") == 1501
    assert len(boxes(svg(graph, permissions=False))) == 1500


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_command(start_backend: Any, short_dir: Path, encoding: str) -> None:
    image = short_dir / "disk.img"
    image.write_bytes(bytes(1 << 20))
    start_backend(str(image), "--control", "{dir}/q")

    def graph(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vhostblk", "graph", "--socket", str(short_dir / "q"), *options],
            capture_output=True, text=True, check=True, timeout=60, encoding="utf-8",
            env={"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        return done.stdout

    text = graph()
    assert text.startswith("export disk  1 MiB, writable\n")
    assert f"file: file disk-file  1 MiB  {image}" in text
    assert ("└─" in text) == (encoding == "utf-8")
    assert json.loads(graph("--json"))["drives"][0]["id"] == "disk"
    assert graph("--dot").startswith("digraph")
    assert graph("--svg", "--output", str(short_dir / "g.svg")) == ""
    assert set(boxes((short_dir / "g.svg").read_text())) == {"disk", "disk-file"}
