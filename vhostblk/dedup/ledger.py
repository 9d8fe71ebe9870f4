# SPDX-License-Identifier: GPL-2.0-or-later
"""The ledger: records of the metadata on the data device, from which they can be made anew.

It is a second line: nothing but a rebuild ever reads it. In segments of its own there are *chunks*:

* *log* chunks have the frames of the journal, once more. A flush writes what has come since the
  last one before it flushes the data device; so what was flushed is on the data device as a whole.
* *snapshot* chunks have all that the database has had at one checkpoint.

A *generation* is a snapshot and the log from its checkpoint on. When the log has become longer
than the snapshot, a checkpoint *turns*: the log goes on in another segment, and a new snapshot is
written behind it while guests go on. Once that is on stable storage, and the database says so, the
segments of the old generation are free.

Chunks are ordered by their *life*, which is another, higher number each time the store is opened,
and their number in it. The first log chunks of a life say from which frame on (`base`) they take
the place of what earlier lives have written: after a crash some frames may be lost, others are
partly left out, and numbers come again. They count when all of them are there; a crash before that
leaves what the earlier lives say.

If the ledger cannot be written, guests' writes and flushes go on without it: it is *broken*, what
it has is older than the store, and it begins a new generation when it can.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from vhostblk.dedup.format import Gone, Record, Superblock, Taken, pack_record, pack_records
from vhostblk.dedup.space import RESERVE, NoSpace, Space

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
"""No sector of a disk is shared by two chunks: a cut while one is written spares the other."""
BIGGEST = 128 << 10
"""Bytes of a chunk, at most."""
_MAGIC = b"vbledger"
_HEADER = struct.Struct("<8sIIQQQQQII")
_DIGEST = 16
HEADER = _HEADER.size + _DIGEST
_ENTRY = struct.Struct("<BIQ")
LOG, SNAPSHOT = 1, 2
RESUMES, LAST, MORE = 1, 2, 4
"""Flags: a life begins; the end of a snapshot; a life begins with this chunk and others."""
FRAME, PART, GONE = 1, 2, 3
_RETRY = 10.0
"""Seconds until a generation is begun again after one could not be."""


Condition = Literal["sound", "incomplete", "broken", "none"]
"""What could be made anew from the ledger: all that has been flushed; that not yet, since the first
snapshot is still to be written; what was flushed before something failed; nothing, in format 1."""


class Writes(Protocol):
    """What the ledger needs of the data device."""

    def write(self, offset: int, data: bytes) -> Any:
        """Write."""


class Chunk(NamedTuple):
    """What a chunk says of itself."""

    kind: int
    flags: int
    length: int
    """Bytes of the payload."""
    life: int
    number: int
    base: int
    """Log: see the module, if the life begins here. Snapshot: the first frame that follows."""
    durable: int
    """The blocks that earlier frames speak of are on stable storage."""
    time: int
    """Seconds since 1970."""
    part: int
    """Snapshot: which chunk of it."""

    @property
    def space(self) -> int:
        """Bytes of the data device."""
        return -(-(HEADER + self.length) // ALIGNMENT) * ALIGNMENT

    def pack(self, uuid: bytes, offset: int, payload: bytes) -> bytes:
        header = _HEADER.pack(
            _MAGIC,
            self.kind,
            self.flags,
            self.life,
            self.number,
            self.base,
            self.durable,
            self.time,
            self.part,
            self.length,
        )
        chunk = header + _digest(uuid, offset, header, payload) + payload
        return chunk.ljust(self.space, b"\0")


def parse_header(data: bytes | bytearray | memoryview) -> Chunk | None:
    """The header of a chunk, if it may be one."""
    magic, kind, flags, life, number, base, durable, when, index, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or kind not in (LOG, SNAPSHOT) or length > BIGGEST:
        return None
    return Chunk(kind, flags, length, life, number, base, durable, when, index)


def payload_of(uuid: bytes, offset: int, data: bytes | bytearray, chunk: Chunk) -> bytes | None:
    """What a chunk has, if all of it is as it was written there."""
    header = bytes(data[: _HEADER.size])
    payload = bytes(data[HEADER : HEADER + chunk.length])
    if bytes(data[_HEADER.size : HEADER]) != _digest(uuid, offset, header, payload):
        return None
    return payload


def _digest(uuid: bytes, offset: int, header: bytes, payload: bytes) -> bytes:
    """Of this store, in this place: no copy that a guest has got hold of is taken for one."""
    key = uuid + struct.pack("<Q", offset)
    return hashlib.blake2b(header + payload, digest_size=_DIGEST, key=key).digest()


class Entry(NamedTuple):
    """A part of the log."""

    kind: int
    frame: int
    payload: bytes


def pack_entries(entries: Iterable[Entry], room: int) -> Iterator[bytes]:
    """Entries, in portions that fit; an entry that does not is divided."""
    portion = bytearray()
    for kind, frame, payload in entries:
        view = memoryview(payload)
        while True:
            left = room - len(portion) - _ENTRY.size
            if left < min(len(view), 64):
                yield bytes(portion)
                portion.clear()
                continue
            whole = len(view) <= left
            part = view if whole else view[:left]
            portion += _ENTRY.pack(kind if whole else PART, len(part), frame)
            portion += part
            view = view[len(part) :]
            if whole:
                break
    if portion:
        yield bytes(portion)


def unpack_entries(payload: bytes) -> Iterator[Entry]:
    """What pack_entries() has put into one chunk."""
    at = 0
    while at < len(payload):
        kind, length, frame = _ENTRY.unpack_from(payload, at)
        at += _ENTRY.size
        yield Entry(kind, frame, payload[at : at + length])
        at += length


_STATE = struct.Struct("<QQQQQQ")
_BROKEN, _COMPLETE = 1, 2


@dataclass
class State:
    """What the database knows of the ledger."""

    life: int = 0
    previous: int = 0
    """The data device may still say this instead."""
    head: int = 0
    """Where the next chunk goes; 0: into another segment."""
    log: int = 0
    """Bytes of the log since the generation began."""
    snapshot: int = 0
    """Bytes of its snapshot."""
    broken: bool = True
    """What happens is not recorded."""
    complete: bool = False
    """There is a snapshot, and all that has happened since."""
    segments: list[int] = field(default_factory=list)

    def pack(self) -> bytes:
        flags = (_BROKEN if self.broken else 0) | (_COMPLETE if self.complete else 0)
        values = self.life, self.previous, self.head, self.log, self.snapshot, flags
        return _STATE.pack(*values) + struct.pack(f"<{len(self.segments)}Q", *self.segments)

    @classmethod
    def parse(cls, value: bytes) -> State:
        life, previous, head, log, snapshot, flags = _STATE.unpack_from(value)
        count = (len(value) - _STATE.size) // 8
        segments = list(struct.unpack_from(f"<{count}Q", value, _STATE.size))
        broken, complete = bool(flags & _BROKEN), bool(flags & _COMPLETE)
        return cls(life, previous, head, log, snapshot, broken, complete, segments)


class Ledger:
    """The ledger of a store that is in use."""

    def __init__(
        self,
        super: Superblock,
        space: Space,
        state: State,
        journal: Callable[[Record], None],
        name: str,
        emit: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._super = super
        self._space = space
        self._journal = journal  # appends a frame, and adds it here
        self._name = name  # of the store, for messages
        self.emit = emit
        self._told_broken = False
        self.state = state
        self.least_log = super.segment_size
        """A new generation begins when the log is longer than this and the snapshot."""
        self.unsaved = False
        """The database is to know of something."""
        self.obsolete: list[int] = []
        """Segments that the next database does not need any more."""
        self.durable = 0
        """The blocks that earlier frames speak of are on stable storage."""
        self._number = 0
        self._resume: int | None = None
        self._entries: list[Entry] = []
        self._turn: int | None = None  # so many of the entries are the old generation's
        self.turned = False
        """A snapshot is wanted, or being written."""
        self._old: list[int] = []  # segments of the generations before the one that is begun
        self._since = 0  # bytes of the log since it was begun
        self._lock = asyncio.Lock()
        self._not_before = 0.0

    def resume(self, frame: int, segments: Iterable[int], *, crashed: bool) -> None:
        """The store is being opened; its database ends before `frame`.

        Since then the ledger has taken `segments`.
        """
        self._resume = self.durable = frame
        for segment in segments:
            if segment not in self.state.segments:
                self.state.segments.append(segment)
        if crashed:
            # What the last life has written stays until this one has written it, too.
            self.state.head = 0

    @property
    def size(self) -> int:
        """Bytes of its segments."""
        return (len(self.state.segments) + len(self.obsolete)) << self._super.segment_bits

    @property
    def sound(self) -> bool:
        """All that has been flushed can be made anew from the data device."""
        return self.state.complete and not self.state.broken

    @property
    def condition(self) -> Condition:
        """For the operator."""
        if not self._super.has_ledger:
            return "none"
        if self.sound:
            return "sound"
        return "broken" if self.state.broken else "incomplete"

    def tell(self, reason: str | None = None) -> None:
        """Send an event; the next one when the ledger is sound."""
        self._told_broken = self.state.broken
        told = {"metadata": self._name, "ledger": self.condition, "reason": reason}
        self.emit("DEDUP_LEDGER", {name: value for name, value in told.items() if value})

    # ---- what there is to write

    @property
    def waiting(self) -> int:
        """Frames and other entries that have not been written yet."""
        return len(self._entries)

    def add(self, frame: int, payload: bytes) -> None:
        """A frame of the journal."""
        if not self.state.broken:
            self._entries.append(Entry(FRAME, frame, payload))

    def gone(self, frame: int, numbers: list[int]) -> None:
        """Blocks (sorted) have ended at a checkpoint before `frame`."""
        if numbers and not self.state.broken:
            self._entries.append(Entry(GONE, frame, pack_records(_runs(numbers))))

    # ---- generations

    def is_due(self, snapshot: int) -> bool:
        """Whether to begin a new generation, whose snapshot would have so many bytes."""
        state, segment = self.state, self._super.segment_size
        if not self._super.has_ledger or self.turned or time.monotonic() < self._not_before:
            return False
        if state.complete and state.log <= max(state.snapshot, self.least_log):
            return False
        return self._space.free_segments > RESERVE + 2 + snapshot // segment

    def turn(self) -> None:
        """What is added from here on belongs to a new generation."""
        self.state.broken = False
        self._turn = len(self._entries)
        self.turned = True

    def abandon(self, error: BaseException | None = None) -> None:
        """There will be no snapshot now."""
        if self.turned:
            self.turned = False
            self._not_before = time.monotonic() + _RETRY
            if error is not None:
                logger.warning("dedup store '%s': no snapshot in the ledger: %s", self._name, error)

    def completed(self, length: int) -> None:
        """The snapshot is on stable storage."""
        if not self.turned:
            return  # what has happened since is not in the log: fail() has said why
        state = self.state
        self.turned = False
        self.obsolete += self._old
        state.segments = [segment for segment in state.segments if segment not in self._old]
        state.log, state.snapshot, state.complete = self._since, length, True
        self._old = []
        self.unsaved = True
        if self._told_broken:
            self.tell()

    def fail(self, error: OSError) -> None:
        """What should have been written may not be there."""
        state = self.state
        if not self._super.has_ledger or state.broken:
            return
        logger.warning(
            "dedup store '%s': the ledger cannot be written: %s; until it can, what happens could "
            "not be rebuilt without the metadata",
            self._name,
            error,
        )
        state.broken, state.complete, state.head = True, False, 0
        self._entries.clear()
        self._turn = None
        self.abandon()
        self._not_before = time.monotonic() + _RETRY
        self.unsaved = True
        self.tell(error.strerror or str(error))

    # ---- writing

    async def write(self, data: Writes) -> None:
        """What has been added so far is on its way to the data device. Never fails."""
        async with self._lock:
            if self.state.broken:
                return
            entries, self._entries = self._entries, []
            turn, self._turn = self._turn, None
            try:
                if turn is not None:
                    await self._log(data, entries[:turn])
                    self.state.head, self._since = 0, 0
                    self._old = list(self.state.segments)
                await self._log(data, entries[turn or 0 :])
            except OSError as error:
                self.fail(error)

    async def _log(self, data: Writes, entries: list[Entry]) -> None:
        payloads = list(pack_entries(entries, BIGGEST - HEADER))
        base, flags = 0, 0
        if self._resume is not None:
            base, flags = self._resume, RESUMES
            if not payloads and self.state.complete:
                # What an earlier life may have written after its last flush must not hold.
                payloads = [b""]
        for left, payload in zip(reversed(range(len(payloads))), payloads, strict=True):
            more = MORE if flags and left else 0
            space = await self._put(data, LOG, flags | more, payload, base, 0)
            self._resume = None
            self.state.log += space
            self._since += space

    async def put_snapshot(
        self, data: Writes, payload: bytes, base: int, index: int, *, last: bool
    ) -> int:
        """A chunk of the snapshot of the database that ends before frame `base`; its bytes."""
        async with self._lock:
            if not self.turned:
                raise NoSpace  # fail() has said why
            return await self._put(data, SNAPSHOT, LAST if last else 0, payload, base, index)

    async def _put(
        self, data: Writes, kind: int, flags: int, payload: bytes, base: int, index: int
    ) -> int:
        state, super = self.state, self._super
        now = int(time.time())
        number = self._number
        self._number += 1
        chunk = Chunk(kind, flags, len(payload), state.life, number, base, self.durable, now, index)
        end = super.segment_at(super.segment_of(state.head - 1) + 1) if state.head else 0
        if end - state.head < chunk.space:
            self._next_segment()
        offset = state.head
        state.head += chunk.space
        await data.write(offset, chunk.pack(super.uuid, offset, payload))
        return chunk.space

    def _next_segment(self) -> None:
        segment = self._space.take()
        try:
            self._journal(Taken(segment))
        except OSError:
            self._space.give_back(segment)
            self._space.add_free(segment)
            raise
        self.state.segments.append(segment)
        self.state.head = self._super.segment_at(segment)


def _runs(numbers: list[int]) -> Iterator[Gone]:
    first, count = numbers[0], 0
    for number in numbers:
        if number != first + count:
            yield Gone(first, count)
            first, count = number, 0
        count += 1
    yield Gone(first, count)


def portions(records: Iterable[Record]) -> Iterator[tuple[bytes, bool]]:
    """Packed records, as much as a chunk takes, and whether it is the last portion."""
    portion = bytearray()
    for record in records:
        packed = pack_record(record)
        if len(portion) + len(packed) > BIGGEST - HEADER:
            yield bytes(portion), False
            portion.clear()
        portion += packed
    yield bytes(portion), True
