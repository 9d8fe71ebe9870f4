# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest did, and hence what its disk may contain after a power cut.

A sector whose last write was flushed holds that; later writes that were not may be there or not,
each sector for itself. Nothing else is allowed: neither another place's data nor garbage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from crash.recording import Clock

SECTOR = 512
ZERO = bytes(SECTOR)

Kind = Literal["write", "write-zeroes", "discard", "flush", "resize"]
# A whole disk that is replaced (by going back to a snapshot) is a write that is durable at once.


class WrongContentError(AssertionError):
    """A sector reads as something that it must not."""


@dataclass(eq=False)
class Op:
    """One request of the guest. Of a resize, `length` is the new size."""

    kind: Kind
    offset: int
    length: int
    data: bytes = field(repr=False)
    fua: bool
    begin: int
    end: int | None = None


@dataclass
class _Moment:
    """What may be there after a cut, whatever happens later. Several judges read the same image."""

    time: int
    allowed: dict[int, list[bytes]]
    sizes: set[int]
    right: bytes | None = None
    """What has been found to be possible."""


class History:
    """The guest's requests against the clock of the files below."""

    def __init__(self, clock: Clock, content: bytes) -> None:
        self.clock = clock
        self.ops: list[Op] = []
        self._initial = content
        self.content = bytearray(content)
        """What the guest would read now. (A discarded sector counts as zeroes.)"""
        self._moment: _Moment | None = None

    def begin(
        self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"", *, fua: bool = False
    ) -> Op:
        op = Op(kind, offset, length, data, fua, self.clock.tick())
        self.ops.append(op)
        return op

    def end(self, op: Op) -> None:
        """It has ended well; one that failed never ends."""
        op.end = self.clock.tick()
        if op.kind == "resize":
            del self.content[op.length :]
            self.content.extend(bytes(op.length - len(self.content)))
        elif op.kind != "flush":
            data = op.data if op.kind == "write" else bytes(op.length)
            self.content[op.offset : op.offset + op.length] = data

    @contextlib.contextmanager
    def during(
        self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"", *, fua: bool = False
    ) -> Iterator[None]:
        """A request that begins now, and has ended well if no exception leaves the block."""
        op = self.begin(kind, offset, length, data, fua=fua)
        yield
        self.end(op)

    # ---- shorthands for sequences made by hand

    def write(self, offset: int, data: bytes) -> None:
        with self.during("write", offset, len(data), data):
            pass

    def flush(self) -> None:
        with self.during("flush"):
            pass

    # ---- after the cut

    def judge(self, content: bytes, time: int) -> None:
        """Raise unless a disk with `content` is possible after a cut right after tick `time`."""
        moment = self._moment
        if moment is None or moment.time != time:
            moment = self._moment = _Moment(time, *self._allowed(time))
        if content == moment.right:
            return
        if len(content) not in moment.sizes:
            raise WrongContentError(f"the disk has {len(content)} bytes, expected {moment.sizes}")
        expected = bytearray(self._initial[: len(content)])
        expected.extend(bytes(len(content) - len(expected)))
        for sector, values in moment.allowed.items():
            here = slice(sector * SECTOR, (sector + 1) * SECTOR)
            found = content[here]
            if not found:
                continue  # beyond a new end
            if found not in values:
                raise WrongContentError(
                    f"sector {sector} (byte {sector * SECTOR:#x}) reads as {_show(found)}; allowed:"
                    f" {', '.join(map(_show, values))}; {self._story(sector, time)}"
                )
            expected[here] = found
        if expected != content:
            at = next(i for i in range(len(content)) if expected[i] != content[i])
            sector = at // SECTOR
            here = slice(sector * SECTOR, (sector + 1) * SECTOR)
            raise WrongContentError(
                f"sector {sector} was never written and has changed from"
                f" {_show(bytes(expected[here]))} to {_show(content[here])}"
            )
        moment.right = bytes(content)

    def _allowed(self, time: int) -> tuple[dict[int, list[bytes]], set[int]]:
        """What each sector that was ever touched may be, and how large the disk."""
        flushed = max(
            (op.begin for op in self.ops if op.kind == "flush" and _ended(op, time)), default=0
        )
        allowed: dict[int, list[bytes]] = {}
        sizes = {len(self._initial)}
        largest = len(self._initial)
        for op in self.ops:
            if op.kind == "flush" or op.begin > time:
                continue
            durable = _ended(op, flushed) or (op.fua and _ended(op, time))
            offset, end = op.offset, op.offset + op.length
            if op.kind == "resize":
                sizes = {op.length} if durable else sizes | {op.length}
                offset, end = op.length, largest
                largest = max(largest, op.length)
            for sector in range(offset // SECTOR, -(-end // SECTOR)):
                at = sector * SECTOR - op.offset
                new = op.data[at : at + SECTOR] if op.kind == "write" else ZERO
                if durable and op.kind != "discard":
                    allowed[sector] = [new]
                    continue
                if sector not in allowed:
                    allowed[sector] = [self._before(sector)]
                values = allowed[sector]
                if new not in values:
                    values.append(new)
        return allowed, sizes

    def _before(self, sector: int) -> bytes:
        return self._initial[sector * SECTOR : (sector + 1) * SECTOR] or ZERO

    def _story(self, sector: int, time: int) -> str:
        touching = [
            f"{op.kind} {op.begin}-{op.end}"
            for op in self.ops
            if op.begin <= time
            and (
                op.kind in ("flush", "resize")
                or op.offset <= sector * SECTOR < op.offset + op.length
            )
        ]
        return f"cut after {time}; what happened to it: {', '.join(touching[-8:])}"


def _ended(op: Op, time: int) -> bool:
    return op.end is not None and op.end <= time


def _show(sector: bytes) -> str:
    return "zeroes" if sector == ZERO else f"{sector[:12].hex()}…"
