# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk map`: where the data of an image in use are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from vhostblk.cli import image
from vhostblk.cli.parser import Parser
from vhostblk.cli.table import table
from vhostblk.control.client import ControlClient

DESCRIPTION = """\
Print where the data of an image are, extent by extent, while guests use it. What
is not on disk yet is known, too. For an image that nobody uses there is
'qemu-img map'.
"""

EPILOG = """\
examples:
  vhostblk map
  vhostblk map vda --json

'depth' counts backing files: 0 is the image asked, 1 the one below it. The
members of --json are those of 'qemu-img map --output=json'.
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    image.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with image.connect(args) as client:
        device = image.device_of(args, client)
        extents = list(_extents(client, device))
    if args.json:
        print(json.dumps(extents))
        return 0
    head = ["OFFSET", "LENGTH", "DEPTH", "KIND", "AT", "FILE"]
    rows: list[list[str]] = []
    for entry in extents:
        rows.append(
            [
                f"{entry['start']:#x}",
                f"{entry['length']:#x}",
                str(entry["depth"]),
                _kind(entry),
                f"{entry['offset']:#x}" if "offset" in entry else "",
                entry.get("filename", ""),
            ]
        )
    print(table(head, rows), end="")
    return 0


def _extents(client: ControlClient, device: str) -> Iterator[dict[str, Any]]:
    offset = 0
    while True:
        answer = client.execute("block-image-map", {"device": device, "offset": offset})
        yield from answer["extents"]
        if "next-offset" not in answer:
            return
        offset = answer["next-offset"]


def _kind(entry: dict[str, Any]) -> str:
    if entry["compressed"]:
        return "compressed"
    if entry["zero"]:
        return "zero" if entry["present"] else "unallocated"
    return "data" if entry["data"] else "unallocated"
