# SPDX-License-Identifier: GPL-2.0-or-later
"""What a disk must contain, and random work that keeps many requests in flight.

The model is a bytearray. Requests in flight never overlap, except reads with reads, so that at each
completion there is exactly one right answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from blkio.disk import Disk, Op, Queue, Request

SECTOR = 512

Discards = str
"""After a discard: "zero" (reads zeroes), "keep" (nothing happens), "any" (either, bytewise)."""


class Model:
    """The contents, after every request that has completed."""

    def __init__(self, size: int, *, discards: Discards = "any", reads_zero: bool = False) -> None:
        self.data = bytearray(size)
        self.discards = discards
        self.reads_zero = reads_zero  # a null node: whatever is written, zeroes are read

    @property
    def size(self) -> int:
        return len(self.data)

    def completed(self, request: Request) -> None:
        """Check what was read, take in what was changed."""
        request.checked()
        here = slice(request.offset, request.end)
        if request.op is Op.READ:
            expected = bytes(request.length) if self.reads_zero else bytes(self.data[here])
            if request.data != expected:
                raise AssertionError(_difference(request, expected))
        elif request.op is Op.WRITE:
            self.data[here] = request.data
        elif request.op is Op.WRITE_ZEROES or (
            request.op is Op.DISCARD and self.discards == "zero"
        ):
            self.data[here] = bytes(request.length)

    def settle(self, disk: Disk, request: Request) -> None:
        """After a discard whose outcome is not prescribed: ask the disk, and hold it to that."""
        if request.op is not Op.DISCARD or self.discards != "any" or self.reads_zero:
            return
        now = disk.read(request.offset, request.length)
        before = self.data[request.offset : request.end]
        assert all(new in (old, 0) for new, old in zip(now, before, strict=True)), (
            "a discard left something that is neither the old data nor zero"
        )
        self.data[request.offset : request.end] = now

    def check_all(self, disk: Disk) -> None:
        """The whole disk, byte by byte."""
        read = disk.read(0, self.size)
        expected = bytes(self.size) if self.reads_zero else bytes(self.data)
        if read != expected:
            raise AssertionError(_difference(Request(Op.READ, 0, self.size, read), expected))


def _difference(request: Request, expected: bytes) -> str:
    first = next(i for i, (a, b) in enumerate(zip(request.data, expected, strict=True)) if a != b)
    wrong = sum(a != b for a, b in zip(request.data, expected, strict=True))
    return (
        f"read of {request.length:#x} bytes at {request.offset:#x}: {wrong} bytes are wrong, the "
        f"first at {request.offset + first:#x}: {request.data[first : first + 16].hex()} instead "
        f"of {expected[first : first + 16].hex()}"
    )


def pattern(size: int, seed: int) -> bytes:
    """Data that differs everywhere and tells where it belongs."""
    return random.Random(seed).randbytes(size)


@dataclass
class Workload:
    """Random requests within [begin, end) on one queue, checked against a model."""

    queue: Queue
    model: Model
    seed: int
    begin: int = 0
    end: int | None = None
    depth: int = 16
    biggest: int = 64 << 10
    ops: Sequence[Op] = tuple(Op)
    log: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        if self.end is None:
            self.end = self.model.size

    def run(self, count: int) -> None:
        """`count` requests, up to `depth` at a time; all of them have completed afterwards."""
        for _ in range(count):
            while len(self.queue.flying) >= self.depth or not self.start_one():
                self.reap()
        while self.queue.flying:
            self.reap()

    def reap(self) -> None:
        """Wait for a completion."""
        for request in self.queue.wait(1):
            self.model.completed(request)
            self.log.append(request)

    def start_one(self) -> bool:
        """Start one more; False if its place is taken by what is in flight."""
        assert self.end is not None
        rnd = self.random
        op = rnd.choice(self.ops)
        if op is Op.FLUSH:
            self.queue.flush()
            return True
        length = SECTOR * rnd.choice((1, 1, 7, 8, 8, 8, rnd.randint(1, self.biggest // SECTOR)))
        sectors = (self.end - self.begin - length) // SECTOR
        wanted = Request(op, self.begin + SECTOR * rnd.randint(0, sectors), length)
        for other in self.queue.flying.values():
            both_read = op is Op.READ and other.op is Op.READ
            if other.op is not Op.FLUSH and not both_read and wanted.overlaps(other):
                return False
        if op is Op.READ:
            self.queue.read(wanted.offset, length, split=self._split(length))
        elif op is Op.WRITE:
            zero = rnd.random() < 0.2  # for nodes that look for zeroes
            data = bytes(length) if zero else rnd.randbytes(length)
            self.queue.write(
                wanted.offset, data, split=self._split(length), fua=rnd.random() < 0.05
            )
        elif op is Op.DISCARD:
            self.queue.discard(wanted.offset, length)
        else:
            self.queue.write_zeroes(wanted.offset, length, unmap=rnd.random() < 0.5)
        return True

    def _split(self, length: int) -> list[int]:
        """Mostly one buffer, sometimes several, now and then a whole lot of sectors."""
        kind = self.random.random()
        if kind < 0.6:
            return [length]
        if kind < 0.7 and length <= 100 * SECTOR:
            return [SECTOR] * (length // SECTOR)
        cuts = sorted(SECTOR * self.random.randint(0, length // SECTOR) for _ in range(3))
        points = [0, *cuts, length]
        return [b - a for a, b in itertools.pairwise(points) if b > a]
