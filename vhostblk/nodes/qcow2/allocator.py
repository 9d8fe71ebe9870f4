# SPDX-License-Identifier: GPL-2.0-or-later
"""Where new clusters come from, and when old ones may be used again.

Reference counts (refcounts.py) say what is free. From them come

* single clusters, for copies and tables;
* *runs*, which the engine takes clusters from by itself when a guest writes to
  what is not allocated. A run reads as zeroes, because the engine writes only
  what the guest gave.

A cluster that an L2 entry does not name any more is not free yet. First the
entry's change must be on disk, or a crash would bring back an entry that names
somebody else's data; then every request that found the old entry must have
ended, or its write would land there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Iterable
from typing import Any, Protocol

from vhostblk.engine.map import MapHandle
from vhostblk.nodes.qcow2.geometry import Geometry
from vhostblk.nodes.qcow2.refcounts import InconsistentCounts, Refcounts
from vhostblk.nodes.qcow2.storage import ChildStorage, background

logger = logging.getLogger(__name__)

# A run should last this long, in seconds: a guest that writes fast must not wait for Python, which
# may have other things to do; and what is given to a slow one and not used is lost in a crash.
RUN_LASTS = 0.1
MIN_RUN = 1 << 20
MAX_RUN = 64 << 20
MAX_RUN_OF_DEVICE = 16 << 20  # space is limited there, and zeroes have to be written
MAX_RUN_OF_DISK = 8  # no more than the disk divided by this: a small one is not to get a long file
# With subclusters a write takes place in a run for more than itself, and leaves a hole in the file.
SPARSE = 4
FIRST_RUN = 4  # times MIN_RUN: for an overlay, where all that is written is new


class Owner(Protocol):
    """The live image."""

    def grace(self) -> Awaitable[None]:
        """Done when all requests that have begun by now have ended."""

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""

    async def check_new(self, host: int, length: int) -> None:
        """Raise if metadata are there: the reference counts are wrong."""

    def missing_tables(self) -> int:
        """How many L2 tables what is in memory may need at the next flush."""

    async def settle_header(self) -> None:
        """The disk has the header that is in force: what another one named may be used."""

    def corrupt(self, text: str, *, fatal: bool = False) -> OSError:
        """The image is broken: nothing is written from now on."""


class Allocator:
    """Clusters of one image that is open for writing."""

    def __init__(
        self,
        geometry: Geometry,
        refcounts: Refcounts,
        file: ChildStorage,
        handle: MapHandle,
        owner: Owner,
    ) -> None:
        self._geometry = geometry
        self.refcounts = refcounts
        self._file = file
        self._handle = handle
        self._owner = owner
        self._lock = asyncio.Lock()
        self._scale = SPARSE if geometry.extended else 1
        self._run = self._scale * MIN_RUN
        self._given_at = 0.0
        self._tables: list[int] = []  # reserved, for L2 tables
        # Everything from here on reads as zeroes, unless somebody has written to it since.
        self._virgin = file.size
        self._wanted: asyncio.Task[bool] | None = None
        self._freeing: set[asyncio.Task[None]] = set()
        self.freed: list[tuple[int, int, bool]] = []
        """Host offset, clusters, discard: not named by an L2 entry in memory any more."""

    @property
    def most(self) -> int:
        """Clusters that can be had in one piece even if they need new refcount blocks."""
        return max(self.refcounts.per_block // 2, 1)

    def adopt(self, refcounts: Refcounts) -> None:
        """Others have changed the image and its counts, and may have written anywhere."""
        self.refcounts = refcounts
        self._virgin = max(self._virgin, self._file.size)

    # ---- taking

    async def reserve(self, count: int, *, zeroed: bool = False) -> int:
        """`count` clusters in one piece; the offset of the first. They count as used."""
        async with self._lock:
            await self._owner.settle_header()
            await self._free_unused()
            host = await self.refcounts.reserve(count)
            await self._prepare(host, count, zeroed)
        return host

    async def _prepare(self, host: int, count: int, zeroed: bool) -> None:
        """Make clusters that have just been reserved usable."""
        length = count << self._geometry.cluster_bits
        end = host + length
        try:
            await self._owner.check_new(host, length)
            await self._file.ensure(end)
            if zeroed:
                await self._zero(host, end)
        except BaseException:
            await self.refcounts.free(host, count)
            raise
        self._virgin = max(self._virgin, end)

    async def reserve_some(self, most: int, *, zeroed: bool = False) -> tuple[int, int]:
        """Up to `most` clusters in one piece: offset, count.

        Gaps come first, however small: a disk that is discarded and written again must not
        make its file longer and longer.
        """
        async with self._lock:
            await self._owner.settle_header()
            await self._free_unused()
            host, count = await self.refcounts.reserve_some(min(most, self.most))
            await self._prepare(host, count, zeroed)
        return host, count

    async def _free_unused(self) -> None:
        """What the engine has taken for writes that failed."""
        await self.free_pieces(self._handle.unused())

    async def _reserve_any(self, most: int) -> tuple[int, int]:
        """The same, also of what the engine has in advance if nothing else is left."""
        try:
            return await self.reserve_some(most)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            host, count = self._handle.take(most)
            if not count:
                raise
            return host, count

    async def reserve_pieces(self, count: int) -> list[tuple[int, int]]:
        """`count` clusters in as few pieces as there are: offset and clusters of each."""
        pieces: list[tuple[int, int]] = []
        try:
            while count > 0:
                pieces.append(await self._reserve_any(count))
                count -= pieces[-1][1]
        except BaseException:
            await self.free_pieces(pieces)
            raise
        return pieces

    async def free_pieces(self, pieces: Iterable[tuple[int, int]]) -> None:
        """Give back clusters that no entry has ever named."""
        for host, count in pieces:
            await self.refcounts.free(host, count)

    async def _zero(self, start: int, end: int) -> None:
        known = min(max(start, self._virgin), end)
        if known > start:
            await self._file.write_zeroes(start, known - start)

    async def give_run(self) -> bool:
        """Give the engine clusters; whether it took them."""
        bits = self._geometry.cluster_bits
        # Without a place for its L2 table a write must not be accepted: its flush would fail.
        missing = self._owner.missing_tables() - len(self._tables)
        if missing > 0:
            for host, clusters in await self.reserve_pieces(missing):
                self._tables += range(host, host + (clusters << bits), 1 << bits)
        count = min(max(self._run >> bits, 4), self.most)
        while True:
            try:
                host, count = await self.reserve_some(count, zeroed=True)
                break
            except OSError as error:
                if error.errno != errno.ENOSPC or count == 1:
                    raise
                count //= 2
        self._learn_from_pace()
        if self._handle.give(host, count << bits):
            return True
        await self.refcounts.free(host, count)
        return False

    def _learn_from_pace(self) -> None:
        """The next run is larger if this one did not last, and smaller if it did for long."""
        now = time.monotonic()
        lasted, self._given_at = now - self._given_at, now
        if lasted < RUN_LASTS:
            self._set_run(2 * self._run)
        elif lasted > 10 * RUN_LASTS:
            self._set_run(self._run // 2)

    def _set_run(self, wanted: int) -> None:
        """As long as that, within bounds."""
        most = self._scale * MAX_RUN if self._file.grows else MAX_RUN_OF_DEVICE
        most = min(most, self._scale * self._owner.size // MAX_RUN_OF_DISK)
        self._run = max(min(wanted, most), self._scale * MIN_RUN)

    def expect_guest_of(self, other: Allocator | None) -> None:
        """The guest that writes there will write here, not more slowly."""
        pace = 0 if other is None else other._run // other._scale
        self._set_run(self._scale * max(pace, FIRST_RUN * MIN_RUN))

    def run_is_low(self) -> None:
        """The engine asks for more."""
        self._refill()

    def _refill(self) -> asyncio.Task[bool]:
        if self._wanted is None:
            self._wanted = background(self.give_run())
            self._wanted.add_done_callback(self._refilled)
        return self._wanted

    def _refilled(self, task: asyncio.Task[bool]) -> None:
        self._wanted = None
        if not task.cancelled() and task.exception() is not None:
            # The next write that finds no cluster comes up and gets the error.
            logger.debug("no clusters in advance: %s", task.exception())

    async def more_runs(self) -> bool:
        """A request found no cluster: it may look again afterwards. False if there were some."""
        return await asyncio.shield(self._refill())

    async def reserve_table(self) -> int:
        """A cluster for an L2 table."""
        if self._tables:
            return self._tables.pop()
        [(host, _)] = await self.reserve_pieces(1)
        return host

    # ---- giving back

    def free_later(self, host: int, clusters: int, *, discard: bool) -> None:
        """No L2 entry in memory names these clusters any more."""
        self.freed.append((host, clusters, discard))

    def free_after_grace(self, freed: list[tuple[int, int, bool]]) -> None:
        """Nor does any on disk: free once the requests of now have ended."""
        if freed:
            task = background(self._free(freed))
            self._freeing.add(task)
            task.add_done_callback(self._freeing.discard)

    async def _free(self, freed: list[tuple[int, int, bool]]) -> None:
        try:
            await self._owner.grace()
            bits = self._geometry.cluster_bits
            for host, clusters, discard in freed:
                async with self._lock:
                    gone = await self.refcounts.free(host, clusters)
                    if discard and gone:
                        await self._discard(host, clusters << bits)
        except InconsistentCounts as error:
            self._owner.corrupt(str(error.strerror), fatal=True)
        except OSError as error:
            # They stay in use for nobody: space is lost, no data.
            logger.warning("clusters could not be freed: %s", error)

    async def _discard(self, host: int, length: int) -> None:
        try:
            await self._file.child.discard(host, length)
        except OSError as error:
            # It takes space still; but others have to be freed.
            logger.debug("what is free could not be discarded: %s", error)

    async def settle(self) -> None:
        """Wait for what goes on by itself."""
        while self._freeing or self._wanted is not None:
            tasks: list[asyncio.Task[Any]] = list(self._freeing)
            if self._wanted is not None:
                tasks.append(self._wanted)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def write_counts(self) -> None:
        """Put the reference counts on disk (without a barrier)."""
        async with self._lock:
            await self.refcounts.write_dirty()

    async def take_back(self) -> list[tuple[int, int]]:
        """Free what the engine has not used of its runs: offset, bytes. Nothing is in flight."""
        bits = self._geometry.cluster_bits
        await self._free_unused()
        unused = [(host, length) for host, length in self._handle.reclaim() if length]
        unused += [(host, 1 << bits) for host in self._tables]
        self._tables.clear()
        for host, length in unused:
            await self.refcounts.free(host, length >> bits)
        return unused
