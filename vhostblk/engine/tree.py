# SPDX-License-Identifier: GPL-2.0-or-later
"""Sorted tables in a file with checksums (cffi_build/engine/tree_file.c).

Keys and values are bytes, of lengths that each table has. What is damaged is told as `TreeError`,
when it is met. Functions wait for the file, without Python's lock.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vhostblk._engine import ffi, lib

PAGE: int = lib.VB_TREE_PAGE
_PORTION = 64 << 10
"""Bytes that are taken out of a table at a time."""


class TreeError(OSError):
    """The file is not as it was written, or cannot be read or written."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(errno.EIO if status == -errno.EBADMSG else -status, text)
        self.damaged = status in (-errno.EBADMSG, -errno.EIO)
        """What is there cannot be had."""


class Tree:
    """A file of tables, named by their numbers."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, int]], most: int) -> None:
        """It may grow to `most` bytes."""
        self.shapes = list(shapes)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        error, status = _new_error(), ffi.new("int *")
        layout = ffi.new("struct vb_tree_shape[]", self.shapes)
        self.pointer = lib.vb_tree_open(
            self._fd, layout, len(self.shapes), most // PAGE, status, error
        )
        if self.pointer == ffi.NULL:
            os.close(self._fd)
            raise _failed(status[0], error)

    @staticmethod
    def create(path: Path, shapes: Sequence[tuple[int, int]]) -> None:
        """A new file with empty tables, durable when it is named so."""
        new = path.with_name(f"{path.name}.new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        error = _new_error()
        try:
            layout = ffi.new("struct vb_tree_shape[]", list(shapes))
            status = lib.vb_tree_create(fd, layout, len(shapes), error)
        finally:
            os.close(fd)
        if status < 0:
            raise _failed(status, error)
        new.rename(path)

    def close(self) -> None:
        """Readers and changes are gone."""
        lib.vb_tree_close(self.pointer)
        os.close(self._fd)

    def reader(self, pages: int) -> Reader:
        """All tables as they are now; in memory it has up to `pages` pages of them."""
        return Reader(self.pointer, self.shapes, pages)

    def change(self) -> Change:
        """Of whatever there is; one at a time."""
        return Change(self.pointer, self.shapes)


class Reader:
    """All tables as they were at one moment. One thread at a time."""

    def __init__(self, tree: Any, shapes: list[tuple[int, int]], pages: int) -> None:
        self._reader = lib.vb_tree_reader_new(tree, pages)
        if self._reader == ffi.NULL:
            raise MemoryError
        self._shapes = shapes
        self._error = _new_error()
        most = max(value for _, value in shapes)
        self._value = ffi.new("char[]", most)
        self._values = [ffi.buffer(self._value, value) for _, value in shapes]
        self._get = lib.vb_tree_get

    def close(self) -> None:
        """The pages that it needed may be used again."""
        lib.vb_tree_reader_free(self._reader)

    def renew(self) -> None:
        """As they are now."""
        lib.vb_tree_reader_renew(self._reader)

    def copy(self, tree: Tree) -> None:
        """All that there is comes into another file, which is empty. Durable."""
        status = lib.vb_tree_copy(self._reader, tree.pointer, self._error)
        if status < 0:
            raise _failed(status, self._error)

    def entries(self, table: int) -> int:
        """How many a table has."""
        return int(lib.vb_tree_entries(self._reader, table))

    def get(self, table: int, key: bytes) -> bytes | None:
        """The value of a key."""
        status = self._get(self._reader, table, key, self._value, self._error)
        if status > 0:
            return bytes(self._values[table])
        if status < 0:
            raise _failed(status, self._error)
        return None

    def scan(self, table: int, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All entries whose keys are not before `start`, as they were when a portion was read."""
        key, value = self._shapes[table]
        size = key + value
        count = max(4, _PORTION // size)
        entries = ffi.new("char[]", count * size)
        start = start.ljust(key, b"\0")
        while True:
            found = lib.vb_tree_scan(self._reader, table, start, entries, count, self._error)
            if found < 0:
                raise _failed(found, self._error)
            data = ffi.buffer(entries, found * size)[:]
            for at in range(0, len(data), size):
                yield data[at : at + key], data[at + key : at + size]
            if found < count:
                return
            following = int.from_bytes(data[-size : key - size], "big") + 1
            if following >> 8 * key:
                return
            start = following.to_bytes(key, "big")


class Change:
    """A change of any number of entries, which happens as a whole or not at all."""

    def __init__(self, tree: Any, shapes: list[tuple[int, int]]) -> None:
        self._change = lib.vb_tree_begin(tree)
        if self._change == ffi.NULL:
            raise MemoryError
        self._shapes = shapes
        self._error = _new_error()

    def put(self, table: int, entries: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Sorted entries, each of another key; None: it is to go."""
        key, value = self._shapes[table]
        gone = bytes(value)
        packed = b"".join(
            [name + (b"\1" + what if what is not None else b"\0" + gone) for name, what in entries]
        )
        if len(packed) != len(entries) * (key + 1 + value):
            raise ValueError(f"an entry of table {table} has another length than this has")
        status = lib.vb_tree_put(self._change, table, packed, len(entries), self._error)
        if status < 0:
            raise _failed(status, self._error)

    def commit(self) -> None:
        """Make it happen, durably."""
        change, self._change = self._change, None
        status = lib.vb_tree_commit(change, self._error)
        if status < 0:
            raise _failed(status, self._error)

    def abandon(self) -> None:
        """Do without it, unless it has happened, or failed."""
        if self._change is not None:
            lib.vb_tree_abandon(self._change)
            self._change = None


def _new_error() -> Any:
    return ffi.new("char[]", lib.VB_ERROR_SIZE)


def _failed(status: int, error: Any) -> TreeError:
    return TreeError(status, ffi.string(error).decode(errors="replace"))
