# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `raw` node (cffi_build/engine/nodes/raw.c)."""

from __future__ import annotations

from vhostblk._engine import lib
from vhostblk.engine import Engine, NodeHandle


def new_raw(engine: Engine, *, offset: int) -> NodeHandle:
    """A `raw` node that adds `offset`."""
    return NodeHandle(
        engine, engine.made(lib.vb_node_raw_new(engine.pointer, offset, engine.error))
    )
