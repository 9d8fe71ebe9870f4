# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk graph`: the tree of a running backend, drawn."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vhostblk.cli import places
from vhostblk.cli.drawing import dot, svg, tree
from vhostblk.cli.parser import Parser
from vhostblk.control.client import ControlClient

DESCRIPTION = """\
Draw the block graph of a running backend: exports, filters, formats, storage,
and how they hang together at this moment.
"""

EPILOG = """\
examples:
  vhostblk graph
  vhostblk graph web1 --permissions
  vhostblk graph --svg --output graph.svg
  vhostblk graph --dot | dot -Tpdf > graph.pdf

Marks in the tree: 'filter' stays on top when a snapshot is taken; '<- snapshots
here' is what a snapshot of the drive replaces, with all others that bear the
mark; 'python' names operations that a filter in Python handles; 'passive' is a
node that requests do not pass through now; 'ro' is read-only.
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="the backend (see 'vhostblk ls')")
    parser.add_argument("--socket", metavar="PATH", help="its control socket, instead of NAME")
    parser.add_argument(
        "--permissions", action="store_true", help="what each parent does to its child"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--dot", action="store_true", help="in the language of Graphviz")
    form.add_argument("--svg", action="store_true", help="as a picture")
    form.add_argument("--json", action="store_true", help="the answer of query-block-graph")
    parser.add_argument("--output", metavar="FILE", help="write to a file")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with ControlClient(places.find_socket(args.name, args.socket)) as client:
        graph = client.execute("query-block-graph")
    if args.json:
        text = json.dumps(graph, indent=2) + "\n"
    elif args.dot:
        text = dot(graph, permissions=args.permissions)
    elif args.svg:
        text = svg(graph, permissions=args.permissions)
    else:
        encoding = "utf-8" if args.output else (sys.stdout.encoding or "ascii")
        text = tree(graph, permissions=args.permissions, lines=_lines(encoding))
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _lines(encoding: str) -> tuple[str, str, str, str]:
    """What branches are drawn with: a child, the last one, and what is left of their children."""
    lines = ("├─ ", "└─ ", "│  ", "   ")
    try:
        "".join(lines).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ("|- ", "`- ", "|  ", "   ")
    return lines
