# SPDX-License-Identifier: GPL-2.0-or-later
"""Our version in the shape QMP clients read.

`qmp-shell` looks for `version.qemu`, so our numbers stand there and our name in
`package`.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

NAME = "vhostblk"


def version_text() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"


def version_info() -> dict[str, Any]:
    """The result of query-version."""
    text = version_text()
    numbers = [int(number) for number in re.findall(r"\d+", text)[:3]]
    major, minor, micro = (numbers + [0, 0, 0])[:3]
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"{NAME} {text}",
    }
