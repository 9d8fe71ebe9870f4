# SPDX-License-Identifier: GPL-2.0-or-later
"""A backend inside the test's own process: nodes, exports and filters without a command line."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from frontend import Device
from thoroughness import seconds as limit

from vhostblk.backend import Backend
from vhostblk.control.commands import registry
from vhostblk.control.registry import Context
from vhostblk.engine import OP_READ, OP_WRITE, REQ_GUEST
from vhostblk.events import Event
from vhostblk.nodes.driver import NodeDriver
from vhostblk.schema import VhostblkError

MIB = 1 << 20


class Host:
    """A started backend, its events, and a directory for files and sockets."""

    def __init__(self, directory: Path, drivers: tuple[type[NodeDriver], ...]) -> None:
        self.directory = directory
        self.backend = Backend()
        for driver in drivers:
            self.backend._registry.register(driver)
        self.events: list[Event] = []
        self.backend.events.listen(self.events.append)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def file(self, name: str, size: int = MIB) -> str:
        """An empty file of `size` bytes."""
        with open(self.path(name), "wb") as file:
            file.truncate(size)
        return self.path(name)

    async def add(self, driver: str, name: str, **options: Any) -> Any:
        """blockdev-add, with underscores for hyphens; the node."""
        given = {key.replace("_", "-"): value for key, value in options.items()}
        await self.backend.blockdev_add({"driver": driver, "node-name": name, **given})
        return self.backend.graph.node(name)

    async def null(self, name: str = "null", **options: Any) -> Any:
        return await self.add("null-co", name, **{"size": MIB, "read-zeroes": True, **options})

    async def export(self, node: str, id: str = "e", **options: Any) -> None:
        """block-export-add on the socket `<id>.sock`, writable."""
        given = {key.replace("_", "-"): value for key, value in options.items()}
        await self.backend.block_export_add(
            {
                "type": "vhost-user-blk",
                "id": id,
                "node-name": node,
                "addr": {"type": "unix", "path": self.path(f"{id}.sock")},
                "writable": True,
                **given,
            }
        )

    @contextlib.asynccontextmanager
    async def device(self, id: str = "e", **options: Any) -> AsyncIterator[Guest]:
        """A front-end, connected and started."""
        device = Device(self.path(f"{id}.sock"), timeout=20, **options)
        await asyncio.to_thread(device.__enter__)
        try:
            yield Guest(device)
        finally:
            await asyncio.to_thread(device.close)

    async def read(self, node: str, offset: int, length: int) -> bytes:
        """From the node itself, no device in between."""
        buffer = bytearray(length)
        handle = self.backend.graph.node(node).effective
        await self.backend.engine.submit(handle, OP_READ, offset, buffer)
        return bytes(buffer)

    async def write(self, node: str, offset: int, data: bytes) -> None:
        handle = self.backend.graph.node(node).effective
        await self.backend.engine.submit(handle, OP_WRITE, offset, data, flags=REQ_GUEST)

    async def command(self, name: str, **arguments: Any) -> Any:
        """As a client of the control socket gives it, with underscores for hyphens."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        context = Context(self.backend, registry, lambda: None)
        return await registry.find(name).run(context, given)

    async def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The data of all events of one name so far."""
        return [event.data for event in self.events if event.name == name]


class Guest:
    """A front-end whose waiting methods run in a thread, so that the backend can answer."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.device, name)
        return lambda *args, **kwargs: asyncio.to_thread(method, *args, **kwargs)


def with_host(
    test: Callable[[Host], Coroutine[Any, Any, None]],
    *drivers: type[NodeDriver],
    seconds: float = 60,
) -> None:
    """Run a test with a backend, and close that in order afterwards."""

    async def run() -> None:
        with tempfile.TemporaryDirectory(prefix="vb") as directory:
            host = Host(Path(directory), drivers)
            await host.backend.start()
            try:
                async with asyncio.timeout(limit(seconds)):
                    await test(host)
            finally:
                async with asyncio.timeout(20):
                    await host.backend.close()

    asyncio.run(run())


@contextlib.contextmanager
def refused(*texts: str) -> Iterator[None]:
    """The operator gets an error that says all of `texts`."""
    with pytest.raises(VhostblkError) as caught:
        yield
    for text in texts:
        assert text in caught.value.desc
