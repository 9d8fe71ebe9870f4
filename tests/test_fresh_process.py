# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests start by a fork is as what users start: and that starts, too."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import fresh_process
import pytest

from vhostblk.cli import COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_imports_what_it_needs(command: str) -> None:
    done = subprocess.run(
        [*fresh_process.COMMAND, command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"vhostblk {command}" in done.stdout


def started(popen: Any, directory: Path, passed: int) -> tuple[dict[str, Any], int]:
    """What a backend looks like from outside, and how it ends."""
    directory.mkdir()
    process = popen(
        [*fresh_process.COMMAND, "serve", "--blockdev", "null-co,node-name=n", "--control", "q"],
        cwd=directory,
        env=os.environ | {"VHOSTBLK_RUNTIME_DIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=[passed],
    )
    with process:
        said = process.stderr.readline()
        here = Path(f"/proc/{process.pid}")
        status = dict(
            line.split(":\t", 1) for line in (here / "status").read_text().splitlines() if line
        )
        seen = {
            "said": said,
            "files": sorted(int(name) for name in os.listdir(here / "fd")),
            "passed": os.readlink(here / "fd" / str(passed)),
            "directory": Path(os.readlink(here / "cwd")).relative_to(directory),
            "session": os.getsid(process.pid) == process.pid,
            "limits": (here / "limits").read_text(),
            "dumped": (here / "coredump_filter").read_text(),
            "threads": status["Threads"],
            "parent": int(status["PPid"]),
            **{name: status[name] for name in ("Uid", "Umask", "SigBlk", "SigIgn", "SigCgt")},
        }
        process.send_signal(signal.SIGTERM)
        return seen, process.wait(30)


@pytest.mark.skipif("VHOSTBLK_SANITIZED" in os.environ, reason="nothing is forked there")
def test_a_fork_is_as_another(tmp_path: Path) -> None:
    fresh_process.run([*fresh_process.COMMAND, "--help"], capture_output=True)  # it is there
    before = fresh_process.DUMPED.read_text()
    fresh_process.DUMPED.write_text("0x21")
    with open(tmp_path / "file", "w") as file:
        ours, status = started(fresh_process.Popen, tmp_path / "fork", file.fileno())
        theirs, other = started(subprocess.Popen, tmp_path / "process", file.fileno())
    fresh_process.DUMPED.write_text("0x" + before)
    assert ours == theirs
    assert ours["dumped"] == "00000021\n"
    assert ours["parent"] == os.getpid()
    assert status == other == 0


def test_it_reads_its_environment_and_says_how_it_has_ended(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    words = ["serve", "image", "--state", "state", "--control", "none"]
    done = fresh_process.run(
        [*fresh_process.COMMAND, *words],
        cwd=tmp_path,
        env=os.environ | {"VHOSTBLK_FAULT": "state-written", "VHOSTBLK_RUNTIME_DIR": "run"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
