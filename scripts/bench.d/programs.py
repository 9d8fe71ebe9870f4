# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts what scripts/bench compares, and asks the kernel what it costs."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 20
STOP_SECONDS = 10

# A program that asks for more than this is broken, and a benchmark must end.
RUN_SECONDS = 120


class BenchError(Exception):
    """What went wrong, in a sentence for the person who asked."""


@dataclass
class Cost:
    """A process: CPU time of all its threads so far."""

    pid: int

    def cpu_ns(self) -> int:
        """CPU time in nanoseconds, exact where the kernel keeps schedstat."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
        return total

    def memory_mib(self) -> dict[str, float]:
        """Resident and proportional size in MiB."""
        sizes = {}
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss"):
                sizes[name.lower()] = int(rest.split()[0]) / 1024
        return sizes


@dataclass
class Backend:
    """A running backend: its socket and how long it took to listen there."""

    command: list[str]
    path: Path
    start_seconds: float
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def cost(self) -> Cost:
        return Cost(self.process.pid)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def backend(command: Sequence[str], path: Path, log: Path) -> Iterator[Backend]:
    """Runs `command` until the context ends; yields once `path` accepts connections."""
    path.unlink(missing_ok=True)
    with log.open("wb") as output:
        begin = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not _connects(path):
            if process.poll() is not None or time.monotonic() - begin > START_SECONDS:
                state = (
                    f"is not ready after {START_SECONDS} s"
                    if process.returncode is None
                    else f"ended with status {process.returncode}"
                )
                said = log.read_text(errors="replace").strip()
                raise BenchError(f"{command[0]} {state}\n    {' '.join(command)}\n    {said}")
            time.sleep(0.001)
        yield Backend(list(command), path, time.monotonic() - begin, process)
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip()
            raise BenchError(f"{command[0]} ended while it was measured\n    {said}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def vhostblk_command(
    program: Sequence[str],
    nodes: Sequence[str],
    path: Path,
    *,
    queues: int,
    iothreads: int,
    plugins: Sequence[str],
    objects: Sequence[str],
) -> list[str]:
    """`vhostblk serve` with so many I/O threads."""
    threads = [f"io{number}" for number in range(iothreads)]
    command = [*program, "serve"]
    for plugin in plugins:
        command += ["--plugin", plugin]
    for made in (*(f"iothread,id={thread}" for thread in threads), *objects):
        command += ["--object", made]
    for node in nodes:
        command += ["--blockdev", node]
    mapping = "".join(f",iothread.{number}={thread}" for number, thread in enumerate(threads))
    return [*command, "--export", _export(path, queues) + mapping]


def daemon_command(
    program: Sequence[str],
    nodes: Sequence[str],
    path: Path,
    *,
    queues: int,
    iothread: bool,
    objects: Sequence[str],
) -> list[str]:
    """qemu-storage-daemon, with an iothread (an export of it has no more) or in its main loop."""
    command = [*program]
    for made in (*(["iothread,id=io"] if iothread else []), *objects):
        command += ["--object", made]
    for node in nodes:
        command += ["--blockdev", node]
    return [*command, "--export", _export(path, queues) + (",iothread=io" if iothread else "")]


def _export(path: Path, queues: int) -> str:
    return (
        f"type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={path},"
        f"writable=on,num-queues={queues}"
    )


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def result_of(command: Sequence[str]) -> dict[str, Any]:
    """Runs the client or the limit; its JSON and how much of the time it was busy."""
    begin, cpu = time.monotonic(), _cpu_of_children()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=RUN_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"no end after {RUN_SECONDS} s: {' '.join(command)}") from None
    seconds = time.monotonic() - begin
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)}\n    {done.stderr.decode(errors='replace').strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    result["client-busy"] = round((_cpu_of_children() - cpu) / seconds, 3)
    return result


@contextlib.contextmanager
def idle_client(client: Path, path: Path) -> Iterator[None]:
    """A client that has done a few requests and now does nothing, until the context ends."""
    process = subprocess.Popen(
        [str(client), "--idle", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        if process.stdout.readline().strip() != b"idle":
            raise BenchError(f"the client could not connect to {path}")
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
