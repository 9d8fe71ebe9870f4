# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `file` node (cffi_build/engine/nodes/file.c)."""

from __future__ import annotations

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, NodeHandle


class FileHandle(NodeHandle):
    """A `file` node."""

    def resize(self, size: int) -> None:
        """To be called before the file gets that size, in bytes, by means of another descriptor."""
        lib.vb_node_file_resize(self.pointer, size)

    def grown(self, size: int) -> None:
        """To be called when it has that size."""
        lib.vb_node_file_grown(self.pointer, size)


def can_punch(fd: int) -> bool:
    """Whether zero writes that may unmap make holes in a regular file. May wait for its storage."""
    return bool(lib.vb_file_can_punch(fd))


def new_file(
    engine: Engine,
    fd: int,
    *,
    read_only: bool,
    direct: bool,
    no_flush: bool,
    discard_unmap: bool,
    detect_zeroes: int,
    memory_align: int,
    request_align: int,
) -> FileHandle:
    """A `file` node; owns `fd` unless this raises."""
    options = ffi.new("struct vb_file_options *")
    options.fd = fd
    options.read_only = read_only
    options.direct = direct
    options.no_flush = no_flush
    options.discard_unmap = discard_unmap
    options.detect_zeroes = detect_zeroes
    options.memory_align = memory_align
    options.request_align = request_align
    return FileHandle(
        engine, engine.made(lib.vb_node_file_new(engine.pointer, options, engine.error))
    )
