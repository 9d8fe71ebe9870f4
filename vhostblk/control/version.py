# SPDX-License-Identifier: GPL-2.0-or-later
"""Our version in the shape QMP clients read.

`qmp-shell` looks for `version.qemu`, so our numbers stand there and our name in
`package`.
"""

from __future__ import annotations

import re
from typing import Any

from vhostblk import __version__


def version_info() -> dict[str, Any]:
    """The result of query-version."""
    numbers = [int(number) for number in re.findall(r"\d+", __version__)]
    major, minor, micro = [*numbers, 0, 0, 0][:3]
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"vhostblk {__version__}",
    }
