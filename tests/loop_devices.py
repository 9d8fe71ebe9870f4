# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices of any sector size, made of files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash.tools import plain_environment


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env=plain_environment(), timeout=60
    )


@contextmanager
def attached(image: Path, *, sector: int = 512) -> Iterator[str]:
    """The path of a loop device."""
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    made = _run("losetup", "--find", "--show", "--sector-size", str(sector), str(image))
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    try:
        yield made.stdout.strip()
    finally:
        _run("losetup", "-d", made.stdout.strip()).check_returncode()


@contextmanager
def mounted(device: str, directory: Path) -> Iterator[None]:
    """A new ext4 on the device."""
    directory.mkdir()
    for command in (["mkfs.ext4", "-q", device], ["mount", device, str(directory)]):
        done = _run(*command)
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.strip()}")
    try:
        yield
    finally:
        _run("umount", "-l", str(directory)).check_returncode()
