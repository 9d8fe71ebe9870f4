# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: legs that miss something are out, for ever, until they have been rebuilt."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from in_process import MIB, Host, refused
from quorum_legs import BLOCK, Faulty, content, quorum, recorded, restart, run, states, submit

from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_WRITE_ZEROES
from vhostblk.engine.quorum import LEG_WHOLE


@pytest.mark.parametrize("operation", ["write", "write-zeroes", "discard", "flush"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_who_misses_a_change_is_out(operation: str, code: int) -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, b"1" * 4 * BLOCK)
        # All legs make the same of a discard, since to them it is a zero write.
        Faulty.faults["c"] = {operation.replace("discard", "write-zeroes"): code}
        if operation == "write":
            await host.write("q", BLOCK, b"2" * BLOCK)
        elif operation == "write-zeroes":
            await submit(host, OP_WRITE_ZEROES, BLOCK, BLOCK)
        elif operation == "discard":
            await submit(host, OP_DISCARD, BLOCK, BLOCK)
        else:
            await submit(host, OP_FLUSH, 0, 0)
        # The request has ended: by now it is recorded.
        [*_, leg] = recorded(host).legs
        assert leg.word & 0xFF == 3 and recorded(host).legs[0].word == 1
        if operation == "flush":
            assert leg.word & LEG_WHOLE  # nobody knows what it has lost
            assert node.describe_legs()[2]["missed-bytes"] == MIB
        else:
            assert leg.dirty[0] == 0b10
        assert states(node) == "iif"
        # It is not asked any more, and does not vote when it could.
        Faulty.faults.clear()
        Faulty.seen["c"].clear()
        await host.write("q", 0, b"3" * 4 * BLOCK)
        assert await host.read("q", 0, 4 * BLOCK) == b"3" * 4 * BLOCK
        assert Faulty.seen["c"] == []
        [event] = host.named("VHOSTBLK_QUORUM_LEG")
        assert (event["leg"], event["state"]) == ("c", "failed")
        assert os.strerror(code) in event["reason"]

    run(test)


def test_an_error_of_a_read_is_no_reason_to_be_out() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        Faulty.faults["a"] = {"read": errno.EIO}
        assert await host.read("q", 0, 4096) == bytes(4096)
        assert states(node) == "iii"

    run(test)


def test_it_is_still_out_after_a_restart() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await host.write("q", 0, b"1" * MIB)
        Faulty.faults["a"] = {"write": errno.EIO}
        await host.write("q", 3 * BLOCK, b"2" * BLOCK)
        Faulty.faults.clear()
        await restart(host)
        node = await quorum(host, auto_rebuild=False)
        assert states(node) == "sii"
        assert node.describe_legs()[0]["missed-bytes"] == BLOCK
        # With b lying, a and b would agree on nothing, and a alone must not decide.
        Path(host.path("c")).write_bytes(b"1" * MIB)
        with pytest.raises(OSError):
            await host.read("q", 3 * BLOCK, BLOCK)
        assert await host.read("q", 0, BLOCK) == b"1" * BLOCK

    run(test)


def test_what_is_missed_grows_while_it_is_out() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, region_size=4096)
        Faulty.faults["b"] = {"write": errno.EIO}
        await host.write("q", 8192, b"1" * 4096)
        assert node.describe_legs()[1]["missed-bytes"] == 4096
        await host.write("q", 100 * 512, b"1" * 512)
        await submit(host, OP_WRITE_ZEROES, 256 * 1024, 8192)
        await submit(host, OP_DISCARD, 512 * 1024, 4096)
        assert node.describe_legs()[1]["missed-bytes"] == 5 * 4096
        dirty = int.from_bytes(recorded(host).legs[1].dirty, "little")
        assert dirty == 1 << 2 | 1 << 12 | 0b11 << 64 | 1 << 128

    run(test)


def test_not_enough_legs() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, b"1" * 4096)
        Faulty.faults = {leg: {"write": errno.EIO} for leg in "ab"}
        with pytest.raises(OSError):
            await host.write("q", 0, b"2" * 4096)
        # It did not happen: nobody has missed anything that the guest relies on.
        assert states(node) == "iii"
        Faulty.faults = {"a": {"write": errno.EIO}}
        await host.write("q", 0, b"3" * 4096)
        Faulty.faults = {"b": {"write": errno.EIO}}
        with pytest.raises(OSError):
            await host.write("q", 0, b"4" * 4096)
        assert states(node) == "fii"

    run(test)


def test_another_leg_is_asked_when_one_hangs_and_then_the_quorum_goes() -> None:
    """What is asked again when time is up has its own time; no timer outlives the node."""

    async def test(host: Host) -> None:
        await quorum(host, leg_timeout=200, read_pattern="fifo")
        await host.write("q", 0, b"x" * 4096)
        Faulty.hangs["a"] = asyncio.Event()
        assert await host.read("q", 0, 4096) == b"x" * 4096
        Faulty.hangs.pop("a").set()
        await host.backend.blockdev_del("q")
        await asyncio.sleep(0.5)  # longer than any time that was still running
        assert await host.read("b", 0, 4096) == b"x" * 4096

    run(test)


def test_a_leg_that_hangs() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, leg_timeout=1000)
        await host.export("q")
        async with host.device() as guest:
            await guest.write(0, b"1" * BLOCK)
            Faulty.hangs["b"] = asyncio.Event()
            await guest.write(BLOCK, b"2" * BLOCK)
            assert states(node) == "ifi"
            assert await guest.read(0, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
            await guest.write(BLOCK, b"3" * BLOCK)
            assert node.legs[1].handle.strays == 1
            with refused("cannot be taken away before they come back"):
                async with host.backend.graph.lock, host.backend.graph.change() as change:
                    change.set_child(node, "children.1", None)
            Faulty.hangs["b"].set()
            await host.until(lambda: node.legs[1].handle.strays == 0)
            assert content(host, "b")[BLOCK : 2 * BLOCK] == b"2" * BLOCK  # much too late
            assert await guest.read(BLOCK, BLOCK) == b"3" * BLOCK

    run(test)
