# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the file of an LMDB database has all of its pages.

LMDB maps the file and believes what its meta pages say: a page that is not there any more would be
SIGBUS, the end of the process and of all its guests' disks. That the file is shorter than the last
page ever used is no proof, for LMDB does not write pages that are free again when a transaction
ends. So where it is, what the trees lead to is looked at.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

_MAGIC = 0xBEEFC0DE
_PAGE = struct.Struct("<QHHHH")  # number, pad, flags, end of the pointers, begin of the nodes
_BRANCH = 0x01
_NODE = struct.Struct("<HHHH")  # two halves of a length, flags, bytes of the key
_BIG, _SUB = 0x01, 0x02  # the value is in pages of its own, or a tree
_META = struct.Struct("<IIQQ")  # magic, version, address, size of the map
_LAST = struct.Struct("<QQ")  # last page, transaction
_NONE = (1 << 64) - 1
_PAGE_SIZES = [1 << bits for bits in range(9, 17)]


class _Tree(NamedTuple):
    """How LMDB describes one: of its own database, or in a value."""

    page_size: int  # of the file, in its first tree
    flags: int
    depth: int
    branches: int
    leaves: int
    big_pages: int
    entries: int
    root: int


_TREE = struct.Struct("<IHHQQQQQ")


class _MissingError(Exception):
    """A page that is in use is not in the file, or not what it should be."""


def is_whole(path: Path) -> bool:
    """Whether all pages in use are in the file. (An empty one, or none, has none.)"""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb", buffering=0) as file:
        try:
            _Look(file.fileno(), path.stat().st_size).run()
        except (_MissingError, struct.error):
            return False
    return True


class _Look:
    """One look at a file."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._page_size = 4096

    def run(self) -> None:
        first = self._meta(0)
        self._page_size = first[1].page_size
        if self._page_size not in _PAGE_SIZES:
            raise _MissingError
        _, free, main, last = max(first, self._meta(1))
        if (last + 1) * self._page_size > self._size:
            self._walk(free, values=True)
            self._walk(main, values=True)

    def _meta(self, number: int) -> tuple[int, _Tree, _Tree, int]:
        """Transaction, the tree of free pages, that of databases, and the last page."""
        data = self._read(number)
        at = _PAGE.size
        if _META.unpack_from(data, at)[0] != _MAGIC:
            raise _MissingError
        at += _META.size
        free = _Tree._make(_TREE.unpack_from(data, at))
        main = _Tree._make(_TREE.unpack_from(data, at + _TREE.size))
        last, transaction = _LAST.unpack_from(data, at + 2 * _TREE.size)
        return transaction, free, main, last

    def _read(self, number: int) -> bytes:
        self._need(number, 1)
        return os.pread(self._fd, self._page_size, number * self._page_size)

    def _need(self, number: int, pages: int) -> None:
        if (number + pages) * self._page_size > self._size:
            raise _MissingError

    def _walk(self, tree: _Tree, *, values: bool) -> None:
        """Its pages; leaves are read only if there may be pages behind their values."""
        waiting = [(tree.root, tree.depth)] if tree.root != _NONE else []
        while waiting:
            number, depth = waiting.pop()
            if depth <= 1 and not values:
                self._need(number, 1)
                continue
            if depth < 1:
                raise _MissingError
            page = self._read(number)
            _, _, flags, end, _ = _PAGE.unpack_from(page)
            for [at] in struct.iter_unpack("<H", page[_PAGE.size : end]):
                low, high, node_flags, key = _NODE.unpack_from(page, at)
                if flags & _BRANCH:
                    waiting.append((low | high << 16 | node_flags << 32, depth - 1))
                else:
                    self._value(page, at + _NODE.size + key, low | high << 16, node_flags)

    def _value(self, page: bytes, at: int, length: int, flags: int) -> None:
        if flags & _BIG:
            [number] = struct.unpack_from("<Q", page, at)
            self._need(number, -(-(_PAGE.size + length) // self._page_size))
        elif flags & _SUB:
            tree = _Tree._make(_TREE.unpack_from(page, at))
            self._walk(tree, values=tree.big_pages > 0)
