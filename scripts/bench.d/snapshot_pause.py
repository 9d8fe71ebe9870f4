# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a guest is held up by snapshots: three legs under a quorum, under load.

Run it as `scripts/bench-snapshot`: the row `snapshot-stall` of scripts/bench with other drives,
other loads, and more to read.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from bench import compile_tools
from programs import BenchError
from stall import TMPFS, Drive, run

TOP = Path(__file__).resolve().parents[2]
TARGET_MS = 10.0


def main() -> int:
    """From options to a table."""
    default = Drive()
    parser = argparse.ArgumentParser(
        prog="bench-snapshot",
        description="How long is a guest held up while its drive is snapshotted?",
    )
    parser.add_argument(
        "--directory", type=Path, default=TMPFS, help="where images are made (tmpfs)"
    )
    parser.add_argument("--format", default="qcow2", choices=("raw", "qcow2"), help="of the legs")
    parser.add_argument("--legs", type=int, default=default.legs)
    parser.add_argument("--job", default=default.job, choices=("randread", "randwrite"))
    parser.add_argument("--depth", type=int, default=default.depth)
    parser.add_argument("--size", type=int, default=default.mib, metavar="MIB", dest="mib")
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--state", action="store_true", help="with a state file")
    arguments = vars(parser.parse_args())
    directory, snapshots = arguments.pop("directory"), arguments.pop("snapshots")
    drive = Drive(**arguments)
    program = [sys.executable, "-m", "vhostblk"]
    try:
        client, _ = compile_tools(TOP / "build" / "bench")
        quiet = run(program, client, drive, 0, directory)
        busy = run(program, client, drive, snapshots, directory)
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench-snapshot: {error}", file=sys.stderr)
        return 1
    pauses = sorted(busy["pauses-us"])
    usual, stall = quiet["max-ns"] / 1e6, busy["max-ns"] / 1e6
    print(f"{drive.legs} legs ({drive.format}), {drive.job} 4 KiB, depth {drive.depth}", end=", ")
    print(f"{snapshots} snapshots in {directory}")
    print(f"  without snapshots: {quiet['iops']:>9,.0f} IOPS, longest {usual:.2f} ms")
    print(f"  with snapshots:    {busy['iops']:>9,.0f} IOPS, longest {stall:.2f} ms")
    print(f"  longest after each snapshot: median {statistics.median(busy['stalls-ms']):.2f} ms")
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
