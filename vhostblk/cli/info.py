# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk info`: what an image in use is."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from vhostblk.cli import image
from vhostblk.cli.errors import CliError
from vhostblk.cli.parser import Parser, did_you_mean
from vhostblk.cli.table import table

DESCRIPTION = """\
Say what an image in use is: format, sizes, backing files, features. For an image that
nobody uses there is 'qemu-img info'.
"""

EPILOG = """\
examples:
  vhostblk info
  vhostblk info vda --json
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    image.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with image.connect(args) as client:
        node = _node(image.device_of(args, client), client)
    facts: dict[str, Any] = node.get("image") or {
        "filename": node["file"],
        "format": node["drv"],
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"node: {node['node-name']}")
    for name, value in facts.items():
        if name == "format-specific":
            for key, detail in value["data"].items():
                print(f"  {key}: {_text(detail)}")
        elif name == "snapshots":
            _print_snapshots(value)
        else:
            print(f"{name}: {_text(value)}")
    return 0


def _node(device: str, client: Any) -> dict[str, Any]:
    """The node called `device`, or the image below the filters of that export."""
    drives = {
        drive["device"]: drive["top-node-below-filters"] for drive in client.execute("query-block")
    }
    nodes: list[dict[str, Any]] = client.execute("query-named-block-nodes")
    for node in nodes:
        if node["node-name"] == drives.get(device, device):
            return node
    names = [*drives, *(node["node-name"] for node in nodes)]
    near = did_you_mean(device, names) or "; 'vhostblk graph' shows those there are"
    if os.path.exists(device):
        near = f"; for an image that nobody uses there is 'qemu-img info {device}'"
    raise CliError(f"there is no node or export '{device}'{near}")


def _text(value: Any) -> str:
    # Text from an image may be anything, and this is somebody's terminal.
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _print_snapshots(snapshots: list[dict[str, Any]]) -> None:
    rows = [
        [
            _text(entry["id"]),
            _text(entry["name"]),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["date-sec"])),
            str(entry["vm-state-size"]),
        ]
        for entry in snapshots
    ]
    print("snapshots:")
    print(table(["ID", "NAME", "DATE", "VM STATE"], rows, indent="  "), end="")
