# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: the same data on several legs, read by vote.

Writes, flushes and zero writes go to all legs at the same time and succeed if `vote-threshold`
of them do. Discards become zero writes, so that all legs make the same of them. A read asks all
legs and returns the version that at least `vote-threshold` of them agree on; with
`read-pattern=fifo` the first leg that can answers alone.
A leg that misses a change is out, and says so for ever after (legs.py, metadata.py), until
it has been rebuilt (repair.py, vhostblk/jobs/quorum.py). docs/quorum.md tells operators about it.
Engine half: cffi_build/engine/nodes/quorum.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import operator
import os
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from vhostblk.engine import MAX_CHILDREN, OP_FLUSH, OP_NAMES, OP_READ, guest_buffers
from vhostblk.engine.quorum import (
    LEG_WHOLE,
    QUORUM_ALL,
    QUORUM_RETIRED,
    QUORUM_UNEVEN,
    QuorumHandle,
    QuorumSettings,
    new_quorum,
)
from vhostblk.image import Extent, agreed
from vhostblk.nodes.driver import (
    INHERITED,
    Child,
    ChildRole,
    NodeDriver,
    NodeOptions,
    Perm,
    Relations,
)
from vhostblk.nodes.quorum.legs import (
    OUT,
    Leg,
    LegState,
    forgets,
    identity,
    is_same_leg,
    learn,
    recognise,
)
from vhostblk.nodes.quorum.metadata import (
    IN_USE,
    POWER_CUT,
    UNCLEAN,
    WHOLE,
    Claim,
    LateWrite,
    LegRecord,
    Metadata,
    Recorded,
    boot,
    regions_of,
)
from vhostblk.nodes.quorum.repair import PORTION, Repair
from vhostblk.ratelimit import RateLimitedLog
from vhostblk.schema import BlockdevRef, OnOff, Size, UInt32, VhostblkError

logger = logging.getLogger(__name__)

SECTOR = 512
_LOOK = 64 << 20  # bytes of which all legs are asked at once where their data are
MAX_SUSPECTS = 256  # ranges that wait to be looked at; more than these are found the next time
# QAPI's QuorumOpType knows three.
_REPORT_TYPES = ("read", "write", "flush", "write", "write")

WantedLeg = tuple[NodeDriver, int, float, tuple[bytes, int] | None]
"""A leg to be made: node, state word, since when, and its map with region bits if it is known."""
_Identified = tuple[NodeDriver, list[str]]
"""A node, and its identity(); with long chains below, that is worked out once for each change."""


class QuorumOptions(NodeOptions):
    """Options of quorum."""

    children: list[BlockdevRef]
    """The legs, 1 to 32, all of the same size."""
    vote_threshold: UInt32
    """How many legs must agree on a read, or succeed; from 1 to the number of legs."""
    read_pattern: Literal["quorum", "fifo"] = "quorum"
    """Ask all legs and vote, or ask one after the other until one answers."""
    rewrite_corrupted: OnOff = False
    """Write the winner's data to legs that were outvoted."""
    blkverify: OnOff = False
    """Two legs that must be equal: reads fail where they are not."""
    write_threshold: UInt32 = 0
    """How many legs must have a write before the guest is told; 0 means all of them."""
    leg_timeout: UInt32 = 30000
    """Milliseconds after which a leg that does not answer has failed; 0 means never."""
    metadata_file: str | None = None
    """Where it is kept which leg has missed what; see docs/quorum.md for the default."""
    region_size: Size = 65536
    """How finely that is noted; a power of two from 4096 on."""
    spares: list[str] | None = None
    """Nodes that take the place of failed legs by themselves."""
    auto_rebuild: OnOff = True
    """Rebuild legs that are new, or have come back, and compare all after a power cut, unasked."""


class Quorum(NodeDriver):
    """Several legs with the same data."""

    driver = "quorum"
    Options = QuorumOptions
    is_filter = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"children": ChildRole(many=True)}
    reopenable = frozenset(INHERITED) | {
        "vote-threshold",
        "read-pattern",
        "rewrite-corrupted",
        "blkverify",
        "write-threshold",
        "leg-timeout",
        "spares",
        "auto-rebuild",
    }
    options: QuorumOptions
    handle: QuorumHandle | None
    metadata: Metadata | None = None
    _drops_discards = False  # as operators know
    _delivering = False
    _equalizing = False
    _unequal = False

    # ---- life

    async def open(self) -> None:
        self._log = RateLimitedLog(logger)
        self._recording: asyncio.Task[None] | None = None
        self._waiting: list[int] = []  # changes that complete when it is recorded who misses them
        # Ranges to be looked at, and whether a change has failed there.
        self._suspects: dict[tuple[int, int], bool] = {}
        self._looking: asyncio.Task[None] | None = None
        self._votes: set[asyncio.Task[None]] = set()
        self._former: list[Leg] = []
        self._spare: Metadata | None = None
        self._replaced: list[Metadata] = []  # their memory is given back after the pause
        self._holding = False
        self._closing = False
        self._arrival: asyncio.Task[None] | None = None
        self.legs: list[Leg] = []
        self.sizing = asyncio.Lock()
        """Held while legs get another size."""
        self._check(self.options)
        path = self._metadata_path()
        if path is None and not self.read_only:
            logger.warning(
                "quorum '%s': which leg has missed what is forgotten when this process ends; "
                "give it a metadata-file, or the backend --state",
                self.name,
            )
        claim = await asyncio.to_thread(Claim, path) if path is not None else None
        try:
            late = self._begin(claim)
        finally:
            if claim is not None:
                claim.release()
        self.repair = Repair(self)
        try:
            await self._begin_use()
            await self._equalize()
            await self._deliver(late)
            self.handle = new_quorum(
                self.engine,
                self._settings(self.options),
                [leg.handle for leg in self.legs],
                told=self._told,
                upcalls=self._asked,
            )
        except BaseException:
            self._give_up_legs()
            raise
        self._tell_states()
        self._tell_unclean()
        self._tell_discards()
        self._note()

    async def close(self) -> None:
        for task in (self._looking, *self._votes):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        flushed = await self._flush()
        self._closing = True
        while self._recording is not None:
            await asyncio.wait([self._recording])
        while self.handle is not None and self.handle.late:
            await asyncio.sleep(0.005)
        for leg in self.legs:
            await self._until_back(leg)
        if flushed and self.metadata is not None:
            self.metadata.flags &= ~IN_USE
        await super().close()
        self._give_up_legs()

    def _give_up_legs(self) -> None:
        for leg in (*self.legs, *self._former):
            leg.handle.free()
        if self.metadata is not None:
            self.metadata.close()
        self._drop_spare()
        self._close_replaced()
        self.legs, self._former, self.metadata = [], [], None

    async def _until_back(self, leg: Leg) -> None:
        """A request that was given up uses memory, and a node below, until it comes back."""
        told = False
        while leg.strays:
            if not told:
                told = True
                logger.warning(
                    "quorum '%s': waiting for %d requests that leg '%s' still has",
                    self.name,
                    leg.strays,
                    leg.node.name,
                )
            await asyncio.sleep(0.05)

    # ---- the end of the last process

    async def _begin_use(self) -> None:
        """Legs may be changed: a power cut must not leave a file that says they are not."""
        assert self.metadata is not None
        if self.read_only:
            return
        self.metadata.flags |= IN_USE
        try:
            await self.metadata.sync()
        except OSError as error:
            self._log_metadata(error)

    async def _flush(self) -> bool:
        """Whether the legs are equal for whoever comes next, even after a power cut."""
        in_sync = sum(leg.state is LegState.IN_SYNC for leg in self.legs)
        if self.handle is None or self.metadata is None or self.metadata.path is None:
            return False
        if not self.metadata.flags & IN_USE or in_sync < self.options.vote_threshold:
            return False
        try:
            await self.engine.submit(self.handle, OP_FLUSH, 0, None, 0)
        except OSError:
            return False  # it has been told
        return True

    @property
    def unclean(self) -> bool:
        """Legs may differ in what was not flushed when a process, or the host, ended: each version
        is one that a single disk might have kept."""
        return self.metadata is not None and bool(self.metadata.flags & UNCLEAN)

    @property
    def settles(self) -> bool:
        """Whether they are made equal then."""
        may_not = self.read_only or self.options.blkverify
        return self.unclean and not may_not and not any(n.read_only for n in self._leg_nodes())

    def settled(self) -> None:
        """All legs have been compared from end to end."""
        if self.metadata is not None and self.unclean:
            self.metadata.flags &= ~(UNCLEAN | POWER_CUT)
            self.host.reconsider([self])
            logger.info("quorum '%s': the legs are equal again after an unclean end", self.name)

    def _tell_unclean(self) -> None:
        if self.metadata is None or not self.unclean:
            return
        power_cut = bool(self.metadata.flags & POWER_CUT)
        logger.warning(
            "quorum '%s' was not closed%s: legs may differ in what was not flushed",
            self.name,
            " before the host went down" if power_cut else "",
        )
        data = {"node-name": self.name, "power-cut": power_cut}
        self.host.emit("VHOSTBLK_QUORUM_UNCLEAN", data)

    # ---- legs

    def _metadata_path(self) -> str | None:
        if self.options.metadata_file is not None:
            return os.path.abspath(self.options.metadata_file)
        return self.host.side_file(self, "quorum")

    @property
    def _region_bits(self) -> int:
        return self.options.region_size.bit_length() - 1

    def _begin(self, claim: Claim | None) -> list[LateWrite]:
        """The legs as they were left, or, if nobody knows anything, all in sync.

        The writes that some of them had not got yet are for `_deliver()`.
        """
        recorded = None if claim is None else claim.recorded
        flags = 0 if claim is None else claim.flags
        is_whole = claim is not None and claim.is_whole
        nodes = self._leg_nodes()
        records: list[LegRecord | None] = [None] * len(nodes)
        made: list[WantedLeg]
        if recorded is not None:
            records = recognise(nodes, recorded.legs)
        if recorded is None:
            made = [(node, LegState.IN_SYNC.value, 0.0, None) for node in nodes]
            self._make_legs(made, self._size_of(made, flags), 1, flags, old_is_whole=False)
            return []
        if not any(records):
            path = self._metadata_path()
            names = ", ".join(leg.node_name for leg in recorded.legs)
            raise VhostblkError(
                f"'{path}' says which of the legs {names} are in sync, and none of them is among "
                f"the children of quorum '{self.name}': remove it if those are equal",
                data={"code": "quorum-metadata", "path": path, "node": self.name},
            )
        made = []
        since_boot = 0 if recorded.boot == boot() else LEG_WHOLE
        for node, record in zip(nodes, records, strict=True):
            if record is None:
                made.append((node, LegState.STALE.value | LEG_WHOLE, 0.0, None))
                continue
            word = record.word
            if word & 0xFF != LegState.IN_SYNC.value:  # whatever it is
                lost = LEG_WHOLE if forgets(node) else since_boot
                word = LegState.STALE.value | (word & LEG_WHOLE) | lost
            made.append((node, word, record.since, (record.dirty, recorded.region_bits)))
        size = self._size_of(made, flags)
        late = self._still_late(recorded, records, size)
        generation = recorded.generation + 1
        self._make_legs(made, size, generation, flags, old_is_whole=is_whole, late=late)
        return late

    def _size_of(self, wanted: Sequence[WantedLeg], flags: int) -> int:
        """What the legs have, or are going to have (see _equalize()).

        A process may have been killed while they grew: nobody has been told of anything behind
        the end of the shortest that is in sync. One that is out has the size of its last day.
        """
        legs = list(zip(self.children.values(), wanted, strict=True))
        votes = [child for child, (_, word, *_) in legs if word & 0xFF == LegState.IN_SYNC.value]
        new = [child for child, (*_, dirty) in legs if dirty is None and child not in votes]
        if not votes:
            return max(child.size for child, _ in legs)
        if not flags & UNCLEAN:
            self._check_sizes([*votes, *new])
        sizes = [child.size for child in votes]
        return max(sizes) if self._may_write else min(sizes)

    @property
    def _may_write(self) -> bool:
        return not self.read_only and not any(node.read_only for node in self._leg_nodes())

    async def _equalize(self) -> None:
        """Legs of which some were longer than others when the last process was killed."""
        sizes = {leg: self.child_of(leg).size for leg in self.legs if leg.state is LegState.IN_SYNC}
        size = max(sizes.values(), default=0)
        short = [leg for leg in sizes if sizes[leg] < size]
        self._unequal = bool(short)
        if not short or not self._may_write:
            return
        if self.handle is None:
            self._equalizing = True
            self.host.update_permissions(self)
        try:
            await self._truncate(short, size)
        finally:
            self._equalizing = False
        self._unequal = False

    def _still_late(
        self, recorded: Recorded, records: Sequence[LegRecord | None], size: int
    ) -> list[LateWrite]:
        """Late writes with the legs' numbers of now."""
        found = []
        numbers = {id(record): index for index, record in enumerate(records)}
        for start, end, lacking in recorded.late:
            legs = 0
            for index, record in enumerate(recorded.legs):
                if lacking >> index & 1 and id(record) in numbers:
                    legs |= 1 << numbers[id(record)]
            if legs and start < min(end, size):
                found.append((start, min(end, size), legs))
        return found

    async def _deliver(self, late: list[LateWrite]) -> None:
        """Before the first request: whoever has not got a late write gets it from those that have.

        Until all of them have arrived they stay in the metadata, so that a successor goes on if
        we are killed. Nothing is flushed: neither has the guest, and its next flush covers it.
        """
        assert self.metadata is not None
        if not late:
            return
        if not self._may_write:
            self._leave_late(late)
        else:
            self._delivering = True
            self.host.update_permissions(self)
            try:
                await self.repair.deliver(late)
            finally:
                self._delivering = False
        self.metadata.set_lates([])

    def _leave_late(self, late: list[LateWrite]) -> None:
        """Nothing may be written: legs that lack something are out, if they are few enough."""
        missing = functools.reduce(operator.or_, (legs for _, _, legs in late))
        left = sum(
            leg.state is LegState.IN_SYNC and not missing >> leg.index & 1 for leg in self.legs
        )
        if left < self.options.vote_threshold:
            raise VhostblkError(
                f"Quorum '{self.name}' has {len(late)} writes that had not reached all legs when "
                "its last process was killed; it must be opened writable once",
                data={"code": "quorum-late-writes", "node": self.name},
            )
        for start, end, legs in late:
            for leg in self.legs:
                if legs >> leg.index & 1:
                    leg.mark(start, end - start)
                    leg.change(LegState.IN_SYNC, LegState.STALE)

    def _make_legs(
        self,
        wanted: list[WantedLeg],
        size: int,
        generation: int,
        flags: int,
        *,
        old_is_whole: bool,
        late: Sequence[LateWrite] = (),
    ) -> None:
        """Legs and new metadata."""
        known = [(node, identity(node)) for node, *_ in wanted]
        metadata = self._new_metadata(known, size, generation, flags)
        try:
            for index, (_, word, since, dirty) in enumerate(wanted):
                metadata.describe_leg(index, word, generation, since)
                if dirty is not None and dirty[1] == self._region_bits:
                    metadata.set_dirty(index, dirty[0])
                elif dirty is not None and any(dirty[0]):
                    metadata.describe_leg(index, word | LEG_WHOLE, generation, since)
            metadata.set_lates(late)
            metadata.publish(old_is_whole=old_is_whole)
        except BaseException:
            metadata.close(remove=True)
            raise
        self.metadata = metadata
        self.legs = [
            Leg(child.node, role, metadata, index, size, self._region_bits)
            for index, (role, child) in enumerate(self.children.items())
        ]
        for leg in self.legs:
            leg.settle_flags()
            if leg.state in OUT:
                there = self.child_of(leg).size
                leg.mark(there, max(0, size - there))

    def _new_metadata(
        self, nodes: list[_Identified], size: int, generation: int, flags: int
    ) -> Metadata:
        legs = [(node.name, files) for node, files in nodes]
        path, spare = self._metadata_path(), self._spare
        if spare is not None and spare.path == path and spare.is_for(size, legs):
            self._spare = None
            spare.generation, spare.flags = generation, flags
            return spare
        self._drop_spare()
        return Metadata(path, size, self._region_bits, legs, generation, flags)

    async def expect_children(self, children_of: Relations[NodeDriver]) -> None:
        if self.metadata is None:
            return
        nodes, size = list(children_of(self).values()), self.size
        await asyncio.to_thread(self._learn, nodes, children_of)
        legs = [(node.name, identity(node, children_of)) for node in nodes]
        self._drop_spare()
        self._spare = await asyncio.to_thread(self._make_spare, size, legs)

    @staticmethod
    def _learn(nodes: Iterable[NodeDriver], children_of: Relations[NodeDriver]) -> None:
        for node in nodes:
            learn(node, children_of)

    def _make_spare(self, size: int, legs: list[tuple[str, list[str]]]) -> Metadata:
        """Metadata that may be needed in the pause that is about to begin."""
        spare = Metadata(self._metadata_path(), size, self._region_bits, legs, 0)
        spare.touch()
        return spare

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close(remove=True)

    def _leg_nodes(self) -> list[NodeDriver]:
        return [child.node for child in self.children.values()]

    def _adopt(self) -> None:
        """The children are others, or have another size: each keeps the state that it has."""
        nodes = [(node, identity(node)) for node in self._leg_nodes()]
        assert self.metadata is not None
        changes = self._changes()
        known = [*self.legs, *(leg for leg in self._former if leg.apart_at == changes)]
        found = _match(nodes, known)
        self._check_sizes(
            [
                child
                for child, leg in zip(self.children.values(), found, strict=True)
                if leg is None or not (leg.state in OUT or self._unequal)
            ]
        )
        fits = regions_of(self.size, self._region_bits) <= self.metadata.layout.bits
        if [(leg.node, leg.files) for leg in self.legs] == nodes and all(
            fits and leg.size == self.size for leg in self.legs
        ):
            return
        for leg in self.legs:
            if leg not in found and leg.strays:
                raise VhostblkError(
                    f"Leg '{leg.node.name}' of quorum '{self.name}' still has "
                    f"{leg.strays} requests that were given up; it cannot be taken away "
                    "before they come back",
                    data={"code": "leg-busy", "node": leg.node.name},
                )
        self._check_votes(found)
        generation, flags = self.metadata.generation + 1, self.metadata.flags & ~WHOLE
        metadata = self._new_metadata(nodes, self.size, generation, flags)
        try:
            for index, known_leg in enumerate(found):
                if known_leg is None:
                    word = LegState.STALE.value | LEG_WHOLE
                    metadata.describe_leg(index, word, metadata.generation, 0.0)
                else:
                    known_leg.copy_to(metadata, index)
            metadata.publish(old_is_whole=self.metadata.whole)
        except BaseException:
            metadata.close(remove=True)
            raise
        self._take_over(metadata, nodes, found)

    def _take_over(
        self, metadata: Metadata, nodes: list[_Identified], found: list[Leg | None]
    ) -> None:
        old = self.metadata
        assert old is not None
        # A change that fails puts them back.
        for leg in (*self.legs, *self._former):
            if leg not in found and leg not in self._former:
                leg.keep_apart(self._changes())
                self._former.append(leg)
        self._former = [leg for leg in self._former if leg not in found]
        size = self.size
        self.legs = []
        for index, (role, (node, files), known) in enumerate(
            zip(self.children, nodes, found, strict=True)
        ):
            if known is None:
                leg = Leg(node, role, metadata, index, size, self._region_bits)
                leg.reason = "it is new"
            else:
                leg = known
                leg.node, leg.role, leg.files = node, role, files
                leg.set_forgets(forgets(node))
                leg.moved(metadata, index, size)
            self.legs.append(leg)
            leg.handle.recorded = False
            leg.settle_flags()
        self.metadata = metadata
        self._replaced.append(old)
        self.engine.loop.call_soon(self._tell_states)
        self.engine.loop.call_soon(self._note)

    def _changes(self) -> int:
        """How often data may have been changed so far."""
        stats = self.stats()
        return stats.write.ops + stats.discard.ops + stats.write_zeroes.ops

    def _check_votes(self, found: list[Leg | None]) -> None:
        """Whatever leaves, enough legs that know everything must stay."""
        before = sum(leg.state is LegState.IN_SYNC for leg in self.legs)
        after = sum(leg is not None and leg.state is LegState.IN_SYNC for leg in found)
        needed = self.options.vote_threshold
        if after < needed and after < before:
            raise self._error(
                f"quorum '{self.name}' would have {after} legs that are in sync, and needs "
                f"{needed} (vote-threshold)",
                "children",
            )

    def drain_begin(self) -> None:
        # Writes that guests believe to be complete are still on their way to slow legs.
        if self.handle is None:
            return
        self._holding = True
        self.handle.hold_early(True)
        if self.handle.late:
            cookie, _ = self.engine.expect_done(self.handle.address)
            self._arrival = self.engine.loop.create_task(self._until_arrived(cookie))

    async def _until_arrived(self, cookie: int) -> None:
        """The graph waits for what is under way on this node: that ends when nothing is late."""
        while self.handle is not None and self.handle.late:
            await asyncio.sleep(0.005)
        self.engine.forget_done(cookie)

    def drain_end(self) -> None:
        if self._holding and self.handle is not None:
            self.handle.hold_early(False)
        self._holding = False
        # Whatever change there was has succeeded, or is undone.
        gone = [leg for leg in self._former if leg.strays == 0]
        self._former = [leg for leg in self._former if leg not in gone]
        for leg in gone:
            leg.handle.free()
        self._drop_spare()
        self._close_replaced()
        self._tell_discards()

    def _close_replaced(self) -> None:
        while self._replaced:
            self._replaced.pop().close()

    # ---- what it is

    @property
    def size(self) -> int:
        """What all legs have that are in sync: while they grow, one is longer before others."""
        if self.handle is None:
            return super().size
        sizes = [
            self.children[leg.role].size
            for leg in self.legs
            if leg.state is LegState.IN_SYNC and leg.role in self.children
        ]
        return min(sizes, default=self.legs[0].size)

    @property
    def read_only(self) -> bool:
        return bool(self.options.read_only)

    @property
    def discard_granularity(self) -> int | None:
        # Legs that are out count, too: they get everything as soon as they are rebuilt.
        found = [child.node.discard_granularity for child in self.children.values()]
        able = [granularity for granularity in found if granularity is not None]
        return max(able) if len(able) == len(found) else None

    def _tell_discards(self) -> None:
        """Somebody may wonder where the space remains."""
        drops = self.handle is not None and self.discard_granularity is None
        if drops == self._drops_discards:
            return
        self._drops_discards = drops
        nodes = self._leg_nodes()
        unable = [node.name for node in nodes if node.discard_granularity is None]
        if drops:
            logger.log(
                # Where no leg can, as by default, nobody has asked for it.
                logging.INFO if len(unable) == len(nodes) else logging.WARNING,
                "quorum '%s': discards return no space: %s would have to write zeroes",
                self.name,
                ", ".join(f"'{name}'" for name in unable),
            )

    @property
    def keeps_zeroes(self) -> bool:
        return True

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """As the first leg that is in sync has it, but zeroes only where none of them has data.

        A leg that is out has holes where it has missed something.
        """
        end = offset + length
        while offset < end:
            stop = min(end, offset + _LOOK)
            copies = await self._extents_of_legs(offset, stop - offset)
            for extent in agreed(copies):
                yield extent
            offset = stop

    async def _extents_of_legs(self, offset: int, length: int) -> list[list[Extent]]:
        found = []
        for leg in self.legs:
            if leg.state is LegState.IN_SYNC:
                try:
                    found.append([e async for e in leg.node.extents(offset, length)])
                except OSError:
                    found.append([Extent(offset, length)])  # that it has data harms nobody
        return found or [[Extent(offset, length)]]

    def describe(self) -> dict[str, Any]:
        return {"legs": self.describe_legs()}

    def describe_legs(self) -> list[dict[str, Any]]:
        """Each leg as operators see it."""
        found = []
        for leg, role in zip(self.legs, self.children, strict=False):
            entry: dict[str, Any] = {
                "child": role,
                "node-name": leg.node.name,
                "state": leg.state.text,
                "missed-bytes": leg.dirty_bytes,
            }
            granularity = leg.node.discard_granularity
            if granularity is not None:
                entry["discard-granularity"] = granularity
            if leg.reason is not None and leg.state is not LegState.IN_SYNC:
                entry["reason"] = leg.reason
            found.append(entry)
        return found

    def state_options(self) -> dict[str, Any]:
        options = super().state_options()
        if self.options.metadata_file is not None:
            options["metadata-file"] = os.path.abspath(self.options.metadata_file)
        return options

    def leg(self, name: str) -> Leg:
        """The leg with this node, or in this role."""
        for leg, role in zip(self.legs, self.children, strict=False):
            if name in (leg.node.name, role):
                return leg
        names = ", ".join(leg.node.name for leg in self.legs)
        raise VhostblkError(
            f"Quorum '{self.name}' has no leg '{name}'; its legs: {names}",
            data={"code": "no-such-child", "node": self.name, "child": name},
        )

    def child_of(self, leg: Leg) -> Child:
        """For I/O on one leg alone."""
        return list(self.children.values())[leg.index]

    def free_role(self) -> str:
        """For one more leg."""
        used = [int(role.partition(".")[2]) for role in self.children]
        return f"children.{max(used, default=-1) + 1}"

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = super().child_permissions(role, perm, shared)
        if self._delivering:
            perm |= Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        if self._equalizing:
            perm |= Perm.RESIZE
        if perm and (self._rewrites or self.settles):
            perm |= Perm.WRITE_UNCHANGED
        return perm, shared

    @property
    def _rewrites(self) -> bool:
        return self.options.rewrite_corrupted and not self.read_only

    # ---- options, now and later

    def _check(self, options: QuorumOptions) -> None:
        legs = list(self.children.values())
        if not 1 <= len(legs) <= MAX_CHILDREN:
            raise self._error(
                f"Number of provided children must be from 1 to {MAX_CHILDREN}", "children"
            )
        self._check_thresholds(options, len(legs))
        if options.blkverify and (len(legs), options.vote_threshold) != (2, 2):
            raise self._error(
                "blkverify=on can only be set if there are exactly two files and vote-threshold "
                "is 2",
                "blkverify",
            )
        if options.blkverify and options.rewrite_corrupted:
            raise self._error(
                "rewrite-corrupted=on cannot be used with blkverify=on", "rewrite-corrupted"
            )
        size = options.region_size
        if size & (size - 1) or not 4096 <= size <= 1 << 30:
            raise self._error(
                f"'region-size' must be a power of two from 4096 to 1 GiB, and not {size}",
                "region-size",
            )

    def _check_sizes(self, legs: Sequence[Child]) -> None:
        for leg in legs:
            if leg.size != legs[0].size:
                raise self._error(
                    f"the legs of quorum '{self.name}' differ in size: '{legs[0].node.name}' has "
                    f"{legs[0].size} bytes, '{leg.node.name}' has {leg.size}",
                    "children",
                )

    def _check_thresholds(self, options: QuorumOptions, legs: int) -> None:
        if options.vote_threshold < 1:
            raise self._error("Parameter 'vote-threshold' expects a value >= 1", "vote-threshold")
        if options.vote_threshold > legs:
            raise self._error(
                f"threshold may not exceed children count: quorum '{self.name}' has {legs} "
                f"children and vote-threshold is {options.vote_threshold}",
                "vote-threshold",
            )
        early = options.write_threshold
        if early and not options.vote_threshold <= early <= legs:
            raise self._error(
                f"'write-threshold' must be 0, or from vote-threshold ({options.vote_threshold}) "
                f"to the number of legs ({legs}), and not {early}",
                "write-threshold",
            )

    def _settings(self, options: QuorumOptions) -> QuorumSettings:
        assert self.metadata is not None
        return QuorumSettings(
            threshold=options.vote_threshold,
            write_threshold=options.write_threshold,
            timeout_ns=options.leg_timeout * 1_000_000,
            fifo=options.read_pattern == "fifo",
            lates=self.metadata.lates,
            discard_unit=self.discard_granularity or 0,
            size=self.legs[0].size,
        )

    def children_changed(self) -> None:
        self._check(self.options)
        if self.handle is not None:
            self._adopt()
            self._set()

    def resized(self) -> None:
        self.children_changed()

    def _set(self) -> None:
        assert self.handle is not None
        self.handle.set(self._settings(self.options), [leg.handle for leg in self.legs])

    async def reopen_commit(self) -> None:
        await super().reopen_commit()
        self.children_changed()

    async def begin_writing(self) -> None:
        await super().begin_writing()
        if self.metadata is not None and not self.metadata.flags & IN_USE:
            await self._begin_use()
            await self._equalize()
            self._tell_unclean()

    async def reopen_abort(self) -> None:
        await super().reopen_abort()
        if self.handle is not None:
            self._set()

    # ---- size

    async def truncate(self, size: int) -> None:
        """An image above may want more while requests are in flight (ChildStorage.ensure()).

        So no maps are moved: what is behind them has their last bit.
        """
        async with self.sizing:
            legs = [leg for leg in self.legs if leg.state not in OUT]
            await self._truncate(legs, size)

    async def _truncate(self, legs: list[Leg], size: int) -> None:
        """Like all else that legs are asked for: those that fail are out if enough others do it."""
        before: dict[Leg, int] = {}
        errors: dict[Leg, VhostblkError] = {}
        for leg in legs:
            before[leg] = self.child_of(leg).size
            try:
                await self._truncate_leg(leg, size, without=errors)
            except VhostblkError as error:
                errors[leg] = error
        done = [leg for leg in legs if leg not in errors]
        if errors and not self.can_do_without(*errors):
            for leg in done:
                await self._truncate_back(leg, before[leg], lost=before[leg] - size)
            raise next(iter(errors.values()))
        reached = min((self.child_of(leg).size for leg in done), default=size)
        for leg in self.legs:
            leg.resize(reached, has_it=leg.state is LegState.IN_SYNC or leg in done)
        for leg, failure in errors.items():
            leg.mark(before[leg], max(0, reached - before[leg]))
            self.fail_leg(leg, failure.desc)

    async def _truncate_back(self, leg: Leg, size: int, lost: int) -> None:
        with contextlib.suppress(VhostblkError):
            await self._truncate_leg(leg, size)
        if lost > 0 and self.can_do_without(leg):
            leg.mark(size - lost, lost)
            self.fail_leg(leg, "a part of it was cut off")

    def can_do_without(self, *legs: Leg) -> bool:
        """Whether enough others are in sync."""
        left = sum(leg.state is LegState.IN_SYNC and leg not in legs for leg in self.legs)
        return left >= self.options.vote_threshold

    async def _truncate_leg(self, leg: Leg, size: int, without: Iterable[Leg] = ()) -> None:
        """One that hangs is given up, as the engine does with requests."""
        child, patience = self.child_of(leg), None
        if self.can_do_without(leg, *without):
            patience = self.options.leg_timeout / 1000 or None
        leg.truncation = asyncio.ensure_future(_after(leg.truncation, child.node.truncate(size)))
        leg.truncation.add_done_callback(lambda work: work.cancelled() or work.exception())
        done, _ = await asyncio.wait({leg.truncation}, timeout=patience)
        if not done:
            raise VhostblkError("its size has taken too long", data={"code": "leg-busy"})
        leg.truncation.result()
        child.refresh_all()

    async def fit(self, leg: Leg) -> None:
        """A leg that was out while the others got another size gets it, too."""
        child = self.child_of(leg)
        child.refresh_all()
        if child.size == leg.size:
            return
        try:
            await self._truncate_leg(leg, leg.size)
        except VhostblkError as error:
            raise OSError(errno.EFBIG, error.desc) from error
        if child.size != leg.size:
            raise OSError(errno.EFBIG, f"it has {child.size} bytes, and not {leg.size}")

    # ---- what the engine tells

    def _told(self, what: int, ret: int, op: int, offset: int, length: int) -> None:
        if what == QUORUM_ALL:
            self.report_failure(op, ret, offset, length)
        elif what == QUORUM_UNEVEN:
            self._suspect(offset, length, uneven=True)
        elif what & QUORUM_RETIRED:
            self._retired(what & ~QUORUM_RETIRED, f"{OP_NAMES[op]}: {os.strerror(-ret)}")
        elif what >= len(self.legs):
            return  # taken away meanwhile
        elif ret < 0:
            self.report_bad(self.legs[what], op, ret, offset, length)
        else:
            self._suspect(offset, length)

    def _asked(
        self, handle: int, op: int, flags: int, offset: int, length: int, iov: int, niov: int
    ) -> None:
        """A read without a majority, or a change that a leg has missed."""
        if op != OP_READ:
            self._waiting.append(handle)
            self._note()
            return
        task = self.engine.loop.create_task(self._vote(handle, offset, length, iov, niov))
        self._votes.add(task)
        task.add_done_callback(self._votes.discard)

    async def _vote(self, handle: int, offset: int, length: int, iov: int, niov: int) -> None:
        """Ask once more, while nobody writes there."""
        ret = -errno.EIO
        try:
            vote = await self.repair.vote(offset, length)
            if vote.winner is None and self._is_uneven(offset, length):
                await self._even(offset, length)
                vote = await self.repair.vote(offset, length)
            if vote.winner is not None:
                _fill(iov, niov, vote.winner)
                ret = 0
                if vote.differ:
                    self._suspect(offset, length)
            else:
                self.report_failure(OP_READ, ret, offset, length)
        except Exception as error:
            logger.error("quorum '%s': %s: %s", self.name, type(error).__name__, error)
        finally:
            self.engine.complete(handle, ret)
        async with self.repair.step():
            pass  # no change of the graph while a leg still has our request

    # ---- legs that are out

    def _retired(self, index: int, reason: str) -> None:
        if index < len(self.legs):
            leg = self.legs[index]
            leg.reason = reason
            logger.error(
                "quorum '%s': leg '%s' has failed and is out until it is rebuilt: %s",
                self.name,
                leg.node.name,
                reason,
            )
            self._tell_state(leg)
        self._note()

    def fail_leg(self, leg: Leg, reason: str, *, whole: bool = False) -> None:
        """It did not take something, which has been marked; with `whole` it may lack anything."""
        leg.handle.recorded = False
        if leg.fail(whole=whole):
            self._retired(leg.index, reason)
        else:
            self._note()

    def set_state(self, leg: Leg, old: LegState, new: LegState) -> bool:
        """What a job decides; False if the engine was faster."""
        if not leg.change(old, new):
            return False
        self._tell_state(leg)
        if new is LegState.IN_SYNC:
            leg.reason = None
        leg.metadata.changed(leg.index, leg.metadata.generation)
        return True

    def _tell_states(self) -> None:
        self._note()
        for leg in self.legs:
            self._tell_state(leg)

    def _tell_state(self, leg: Leg) -> None:
        state = leg.state
        if state is leg.told:
            return
        leg.told = state
        data = {"node-name": self.name, "leg": leg.node.name, "state": state.text}
        if leg.reason is not None and state is not LegState.IN_SYNC:
            data["reason"] = leg.reason
        self.host.emit("VHOSTBLK_QUORUM_LEG", data)

    def _note(self) -> None:
        """Bring to the disk who is out; what waits for that then completes."""
        if self._recording is None and self._must_record():
            self._recording = self.engine.loop.create_task(self._record())

    def _must_record(self) -> bool:
        whole = self.metadata is None or self.metadata.whole
        return bool(self._waiting or self._unrecorded()) or not whole

    def _unrecorded(self) -> list[Leg]:
        return [leg for leg in self.legs if leg.state in OUT and not leg.handle.recorded]

    async def _record(self) -> None:
        try:
            while self._must_record():
                legs, waiting = self._unrecorded(), self._waiting
                self._waiting = []
                metadata, ret = self.metadata, 0
                if metadata is not None and (legs or not metadata.whole):
                    try:
                        await metadata.sync()
                    except OSError as error:
                        # Whoever is told that its data are safe must be able to rely on it.
                        self._log_metadata(error)
                        ret = -errno.EIO
                if metadata is not self.metadata:  # another one has taken its place meanwhile
                    self._waiting = waiting + self._waiting
                    continue
                if ret == 0:
                    for leg in legs:
                        leg.handle.recorded = True
                for handle in waiting:
                    self.engine.complete(handle, ret)
                if ret and self._closing:
                    break
                if ret:
                    await asyncio.sleep(0.2)
        finally:
            self._recording = None

    def _log_metadata(self, error: OSError) -> None:
        self._log.log(
            logging.ERROR,
            "quorum '%s': '%s' cannot be written: %s; changes fail as long as a leg is out",
            self.name,
            self._metadata_path(),
            error.strerror or error,
        )

    # ---- what the legs do wrong

    def _suspect(self, offset: int, length: int, *, uneven: bool = False) -> None:
        """A leg was outvoted, perhaps only because a write was on its way. Look again, in peace.

        Or (`uneven`) too few legs have done what was asked of all.
        """
        if len(self._suspects) >= MAX_SUSPECTS:
            return
        uneven |= self._suspects.get((offset, length), False)
        self._suspects[offset, length] = uneven
        if self._looking is None or self._looking.done():
            self._looking = self.engine.loop.create_task(self._look())

    async def _look(self) -> None:
        while self._suspects:
            offset, length = next(iter(self._suspects))
            try:
                async with self.repair.step():
                    if offset + length > self.size:
                        pass  # it is shorter now
                    elif self._suspects[offset, length]:
                        await self._even(offset, length)
                    else:
                        rewrite = self._rewrites or self.settles
                        await self.repair.compare(offset, length, rewrite=rewrite)
            except (OSError, VhostblkError) as error:
                logger.warning(
                    "quorum '%s': %d bytes at %d were not compared: %s",
                    self.name,
                    length,
                    offset,
                    error,
                )
            self._suspects.pop((offset, length), None)

    def _is_uneven(self, offset: int, length: int) -> bool:
        """Whether legs may differ there, and none is wrong, since a change has failed."""
        end = offset + length
        return any(
            uneven and start < end and offset < start + size
            for (start, size), uneven in self._suspects.items()
        )

    async def _even(self, offset: int, length: int) -> None:
        """The guest has been told that it failed; but it may read there, or a leg be rebuilt."""
        if not self._may_write or self.options.blkverify:
            return
        for at in range(offset, offset + length, PORTION):
            await self.repair.even(at, min(PORTION, offset + length - at))

    def report_bad(self, leg: Leg, op: int, ret: int, offset: int, length: int) -> None:
        """A leg gave an error, or (ret 0) was outvoted."""
        reason = os.strerror(-ret) if ret < 0 else "it was outvoted"
        self._log.log(
            logging.WARNING,
            "quorum '%s': bad leg '%s', %s of %d bytes at %d: %s",
            self.name,
            leg.node.name,
            OP_NAMES[op],
            length,
            offset,
            reason,
        )
        error = {"error": reason} if ret < 0 else {}
        report = {"type": _REPORT_TYPES[op], **error, "node-name": leg.node.name}
        self.host.emit("QUORUM_REPORT_BAD", {**report, **_sectors(offset, length)})

    def report_failure(self, op: int, ret: int, offset: int, length: int) -> None:
        """A request has failed as a whole."""
        self._log.log(
            logging.ERROR,
            "quorum '%s': %s of %d bytes at %d failed: %s",
            self.name,
            OP_NAMES[op],
            length,
            offset,
            os.strerror(-ret),
        )
        self.host.emit("QUORUM_FAILURE", {"reference": self.name, **_sectors(offset, length)})

    def report_settled(self, offset: int, length: int) -> None:
        """No version had a majority, and none was wrong."""
        self._log.log(
            logging.WARNING,
            "quorum '%s': the legs differed in %d bytes at %d after an unclean end; "
            "one version counts now",
            self.name,
            length,
            offset,
        )

    def _error(self, text: str, parameter: str) -> VhostblkError:
        return VhostblkError(text, data={"code": "bad-quorum", "parameter": parameter})


async def _after(before: asyncio.Future[None] | None, work: Awaitable[None]) -> None:
    if before is not None:
        await asyncio.wait({before})
    await work


def _sectors(offset: int, length: int) -> dict[str, int]:
    return {
        "sector-num": offset // SECTOR,
        "sectors-count": -(-(offset % SECTOR + length) // SECTOR),
    }


def _match(nodes: list[_Identified], known: list[Leg]) -> list[Leg | None]:
    """Which leg each node is: itself first, then what an overlay or a filter was put on."""
    found: list[Leg | None] = [None] * len(nodes)
    left = list(known)
    for same in (lambda leg, node, _: leg.node is node, is_same_leg):
        for index, (node, files) in enumerate(nodes):
            for leg in left if found[index] is None else ():
                if same(leg, node, files):
                    found[index] = leg
                    left.remove(leg)
                    break
    return found


def _fill(iov: int, niov: int, data: bytes) -> None:
    """Give a guest what it has read."""
    at = 0
    for part in guest_buffers(iov, niov):
        with memoryview(part) as view:
            view[:] = data[at : at + len(view)]
            at += len(view)
