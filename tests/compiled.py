# SPDX-License-Identifier: GPL-2.0-or-later
"""C compiled for tests: parts of the engine without the rest, and what goes in front of libc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from crash.tools import plain_environment


def shared_library(directory: Path, sources: Iterable[Path], *options: str) -> Path:
    """The file, for LD_PRELOAD or loaded()."""
    compiler = shutil.which("cc")
    assert compiler, "scripts/setup installs one"
    path = directory / "library.so"
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC"]
    command += [*options, *map(str, sources), "-o", str(path)]
    subprocess.run(command, env=plain_environment(), check=True)
    return path


def loaded(directory: Path, sources: Iterable[Path], *options: str) -> ctypes.CDLL:
    """What these sources define."""
    return ctypes.CDLL(str(shared_library(directory, sources, *options)))
