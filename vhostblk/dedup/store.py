# SPDX-License-Identifier: GPL-2.0-or-later
"""A dedup store in use: blocks with different content, each kept once, and who shows which.

The order of writes, from which everything else follows (docs/dedup.md has the long version):

1. New blocks are written where nothing is, at the head of the log on the data device.
2. When they are there, a frame in the journal says where, and which blocks of which disk show
   them. Then the guest's write is complete: a kill of this process loses neither.
3. A flush writes the ledger (ledger.py), flushes the data device, then adds a mark to the
   journal, "all blocks before this frame are on stable storage", and syncs the journal.
4. A checkpoint begins a new journal file, writes the ledger, flushes the data device, writes the
   metadata database in one durable transaction, and only then removes the old journal and gives
   back segments.

Whoever opens the store after a crash replays the journal. Blocks that came after the last mark
may not have reached the data device: each is read and its fingerprint compared. One that is not
there is left out together with all that shows it, as if the writes had never been made: nobody
had been told that they were flushed.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import fcntl
import logging
import os
import time
from array import array
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vhostblk.dedup.check import Check, Result
from vhostblk.dedup.compression import compress, decompress
from vhostblk.dedup.errors import InconsistentError, damaged
from vhostblk.dedup.format import (
    DISK_NAME_MAX,
    HASHES,
    LIFE_AT,
    SUPERBLOCK,
    Block,
    Disk,
    Mapped,
    Marked,
    Record,
    Stored,
    Superblock,
    Taken,
    pack_life,
    pack_records,
    parse_life,
    stored_space,
)
from vhostblk.dedup.journal import Journal, sync_directory, write_file
from vhostblk.dedup.ledger import Ledger, portions
from vhostblk.dedup.ledger import State as LedgerState
from vhostblk.dedup.replay import Replay
from vhostblk.dedup.space import GUESTS_RESERVE, NoSpace, Space
from vhostblk.dedup.tables import DAMAGES, FILE, PAGE, Dump, Tables
from vhostblk.schema import VhostblkError

logger = logging.getLogger(__name__)

Result_ = TypeVar("Result_")

_LOCK_WAIT = 5.0
_PORTION = 1 << 20
_CHECK_PORTION = 128 << 10
HOLD_INTERVAL = 0.5
"""Seconds until something that failed for want of space is tried again."""
UNMOVABLE_INTERVAL = 5.0
"""Seconds until a segment that could not be read is tried again."""
LEVELS = (80, 90, 95)
"""Per cent of either device: when more is in use, there is an event."""
LEAST_SEGMENTS = 8
"""Of a store: what is kept for garbage collection and the ledger, and a few for data."""
CHANGE_BYTES = 256
"""Memory for a change that waits for the database, at most (tests/test_dedup_space.py)."""
_BACKLOG = 4
"""Writes wait when there are so many times more changes than begin a checkpoint."""
STATISTICS_INTERVAL = 10.0
"""Seconds from one event with statistics to the next, if something has happened; and until a ledger
that is broken is begun again."""


class Data(Protocol):
    """The data device."""

    size: int

    def read(self, offset: int, into: int | bytearray | memoryview) -> Awaitable[Any]:
        """The buffer, or a new one of that many bytes."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> Awaitable[Any]:
        """Write."""

    def flush(self) -> Awaitable[Any]:
        """What was written before is on stable storage."""

    def discard(self, offset: int, length: int) -> Awaitable[Any]:
        """The range is not needed."""


Send = Callable[[int, int, int], Awaitable[Any]]
"""Writes to an offset of the data device: where in the content, how many bytes."""


class Member(Protocol):
    """A disk of the store that is in use."""

    @property
    def disk(self) -> str:
        """Which one."""

    @property
    def data(self) -> Data:
        """The data device, as this disk reaches it."""

    def set_dirty(self, dirty: bool) -> None:
        """Whether there is something to be flushed."""

    def is_patient(self) -> bool:
        """Whether its writes may wait for space."""

    def forget_places(self) -> None:
        """Blocks have moved."""

    async def grace(self) -> None:
        """Done when no request under way uses a place that it has learnt before."""

    def working(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A step of background work."""

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the control clients."""


@dataclass
class Tuning:
    """How a store behaves, apart from what is on disk."""

    metadata_size: int = 256 << 30
    """The most that the database may grow to."""
    changes: int = 32768
    """A checkpoint is made after that many changes."""
    journal: int = 64 << 20
    """Or when the journal has that many bytes."""
    compress: bool = False
    """Blocks are compressed with zstd if that makes them smaller."""
    verify: bool = False
    """Compare what has the same fingerprint byte by byte."""
    hold: bool = False
    """Writes wait when there is no space, instead of failing."""
    discard: bool = False
    """Free segments are discarded on the data device."""
    garbage: float = 0.25
    """Garbage collection begins when less than this part of the data device is free."""

    @staticmethod
    def changes_in(memory: int) -> int:
        """After how many changes to begin a checkpoint so that all that wait fit into memory.

        Two layers of them: one on its way to the database, and one that takes new ones.
        """
        return max(64, memory // (2 * _BACKLOG * CHANGE_BYTES))


@dataclass
class Counters:
    """Since the store was opened."""

    written: int = 0
    """Blocks that guests have written."""
    hits: int = 0
    """Of them, those that were there."""
    zeroes: int = 0
    stored: int = 0
    moved: int = 0
    checkpoints: int = 0


class Store:
    """One store, opened once in a process, however many disks of it are in use."""

    def __init__(self, directory: Path, tuning: Tuning) -> None:
        self.directory = directory
        self.tuning = tuning
        self.members: list[Member] = []
        self.deleting: set[str] = set()
        """Disks that are being deleted."""
        self.counters = Counters()
        self._writing: dict[bytes, asyncio.Future[None]] = {}
        self._readers: set[asyncio.Future[None]] = set()
        self._flush_lock = asyncio.Lock()
        self._checkpoint_lock = asyncio.Lock()
        self._collect_lock = asyncio.Lock()
        self._room_lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._protected: set[asyncio.Task[Any]] = set()
        self._checkpointing = self._collecting = False
        self._lost: list[tuple[int, int]] = []
        self._moved = False
        self._durable = 0
        self._dirty = False
        self._journal_lost = 0  # the journal may lack earlier frames, and the database, too
        self._stopped = False
        self._full_devices: set[str] = set()  # those of which the operator has been told so
        self._told_level = {"data": 0, "metadata": 0}
        self._watched = -1  # free segments when _watch() has last looked
        self._rate = time.monotonic(), 0, 0.0  # when, hits, and hits per second
        self._dump: tuple[Dump, int] | None = None  # what the ledger's snapshot is made of
        self._told_written = 0  # blocks written when statistics were last told
        # Segments of which not everything could be read, and when that may be tried again.
        self._unmovable: dict[int, float] = {}
        self._storing = self._waiting = 0  # writes under way, and those that wait for space
        self._not_before = 0.0  # background work that has failed is not begun again before
        self._room: asyncio.Future[None] | None = None
        self._still: asyncio.Future[None] | None = None  # until then nothing may change
        self._lock_fd = -1

    # ---- life

    @classmethod
    async def create(cls, directory: Path, data: Data, super: Superblock) -> None:
        """Make an empty store. What was on the data device is lost."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any((directory / name).exists() for name in (FILE, "superblock")):
            raise VhostblkError(
                f"'{directory}' has the metadata of a dedup store already",
                data={"code": "exists"},
            )
        if super.segments(data.size) < LEAST_SEGMENTS:
            need = super.segment_at(LEAST_SEGMENTS)
            raise VhostblkError(
                f"the data device has {data.size} bytes; a dedup store with segments of "
                f"{super.segment_size} needs at least {need}",
                data={"code": "too-small"},
            )
        packed = super.pack()
        await data.write(0, packed)
        await data.flush()
        # The file that makes the directory a store comes last.
        path = directory / "superblock"
        temporary = directory / "superblock.new"
        await asyncio.to_thread(write_file, temporary, packed)
        temporary.rename(path)
        sync_directory(directory)

    async def open(self, data: Data) -> None:
        """Open the store, and repair what a crash has left."""
        try:
            await self._open(data)
        except (InconsistentError, *DAMAGES) as error:
            raise damaged(self.directory, error) from error

    async def _open(self, data: Data) -> None:
        await self._lock()
        with contextlib.ExitStack() as undo:
            undo.callback(self._unlock)
            self.super = await self._read_superblock(data)
            self._hash = HASHES[self.super.hash]
            self.zero = self._hash(bytes(self.super.block_size))
            self.tables = Tables(self.directory, self.super, self.tuning.metadata_size)
            undo.callback(self.tables.close)
            sync_directory(self.directory)  # the database may be new
            self.journal = Journal(self.directory, self.super.uuid)
            undo.callback(self.journal.close)
            state = await self._next_life(data)
            head, used = self.tables.state.head, self.tables.segments()
            self.space = Space(self.super, data.size, used, head, state.segments)
            name, add = str(self.directory), self._journal_ledger
            self.ledger = Ledger(self.super, self.space, state, add, name, self.emit)
            await self._recover(data)
            undo.pop_all()
        self._run(self._now_and_then())

    async def _next_life(self, data: Data) -> LedgerState:
        """The database knows of it, durably, before the data device is written to."""
        saved = self.tables.ledger()
        state = LedgerState.parse(saved) if saved else LedgerState()
        if not self.super.has_ledger:
            return state
        uuid = self.super.uuid
        there = parse_life(uuid, await data.read(LIFE_AT, SUPERBLOCK))
        if saved is None and there:
            raise damaged(self.directory, f"{FILE} is missing, or empty")
        if there not in (state.life, state.previous):
            logger.warning(
                "dedup store '%s': these metadata are not those that the data device was last used "
                "with; if they are older, blocks may have been overwritten since: dedup-check with "
                "content finds out",
                self.directory,
            )
            state.broken, state.complete = True, False
        state.previous = there
        state.life = max(state.life, there, time.time_ns() // 1_000_000) + 1
        self.tables.put_ledger(state.pack())
        await data.write(LIFE_AT, pack_life(uuid, state.life))
        return state

    async def _read_superblock(self, data: Data) -> Superblock:
        here = Superblock.parse((self.directory / "superblock").read_bytes())
        there = Superblock.parse(await data.read(0, SUPERBLOCK))
        if here != there:
            raise VhostblkError(
                f"the metadata in '{self.directory}' belong to another data device",
                data={"code": "mismatch"},
            )
        return here

    async def _lock(self) -> None:
        """One process at a time. One that was killed is given time to end."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        if not (self.directory / "superblock").exists():
            raise VhostblkError(
                f"there is no dedup store in '{self.directory}'; create one with blockdev-create",
                data={"code": "no-metadata"},
            )
        try:
            self._lock_fd = os.open(self.directory / "lock", flags, 0o600)
        except OSError as error:
            raise VhostblkError(
                f"the dedup store in '{self.directory}' cannot be opened: {error.strerror}",
                data={"code": "no-metadata"},
            ) from None
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._unlock()
                    raise VhostblkError(
                        f"the dedup store in '{self.directory}' is in use by another process",
                        data={"code": "in-use"},
                    ) from None
                await asyncio.sleep(0.05)

    def _unlock(self) -> None:
        os.close(self._lock_fd)
        self._lock_fd = -1

    def join(self, member: Member) -> None:
        """A disk is in use from now on."""
        self.members.append(member)
        if len(self.members) == 1 and self.ledger.condition == "broken":
            self.ledger.tell("it was when the store was opened")
        self._watch_ledger()

    async def leave(self, member: Member) -> None:
        """A disk is not in use any more, and nothing is in flight on it.

        Once this is done the store does not need it: work that is under way reaches the data
        device through it, or waits for a period of grace of its map.
        """
        self.members.remove(member)
        if self._protected:
            await asyncio.wait(self._protected)

    async def close(self, data: Data) -> None:
        """Nothing is in flight, no disk is in use."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*self._protected, return_exceptions=True)
        try:
            await self._checkpoint(data)
        except OSError as error:
            # The journal has it all.
            logger.warning("dedup store '%s': no last checkpoint: %s", self.directory, error)
            with contextlib.suppress(OSError):
                await self.flush(data)
        self.journal.close()
        self.tables.close()
        self._unlock()

    # ---- after a crash

    async def _recover(self, data: Data) -> None:
        state, journal = self.tables.state, self.journal
        frames = list(journal.read(state.journal, state.frame))
        marks = (r.frame for _, records in frames for r in records if isinstance(r, Marked))
        taken = [r.segment for _, records in frames for r in records if isinstance(r, Taken)]
        for segment in taken:
            self.space.taken(segment)
        self.ledger.resume(state.frame, taken, crashed=bool(frames))
        replay = Replay(self.tables, max(marks, default=0), partial(self._is_there, data))
        for frame, records in frames:
            held = await replay.frame(frame, records)
            for record in held:
                if isinstance(record, Stored):
                    self.space.replayed(record.offset, stored_space(record.length))
            self.ledger.add(frame, pack_records(held))
        self.space.check()
        if frames:
            logger.info(
                "dedup store '%s' was not closed: %d changes replayed", self.directory, len(frames)
            )
        if replay.dropped:
            logger.info(
                "dedup store '%s': %d unflushed writes had not reached the data device",
                self.directory,
                replay.dropped,
            )
        last = frames[-1][0] + 1 if frames else state.frame
        # Files of the past must not seem to follow what is written from now on.
        number = journal.last_number(state.journal) + 1
        first = state.journal
        journal.begin(number, last)
        try:
            await self._checkpoint(data, rotate=False)
        except OSError as error:
            # A mark behind frames of which some do not hold would say that they do.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not replay.whole:
                raise
            logger.warning(
                "dedup store '%s': the database cannot be written: %s; the journal goes on",
                self.directory,
                error.strerror,
            )
            journal.go_on_from(first)
            self._dirty = True

    async def _is_there(self, data: Data, record: Stored) -> bool:
        block = Block(record.offset, record.length, 0, record.fingerprint)
        with contextlib.suppress(OSError, VhostblkError):
            return self._hash(await self.read(data, block)) == record.fingerprint
        return False

    # ---- disks

    def disk(self, name: str) -> tuple[int, int] | None:
        """Number and size of a disk."""
        for number, (size, found) in self.tables.disks().items():
            if found == name:
                return number, size
        return None

    def set_disk(self, name: str, size: int) -> int:
        """A disk of this name has that size from now on; its number. Durable with a flush."""
        if not 0 < len(name.encode()) <= DISK_NAME_MAX:
            raise VhostblkError(
                f"'{name}' is no name of a disk: these have 1 to {DISK_NAME_MAX} bytes of UTF-8",
                data={"code": "bad-value", "parameter": "disk"},
            )
        disks = self.tables.disks()
        known = [number for number, (_, other) in disks.items() if other == name]
        number = known[0] if known else max(disks, default=0) + 1
        self._record([Disk(number, size, name)])
        return number

    # ---- reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Places that are looked up inside are not used again before the end."""
        done = _future()
        self._readers.add(done)
        try:
            yield
        finally:
            self._readers.discard(done)
            done.set_result(None)

    async def read(self, data: Data, block: Block) -> bytes | bytearray:
        """The content of a stored block."""
        content: bytearray = await data.read(block.offset, block.space)
        if block.length == self.super.block_size:
            return content
        return decompress(content[: block.length], self.super.block_size)

    async def read_block(self, data: Data, disk: int, index: int) -> bytes | bytearray:
        """What a block of a disk shows."""
        with self.reading():
            number = self.tables.get(disk, index)
            if number == 0:
                return bytes(self.super.block_size)
            block = self.tables.block(number)
            if block is None:
                raise OSError(errno.EIO, f"block {number} of the dedup store is missing")
            return await self.read(data, block)

    # ---- writing

    async def write(
        self,
        data: Data,
        disk: int,
        first: int,
        content: memoryview,
        prints: Sequence[bytes],
        send: Send | None = None,
    ) -> list[int]:
        """Whole blocks of a disk, with their fingerprints; which stored blocks these show now.

        Nobody else writes to them meanwhile. `send` is another way to write the content.
        """
        await self._may_change(data)
        writing = _Write(self, data, content, prints, send)
        self._storing += 1
        try:
            await writing.prepare()
            numbers: list[int] = []
            await self._moving()
            await self._until(data, lambda: self._publish(writing, disk, first, numbers))
        finally:
            self._storing -= 1
            writing.end()
        self._watch()
        return numbers

    def write_known(self, disk: int, first: int, prints: Sequence[bytes]) -> list[int] | None:
        """The same at once, if all of it is there already; None: write() has to do it."""
        tables, zero = self.tables, self.zero
        if self._still is not None or self.tuning.verify:
            return None
        if tables.changes > _BACKLOG * self.tuning.changes:
            return None
        numbers = []
        for name in prints:
            number = tables.find(name)
            if not number and name != zero:
                return None
            numbers.append(number)
        try:
            self._map(disk, first, numbers, [])
        except OSError:
            return None  # nothing has happened; write() knows what to do
        self._watch()
        return numbers

    def begin_new(self, prints: list[bytes]) -> int | None:
        """Room in one piece for blocks all of which are new; None: write() has to do it.

        The way of most blocks that are not there yet, without what write() does for all others.
        Whoever gets an offset writes the blocks there, and calls end_new().
        """
        tables, tuning, space = self.tables, self.tuning, self.space
        if self._still is not None or self._stopped or tuning.verify or tuning.compress:
            return None
        if tables.changes > _BACKLOG * tuning.changes or len(set(prints)) != len(prints):
            return None
        for name in prints:
            if name == self.zero or name in self._writing or tables.find(name):
                return None
        length = len(prints) << self.super.block_bits
        if not space.fits(length):
            return None
        offset, _ = space.allocate(length)
        self._storing += 1
        waiting = _future()
        for name in prints:
            self._writing[name] = waiting
        return offset

    def end_new(
        self, disk: int, first: int, prints: list[bytes], offset: int, *, written: bool
    ) -> list[int] | None:
        """The blocks are `written` there: blocks of a disk show them. None: nothing has changed."""
        tables, size = self.tables, self.super.block_size
        numbers: list[int] | None = None
        try:
            if written and self._still is None:
                number = tables.state.next_block
                numbers = list(range(number, number + len(prints)))
                stored: list[Record] = [
                    Stored(number + at, offset + at * size, size, name)
                    for at, name in enumerate(prints)
                ]
                self._map(disk, first, numbers, stored)
        except OSError:
            numbers = None  # write() knows what to do
        finally:
            self._storing -= 1
            self.space.landed(offset)
            waiting = self._writing[prints[0]]
            for name in prints:
                del self._writing[name]
            waiting.set_result(None)
        self._watch()
        return numbers

    def _publish(self, writing: _Write, disk: int, first: int, run: list[int]) -> None:
        records = writing.stored_records()
        run[:] = writing.numbers()
        self._map(disk, first, run, records)
        writing.published()

    def _map(self, disk: int, first: int, run: list[int], records: list[Record]) -> None:
        """Blocks of a disk show these stored blocks; `records` are of those that are new."""
        new = len(records)
        at = 0
        while at < len(run):
            end = at + 1
            while end < len(run) and run[end] == run[at]:
                end += 1
            records.append(Mapped(disk, first + at, end - at, run[at]))
            at = end
        self._record(records)
        counters, zeroes = self.counters, run.count(0)
        counters.written += len(run)
        counters.zeroes += zeroes
        counters.stored += new
        counters.hits += len(run) - zeroes - new

    async def unmap(
        self, data: Data, disk: int, first: int, end: int
    ) -> AsyncIterator[tuple[int, int]]:
        """Blocks of a disk show zeroes; gives those for which that is so: first, how many."""
        for page in range(first // PAGE, (end - 1) // PAGE + 1):
            await self._may_change(data)
            await self._moving()
            begin, stop = max(first, page * PAGE), min(end, (page + 1) * PAGE)
            shown = self.tables.page(disk, page)[begin % PAGE : begin % PAGE + stop - begin]
            if any(shown):
                record = Mapped(disk, begin, stop - begin, 0)
                await self._until(data, partial(self._record, [record]))
                self._watch()
            yield begin, stop - begin
            if page % 64 == 63:
                await asyncio.sleep(0)  # others want to live

    async def _may_change(self, data: Data) -> None:
        """Memory is bounded: too many changes wait for the database to take some."""
        self._refuse_if_stopped()
        while self.tables.changes > _BACKLOG * self.tuning.changes:
            try:
                await self._checkpoint(data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._full("metadata")
                if not self._holds(data):
                    raise
                await asyncio.sleep(HOLD_INTERVAL)

    def _holds(self, data: Data) -> bool:
        """Whether a write that has no space waits for it."""
        mine = (member for member in self.members if member.data is data)
        return self.tuning.hold and all(member.is_patient() for member in mine)

    async def _moving(self) -> None:
        """Wait while somebody needs metadata that stand still."""
        while self._still is not None:
            await asyncio.wait([self._still])

    def _record(self, records: list[Record]) -> None:
        """A change takes effect: first in the journal, then in memory."""
        self._append(records)
        if not self._dirty:
            self._dirty = True
            for member in self.members:
                member.set_dirty(True)
        for record in records:
            self.tables.apply(record)
            if isinstance(record, Stored):
                block = Block(record.offset, record.length, 0, record.fingerprint)
                self.space.use(block.offset, block.space)

    def _append(self, records: Iterable[Record]) -> None:
        """To the journal, and with the next flush to the ledger."""
        self._refuse_if_stopped()
        payload = pack_records(records)
        self.ledger.add(self.journal.append(payload), payload)

    def _journal_ledger(self, record: Record) -> None:
        self._append([record])

    async def _until(self, data: Data, attempt: Callable[[], None]) -> None:
        """Do something that may fail for want of space in the metadata directory."""
        while True:
            try:
                attempt()
                self._full_devices.discard("metadata")
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._full("metadata")
                if not self._holds(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
                await asyncio.sleep(HOLD_INTERVAL)

    async def allocate(self, data: Data, wanted: int) -> tuple[int, int]:
        """Space at the head of the log; waits or fails if there is none."""
        while True:
            self._refuse_if_stopped()
            try:
                return self.space.allocate(wanted)
            except NoSpace:
                self._waiting += 1
                try:
                    if await self.make_room(data):
                        continue
                    if self._storing > self._waiting:
                        # Others are about to finish, and what they overwrite becomes free.
                        await asyncio.sleep(0.01)
                        continue
                finally:
                    self._waiting -= 1
                self._full("data")
                if not self._holds(data):
                    raise
                await self._wait_for_room()

    async def make_room(self, data: Data) -> bool:
        """Whether there is a free segment now that is not kept for garbage collection."""
        space, limit = self.space, self.super.segment_size - self.super.block_size
        async with self._room_lock:
            with contextlib.suppress(OSError):
                if space.free_segments <= GUESTS_RESERVE:
                    await self._checkpoint(data)
                for _ in range(space.count):
                    if space.free_segments > GUESTS_RESERVE or not self._worst(limit):
                        break
                    await self._collect(data, limit)
        return space.free_segments > GUESTS_RESERVE

    async def _wait_for_room(self) -> None:
        if self._room is None or self._room.done():
            self._room = _future()
        await asyncio.wait([self._room], timeout=HOLD_INTERVAL)

    def _full(self, what: str) -> None:
        """Tell the operator, once until there is space again."""
        if what in self._full_devices:
            return
        self._full_devices.add(what)
        action = "hold" if self.tuning.hold else "report"
        logger.warning(
            "dedup store '%s': the %s device is full: guests' writes %s",
            self.directory,
            what,
            "wait" if self.tuning.hold else "fail",
        )
        self.emit("DEDUP_FULL", {"metadata": str(self.directory), "device": what, "action": action})

    @property
    def dirty(self) -> bool:
        """Whether a flush has something to do."""
        return self._dirty

    def resize(self, size: int) -> None:
        """The data device has this size now."""
        self.space.resize(size)
        self._has_room()

    def _has_room(self) -> None:
        self._full_devices.discard("data")
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        if self.members:
            self.members[0].emit(name, data)

    # ---- flush

    async def flush(self, data: Data) -> None:
        """All that was complete before is on stable storage."""
        if self._durable < self.journal.next_frame:
            await self._to_the_end(self._flush(data))

    async def _flush(self, data: Data) -> None:
        self._refuse_if_stopped()
        wanted = self.journal.next_frame
        while self._durable < wanted:
            if self._journal_lost:
                # Syncing it once more might succeed without having written what is lost.
                await self._checkpoint(data)
            async with self._flush_lock:
                # Somebody else's flush may have done it, or failed.
                if self._durable < wanted and not self._journal_lost:
                    await self._flush_journal(data)

    async def _flush_journal(self, data: Data) -> None:
        frame = self.journal.next_frame
        await self.ledger.write(data)
        await self._flush_data(data, frame)
        await self._until(data, lambda: self._append([Marked(frame)]))
        alone = self.journal.next_frame == frame + 1
        older = self.journal.older
        try:
            await asyncio.to_thread(self.journal.syncing())
        except OSError:
            self._journal_lost = self.journal.next_frame
            raise
        self.journal.let_go(older)
        # What came between `frame` and the mark may have missed the data device's flush.
        self._now_durable(frame + 1 if alone else frame)

    def _now_durable(self, frame: int) -> None:
        """All earlier frames are on stable storage, with what they speak of."""
        self._durable = max(self._durable, frame)
        if self.journal.next_frame == self._durable:
            self._clean()

    async def _flush_data(self, data: Data, frame: int) -> None:
        """The blocks of all earlier frames are on stable storage, and the ledger has these."""
        try:
            await data.flush()
        except OSError as error:
            self.ledger.fail(error)
            raise
        self.ledger.durable = max(self.ledger.durable, frame)

    def _clean(self) -> None:
        self._dirty = False
        for member in self.members:
            member.set_dirty(False)

    # ---- checkpoints

    def _watch(self) -> None:
        """Start what is due."""
        tuning, tables = self.tuning, self.tables
        due = tables.changes >= tuning.changes or self.journal.size >= tuning.journal
        due = due or self.ledger.unsaved or self.ledger.waiting >= tuning.changes
        # The space there is changes by whole segments; most writes change nothing of it.
        if not due and self.space.free_segments == self._watched:
            return
        if not self.members or time.monotonic() < self._not_before:
            return
        self._watch_space()
        if due and not self._checkpointing:
            self._checkpointing = True
            self._run(self._checkpoint_soon())
        self._watched = self.space.free_segments
        if (
            self.space.free < tuning.garbage * self.space.size
            and not self._collecting
            and self._worst(self.super.segment_size // 2)
        ):
            self._collecting = True
            self._run(self._collect_soon())

    def _watch_ledger(self) -> None:
        """A store that is not changed, or hardly, can be rebuilt, too."""
        if not self.ledger.sound and self.ledger.is_due(self.tables.dump_size()):
            self.ledger.unsaved = True
            self._watch()

    def _watch_space(self) -> None:
        """Tell the operator while there is still time."""
        size = self.space.size
        self._tell_level("data", 100 * (size - self.space.free) // max(1, size))
        # The database may not be larger than its option says, nor than the directory has room for.
        there = os.statvfs(self.directory)
        used = 100 - 100 * there.f_bavail // max(1, there.f_blocks)
        own = 100 * self.tables.size // self.tuning.metadata_size
        self._tell_level("metadata", max(used, own))

    def _tell_level(self, device: str, percent: int) -> None:
        told = self._told_level[device]
        level = max((level for level in LEVELS if percent >= level), default=0)
        if level > told:
            self.emit(
                "DEDUP_SPACE",
                {"metadata": str(self.directory), "device": device, "percent": percent},
            )
        if level > told or percent < told - 5:
            self._told_level[device] = level

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise OSError(errno.EIO, "the dedup store has stopped; the log says why")

    def _stop(self, error: BaseException) -> None:
        """What is in memory is wrong: before it does harm, nothing is written any more."""
        if self._stopped:
            return
        self._stopped = True
        logger.critical(
            "dedup store '%s' has stopped: %s; guests' writes and flushes fail, reads go on; "
            "what was complete is in the journal: close the store, open it again, and dedup-check",
            self.directory,
            error,
            exc_info=error if logger.isEnabledFor(logging.DEBUG) else None,
        )

    async def _stopping(self, work: Coroutine[Any, Any, Result_]) -> Result_:
        """An error that is not a device's, or an operator's, stops the store."""
        try:
            return await work
        except (OSError, VhostblkError):
            raise
        except DAMAGES as error:
            raise OSError(errno.EIO, damaged(self.directory, error).desc) from error
        except Exception as error:
            self._stop(error)
            raise OSError(errno.EIO, f"the dedup store has stopped: {error}") from error

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        # Not on behalf of the request that happens to be current.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._stop(error)  # nobody else would see it

    async def _to_the_end(self, work: Coroutine[Any, Any, Result_]) -> Result_:
        """Whoever waits for this may be cancelled; the work itself must not stop in the middle."""
        task = asyncio.get_running_loop().create_task(
            self._stopping(work), context=contextvars.Context()
        )
        self._protected.add(task)
        task.add_done_callback(self._protected.discard)
        try:
            return await asyncio.shield(task)
        finally:
            # Its error knows the frames it has passed, this one and the guest's memory above.
            del task

    async def _checkpoint_soon(self) -> None:
        try:
            await self.checkpoint()
        except OSError as error:
            logger.warning("dedup store '%s': no checkpoint: %s", self.directory, error)
            self._not_before = time.monotonic() + 1.0
        finally:
            self._watched = -1
            self._checkpointing = False

    async def checkpoint(self) -> None:
        """Bring the database up to date."""
        async with self._step() as data:
            if data is not None:
                await self._checkpoint(data)

    async def _checkpoint(self, data: Data, *, rotate: bool = True) -> None:
        await self._to_the_end(self._make_checkpoint(data, rotate))

    async def _make_checkpoint(self, data: Data, rotate: bool) -> None:
        async with self._checkpoint_lock:
            self._refuse_if_stopped()
            tables, journal, state = self.tables, self.journal, self.tables.state
            if not tables.frozen:
                if rotate:
                    due = tables.changes or tables.dying() or self.ledger.unsaved
                    if not due and not self._journal_lost:
                        return
                    journal.begin(journal.number + 1, journal.next_frame)
                state.journal, state.frame = journal.number, journal.next_frame
                state.head = self.space.head
                self._freeze()
            await self.ledger.write(data)
            freed = self.ledger.obsolete
            self.ledger.obsolete, self.ledger.unsaved = [], False
            tables.set_ledger(self.ledger.state.pack())
            try:
                await self._flush_data(data, state.frame)
                await asyncio.to_thread(tables.write)
            except BaseException:
                self.ledger.obsolete += freed
                self.ledger.unsaved = True
                raise
            tables.written()
            self._full_devices.discard("metadata")
            if self._journal_lost <= state.frame:
                self._journal_lost = 0
            self._now_durable(state.frame)
            dump_now = self._begin_dump(data, state.frame)
            self.counters.checkpoints += 1
            async with self._flush_lock:
                journal.let_go(journal.older)
                journal.remove_before(state.journal)
            lost, self._lost = self._lost, []
            self.space.lose(lost)
            self._watched = -1  # there may be something to collect now
            await self._release(data, freed, self.space.give_back)
            await self._free_segments(data)
        if dump_now:
            await self._write_dump(data)

    def _freeze(self) -> None:
        tables, ledger = self.tables, self.ledger
        dying = tables.dying()
        for number in dying:
            tables.end(number)
        self._lost += tables.freeze()
        ledger.gone(tables.state.frame, dying)
        size = tables.dump_size()
        # Opening a store does not take longer because of it, and closing neither. A snapshot that
        # is being written is not the new generation's, whatever has become of its own.
        if self._dump is None and ledger.is_due(size) and (self.members or size <= _PORTION):
            ledger.turn()

    async def _release(self, data: Data, segments: list[int], give: Callable[[int], None]) -> None:
        for segment in segments:
            give(segment)
            # Nobody may have it before the discard is done.
            if self.tuning.discard:
                with contextlib.suppress(OSError):
                    offset = self.super.segment_at(segment)
                    await data.discard(offset, self.super.segment_size)
            self.space.add_free(segment)

    # ---- snapshots in the ledger

    def _begin_dump(self, data: Data, base: int) -> bool:
        """The database ends before frame `base`. Whether the caller is to write the snapshot."""
        if not self.ledger.turned or self._dump is not None:
            return False
        self._dump = self.tables.begin_dump(), base
        if self.members:
            self._run(self._write_dump(data))
            return False
        return True

    async def _write_dump(self, data: Data) -> None:
        assert self._dump is not None
        dump, base = self._dump
        parts = portions(dump.records())
        index = length = 0
        last = False
        try:
            while not last:
                part, last = await _in_thread(lambda: next(parts))
                async with self._step() as where:
                    put = self.ledger.put_snapshot(where or data, part, base, index, last=last)
                    length += await self._to_the_end(put)
                index += 1
            async with self._step() as where:
                await self._to_the_end(self._end_dump(where or data, length))
        except (OSError, *DAMAGES) as error:
            self.ledger.abandon(error)
        finally:
            self.ledger.abandon()
            dump.close()
            self._dump = None
            self._watched = -1

    async def _end_dump(self, data: Data, length: int) -> None:
        try:
            await data.flush()
        except OSError as error:
            self.ledger.fail(error)
            raise
        self.ledger.completed(length)

    @contextlib.asynccontextmanager
    async def _step(self) -> AsyncIterator[Data | None]:
        """A step of background work, and the data device as some disk in use reaches it.

        That disk stays until what is begun in the step with _to_the_end() is done (leave()).
        None: no disk is in use, for the store is being opened or closed.
        """
        while self.members:
            member = self.members[0]
            async with member.working():
                if member in self.members:  # else it has left while this waited for its turn
                    yield member.data
                    return
        yield None

    async def _free_segments(self, data: Data) -> None:
        empty = self.space.empty()
        if not empty:
            return
        if self._moved:
            self._moved = False
            for member in self.members:
                member.forget_places()
        for member in list(self.members):
            await member.grace()
        if self._readers:
            await asyncio.wait(list(self._readers))
        await self._release(data, empty, self.space.release)
        self._has_room()

    # ---- check

    async def check(self, data: Data, *, repair: bool, content: bool = False) -> Result:
        """Check everything, and `repair` what can be; with `content` also what is stored.

        The metadata are looked at in one go: all disks of the store wait meanwhile.
        """
        async with self._collect_lock:
            await self._moving()
            still = self._still = _future()
            try:
                await self._checkpoint(data)
                while self.tables.frozen or self.tables.changes or self.tables.dying():
                    await self._checkpoint(data)
                result = Check(self.tables, self.super, data.size, repair=repair).run()
                if result.repaired:
                    self.space.recount(self.tables.segments())
            finally:
                self._still = None
                still.set_result(None)
        if content:
            await self._check_content(data, result)
        return result

    async def _check_content(self, data: Data, result: Result) -> None:
        """Guests write meanwhile, and garbage is collected."""
        super = self.super
        numbers = array("Q")
        for segment in range(super.segments(data.size)):
            found = self.tables.places(super.segment_at(segment), super.segment_at(segment + 1))
            numbers.extend(number for _, number in found)
        most = _CHECK_PORTION >> super.block_bits
        for at in range(0, len(numbers), most):
            with self.reading():
                # What is not there any more has been overwritten meanwhile.
                here = ((number, self.tables.block(number)) for number in numbers[at : at + most])
                for run in _neighbours((number, block) for number, block in here if block):
                    for number, block in await self._wrong_blocks(data, run):
                        result.corruptions += 1
                        result.bad.append(number)
                        result.say(f"stored block {number} at {block.offset} has another content")

    async def _wrong_blocks(
        self, data: Data, run: list[tuple[int, Block]]
    ) -> list[tuple[int, Block]]:
        """Those of blocks that follow each other on the data device that are not what they were."""
        start, (_, last) = run[0][1].offset, run[-1]
        try:
            content = memoryview(await data.read(start, last.offset + last.space - start))
        except OSError:
            if len(run) == 1:
                return run
            return [wrong for one in run for wrong in await self._wrong_blocks(data, [one])]
        return await _in_thread(
            lambda: [
                (number, block)
                for number, block in run
                if not self._has(content[block.offset - start :][: block.length], block)
            ]
        )

    def _has(self, content: memoryview, block: Block) -> bool:
        """Whether a stored block has the content that its fingerprint says."""
        if block.length < self.super.block_size:
            try:
                content = memoryview(decompress(bytes(content), self.super.block_size))
            except VhostblkError:
                return False
        return self._hash(content) == block.fingerprint

    # ---- what there is

    def stats(self) -> dict[str, Any]:
        """Numbers for the operator; bytes, where nothing else is said."""
        state, space, size = self.tables.state, self.space, self.super.block_size
        compressed = sum(space.used.values())
        logical = state.mapped * size
        counters = self.counters
        return {
            "metadata": str(self.directory),
            "block-size": size,
            "hash": self.super.hash,
            "logical": logical,
            "unique": state.blocks * size,
            "compressed": compressed,
            "physical": space.size - space.free,
            "ratio": round(logical / compressed, 3) if compressed else 1.0,
            "data-size": space.size,
            "data-free": space.free,
            "metadata-size": self.tables.size + self.journal.size,
            "ledger-size": self.ledger.size,
            "ledger": self.ledger.condition,
            "written-blocks": counters.written,
            "hits": counters.hits,
            "hits-per-second": self._hit_rate(),
            "zero-blocks": counters.zeroes,
            "stored-blocks": counters.stored,
            "moved-blocks": counters.moved,
            "checkpoints": counters.checkpoints,
            "full": bool(self._full_devices),
        }

    async def _now_and_then(self) -> None:
        """Statistics are told as long as guests write."""
        while True:
            await asyncio.sleep(STATISTICS_INTERVAL)
            self._watch_ledger()
            if self.counters.written != self._told_written:
                self._told_written = self.counters.written
                self.emit("DEDUP_STATISTICS", self.stats())

    def _hit_rate(self) -> float:
        """Since somebody asked last, at least a second ago."""
        now, hits = time.monotonic(), self.counters.hits
        then, before, rate = self._rate
        if now - then >= 1.0:
            rate = round((hits - before) / (now - then), 1)
            self._rate = now, hits, rate
        return rate

    async def fragmentation(self, disk: int) -> dict[str, int]:
        """In how many pieces the blocks of a disk are on the data device."""
        size, blocks, pieces, end, last = self.super.block_size, 0, 0, -1, -1
        for count, page in enumerate([page for page, _ in self.tables.pages(disk)]):
            if count % 64 == 63:
                await asyncio.sleep(0)  # others want to live
            for index, number in enumerate(self.tables.page(disk, page)):
                block = self.tables.block(number) if number else None
                if block is None:
                    continue
                at = page * PAGE + index
                blocks += 1
                if block.offset != end or at != last + 1:
                    pieces += 1
                end, last = block.offset + block.space, at
        return {"blocks": blocks, "extents": pieces, "mean-extent": blocks * size // max(1, pieces)}

    async def delete_disk(self, data: Data, name: str) -> None:
        """Give back all that a disk shows, and forget it. It is not in use, and cannot be."""
        found = self.disk(name)
        if found is None:
            raise VhostblkError(
                f"the dedup store has no disk '{name}'", data={"code": "no-disk", "disk": name}
            )
        if any(member.disk == name for member in self.members) or name in self.deleting:
            raise VhostblkError(
                f"Disk '{name}' of the dedup store is in use",
                data={"code": "in-use", "disk": name},
            )
        number, size = found
        blocks = -(-size // self.super.block_size)
        self.deleting.add(name)
        try:
            async for _ in self.unmap(data, number, 0, blocks):
                pass
            self._record([Disk(number, 0, "")])
            await self.flush(data)
        finally:
            self.deleting.remove(name)
        await self.checkpoint()

    async def backup(self, data: Data, directory: Path) -> None:
        """Copy the metadata while they are in use. `directory` is new."""
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise VhostblkError(
                f"a backup cannot be made in '{directory}': {error.strerror}",
                data={"code": "backup"},
            ) from None
        await self._to_the_end(self._backup(data, directory))

    async def _backup(self, data: Data, directory: Path) -> None:
        # No checkpoint meanwhile: it would remove the journal that goes on from the copy.
        async with self._checkpoint_lock:
            await data.flush()
            # When it comes back, the ledger will have gone on, and must begin anew.
            unknown = LedgerState().pack()
            await asyncio.to_thread(self.tables.copy, directory / FILE, unknown)
            (directory / f"{FILE}-lock").unlink(missing_ok=True)
            await asyncio.to_thread(self._copy_journal, directory)

    def _copy_journal(self, directory: Path) -> None:
        # All of it: after a failed checkpoint the database goes on in an older file.
        for number in self.journal.numbers():
            source = self.journal.path(number)
            write_file(directory / source.name, source.read_bytes())
        write_file(directory / "superblock", self.super.pack())
        sync_directory(directory)

    # ---- garbage collection

    async def _collect_soon(self) -> None:
        try:
            while self.members:
                async with self._step() as data:
                    if data is None:
                        return
                    if not await self._collect(data, self.super.segment_size // 2, most=1):
                        return
                if self.space.free >= 2 * self.tuning.garbage * self.space.size:
                    return
        except OSError as error:
            logger.warning("dedup store '%s': garbage collection: %s", self.directory, error)
            self._not_before = time.monotonic() + 1.0
        finally:
            self._watched = -1
            self._collecting = False

    async def collect(self, used: float = 0.75) -> int:
        """Empty segments of which at most this part is in use; how many became free."""
        freed = 0
        await self.checkpoint()
        tried: set[int] = set()
        limit = int(used * self.super.segment_size)
        while worst := [s for s in self._worst(limit) if s not in tried]:
            tried.update(worst[:4])
            async with self._step() as data:
                if data is None:
                    break
                freed += await self._collect(data, limit, most=4)
        return freed

    def _worst(self, limit: int) -> list[int]:
        now = time.monotonic()
        return [s for s in self.space.worst(limit) if self._unmovable.get(s, now) <= now]

    async def _collect(self, data: Data, limit: int, most: int = 4) -> int:
        """Move what is in the emptiest segments to the head of the log; segments made free."""
        return await self._to_the_end(self._empty_segments(data, limit, most))

    async def _empty_segments(self, data: Data, limit: int, most: int) -> int:
        async with self._collect_lock:
            before = self.space.free_segments
            budget = self.super.segment_size
            for segment in self._worst(limit)[:most]:
                if segment not in self._worst(limit):
                    continue  # it has become free meanwhile, or is filled again
                budget -= self.space.used[segment]
                if budget < 0 and most > 1:
                    break
                await self._checkpoint(data)  # the places of all blocks are in the database
                try:
                    await self._move_segment(data, segment)
                except NoSpace:
                    raise
                except (OSError, VhostblkError) as error:
                    # Other segments can be emptied.
                    self._unmovable[segment] = time.monotonic() + UNMOVABLE_INTERVAL
                    logger.warning(
                        "dedup store '%s': segment %d cannot be emptied: %s",
                        self.directory,
                        segment,
                        error,
                    )
            await self._checkpoint(data)
            return self.space.free_segments - before

    async def _move_segment(self, data: Data, segment: int) -> None:
        start, end = self.super.segment_at(segment), self.super.segment_at(segment + 1)
        numbers = [number for _, number in self.tables.places(start, end)]
        most = max(1, _PORTION >> self.super.block_bits)
        for at in range(0, len(numbers), most):
            await self._move_blocks(data, numbers[at : at + most], start, end, 0)

    async def _move_blocks(
        self, data: Data, numbers: list[int], start: int, end: int, reserve: int
    ) -> int:
        """Copy blocks that are between two offsets to the log, in this order; how many."""
        blocks = [(number, self.tables.block(number)) for number in numbers]
        wanted = [(n, block) for n, block in blocks if block and start <= block.offset < end]
        with self.reading():
            contents = await _all(data.read(block.offset, block.space) for _, block in wanted)
        offsets: list[int] = []
        try:
            for _, block in wanted:
                offsets.append(self.space.allocate(block.length, moving=True, reserve=reserve)[0])
            await _all(data.write(at, piece) for at, piece in _joined(offsets, contents))
            moved: list[Record] = [
                Stored(number, at, block.length, block.fingerprint)
                for (number, block), at in zip(wanted, offsets, strict=True)
                if self._is_still(number, block)  # else it has gone meanwhile
            ]
            if moved:
                self._record(moved)
        finally:
            for at in offsets:
                self.space.landed(at)
        self._moved = True
        self.counters.moved += len(moved)
        return len(moved)

    def _is_still(self, number: int, block: Block) -> bool:
        now = self.tables.block(number)
        return now is not None and now.offset == block.offset

    # ---- defragmentation

    def scattered(self, disk: int, page: int) -> list[int]:
        """The blocks that a page of a disk shows, if they are in more pieces than need be."""
        numbers = [number for number in self.tables.page(disk, page) if number]
        pieces, end, segment = 0, -1, -1
        for number in numbers:
            block = self.tables.block(number)
            if block is None or block.offset == end:
                end = block.offset + block.space if block else end
                continue
            # The end of a segment is nobody's fault.
            follows = block.offset == self.super.segment_at(segment + 1)
            pieces += 0 if follows and pieces else 1
            segment = self.super.segment_of(block.offset)
            end = block.offset + block.space
        return list(dict.fromkeys(numbers)) if pieces > 1 else []

    async def gather(self, data: Data, numbers: list[int]) -> int:
        """Write blocks again, one after the other; how many bytes."""
        return await self._to_the_end(self._gather(data, numbers))

    async def _gather(self, data: Data, numbers: list[int]) -> int:
        self._refuse_if_stopped()
        async with self._collect_lock:
            moved = await self._move_blocks(data, numbers, 0, 1 << 63, GUESTS_RESERVE)
        self._watch()
        return moved << self.super.block_bits


class _Write:
    """Blocks on their way into the store."""

    def __init__(
        self,
        store: Store,
        data: Data,
        content: memoryview,
        prints: Sequence[bytes],
        send: Send | None,
    ) -> None:
        self._store = store
        self._data = data
        self._content = content
        self._prints = prints
        self._send = send or self._send_content
        self._numbers = [0] * len(prints)
        self._same: dict[bytes, int] = {}  # where in this request content was first seen
        self._fresh: list[tuple[int, int, int]] = []  # index, offset, length: not published yet
        self._flying: list[int] = []
        self._futures: dict[bytes, asyncio.Future[None]] = {}
        self._pinned: list[int] = []

    async def prepare(self) -> None:
        """Find or store every block."""
        store = self._store
        pending: Sequence[int] = range(len(self._prints))
        while True:
            fresh: list[int] = []
            waiting: list[int] = []
            for index in pending:
                self._classify(index, fresh, waiting)
            if store.tuning.verify:
                fresh += await self._verify(pending, fresh, waiting)
            if fresh and store.tuning.compress:
                await self._store_compressed(sorted(fresh))
            elif fresh:
                await self._store_blocks(sorted(fresh))
            if not waiting:
                return
            # Others may be waiting for ours while we wait for theirs.
            if self._fresh:
                await store._moving()
                await store._until(self._data, lambda: store._record(self.stored_records()))
                self.published()
            futures = [store._writing.get(self._prints[index]) for index in waiting]
            await asyncio.wait([future for future in futures if future is not None] or [_done()])
            pending = waiting

    def _classify(self, index: int, fresh: list[int], waiting: list[int]) -> None:
        store, name = self._store, self._prints[index]
        if name == store.zero or name in self._same:
            return
        number = store.tables.find(name)
        if number:
            self._same[name] = index
            self._pin(number)
            self._numbers[index] = number
        elif name in store._writing:
            waiting.append(index)
        else:
            self._same[name] = index
            self._futures[name] = store._writing[name] = _future()
            fresh.append(index)

    def _pin(self, number: int) -> None:
        pins = self._store.tables.pins
        pins[number] = pins.get(number, 0) + 1
        self._pinned.append(number)

    async def _verify(
        self, pending: Sequence[int], fresh: list[int], waiting: list[int]
    ) -> list[int]:
        """Which of the blocks that seem to be there are something else."""
        store, size = self._store, self._store.super.block_size
        wrong = []
        for index in pending:
            number = self._numbers[index]
            block = store.tables.block(number) if number else None
            if block is None or index in fresh or index in waiting:
                continue
            with store.reading():
                content = await store.read(self._data, block)
            if bytes(content) != self._content[index * size : (index + 1) * size]:
                logger.error(
                    "dedup store '%s': block %d at %d is not what its fingerprint says",
                    store.directory,
                    number,
                    block.offset,
                )
                self._numbers[index] = 0
                wrong.append(index)
        return wrong

    async def _store_blocks(self, fresh: list[int]) -> None:
        """Write new blocks to the log, neighbours in one piece."""
        store, size = self._store, self._store.super.block_size
        at = 0
        parts: list[tuple[int, int, int]] = []  # offset, where in the content, bytes
        while at < len(fresh):
            end = at + 1
            while end < len(fresh) and fresh[end] == fresh[end - 1] + 1:
                end += 1
            offset, length = await store.allocate(self._data, (end - at) * size)
            self._flying.append(offset)
            count = length // size
            self._fresh += [(fresh[at + i], offset + i * size, size) for i in range(count)]
            parts.append((offset, fresh[at] * size, length))
            at += count
        await _all(self._write(partial(self._send, *part)) for part in parts)

    async def _store_compressed(self, fresh: list[int]) -> None:
        """The same, each block for itself, and neighbours in the log in one piece."""
        store, size, content = self._store, self._store.super.block_size, self._content
        pieces = await asyncio.to_thread(
            lambda: [compress(content[index * size : (index + 1) * size]) for index in fresh]
        )
        offsets: list[int] = []
        for index, (piece, length) in zip(fresh, pieces, strict=True):
            offset, _ = await store.allocate(self._data, len(piece))
            self._flying.append(offset)
            offsets.append(offset)
            self._fresh.append((index, offset, length))
        joined = _joined(offsets, [piece for piece, _ in pieces])
        await _all(self._write(partial(self._data.write, *part)) for part in joined)

    async def _write(self, attempt: Callable[[], Awaitable[Any]]) -> None:
        store = self._store
        while True:
            try:
                await attempt()
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                store._full("data")
                if not store._holds(self._data):
                    raise
                await asyncio.sleep(HOLD_INTERVAL)

    def _send_content(self, offset: int, begin: int, length: int) -> Awaitable[Any]:
        return self._data.write(offset, self._content[begin : begin + length])

    def numbers(self) -> list[int]:
        """The stored block of each block, once they are published (or about to be)."""
        zero, same, numbers = self._store.zero, self._same, self._numbers
        next_block = self._store.tables.state.next_block
        for at, (index, _, _) in enumerate(self._fresh):
            numbers[index] = next_block + at
        return [0 if name == zero else numbers[same[name]] for name in self._prints]

    def stored_records(self) -> list[Record]:
        """What the journal has to say about new blocks."""
        next_block = self._store.tables.state.next_block
        return [
            Stored(next_block + at, offset, length, self._prints[index])
            for at, (index, offset, length) in enumerate(self._fresh)
        ]

    def published(self) -> None:
        """The journal has said it."""
        first = self._store.tables.state.next_block - len(self._fresh)
        for at, (index, _, _) in enumerate(self._fresh):
            self._numbers[index] = first + at
            self._pin(first + at)
        self._fresh.clear()
        self._land()

    def _land(self) -> None:
        for offset in self._flying:
            self._store.space.landed(offset)
        self._flying.clear()
        for name, future in self._futures.items():
            if self._store._writing.get(name) is future:
                del self._store._writing[name]
            future.set_result(None)
        self._futures.clear()

    def end(self) -> None:
        """Whether all went well or not."""
        self._land()
        pins = self._store.tables.pins
        for number in self._pinned:
            left = pins[number] - 1
            if left:
                pins[number] = left
            else:
                del pins[number]
        self._pinned.clear()


async def _all(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for all of them, even if one fails: they use memory, or a place."""
    all_of_it = list(work)
    if len(all_of_it) == 1:  # most often; without a task
        return [await all_of_it[0]]
    results = await asyncio.gather(*all_of_it, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _neighbours(blocks: Iterable[tuple[int, Block]]) -> Iterator[list[tuple[int, Block]]]:
    """Blocks that follow each other on the data device together."""
    run: list[tuple[int, Block]] = []
    for number, block in blocks:
        if run and run[-1][1].offset + run[-1][1].space != block.offset:
            yield run
            run = []
        run.append((number, block))
    if run:
        yield run


def _joined(offsets: list[int], contents: list[bytearray]) -> Iterator[tuple[int, bytearray]]:
    """Neighbours as one piece."""
    start, piece = 0, bytearray()
    for offset, content in zip(offsets, contents, strict=True):
        if piece and start + len(piece) == offset:
            piece += content
            continue
        if piece:
            yield start, piece
        start, piece = offset, bytearray(content)
    if piece:
        yield start, piece


async def _in_thread(work: Callable[[], Result_]) -> Result_:
    """Ends when the thread has, also when cancelled."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def _done() -> asyncio.Future[None]:
    future = _future()
    future.set_result(None)
    return future
