# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/bench works: it compiles, every row runs, the result is complete. Not how fast."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blkio.library import library

TOP = Path(__file__).resolve().parents[1]
LIMIT = 280  # it takes 40 seconds, and longer where all else is tested at the same time
BENCH = [TOP / "scripts" / "bench"]

pytestmark = [
    pytest.mark.skipif(
        shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed"
    ),
    pytest.mark.skipif(
        "VHOSTBLK_SANITIZED" in os.environ, reason="a sanitizer would be in every program"
    ),
]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it without set-up, which is done when there are tests, and with this vhostblk."""
    return subprocess.run(
        [*BENCH, "--vhostblk", f"{sys.executable} -m vhostblk", *arguments],
        env=os.environ | {"VHOSTBLK_BENCH_NO_SETUP": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.timeout(LIMIT + 20)
def test_every_row_runs(tmp_path: Path) -> None:
    library()  # fetches it if need be
    result = tmp_path / "result.json"
    done = bench("--smoke", "--json", result, "--directory", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(result.read_text())
    listed = [line.split()[0] for line in bench("--list").stdout.splitlines()]
    assert [row["name"] for row in document["rows"]] == listed
    for row in document["rows"]:
        assert row["name"] in done.stdout
        for runs in row["runs"].values():
            for run in runs:
                if row["kind"] == "load":
                    assert run["ops"] == 200 * row["job"]["queues"] and run["iops"] > 0
                    assert 0 < run["p50-ns"] <= run["p99-ns"] <= run["max-ns"] * 1.01
                else:
                    assert run["value"] >= 0


def test_a_row_that_is_not_there() -> None:
    done = bench("--row", "nonsense")
    assert done.returncode == 2
    assert "no row 'nonsense'" in done.stderr and "null-randread" in done.stderr


def test_a_backend_that_does_not_start(tmp_path: Path) -> None:
    done = bench("--row", "start", "--smoke", "--directory", tmp_path, "--vhostblk", "false")
    assert done.returncode == 2
    assert "ended with status 1" in done.stderr and "Traceback" not in done.stderr
