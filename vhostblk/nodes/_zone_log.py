# SPDX-License-Identifier: GPL-2.0-or-later
"""How far a re-encryption has come, on disk, so that no crash at any point loses data.

A disk is re-encrypted from its start on, zone by zone. Everything below the boundary has the new
key, everything from there on the old one (or none). The log lies in an area of the header:

    record 0 | record 1 | the new content of one zone

Each change of state is one record, written to the older one's place and flushed. A record says
either "the boundary is here" (idle) or "the zone from here on is being overwritten, its new
content is in the log, with this checksum" (busy). For one zone:

 1. its new content is written to the log, and the busy record; then a flush. A crash before
    that leaves the idle record in force, and the zone as it was;
 2. the new content is written to its place; then a flush. A crash in between may leave half
    of it; whoever opens the disk next finds the busy record, and writes all of it again;
 3. the idle record with the new boundary is written; then a flush. Only then may anybody read or
    write the zone: until then another crash would have the log's content written once more;
 4. the busy record is overwritten with a copy of the idle one, without a flush: should the first
    become unreadable one day, nobody must believe the zone to be busy still.

A busy record whose content does not have its checksum is one of step 1 that did not make it:
what counts is the idle record beside it. Nothing in the log is secret: the content is encrypted.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Protocol

from vhostblk.schema import VhostblkError

BLOCK = 4096
MAGIC = b"vhostblk reencry"
_RECORD = struct.Struct("<16s16sQQQ32s")  # magic, run, sequence, boundary, length, checksum
_DIGEST = 32


class Storage(Protocol):
    """Where the header is."""

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""


@dataclass(frozen=True)
class Record:
    """A state. With a length of 0 it is idle."""

    sequence: int
    boundary: int
    length: int = 0
    checksum: bytes = bytes(_DIGEST)

    def pack(self, run: bytes) -> bytes:
        body = _RECORD.pack(MAGIC, run, self.sequence, self.boundary, self.length, self.checksum)
        return (body + hashlib.sha256(body).digest()).ljust(BLOCK, b"\0")

    @classmethod
    def parse(cls, data: bytes, run: bytes) -> Record | None:
        """None if it is none, or belongs to another re-encryption."""
        body, digest = data[: _RECORD.size], data[_RECORD.size : _RECORD.size + _DIGEST]
        if hashlib.sha256(body).digest() != digest:
            return None
        magic, whose, sequence, boundary, length, checksum = _RECORD.unpack(body)
        if magic != MAGIC or whose != run:
            return None
        return cls(sequence, boundary, length, checksum)


class ZoneLog:
    """The log in `size` bytes of `storage` from `offset` on; `run` names the re-encryption."""

    def __init__(self, storage: Storage, offset: int, size: int, run: bytes) -> None:
        self._storage = storage
        self._offset = offset
        self._run = run
        self._last: Record
        self.most = (size - 2 * BLOCK) // BLOCK * BLOCK
        """How large a zone can be."""
        if self.most <= 0:
            raise VhostblkError(
                f"There is no room for re-encryption: {size} bytes of the header are free",
                data={"code": "no-room"},
            )

    async def create(self, boundary: int = 0) -> None:
        """A new log. Whatever lay there is not one of this run."""
        self._last = Record(0, boundary)
        await self._write(self._last)
        await self._storage.flush()

    async def load(self) -> tuple[int, bytes | None]:
        """The boundary, and what has to be written there before it is true (then call done())."""
        found = []
        for slot in range(2):
            data = await self._storage.read(self._offset + slot * BLOCK, BLOCK)
            record = Record.parse(data, self._run)
            if record is not None and (record.length == 0 or record.sequence % 2 == slot):
                found.append(record)
        for record in sorted(found, key=lambda record: -record.sequence):
            if record.length == 0:
                self._last = record
                return record.boundary, None
            if record.length <= self.most:
                content = await self._storage.read(self._content, record.length)
                if hashlib.sha256(content).digest() == record.checksum:
                    self._last = record
                    return record.boundary, content
        raise VhostblkError(
            "The state of a re-encryption cannot be read: its log is damaged",
            data={"code": "bad-reencryption-log"},
        )

    async def begin(self, boundary: int, content: bytes | memoryview) -> None:
        """From now on the zone may be overwritten with this."""
        await self._storage.write(self._content, bytes(content))
        checksum = hashlib.sha256(content).digest()
        await self._append(Record(self._last.sequence + 1, boundary, len(content), checksum))

    async def done(self, boundary: int) -> None:
        """Nothing is being overwritten, and the boundary is here."""
        record = Record(self._last.sequence + 1, boundary)
        await self._append(record)
        await self._write(record, slot=record.sequence + 1)

    @property
    def _content(self) -> int:
        return self._offset + 2 * BLOCK

    async def _append(self, record: Record) -> None:
        # Also if it fails: what is on disk then nobody knows, and the next must supersede it.
        self._last = record
        await self._write(record)
        await self._storage.flush()

    async def _write(self, record: Record, slot: int | None = None) -> None:
        at = self._offset + (record.sequence if slot is None else slot) % 2 * BLOCK
        await self._storage.write(at, record.pack(self._run))
