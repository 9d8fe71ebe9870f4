# SPDX-License-Identifier: GPL-2.0-or-later
"""Where an exception came from, in a few words."""

from __future__ import annotations

import traceback
from pathlib import Path

_OURS = str(Path(__file__).parent)
_LIBRARY = str(Path(traceback.__file__).parent)


def origin(error: BaseException) -> str:
    """` (file.py line 12)`: the last line that is neither ours nor the standard library's.

    So for an exception in a plug-in the line of the plug-in; "" if there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith((_OURS, _LIBRARY)):
            return f" ({frame.filename.rpartition('/')[2]} line {frame.lineno})"
    if frames:
        return f" ({frames[-1].filename.rpartition('/')[2]} line {frames[-1].lineno})"
    return ""
