# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `null` node (cffi_build/engine/nodes/null.c)."""

from __future__ import annotations

from vhostblk._engine import lib
from vhostblk.engine import Engine, NodeHandle


def new_null(engine: Engine, *, latency_ns: int, read_zeroes: bool) -> NodeHandle:
    """A `null` node."""
    pointer = lib.vb_node_null_new(engine.pointer, latency_ns, read_zeroes, engine.error)
    return NodeHandle(engine, engine.made(pointer))
