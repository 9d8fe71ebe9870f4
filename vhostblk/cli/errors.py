# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit codes, and the error that carries one."""

from __future__ import annotations

from typing import Any

from vhostblk.schema import VhostblkError

OK = 0
FAILED = 1
USAGE = 2
NOT_RUNNING = 3
REFUSED = 4
TIMEOUT = 124


class CliError(VhostblkError):
    """Something to tell the operator, and the status to end with."""

    def __init__(self, desc: str, *, status: int = FAILED, data: dict[str, Any] | None = None):
        super().__init__(desc, data=data)
        self.status = status


def error_text(error: VhostblkError) -> str:
    """The sentence to print: what was wrong and, if known, what to do."""
    text = error.desc
    hint = (error.data or {}).get("hint")
    if isinstance(hint, str) and hint not in text:
        text = f"{text} {hint[:1].upper()}{hint[1:]}" if text.endswith("?") else f"{text}; {hint}"
    return text
