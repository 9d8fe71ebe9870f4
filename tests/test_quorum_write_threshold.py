# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum with write-threshold: a slow leg need not set the latency, and loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest
from frontend import Type
from in_process import MIB, Host, refused, with_host
from quorum_legs import (
    BLOCK,
    Faulty,
    content,
    leave_late,
    quorum,
    recorded,
    restart,
    run,
    states,
    submit,
    until_states,
)
from raw_key_driver import RawKey

from vhostblk.engine import OP_FLUSH
from vhostblk.filter import Filter, FilterOptions, Request
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


class Holding(Filter):
    """Holds requests of one kind that concern an offset, until a test lets go of them."""

    driver = "test-holding"
    Options = FilterOptions
    keeps_data = True
    holds: dict[tuple[str, str, int], asyncio.Event] = {}  # noqa: RUF012  # set by tests

    async def read(self, request: Request) -> None:
        for (leg, operation, offset), event in list(self.holds.items()):
            if (leg, operation) == (self.name, request.operation) and (
                request.offset <= offset < request.offset + request.length
            ):
                await event.wait()
        request.forward()

    write = read


@pytest.mark.parametrize("timeout", [0, 30000])
def test_a_read_that_begins_anew_waits_for_late_writes(timeout: int) -> None:
    """Two writes come while it is under way, late on different legs: too few have both."""

    async def test(host: Host) -> None:
        Holding.holds = {}
        for leg in "abc":
            await host.add("file", f"file-{leg}", filename=host.file(leg))
            await host.add("test-holding", leg, file=f"file-{leg}")
        node = await host.add("quorum", "q", children=list("abc"), vote_threshold=2,
                              write_threshold=2, leg_timeout=timeout)  # fmt: skip
        reading, writing = asyncio.Event(), asyncio.Event()
        Holding.holds["c", "read", 0] = reading
        read = asyncio.ensure_future(host.read("q", 0, 8192))
        await asyncio.sleep(0.05)
        Holding.holds["a", "write", 0] = Holding.holds["b", "write", 4096] = writing
        await host.write("q", 0, b"1" * 4096)
        await host.write("q", 4096, b"2" * 4096)
        assert node.handle.late == 2
        del Holding.holds["c", "read", 0]
        reading.set()
        await asyncio.sleep(0.1)
        assert not read.done() or read.exception() is None
        writing.set()
        await read
        assert await host.read("q", 0, 8192) == b"1" * 4096 + b"2" * 4096
        assert host.named("QUORUM_FAILURE") == []

    with_host(test, Holding)


def test_a_leg_that_is_late_answers_where_another_cannot_read() -> None:
    async def test(host: Host) -> None:
        await quorum(host, write_threshold=2)
        event = Faulty.hangs["c"] = asyncio.Event()
        await host.write("q", 0, b"1" * 4096)
        Faulty.faults["a"] = {"read": errno.EIO}
        read = asyncio.ensure_future(host.read("q", 0, 4096))
        await asyncio.sleep(0.1)
        assert not read.done()
        del Faulty.hangs["c"]
        event.set()
        assert await read == b"1" * 4096
        assert host.named("QUORUM_FAILURE") == []

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


def put(host: Host, legs: str, offset: int, data: bytes) -> None:
    """Only these legs have got a write."""
    for leg in legs:
        with open(host.path(leg), "r+b") as file:
            file.seek(offset)
            file.write(data)


def test_the_next_process_delivers_what_was_late() -> None:
    """However many legs lack something: as long as somebody has it, nobody is out."""

    async def test(host: Host) -> None:
        await quorum(host, write_threshold=2)
        await host.write("q", 0, b"0" * MIB)
        await restart(host)
        put(host, "bc", 0, b"1" * 4096)
        put(host, "ac", BLOCK, b"2" * 512)
        put(host, "ab", MIB - 4096, b"3" * 4096)
        # Two at the same time, over one another: no leg has both.
        put(host, "a", 3 * BLOCK, b"4" * 8192)
        put(host, "bc", 3 * BLOCK + 4096, b"5" * 8192)
        leave_late(
            host,
            (0, 4096, 0b001),
            (BLOCK, BLOCK + 512, 0b010),
            (MIB - 4096, MIB + 4096, 0b100),
            (3 * BLOCK, 3 * BLOCK + 8192, 0b110),
            (3 * BLOCK + 4096, 3 * BLOCK + 12288, 0b001),
        )
        node = await quorum(host, write_threshold=2, auto_rebuild=False)
        assert states(node) == "iii"
        assert recorded(host).late == []
        [found] = {content(host, leg) for leg in "abc"}
        assert found[:8192] == b"1" * 4096 + b"0" * 4096
        assert found[BLOCK : BLOCK + 1024] == b"2" * 512 + b"0" * 512
        assert found[-8192:] == b"0" * 4096 + b"3" * 4096
        assert found[3 * BLOCK : 3 * BLOCK + 4096] == b"4" * 4096
        assert found[3 * BLOCK + 4096 : 3 * BLOCK + 8192] in (b"4" * 4096, b"5" * 4096)
        assert found[3 * BLOCK + 8192 : 3 * BLOCK + 12288] == b"5" * 4096

    run(test)


def test_late_writes_and_legs_that_have_gone() -> None:
    async def test(host: Host) -> None:
        await quorum(host, write_threshold=2)
        await restart(host)
        put(host, "bc", 0, b"1" * 4096)
        put(host, "ab", BLOCK, b"2" * 4096)
        leave_late(host, (0, 4096, 0b001), (BLOCK, BLOCK + 4096, 0b100))
        host.file("d")
        os.unlink(host.path("b"))
        # In another order, and one is new. c still has what a lacks, and the other way round.
        node = await quorum(host, "cda", write_threshold=2, auto_rebuild=False)
        assert states(node) == "isi"
        assert content(host, "a") == content(host, "c")
        assert content(host, "a")[:4096] == b"1" * 4096
        assert content(host, "a")[BLOCK : BLOCK + 4096] == b"2" * 4096
        await restart(host)
        put(host, "c", 0, b"3" * 4096)
        leave_late(host, (0, 4096, 0b100))
        os.unlink(host.path("c"))
        os.unlink(host.path("d"))
        node = await quorum(host, "cda", write_threshold=2, auto_rebuild=False)
        assert states(node) == "sss"  # nobody has it any more
        assert node.describe_legs()[2]["missed-bytes"] == BLOCK

    run(test)


def test_late_writes_that_cannot_be_delivered() -> None:
    """The leg misses them, as if they had failed while the process lived."""

    async def test(host: Host) -> None:
        await quorum(host, write_threshold=2)
        await restart(host)
        put(host, "bc", 0, b"1" * 4096)
        put(host, "ab", BLOCK, b"2" * 4096)
        leave_late(host, (0, 4096, 0b001), (BLOCK, BLOCK + 4096, 0b100))
        Faulty.faults["a"] = {"write": errno.EIO}
        node = await quorum(host, write_threshold=2)
        assert states(node) == "fii"
        assert node.describe_legs()[0]["missed-bytes"] == BLOCK
        assert "late write" in node.describe_legs()[0]["reason"]
        assert await host.read("q", 0, 2 * BLOCK) == content(host, "c")[: 2 * BLOCK]
        assert content(host, "c")[BLOCK : BLOCK + 4096] == b"2" * 4096
        assert recorded(host).late == []
        Faulty.faults.clear()
        await host.command("quorum-rebuild", node_name="q", leg="a")
        await until_states(host, node, "iii")
        assert content(host, "a") == content(host, "c")

    run(test)


def test_late_writes_and_a_quorum_that_is_read_only() -> None:
    async def test(host: Host) -> None:
        await quorum(host, write_threshold=2)
        await restart(host)
        put(host, "bc", 0, b"1" * 4096)
        put(host, "ab", BLOCK, b"2" * 4096)
        leave_late(host, (0, 4096, 0b001), (BLOCK, BLOCK + 4096, 0b100))
        with refused("2 writes that had not reached all legs", "opened writable once"):
            await quorum(host, write_threshold=2, read_only=True)
        await restart(host)
        # Nothing has been forgotten by that.
        assert states(await quorum(host, write_threshold=2, auto_rebuild=False)) == "iii"
        assert content(host, "a") == content(host, "b") == content(host, "c")
        await restart(host)
        put(host, "bc", 0, b"3" * 4096)
        leave_late(host, (0, 4096, 0b001))
        node = await quorum(host, write_threshold=2, read_only=True)
        assert states(node) == "sii"
        assert await host.read("q", 0, 4096) == b"3" * 4096
        assert content(host, "a")[:4096] == b"1" * 4096

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


@pytest.mark.parametrize("cipher", [False, True])
@pytest.mark.parametrize("options", [{"write_threshold": 2}, {}])
def test_a_slow_leg_gets_what_the_others_got(cipher: bool, options: dict[str, Any]) -> None:
    """Whatever becomes of the memory meanwhile: the guest's, or that of a cipher above."""

    async def test(host: Host) -> None:
        await quorum(host, leg_timeout=0, **options)
        await host.add("raw-key", "disk", file="q", key="11" * 32 + "22" * 32)
        await host.export("disk" if cipher else "q")
        async with host.device() as guest:
            await guest.write(0, b"1" * 16384)
            event = Faulty.hangs["b"] = asyncio.Event()
            write = await guest.submit(Type.OUT, 0, b"2" * 4096)
            await host.until(lambda: ("write", 0, 4096) in Faulty.seen["b"])
            if options:
                await guest.wait(write)
            # Where the data begin, behind the header.
            guest.device.memory.write(write.out + 16, b"3" * 4096)
            others = [await guest.submit(Type.OUT, sector, b"4" * 4096) for sector in (8, 16)]
            await host.until(lambda: ("write", 8192, 4096) in Faulty.seen["b"])
            event.set()
            for request in (write, *others):
                await guest.checked(request)
            await guest.flush()
            assert await guest.read(4096, 8192) == b"4" * 8192
        assert len({content(host, leg) for leg in "abc"}) == 1

    Faulty.faults, Faulty.hangs, Faulty.seen = {}, {}, {}
    with_host(test, Faulty, RawKey)
