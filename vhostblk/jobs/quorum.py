# SPDX-License-Identifier: GPL-2.0-or-later
"""Background work on a quorum: rebuilding a leg, looking for silent corruption, hot spares.

    quorum-rebuild   brings a leg that has missed something up to date
    quorum-scrub     compares all legs, and makes those that are wrong right

Both go on after a restart: a rebuild where the leg's dirty map says, a scrub from the beginning of
the part that it was in. What begins without being asked for begins here, too (`attend()`).
What is read and written is in vhostblk/nodes/quorum/repair.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vhostblk.engine import MAX_CHILDREN, OP_FLUSH
from vhostblk.events import Event
from vhostblk.jobs.block_job import BlockJob
from vhostblk.jobs.job import JobStatus
from vhostblk.jobs.restart import restartable
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.backend import Backend
    from vhostblk.graph import Graph
    from vhostblk.nodes.driver import NodeDriver
    from vhostblk.nodes.quorum import Quorum
    from vhostblk.nodes.quorum.legs import Leg

logger = logging.getLogger(__name__)

_OVER = (JobStatus.ABORTING, JobStatus.CONCLUDED, JobStatus.NULL)
_SPARE_PATIENCE = 5.0  # seconds between looks at a leg that hangs
_HANGS = ("leg-busy", "pause-timeout")  # codes of errors that mean one
_REBUILD_PATIENCE = 5.0  # seconds before a rebuild for which others could not be read is repeated
_MOST_PATIENCE = 300.0  # what that grows to, doubling


def find_quorum(backend: Backend, name: str) -> Quorum:
    """The quorum called `name`."""
    from vhostblk.nodes.quorum import Quorum

    node = backend.graph.node(name)
    if not isinstance(node, Quorum):
        raise VhostblkError(
            f"Node '{name}' is a '{node.driver}' and no quorum",
            data={"code": "no-quorum", "node": name},
        )
    return node


def out_of_reach(graph: Graph, top: NodeDriver) -> dict[NodeDriver, str]:
    """Nodes below `top` that do not get what is written to it, because a leg is out; and why."""
    from vhostblk.nodes.quorum import Quorum
    from vhostblk.nodes.quorum.legs import LegState

    found: dict[NodeDriver, str] = {}
    for quorum in graph.below(top):
        for leg in quorum.legs if isinstance(quorum, Quorum) else ():
            if leg.state in (LegState.FAILED, LegState.STALE):
                why = f"leg '{leg.node.name}' of quorum '{quorum.name}' is {leg.state.text}"
                found.update(dict.fromkeys(graph.below(leg.node), why))
    return found


class QuorumJob(BlockJob):
    """A job on one quorum, which it keeps from being removed."""

    def __init__(self, id: str, backend: Backend, quorum: Quorum, **options: Any) -> None:
        super().__init__(id, **options)
        self._backend = backend
        self.quorum = quorum


class RebuildJob(QuorumJob):
    """Copies to a leg what it has missed, if it differs there."""

    job_type = "quorum-rebuild"

    def __init__(self, id: str, backend: Backend, quorum: Quorum, leg: Leg, **options: Any) -> None:
        super().__init__(id, backend, quorum, **options)
        self.leg = leg
        self.copied = 0
        """Bytes that were written; the rest was there already."""
        self._skipped = 0

    def state_options(self) -> dict[str, Any]:
        return {
            "node-name": self.quorum.name,
            "leg": self.leg.node.name,
            **self.block_options(),
        }

    async def run(self) -> None:
        from vhostblk.nodes.quorum.legs import LegState

        repair, leg = self.quorum.repair, self.leg
        self.busy = True
        while leg.strays:  # what was given up must not overwrite what is copied
            await self.pace()
            await asyncio.sleep(0.05)
        async with self._backend.graph.using(self.quorum, self.id, "job", writes=True):
            try:
                async with repair.step():
                    self._check_leg()
                    await repair.begin(leg)
                self.total_progress = leg.dirty_bytes
                while True:
                    await self._pass()
                    async with repair.step():
                        self._check_leg()
                        if self._skipped:
                            raise OSError(
                                errno.EIO, f"{self._skipped} bytes could not be read or written"
                            )
                        if await repair.end(leg):
                            break
                    if leg.state is not LegState.REBUILDING:
                        raise OSError(errno.EIO, leg.reason or "the leg has failed")
            finally:
                # Whoever comes after us finds it where we have left it.
                if leg in self.quorum.legs and not self.stopping:
                    if leg.state is LegState.REBUILDING:
                        leg.left_alone = self.cancelled
                        leg.failed_rebuilds += not self.cancelled
                    repair.give_up(leg)
        leg.failed_rebuilds = 0
        logger.info(
            "quorum '%s': leg '%s' is in sync again; %d bytes of it were written",
            self.quorum.name,
            leg.node.name,
            self.copied,
        )

    def _check_leg(self) -> None:
        if self.leg not in self.quorum.legs:
            raise VhostblkError(
                f"Node '{self.leg.node.name}' is no leg of quorum '{self.quorum.name}' any more",
                data={"code": "no-such-child"},
            )

    async def _pass(self) -> None:
        """Copy all that is dirty, once."""
        from vhostblk.nodes.quorum import repair as parts
        from vhostblk.nodes.quorum.legs import LegState

        repair, leg = self.quorum.repair, self.leg
        copied: list[tuple[int, int]] = []
        region = 0
        while True:
            moved = 0
            try:
                async with repair.step():
                    self._check_leg()
                    most = max(1, self.portion(parts.PORTION) >> leg.region_bits)
                    run = leg.next_run(region, most)
                    if run is None or len(copied) >= parts.BATCH:
                        await repair.confirm(leg, copied)
                        copied = []
                    if run is None:
                        return
                    self.copied += await repair.copy(leg, *run)
                    copied.append(run)
                    region = sum(run)
                    moved = run[1] << leg.region_bits
                    self.current_progress = min(self.total_progress, self.current_progress + moved)
            except OSError as error:
                if leg.state is not LegState.REBUILDING or not self.failed(error, "write"):
                    raise
                if self.on_error == "ignore" and run is not None:
                    region = sum(run)
                    self._skipped += run[1] << leg.region_bits
            await self.pace(moved)


class ScrubJob(QuorumJob):
    """Compares all legs with one another."""

    job_type = "quorum-scrub"

    def __init__(
        self, id: str, backend: Backend, quorum: Quorum, *, repair: bool, **options: Any
    ) -> None:
        super().__init__(id, backend, quorum, **options)
        self.repair = repair
        self.found = 0
        """Portions in which a leg was wrong, counted for each leg."""
        self.repaired = 0
        """Bytes."""
        self.lost = 0
        """Bytes without a majority."""
        self.settled = 0
        """The same after an unclean end: all legs have one version of them now."""
        self._skipped = False

    def state_options(self) -> dict[str, Any]:
        return {"node-name": self.quorum.name, "repair": self.repair, **self.block_options()}

    async def run(self) -> None:
        from vhostblk.nodes.quorum import repair as parts

        repair, quorum = self.quorum.repair, self.quorum
        rewrite = self.repair and not quorum.read_only
        self.busy = True
        async with self._backend.graph.using(self.quorum, self.id, "job", writes=True):
            while self.current_progress < quorum.size:
                self.total_progress = quorum.size
                length = 0
                try:
                    async with repair.step():
                        offset = self.current_progress
                        # Whole sectors: a slow job has small portions, which may be any number.
                        length = max(1 << 12, self.portion(parts.PORTION) & ~0xFFF)
                        length = min(length, quorum.size - offset)
                        result = await repair.compare(offset, length, rewrite=rewrite)
                        self.found += result.bad
                        self.repaired += result.repaired
                        self.lost += result.lost
                        self.settled += result.settled
                        self.current_progress += length
                except OSError as error:
                    if not self.failed(error, "read"):
                        raise
                    if self.on_error == "ignore":
                        self.current_progress += length
                        self._skipped = True
                await self.pace(length)
            async with repair.step():
                if self.repaired:
                    await quorum.engine.submit(quorum.effective, OP_FLUSH, 0, None, 0)
                if not (self.lost or self._skipped or (self.found and not rewrite)):
                    quorum.settled()
        logger.info(
            "quorum '%s' has been compared: %d differences, %d bytes written, %d bytes without a "
            "majority",
            quorum.name,
            self.found,
            self.repaired,
            self.lost + self.settled,
        )
        if self.lost:
            raise OSError(errno.EIO, f"{self.lost} bytes have no majority")

    def describe_block(self) -> dict[str, Any]:
        found = {"found": self.found, "repaired": self.repaired, "lost": self.lost}
        return {**super().describe_block(), **found, "settled": self.settled}


# ---- beginning


def _job_of(backend: Backend, leg: Leg) -> RebuildJob | None:
    for job in backend.jobs:
        if isinstance(job, RebuildJob) and job.leg is leg and job.status not in _OVER:
            return job
    return None


def _scrub_of(backend: Backend, quorum: Quorum, *, repair: bool) -> ScrubJob | None:
    for job in backend.jobs:
        if not isinstance(job, ScrubJob) or job.status in _OVER:
            continue
        if job.quorum is quorum and job.repair is repair:
            return job
    return None


def _default_id(backend: Backend, what: str, *names: str) -> str:
    """Names of nodes may have characters in them that ids may not."""
    id = re.sub("[^A-Za-z0-9._-]", "", "-".join((what, *names)))
    taken = {job.id for job in backend.jobs}
    return next(i for n in range(len(taken) + 1) if (i := f"{id}-{n}" if n else id) not in taken)


def start_rebuild(
    backend: Backend,
    quorum: Quorum,
    leg: Leg,
    id: str | None = None,
    *,
    full: bool = False,
    **options: Any,
) -> RebuildJob:
    """Begin to rebuild a leg; the caller records it (`backend.changing()`)."""
    from vhostblk.nodes.quorum.legs import LegState

    if quorum.read_only:
        raise VhostblkError(
            f"Quorum '{quorum.name}' is read-only", data={"code": "read-only", "node": quorum.name}
        )
    if (job := _job_of(backend, leg)) is not None:
        raise VhostblkError(
            f"Leg '{leg.node.name}' is being rebuilt by job '{job.id}'",
            data={"code": "leg-busy", "job": job.id},
        )
    if leg.state is LegState.IN_SYNC:
        raise VhostblkError(
            f"Leg '{leg.node.name}' of quorum '{quorum.name}' is in sync; a scrub finds out "
            "whether it is right",
            data={"code": "leg-in-sync", "node": leg.node.name},
        )
    if full:
        leg.mark_whole()  # and stays so, whoever goes on with it
    id = id or _default_id(backend, "rebuild", quorum.name, leg.node.name)
    job = RebuildJob(id, backend, quorum, leg, **options)
    backend.jobs.start(job)
    return job


def start_scrub(
    backend: Backend, quorum: Quorum, id: str | None = None, *, repair: bool, **options: Any
) -> ScrubJob:
    """Begin to compare the legs; the caller records it (`backend.changing()`)."""
    id = id or _default_id(backend, "scrub", quorum.name)
    job = ScrubJob(id, backend, quorum, repair=repair, **options)
    backend.jobs.start(job)
    return job


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """What a state file says of all such jobs, as arguments."""
    names = ("speed", "on-error", "auto-finalize", "auto-dismiss")
    given = {name.replace("-", "_"): options[name] for name in names if name in options}
    return given, bool(options.get("paused"))


@restartable("quorum-rebuild")
async def _restart_rebuild(backend: Backend, id: str, options: dict[str, Any]) -> None:
    given, paused = _split(options)
    quorum = find_quorum(backend, options["node-name"])
    leg = quorum.leg(options["leg"])
    if (job := _job_of(backend, leg)) is not None:  # has begun by itself
        if job.id == id:
            job.set_speed(given.get("speed", 0))
            return
        await job.stop()
    from vhostblk.nodes.quorum.legs import LegState

    if leg.state is LegState.IN_SYNC:
        return  # it was about to end
    async with backend.changing():
        job = start_rebuild(backend, quorum, leg, id, **given)
    if paused:
        job.pause()


@restartable("quorum-scrub")
async def _restart_scrub(backend: Backend, id: str, options: dict[str, Any]) -> None:
    given, paused = _split(options)
    quorum = find_quorum(backend, options["node-name"])
    repair = bool(options["repair"])
    async with backend.changing():
        job = _scrub_of(backend, quorum, repair=repair)
        if job is not None and job.id == id:  # has begun by itself
            job.set_speed(given.get("speed", 0))
        else:
            job = start_scrub(backend, quorum, id, repair=repair, **given)
    if paused:
        job.pause()


# ---- what happens by itself


def attend(backend: Backend) -> None:
    """See to it that legs are rebuilt, and spares used, without anybody's asking."""
    _Attendant(backend)


class _Attendant:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tasks: set[asyncio.Task[None]] = set()
        self._worn: WeakSet[NodeDriver] = WeakSet()  # have failed as legs: no spares any more
        backend.events.listen(self._event)

    def _event(self, event: Event) -> None:
        if event.name == "VHOSTBLK_QUORUM_UNCLEAN" and event.data["power-cut"]:
            self._begin(self._settle(event.data["node-name"]))
        if event.name != "VHOSTBLK_QUORUM_LEG":
            return
        work = {"stale": self._rebuild, "failed": self._replace}.get(event.data["state"])
        if work is not None:
            self._begin(work(event.data["node-name"], event.data["leg"]))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Any) -> None:
        try:
            await work
        except VhostblkError as error:
            if (error.data or {}).get("code") != "closing":
                logger.warning("%s", error.desc)

    def _find(self, quorum: str, leg: str) -> tuple[Quorum, Leg] | None:
        with contextlib.suppress(VhostblkError):
            node = find_quorum(self._backend, quorum)
            return node, node.leg(leg)
        return None

    async def _settle(self, name: str) -> None:
        """Compare legs that a power cut may have left different."""
        from vhostblk.nodes.quorum import Quorum

        async with self._backend.changing():
            quorum = self._backend.graph.nodes.get(name)
            if not isinstance(quorum, Quorum) or not quorum.settles:
                return  # it has gone again, or nothing may be written
            if quorum.options.auto_rebuild and not _scrub_of(self._backend, quorum, repair=True):
                start_scrub(self._backend, quorum, repair=True)

    async def _rebuild(self, quorum_name: str, leg_name: str) -> None:
        from vhostblk.nodes.quorum.legs import LegState

        found = self._find(quorum_name, leg_name)
        if found is not None and (failures := found[1].failed_rebuilds):
            await asyncio.sleep(min(_MOST_PATIENCE, _REBUILD_PATIENCE * 2 ** min(failures - 1, 10)))
        async with self._backend.changing():
            found = self._find(quorum_name, leg_name)
            if found is None or not found[0].options.auto_rebuild or found[0].read_only:
                return
            quorum, leg = found
            stale = leg.state is LegState.STALE and not leg.left_alone
            if stale and _job_of(self._backend, leg) is None:
                start_rebuild(self._backend, quorum, leg)

    async def _replace(self, quorum: str, leg: str) -> None:
        """Put a spare in the place of a leg that has failed."""
        told = False
        while (found := self._find(quorum, leg)) is not None and found[0].options.spares:
            try:
                async with self._backend.changing():
                    found = self._find(quorum, leg)
                    if found is None or not await self._use_spare(*found):
                        return
                await self._take_away(*found)
                return
            except VhostblkError as error:
                if (error.data or {}).get("code") not in _HANGS:
                    raise
                if not told:
                    logger.warning("quorum '%s': the spare has to wait: %s", quorum, error.desc)
                told = True
            await asyncio.sleep(_SPARE_PATIENCE)

    async def _use_spare(self, quorum: Quorum, leg: Leg) -> bool:
        """Whether the leg that has failed is still there, beside the spare.

        That it must be as long as it has requests that were given up.
        """
        from vhostblk.nodes.quorum.legs import LegState

        if leg.state is not LegState.FAILED:
            return False
        role, old = list(quorum.children)[leg.index], leg.node.name
        self._worn.add(leg.node)
        spare = self._free_spare(quorum)
        if spare is None:
            logger.warning("quorum '%s': no spare is left for leg '%s'", quorum.name, old)
            return False
        beside = leg.strays > 0 and len(quorum.children) < MAX_CHILDREN
        async with self._backend.graph.change() as change:
            change.set_child(quorum, quorum.free_role() if beside else role, spare)
        logger.warning(
            "quorum '%s': spare '%s' takes the place of leg '%s'%s",
            quorum.name,
            spare.name,
            old,
            ", which goes when it has let go of all requests" if beside else "",
        )
        new = quorum.leg(spare.name)
        if _job_of(self._backend, new) is None:
            start_rebuild(self._backend, quorum, new)
        return beside

    async def _take_away(self, quorum: Quorum, leg: Leg) -> None:
        """A spare is there for it: it goes as soon as it can, if nobody wants it back."""
        while self._is_given_up(quorum, leg):
            if leg.strays == 0:
                try:
                    async with self._backend.changing(), self._backend.graph.change() as change:
                        if self._is_given_up(quorum, leg):
                            change.set_child(quorum, list(quorum.children)[leg.index], None)
                    return
                except VhostblkError as error:
                    if (error.data or {}).get("code") not in _HANGS:
                        raise
            await asyncio.sleep(_SPARE_PATIENCE)

    def _is_given_up(self, quorum: Quorum, leg: Leg) -> bool:
        from vhostblk.nodes.quorum.legs import LegState

        is_out = leg in quorum.legs and leg.state is LegState.FAILED
        return is_out and _job_of(self._backend, leg) is None

    def _free_spare(self, quorum: Quorum) -> NodeDriver | None:
        graph = self._backend.graph
        for name in quorum.options.spares or ():
            node = graph.nodes.get(name)
            if node is None or graph.parents_of(node) or node in self._worn:
                continue
            if node.size == quorum.size and not node.read_only:
                return node
            logger.warning(
                "quorum '%s': spare '%s' has %d bytes and should have %d, or is read-only",
                quorum.name,
                name,
                node.size,
                quorum.size,
            )
        return None
