# SPDX-License-Identifier: GPL-2.0-or-later
"""Points at which a test may have the process killed.

`VHOSTBLK_FAULT=state-renamed` kills it, as `kill -9` would, when it passes the
point of that name for the first time, `state-renamed:3` for the third. Without
the variable a point costs one comparison.
"""

from __future__ import annotations

import os
import signal

_wanted, _, _count = os.environ.get("VHOSTBLK_FAULT", "").partition(":")
_left = int(_count) if _count.isdecimal() else 1


def fault_point(name: str) -> None:
    """Die here if that is wanted."""
    global _left
    if name != _wanted:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
