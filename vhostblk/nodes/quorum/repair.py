# SPDX-License-Identifier: GPL-2.0-or-later
"""Looking at legs one by one: comparing them, and copying what one of them lacks.

All of it happens while guests write. Where it matters, the range is locked: changes of it wait
in the engine, for as long as the few requests in here take.

Rebuilding a leg, and what a crash leaves of it:
  1. The state becomes `rebuilding`: from here on the leg gets all that guests write.
  2. For each run of dirty regions, locked: read it by vote; write to the leg what differs there.
  3. After some of them: flush the leg, then, locked again, clear their bits. A region whose bit is
     clear is on the leg's disk. If the leg failed meanwhile, the bit that said so may have been
     among them - but none is cleared while a change of its region is in flight. If the flush fails,
     what guests have written since 1 may be gone as well, and all of the leg counts as missed.
  4. With all of the disk locked for a moment: no bit is set, and it is `in-sync`.
Whatever happens before 4, the next process finds a leg that is not in sync, and the bits of all
that it may lack.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import operator
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vhostblk.engine import OP_READ
from vhostblk.nodes.quorum.legs import Leg, LegState
from vhostblk.nodes.quorum.metadata import LateWrite

if TYPE_CHECKING:
    from vhostblk.nodes.quorum.driver import Quorum

PORTION = 1 << 20
"""Bytes that are copied or compared at once, at most."""
BATCH = 64
"""Portions after which a leg is flushed."""
BLOCK = 4096
"""What is voted on where legs differ."""
EVERYTHING = 1 << 63
"""More than any leg has, now or later."""
PATIENCE = 30.0
"""Seconds for one request of ours where legs have no timeout."""


@dataclass
class Vote:
    """What the legs say about a range."""

    winner: bytes | None
    """Each block of it as enough legs have it; None if there is a block without a majority."""
    losers: dict[Leg, list[tuple[int, int]]] = field(default_factory=dict)
    """Those that gave something else: where it begins and ends, from the start of the range."""
    failed: dict[Leg, int] = field(default_factory=dict)
    """Those that gave an error, and which."""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """Where there is no majority."""
    settled: list[tuple[int, int]] = field(default_factory=list)
    """The same, but one version has been chosen."""
    others: dict[Leg, list[tuple[int, int]]] = field(default_factory=dict)
    """Those that have another one there."""

    @property
    def differ(self) -> bool:
        """Whether not all of them agree."""
        return bool(self.losers or self.failed or self.lost or self.settled)


@dataclass
class Comparison:
    """What came of comparing a range."""

    bad: int = 0
    """Legs that were wrong, or could not read it."""
    repaired: int = 0
    """Bytes that were written."""
    lost: int = 0
    """Bytes of which no version has enough votes."""
    settled: int = 0
    """Bytes of which none had, and all legs have one version now."""


class Repair:
    """For one quorum."""

    def __init__(self, quorum: Quorum) -> None:
        self._quorum = quorum
        # The engine has 16 locks. Inside one, a read may need a vote, which takes another.
        self._room = asyncio.Semaphore(8)
        self._room_to_vote = asyncio.Semaphore(8)
        self._evening = asyncio.Lock()
        self._late: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """One step of background work, which ends with the last request that it has begun.

        A leg that hangs has failed, and guests go on without it; but until it lets go of what
        it was asked for, the graph cannot be changed.
        """
        async with self._quorum.host.working(self._quorum):
            try:
                yield
            finally:
                while self._late:
                    done, _ = await asyncio.wait(self._late)
                    for work in done:
                        work.exception()  # nobody is there to be told
                    self._late -= done

    @property
    def _patience(self) -> float:
        return self._quorum.options.leg_timeout / 1000 or PATIENCE

    @asynccontextmanager
    async def locked(
        self, offset: int, length: int, room: asyncio.Semaphore | None = None
    ) -> AsyncIterator[None]:
        """Inside, nothing changes the range."""
        handle = self._quorum.handle
        assert handle is not None
        async with room or self._room:
            # Legs have their own time to fail in, so changes end a little later.
            try:
                lock = await handle.lock(offset, length, 2 * self._patience)
            except TimeoutError:
                raise OSError(errno.ETIMEDOUT, "requests in flight do not end") from None
            try:
                yield
            finally:
                handle.unlock(lock)

    # ---- comparing

    async def vote(self, offset: int, length: int) -> Vote:
        """Ask all legs that are in sync, while nobody writes there.

        After an unclean end one of several versions is as good as another. A single disk would
        have one of them, and keep it: so all legs get it, by whole blocks.
        """
        first = offset - offset % BLOCK
        end = min(self._quorum.size, -(-(offset + length) // BLOCK) * BLOCK)
        async with self.locked(first, end - first, self._room_to_vote):
            vote = await self._vote(offset, length)
            if not vote.lost or not self._quorum.unclean:
                return vote
            vote = await self._vote(first, end - first, choose=True)
            if self._quorum.settles:
                await self._make_right(vote, first, end - first)
        if vote.winner is not None:
            self._quorum.report_settled(offset, length)
            vote.winner = vote.winner[offset - first : offset - first + length]
        return vote

    async def even(self, offset: int, length: int) -> None:
        """A change has failed on so many legs that it has as a whole: who has it is not wrong, and
        who has not is neither. One version counts from now on, block by block: that of most legs,
        or else of the first one; if others cannot take that, of the last one.
        """
        first = offset - offset % BLOCK
        end = min(self._quorum.size, -(-(offset + length) // BLOCK) * BLOCK)
        async with self._evening, self.locked(first, end - first, self._room_to_vote):
            for direction in (1, -1):
                legs = self._in_sync()[::direction]
                vote = await self._vote(first, end - first, choose=True, legs=legs)
                if not (vote.losers or vote.settled):
                    return
                vote.failed = {}  # whoever cannot be read stays as it is
                await self._make_right(vote, first, end - first, everywhere=True)

    async def compare(self, offset: int, length: int, *, rewrite: bool) -> Comparison:
        """Find the legs that are wrong, tell, and with `rewrite` make them right."""
        if not (await self._vote(offset, length)).differ:
            return Comparison()
        # They may differ only because of a write on its way.
        async with self.locked(offset, length):
            vote = await self._vote(offset, length, choose=rewrite and self._quorum.settles)
            found = Comparison(len(vote.losers) + len(vote.failed))
            self._report(vote, offset, length)
            found.lost = sum(end - start for start, end in vote.lost)
            found.settled = sum(end - start for start, end in vote.settled)
            if rewrite:
                found.repaired = await self._make_right(vote, offset, length)
        return found

    def _report(self, vote: Vote, offset: int, length: int) -> None:
        quorum = self._quorum
        for leg, code in vote.failed.items():
            quorum.report_bad(leg, OP_READ, -code, offset, length)
        for leg, ranges in vote.losers.items():
            start, end = ranges[0][0], ranges[-1][1]
            quorum.report_bad(leg, OP_READ, 0, offset + start, end - start)
        for start, end in vote.lost:
            quorum.report_failure(OP_READ, -errno.EIO, offset + start, end - start)
        for start, end in vote.settled:
            quorum.report_settled(offset + start, end - start)

    async def _make_right(
        self, vote: Vote, offset: int, length: int, *, everywhere: bool = False
    ) -> int:
        """With `everywhere` legs that do not vote may be wrong where any other is."""
        written = 0
        bad = {leg: [*ranges, *vote.others.pop(leg, ())] for leg, ranges in vote.losers.items()}
        bad.update(vote.others)
        changed = [each for ranges in bad.values() for each in ranges] if everywhere else []
        self._mark_changed(sorted({*vote.settled, *changed}), offset, bad)
        if vote.winner is not None:
            bad.update((leg, [(0, length)]) for leg in vote.failed)
        for leg, ranges in bad.items():
            for start, end in ranges:
                data = vote.winner or await self._winner(offset, start, end)
                if data is not None and not await self._rewrite(
                    leg, offset + start, data[start:end] if vote.winner else data
                ):
                    break
                written += end - start if data is not None else 0
        return written

    def _mark_changed(
        self,
        ranges: list[tuple[int, int]],
        offset: int,
        bad: dict[Leg, list[tuple[int, int]]],
    ) -> None:
        """Legs that do not vote may have any version of what has been settled."""
        for leg in self._quorum.legs:
            if ranges and leg.state is LegState.REBUILDING:
                bad[leg] = ranges
            elif leg.state is not LegState.IN_SYNC:
                for start, end in ranges:
                    leg.mark(offset + start, end - start)

    async def _winner(self, offset: int, start: int, end: int) -> bytes | None:
        return (await self._vote(offset + start, end - start)).winner

    async def _vote(
        self, offset: int, length: int, *, choose: bool = False, legs: list[Leg] | None = None
    ) -> Vote:
        legs = self._in_sync() if legs is None else legs
        answers = await asyncio.gather(
            *(self._read(leg, offset, length) for leg in legs), return_exceptions=True
        )
        vote = Vote(None)
        versions: dict[Leg, bytes] = {}
        for leg, answer in zip(legs, answers, strict=True):
            if isinstance(answer, OSError):
                vote.failed[leg] = answer.errno or errno.EIO
            elif isinstance(answer, BaseException):
                raise answer
            else:
                versions[leg] = answer
        if len(versions) < self._quorum.options.vote_threshold:
            vote.lost.append((0, length))
        elif len(set(versions.values())) == 1:
            vote.winner = next(iter(versions.values()))
        else:
            self._vote_by_block(vote, versions, offset, length, choose=choose)
        return vote

    def _vote_by_block(
        self, vote: Vote, versions: dict[Leg, bytes], offset: int, length: int, *, choose: bool
    ) -> None:
        """Legs that are wrong in different places do not stand in each other's way.

        With `choose` what most legs have counts also if these are too few, or the first leg's.
        """
        whole = bytearray(length)
        start = 0
        while start < length:
            end = min(length, start + BLOCK - (offset + start) % BLOCK)
            camps: dict[bytes, list[Leg]] = {}
            for leg, version in versions.items():
                camps.setdefault(version[start:end], []).append(leg)
            data, voters = max(camps.items(), key=lambda camp: len(camp[1]))
            won = len(voters) >= self._quorum.options.vote_threshold
            whole[start:end] = data
            if not won:
                _append(vote.settled if choose else vote.lost, start, end)
            for leg in versions if won or choose else ():
                if leg not in voters:
                    _append((vote.losers if won else vote.others).setdefault(leg, []), start, end)
            start = end
        if not vote.lost:
            vote.winner = bytes(whole)

    async def _read(self, leg: Leg, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        await self._finish(self._quorum.child_of(leg).read(offset, buffer))
        return bytes(buffer)

    async def _finish(self, io: Awaitable[object]) -> None:
        work = asyncio.ensure_future(_result(io))
        done, _ = await asyncio.wait({work}, timeout=self._patience)
        if not done:
            self._late.add(work)
            raise OSError(errno.ETIMEDOUT, "it took too long")
        work.result()

    async def _rewrite(self, leg: Leg, offset: int, data: bytes) -> bool:
        try:
            await self._finish(self._quorum.child_of(leg).write(offset, data))
        except OSError as error:
            if leg.state is not LegState.IN_SYNC or self._quorum.can_do_without(leg):
                leg.mark(offset, len(data))
                self._quorum.fail_leg(leg, f"rewriting what was wrong: {error.strerror}")
            return False
        return True

    # ---- late writes

    async def deliver(self, late: Sequence[LateWrite]) -> None:
        """Bring writes that a predecessor had acknowledged to the legs that they have not reached.

        There are no guests yet. A leg that cannot be helped is out.
        """
        for start, end in _pieces(late):
            here = [legs for first, last, legs in late if first < end and start < last]
            lacking = functools.reduce(operator.or_, here)
            # Where several overlap they came at the same time, and had no order: whoever has got
            # one of them is as right as those that have got all.
            nothing = functools.reduce(operator.and_, here)
            have = [leg for leg in self._in_sync() if not nothing >> leg.index & 1]
            have.sort(key=lambda leg: lacking >> leg.index & 1)
            await self._deliver(start, end, have, lacking)

    async def _deliver(self, start: int, end: int, have: list[Leg], lacking: int) -> None:
        data = await self._first(have, start, end - start)
        for leg in self._quorum.legs:
            if not lacking >> leg.index & 1:
                continue
            if leg.state is not LegState.IN_SYNC:
                leg.mark(start, end - start)
            elif data is None:
                leg.mark(start, end - start)
                leg.reason = "nobody has what it lacks"
                leg.change(LegState.IN_SYNC, LegState.STALE)
            else:
                try:
                    await self._copy_data(leg, start, data, "a late write")
                except OSError:
                    leg.mark(start, end - start)

    async def _first(self, legs: Iterable[Leg], offset: int, length: int) -> bytes | None:
        """As the first of them has it that can be read."""
        for leg in legs:
            with contextlib.suppress(OSError):
                return await self._read(leg, offset, length)
        return None

    def _in_sync(self) -> list[Leg]:
        return [leg for leg in self._quorum.legs if leg.state is LegState.IN_SYNC]

    # ---- rebuilding

    async def begin(self, leg: Leg) -> None:
        """Step 1."""
        if leg.strays:
            raise OSError(
                errno.EBUSY, f"leg '{leg.node.name}' still has requests that were given up"
            )
        leg.left_alone = False
        async with self._quorum.sizing:
            try:
                await self._quorum.fit(leg)
            except OSError as error:
                self._quorum.fail_leg(leg, f"its size: {error.strerror}")
                raise
            leg.begin_copying()
            leg.settle_flags()
            for state in (LegState.FAILED, LegState.STALE):
                self._quorum.set_state(leg, state, LegState.REBUILDING)
        if leg.state is not LegState.REBUILDING:
            raise OSError(errno.EBUSY, f"leg '{leg.node.name}' is {leg.state.text}")

    async def copy(self, leg: Leg, region: int, count: int) -> int:
        """Step 2 for a run of regions: how many bytes were written."""
        offset = region << leg.region_bits
        length = min(count << leg.region_bits, leg.size - offset)
        quorum = self._quorum
        assert quorum.handle is not None
        async with self.locked(offset, length):
            data = bytearray(length)
            await quorum.engine.submit(quorum.handle, OP_READ, offset, data)
            return await self._copy_data(leg, offset, data, "rebuilding it")

    async def _copy_data(self, leg: Leg, offset: int, data: bytes | bytearray, why: str) -> int:
        child = self._quorum.child_of(leg)
        try:
            there = await self._read(leg, offset, len(data))
        except OSError:
            there = b""  # writing may cure it
        copied = 0
        for start, end in differences(data, there, 1 << leg.region_bits):
            piece = bytes(data[start:end])
            try:
                if piece == bytes(len(piece)):
                    await self._finish(child.write_zeroes(offset + start, len(piece), unmap=True))
                else:
                    await self._finish(child.write(offset + start, piece))
            except OSError as error:
                self._quorum.fail_leg(leg, f"{why}: {error.strerror}")
                raise
            copied += len(piece)
        return copied

    async def confirm(self, leg: Leg, runs: list[tuple[int, int]]) -> None:
        """Step 3 for runs of regions that have been copied."""
        if not runs:
            return
        try:
            await self._finish(self._quorum.child_of(leg).flush())
        except OSError as error:
            # What guests have written meanwhile, and nobody marked, may be gone, too.
            self._quorum.fail_leg(leg, f"rebuilding it, flush: {error.strerror}", whole=True)
            raise
        first, last = runs[0][0] << leg.region_bits, sum(runs[-1])
        # The last bit speaks for what will be there one day, too.
        end = EVERYTHING if last > leg.tail else last << leg.region_bits
        async with self.locked(first, end - first):
            if leg.state is LegState.REBUILDING:
                for region, count in runs:
                    leg.clear(region, count)

    async def end(self, leg: Leg) -> bool:
        """Step 4; False if there is something left to do."""
        async with self.locked(0, EVERYTHING):
            if leg.dirty_bytes:
                return False
            leg.clear_all()
            return self._quorum.set_state(leg, LegState.REBUILDING, LegState.IN_SYNC)

    def give_up(self, leg: Leg) -> None:
        """Nobody goes on with it."""
        self._quorum.set_state(leg, LegState.REBUILDING, LegState.STALE)


def _pieces(late: Sequence[LateWrite]) -> Iterator[tuple[int, int]]:
    """Start and end of what late writes cover, cut wherever one begins or ends."""
    cuts = {at for start, end, _ in late for at in (*range(start, end, PORTION), end)}
    for start, end in itertools.pairwise(sorted(cuts)):
        if any(first < end and start < last for first, last, _ in late):
            yield start, end


async def _result(io: Awaitable[object]) -> None:
    await io


def _append(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a range to those that are before it."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((start, end))


def differences(data: bytes | bytearray, there: bytes, step: int) -> Iterator[tuple[int, int]]:
    """Start and end of what differs, in whole steps, neighbours together."""
    begin: int | None = None
    for at in range(0, len(data), step):
        if data[at : at + step] == there[at : at + step]:
            if begin is not None:
                yield begin, at
            begin = None
        elif begin is None:
            begin = at
    if begin is not None:
        yield begin, len(data)
