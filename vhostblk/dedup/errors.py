# SPDX-License-Identifier: GPL-2.0-or-later
"""What must not happen to a store, and ends its use."""

from __future__ import annotations


class InconsistentError(Exception):
    """What is in memory contradicts itself, and would lead writes to places where something is."""
