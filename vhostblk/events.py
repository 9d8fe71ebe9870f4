# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens in the backend, told to whoever wants to know.

Emitting never waits: a listener is called at once, and must not wait either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One event, named as in QAPI."""

    name: str
    data: dict[str, Any]
    timestamp: float = field(default_factory=time.time)


class EventBus:
    """Where events are emitted and listened to."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell everyone, now."""
        event = Event(name, data)
        for listener in list(self._listeners):
            listener(event)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` at once for each event to come; returns how to stop that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
