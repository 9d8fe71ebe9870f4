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
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vhostblk.dedup.check import Check, Result
from vhostblk.dedup.collection import Collector
from vhostblk.dedup.compression import decompress
from vhostblk.dedup.content import check_content
from vhostblk.dedup.errors import DamagedError, InconsistentError, damaged
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
    pack_life,
    pack_records,
    parse_life,
    stored_space,
)
from vhostblk.dedup.futures import Turns, in_thread, new_future
from vhostblk.dedup.interface import BACKLOG, HOLD_INTERVAL, Counters, Data, Member, Send, Tuning
from vhostblk.dedup.journal import Journal, sync_directory, write_file
from vhostblk.dedup.ledger import Ledger, portions
from vhostblk.dedup.ledger import State as LedgerState
from vhostblk.dedup.replay import Replay, in_slices, look_through
from vhostblk.dedup.space import GUESTS_RESERVE, NoSpace, Space
from vhostblk.dedup.tables import DAMAGES, FILE, PAGE, PAGES, Dump, Tables
from vhostblk.dedup.writing import Writing
from vhostblk.schema import VhostblkError

logger = logging.getLogger(__name__)

Result_ = TypeVar("Result_")

_LOCK_WAIT = 5.0
_PORTION = 1 << 20
_FEW_PAGES = 256
"""Pages of a map that are looked at one by one, whether there is something or not."""
_PAGES_AT_ONCE = 60
"""Of those that the database has, so many are looked up at once."""
LEVELS = (80, 90, 95)
"""Per cent of either device: when more is in use, there is an event."""
LEAST_SEGMENTS = 8
"""Of a store: what is kept for garbage collection and the ledger, and a few for data."""
STATISTICS_INTERVAL = 10.0
"""Seconds from one event with statistics to the next, if something has happened; and until a ledger
that is broken is begun again."""


class Store:
    """One store, opened once in a process, however many disks of it are in use."""

    def __init__(self, directory: Path, tuning: Tuning) -> None:
        self.directory = directory
        self.tuning = tuning
        self.members: list[Member] = []
        self.deleting: set[str] = set()
        """Disks that are being deleted."""
        self.counters = Counters()
        self.being_written: dict[bytes, asyncio.Future[None]] = {}
        self._readers: set[asyncio.Future[None]] = set()
        self._flush_lock = asyncio.Lock()
        self._checkpoint_lock = asyncio.Lock()
        self._room_lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._protected: set[asyncio.Task[Any]] = set()
        self._checkpointing = False
        self.collector = Collector(self)
        self._lost: list[tuple[int, int]] = []
        self._damages: list[str] = []  # of which nobody could be told yet
        self._durable = 0
        self._dirty = False
        self._journal_lost = 0  # the journal may lack earlier frames, and the database, too
        self._journal_full = False  # since the last checkpoint
        self._stopped = False
        self._full_devices: set[str] = set()  # those of which the operator has been told so
        self._told_level = {"data": 0, "metadata": 0}
        self._watched = -1  # free segments when _watch() has last looked
        self._rate = time.monotonic(), 0, 0.0  # when, hits, and hits per second
        self._dump: tuple[Dump, int] | None = None  # what the ledger's snapshot is made of
        self._told_written = 0  # blocks written when statistics were last told
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
        except DamagedError as error:
            raise damaged(self.directory, error.reason) from error
        except (InconsistentError, *DAMAGES) as error:
            raise damaged(self.directory, error) from error

    async def _open(self, data: Data) -> None:
        await self._lock()
        with contextlib.ExitStack() as undo:
            undo.callback(self._unlock)
            self.super = await self._read_superblock(data)
            self.hash = HASHES[self.super.hash]
            self.zero = self.hash(bytes(self.super.block_size))
            await self._open_tables(undo)
            self._watch_damages()
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

    async def _open_tables(self, undo: contextlib.ExitStack) -> None:
        """The database is read in part."""

        def opened() -> None:
            self.tables = Tables(self.directory, self.super, self.tuning.metadata_size)
            undo.callback(self.tables.close)

        await in_thread(opened)

    def _watch_damages(self) -> None:
        loop = asyncio.get_running_loop()

        def tell(reason: str) -> None:
            loop.call_soon_threadsafe(self._tell_damaged, reason)

        self.tables.when_damaged(tell)

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
        for reason in self._damages:
            self._emit_damaged(reason)
        self._damages.clear()

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
            await self.checkpoint_now(data)
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
        survey = await in_thread(lambda: look_through(journal.read(state.journal, state.frame)))
        for segment in survey.taken:
            self.space.taken(segment)
        self.ledger.resume(state.frame, survey.taken, crashed=survey.frames > 0)
        replay = Replay(self.tables, survey.mark, partial(self._is_there, data))
        async for frame, records in in_slices(journal.read(state.journal, state.frame)):
            held = await replay.frame(frame, records)
            for record in held:
                if isinstance(record, Stored):
                    self.space.replayed(record.offset, stored_space(record.length))
            self.ledger.add(frame, pack_records(held))
        self.space.check()
        if survey.frames:
            logger.info(
                "dedup store '%s' was not closed: %d changes replayed",
                self.directory,
                survey.frames,
            )
        if replay.dropped:
            logger.info(
                "dedup store '%s': %d unflushed writes had not reached the data device",
                self.directory,
                replay.dropped,
            )
        last = state.frame + survey.frames
        # Files of the past must not seem to follow what is written from now on.
        number = journal.last_number(state.journal) + 1
        first = state.journal
        journal.begin(number, last)
        try:
            await self.checkpoint_now(data, rotate=False)
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
            return self.hash(await self.read(data, block)) == record.fingerprint
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
        self.record([Disk(number, size, name)])
        return number

    # ---- reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Places that are looked up inside are not used again before the end."""
        done = new_future()
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
        writing = Writing(self, data, content, prints, send)
        self._storing += 1
        try:
            await writing.prepare()
            numbers: list[int] = []
            await self.until_moving()
            await self.with_room(data, lambda: self._publish(writing, disk, first, numbers))
        finally:
            self._storing -= 1
            writing.end()
        self.watch()
        return numbers

    def write_known(self, disk: int, first: int, prints: Sequence[bytes]) -> list[int] | None:
        """The same at once, if all of it is there already; None: write() has to do it."""
        tables, zero = self.tables, self.zero
        if self._still is not None or self.tuning.verify:
            return None
        if tables.changes > BACKLOG * self.tuning.changes:
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
        self.watch()
        return numbers

    def begin_new(self, prints: list[bytes]) -> int | None:
        """Room in one piece for blocks all of which are new; None: write() has to do it.

        The way of most blocks that are not there yet, without what write() does for all others.
        Whoever gets an offset writes the blocks there, and calls end_new().
        """
        tables, tuning, space = self.tables, self.tuning, self.space
        if self._still is not None or self._stopped or tuning.verify or tuning.compress:
            return None
        if tables.changes > BACKLOG * tuning.changes or len(set(prints)) != len(prints):
            return None
        for name in prints:
            if name == self.zero or name in self.being_written or tables.find(name):
                return None
        length = len(prints) << self.super.block_bits
        if not space.fits(length):
            return None
        offset, _ = space.allocate(length)
        self._storing += 1
        waiting = new_future()
        for name in prints:
            self.being_written[name] = waiting
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
            waiting = self.being_written[prints[0]]
            for name in prints:
                del self.being_written[name]
            waiting.set_result(None)
        self.watch()
        return numbers

    def _publish(self, writing: Writing, disk: int, first: int, run: list[int]) -> None:
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
        self.record(records)
        counters, zeroes = self.counters, run.count(0)
        counters.written += len(run)
        counters.zeroes += zeroes
        counters.stored += new
        counters.hits += len(run) - zeroes - new

    async def unmap(
        self, data: Data, disk: int, first: int, end: int
    ) -> AsyncIterator[tuple[int, int]]:
        """Blocks of a disk show zeroes; gives those for which that is new: first, how many."""
        turns = Turns()
        async for page in self._shown_pages(disk, first // PAGE, (end - 1) // PAGE + 1):
            await turns.others()
            await self._may_change(data)
            await self.until_moving()
            begin, stop = max(first, page * PAGE), min(end, (page + 1) * PAGE)
            shown = self.tables.page(disk, page)[begin % PAGE : begin % PAGE + stop - begin]
            if any(shown):
                record = Mapped(disk, begin, stop - begin, 0)
                await self.with_room(data, partial(self.record, [record]))
                self.watch()
                yield begin, stop - begin

    async def _shown_pages(self, disk: int, first: int, end: int) -> AsyncIterator[int]:
        """Pages that may show something, while nobody else writes to them.

        Of a large disk most may never have been written.
        """
        if end - first <= _FEW_PAGES:
            for page in range(first, end):
                yield page
            return
        for page in self.tables.changed_pages(disk, first, end):
            yield page
        async for page in self._written_pages(disk, first, end):
            yield page

    async def _written_pages(self, disk: int, first: int, end: int) -> AsyncIterator[int]:
        """Those that the database has."""
        while pages := self.tables.pages(disk, first, end, _PAGES_AT_ONCE):
            for page in pages:
                yield page
            first = pages[-1] + 1

    async def _may_change(self, data: Data) -> None:
        """Memory is bounded: too many changes wait for the database to take some."""
        self.refuse_if_stopped()
        while self.tables.changes > BACKLOG * self.tuning.changes:
            await self._checkpoint_with_room(data)

    async def _checkpoint_with_room(self, data: Data) -> None:
        """A checkpoint, which may have to wait until the metadata directory has space for it."""
        while True:
            try:
                await self.checkpoint_now(data)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.tell_full("metadata")
                if not self.holds(data):
                    raise
                await asyncio.sleep(HOLD_INTERVAL)

    def holds(self, data: Data) -> bool:
        """Whether a write that has no space waits for it."""
        mine = (member for member in self.members if member.data is data)
        return self.tuning.hold and all(member.is_patient() for member in mine)

    async def until_moving(self) -> None:
        """Wait while somebody needs metadata that stand still."""
        while self._still is not None:
            await asyncio.wait([self._still])

    def record(self, records: list[Record]) -> None:
        """A change takes effect: first in the journal, then in memory."""
        self._append(records)
        if not self._dirty:
            self._dirty = True
            for member in self.members:
                member.set_dirty(True)
        try:
            for record in records:
                self.tables.apply(record)
                if isinstance(record, Stored):
                    block = Block(record.offset, record.length, 0, record.fingerprint)
                    self.space.use(block.offset, block.space)
        except (OSError, VhostblkError) as error:
            # The journal and the ledger say that it has happened. What they lead to must stay.
            self._stop(error)
            raise OSError(errno.EIO, f"the dedup store has stopped: {error}") from error

    def _append(self, records: Iterable[Record]) -> None:
        """To the journal, and with the next flush to the ledger."""
        self.refuse_if_stopped()
        payload = pack_records(records)
        try:
            frame = self.journal.append(payload)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._journal_full = True
            raise
        self.ledger.add(frame, payload)

    def _journal_ledger(self, record: Record) -> None:
        self._append([record])

    async def with_room(self, data: Data, attempt: Callable[[], None]) -> None:
        """Do something that may fail for want of space in the metadata directory."""
        while True:
            try:
                attempt()
                self._full_devices.discard("metadata")
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            if await self._shorten_journal(data):
                continue
            self.tell_full("metadata")
            if not self.holds(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            await asyncio.sleep(HOLD_INTERVAL)

    async def _shorten_journal(self, data: Data) -> bool:
        """The journal may be what fills the directory: whether a new one begins."""
        if self.journal.size == 0 and not self.tables.frozen:
            return False
        before = self.counters.checkpoints
        with contextlib.suppress(OSError):
            await self.checkpoint_now(data)
        return self.counters.checkpoints > before

    async def allocate(self, data: Data, wanted: int) -> tuple[int, int]:
        """Space at the head of the log; waits or fails if there is none."""
        while True:
            self.refuse_if_stopped()
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
                self.tell_full("data")
                if not self.holds(data):
                    raise
                await self._wait_for_room()

    async def make_room(self, data: Data) -> bool:
        """Whether there is a free segment now that is not kept for garbage collection."""
        space, limit = self.space, self.super.segment_size - self.super.block_size
        async with self._room_lock:
            with contextlib.suppress(OSError):
                if space.free_segments <= GUESTS_RESERVE:
                    await self.checkpoint_now(data)
                for _ in range(space.count):
                    if space.free_segments > GUESTS_RESERVE or not self.collector.worst(limit):
                        break
                    await self.collector.empty(data, limit)
        return space.free_segments > GUESTS_RESERVE

    async def _wait_for_room(self) -> None:
        if self._room is None or self._room.done():
            self._room = new_future()
        await asyncio.wait([self._room], timeout=HOLD_INTERVAL)

    def tell_full(self, what: str) -> None:
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

    def _tell_damaged(self, reason: str) -> None:
        logger.error(
            "dedup store '%s': the metadata are damaged: %s; what needs that fails, everything "
            "else goes on; dedup-rebuild makes them anew",
            self.directory,
            reason,
        )
        if self.members:
            self._emit_damaged(reason)
        else:
            self._damages.append(reason)

    def _emit_damaged(self, reason: str) -> None:
        self.emit("DEDUP_DAMAGED", {"metadata": str(self.directory), "reason": reason})

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
            await self.to_the_end(self._flush(data))

    async def _flush(self, data: Data) -> None:
        self.refuse_if_stopped()
        wanted = self.journal.next_frame
        while self._durable < wanted:
            if self._journal_lost or self._journal_full:
                # Syncing it once more might succeed without having written what is lost. And where
                # there is no room for a mark, a checkpoint needs none. It waits for the lock below.
                await self._checkpoint_with_room(data)
            async with self._flush_lock:
                # Somebody else's flush may have done it, or failed.
                if self._durable < wanted and not self._journal_lost:
                    await self._flush_journal(data)

    async def _flush_journal(self, data: Data) -> None:
        frame = self.journal.next_frame
        await self.ledger.write(data)
        await self._flush_data(data, frame)
        try:
            self._append([Marked(frame)])
        except OSError:
            if self._journal_full:
                return  # the caller knows what to do
            raise
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

    def watch(self) -> None:
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
            and not self.collector.running
            and self.collector.worst(self.super.segment_size // 2)
        ):
            self.collector.running = True
            self._run(self.collector.collect_soon())

    def look_again(self) -> None:
        """There may be something to start."""
        self._watched = -1

    def postpone(self) -> None:
        """Background work has failed, and is not begun again at once."""
        self._not_before = time.monotonic() + 1.0

    def _watch_ledger(self) -> None:
        """A store that is not changed, or hardly, can be rebuilt, too."""
        if not self.ledger.sound and self.ledger.is_due(self.tables.dump_size()):
            self.ledger.unsaved = True
            self.watch()

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

    def refuse_if_stopped(self) -> None:
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

    async def to_the_end(self, work: Coroutine[Any, Any, Result_]) -> Result_:
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
            self.postpone()
        finally:
            self._watched = -1
            self._checkpointing = False

    async def checkpoint(self) -> None:
        """Bring the database up to date."""
        async with self.step() as data:
            if data is not None:
                await self.checkpoint_now(data)

    async def checkpoint_now(self, data: Data, *, rotate: bool = True) -> None:
        await self.to_the_end(self._make_checkpoint(data, rotate))

    async def _make_checkpoint(self, data: Data, rotate: bool) -> None:
        async with self._checkpoint_lock:
            self.refuse_if_stopped()
            tables, journal, state = self.tables, self.journal, self.tables.state
            if not tables.frozen:
                if rotate:
                    due = tables.changes or tables.dying() or self.ledger.unsaved
                    if not due and not self._journal_lost and not self._journal_full:
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
            self._journal_full = False
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
                part, last = await in_thread(lambda: next(parts))
                async with self.step() as where:
                    put = self.ledger.put_snapshot(where or data, part, base, index, last=last)
                    length += await self.to_the_end(put)
                index += 1
            async with self.step() as where:
                await self.to_the_end(self._end_dump(where or data, length))
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
    async def step(self) -> AsyncIterator[Data | None]:
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
        if self.collector.moved:
            self.collector.moved = False
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
        async with self.collector.lock:
            await self.until_moving()
            still = self._still = new_future()
            try:
                await self.checkpoint_now(data)
                while self.tables.frozen or self.tables.changes or self.tables.dying():
                    await self.checkpoint_now(data)
                result = Check(self.tables, self.super, data.size, repair=repair).run()
                if result.repaired:
                    self.space.recount(self.tables.segments())
            finally:
                self._still = None
                still.set_result(None)
        if content:
            await check_content(self, data, result)
        return result

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
        turns = Turns()
        async for page in self._written_pages(disk, 0, PAGES):
            await turns.others()
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
            self.record([Disk(number, 0, "")])
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
        await self.to_the_end(self._backup(data, directory))

    async def _backup(self, data: Data, directory: Path) -> None:
        # No checkpoint meanwhile: it would remove the journal that goes on from the copy.
        async with self._checkpoint_lock:
            await data.flush()
            # When it comes back, the ledger will have gone on, and must begin anew.
            unknown = LedgerState().pack()
            await asyncio.to_thread(self.tables.copy, directory / FILE, unknown)
            await asyncio.to_thread(self._copy_journal, directory)

    def _copy_journal(self, directory: Path) -> None:
        # All of it: after a failed checkpoint the database goes on in an older file.
        for number in self.journal.numbers():
            source = self.journal.path(number)
            write_file(directory / source.name, source.read_bytes())
        write_file(directory / "superblock", self.super.pack())
        sync_directory(directory)
