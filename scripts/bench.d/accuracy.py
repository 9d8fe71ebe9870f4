# SPDX-License-Identifier: GPL-2.0-or-later
"""How exactly a throttle group keeps its limits, under clients that always want more.

The group's own count of requests is read twice; what it grew by, divided by the time between and
by the limit, should be 1. All limits are tried with one client on one queue, and with two disks
that share the group, of four queues each, on two I/O threads.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from programs import BenchError, backend
from stall import Control

LIMITS = (10, 100, 1000, 10_000, 100_000)
SETTLE_SECONDS = 1.0  # the burst that follows a pause is over by then


def run(program: Sequence[str], client: Path, seconds: float, limits: Sequence[int]) -> float:
    """The largest deviation, in per cent."""
    worst = 0.0
    for disks, queues in ((1, 1), (2, 4)):
        with tempfile.TemporaryDirectory(prefix="vb") as work:
            worst = max(worst, _run(program, client, seconds, limits, disks, queues, Path(work)))
    return worst


def _run(
    program: Sequence[str],
    client: Path,
    seconds: float,
    limits: Sequence[int],
    disks: int,
    queues: int,
    work: Path,
) -> float:
    control = work / "qmp.sock"
    command = [*program, "serve", "--control", str(control)]
    command += ["--object", "iothread,id=io0", "--object", "iothread,id=io1"]
    command += ["--object", "throttle-group,id=g,limits.iops-total=1000"]
    sockets = [work / f"disk{disk}.sock" for disk in range(disks)]
    for disk, path in enumerate(sockets):
        command += ["--blockdev", f"null-co,node-name=null{disk},size=1G"]
        command += ["--blockdev", f"throttle,node-name=t{disk},throttle-group=g,file=null{disk}"]
        export = f"vhost-user-blk,id=e{disk},node-name=t{disk},addr.type=unix,addr.path={path}"
        threads = "iothread.0=io0,iothread.1=io1" if queues > 1 else "iothread=io0"
        command += ["--export", f"{export},writable=on,num-queues={queues},{threads}"]
    worst = 0.0
    duration = len(limits) * (seconds + SETTLE_SECONDS) + 30
    with backend(command, sockets[-1], work / "log"), contextlib.ExitStack() as clients:
        for path in sockets:
            clients.enter_context(_load(client, path, queues, duration))
        connection = Control(control)
        for limit in limits:
            _set(connection, limit)
            time.sleep(SETTLE_SECONDS)
            before, begin = _passed(connection), time.monotonic()
            time.sleep(seconds)
            passed, elapsed = _passed(connection) - before, time.monotonic() - begin
            worst = max(worst, 100 * abs(passed / (elapsed * limit) - 1))
        connection.close()
    return worst


def _set(connection: Control, limit: int) -> None:
    for iops in (0, limit):  # without debts from the limit before
        arguments = {"path": "/objects/g", "property": "limits", "value": {"iops-total": iops}}
        connection.command("qom-set", **arguments)


def _passed(connection: Control) -> int:
    [group] = connection.command("query-throttle-groups")
    return sum(entry["requests"] for entry in group["statistics"].values())


@contextlib.contextmanager
def _load(client: Path, path: Path, queues: int, seconds: float) -> Iterator[None]:
    command = [str(client), "--job", "randread", "--depth", "32", "--block-size", "4096"]
    command += ["--queues", str(queues), "--seconds", str(seconds), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise BenchError(f"ended with status {process.returncode}: {' '.join(command)}")
    finally:
        process.kill()
        process.wait()
