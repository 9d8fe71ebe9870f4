# SPDX-License-Identifier: GPL-2.0-or-later
"""What must not happen to a store, and ends its use."""

from __future__ import annotations

import errno
from pathlib import Path

from vhostblk.schema import VhostblkError


class InconsistentError(Exception):
    """What is in memory contradicts itself, and would lead writes to places where something is."""


def damaged(directory: Path, error: Exception | str) -> VhostblkError:
    """The metadata in a directory are not to be used."""
    return VhostblkError(
        f"the metadata of the dedup store in '{directory}' are damaged: {error}; dedup-rebuild "
        "makes them anew",
        data={"code": "bad-metadata"},
    )


class DamagedError(OSError):
    """Something of the metadata cannot be had, or is not what was written."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(errno.EIO, damaged(directory, reason).desc)
        self.reason = reason
