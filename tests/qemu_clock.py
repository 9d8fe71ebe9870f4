# SPDX-License-Identifier: GPL-2.0-or-later
"""An environment in which QEMU's tools make LUKS headers at once; c/slow_clock.c says why."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from compiled import shared_library
from crash.tools import plain_environment

SOURCE = Path(__file__).resolve().parent / "c" / "slow_clock.c"
# Its directory is removed when this process ends.
_directory: tempfile.TemporaryDirectory[str] | None = None


@functools.cache
def _library() -> Path:
    global _directory
    _directory = tempfile.TemporaryDirectory(prefix="vb-clock-")
    return shared_library(Path(_directory.name), [SOURCE])


def quick_kdf() -> dict[str, str]:
    """The environment."""
    return plain_environment() | {"LD_PRELOAD": str(_library())}
