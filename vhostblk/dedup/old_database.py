# SPDX-License-Identifier: GPL-2.0-or-later
"""Stores whose database is an LMDB file, as earlier versions wrote it: it is turned into ours.

The file is read here, page by page: LMDB itself believes what it finds, and a damaged file would be
the end of the process. What is not as it should be raises `DamagedError`.

The new database has its name when it is complete and durable. Then a note takes the place of the
old one, so that earlier versions refuse the store. **A crash** before that leaves the old one, or
both; the new one counts.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from vhostblk.dedup.database import TABLES, Database, Writer
from vhostblk.dedup.errors import DamagedError
from vhostblk.dedup.journal import sync_directory, write_file

FILE = "metadata.mdb"
_NOTE = b"The database of this store has another name and format now: metadata.db\n"
_MAGIC = 0xBEEFC0DE
_PAGE = struct.Struct("<QHHHH")  # number, pad, flags, end of the pointers, begin of the nodes
_BRANCH, _LEAF = 0x01, 0x02
_NODE = struct.Struct("<HHHH")  # two halves of a length, flags, bytes of the key
_BIG, _SUB = 0x01, 0x02  # the value is in pages of its own, or a tree
_META = struct.Struct("<IIQQ")  # magic, version, address, size of the map
_LAST = struct.Struct("<QQ")  # last page, transaction
_NONE = (1 << 64) - 1
_PAGE_SIZES = [1 << bits for bits in range(9, 17)]
_DEPTH = 32
_DISK = struct.Struct("<Q")
_NEW_DISK = struct.Struct("<QB255s")
_STATE = {b"state": "state", b"ledger": "ledger", b"unreferenced": "unref"}


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


def upgrade(directory: Path, new: Path) -> None:
    """Make a database from an old one, if there is one, and no new one. Any thread."""
    old = directory / FILE
    if not old.exists() or old.stat().st_size in (0, len(_NOTE)):
        return
    if not new.exists():
        temporary = new.with_name(f"{new.name}.upgrade")
        temporary.unlink(missing_ok=True)
        try:
            with open(old, "rb", buffering=0) as file:
                _convert(_File(file.fileno(), old), temporary)
        except (KeyError, ValueError, struct.error) as error:
            raise DamagedError(directory, f"{FILE}: {error}") from None
        temporary.rename(new)
        sync_directory(directory)
    note = directory / f"{FILE}.note"
    write_file(note, _NOTE)
    note.rename(old)
    (directory / f"{FILE}-lock").unlink(missing_ok=True)
    sync_directory(directory)


def _convert(old: _File, path: Path) -> None:
    trees = old.trees()
    with closing(Database(path, 1 << 62)) as database, database.writing() as writer:
        for name in TABLES.keys() & {key.decode() for key in trees}:
            for key, value in old.entries(trees[name.encode()]):
                _put(writer, name, key, value)


def _put(writer: Writer, table: str, key: bytes, value: bytes) -> None:
    if table == "state":
        writer.put_value(_STATE[key], value)
    elif table == "disks":
        [size], name = _DISK.unpack_from(value), value[_DISK.size :]
        writer.put(table, key, _NEW_DISK.pack(size, len(name), name))
    else:
        writer.put(table, key, value)


class _File:
    """An LMDB file that nobody uses."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._page_size = 4096

    def _damaged(self, reason: str) -> DamagedError:
        return DamagedError(self._path.parent, f"{FILE}: {reason}")

    def trees(self) -> dict[bytes, _Tree]:
        """The tables by their names."""
        found = {}
        try:
            first = self._meta(0)
            self._page_size = first[1].page_size
            if self._page_size not in _PAGE_SIZES:
                raise self._damaged(f"pages of {self._page_size} bytes")
            _, main = max(first, self._meta(1))
            for key, value, flags in self._nodes(main.root, main.depth):
                if flags & _SUB:
                    found[key] = _Tree._make(_TREE.unpack(value))
        except struct.error as error:
            raise self._damaged(str(error)) from None
        return found

    def entries(self, tree: _Tree) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a table, in order."""
        count, last = 0, b""
        try:
            for key, value, _ in self._nodes(tree.root, tree.depth):
                if count and key <= last:
                    raise self._damaged("keys are not in order")
                yield key, value
                count, last = count + 1, key
        except struct.error as error:
            raise self._damaged(str(error)) from None
        if count != tree.entries:
            raise self._damaged(f"{count} entries where {tree.entries} should be")

    def _meta(self, number: int) -> tuple[int, _Tree]:
        """Transaction, and the tree of tables."""
        data = self._read(number * self._page_size, 4096 if not number else self._page_size)
        at = _PAGE.size
        if _META.unpack_from(data, at)[0] != _MAGIC:
            raise self._damaged("this is no database")
        at += _META.size
        free = _Tree._make(_TREE.unpack_from(data, at))
        main = _Tree._make(_TREE.unpack_from(data, at + _TREE.size))
        _, transaction = _LAST.unpack_from(data, at + 2 * _TREE.size)
        return transaction, main._replace(page_size=free.page_size)

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise self._damaged("it has lost its end")
        return data

    def _nodes(self, number: int, depth: int) -> Iterator[tuple[bytes, bytes, int]]:
        """Key, value and flags of all that is below a page."""
        if number == _NONE:
            return
        page = self._read(number * self._page_size, self._page_size)
        found, _, flags, end, _ = _PAGE.unpack_from(page)
        kind = _BRANCH if depth > 1 else _LEAF
        if found != number or not flags & kind or not 1 <= depth <= _DEPTH:
            raise self._damaged(f"page {number} is not what should be there")
        for [at] in struct.iter_unpack("<H", page[_PAGE.size : end]):
            low, high, flags, length = _NODE.unpack_from(page, at)
            at += _NODE.size
            if kind == _BRANCH:
                yield from self._nodes(low | high << 16 | flags << 32, depth - 1)
            else:
                key = page[at : at + length]
                yield key, self._value(page, at + length, low | high << 16, flags), flags

    def _value(self, page: bytes, at: int, length: int, flags: int) -> bytes:
        if not flags & _BIG:
            return page[at : at + length]
        [number] = struct.unpack_from("<Q", page, at)
        return self._read(number * self._page_size + _PAGE.size, length)
