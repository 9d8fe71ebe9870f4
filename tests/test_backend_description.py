# SPDX-License-Identifier: GPL-2.0-or-later
"""Management software finds vhost-user backends through files (QEMU's vhost-user.json)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


def installed(directory: Path, **environment: str) -> dict[str, object]:
    """What an installation puts there."""
    subprocess.run(
        [
            sys.executable,
            "-Wignore",
            "setup.py",
            "-q",
            "install_data",
            "--install-dir",
            str(directory),
        ],
        cwd=TOP,
        env=os.environ | environment,
        check=True,
        timeout=60,
    )
    [file] = [path for path in directory.rglob("*") if path.is_file()]
    assert file.relative_to(directory) == Path("share/qemu/vhost-user/50-vhostblk.json")
    described: dict[str, object] = json.loads(file.read_text())
    return described


def test_it_says_what_the_schema_asks_for(tmp_path: Path) -> None:
    described = installed(tmp_path)
    assert described.pop("type") == "block"
    assert described.pop("description")
    assert os.path.isabs(str(described.pop("binary")))
    assert not described


def test_the_program_it_names_is_such_a_backend(tmp_path: Path) -> None:
    described = installed(tmp_path)
    binary = str(described["binary"])
    if shutil.which(binary) is None:
        pytest.skip("vhostblk is not installed")
    done = subprocess.run(
        [binary, "--print-capabilities"], capture_output=True, text=True, timeout=30, check=True
    )
    assert json.loads(done.stdout)["type"] == described["type"]


def test_a_package_for_another_place(tmp_path: Path) -> None:
    described = installed(tmp_path, VHOSTBLK_BINDIR="/opt/bin")
    assert described["binary"] == "/opt/bin/vhostblk-backend"
