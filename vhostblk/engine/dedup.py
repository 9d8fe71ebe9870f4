# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `dedup` node (cffi_build/engine/nodes/dedup.c): hashes what is written."""

from __future__ import annotations

from vhostblk._engine import lib
from vhostblk.engine import Engine, NodeHandle

DIGEST: int = lib.VB_DEDUP_DIGEST


def new_dedup(engine: Engine, block_bits: int) -> NodeHandle:
    """A `dedup` node; its child 0 is the map of the disk."""
    return NodeHandle(
        engine, engine.made(lib.vb_node_dedup_new(engine.pointer, block_bits, engine.error))
    )
