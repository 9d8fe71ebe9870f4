# SPDX-License-Identifier: GPL-2.0-or-later
"""What a check of an image has found: QAPI's ImageCheck."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MAX_MESSAGES = 1000
Repair = Literal["none", "leaks", "all"]

_ALWAYS = ("check_errors", "image_end_offset", "total_clusters")
_UNLESS_ZERO = (
    "corruptions",
    "leaks",
    "corruptions_fixed",
    "leaks_fixed",
    "allocated_clusters",
    "fragmented_clusters",
    "compressed_clusters",
)


@dataclass(kw_only=True)
class ImageCheck:
    """What was found and is left, and what was repaired."""

    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0
    """Bytes."""
    messages: list[str] = field(default_factory=list)
    omitted: int = 0
    """Messages beyond the first MAX_MESSAGES."""

    @property
    def clean(self) -> bool:
        """Nothing is wrong (any more)."""
        return not (self.check_errors or self.corruptions or self.leaks)

    def say(self, text: str) -> None:
        """Note a finding; there may be very many."""
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(text)
        else:
            self.omitted += 1

    def describe(self) -> dict[str, Any]:
        """As QAPI has it, without the file's name; absent members are zero, as there."""
        there = [*_ALWAYS, *(name for name in _UNLESS_ZERO if getattr(self, name))]
        return {name.replace("_", "-"): getattr(self, name) for name in there}
