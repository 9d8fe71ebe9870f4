# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata: which block of a disk shows which stored block, and where that is.

They live in an LMDB database, with what has changed since in memory, in two layers: `_active` takes
changes, and `_frozen` is on its way to the database. The database is written in one transaction,
which is there as a whole or not at all, whatever happens; the journal has what it does not have.

Databases in it (keys are big-endian, so that they are sorted; values are little-endian):

* `map`: disk, page of 128 blocks -> numbers of the stored blocks; 0 is zeroes
* `blocks`: number -> where, stored length, references, fingerprint
* `index`: the first 12 bytes of a fingerprint -> number
* `places`: offset on the data device -> number
* `segments`: number of a segment -> bytes of it that stored blocks need
* `disks`: disk -> size, name
* `state`: counters, and which journal goes on from here
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from vhostblk.dedup.database_file import is_whole
from vhostblk.dedup.errors import InconsistentError, damaged
from vhostblk.dedup.format import (
    Block,
    Disk,
    Kept,
    Mapped,
    Page,
    Record,
    Stored,
    Superblock,
    pack_block,
    unpack_block,
)
from vhostblk.schema import VhostblkError

DAMAGES = (lmdb.Error, struct.error)
"""What reading a database raises that is not as it was written."""
PAGE = 128
"""Blocks of a disk in one entry of the map."""
_PAGE_BITS = 7
_PORTION = 64
_BREATH = 0.0001
"""Whoever writes to the database lets others run for so many seconds after each portion."""
_LBA_BITS = 48
_EMPTY = bytes(8 * PAGE)
_PAGE_KEY = struct.Struct(">IQ")
_KEY = struct.Struct(">Q")
_NUMBER = struct.Struct("<Q")
_DISK = struct.Struct("<Q")
INDEX_KEY = 12
"""Bytes of a fingerprint that the index has; the rest is compared where the block is."""
_STATE = struct.Struct("<6Q")
DATABASES = ("map", "blocks", "index", "places", "segments", "disks", "state")
FILE = "metadata.mdb"


@dataclass
class State:
    """What the metadata say about themselves."""

    journal: int = 0
    """The journal's file that begins where the database ends."""
    frame: int = 0
    """The first frame in it."""
    next_block: int = 1
    head: int = 0
    """Where on the data device the log goes on."""
    blocks: int = 0
    """Stored blocks."""
    mapped: int = 0
    """Blocks of disks that show one."""

    def pack(self) -> bytes:
        return _STATE.pack(
            self.journal, self.frame, self.next_block, self.head, self.blocks, self.mapped
        )


@dataclass
class Layer:
    """Changes that are not in the database yet."""

    map: dict[int, int] = field(default_factory=dict)
    """disk << 48 | block: number."""
    blocks: dict[int, Block | None] = field(default_factory=dict)
    """None: it is gone."""
    index: dict[bytes, int] = field(default_factory=dict)
    unindexed: list[tuple[bytes, int]] = field(default_factory=list)
    places: dict[int, int | None] = field(default_factory=dict)
    segments: dict[int, int] = field(default_factory=dict)
    """By how much the bytes in use have changed."""
    disks: dict[int, tuple[int, str]] = field(default_factory=dict)
    ledger: bytes | None = None
    """What the database is to know of the ledger."""
    unreferenced: list[int] = field(default_factory=list)
    """Blocks that nothing refers to yet, or any more."""
    state: State = field(default_factory=State)

    def __len__(self) -> int:
        return len(self.map) + 2 * len(self.blocks) + len(self.disks)


class Dump:
    """The database as it was at one moment, as records. Any thread, one at a time."""

    def __init__(self, reader: Any, dbs: dict[str, Any]) -> None:
        self._reader = reader
        self._dbs = dbs

    def records(self) -> Iterator[Record]:
        """Disks, then blocks, then what shows them."""
        for key, value in self._pairs("disks"):
            [size] = _DISK.unpack_from(value)
            yield Disk(_KEY.unpack(key)[0], size, value[_DISK.size :].decode())
        for key, value in self._pairs("blocks"):
            yield Kept(_KEY.unpack(key)[0], value)
        for key, value in self._pairs("map"):
            disk, page = _PAGE_KEY.unpack(key)
            yield Page(disk, page, value)

    def _pairs(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        with self._reader.cursor(self._dbs[name]) as cursor:
            yield from cursor

    def close(self) -> None:
        """The database may forget how it was."""
        self._reader.abort()


class Tables:
    """The metadata of one store. Everything here is quick, but for write(), which may wait."""

    def __init__(self, directory: Path, super: Superblock, size: int) -> None:
        self._super = super
        self.path = directory / FILE
        if not is_whole(self.path):
            raise damaged(directory, f"{FILE} is not whole")
        try:
            self._env = lmdb.open(
                os.fspath(self.path),
                subdir=False,
                map_size=size,
                max_dbs=len(DATABASES),
                max_readers=16,
                metasync=True,
                sync=True,
                mode=0o600,
            )
        except (lmdb.CorruptedError, lmdb.InvalidError) as error:
            raise damaged(directory, error) from None
        except lmdb.Error as error:
            raise VhostblkError(
                f"the metadata of the dedup store in '{directory}' cannot be opened: {error}",
                data={"code": "bad-metadata"},
            ) from None
        self._active = Layer()
        self._frozen: Layer | None = None
        self._unreferenced: set[int] = set()
        self._lost: list[tuple[int, int]] = []
        self.pins: dict[int, int] = {}
        """Blocks that may not go although nothing refers to them yet."""
        try:
            self._begin()
        except BaseException:
            self._env.close()
            raise

    def _begin(self) -> None:
        self._dbs: dict[str, Any] = {name: self._env.open_db(name.encode()) for name in DATABASES}
        self._reader = self._env.begin()
        value = self._get("state", b"state")
        self.state = State(*_STATE.unpack(value)) if value else State()
        waiting = self._get("state", b"unreferenced")
        self._look_for_unreferenced(number for [number] in _NUMBER.iter_unpack(waiting or b""))

    def close(self) -> None:
        """Nothing is being written."""
        self._reader.abort()
        self._env.close()

    def _get(self, name: str, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._reader.get(key, db=self._dbs[name])
        except lmdb.Error as error:
            raise self._damage(error) from None
        return value

    @contextlib.contextmanager
    def _cursor(self, name: str) -> Iterator[Any]:
        try:
            with self._reader.cursor(self._dbs[name]) as cursor:
                yield cursor
        except DAMAGES as error:
            raise self._damage(error) from None

    def _damage(self, error: Exception) -> OSError:
        return OSError(errno.EIO, damaged(self.path.parent, error).desc)

    # ---- looking

    def page(self, disk: int, number: int) -> array[int]:
        """The numbers of the stored blocks of one page of a disk."""
        value = self._get("map", _PAGE_KEY.pack(disk, number))
        entries = array("Q", value or _EMPTY)
        first = disk << _LBA_BITS | number << _PAGE_BITS
        for layer in (self._frozen, self._active):
            if layer is not None and layer.map:
                changed = layer.map
                for index in range(PAGE):
                    found = changed.get(first + index)
                    if found is not None:
                        entries[index] = found
        return entries

    def get(self, disk: int, block: int) -> int:
        """The number of the stored block that a block of a disk shows; 0: zeroes."""
        key = disk << _LBA_BITS | block
        found = self._active.map.get(key)
        if found is None and self._frozen is not None:
            found = self._frozen.map.get(key)
        if found is not None:
            return found
        value = self._get("map", _PAGE_KEY.pack(disk, block >> _PAGE_BITS))
        if value is None:
            return 0
        return int(_NUMBER.unpack_from(value, 8 * (block & (PAGE - 1)))[0])

    def block(self, number: int) -> Block | None:
        """A stored block."""
        blocks = self._active.blocks
        if number in blocks:
            return blocks[number]
        if self._frozen is not None and number in self._frozen.blocks:
            return self._frozen.blocks[number]
        value = self._get("blocks", _KEY.pack(number))
        try:
            return unpack_block(value) if value is not None else None
        except struct.error as error:
            raise self._damage(error) from None

    def find(self, fingerprint: bytes) -> int:
        """The stored block with this content; 0: there is none."""
        key = fingerprint[:INDEX_KEY]
        for layer in (self._active, self._frozen):
            number = layer.index.get(key) if layer is not None else None
            if number is not None and self._is(number, fingerprint):
                return number
        value = self._get("index", key)
        if value is None:
            return 0
        number = int(_NUMBER.unpack(value)[0])
        return number if self._is(number, fingerprint) else 0

    def _is(self, number: int, fingerprint: bytes) -> bool:
        block = self.block(number)
        return block is not None and block.fingerprint == fingerprint

    def disks(self) -> dict[int, tuple[int, str]]:
        """All disks: size and name."""
        found = {}
        with self._cursor("disks") as cursor:
            for key, value in cursor:
                [size] = _DISK.unpack_from(value)
                found[int(_KEY.unpack(key)[0])] = (int(size), value[_DISK.size :].decode())
        for layer in (self._frozen, self._active):
            if layer is not None:
                found.update(layer.disks)
        return {disk: entry for disk, entry in sorted(found.items()) if entry[1]}

    def places(self, start: int, end: int) -> list[tuple[int, int]]:
        """Blocks in a part of the data device, as the database has them: offset, number."""
        found = []
        with self._cursor("places") as cursor:
            if cursor.set_range(_KEY.pack(start)):
                for key, value in cursor:
                    [offset] = _KEY.unpack(key)
                    if offset >= end:
                        break
                    found.append((int(offset), int(_NUMBER.unpack(value)[0])))
        return found

    def segments(self) -> dict[int, int]:
        """Bytes in use of the segments that have any, as the database has them."""
        with self._cursor("segments") as cursor:
            return {
                int(_KEY.unpack(key)[0]): int(_NUMBER.unpack(value)[0]) for key, value in cursor
            }

    def pages(self, disk: int) -> Iterator[tuple[int, array[int]]]:
        """The pages of a disk that the database has."""
        with self._cursor("map") as cursor:
            if cursor.set_range(_PAGE_KEY.pack(disk, 0)):
                for key, value in cursor:
                    found, number = _PAGE_KEY.unpack(key)
                    if found != disk:
                        return
                    yield int(number), array("Q", value)

    @property
    def frozen(self) -> bool:
        """Whether freeze() has been called and write() has not succeeded yet."""
        return self._frozen is not None

    @property
    def changes(self) -> int:
        """About how many changes are waiting for the database."""
        return len(self._active)

    @property
    def size(self) -> int:
        """Bytes of the database."""
        return int(self.path.stat().st_size)

    # ---- changing

    def apply(self, record: Record) -> None:
        """What a record of the journal says."""
        if isinstance(record, Mapped):
            for block in range(record.first, record.first + record.blocks):
                self._map(record.disk, block, record.number)
        elif isinstance(record, Stored):
            self._store(record)
        elif isinstance(record, Disk):
            self._active.disks[record.disk] = (record.size, record.name)

    def _store(self, record: Stored) -> None:
        active, state = self._active, self.state
        number = record.number
        old = self.block(number)
        if old is not None:
            self._vacate(old)
        refs = old.refs if old is not None else 0
        block = Block(record.offset, record.length, refs, record.fingerprint)
        active.blocks[number] = block
        active.places[block.offset] = number
        if old is None:
            active.index[block.fingerprint[:INDEX_KEY]] = number
            self._unreferenced.add(number)
            state.blocks += 1
            state.next_block = max(state.next_block, number + 1)
        segment = self._super.segment_of(block.offset)
        active.segments[segment] = active.segments.get(segment, 0) + block.space

    def _map(self, disk: int, block: int, number: int) -> None:
        old = self.get(disk, block)
        if old == number:
            return
        # The new one first: it may be the last use of what the old one is.
        if number:
            self._refer(number, 1)
            self.state.mapped += 1
        if old:
            self.state.mapped -= 1
            if self.block(old) is not None:  # else the store is damaged, and this mends it
                self._refer(old, -1)
        self._active.map[disk << _LBA_BITS | block] = number

    def _refer(self, number: int, change: int) -> None:
        block = self.block(number)
        if block is None:
            raise VhostblkError(
                f"the dedup store is damaged: its block {number} is missing; check it with repair",
                data={"code": "corrupt"},
            )
        refs = block.refs + change
        self._active.blocks[number] = Block(block.offset, block.length, refs, block.fingerprint)
        if refs <= 0:
            self._unreferenced.add(number)
        else:
            self._unreferenced.discard(number)

    def _vacate(self, block: Block) -> None:
        """A place that nothing needs once the database has been written."""
        active = self._active
        segment = self._super.segment_of(block.offset)
        active.segments[segment] = active.segments.get(segment, 0) - block.space
        active.places[block.offset] = None
        self._lost.append((segment, block.space))

    # ---- to the database

    def dying(self) -> list[int]:
        """Blocks that nothing refers to."""
        return sorted(number for number in self._unreferenced if not self.pins.get(number))

    def _look_for_unreferenced(self, numbers: Iterable[int]) -> None:
        blocks = ((number, self.block(number)) for number in numbers)
        self._unreferenced = {number for number, block in blocks if block and block.refs == 0}

    def end(self, number: int) -> None:
        """A block that nothing refers to goes."""
        block = self.block(number)
        if block is None or block.refs:
            raise InconsistentError(f"stored block {number} is to go, but is {block}")
        self._vacate(block)
        self._active.blocks[number] = None
        self._active.unindexed.append((block.fingerprint[:INDEX_KEY], number))
        self._unreferenced.discard(number)
        self.state.blocks -= 1

    def freeze(self) -> list[tuple[int, int]]:
        """Changes from here on are not part of the next write().

        What is given back becomes free when write() has succeeded: segment, bytes.
        """
        assert self._frozen is None
        self._frozen, self._active = self._active, Layer()
        self._frozen.state = State(**vars(self.state))
        self._frozen.unreferenced = sorted(self._unreferenced)
        lost, self._lost = self._lost, []
        return lost

    def set_ledger(self, value: bytes) -> None:
        """What the next write() says of the ledger."""
        assert self._frozen is not None
        self._frozen.ledger = value

    def put_ledger(self, value: bytes) -> None:
        """The same at once, durably."""
        with self._writing() as txn:
            txn.put(b"ledger", value, db=self._dbs["state"])
        self._reader.abort()
        self._reader = self._env.begin()

    def ledger(self) -> bytes | None:
        """What the database knows of the ledger."""
        return self._get("state", b"ledger")

    def write(self) -> None:
        """Put the frozen changes into the database, durably. Any thread; OSError if it fails."""
        frozen = self._frozen
        assert frozen is not None
        with self._writing() as txn:
            self._write(txn, frozen)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        try:
            with self._env.begin(write=True) as txn:
                yield txn
        except lmdb.MapFullError:
            raise OSError(errno.ENOSPC, "the metadata of the dedup store are full") from None
        except lmdb.CorruptedError as error:
            raise self._damage(error) from None
        except lmdb.Error as error:
            code = errno.ENOSPC if "No space" in str(error) else errno.EIO
            raise OSError(code, f"the metadata of the dedup store: {error}") from None

    def written(self) -> None:
        """write() has succeeded."""
        self._reader.abort()
        self._reader = self._env.begin()
        self._frozen = None

    def _write(self, txn: Any, layer: Layer) -> None:
        dbs = self._dbs
        self._write_map(txn, layer)
        gone = [number for number, block in layer.blocks.items() if block is None]
        for number in sorted(gone):
            txn.delete(_KEY.pack(number), db=dbs["blocks"])
        blocks = sorted((number, block) for number, block in layer.blocks.items() if block)
        self._put(txn, "blocks", ((_KEY.pack(number), pack_block(b)) for number, b in blocks))
        for name, number in sorted(layer.unindexed):
            # Another block may have come to the same place in the index.
            if txn.get(name, db=dbs["index"]) == _NUMBER.pack(number):
                txn.delete(name, db=dbs["index"])
        dead = {number for name, number in layer.unindexed}
        index = sorted((name, n) for name, n in layer.index.items() if n not in dead)
        self._put(txn, "index", ((name, _NUMBER.pack(number)) for name, number in index))
        for offset in sorted(at for at, owner in layer.places.items() if owner is None):
            txn.delete(_KEY.pack(offset), db=dbs["places"])
        places = sorted((at, owner) for at, owner in layer.places.items() if owner is not None)
        self._put(txn, "places", ((_KEY.pack(at), _NUMBER.pack(owner)) for at, owner in places))
        for segment, change in layer.segments.items():
            self._count(txn, segment, change)
        for disk, (size, title) in layer.disks.items():
            if title:
                txn.put(_KEY.pack(disk), _DISK.pack(size) + title.encode(), db=dbs["disks"])
            else:
                txn.delete(_KEY.pack(disk), db=dbs["disks"])
        txn.put(b"state", layer.state.pack(), db=dbs["state"])
        unreferenced = array("Q", layer.unreferenced).tobytes()
        txn.put(b"unreferenced", unreferenced, db=dbs["state"])
        if layer.ledger is not None:
            txn.put(b"ledger", layer.ledger, db=dbs["state"])

    def _put(self, txn: Any, name: str, entries: Iterator[tuple[bytes, bytes]]) -> None:
        """Sorted entries. In portions: else the control thread would wait for Python's lock."""
        with txn.cursor(self._dbs[name]) as cursor:
            while portion := list(itertools.islice(entries, _PORTION)):
                cursor.putmulti(portion)
                time.sleep(_BREATH)

    def _write_map(self, txn: Any, layer: Layer) -> None:
        pages: dict[int, list[int]] = {}
        for key in layer.map:
            pages.setdefault(key >> _PAGE_BITS, []).append(key)
        mask = (1 << _LBA_BITS - _PAGE_BITS) - 1
        for count, page in enumerate(sorted(pages)):
            if count % _PORTION == _PORTION - 1:
                time.sleep(_BREATH)
            name = _PAGE_KEY.pack(page >> _LBA_BITS - _PAGE_BITS, page & mask)
            entries = array("Q", txn.get(name, db=self._dbs["map"]) or _EMPTY)
            for key in pages[page]:
                entries[key & (PAGE - 1)] = layer.map[key]
            if any(entries):
                txn.put(name, entries.tobytes(), db=self._dbs["map"])
            else:
                txn.delete(name, db=self._dbs["map"])

    def _count(self, txn: Any, segment: int, change: int) -> None:
        name, db = _KEY.pack(segment), self._dbs["segments"]
        value = txn.get(name, db=db)
        used = (int(_NUMBER.unpack(value)[0]) if value else 0) + change
        if used < 0:
            raise InconsistentError(f"segment {segment} would have {used} bytes in use")
        if used:
            txn.put(name, _NUMBER.pack(used), db=db)
        elif value:
            txn.delete(name, db=db)

    # ---- for the ledger

    def dump_size(self) -> int:
        """About how many bytes that is in the ledger."""
        blocks, pages = (
            self._reader.stat(self._dbs[name])["entries"] for name in ("blocks", "map")
        )
        return int(blocks * 57 + pages * (15 + 8 * PAGE))

    def begin_dump(self) -> Dump:
        """All that the database has now."""
        return Dump(self._env.begin(), self._dbs)

    def load(self, records: Iterable[Record]) -> None:
        """Put records of a snapshot into a database that is being made anew. Durable."""
        state = self.state
        used: dict[int, int] = {}
        with self._writing() as txn:
            for record in records:
                if isinstance(record, Kept):
                    self._load_block(txn, record, used)
                elif isinstance(record, Page):
                    key = _PAGE_KEY.pack(record.disk, record.page)
                    txn.put(key, record.value, db=self._dbs["map"])
                    state.mapped += sum(map(bool, array("Q", record.value)))
                elif isinstance(record, Disk):
                    value = _DISK.pack(record.size) + record.name.encode()
                    txn.put(_KEY.pack(record.disk), value, db=self._dbs["disks"])
            for segment, change in used.items():
                self._count(txn, segment, change)
            txn.put(b"state", state.pack(), db=self._dbs["state"])
        self._reader.abort()
        self._reader = self._env.begin()

    def _load_block(self, txn: Any, record: Kept, used: dict[int, int]) -> None:
        block, state, dbs = unpack_block(record.value), self.state, self._dbs
        if block.refs == 0:
            self._unreferenced.add(record.number)
        number = _NUMBER.pack(record.number)
        txn.put(_KEY.pack(record.number), record.value, db=dbs["blocks"])
        txn.put(block.fingerprint[:INDEX_KEY], number, db=dbs["index"])
        txn.put(_KEY.pack(block.offset), number, db=dbs["places"])
        segment = self._super.segment_of(block.offset)
        used[segment] = used.get(segment, 0) + block.space
        state.blocks += 1
        state.next_block = max(state.next_block, record.number + 1)

    # ---- for the check

    @contextlib.contextmanager
    def transaction(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """To look at the whole database, and change it; nothing waits to be written."""
        assert self._frozen is None and not self.changes
        try:
            with self._writing() as txn:
                yield txn, self._dbs
        except struct.error as error:
            raise damaged(self.path.parent, error) from error
        self._reader.abort()
        self._reader = self._env.begin()
        # References may have been repaired.
        self._look_for_unreferenced(self._unreferenced | self.pins.keys())

    def copy(self, path: Path, ledger: bytes) -> None:
        """A consistent copy of the database, while it is in use, with that for ledger(). Any
        thread."""
        size = self._env.info()["map_size"]
        try:
            self._env.copy(os.fspath(path), compact=True)
            copy = lmdb.open(os.fspath(path), subdir=False, map_size=size, max_dbs=1)
            with copy, copy.begin(write=True) as txn:
                txn.put(b"ledger", ledger, db=copy.open_db(b"state", txn))
        except lmdb.Error as error:
            raise OSError(errno.EIO, f"a copy of the metadata: {error}") from None
