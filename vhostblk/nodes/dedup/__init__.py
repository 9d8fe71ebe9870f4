# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup: a disk in a store that keeps blocks with the same content once."""

from vhostblk.nodes.dedup.driver import Dedup

__all__ = ["Dedup"]
