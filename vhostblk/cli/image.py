# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands about live images have in common: which backend, which image."""

from __future__ import annotations

import argparse
from typing import Any

from vhostblk.cli import places
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser
from vhostblk.control.client import ControlClient


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument(
        "device",
        nargs="?",
        metavar="NODE|EXPORT",
        help="a node by name, or the image below the filters of an export; not needed if the "
        "backend has one export",
    )
    parser.add_argument("--name", help="the backend (see 'vhostblk ls')")
    parser.add_argument("--socket", metavar="PATH", help="its control socket, instead of --name")
    parser.add_argument("--json", action="store_true", help="for programs")


def connect(args: argparse.Namespace, timeout: float = 600.0) -> ControlClient:
    """The backend's control socket; a check may take its time."""
    return ControlClient(places.find_socket(args.name, args.socket), timeout=timeout)


def device_of(args: argparse.Namespace, client: ControlClient) -> str:
    """The node or export that is meant."""
    if args.device is not None:
        return str(args.device)
    exports: list[dict[str, Any]] = client.execute("query-block-exports")
    if len(exports) == 1:
        return str(exports[0]["id"])
    names = ", ".join(entry["id"] for entry in exports) or "none"
    raise CliError(f"which image? The exports of this backend: {names}", status=USAGE)
