# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk --version`: ours, and that of what was compiled in."""

from __future__ import annotations

import json
import platform

from vhostblk.control.version import version_text


def show(as_json: bool) -> None:
    """Print it."""
    if not as_json:
        print(f"vhostblk {version_text()}")
        return
    from vhostblk import engine

    print(json.dumps({
        "vhostblk": version_text(),
        "libvhost-user": engine.build_info(),
        "python": platform.python_version(),
    }))
