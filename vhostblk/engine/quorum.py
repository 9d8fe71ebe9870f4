# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `quorum` node (cffi_build/engine/nodes/quorum.c)."""

from __future__ import annotations

from typing import Any

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, NodeHandle, NodeSink

QUORUM_ALL: int = lib.VB_QUORUM_ALL


class QuorumHandle(NodeHandle):
    """Legs with the same data."""

    def __init__(self, engine: Engine, pointer: Any, cookie: int) -> None:
        super().__init__(engine, pointer)
        self._cookie = cookie

    def set(self, *, legs: int, threshold: int, fifo: bool, rewrite_corrupted: bool) -> None:
        """Other options; only while every export that reaches this node is paused."""
        given = (self._cookie, legs, threshold, fifo, rewrite_corrupted)
        lib.vb_node_quorum_set(self.pointer, ffi.new("struct vb_quorum_options *", given))

    def free(self) -> None:
        """Nothing reaches it any more."""
        self._engine.forget(self._cookie)
        super().free()


def new_quorum(
    engine: Engine,
    sink: NodeSink,
    *,
    legs: int,
    threshold: int,
    fifo: bool,
    rewrite_corrupted: bool,
) -> QuorumHandle:
    """A `quorum` node; what its legs do wrong goes to `sink`."""
    cookie = engine.new_cookie()
    given = (cookie, legs, threshold, fifo, rewrite_corrupted)
    options = ffi.new("struct vb_quorum_options *", given)
    pointer = engine.made(lib.vb_node_quorum_new(engine.pointer, options, engine.error))
    engine.listen(cookie, told=sink)
    return QuorumHandle(engine, pointer, cookie)
