# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk status`: what a running backend does, and what it costs."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from vhostblk.cli import places
from vhostblk.cli.errors import NOT_RUNNING, CliError
from vhostblk.cli.parser import Parser, seconds
from vhostblk.cli.table import count, duration, size, table
from vhostblk.control.client import ControlClient

DESCRIPTION = """\
Show the exports and nodes of running backends, their rates over a short
interval, latencies since the start, and what the process uses.
"""

EPILOG = """\
examples:
  vhostblk status
  vhostblk status web1 --interval 5
  vhostblk status --json | jq '.[].exports'

Latencies are those of the device as the backend sees it: from taking a request
out of the guest's queue to giving it back.
"""

# QEMU's counters: what it calls an operation, and which of them move bytes.
_SHORT = {"read": "rd", "write": "wr", "flush": "flush", "discard": "unmap"}
_WITH_BYTES = ("read", "write", "discard")


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a backend (default: all that run)")
    parser.add_argument("--socket", metavar="PATH", help="a control socket, instead of NAME")
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=seconds,
        default=1.0,
        help="how long to measure rates; 0: do not (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.name is not None or args.socket is not None:
        sockets = [places.find_socket(args.name, args.socket)]
    else:
        sockets = [place.control_socket for place in places.running_places()]
        if not sockets:
            raise CliError("No backend is running here", status=NOT_RUNNING)
    clients = [ControlClient(socket) for socket in sockets]
    try:
        before = [_Sample(client) for client in clients]
        if args.interval > 0:
            time.sleep(args.interval)
        after = [_Sample(client) for client in clients] if args.interval > 0 else before
    finally:
        for client in clients:
            client.close()
    reports = [_report(*pair) for pair in zip(before, after, strict=True)]
    if args.json:
        print(json.dumps(reports))
    else:
        print("\n".join(_text(report) for report in reports), end="")
    return 0


class _Sample:
    """Everything the backend and the host say at one moment."""

    def __init__(self, client: ControlClient) -> None:
        import psutil

        self.path = client.path
        self.pid = client.peer_pid
        self.time = time.monotonic()
        self.version = client.greeting["version"]["package"]
        self.exports: list[dict[str, Any]] = client.execute("query-block-exports")
        self.nodes: list[dict[str, Any]] = client.execute("query-named-block-nodes")
        self.stats: list[dict[str, Any]] = client.execute("query-blockstats")
        self.threads: list[dict[str, Any]] = client.execute("query-iothreads")
        self.process: dict[str, Any] = {}
        self.cpu: dict[int, float] = {}
        try:
            process = psutil.Process(self.pid)
            self.cpu = {
                thread.id: thread.user_time + thread.system_time for thread in process.threads()
            }
            # What is resident includes the guest's memory, which is not ours.
            memory = process.memory_full_info()
            self.process = {
                "memory-private": memory.uss,
                "memory-rss": memory.rss,
                "open-files": process.num_fds(),
                "started": process.create_time(),
            }
        except psutil.Error:
            pass  # another user's process: then only what it says itself


def _report(before: _Sample, after: _Sample) -> dict[str, Any]:
    elapsed = after.time - before.time
    old = {_key(entry): entry for entry in before.stats}
    exports = []
    for export in after.exports:
        stats = next((s for s in after.stats if s.get("export") == export["id"]), None)
        entry = dict(export)
        if stats is not None:
            entry["operations"] = _operations(stats, old.get(_key(stats)), elapsed)
        exports.append(entry)
    threads = []
    for thread in after.threads:
        entry = dict(thread)
        number = thread.get("thread-id")
        if number in after.cpu and number in before.cpu and elapsed > 0.01:
            entry["cpu-percent"] = round(
                100 * (after.cpu[number] - before.cpu[number]) / elapsed, 1
            )
        threads.append(entry)
    return {
        "control": after.path,
        "pid": after.pid,
        "version": after.version,
        "interval": round(elapsed, 3),
        "process": after.process,
        "exports": exports,
        "nodes": after.nodes,
        "iothreads": threads,
    }


def _key(stats: dict[str, Any]) -> tuple[str, str]:
    return str(stats.get("export")), str(stats.get("node-name"))


def _operations(
    stats: dict[str, Any], old: dict[str, Any] | None, elapsed: float
) -> dict[str, Any]:
    result = {}
    for name, counted in stats["latency"].items():
        entry: dict[str, Any] = {
            "operations": counted["count"],
            "latency": {key: value for key, value in counted.items() if key != "histogram"},
        }
        short = _SHORT.get(name)
        if short is not None:
            entry["failed"] = stats["stats"][f"failed_{short}_operations"]
            entry["refused"] = stats["stats"][f"invalid_{short}_operations"]
        if name in _WITH_BYTES:
            entry["bytes"] = stats["stats"][f"{short}_bytes"]
        if old is not None and elapsed > 0.01:
            before = old["latency"][name]["count"]
            entry["per-second"] = round((counted["count"] - before) / elapsed, 1)
            if "bytes" in entry:
                moved = entry["bytes"] - old["stats"][f"{short}_bytes"]
                entry["bytes-per-second"] = round(moved / elapsed, 1)
        result[name] = entry
    return result


def _text(report: dict[str, Any]) -> str:
    process = report["process"]
    used = ""
    if process:
        up = duration(max(0.0, time.time() - process["started"]) * 1e9)
        used = (
            f", up {up}, {size(process['memory-private'])} of memory, "
            f"{process['open-files']} open files"
        )
    lines = [f"{report['version']}, pid {report['pid']}{used}\n  control: {report['control']}\n\n"]
    rows = []
    for export in report["exports"]:
        for name, entry in export.get("operations", {}).items():
            used = entry["operations"] or entry.get("refused")
            if not used and name not in ("read", "write"):
                continue
            latency = entry["latency"]
            rate = entry.get("bytes-per-second")
            rows.append(
                [
                    str(export["id"]),
                    name,
                    count(entry.get("per-second", 0)),
                    "-" if rate is None else size(rate) + "/s",
                    count(entry["operations"]),
                    count(entry["failed"]) if "failed" in entry else "-",
                    count(entry["refused"]) if "refused" in entry else "-",
                    *(
                        duration(latency.get(f"{point}-ns") if entry["operations"] else None)
                        for point in ("p50", "p99", "p99.9")
                    ),
                ]
            )
    lines.append(_exports(report["exports"]))
    if rows:
        head = [
            "  EXPORT",
            "OPERATION",
            "PER SECOND",
            "RATE",
            "TOTAL",
            "FAILED",
            "REFUSED",
            "P50",
            "P99",
            "P99.9",
        ]
        lines.append(table(head, [["  " + row[0], *row[1:]] for row in rows]) + "\n")
    nodes = [
        [
            f"  {node['node-name']}",
            str(node.get("drv", "")),
            size(node.get("image", {}).get("virtual-size", 0)),
            "read-only" if node.get("ro") else "read-write",
            str(node.get("file", "")),
        ]
        for node in report["nodes"]
    ]
    if nodes:
        lines.append(table(["  NODE", "DRIVER", "SIZE", "ACCESS", "FILE"], nodes) + "\n")
    lines.append(dedup_stores(report["nodes"]))
    threads = [
        [
            f"  {thread['id']}",
            str(thread.get("thread-id", "-")),
            str(thread.get("aio", "-")),
            str(thread.get("cpu-percent", "-")),
        ]
        for thread in report["iothreads"]
    ]
    if threads:
        lines.append(table(["  I/O THREAD", "TID", "AIO", "CPU %"], threads))
    return "".join(lines)


def dedup_stores(nodes: list[dict[str, Any]]) -> str:
    """Each store once, however many of its disks are in use."""
    stores = {node["dedup"]["metadata"]: node["dedup"] for node in nodes if "dedup" in node}
    rows = [
        [
            f"  {name}",
            size(store["logical"]),
            size(store["unique"]),
            size(store["compressed"]),
            size(store["physical"]),
            f"{store['ratio']:.2f}",
            count(store["hits-per-second"]),
            size(store["data-free"]),
            size(store["metadata-size"]),
            store["ledger"],
        ]
        for name, store in stores.items()
    ]
    if not rows:
        return ""
    head = ["  STORE", "LOGICAL", "UNIQUE", "COMPRESSED", "PHYSICAL", "RATIO", "HITS/S"]
    head += ["FREE", "METADATA", "LEDGER"]
    return table(head, rows) + "\n"


def _exports(exports: list[dict[str, Any]]) -> str:
    rows = []
    for export in exports:
        addr = export.get("addr") or {}
        rows.append(
            [
                f"  {export['id']}",
                str(export.get("node-name", "")),
                "connected" if export.get("connected") else "waiting",
                "read-write" if export.get("writable") else "read-only",
                str(addr.get("path", addr.get("str", "-"))),
            ]
        )
    if not rows:
        return "  no exports\n\n"
    return table(["  EXPORT", "NODE", "QEMU", "ACCESS", "SOCKET"], rows) + "\n"
