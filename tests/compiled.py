# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts of the engine that can be tested without the rest, compiled for themselves."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path


def shared_library(directory: Path, sources: Iterable[Path], *options: str) -> ctypes.CDLL:
    """What these sources define."""
    compiler = shutil.which("cc")
    assert compiler, "scripts/setup installs one"
    path = directory / "library.so"
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC"]
    subprocess.run([*command, *options, *map(str, sources), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))
