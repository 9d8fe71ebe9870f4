# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that works all the time while snapshots of its whole drive are taken.

The drive has several legs under a quorum. The longest latency that the client saw is the longest
stall, whatever its cause; a run without snapshots says what the machine itself contributes. The
longest latency after each single snapshot tells more: a machine that takes the CPU away for
some milliseconds now and then spoils the longest of all, and not their median.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programs import BenchError, backend, result_of

TMPFS = Path("/dev/shm")
FIRST_SECONDS = 1.0  # before the first snapshot: the client's warm-up, and a while of nothing


@dataclass(frozen=True)
class Drive:
    """What is snapshotted, under which load."""

    legs: int = 3
    format: str = "qcow2"
    mib: int = 64
    job: str = "randwrite"
    depth: int = 32
    seconds: float = 6.0
    state: bool = False  # with a state file


class Control:
    """The control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        self._file.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a command; events are skipped."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise BenchError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


def _make_legs(directory: Path, drive: Drive) -> list[str]:
    """The images, filled, and the options of the tree."""
    nodes = []
    for leg in range(drive.legs):
        path = directory / f"leg{leg}.img"
        raw = path if drive.format == "raw" else path.with_suffix(".raw")
        with raw.open("wb") as file:
            for _ in range(drive.mib):
                file.write(b"\x5a" * (1 << 20))
        if raw != path:
            convert = ["qemu-img", "convert", "-f", "raw", "-O", drive.format]
            subprocess.run([*convert, str(raw), str(path)], check=True)
            raw.unlink()
        file_options = f"file.driver=file,file.filename={path}"
        nodes.append(f"driver={drive.format},node-name=leg{leg},{file_options}")
    children = ",".join(f"children.{leg}=leg{leg}" for leg in range(drive.legs))
    votes = drive.legs // 2 + 1
    nodes.append(f"driver=quorum,node-name=disk,{children},vote-threshold={votes}")
    return nodes


@dataclass(frozen=True)
class Taken:
    """One snapshot."""

    at_ns: int
    """When it was asked for (CLOCK_MONOTONIC)."""
    pause_us: int


def _take(control: Path, drive: Drive, snapshots: int) -> list[Taken]:
    """Snapshots at even distances, as long as the client works."""
    begun = time.monotonic()
    connection = Control(control)
    taken = []
    for number in range(snapshots):
        at = begun + FIRST_SECONDS + number * (drive.seconds - FIRST_SECONDS) / snapshots
        time.sleep(max(0.0, at - time.monotonic()))
        asked = time.monotonic_ns()
        answer = connection.command("blockdev-snapshot-sync", device="disk")
        taken.append(Taken(asked, answer["pause-us"]))
    connection.close()
    return taken


def _longest_of_each(numbers: dict[str, Any], moments: Sequence[int]) -> list[float]:
    """The longest latency in ms from each of the moments to the next."""
    timeline, begin = numbers["timeline-us"], numbers["begin-ns"]
    slots = [max(0, (moment - begin) // 1_000_000) for moment in moments]
    windows = itertools.pairwise([*slots, len(timeline)])
    return [max(timeline[first:end], default=0) / 1000 for first, end in windows]


def run(
    program: Sequence[str], client: Path, drive: Drive, snapshots: int, directory: Path = TMPFS
) -> dict[str, Any]:
    """One run with so many snapshots: what the client saw, and the pauses we report."""
    with tempfile.TemporaryDirectory(prefix="vb", dir=directory) as work:
        return _run(program, client, drive, snapshots, Path(work))


def _run(
    program: Sequence[str], client: Path, drive: Drive, snapshots: int, work: Path
) -> dict[str, Any]:
    path, control = work / "disk.sock", work / "qmp.sock"
    command = [*program, "serve", "--control", str(control)]
    if drive.state:
        command += ["--state", str(work / "state.json")]
    command += ["--object", "iothread,id=io"]
    for node in _make_legs(work, drive):
        command += ["--blockdev", node]
    export = f"vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={path},writable=on"
    command += ["--export", f"{export},num-queues=1,iothread=io"]
    taken: list[Taken] = []
    failed: list[BenchError | OSError] = []

    def take() -> None:
        try:
            taken.extend(_take(control, drive, snapshots))
        except (BenchError, OSError) as error:
            failed.append(error)

    with backend(command, path, work / "log"):
        load = [str(client), "--job", drive.job, "--depth", str(drive.depth)]
        load += ["--block-size", "4096", "--queues", "1", "--range", f"{drive.mib}M"]
        load += ["--warmup", "0.5", "--seconds", str(drive.seconds), "--timeline", str(path)]
        taking = threading.Thread(target=take)
        taking.start()
        try:
            numbers = result_of(load)
        finally:
            taking.join()
    if failed:
        raise BenchError(f"snapshots under load: {failed[0]}")
    stalls = _longest_of_each(numbers, [one.at_ns for one in taken])
    del numbers["timeline-us"]
    return {**numbers, "pauses-us": [one.pause_us for one in taken], "stalls-ms": stalls}
