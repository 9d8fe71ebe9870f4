# SPDX-License-Identifier: GPL-2.0-or-later
"""A quorum whose legs go wrong when a test says so, and what can be seen of it."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from in_process import Host, with_host

from vhostblk.backend import Backend
from vhostblk.filter import Filter, FilterOptions, Request
from vhostblk.nodes.quorum.metadata import Claim, Recorded
from vhostblk.schema import VhostblkError

BLOCK = 64 * 1024


class Faulty(Filter):
    """Goes wrong when a test says so: `{leg: {operation: errno}}`, or a future to wait for."""

    driver = "test-faulty"
    Options = FilterOptions
    keeps_data = True
    faults: dict[str, dict[str, int]] = {}  # noqa: RUF012  # set by tests
    hangs: dict[str, asyncio.Event] = {}  # noqa: RUF012
    seen: dict[str, list[tuple[str, int, int]]] = {}  # noqa: RUF012

    async def read(self, request: Request) -> None:
        operation = request.operation
        self.seen.setdefault(self.name, []).append((operation, request.offset, request.length))
        if self.name in self.hangs:
            await self.hangs[self.name].wait()
        code = self.faults.get(self.name, {}).get(operation)
        if code is not None:
            raise OSError(code, os.strerror(code))
        request.forward()

    write = flush = discard = write_zeroes = read

    async def truncate(self, size: int) -> None:
        if self.name in self.hangs:
            await self.hangs[self.name].wait()
        code = self.faults.get(self.name, {}).get("truncate")
        if code is not None:
            raise VhostblkError(os.strerror(code), data={"code": "cannot-resize"})
        await super().truncate(size)


def run(test: Callable[[Host], Any]) -> None:
    Faulty.faults, Faulty.hangs, Faulty.seen = {}, {}, {}
    with_host(test, Faulty)


async def quorum(host: Host, legs: str = "abc", **options: Any) -> Any:
    """Files below faulty filters, called by letters; the files go on after a restart."""
    for leg in legs:
        if not os.path.exists(host.path(leg)):
            host.file(leg)
        await host.add("file", f"file-{leg}", filename=host.path(leg), discard="unmap")
        await host.add("test-faulty", leg, file=f"file-{leg}")
    given = {"vote_threshold": 2, "metadata_file": host.path("states"), **options}
    return await host.add("quorum", "q", children=list(legs), **given)


def content(host: Host, leg: str) -> bytes:
    return Path(host.path(leg)).read_bytes()


def states(node: Any) -> str:
    """One letter for each leg."""
    return "".join(leg["state"][0] for leg in node.describe_legs())


def recorded(host: Host) -> Recorded:
    """What another process would find: the file is locked as long as it is in use."""
    copy = host.path("copy-of-states")
    Path(copy).write_bytes(Path(host.path("states")).read_bytes())
    claim = Claim(copy)
    claim.release()
    found = claim.recorded
    assert found is not None
    return found


def edit_states(host: Host, change: Callable[[bytearray], None]) -> None:
    """The file as another process has left it. Nobody has it open."""
    path = Path(host.path("states"))
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def leave_late(host: Host, *writes: tuple[int, int, int]) -> None:
    """A process was killed while these (start, end, legs) were on their way."""

    def change(content: bytearray) -> None:
        (header,) = struct.unpack_from("<I", content, 12)
        for index, write in enumerate(writes):
            struct.pack_into("<QQQQ", content, header + 4096 + 32 * index, *write, 0)

    edit_states(host, change)


async def submit(host: Host, op: int, offset: int, length: int, flags: int = 0) -> None:
    node = host.backend.graph.node("q").effective
    await host.backend.engine.submit(node, op, offset, None, length, flags=flags)


async def restart(host: Host) -> None:
    """The same directory for another backend."""
    await host.backend.close()
    host.events.clear()
    host.backend = Backend()
    host.backend._registry.register(Faulty)
    host.backend.events.listen(host.events.append)
    await host.backend.start()


async def until_states(host: Host, node: Any, wanted: str) -> None:
    await host.until(lambda: states(node) == wanted)
