# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a file or socket cannot be created, in words that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from vhostblk.schema import VhostblkError


def why_not(error: OSError, path: str) -> str:
    """What the kernel said when something was to be created at `path`, and the remedy."""
    directory = os.path.dirname(path) or "."
    hint = ""
    if error.errno == errno.ENOENT and not os.path.isdir(directory):
        hint = f"; the directory '{directory}' does not exist"
    elif error.errno in (errno.EACCES, errno.EPERM):
        hint = "; you may not write to it: remove it, or choose another path"
        if not os.path.lexists(path):
            hint = f"; you may not create files in '{directory}': choose a directory of yours"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "; make room there, or choose another path"
    return f"{error.strerror or error}{hint}"


@contextlib.contextmanager
def creating(path: str) -> Iterator[None]:
    """What the storage of a new image at `path` says inside is told with that name."""
    try:
        yield
    except OSError as error:
        raise VhostblkError(
            f"Could not create '{path}': {why_not(error, path)}",
            data={"code": "create-failed", "filename": path},
        ) from None
