# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk throttle`: see and change the limits of a disk in use."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from typing import Any

from vhostblk.cli import places
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser, did_you_mean, seconds
from vhostblk.cli.table import size as size_text
from vhostblk.cli.table import table
from vhostblk.control.client import ControlClient
from vhostblk.objects.throttle_group import ThrottleLimits
from vhostblk.schema import VhostblkError, parse_size, validate
from vhostblk.schema.model import NODE_NAME_MAX

DESCRIPTION = """\
Show or change how many operations and bytes a second a disk may do. A change holds at once, also
for requests that wait already. TARGET is a throttle group, a throttle node, or an export: then its
own group is meant, or else that of the uppermost throttle filter of its disk; a filter is inserted
if there is none.
"""

EPILOG = """\
examples:
  vhostblk throttle show
  vhostblk throttle show vda --interval 5
  vhostblk throttle set vda iops=500
  vhostblk throttle set vda iops=500 burst=2000 burst-seconds=30
  vhostblk throttle set vda bps-read=100M bps-write=50M
  vhostblk throttle set vda iops=off bps=off

Limits: iops and bps count all requests, iops-read, iops-write, bps-read and bps-write those of
one kind, flush flushes. Setting one kind of the two lifts the other. burst is what may pass in a
second after a pause, for the limits named with it: a number, or a multiple such as 4x.
burst-seconds is for how long at most. iops-size=16k makes a request of 64k count as four.
QAPI's own names (iops-total-max, ...) work, too.

'vhostblk --name' and '--socket' are as for 'vhostblk qmp'.
"""

_SHORT = {"iops": "iops-total", "bps": "bps-total", "flush": "iops-flush"}
_KNOWN = {name.replace("_", "-") for name in ThrottleLimits.model_fields}


def configure(parser: Parser) -> None:
    """Declare the commands and their options."""
    commands = parser.add_subparsers(
        parser_class=Parser, metavar="COMMAND", dest="throttle_command", required=True
    )
    show = commands.add_parser("show", help="show all groups", description="Show all groups.")
    show.add_argument("target", nargs="?", metavar="TARGET", help="this one only")
    show.add_argument(
        "--interval",
        metavar="SECONDS",
        type=seconds,
        default=1.0,
        help="how long to measure rates; 0: do not (default: 1)",
    )
    change = commands.add_parser(
        "set", help="change limits", description="Change limits.", epilog=EPILOG
    )
    change.add_argument("target", metavar="TARGET", help="a group, a throttle node or an export")
    change.add_argument("limits", nargs="+", metavar="LIMIT=VALUE", help="see the examples")
    for below in (show, change):
        below.add_argument("--name", help="the backend (see 'vhostblk ls')")
        below.add_argument("--socket", metavar="PATH", help="its control socket, instead of --name")
        below.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    wanted = _limits(args.limits) if args.throttle_command == "set" else None
    with ControlClient(places.find_socket(args.name, args.socket)) as client:
        if wanted is None:
            group = _find(client, args.target) if args.target else None
            groups = _measured(client, args.interval)
        else:
            group = _change(client, args.target, wanted)
            groups = client.execute("query-throttle-groups")
    groups = [entry for entry in groups if group is None or entry["id"] == group]
    if args.json:
        print(json.dumps(groups))
    elif not groups:
        print("there is no throttle group")
    else:
        rows = [[e["id"], _limits_text(e["limits"]), *_statistics(e), _users(e)] for e in groups]
        print(
            table(["GROUP", "LIMITS", "RATE", "PASSED", "WAITING", "HAVE WAITED", "USED BY"], rows),
            end="",
        )
    return 0


# ---- what is asked for


def _limits(words: list[str]) -> dict[str, int]:
    """`limits` of a throttle-group, from the words of the command line."""
    limits: dict[str, int] = {}
    burst: str | None = None
    seconds = 1
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise CliError(f"'{word}' is not LIMIT=VALUE, such as iops=500", status=USAGE)
        if name == "burst":
            burst = text
        elif name == "burst-seconds":
            seconds = _number(name, text)
        else:
            name = _SHORT.get(name, name)
            if name not in _KNOWN:
                names = sorted({*_SHORT, *_KNOWN, "burst", "burst-seconds"})
                raise CliError(
                    f"there is no limit '{name}'; there are: {', '.join(names)}"
                    f"{did_you_mean(name, names)}",
                    status=USAGE,
                )
            limits[name] = _number(name, text)
    for name in [name for name in limits if _is_average(name)]:
        # What is not said of a burst means: none.
        most = _burst(name, limits[name], burst) if burst and limits[name] else 0
        limits.setdefault(f"{name}-max", most)
        limits.setdefault(f"{name}-max-length", seconds if limits[f"{name}-max"] else 1)
        for other in _excluded(name, limits[name]):
            for suffix, nothing in (("", 0), ("-max", 0), ("-max-length", 1)):
                limits.setdefault(f"{other}{suffix}", nothing)
    if burst and not any(_is_average(name) and limits[name] for name in limits):
        raise CliError("burst= needs a limit next to it, such as iops=500", status=USAGE)
    return limits


def _is_average(name: str) -> bool:
    return name != "iops-size" and "-max" not in name


def _excluded(name: str, value: int) -> tuple[str, ...]:
    """What cannot be there at the same time: total, and either of read and write."""
    unit, _, what = name.partition("-")
    if what == "total":
        return (f"{unit}-read", f"{unit}-write")  # `iops=off` means all three
    return (f"{unit}-total",) if value and what in ("read", "write") else ()


def _burst(name: str, average: int, text: str) -> int:
    times = re.fullmatch(r"([0-9.]+)x", text)
    try:
        most = round(average * float(times[1])) if times else _number("burst", text)
        if times and not most:
            raise ValueError  # 0 would be no limit
        return most
    except ValueError:
        raise CliError(f"burst={text}: not a number, such as 2000 or 4x", status=USAGE) from None


def _number(name: str, text: str) -> int:
    if text == "off":
        return 0
    try:
        return parse_size(text)
    except ValueError:
        raise CliError(
            f"{name}={text}: not a number, such as 500, 4k or 100M, nor 'off'", status=USAGE
        ) from None


# ---- whose


def _change(client: ControlClient, target: str, limits: dict[str, int]) -> str:
    group = _find(client, target, may_insert=True)
    if group is not None:
        client.execute(
            "qom-set", {"path": f"/objects/{group}", "property": "limits", "value": limits}
        )
        return group
    group = _free_name(client, target)
    try:
        validate(ThrottleLimits, limits)  # nothing is made if it is refused
    except VhostblkError as error:
        raise CliError(error.desc, status=USAGE, data=error.data) from None
    client.execute("object-add", {"qom-type": "throttle-group", "id": group, "limits": limits})
    try:
        filter = {"driver": "throttle", "node-name": group, "throttle-group": group}
        client.execute("block-filter-insert", {"export-id": target, "filter": filter})
    except BaseException:
        client.execute("object-del", {"id": group})
        raise
    return group


def _free_name(client: ControlClient, target: str) -> str:
    """For a new group and its filter. One of an earlier filter may still be there."""
    taken = {entry["name"] for entry in client.execute("qom-list", {"path": "/objects"})}
    taken |= {entry["node-name"] for entry in client.execute("query-named-block-nodes")}
    name, number = f"throttle-{target}", 0
    while len(name) > NODE_NAME_MAX or name in taken:
        number += 1
        name = f"throttle-{number}"
    return name


def _find(client: ControlClient, target: str, *, may_insert: bool = False) -> str | None:
    """The group that TARGET means; None if that is an export without one, which may get one."""
    groups = [entry["id"] for entry in client.execute("query-throttle-groups")]
    if target in groups:
        return target
    node: Callable[[str], dict[str, Any] | None] = {
        entry["node-name"]: entry for entry in client.execute("query-named-block-nodes")
    }.get
    for export in client.execute("query-block-exports"):
        if export["id"] == target and "throttle-group" in export:
            return str(export["throttle-group"])
    for drive in client.execute("query-block-graph")["drives"]:
        if drive["id"] != target:
            continue
        for name in drive["filters"]:
            group = _group_of(node(name))
            if group is not None:
                return group
        if may_insert:
            return None
        raise CliError(f"the disk '{target}' has no throttle group")
    group = _group_of(node(target))
    if group is None:
        known = f"; groups: {', '.join(groups)}" if groups else ""
        raise CliError(f"there is no throttle group, throttle node or export '{target}'{known}")
    return group


def _group_of(node: dict[str, Any] | None) -> str | None:
    if node is None or node["drv"] != "throttle":
        return None
    return str(node["throttle-group"])


# ---- what is shown


def _measured(client: ControlClient, interval: float) -> list[dict[str, Any]]:
    """All groups; their statistics say what has passed a second, over an interval."""
    before: list[dict[str, Any]] = []
    begun = time.monotonic()
    if interval > 0:
        before = client.execute("query-throttle-groups")
        time.sleep(interval)
    after: list[dict[str, Any]] = client.execute("query-throttle-groups")
    add_rates(before, after, time.monotonic() - begun)
    return after


def add_rates(before: list[dict[str, Any]], after: list[dict[str, Any]], elapsed: float) -> None:
    """What passed a second, in groups that were there before."""
    old = {entry["id"]: entry["statistics"] for entry in before}
    for entry in after:
        for name, counted in entry["statistics"].items() if entry["id"] in old else ():
            for what, rate in (("requests", "per-second"), ("bytes", "bytes-per-second")):
                passed = counted[what] - old[entry["id"]][name][what]
                counted[rate] = round(passed / elapsed, 1)


def _limits_text(limits: dict[str, int]) -> str:
    words = []
    for name, value in limits.items():
        if not value or name.endswith("-length"):
            continue
        text = f"{name}={size_text(value) if name.startswith('bps') else value}"
        if limits.get(f"{name}-length", 1) > 1:
            text += f" for {limits[f'{name}-length']} s"
        words.append(text)
    return ", ".join(words) or "none"


def _statistics(group: dict[str, Any]) -> list[str]:
    all_of = group["statistics"].values()
    requests, length, queued, waited, nanoseconds = (
        sum(entry[name] for entry in all_of)
        for name in ("requests", "bytes", "queued", "waited", "waited-ns")
    )
    mean = f", {nanoseconds / waited / 1e6:.1f} ms each" if waited else ""
    passed = f"{requests} ({size_text(length)})"
    return [_rate_text(group), passed, str(queued), f"{waited}{mean}"]


def _rate_text(group: dict[str, Any]) -> str:
    all_of = group["statistics"].values()
    if any("per-second" not in entry for entry in all_of):
        return "-"
    requests, length = (
        sum(entry[name] for entry in all_of) for name in ("per-second", "bytes-per-second")
    )
    return f"{requests:.0f}/s ({size_text(length)}/s)"


def _users(group: dict[str, Any]) -> str:
    return ", ".join(group["users"]) or "-"
