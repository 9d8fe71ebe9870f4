# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `copy_on_read` node (cffi_build/engine/nodes/copy_on_read.c)."""

from __future__ import annotations

from typing import Any

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, EngineError, NodeHandle, UpcallSink


class CopyOnReadHandle(NodeHandle):
    """Regions of a disk, marked where nothing is left to be copied."""

    def __init__(self, engine: Engine, pointer: Any, cookie: int) -> None:
        super().__init__(engine, pointer)
        self._cookie = cookie

    def reset(self, size: int, region_bits: int) -> None:
        """Other sizes, and no marks; only while every export that reaches this is paused."""
        error = self._engine.error
        result = lib.vb_copy_on_read_reset(self.pointer, size, region_bits, error)
        if result < 0:
            raise EngineError(-result, ffi.string(error).decode())

    def mark(self, first: int, end: int) -> None:
        """Nothing is left to be copied into regions `first` to `end` - 1."""
        lib.vb_copy_on_read_mark(self.pointer, first, end - first)

    def find(self, first: int, *, marked: bool) -> int:
        """The first region from `first` on that is marked, or is not; their number if none is."""
        return int(lib.vb_copy_on_read_find(self.pointer, first, marked))

    def free(self) -> None:
        """No request is on its way up or down."""
        self._engine.forget(self._cookie)
        super().free()


def new_copy_on_read(
    engine: Engine, sink: UpcallSink, *, size: int, region_bits: int
) -> CopyOnReadHandle:
    """A `copy_on_read` node; requests for regions that are not marked go to `sink`."""
    cookie = engine.new_cookie()
    options = ffi.new("struct vb_copy_on_read_options *", (cookie, size, region_bits))
    pointer = engine.made(lib.vb_node_copy_on_read_new(engine.pointer, options, engine.error))
    engine.listen(cookie, upcalls=sink)
    return CopyOnReadHandle(engine, pointer, cookie)
