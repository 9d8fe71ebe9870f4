# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors that an operator sees: a sentence, QMP's error class, and details for machines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Self


class VhostblkError(Exception):
    """Something that was asked for and cannot be done.

    `desc` is the sentence for people. `data` is for programs, and may hold
    `code` (what kind of error it is) and `hint` (what to do about it).
    """

    default_class: ClassVar[str] = "GenericError"

    def __init__(
        self, desc: str, *, error_class: str | None = None, data: dict[str, Any] | None = None
    ) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class or self.default_class
        self.data = data

    def suggest(self, name: str, known: Iterable[str]) -> Self:
        """The same error; if `name` was probably meant to be a known one, it says which."""
        near = did_you_mean(name, known)
        if near is not None:
            hint = f"did you mean '{near}'?"
            self.desc = f"{self.desc}; {hint}"
            self.args = (self.desc,)
            self.data = {**(self.data or {}), "hint": hint}
        return self


class DeviceNotFound(VhostblkError):
    """QMP's class for a device (not a node) that does not exist."""

    default_class = "DeviceNotFound"


class DeviceNotActive(VhostblkError):
    """QMP's class for a device or job that is not active."""

    default_class = "DeviceNotActive"


class CommandNotFound(VhostblkError):
    """QMP's class for an unknown command."""

    default_class = "CommandNotFound"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be."""
    import difflib  # only when something went wrong: costs start-up time

    names = list(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not matches:
        # What differs in case or in '-' and '_' alone is still near.
        plain = {other.lower().replace("_", "-"): other for other in names}
        same = plain.get(name.lower().replace("_", "-"))
        return same
    return matches[0]
