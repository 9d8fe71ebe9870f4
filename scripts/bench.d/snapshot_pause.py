# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a guest is held up by snapshots: three legs under a quorum, under load.

Run it as `scripts/bench-snapshot`. A client writes (or reads) at random all the time
while snapshots of the whole drive are taken; the longest latency it saw is the
longest stall, whatever its cause. A run without snapshots says what the machine
itself contributes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench import compile_tools
from programs import BenchError, backend, result_of

TOP = Path(__file__).resolve().parents[2]
TARGET_MS = 10.0


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


def make_legs(directory: Path, arguments: argparse.Namespace) -> list[str]:
    """The images, filled, and the options of the tree."""
    nodes = []
    for leg in range(arguments.legs):
        path = directory / f"leg{leg}.img"
        raw = path if arguments.format == "raw" else path.with_suffix(".raw")
        with raw.open("wb") as file:
            for _ in range(arguments.size):
                file.write(b"\x5a" * (1 << 20))
        if raw != path:
            convert = ["qemu-img", "convert", "-f", "raw", "-O", arguments.format]
            subprocess.run([*convert, str(raw), str(path)], check=True)
            raw.unlink()
        file_options = f"file.driver=file,file.filename={path}"
        nodes.append(f"driver={arguments.format},node-name=leg{leg},{file_options}")
    children = ",".join(f"children.{leg}=leg{leg}" for leg in range(arguments.legs))
    votes = arguments.legs // 2 + 1
    nodes.append(f"driver=quorum,node-name=disk,{children},vote-threshold={votes}")
    return nodes


def run(directory: Path, arguments: argparse.Namespace, client: Path, snapshots: int) -> Any:
    """One run with so many snapshots: what the client saw, and the pauses we report."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    path, control = directory / "disk.sock", directory / "qmp.sock"
    command = [sys.executable, "-m", "vhostblk", "serve", "--control", str(control)]
    if arguments.state:
        command += ["--state", str(directory / "state.json")]
    command += ["--object", "iothread,id=io"]
    for node in make_legs(directory, arguments):
        command += ["--blockdev", node]
    export = f"vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={path},writable=on"
    command += ["--export", f"{export},num-queues=1,iothread=io"]
    pauses: list[int] = []
    failed: list[BenchError] = []
    with backend(command, path, directory / "log"):
        load = [str(client), "--job", arguments.job, "--depth", str(arguments.depth)]
        load += ["--block-size", "4096", "--queues", "1", "--range", f"{arguments.size}M"]
        load += ["--warmup", "0.5", "--seconds", str(arguments.seconds), str(path)]
        begun = time.monotonic()

        def take() -> None:
            try:
                take_all()
            except BenchError as error:
                failed.append(error)

        def take_all() -> None:
            connection = Control(control)
            for number in range(snapshots):
                at = begun + 1 + number * (arguments.seconds - 1) / snapshots
                time.sleep(max(0.0, at - time.monotonic()))
                answer = connection.command("blockdev-snapshot-sync", device="disk")
                pauses.append(answer["pause-us"])
            connection.close()

        taking = threading.Thread(target=take)
        taking.start()
        numbers = result_of(load)
        taking.join()
    if failed:
        raise failed[0]
    return {**numbers, "pauses-us": pauses}


def main() -> int:
    """From options to a table."""
    parser = argparse.ArgumentParser(
        prog="bench-snapshot",
        description="How long is a guest held up while its drive is snapshotted?",
    )
    parser.add_argument("--directory", default="/dev/shm", help="where images are made (tmpfs)")
    parser.add_argument("--format", default="qcow2", choices=("raw", "qcow2"), help="of the legs")
    parser.add_argument("--legs", type=int, default=3)
    parser.add_argument("--job", default="randwrite", choices=("randread", "randwrite"))
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, metavar="MIB")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--state", action="store_true", help="with a state file")
    arguments = parser.parse_args()
    try:
        client, _ = compile_tools(TOP / "build" / "bench")
        with tempfile.TemporaryDirectory(prefix="vb", dir=arguments.directory) as work:
            quiet = run(Path(work) / "run", arguments, client, 0)
            busy = run(Path(work) / "run", arguments, client, arguments.snapshots)
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench-snapshot: {error}", file=sys.stderr)
        return 1
    pauses = sorted(busy["pauses-us"])
    usual, stall = quiet["max-ns"] / 1e6, busy["max-ns"] / 1e6
    print(f"{arguments.legs} legs ({arguments.format}), {arguments.job} 4 KiB, depth", end=" ")
    print(f"{arguments.depth}, {arguments.snapshots} snapshots in {arguments.directory}")
    print(f"  without snapshots: {quiet['iops']:>9,.0f} IOPS, longest {usual:.2f} ms")
    print(f"  with snapshots:    {busy['iops']:>9,.0f} IOPS, longest {stall:.2f} ms")
    print(f"  pause-us: median {pauses[len(pauses) // 2]}, longest {pauses[-1]}")
    judged, what = stall, "longest stall"
    if usual >= TARGET_MS:
        # Other programs hold the guest up for longer than that: only our own part can be told.
        judged, what = pauses[-1] / 1e3, "longest pause (the machine itself is too busy)"
    met = judged < TARGET_MS
    print(f"  {what} under {TARGET_MS:g} ms: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
