# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the metadata of a store anew from its data device: from the ledger, that is.

All segments are looked at for chunks. The last snapshot that is whole goes into a new
database, and the log is replayed on top of it, life after life, as far as it has no gap. What was
flushed is in there; of what came after, as much as there is. The data device is only read.

The superblock in the new directory is written last. Until then it is no store, and a rebuild that
was interrupted begins from scratch.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vhostblk.dedup.check import Check
from vhostblk.dedup.compression import decompress
from vhostblk.dedup.format import (
    HASHES,
    LIFE_AT,
    SUPERBLOCK,
    Gone,
    Record,
    Stored,
    Superblock,
    parse_life,
    stored_space,
    unpack_records,
)
from vhostblk.dedup.journal import sync_directory, write_file
from vhostblk.dedup.ledger import (
    ALIGNMENT,
    FRAME,
    GONE,
    LAST,
    LOG,
    MORE,
    RESUMES,
    Chunk,
    State,
    parse_header,
    payload_of,
    unpack_entries,
)
from vhostblk.dedup.replay import Replay
from vhostblk.dedup.tables import FILE, Tables
from vhostblk.schema import VhostblkError

_AT_ONCE = 16
"""Segments that are looked at, and chunks of a snapshot that go into the database."""
_CHANGES = 32768


class Source(Protocol):
    """The data device."""

    size: int

    def read(self, offset: int, into: int) -> Awaitable[Any]:
        """So many bytes."""


class Found(NamedTuple):
    """A chunk, and where it is."""

    order: tuple[int, int]
    """Life and number."""
    offset: int
    chunk: Chunk


class _Snapshot(NamedTuple):
    parts: list[Found]
    base: int

    @property
    def life(self) -> int:
        return self.parts[0].chunk.life

    def is_left_by(self, chunk: Chunk) -> bool:
        """Whether a later life goes on from before it."""
        later = chunk.life > self.life
        return later and bool(chunk.flags & RESUMES) and chunk.base < self.base


@dataclass
class Report:
    """What a rebuild has made."""

    disks: list[str] = field(default_factory=list)
    blocks: int = 0
    mapped: int = 0
    time: int = 0
    """When the last record was written that is in it: seconds since 1970."""
    frames: int = 0
    """Changes since the snapshot."""
    dropped: int = 0
    """Blocks of disks whose last, unflushed write is not on the data device."""
    lost: int = 0
    """Chunks that could not be used, because records before them are missing."""
    messages: list[str] = field(default_factory=list)


class Rebuild:
    """One rebuild, of the metadata of the store on `data`, in the new `directory`."""

    def __init__(
        self, directory: Path, data: Source, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._directory = directory
        self._data = data
        self._tell = progress or (lambda done, all: None)
        self._done = self._all = 0
        self._report = Report()

    async def run(self) -> Report:
        """Do it; VhostblkError if there is nothing to make them from."""
        packed = bytes(await self._data.read(0, SUPERBLOCK))
        self._super = Superblock.parse(packed)
        if not self._super.has_ledger:
            raise VhostblkError(
                "the dedup store was made by an earlier version (format 1), which wrote no records "
                "of the metadata to the data device: they cannot be rebuilt",
                data={"code": "no-ledger"},
            )
        self._prepare()
        found = await self._scan()
        whole = _without_halves(found)
        snapshot = self._choose(whole)
        # Its log is of its own life and later ones. What earlier ones have left says nothing.
        logs = [one for one in whole if one.chunk.kind == LOG and one.chunk.life >= snapshot.life]
        self._all += len(snapshot.parts) + 2 * len(logs)
        tables = Tables(self._directory, self._super, 256 << 30)
        try:
            await self._load(tables, snapshot)
            await self._replay(tables, logs, snapshot)
            await self._finish(tables, found)
        finally:
            tables.close()
        await asyncio.to_thread(write_file, self._directory / "superblock", packed)
        sync_directory(self._directory)
        return self._report

    def _prepare(self) -> None:
        directory = self._directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # (A rebuild that was interrupted has left no journal.)
            if (directory / "superblock").exists() or any(directory.glob("journal.*")):
                raise VhostblkError(
                    f"'{directory}' has metadata of a dedup store; rebuild into another directory, "
                    "and keep these until the result has been looked at",
                    data={"code": "exists"},
                )
            (directory / FILE).unlink(missing_ok=True)  # of a rebuild that was interrupted
        except OSError as error:
            raise VhostblkError(
                f"metadata cannot be made in '{directory}': {error.strerror}",
                data={"code": "no-metadata"},
            ) from None

    # ---- what is there

    def _progress(self, steps: int) -> None:
        self._done += steps
        self._tell(self._done, self._all)

    async def _scan(self) -> list[Found]:
        """All chunks of all segments, in the order in which they were written."""
        count = self._all = self._super.segments(self._data.size)
        found: list[Found] = []
        for first in range(0, count, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, count))
            for chunks in await asyncio.gather(*map(self._scan_segment, numbers)):
                found += chunks
            self._progress(len(numbers))
        found.sort()
        return found

    async def _scan_segment(self, segment: int) -> list[Found]:
        found: list[Found] = []
        at, end = self._super.segment_at(segment), self._super.segment_at(segment + 1)
        last = (0, 0)
        while at < end:
            try:
                head = await self._data.read(at, ALIGNMENT)
                chunk = parse_header(head)
                if chunk is None or at + chunk.space > end:
                    break
                order = chunk.life, chunk.number
                if order <= last or await self._payload(at, chunk) is None:
                    break  # what follows is older: the segment was the ledger's before
            except OSError as error:
                self._report.messages.append(f"segment {segment} cannot be read: {error.strerror}")
                break
            found.append(Found(order, at, chunk))
            last = order
            at += chunk.space
        return found

    async def _payload(self, offset: int, chunk: Chunk) -> bytes | None:
        data = await self._data.read(offset, chunk.space)
        return payload_of(self._super.uuid, offset, data, chunk)

    # ---- what holds

    def _choose(self, found: list[Found]) -> _Snapshot:
        """The last whole snapshot that no later life has left behind."""
        best: _Snapshot | None = None
        parts: list[Found] = []
        for one in found:
            chunk = one.chunk
            if chunk.kind == LOG:
                if best is not None and best.is_left_by(chunk):
                    best = None  # an older copy of the metadata has come back
                continue
            follows = parts and parts[-1].order[0] == chunk.life and chunk.part == len(parts)
            if chunk.part == 0:
                parts = [one]
            elif follows and parts[0].chunk.base == chunk.base:
                parts.append(one)
            else:
                parts = []
            if parts and chunk.flags & LAST:
                best = _Snapshot(parts, chunk.base)
        if best is None:
            raise VhostblkError(
                "there are no records on the data device from which the metadata could be rebuilt",
                data={"code": "no-ledger"},
            )
        return best

    async def _load(self, tables: Tables, snapshot: _Snapshot) -> None:
        parts = snapshot.parts
        for first in range(0, len(parts), _AT_ONCE):
            some = parts[first : first + _AT_ONCE]
            payloads = [await self._again(one) for one in some]
            records = chain.from_iterable(map(unpack_records, payloads))
            await asyncio.to_thread(tables.load, records)
            self._progress(len(some))
        self._report.time = parts[-1].chunk.time

    async def _again(self, one: Found) -> bytes:
        payload = await self._payload(one.offset, one.chunk)
        if payload is None:
            raise OSError(errno.EIO, f"the ledger at {one.offset} is not what it was a moment ago")
        return payload

    # ---- the log

    async def _replay(self, tables: Tables, logs: list[Found], snapshot: _Snapshot) -> None:
        last = logs[-1].chunk.life if logs else snapshot.life
        trusted = max((one.chunk.durable for one in logs if one.chunk.life == last), default=0)
        there = await self._what_is_there(logs, snapshot, trusted)

        async def is_there(record: Stored) -> bool:
            return record in there

        replay = Replay(tables, trusted, is_there)
        tables.state.frame = snapshot.base
        report = self._report
        async for kind, frame, payload, when in self._entries(logs, snapshot, trusted):
            records = list(unpack_records(payload))
            if kind == GONE:
                _end(tables, records)
            else:
                await replay.frame(frame, records)
                tables.state.frame = frame + 1
                report.frames += 1
            report.time = max(report.time, when)
            if tables.changes > _CHANGES:
                await self._write(tables)
        report.dropped = replay.dropped

    async def _what_is_there(
        self, logs: list[Found], snapshot: _Snapshot, trusted: int
    ) -> set[Stored]:
        """Of the blocks from frame `trusted` on: those that had reached the data device.

        A place is used again after the checkpoint that did not need it any more: the flush of
        that was complete, and so the log is there as far as that, and all blocks that were in use
        then. So a block that is in its last place was in the earlier ones, too, whatever is there
        now. Of a block that has ended nothing is known but what is in its place: that the log
        says so does not mean that the checkpoint got as far as its flush. If it did, all that has
        shown the block shows another one that is there, and it does not matter; if it did not,
        no place has been used again.
        """
        there: set[Stored] = set()
        stored: dict[int, list[Stored]] = {}
        async for _, frame, payload, _ in self._entries(logs, snapshot, trusted):
            if frame < trusted:
                continue
            for record in unpack_records(payload):
                if isinstance(record, Stored):
                    stored.setdefault(record.number, []).append(record)
        for places in stored.values():
            while places and not await self._is_there(places[-1]):
                places.pop()
            there.update(places)
        return there

    async def _entries(
        self, logs: list[Found], snapshot: _Snapshot, trusted: int
    ) -> AsyncIterator[tuple[int, int, bytes, int]]:
        """What holds of the log: kind, frame, payload, time."""
        cuts = _cuts(logs)
        life, expected = snapshot.life, snapshot.base
        parts = b""
        for position, one in enumerate(logs):
            chunk = one.chunk
            self._progress(1)
            if chunk.life != life:
                life, parts = chunk.life, b""
                if not chunk.flags & RESUMES or chunk.base > expected:
                    self._report.lost = len(logs) - position
                    return
                # Its first frames are those of the life before that it has found.
                expected = max(snapshot.base, chunk.base)
            for kind, frame, payload in unpack_entries(await self._again(one)):
                if frame > cuts[life] or (frame == cuts[life] and kind != GONE):
                    continue  # a later life has taken another way
                if kind == GONE and frame == expected:
                    yield kind, frame, payload, chunk.time
                elif kind != GONE and frame == expected:
                    parts += payload
                    if kind == FRAME:
                        yield kind, frame, parts, chunk.time
                        parts = b""
                        expected += 1
                elif frame > expected:
                    # What was not flushed may be there in parts; the rest must not be missing.
                    if expected < trusted:
                        self._report.lost = len(logs) - position
                    return

    async def _is_there(self, record: Stored) -> bool:
        super = self._super
        try:
            content = await self._data.read(record.offset, stored_space(record.length))
            if record.length != super.block_size:
                content = decompress(content[: record.length], super.block_size)
        except (OSError, VhostblkError):
            return False
        return HASHES[super.hash](content) == record.fingerprint

    # ---- the database

    async def _write(self, tables: Tables) -> None:
        tables.freeze()
        await asyncio.to_thread(tables.write)
        tables.written()

    async def _finish(self, tables: Tables, found: list[Found]) -> None:
        """Nothing waits any more, and all that can be recomputed is right."""
        for number in tables.dying():
            tables.end(number)
        await self._write(tables)
        # The ledger stays as it is until the store has written another one.
        used = {self._super.segment_of(one.offset) for one in found} - tables.segments().keys()
        last = parse_life(self._super.uuid, await self._data.read(LIFE_AT, SUPERBLOCK))
        life = max(last, *(one.chunk.life for one in found))
        state = State(life, last, segments=sorted(used))
        await asyncio.to_thread(tables.put_ledger, state.pack())
        check = Check(tables, self._super, self._data.size, repair=True)
        result = await asyncio.to_thread(check.run)
        report = self._report
        report.messages += result.messages
        report.disks = [name for _, name in tables.disks().values()]
        report.blocks, report.mapped = result.blocks, result.mapped
        self._progress(self._all - self._done)


def _without_halves(found: list[Found]) -> list[Found]:
    """The same without beginnings of lives that are not there as a whole."""
    flags = RESUMES | MORE
    begun = {
        one.chunk.life
        for one in found
        if one.chunk.kind == LOG and one.chunk.flags & flags == RESUMES
    }
    return [
        one
        for one in found
        if one.chunk.kind != LOG or not one.chunk.flags & MORE or one.chunk.life in begun
    ]


def _cuts(logs: list[Found]) -> dict[int, int]:
    """For each life the frame from which on a later one has taken another way."""
    cuts: dict[int, int] = {}
    cut = 1 << 63
    for one in reversed(logs):
        cuts.setdefault(one.chunk.life, cut)
        if one.chunk.flags & RESUMES:
            cut = min(cut, one.chunk.base)
    return cuts


def _end(tables: Tables, records: list[Record]) -> None:
    for record in records:
        if isinstance(record, Gone):
            for number in range(record.first, record.first + record.blocks):
                block = tables.block(number)
                if block is not None and block.refs == 0:
                    tables.end(number)
