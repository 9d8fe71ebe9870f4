# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/setup on a distribution whose packages it does not know."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup"


def lacks(os_release: Path, **env: str) -> str:
    """What it says where there is no Python that it could use."""
    os_release.write_text("ID=other\n")
    with_it = f"mount --bind '{os_release}' /etc/os-release && exec '{SETUP}'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", with_it],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VHOSTBLK_PYTHON": "/nonexistent"} | env,
    )
    if "setup:" not in done.stderr:
        pytest.skip("cannot have a file in place of another")
    assert done.returncode == 1
    return done.stderr


def test_all_that_is_needed_is_named(tmp_path: Path) -> None:
    """The source of QEMU, too, which no package brings."""
    said = lacks(tmp_path / "os", VHOSTBLK_QEMU_SRC="", VHOSTBLK_LIBVHOST_USER="")
    assert "Python>=3.11" in said and "VHOSTBLK_QEMU_SRC" in said
    assert "VHOSTBLK_QEMU_SRC" not in lacks(tmp_path / "os", VHOSTBLK_QEMU_SRC="/somewhere")
