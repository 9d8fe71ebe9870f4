# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of graph changes share: filters, a guest under load, comparing graphs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from frontend import Device
from in_process import Guest, Host

from vhostblk.filter import ChildRole, Filter, FilterChild, Request
from vhostblk.graph import Graph
from vhostblk.nodes.driver import NodeOptions
from vhostblk.schema import BlockdevRef


class Through(Filter):
    """Sees every request; waits for half of them."""

    driver = "through"

    async def open(self) -> None:
        self.seen = 0

    async def read(self, request: Request) -> None:
        self.seen += 1
        if request.offset % 1024:
            request.forward()
        else:
            await self.file.forward(request)

    write = read


@contextlib.asynccontextmanager
async def load(guest: Guest) -> AsyncIterator[None]:
    """A guest that writes and verifies all the time; every request succeeds."""
    stop = threading.Event()
    rounds = 0

    def work(device: Device) -> None:
        nonlocal rounds
        while not stop.is_set():
            data = [(rounds * 8 + sector).to_bytes(4) * 128 for sector in range(8)]
            device.wait(*(device.submit(1, sector, data[sector]) for sector in range(8)))
            for sector in range(8):
                assert device.read(sector * 512, 512) == data[sector]
            rounds += 1

    async def one_more() -> None:
        wanted = rounds + 2
        while rounds < wanted and not working.done():
            await asyncio.sleep(0.001)

    working = asyncio.create_task(asyncio.to_thread(work, guest.device))
    await one_more()
    try:
        yield
        await one_more()
    finally:
        stop.set()
        await working


def picture(graph: Graph, *, sizes: bool = True) -> Any:
    """All that a failed change must leave as it was; a format's file may grow meanwhile."""
    return {
        name: (
            id(node),
            node.options,
            sizes and node.size,
            node.read_only,
            node.effective.address,
            graph.given_options(node),
            graph.permissions_of(node),
            graph.is_owned(node),
            graph.is_drained(node),
            {role: child.node.name for role, child in graph.children_of(node).items()},
            sorted((edge.parent.name, edge.role) for edge in graph.parents_of(node)),
        )
        for name, node in graph.nodes.items()
    }


class Copies(Filter):
    """Writes to all of its children, reads from the first."""

    driver = "copies"

    class Options(NodeOptions):
        children: list[BlockdevRef]

    child_roles: ClassVar[Mapping[str, ChildRole]] = {"children": ChildRole(many=True)}
    options: Options

    async def write(self, request: Request) -> None:
        await asyncio.gather(*(child.forward(request) for child in self.legs()))

    async def flush(self, request: Request) -> None:
        await asyncio.gather(*(child.flush() for child in self.legs()))

    def legs(self) -> list[FilterChild]:
        return [self.child(role) for role in self.children]


async def transaction(host: Host, *actions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return await host.backend.transaction(actions)


async def act(host: Host, name: str, **arguments: Any) -> dict[str, Any]:
    """One command, with underscores for hyphens."""
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return await transaction(host, (name, given))


def content(host: Host, name: str) -> bytes:
    return Path(host.path(name)).read_bytes()


def has_seen(node: Through, requests: int) -> bool:
    return node.seen > requests


def roles(host: Host, name: str) -> dict[str, str]:
    node = host.backend.graph.node(name)
    return {role: child.node.name for role, child in node.children.items()}
