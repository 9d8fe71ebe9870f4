# SPDX-License-Identifier: GPL-2.0-or-later
"""Passphrases and keys: memory that keeps them (memory.py), places they come from (source.py)."""

from vhostblk.secret.memory import SecretBytes, forbid_core_dumps

__all__ = ["SecretBytes", "forbid_core_dumps"]
