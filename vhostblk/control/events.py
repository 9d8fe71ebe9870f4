# SPDX-License-Identifier: GPL-2.0-or-later
"""Events a guest can cause at will reach clients at most once a second each.

The first one is sent at once. Of those that follow within a second only the
last is kept, and sent when the second is over; so the latest state is always
seen, and a guest cannot fill anybody's memory or log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

PERIOD = 1.0

# Event name -> members of its data that tell the sources apart: each source
# has a limit of its own.
LIMITED: dict[str, tuple[str, ...]] = {
    "BLOCK_IO_ERROR": ("node-name", "operation"),
    "QUORUM_FAILURE": ("reference",),
    "QUORUM_REPORT_BAD": ("node-name", "type"),
}

_Key = tuple[str, ...]


class RateLimiter:
    """Passes events on to `send`, the limited ones not too often."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._waiting: dict[_Key, dict[str, Any]] = {}
        self._timers: dict[_Key, asyncio.TimerHandle] = {}

    def emit(self, name: str, data: dict[str, Any], event: dict[str, Any]) -> None:
        """Send `event` now, or when its turn comes."""
        members = LIMITED.get(name)
        if members is None:
            self._send(event)
            return
        key = (name, *(str(data.get(member, "")) for member in members))
        if key in self._timers:
            self._waiting[key] = event
            return
        self._send(event)
        self._start(key)

    def close(self) -> None:
        """Send what waits and stop."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for event in self._waiting.values():
            self._send(event)
        self._waiting.clear()

    def _start(self, key: _Key) -> None:
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(PERIOD, self._elapsed, key)

    def _elapsed(self, key: _Key) -> None:
        del self._timers[key]
        event = self._waiting.pop(key, None)
        if event is not None:
            self._send(event)
            self._start(key)
