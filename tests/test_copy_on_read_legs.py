# SPDX-License-Identifier: GPL-2.0-or-later
"""copy-on-read where a leg of a quorum is out: what that leg lacks is nobody else's loss.

The image of such a leg has holes where guests have written meanwhile. They are neither a reason to
copy into what guests write to at that moment, nor zeroes.
"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from cor_images import KIB, MIB, NEEDS_TOOLS, make_chain, tools, write_sparse
from in_process import Host, with_host
from quorum_legs import Faulty, states

from vhostblk.filter import Filter, FilterOptions, Request

pytestmark = NEEDS_TOOLS

BLOCK = 64 * KIB


class Gate(Filter):
    """Holds back writes that are as long as a test says."""

    driver = "gate"
    keeps_data = True
    Options = FilterOptions

    async def open(self) -> None:
        self.lengths: set[int] = set()
        self.held: list[asyncio.Event] = []

    async def write(self, request: Request) -> None:
        if request.length in self.lengths:
            event = asyncio.Event()
            self.held.append(event)
            await event.wait()
        request.forward()

    def let_go(self) -> None:
        for event in self.held:
            event.set()
        self.held.clear()


def run(test: Any) -> None:
    Faulty.faults, Faulty.hangs = {}, {}
    with_host(test, Faulty, Gate)


async def quorum(host: Host, *images: str) -> Any:
    """Legs `a`, `b` and so on above images, which go wrong when they are told to."""
    legs = "abcd"[: len(images)]
    for leg, image in zip(legs, images, strict=True):
        await host.add("test-faulty", leg, file=image)
    return await host.add("quorum", "q", children=list(legs), vote_threshold=2)


async def overlays(host: Host, count: int) -> bytearray:
    """Images that are called `image-0` and so on; what each of them has."""
    for number in range(count):
        chain = make_chain(host, "qcow2", name=f"leg{number}", seed=7)
        await chain.open(f"image-{number}")
    return chain.data


async def fails(host: Host, leg: str, node: str = "q") -> None:
    """A leg misses a write at 1 MiB, and all that follow."""
    Faulty.faults[leg] = {"write": errno.EIO}
    await host.write(node, MIB, b"x" * 512)
    Faulty.faults.clear()
    assert states(host.backend.graph.node("q"))["abcd".index(leg)] == "f"


@pytest.mark.parametrize("out", "abc")
def test_a_copy_that_has_waited_for_a_write(out: str) -> None:
    """The write marks its region, and others pass: nothing is copied there any more."""

    async def test(host: Host) -> None:
        data = await overlays(host, 3)
        await quorum(host, "image-0", "image-1", "image-2")
        gate = await host.add("gate", "gate", file="q")
        node = await host.add("copy-on-read", "cor", file="gate")
        await fails(host, out, "cor")
        gate.lengths = {512}
        first = asyncio.create_task(host.write("cor", 0, b"1" * 512))
        await host.until(lambda: bool(gate.held))
        waiting = asyncio.Event()
        claim = node._claim

        async def claimed(*args: Any, **kwargs: Any) -> Any:
            waiting.set()
            return await claim(*args, **kwargs)

        node._claim = claimed
        reading = asyncio.create_task(host.read("cor", 8 * KIB, 4 * KIB))
        await waiting.wait()
        gate.lengths = {BLOCK}  # a copy is as long as that
        gate.let_go()
        await first
        await host.until(lambda: bool(gate.held) or reading.done())
        await host.write("cor", 1024, b"2" * 512)
        gate.let_go()
        assert await reading == data[8 * KIB : 12 * KIB]
        data[:512], data[1024:1536] = b"1" * 512, b"2" * 512
        assert await host.read("cor", 0, BLOCK) == data[:BLOCK]

    run(test)


@pytest.mark.parametrize("others", ["raw", "qcow2"])
@pytest.mark.parametrize("state", ["f", "r"])
def test_the_only_overlay_is_on_a_leg_that_is_out(others: str, state: str) -> None:
    """Others have no backing file, or have been streamed: they have what it takes for zeroes."""

    async def test(host: Host) -> None:
        base = Path(host.path("base"))
        write_sparse(base, bytes(2 * MIB))
        top = Path(host.path("top"))
        tools().create(top, 2 * MIB, "qcow2", backing=base, backing_format="raw")
        await host.add("qcow2", "overlay", file={"driver": "file", "filename": str(top)})
        for name in ("one", "two"):
            path = host.file(name, 2 * MIB)
            if others == "qcow2":
                tools().create(Path(path), 2 * MIB, "qcow2")
            file = {"driver": "file", "filename": path}
            await host.add(others, name, file=file)
        node = await quorum(host, "one", "two", "overlay")
        await fails(host, "c")
        data = b"data" * (BLOCK // 4)
        for at in range(0, 4 * BLOCK, BLOCK):
            await host.write("q", at, data)
        if state == "r":  # it gets what is written from now on
            async with node.repair.step():
                await node.repair.begin(node.leg("c"))
        assert states(node) == f"ii{state}"
        cor = await host.add("copy-on-read", "cor", file="q")
        assert cor.describe() == {"copies-into": ["overlay"]}
        assert await host.read("cor", 0, 512) == data[:512]
        assert await host.read("cor", 0, 4 * BLOCK) == data * 4
        assert await host.read("q", 0, 4 * BLOCK) == data * 4

    run(test)


@pytest.mark.parametrize("out", "abc")
def test_an_overlay_whose_backing_node_is_a_quorum(out: str) -> None:
    """A leg that is out has holes where the quorum has data."""

    async def test(host: Host) -> None:
        for name in ("one", "two", "three"):
            await host.add("file", name, filename=host.file(name, 2 * MIB))
        await quorum(host, "one", "two", "three")
        await fails(host, out)
        data = b"data" * (BLOCK // 4)
        await host.write("q", 4 * BLOCK, data)
        top = Path(host.path("top"))
        tools().create(top, 2 * MIB, "qcow2")
        file = {"driver": "file", "filename": str(top)}
        await host.add("qcow2", "top", file=file, backing="q")
        await host.add("copy-on-read", "cor", file="top")
        for at, expected in ((0, bytes(512)), (4 * BLOCK, data[:512]), (MIB, b"x" * 512)):
            assert await host.read("cor", at, 512) == expected
        assert await host.read("top", 4 * BLOCK, BLOCK) == data
        mapped = (await host.backend.block_image_map("top", 0, None, 100))["extents"]
        zeroes = [entry["zero"] for entry in mapped if entry["depth"] == 0]
        assert zeroes == [True, False, False]

    run(test)
