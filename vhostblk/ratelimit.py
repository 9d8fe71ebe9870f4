# SPDX-License-Identifier: GPL-2.0-or-later
"""Log lines that something outside can cause at will: many at once, but not for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class RateLimitedLog:
    """Passes on a burst of lines, then a few per second, and says how many were left out."""

    def __init__(
        self,
        logger: logging.Logger,
        *,
        burst: int = 100,
        per_second: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._burst = float(burst)
        self._per_second = per_second
        self._clock = clock
        self._tokens = float(burst)
        self._last = clock()
        self.suppressed = 0

    def log(self, level: int, text: str, *args: object) -> bool:
        """Log a line unless there were too many; whether it was logged."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._per_second)
        self._last = now
        if self._tokens < 1:
            self.suppressed += 1
            return False
        self._tokens -= 1
        if self.suppressed:
            text += f" (and {self.suppressed} more like it before, not shown)"
            self.suppressed = 0
        self._logger.log(level, text, *args)
        return True
