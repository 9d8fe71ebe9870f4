# SPDX-License-Identifier: GPL-2.0-or-later
"""The database of a store: named tables, of whose pages each one has a checksum.

What is in the file is what was written there, or `DamagedError` says that it is not. A change
happens as a whole, durably, or not at all. cffi_build/engine/tree_file.c has the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from vhostblk.dedup.errors import DamagedError
from vhostblk.engine.tree import Change, Reader, Tree, TreeError

TABLES = {
    "map": (12, 1024),
    "blocks": (8, 48),
    "index": (12, 8),
    "places": (8, 8),
    "segments": (8, 8),
    "disks": (8, 264),
    "state": (12, 512),
}
"""Bytes of the keys and values of each."""
_NUMBERS = {name: number for number, name in enumerate(TABLES)}
_STATE = _NUMBERS["state"]
_NAME = 8
_PART = TABLES["state"][1] - 2
_PORTION = 4096
"""Changes of a table that wait for the rest of a portion."""
CACHE = 2048
"""Pages of the database that are kept in memory for who looks things up all the time."""
_FEW = 64
"""The same for everybody else."""
_MOST_DAMAGES = 64
"""To be told."""

Entry = tuple[bytes, bytes | None]
"""A key, and its value from now on; None: it is to go."""


class _Damages:
    """What has been found to be damaged, in any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[str] = set()
        self.tell: Callable[[str], None] = lambda reason: None

    def told(self, error: TreeError) -> OSError:
        """What to raise instead."""
        if not error.damaged:
            return error
        reason = str(error.strerror)
        if reason not in self._known and len(self._known) < _MOST_DAMAGES:
            self._known.add(reason)
            self.tell(reason)
        return DamagedError(self._path.parent, reason)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except TreeError as error:
            raise self.told(error) from None


class View:
    """The database as it was at one moment. One thread at a time."""

    def __init__(self, damages: _Damages, reader: Reader) -> None:
        self._damages = damages
        self._reader = reader
        self._read = reader.get

    def close(self) -> None:
        """What it has looked at may be forgotten."""
        self._reader.close()

    def renew(self) -> None:
        """As it is now."""
        self._reader.renew()

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value of a key."""
        try:
            return self._read(_NUMBERS[table], key)
        except TreeError as error:
            raise self._damages.told(error) from None

    def scan(self, table: str, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All entries whose keys are not before `start`."""
        with self._damages.telling():
            yield from self._reader.scan(_NUMBERS[table], start)

    def entries(self, table: str) -> int:
        """How many a table has."""
        return self._reader.entries(_NUMBERS[table])

    def value(self, name: str) -> bytes | None:
        """What Writer.put_value() has put there."""
        parts = []
        for number in count():
            part = self.get("state", _part_key(name, number))
            if part is None:
                break
            length = int.from_bytes(part[:2], "little")
            parts.append(part[2 : 2 + length])
            if length < _PART:
                break
        return b"".join(parts) if parts else None

    def copy(self, path: Path, ledger: bytes) -> None:
        """All of it comes into a new file, with another value `ledger`, durably."""
        Tree.create(path, list(TABLES.values()))
        tree = Tree(path, list(TABLES.values()), 1 << 62)
        try:
            with self._damages.telling():
                self._reader.copy(tree)
            with _writing(tree) as writer:
                writer.put_value("ledger", ledger)
        finally:
            tree.close()


class Writer:
    """A change that is being prepared."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._waiting: dict[str, dict[bytes, bytes | None]] = {}

    def put(self, table: str, key: bytes, value: bytes | None) -> None:
        """An entry, which is put with others."""
        waiting = self._waiting.setdefault(table, {})
        waiting[key] = value
        if len(waiting) >= _PORTION:
            self.flush()

    def put_sorted(self, table: str, entries: list[Entry]) -> None:
        """Sorted entries, each of another key."""
        self._change.put(_NUMBERS[table], entries)

    def put_value(self, name: str, value: bytes) -> None:
        """Of any length. (Parts of an earlier one that was longer may be left, unread.)"""
        for number in range(len(value) // _PART + 1):
            part = value[number * _PART : (number + 1) * _PART]
            packed = len(part).to_bytes(2, "little") + part
            self.put("state", _part_key(name, number), packed.ljust(_PART + 2, b"\0"))

    def flush(self) -> None:
        """What waits is put."""
        for table, entries in self._waiting.items():
            self._change.put(_NUMBERS[table], sorted(entries.items()))
        self._waiting.clear()


def _part_key(name: str, number: int) -> bytes:
    return name.encode().ljust(_NAME, b"\0") + number.to_bytes(4, "big")


@contextlib.contextmanager
def _writing(tree: Tree) -> Iterator[Writer]:
    change = tree.change()
    writer = Writer(change)
    try:
        yield writer
        writer.flush()
        change.commit()
    finally:
        change.abandon()


class Database(View):
    """The file. As a view it is as it was when it was opened or renewed."""

    def __init__(self, path: Path, size: int) -> None:
        """It may grow to `size` bytes."""
        if not path.exists() or path.stat().st_size == 0:
            Tree.create(path, list(TABLES.values()))
        self._damages = _Damages(path)
        with self._damages.telling():
            self._tree = Tree(path, list(TABLES.values()), size)
        super().__init__(self._damages, self._tree.reader(CACHE))

    def close(self) -> None:
        super().close()
        self._tree.close()

    def when_damaged(self, tell: Callable[[str], None]) -> None:
        """Call it with what is found to be damaged from now on, each once; in any thread."""
        self._damages.tell = tell

    def view(self) -> View:
        """The database as it is now, for another thread, or for later."""
        return View(self._damages, self._tree.reader(_FEW))

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        """A change; what raises in it leaves everything as it is."""
        with self._damages.telling(), _writing(self._tree) as writer:
            yield writer
