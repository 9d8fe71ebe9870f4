# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk --version`: ours, and that of what was compiled in."""

from __future__ import annotations

import json
import platform

from vhostblk import __version__


def show(as_json: bool) -> None:
    """Print it."""
    if not as_json:
        print(f"vhostblk {__version__}")
        return
    from vhostblk import engine

    print(
        json.dumps(
            {
                "vhostblk": __version__,
                "libvhost-user": engine.build_libvhost_user(),
                "python": platform.python_version(),
            }
        )
    )
