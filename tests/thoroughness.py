# SPDX-License-Identifier: GPL-2.0-or-later
"""How much a run of the tests tries of what is random.

The numbers in the tests are for every day: a run of all tests in a quarter of an hour. Each seed,
example, kill and power cut more can find more, so VHOSTBLK_TEST_EXAMPLES multiplies them.
"""

from __future__ import annotations

import os

FACTOR = float(os.environ.get("VHOSTBLK_TEST_EXAMPLES", "1"))
_SLOWER = 4 if "VHOSTBLK_SANITIZED" in os.environ else 1


def tries(number: int) -> int:
    """`number`, in a run that is neither more nor less thorough than others."""
    return max(1, round(number * FACTOR))


def seconds(limit: float) -> float:
    """A limit of time for something that tries; a sanitizer makes all of it slower."""
    return limit * max(1.0, FACTOR) * _SLOWER
