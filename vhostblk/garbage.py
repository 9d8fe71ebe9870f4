# SPDX-License-Identifier: GPL-2.0-or-later
"""When Python may look for cycles of garbage: not while guests wait for this thread.

A look at everything takes tens of milliseconds, since what was made at the start (classes,
options) is most of what there is. It stays as long as the process: once is enough.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_sections = 0
_wanted = True


def leave_alone_what_is_there() -> None:
    """What exists now stays: later looks are at what has been made since."""
    gc.freeze()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Inside, nobody looks for garbage. Sections nest."""
    global _sections, _wanted
    if _sections == 0:
        _wanted = gc.isenabled()
        gc.disable()
    _sections += 1
    try:
        yield
    finally:
        _sections -= 1
        if _sections == 0 and _wanted:
            gc.enable()
