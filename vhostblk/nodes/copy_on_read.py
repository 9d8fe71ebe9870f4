# SPDX-License-Identifier: GPL-2.0-or-later
"""copy-on-read: what a guest reads from backing files is copied into the topmost image.

The disk is divided into regions, as large as the clusters of the overlay below. The engine half
(cffi_build/engine/nodes/copy_on_read.c) passes on requests for regions that are *marked*:
nothing is left to be copied there. All others come up to this class, which asks the
overlays where their data are, marks what they have, and copies the rest.

Guests go on writing meanwhile, and no copy may land on top of newer data. So every request
that comes up *claims* its regions: a copy has them for itself, while writes share them. A
region is marked after its copy, or after a write that made the overlay allocate it; from then on
requests pass in C. There is no lock on that path, because nothing is ever copied again there.

The node is passive, left out of the engine's picture, where no overlay with a backing node is
below it. docs/copy-on-read.md explains all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from vhostblk.engine import OP_READ, OP_WRITE, OP_WRITE_ZEROES
from vhostblk.engine.copy_on_read import CopyOnReadHandle, new_copy_on_read
from vhostblk.nodes._chain import Leg, legs_below
from vhostblk.nodes.driver import ChildRole, NodeDriver, NodeOptions, Perm
from vhostblk.nodes.hooks import HookedChild, HookedNode, Request
from vhostblk.schema import BlockdevRef

PORTION = 1 << 20
"""Bytes that are copied at once, at most."""
_DEFAULT_UNIT = 1 << 16  # of overlays that do not say how much they allocate at once
_CHUNK = 512  # regions whose whereabouts are asked for at once
_ZEROES = bytes(1 << 21)  # the largest cluster there is

logger = logging.getLogger(__name__)


class CopyOnReadOptions(NodeOptions):
    """Options of copy-on-read."""

    file: BlockdevRef
    """The node below: an overlay, or filters above one or several."""
    bottom: str | None = None
    """The lowest image that is copied from; all of the chain if absent."""


class CopyFailed(OSError):
    """A copy could not be made; `operation` says which half of it failed."""

    operation: Literal["read", "write"]


class _Claim:
    """Regions that somebody is busy with."""

    def __init__(self, first: int, end: int, *, exclusive: bool) -> None:
        self.first = first
        self.end = end
        self.exclusive = exclusive
        self.released: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def conflicts(self, first: int, end: int, *, exclusive: bool) -> bool:
        return self.first < end and first < self.end and (exclusive or self.exclusive)


class CopyOnRead(HookedNode):
    """Copies what is read."""

    driver = "copy-on-read"
    Options = CopyOnReadOptions
    options: CopyOnReadOptions
    is_filter = True
    keeps_data = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole()}
    reopenable = HookedNode.reopenable | {"bottom"}

    # ---- life

    async def open(self) -> None:
        self._prepare_hooks()
        self._hooks = [self._read, self._change, None, self._change, self._change]
        self._half: CopyOnReadHandle | None = None
        self._look()

    async def close(self) -> None:
        half, self._half, self.handle = self._half, None, None
        if half is not None:
            half.free()

    def children_changed(self) -> None:
        self._look()

    def resized(self) -> None:
        self._look()

    def _look(self) -> None:
        """What is below, now; nothing is in flight."""
        self._claims: list[_Claim] = []
        self._learning: dict[int, asyncio.Future[None]] = {}
        self._learned: set[int] = set()
        self.handle = None
        self._legs, whole = legs_below(self, self.options.bottom)
        # Holes of the overlays say nothing of what legs have that are no overlays: the overlay's
        # leg may be out, and have missed that.
        self._tells_zeroes = whole
        self.generation = object()
        """Another one each time that marks are forgotten."""
        if self.read_only or not self._legs:
            return
        units = {leg.node.allocation_unit or _DEFAULT_UNIT for leg in self._legs}
        self._bits = max(units).bit_length() - 1
        self.region = 1 << self._bits
        # A write to a part of a region makes each overlay allocate all of it.
        self._writes_fill = units == {self.region} and all(
            leg.node.allocation_unit and leg.shift % self.region == 0 for leg in self._legs
        )
        if self._half is None:
            self._half = new_copy_on_read(
                self.engine, self._start, size=self.size, region_bits=self._bits
            )
        else:
            self._half.reset(self.size, self._bits)
        self.handle = self._half
        self._marks = self._count

    # ---- what it is

    def filename(self) -> str:
        return self.child("file").node.filename()

    def describe(self) -> dict[str, Any]:
        return {"copies-into": [leg.node.name for leg in self._legs] if self.handle else []}

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if self.handle is None or not perm:
            return perm, shared
        # Whoever else writes there could not be kept apart from our copies.
        return perm | Perm.WRITE_UNCHANGED, shared & ~Perm.WRITE

    async def truncate(self, size: int) -> None:
        await self.child("file").node.truncate(size)

    async def reopen_prepare(self, options: CopyOnReadOptions) -> None:
        legs_below(self, options.bottom)  # refused while nothing has happened yet
        await super().reopen_prepare(options)

    # ---- requests that came up

    async def _read(self, request: Request) -> None:
        first, end = self._regions(request.offset, request.length)
        try:
            await self._learn(first, end)
            for begin, stop in self._unmarked(first, end):
                await self._copy(begin, stop)
        except OSError as error:
            # The guest wants its data, not our copy: what it can have, it gets from below.
            self._log.log(
                logging.WARNING,
                "copy-on-read '%s': what was read at %d is not copied: %s",
                self.name,
                request.offset,
                error.strerror or error,
            )
        request.forward()

    async def _change(self, request: Request) -> None:
        """A write, a discard or a zero write."""
        first, end = self._regions(request.offset, request.length)
        with contextlib.suppress(OSError):  # whether it succeeds is for the overlay to say
            await self._learn(first, end)
        if self._find(first, marked=False) >= end:
            request.forward()
            return
        claim = await self._claim(first, end, exclusive=False)
        try:
            await self._file.forward(request)
            if request.operation == "write":
                self._written(request.offset, request.length)
        finally:
            self._release(claim)

    def _written(self, offset: int, length: int) -> None:
        """Regions that an overlay has now because of a write."""
        if self._writes_fill:
            self._mark(*self._regions(offset, length))
            return
        first = -(-offset >> self._bits)
        end = offset + length
        last = self._count if end == self.size else end >> self._bits
        if first < last:
            self._mark(first, last)

    def _report(
        self,
        level: int,
        request: Request,
        text: str,
        data: dict[str, Any],
        error: BaseException | None = None,
    ) -> None:
        # An errno comes from below, where it has been reported.
        if not isinstance(error, OSError):
            super()._report(level, request, text, data, error)

    # ---- what is where

    @property
    def _half_now(self) -> CopyOnReadHandle:
        assert self._half is not None
        return self._half

    @property
    def _file(self) -> HookedChild:
        child = self.child("file")
        assert isinstance(child, HookedChild)
        return child

    @property
    def _count(self) -> int:
        return -(-self.size >> self._bits)

    # An image above may make its file longer at any time (ChildStorage.ensure()). The engine half
    # gets more marks only when nothing is in flight: until then what is behind them has none.

    def _mark(self, first: int, end: int) -> None:
        """Nothing is left to be copied there."""
        if first < self._marks:
            self._half_now.mark(first, min(end, self._marks))

    def _find(self, first: int, *, marked: bool) -> int:
        """The first region from `first` on that is marked, or is not; their number if none is."""
        found = self._half_now.find(first, marked=marked) if first < self._marks else first
        return found if found < self._marks or not marked else self._count

    def _regions(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self._bits, ((offset + length - 1) >> self._bits) + 1

    def _unmarked(self, first: int, end: int) -> Iterable[tuple[int, int]]:
        """Runs of regions without a mark, none longer than a portion."""
        find, most = self._find, max(1, PORTION >> self._bits)
        while (first := find(first, marked=False)) < end:
            stop = min(end, first + most, find(first, marked=True))
            yield first, stop
            first = stop

    async def _learn(self, first: int, end: int) -> None:
        """Mark what the overlays have, where they have not been asked yet."""
        for chunk in range(first // _CHUNK, (end - 1) // _CHUNK + 1):
            while chunk in self._learning:
                await self._learning[chunk]
            if chunk in self._learned:
                continue
            done = self._learning[chunk] = asyncio.get_running_loop().create_future()
            try:
                begin = chunk * _CHUNK
                stop = min(begin + _CHUNK, self._count)
                needed, _ = await self._missing(begin, stop)
                for is_needed, at, length in _runs(needed):
                    if not is_needed:
                        self._mark(begin + at, begin + at + length)
                self._learned.add(chunk)
            finally:
                del self._learning[chunk]
                done.set_result(None)

    async def _missing(self, first: int, end: int) -> tuple[bytearray, bytearray]:
        """For each region: whether something is to be copied, and whether it has data at all."""
        bits, offset = self._bits, first << self._bits
        length = min(end << bits, self.size) - offset
        needed, data = bytearray(end - first), bytearray(end - first)
        for leg in self._legs:
            async for start, size, wanted, zero in leg.extents(offset, length):
                begin = (start - offset) >> bits
                stop = ((start + size - 1 - offset) >> bits) + 1
                if wanted:
                    needed[begin:stop] = b"\1" * (stop - begin)
                if not (zero and self._tells_zeroes):
                    data[begin:stop] = b"\1" * (stop - begin)
        return needed, data

    # ---- claims

    async def _claim(self, first: int, end: int, *, exclusive: bool) -> _Claim:
        while True:
            for claim in self._claims:
                if claim.conflicts(first, end, exclusive=exclusive):
                    break
            else:
                claim = _Claim(first, end, exclusive=exclusive)
                self._claims.append(claim)
                return claim
            await claim.released

    def _release(self, claim: _Claim) -> None:
        self._claims.remove(claim)
        claim.released.set_result(None)

    # ---- copying

    async def _copy(self, first: int, end: int) -> int:
        """Copy what is missing in some regions, and mark them; how many bytes were copied."""
        claim = await self._claim(first, end, exclusive=True)
        try:
            # Asked only now: whoever had the claim before may have marked some, and writes to these
            # do not come up any more. They are not copied into even if an overlay lacks them, on a
            # leg of a quorum that is out.
            runs = self._unmarked(first, end)
            return sum([await self._copy_unmarked(*run) for run in runs])
        finally:
            self._release(claim)

    async def _copy_unmarked(self, first: int, end: int) -> int:
        """The same for claimed regions without a mark."""
        needed, data = await self._missing(first, end)
        kinds = bytes(need + (need & have) for need, have in zip(needed, data, strict=True))
        copied = 0
        for kind, at, length in _runs(kinds):
            offset = (first + at) << self._bits
            size = min(length << self._bits, self.size - offset)
            if kind == 1:
                await _writing(self._file.write_zeroes(offset, size))
            elif kind:
                await self._copy_data(offset, size)
            copied += size if kind else 0
        self._mark(first, end)
        return copied

    async def _copy_data(self, offset: int, length: int) -> None:
        buffer = bytearray(length)
        try:
            await self._file.read(offset, buffer)
        except OSError as error:
            raise _failed(error, "read") from None
        view = memoryview(buffer)
        for is_zero, at, size in _zero_runs(buffer, self.region):
            if is_zero:
                await _writing(self._file.write_zeroes(offset + at, size))
            else:
                await _writing(self._file.write(offset + at, view[at : at + size]))

    # ---- for a job that copies everything

    @property
    def targets(self) -> list[Leg]:
        """The overlays that are copied into."""
        return self._legs if self.handle is not None else []

    async def copy_from(self, offset: int, most: int) -> tuple[int, int]:
        """Copy something from `offset` on: where to go on, and how many bytes were copied.

        A step of a job, inside `host.working(self)`. Raises CopyFailed.
        """
        if self.handle is None:
            return self.size, 0
        first = self._find(offset >> self._bits, marked=False)
        if first >= self._count:
            return self.size, 0
        chunk_end = min((first // _CHUNK + 1) * _CHUNK, self._count)
        try:
            await self._learn(first, first + 1)
        except OSError as error:
            raise _failed(error, "read") from None
        first = self._find(first, marked=False)
        if first >= chunk_end:
            return min(chunk_end << self._bits, self.size), 0
        end = min(chunk_end, first + max(1, min(most, PORTION) >> self._bits))
        end = min(end, self._find(first, marked=True))
        copied = await self._copy(first, end)
        return min(end << self._bits, self.size), copied

    async def copy_beside(self, leg: Leg, offset: int, length: int) -> int:
        """Copy what an overlay lacks where it is not the disk's: how many bytes were copied.

        In a drained section. Raises CopyFailed.
        """
        overlay = leg.node.effective
        copied = 0
        try:
            found = [
                (at, size) async for at, size, wanted, _ in leg.extents(offset, length) if wanted
            ]
            for at, size in found:
                data = bytearray(size)
                await self.engine.submit(overlay, OP_READ, at + leg.shift, data)
                is_zero = data == bytes(size)
                op, buffer = (OP_WRITE_ZEROES, None) if is_zero else (OP_WRITE, data)
                await _writing(self.engine.submit(overlay, op, at + leg.shift, buffer, size))
                copied += size
        except CopyFailed:
            raise
        except OSError as error:
            raise _failed(error, "read") from None
        return copied

    async def lacking(self, offset: int) -> tuple[int, list[NodeDriver]]:
        """Ask the overlays themselves, whatever is marked: where to go on, and those that lack
        something before that."""
        first = offset >> self._bits
        end = min((first + _CHUNK) << self._bits, self.size)
        return end, [leg.node for leg in self.targets if await leg.lacks(offset, end - offset)]

    def start_over(self) -> None:
        """Forget what is marked: the overlays are asked anew. Nothing is in flight."""
        self._look()


def _runs(kinds: bytes | bytearray) -> Iterable[tuple[int, int, int]]:
    """Equal bytes in a row: value, where, how many."""
    at = 0
    while at < len(kinds):
        kind, begin = kinds[at], at
        while at < len(kinds) and kinds[at] == kind:
            at += 1
        yield kind, begin, at - begin


def _zero_runs(data: bytearray, region: int) -> Iterable[tuple[bool, int, int]]:
    """Regions in a row that are, or are not, full of zeroes: which, where, how many bytes."""
    # No slices: startswith() compares in place.
    zeroes = _ZEROES[:region]
    rest = _ZEROES[: len(data) % region]
    kinds = bytes(
        data.startswith(zeroes if at + region <= len(data) else rest, at)
        for at in range(0, len(data), region)
    )
    for is_zero, at, count in _runs(kinds):
        offset = at * region
        yield bool(is_zero), offset, min(count * region, len(data) - offset)


def _failed(error: OSError, operation: Literal["read", "write"]) -> CopyFailed:
    failed = CopyFailed(error.errno or errno.EIO, error.strerror or "")
    failed.operation = operation
    return failed


async def _writing(io: Any) -> None:
    try:
        await io
    except OSError as error:
        raise _failed(error, "write") from None
