# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-create: the job that creates an image, in whatever format its driver has."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from vhostblk.graph import BlockBackend
from vhostblk.jobs.job import Job
from vhostblk.nodes.driver import Child, NodeDriver, ObjectT, Perm
from vhostblk.schema import Model, VhostblkError, validate
from vhostblk.schema.validation import wrong_type_error

if TYPE_CHECKING:
    from vhostblk.graph import Graph
    from vhostblk.nodes import DriverRegistry


class Creator:
    """Creates images: gives drivers the nodes to write them to (nodes.driver.CreateHost)."""

    def __init__(self, graph: Graph, drivers: DriverRegistry, name: str, *, locked: bool) -> None:
        self._graph = graph
        self._drivers = drivers
        self._name = name  # for messages: who uses the nodes
        self._locked = locked  # the caller holds the graph's lock all the time

    async def create(self, options: dict[str, Any]) -> None:
        """Create what `options` describe."""
        driver, checked = check_options(self._drivers, options)
        await driver.create(self, checked)

    @contextlib.asynccontextmanager
    async def image(self, reference: str | dict[str, Any]) -> AsyncIterator[Child]:
        graph = self._graph
        async with self._lock():
            made = isinstance(reference, dict)
            if isinstance(reference, dict):
                node = await graph.add(reference, owned=False)
            else:
                node = graph.node(reference)
            backend = BlockBackend(
                graph,
                self._name,
                node,
                perm=Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE,
                shared=Perm.CONSISTENT_READ,
                what="job",
                pinned=True,
            )
            try:
                graph.attach(backend)
            except BaseException:
                if made:
                    await graph.unmake(node)
                raise
        try:
            yield backend.root_child
        finally:
            async with self._lock():
                graph.detach(backend)
                await graph.drop([node])  # unless others use it meanwhile
                graph.update_permissions()

    @contextlib.contextmanager
    def using(self, id: str, kind: type[ObjectT]) -> Iterator[ObjectT]:
        """See CreateHost."""
        user = f"job '{self._name}'"
        found = self._graph.objects.use(id, kind, user)
        try:
            yield found
        finally:
            self._graph.objects.release(user, found)

    def _lock(self) -> contextlib.AbstractAsyncContextManager[Any]:
        return contextlib.nullcontext() if self._locked else self._graph.lock


def check_options(
    drivers: DriverRegistry, options: dict[str, Any]
) -> tuple[type[NodeDriver], Model]:
    """The driver that is to create an image, and its options."""
    name = options.get("driver")
    if name is None:
        raise VhostblkError(
            "Parameter 'options.driver' is missing",
            data={"code": "missing-parameter", "parameter": "options.driver"},
        )
    if not isinstance(name, str):
        raise wrong_type_error("options.driver", "string")
    driver = drivers.get(name, "options.driver")
    if driver.CreateOptions is None:
        able = sorted(key for key, kind in drivers.all().items() if kind.CreateOptions is not None)
        raise VhostblkError(
            f"Driver '{name}' does not support blockdev-create; those that do: {', '.join(able)}",
            data={"code": "cannot-create", "driver": name, "allowed": able},
        )
    return driver, validate(driver.CreateOptions, options, "options")


class CreateJob(Job):
    """Creates one image. As with QEMU, it stays until it is dismissed."""

    job_type = "create"

    def __init__(
        self, id: str, graph: Graph, drivers: DriverRegistry, options: dict[str, Any]
    ) -> None:
        super().__init__(id, auto_dismiss=False)
        check_options(drivers, options)  # what is wrong with them is said at once
        self._creator = Creator(graph, drivers, id, locked=False)
        self._options = options
        self.total_progress = 1

    async def run(self) -> None:
        await self._creator.create(self._options)
        self.current_progress = 1
