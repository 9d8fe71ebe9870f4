# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of the graph under guests: all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from frontend import Device
from in_process import MIB, Guest, Host, refused, with_host

from vhostblk.filter import Filter, Request
from vhostblk.graph import Graph
from vhostblk.schema import VhostblkError


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

    def work(device: Device) -> int:
        rounds = 0
        while not stop.is_set():
            rounds += 1
            data = [(rounds * 8 + sector).to_bytes(4) * 128 for sector in range(8)]
            device.wait(*(device.submit(1, sector, data[sector]) for sector in range(8)))
            for sector in range(8):
                assert device.read(sector * 512, 512) == data[sector]
        return rounds

    working = asyncio.create_task(asyncio.to_thread(work, guest.device))
    await asyncio.sleep(0.01)
    try:
        yield
    finally:
        stop.set()
        assert await working > 1


def picture(graph: Graph) -> Any:
    """All that a failed change must leave as it was."""
    return {
        name: (
            id(node),
            node.options,
            node.size,
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


def test_a_filter_above_the_exported_root_and_away_again() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        await host.add("file", "f", filename=host.file("a"))
        await host.export("f")
        drive = graph.backend("e")
        async with host.device() as guest, load(guest):
            for _ in range(20):
                through = await host.add("through", "x", file="f")
                async with graph.change() as change:
                    change.insert_filter(through, drive, "root")
                assert drive.root is through and drive.filters == [through]
                assert change.pause_us > 0
                await host.until(lambda: through.seen > 20)
                async with graph.change() as change:
                    change.remove_filter(through)
                seen = through.seen
                await asyncio.sleep(0.002)
                assert through.seen == seen and drive.root.name == "f"
                await host.backend.blockdev_del("x")

    with_host(test, Through)
