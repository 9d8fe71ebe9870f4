# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum with write-threshold: a slow leg need not set the latency, and loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest
from in_process import MIB, Host, refused
from quorum_legs import BLOCK, Faulty, content, quorum, recorded, run, states, submit

from vhostblk.engine import OP_FLUSH
from vhostblk.jobs.quorum import start_scrub


def test_the_fast_ones_are_enough() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, write_threshold=2, leg_timeout=0)
        await host.write("q", 0, b"1" * 4 * BLOCK)
        event = Faulty.hangs["b"] = asyncio.Event()
        await host.write("q", BLOCK, b"2" * 4096)  # would not end otherwise
        assert node.handle.late == 1 and states(node) == "iii"
        assert recorded(host).late == [(BLOCK, BLOCK + 4096, 0b010)]
        # Who reads there does not ask b.
        Faulty.seen["b"].clear()
        assert await host.read("q", BLOCK, 4096) == b"2" * 4096
        assert Faulty.seen["b"] == []
        # What comes to the same place, and a flush, waits for it; other places do not.
        again = asyncio.ensure_future(host.write("q", BLOCK + 512, b"3" * 512))
        flush = asyncio.ensure_future(submit(host, OP_FLUSH, 0, 0))
        await asyncio.sleep(0.1)
        assert not again.done() and not flush.done()
        assert await host.read("q", BLOCK, 4096) == b"2" * 4096
        event.set()
        del Faulty.hangs["b"]
        await again
        await flush
        assert node.handle.late == 0 and recorded(host).late == []
        expected = b"2" * 512 + b"3" * 512 + b"2" * 3072
        assert {content(host, leg)[BLOCK : BLOCK + 4096] for leg in "abc"} == {expected}

    run(test)


def test_a_late_write_that_fails() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, write_threshold=2)
        event = Faulty.hangs["b"] = asyncio.Event()
        Faulty.faults["b"] = {"write": errno.EIO}
        await host.write("q", 2 * BLOCK, b"2" * 4096)
        assert states(node) == "iii"
        event.set()
        await host.until(lambda: states(node) == "ifi")
        await submit(host, OP_FLUSH, 0, 0)
        assert recorded(host).legs[1].dirty[0] == 0b100
        assert recorded(host).late == []

    run(test)


def test_a_late_write_that_hangs() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, write_threshold=2, leg_timeout=1000)
        Faulty.hangs["b"] = asyncio.Event()
        await host.write("q", 0, b"2" * 4096)
        await submit(host, OP_FLUSH, 0, 0)
        assert states(node) == "ifi" and node.handle.late == 0
        Faulty.hangs["b"].set()

    run(test)


def test_a_change_of_the_graph_waits_for_late_writes() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, write_threshold=2)
        await host.export("q")
        async with host.device() as guest:
            event = Faulty.hangs["b"] = asyncio.Event()
            await guest.write(0, b"2" * 4096)
            await host.add("file", "d", filename=host.file("d"))

            async def replace() -> None:
                async with host.backend.changing(), host.backend.graph.change() as change:
                    change.set_child(node, "children.1", host.backend.graph.node("d"))

            changing = asyncio.create_task(replace())
            await asyncio.sleep(0.1)
            assert not changing.done()
            event.set()
            await changing
            assert content(host, "b")[:4096] == b"2" * 4096
            await guest.write(4096, b"3" * 4096)
            await host.until(lambda: states(node) == "iii")

    run(test)


def test_with_a_guest() -> None:
    """A leg that is slow now and then; the scrub finds nothing at any time."""

    async def test(host: Host) -> None:
        node = await quorum(host, write_threshold=2)
        await host.export("q")
        async with host.device() as guest:
            expected = bytearray(MIB)
            for round in range(300):
                if round % 10 == 0:
                    Faulty.hangs["abc"[round % 3]] = event = asyncio.Event()
                    asyncio.get_running_loop().call_later(0.02, _let_go, "abc"[round % 3], event)
                offset = os.urandom(1)[0] % 64 * 4096
                data = os.urandom(4096 * (1 + round % 3))
                await guest.write(offset, data)
                expected[offset : offset + len(data)] = data
                assert await guest.read(offset, len(data)) == data
                if round % 50 == 0:
                    async with host.backend.changing():
                        job = start_scrub(host.backend, node, repair=False)
            await guest.flush()
            await host.until(lambda: job.status.value == "null")
            assert await guest.read(0, MIB) == expected
            assert {content(host, leg) for leg in "abc"} == {bytes(expected)}
        assert host.named("QUORUM_REPORT_BAD") == host.named("QUORUM_FAILURE") == []
        assert states(node) == "iii"

    run(test)


def _let_go(leg: str, event: asyncio.Event) -> None:
    Faulty.hangs.pop(leg, None)
    event.set()


@pytest.mark.parametrize("value", [1, 4])
def test_bad_values(value: int) -> None:
    async def test(host: Host) -> None:
        with refused("'write-threshold' must be 0, or from vote-threshold (2) to", f"not {value}"):
            await quorum(host, write_threshold=value)

    run(test)


def test_it_can_be_switched_on_and_off() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        options = {"driver": "quorum", "node-name": "q", "children": ["a", "b", "c"],
                   "vote-threshold": 2, "metadata-file": host.path("states")}  # fmt: skip
        await host.export("q")
        async with host.device() as guest:
            await host.backend.blockdev_reopen([{**options, "write-threshold": 2}])
            event = Faulty.hangs["c"] = asyncio.Event()
            await guest.write(0, b"1" * 4096)
            assert node.handle.late == 1
            event.set()
            await host.backend.blockdev_reopen([options])
            assert node.handle.late == 0
            event.clear()
            write = asyncio.create_task(guest.write(0, b"2" * 4096))
            await asyncio.sleep(0.1)
            assert not write.done()
            event.set()
            await write

    run(test)
