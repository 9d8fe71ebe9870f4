# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk ls`: the backends that run here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vhostblk.cli import places
from vhostblk.cli.parser import Parser
from vhostblk.cli.table import table
from vhostblk.control.client import ControlClient, NotRunning

DESCRIPTION = "List the running backends that have a name, with their exports."

EPILOG = """\
A backend has a name if it serves an IMAGE or was given --name; others are
reached by the path of their control socket (--socket PATH).
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    found: list[dict[str, Any]] = []
    for place in places.running_places():
        try:
            with ControlClient(place.control_socket, timeout=5) as client:
                ids = [str(entry["id"]) for entry in client.execute("query-block-exports")]
                pid = client.peer_pid
        except (NotRunning, TimeoutError):
            continue  # it has just ended, or is stuck: then `status NAME` says so
        found.append(
            {"name": place.name, "pid": pid, "exports": ids, "control": place.control_socket}
        )
    if args.json:
        print(json.dumps(found))
        return 0
    rows = [[e["name"], str(e["pid"]), ",".join(e["exports"]) or "-", e["control"]] for e in found]
    print(table(["NAME", "PID", "EXPORTS", "CONTROL SOCKET"], rows), end="")
    return 0
