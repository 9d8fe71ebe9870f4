# SPDX-License-Identifier: GPL-2.0-or-later
"""block-stream: a disk becomes independent of what is behind it, while its guest runs.

A `copy-on-read` filter is put above the overlays of the disk, all legs of a quorum at once, and
driven from one end to the other; what guests write or read meanwhile counts, too. When the overlays
have everything, they let go of their backing files, in their headers and in the graph, in one
pause.

Until then nothing is lost by stopping at any moment: the filter, like every filter, is in the
state file, and what has been copied is in the overlays. A restarted job asks those what is missing.

Whether all is there, the overlays themselves say. A leg of a quorum that was out does not get what
was copied meanwhile, and rebuilding does not give it that: through its backing file it is equal.
Then the job waits until the leg is back, and copies to it what it lacks.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vhostblk.jobs.block_job import BlockJob, reason
from vhostblk.jobs.quorum import out_of_reach
from vhostblk.jobs.restart import restartable
from vhostblk.nodes._chain import Leg, backing_of, backing_role, data_children
from vhostblk.nodes.copy_on_read import PORTION, CopyFailed, CopyOnRead
from vhostblk.schema import VhostblkError
from vhostblk.schema.model import NODE_NAME_MAX

if TYPE_CHECKING:
    from vhostblk.backend import Backend
    from vhostblk.nodes.driver import NodeDriver


logger = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds before an overlay that still lacks something is looked at again


class StreamJob(BlockJob):
    """Copies all that the overlays below a filter do not have."""

    job_type = "stream"

    def __init__(self, id: str, backend: Backend, filter: CopyOnRead, **options: Any) -> None:
        super().__init__(id, **options)
        self._backend = backend
        self._filter = filter
        self._complete: object = None  # the filter's generation when nothing was missing
        self._skipped = 0
        self._waits_for: str | None = None
        self.total_progress = filter.size

    def state_options(self) -> dict[str, Any] | None:
        graph, filter = self._backend.graph, self._filter
        there = graph.nodes.get(filter.name) is filter
        if not there or not (graph.is_owned(filter) or graph.parents_of(filter)):
            return None  # the filter goes in the very change that is being recorded
        return {"filter-node-name": self._filter.name, **self.block_options()}

    @property
    def overlays(self) -> set[NodeDriver]:
        """What it fills; nothing, when it has ended."""
        there = self._backend.graph.nodes.get(self._filter.name) is self._filter
        return {leg.node for leg in self._filter.targets} if there else set()

    def describe_block(self) -> dict[str, Any]:
        waits = {} if self._waits_for is None else {"waits-for": self._waits_for}
        return {**super().describe_block(), **waits}

    # ---- the work

    async def run(self) -> None:
        self.busy = True
        async with self._backend.graph.using(self._filter, self.id, "job", writes=True):
            while self._complete is not self._filter.generation:
                self._skipped = 0
                await self._copy_all()
                await self._copy_beside()
                if self._skipped:
                    text = f"up to {self._skipped} bytes could not be copied"
                    raise OSError(errno.EIO, text)
                if lacking := await self._look_for_more():
                    await self._until_in_reach(lacking)
                    await self._start_over()

    async def _copy_all(self) -> None:
        """From one end to the other."""
        offset = 0
        while offset < self._filter.size:
            self.total_progress = self._filter.size
            copied = 0
            try:
                async with self._backend.graph.working(self._filter):
                    offset, copied = await self._filter.copy_from(offset, self.portion(PORTION))
            except CopyFailed as error:
                if self._is_skipped(error, self._filter.region):
                    offset += self._filter.region
            self.current_progress = min(offset, self.total_progress)
            await self.pace(copied)

    def _is_skipped(self, error: CopyFailed, length: int) -> bool:
        """Whether to go on behind what could not be copied, and not to try it again."""
        if not self.failed(error, error.operation):
            raise error
        if self.on_error == "ignore":
            self._skipped += length
        return self.on_error == "ignore"

    def _beside(self) -> Iterator[tuple[Leg, int, int]]:
        """Portions of what the overlays have before and behind the disk.

        A header of LUKS is there, or the rest around a part (`raw` with an offset).
        """
        for leg in self._filter.targets:
            for begin, end in leg.beside(self._filter.size):
                for offset in range(begin, end, PORTION):
                    yield leg, offset, min(PORTION, end - offset)

    async def _copy_beside(self) -> None:
        """What no guest reads, and the filter does not see: it needs a pause for each portion."""
        graph, generation = self._backend.graph, self._filter.generation
        for leg, offset, length in self._beside():
            await self.pace()
            done = not await self._lacks(generation, leg, offset, length)
            while not done:
                copied = 0
                try:
                    async with graph.lock, graph.drained([leg.node]):
                        if generation is not self._filter.generation:
                            return
                        if leg.node not in self._out():
                            copied = await self._filter.copy_beside(leg, offset, length)
                    done = True
                except CopyFailed as error:
                    done = self._is_skipped(error, length)
                await self.pace(copied)

    async def _lacks(self, generation: object, leg: Leg, offset: int, length: int) -> bool:
        async with self._backend.graph.working(self._filter):
            same = generation is self._filter.generation
            return same and await leg.lacks(offset, length)

    async def _look_for_more(self) -> list[NodeDriver]:
        """Ask the overlays, which may be others since a snapshot was taken, who lacks something.

        One that is out may lack what it says it has, until it has been compared.
        """
        generation = self._filter.generation
        lacking = dict.fromkeys(self._out())
        offset = 0
        while offset < self._filter.size:
            async with self._backend.graph.working(self._filter):
                offset, found = await self._filter.lacking(offset)
            if generation is not self._filter.generation:
                return []
            lacking.update(dict.fromkeys(found))
            await self.pace()
        for leg, begin, length in self._beside():
            if await self._lacks(generation, leg, begin, length):
                lacking[leg.node] = None
            await self.pace()
        if not lacking:
            self._complete = generation
        return list(lacking)

    def _out(self) -> dict[NodeDriver, str]:
        """Overlays that do not get what is copied, because a leg is out; and why."""
        out = out_of_reach(self._backend.graph, self._filter)
        return {leg.node: out[leg.node] for leg in self._filter.targets if leg.node in out}

    async def _until_in_reach(self, lacking: list[NodeDriver]) -> None:
        """Wait as long as copies get to none of the overlays that lack something."""
        generation = self._filter.generation
        try:
            while True:
                await self._wait(_PATIENCE)
                await self.pace()
                out = self._out()
                reach = any(node not in out for node in lacking)
                if reach or generation is not self._filter.generation:
                    return
                if self._waits_for is None:
                    self._waits_for = out[lacking[0]]
                    logger.warning(
                        "job '%s' waits: %s, and overlay '%s' gets nothing meanwhile",
                        self.id,
                        self._waits_for,
                        lacking[0].name,
                    )
        finally:
            self._waits_for = None

    async def _start_over(self) -> None:
        """What is marked as copied is not in all overlays."""
        graph = self._backend.graph
        async with graph.lock, graph.drained([self._filter]):
            self._filter.start_over()

    # ---- the end

    async def commit(self) -> None:
        try:
            async with self._backend.changing():
                await self._let_go()
        except (VhostblkError, OSError) as error:
            # The overlays have everything, and still name what they do not need any more.
            self.error = error.desc if isinstance(error, VhostblkError) else reason(error)

    async def _let_go(self) -> None:
        """No overlay has a backing file any more, and the filter goes."""
        graph = self._backend.graph
        async with graph.change() as change:
            if self._complete is not self._filter.generation:
                raise VhostblkError(
                    "an overlay has changed since everything was copied; start the job again",
                    data={"code": "stream-again"},
                )
            change.inside(self._check_out)
            for leg in self._filter.targets:
                role = backing_role(leg.node)
                assert role is not None
                change.set_child(leg.node, role, None)
                change.inside(leg.node.forget_backing, leg.node.remember_backing)
            self._take_filter_out(change)

    async def _check_out(self) -> None:
        for node, why in self._out().items():
            raise VhostblkError(
                f"Overlay '{node.name}' may lack data, for {why}; start the job again when it is "
                "back",
                data={"code": "stream-again", "node": node.name},
            )

    async def clean(self) -> None:
        graph = self._backend.graph
        if self.stopping or graph.nodes.get(self._filter.name) is not self._filter:
            return  # it goes on after a restart, or is done
        async with self._backend.changing(), graph.change() as change:
            self._take_filter_out(change)

    def _take_filter_out(self, change: Any) -> None:
        change.remove_filter(self._filter)
        if self._backend.graph.is_owned(self._filter):
            change.delete(self._filter)


def _place(backend: Backend, device: str) -> NodeDriver:
    """Where the filter belongs: above the overlay, or above what has several of them below."""
    graph = backend.graph
    try:
        node = graph.backend(device).root
    except VhostblkError:
        node = graph.node(device)
    while node.is_filter and len(below := data_children(node)) == 1:
        [node] = below
    return node


def _filter_name(backend: Backend, id: str) -> str:
    """For who looks at the graph it is named after the job, if that is short enough."""
    name, number = f"{id}-copy-on-read", 0
    while len(name) > NODE_NAME_MAX or (number and name in backend.graph.nodes):
        number += 1
        name = f"copy-on-read-{number}"
    return name


def _check_not_streamed(backend: Backend, filter: CopyOnRead) -> None:
    """The second of two jobs would find at its end that the first has changed the overlays."""
    overlays = {leg.node for leg in filter.targets}
    for job in backend.jobs:
        if isinstance(job, StreamJob) and not overlays.isdisjoint(job.overlays):
            raise VhostblkError(
                f"Node '{filter.targets[0].node.name}' is being streamed by job '{job.id}'",
                data={"code": "job-exists", "job": job.id},
            )


async def start_stream(
    backend: Backend,
    device: str,
    id: str | None = None,
    filter_node_name: str | None = None,
    **options: Any,
) -> StreamJob:
    """Begin to stream a disk; the caller records it (`backend.changing()`)."""
    place = _place(backend, device)
    id = id or device
    backend.jobs.check_id(id)
    name = filter_node_name or _filter_name(backend, id)
    async with backend.graph.change() as change:
        filter = await change.add({"driver": "copy-on-read", "node-name": name, "file": place.name})
        change.insert_filter_above(filter, place)
    assert isinstance(filter, CopyOnRead)
    job = StreamJob(id, backend, filter, **options)
    try:
        _check_not_streamed(backend, filter)
        if not any(backing_of(leg.node) is not None for leg in filter.targets):
            raise VhostblkError(
                f"Node '{place.name}' has no backing file, and nothing below it has one",
                data={"code": "no-backing", "node": place.name},
            )
        backend.jobs.start(job)
    except BaseException:
        async with backend.graph.change() as change:
            change.remove_filter(filter)
            change.delete(filter)
        raise
    return job


@restartable("stream")
async def _restart(backend: Backend, id: str, options: dict[str, Any]) -> None:
    filter = backend.graph.node(options["filter-node-name"])
    if not isinstance(filter, CopyOnRead):
        raise VhostblkError(
            f"Node '{filter.name}' is no copy-on-read filter", data={"code": "bad-job"}
        )
    names = ("speed", "on-error", "auto-finalize", "auto-dismiss")
    given = {name.replace("-", "_"): options[name] for name in names if name in options}
    async with backend.changing():
        job = StreamJob(id, backend, filter, **given)
        backend.jobs.start(job)
        if options.get("paused"):
            job.pause()
