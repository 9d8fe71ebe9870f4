# SPDX-License-Identifier: GPL-2.0-or-later
"""An environment in which QEMU's tools make LUKS headers at once; c/slow_clock.c says why."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from crash.tools import plain_environment

SOURCE = Path(__file__).resolve().parent / "c" / "slow_clock.c"
# Its directory is removed when this process ends.
_directory: tempfile.TemporaryDirectory[str] | None = None


@functools.cache
def _library() -> Path | None:
    global _directory
    gcc = shutil.which("gcc")
    if gcc is None:
        return None
    _directory = tempfile.TemporaryDirectory(prefix="vb-clock-")
    path = Path(_directory.name) / "slow_clock.so"
    command = [gcc, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(SOURCE)]
    subprocess.run([*command, "-o", str(path)], env=plain_environment(), check=True)
    return path


def quick_kdf() -> dict[str, str]:
    """The environment; without a compiler QEMU takes its time."""
    library = _library()
    return plain_environment() | ({"LD_PRELOAD": str(library)} if library else {})
