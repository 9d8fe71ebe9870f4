# SPDX-License-Identifier: GPL-2.0-or-later
"""How exactly a throttle group keeps its limits, under clients that always want more.

The group's own count of requests is read twice; what it grew by, divided by the time between and
by the limit, should be 1. It is read when it has just grown, so that five seconds of ten requests
each are not off by a part of one, and again if the answer took long: it is not known when in that
time it was true. All limits are tried with one client on one queue, and with two disks
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
PRECISION_SECONDS = 0.01
SAMPLE_SECONDS = 20.0


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
            before, begin = _sample(connection)
            time.sleep(seconds)
            after, end = _sample(connection)
            worst = max(worst, 100 * abs((after - before) / ((end - begin) * limit) - 1))
        connection.close()
    return worst


def _set(connection: Control, limit: int) -> None:
    arguments = {"path": "/objects/g", "property": "limits", "value": {"iops-total": limit}}
    connection.command("qom-set", **arguments)


def _sample(connection: Control) -> tuple[int, float]:
    """The count, and when it became that, to PRECISION_SECONDS."""
    end = time.monotonic() + SAMPLE_SECONDS
    old, before = _passed(connection), time.monotonic()
    while before < end:
        time.sleep(PRECISION_SECONDS / 10)
        passed, now = _passed(connection), time.monotonic()
        if passed != old and now - before <= PRECISION_SECONDS:
            return passed, (before + now) / 2
        old, before = passed, now
    raise BenchError("no request passes, or the machine is too busy to say when")


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
