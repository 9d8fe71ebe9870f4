# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata: which block of a disk shows which stored block, and where that is.

They live in a database, with what has changed since in memory, in two layers: `_active` takes
changes, and `_frozen` is on its way to the database. The database is written in one transaction,
which is there as a whole or not at all, whatever happens; the journal has what it does not have.

Tables in it (keys are big-endian, so that they are sorted; values are little-endian):

* `map`: disk, page of 128 blocks -> numbers of the stored blocks; 0 is zeroes
* `blocks`: number -> where, stored length, references, fingerprint
* `index`: the first 12 bytes of a fingerprint -> number
* `places`: offset on the data device -> number
* `segments`: number of a segment -> bytes of it that stored blocks need
* `disks`: disk -> size, bytes of its name, name
* `state`: counters, and which journal goes on from here
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vhostblk.dedup.database import Database, View, Writer
from vhostblk.dedup.errors import DamagedError, InconsistentError, damaged
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

DAMAGES = (struct.error,)
"""What values raise that are as they were written, and make no sense."""
PAGE = 128
"""Blocks of a disk in one entry of the map."""
_PAGE_BITS = 7
_PORTION = 512
_BREATH = 0.0001
"""Whoever writes to the database lets others run for so many seconds after each portion."""
_LBA_BITS = 48
PAGES = 1 << _LBA_BITS - _PAGE_BITS
"""Of the map of a disk, at most."""
_EMPTY = bytes(8 * PAGE)
_PAGE_KEY = struct.Struct(">IQ")
_KEY = struct.Struct(">Q")
_NUMBER = struct.Struct("<Q")
_DISK = struct.Struct("<QB255s")
INDEX_KEY = 12
"""Bytes of a fingerprint that the index has; the rest is compared where the block is."""
_STATE = struct.Struct("<6Q")
FILE = "metadata.db"


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
    pages: set[int] = field(default_factory=set)
    """Those of the map: disk << 48 | block, without the lowest bits."""
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


def pack_disk(size: int, name: str) -> bytes:
    """As the database has it."""
    encoded = name.encode()
    return _DISK.pack(size, len(encoded), encoded)


def _unpack_disk(value: bytes) -> tuple[int, str]:
    size, length, name = _DISK.unpack(value)
    return int(size), name[:length].decode()


class Dump:
    """The database as it was at one moment, as records. Any thread, one at a time."""

    def __init__(self, view: View) -> None:
        self._view = view

    def records(self) -> Iterator[Record]:
        """Disks, then blocks, then what shows them."""
        for key, value in self._view.scan("disks"):
            yield Disk(_KEY.unpack(key)[0], *_unpack_disk(value))
        for key, value in self._view.scan("blocks"):
            yield Kept(_KEY.unpack(key)[0], value)
        for key, value in self._view.scan("map"):
            disk, page = _PAGE_KEY.unpack(key)
            yield Page(disk, page, value)

    def close(self) -> None:
        """The database may forget how it was."""
        self._view.close()


class Edit:
    """Changes by hand, of the database as it is."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self.get = database.get
        self.scan = database.scan
        self.put = writer.put
        """None: the entry is to go."""
        self.put_value = writer.put_value


class Tables:
    """The metadata of one store. Everything here is quick, but for write(), which may wait."""

    def __init__(self, directory: Path, super: Superblock, size: int) -> None:
        self._super = super
        self.path = directory / FILE
        try:
            self._database = Database(self.path, size)
        except DamagedError as error:
            raise damaged(directory, error.reason) from None
        except OSError as error:
            raise VhostblkError(
                f"the metadata of the dedup store in '{directory}' cannot be opened: {error}",
                data={"code": "bad-metadata"},
            ) from None
        self._get = self._database.get
        self._active = Layer()
        self._frozen: Layer | None = None
        self._unreferenced: set[int] = set()
        self._lost: list[tuple[int, int]] = []
        self.pins: dict[int, int] = {}
        """Blocks that may not go although nothing refers to them yet."""
        try:
            self._begin()
        except BaseException:
            self._database.close()
            raise

    def when_damaged(self, tell: Callable[[str], None]) -> None:
        """Call it with what is found to be damaged from now on; in any thread."""
        self._database.when_damaged(tell)

    def _begin(self) -> None:
        value = self._database.value("state")
        self.state = State(*_STATE.unpack(value)) if value else State()
        waiting = self._database.value("unref") or b""
        self._look_for_unreferenced(number for [number] in _NUMBER.iter_unpack(waiting))

    def close(self) -> None:
        """Nothing is being written."""
        self._database.close()

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
        return unpack_block(value) if value is not None else None

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
        for key, value in self._database.scan("disks"):
            found[int(_KEY.unpack(key)[0])] = _unpack_disk(value)
        for layer in (self._frozen, self._active):
            if layer is not None:
                found.update(layer.disks)
        return {disk: entry for disk, entry in sorted(found.items()) if entry[1]}

    def places(self, start: int, end: int) -> list[tuple[int, int]]:
        """Blocks in a part of the data device, as the database has them: offset, number."""
        found = []
        for key, value in self._database.scan("places", _KEY.pack(start)):
            [offset] = _KEY.unpack(key)
            if offset >= end:
                break
            found.append((int(offset), int(_NUMBER.unpack(value)[0])))
        return found

    def segments(self) -> dict[int, int]:
        """Bytes in use of the segments that have any, as the database has them."""
        found = self._database.scan("segments")
        return {int(_KEY.unpack(key)[0]): int(_NUMBER.unpack(value)[0]) for key, value in found}

    def pages(self, disk: int, first: int, end: int, most: int) -> list[int]:
        """The first few pages of a part of a disk that the database has."""
        found: list[int] = []
        for key, _ in self._database.scan("map", _PAGE_KEY.pack(disk, first)):
            other, page = _PAGE_KEY.unpack(key)
            if other != disk or page >= end or len(found) == most:
                break
            found.append(int(page))
        return found

    def changed_pages(self, disk: int, first: int, end: int) -> list[int]:
        """The pages of a part of a disk of which something waits for the database, sorted."""
        base = disk * PAGES
        asked = range(base + first, base + end)
        found: set[int] = set()
        for layer in (self._frozen, self._active):
            if layer is None:
                continue
            if len(asked) < len(layer.pages):
                found.update(page for page in asked if page in layer.pages)
            else:
                found.update(page for page in layer.pages if page in asked)
        return sorted(page - base for page in found)

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
        key = disk << _LBA_BITS | block
        self._active.map[key] = number
        self._active.pages.add(key >> _PAGE_BITS)

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
        with self._database.writing() as writer:
            writer.put_value("ledger", value)
        self._database.renew()

    def ledger(self) -> bytes | None:
        """What the database knows of the ledger."""
        return self._database.value("ledger")

    def write(self) -> None:
        """Put the frozen changes into the database, durably. Any thread; OSError if it fails."""
        frozen = self._frozen
        assert frozen is not None
        view = self._database.view()
        try:
            with self._database.writing() as writer:
                self._write(writer, view, frozen)
        finally:
            view.close()

    def written(self) -> None:
        """write() has succeeded."""
        self._database.renew()
        self._frozen = None

    def _write(self, writer: Writer, view: View, layer: Layer) -> None:
        self._put(writer, "map", _map_entries(view, layer))
        blocks = sorted(layer.blocks.items())
        self._put(writer, "blocks", ((_KEY.pack(n), b and pack_block(b)) for n, b in blocks))
        self._put(writer, "index", _index_entries(view, layer))
        places = sorted(layer.places.items())
        self._put(
            writer,
            "places",
            ((_KEY.pack(at), n if n is None else _NUMBER.pack(n)) for at, n in places),
        )
        for segment, change in layer.segments.items():
            _count(writer, view, segment, change)
        for disk, (size, title) in layer.disks.items():
            writer.put("disks", _KEY.pack(disk), pack_disk(size, title) if title else None)
        writer.put_value("state", layer.state.pack())
        writer.put_value("unref", array("Q", layer.unreferenced).tobytes())
        if layer.ledger is not None:
            writer.put_value("ledger", layer.ledger)

    def _put(
        self, writer: Writer, table: str, entries: Iterator[tuple[bytes, bytes | None]]
    ) -> None:
        """Sorted entries. In portions: else the control thread would wait for Python's lock."""
        while portion := list(itertools.islice(entries, _PORTION)):
            writer.put_sorted(table, portion)
            time.sleep(_BREATH)

    # ---- for the ledger

    def dump_size(self) -> int:
        """About how many bytes that is in the ledger."""
        blocks, pages = (self._database.entries(name) for name in ("blocks", "map"))
        return int(blocks * 57 + pages * (15 + 8 * PAGE))

    def begin_dump(self) -> Dump:
        """All that the database has now."""
        return Dump(self._database.view())

    def load(self, records: Iterable[Record]) -> None:
        """Put records of a snapshot into a database that is being made anew. Durable."""
        state = self.state
        used: dict[int, int] = {}
        with self._database.writing() as writer:
            for record in records:
                if isinstance(record, Kept):
                    self._load_block(writer, record, used)
                elif isinstance(record, Page):
                    writer.put("map", _PAGE_KEY.pack(record.disk, record.page), record.value)
                    state.mapped += sum(map(bool, array("Q", record.value)))
                elif isinstance(record, Disk):
                    value = pack_disk(record.size, record.name)
                    writer.put("disks", _KEY.pack(record.disk), value)
            for segment, change in used.items():
                _count(writer, self._database, segment, change)
            writer.put_value("state", state.pack())
        self._database.renew()

    def _load_block(self, writer: Writer, record: Kept, used: dict[int, int]) -> None:
        block, state = unpack_block(record.value), self.state
        if block.refs == 0:
            self._unreferenced.add(record.number)
        number = _NUMBER.pack(record.number)
        writer.put("blocks", _KEY.pack(record.number), record.value)
        writer.put("index", block.fingerprint[:INDEX_KEY], number)
        writer.put("places", _KEY.pack(block.offset), number)
        segment = self._super.segment_of(block.offset)
        used[segment] = used.get(segment, 0) + block.space
        state.blocks += 1
        state.next_block = max(state.next_block, record.number + 1)

    # ---- for the check

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Edit]:
        """To look at the whole database, and change it; nothing waits to be written."""
        assert self._frozen is None and not self.changes
        with self._database.writing() as writer:
            yield Edit(self._database, writer)
        self._database.renew()
        # References may have been repaired.
        self._look_for_unreferenced(self._unreferenced | self.pins.keys())

    def copy(self, path: Path, ledger: bytes) -> None:
        """A consistent copy of the database, while it is in use, with that for ledger(). Any
        thread."""
        view = self._database.view()
        try:
            view.copy(path, ledger)
        finally:
            view.close()


def _map_entries(view: View, layer: Layer) -> Iterator[tuple[bytes, bytes | None]]:
    pages: dict[int, list[int]] = {}
    for key in layer.map:
        pages.setdefault(key >> _PAGE_BITS, []).append(key)
    for page in sorted(pages):
        name = _PAGE_KEY.pack(*divmod(page, PAGES))
        entries = array("Q", view.get("map", name) or _EMPTY)
        for key in pages[page]:
            entries[key & (PAGE - 1)] = layer.map[key]
        yield name, entries.tobytes() if any(entries) else None


def _index_entries(view: View, layer: Layer) -> Iterator[tuple[bytes, bytes | None]]:
    dead = {number for _, number in layer.unindexed}
    entries: dict[bytes, int | None] = dict.fromkeys((name for name, _ in layer.unindexed), None)
    entries.update((name, number) for name, number in layer.index.items() if number not in dead)
    gone: dict[bytes, set[bytes]] = {}
    for name, number in layer.unindexed:
        gone.setdefault(name, set()).add(_NUMBER.pack(number))
    for name in sorted(entries):
        owner = entries[name]
        if owner is not None:
            yield name, _NUMBER.pack(owner)
        elif view.get("index", name) in gone[name]:  # else another block has come to this place
            yield name, None


def _count(writer: Writer, view: View, segment: int, change: int) -> None:
    key = _KEY.pack(segment)
    value = view.get("segments", key)
    used = (int(_NUMBER.unpack(value)[0]) if value else 0) + change
    if used < 0:
        raise InconsistentError(f"segment {segment} would have {used} bytes in use")
    writer.put("segments", key, _NUMBER.pack(used) if used else None)
