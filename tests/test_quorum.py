# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: votes, legs that fail or lie, and changes under a running guest."""

from __future__ import annotations

import asyncio
import errno
import os
import string
import subprocess
from pathlib import Path
from typing import Any

import pytest
from crash.tools import plain_environment
from in_process import MIB, Host, refused, with_host
from quorum_legs import Faulty
from test_qmp_events import collect

from vhostblk.engine import (
    MAX_CHILDREN,
    OP_DISCARD,
    OP_FLUSH,
    OP_WRITE_ZEROES,
    REQ_MAY_UNMAP,
)

KIB = 1024
BLOCK = 64 * KIB


async def quorum(host: Host, legs: str = "abc", **options: Any) -> Any:
    """Files as legs, named by letters, filled with the same noise."""
    noise = os.urandom(MIB)
    for leg in legs:
        path = Path(host.file(leg))
        path.write_bytes(noise)
        await host.add("file", leg, filename=str(path), discard="unmap")
    given = {"vote_threshold": len(legs) // 2 + 1, **options}
    return await host.add("quorum", "q", children=list(legs), **given)


def content(host: Host, leg: str) -> bytes:
    return Path(host.path(leg)).read_bytes()


def spoil(host: Host, leg: str, offset: int, length: int = 512) -> None:
    """Silent corruption: different on each leg."""
    with open(host.path(leg), "r+b") as file:
        file.seek(offset)
        file.write(os.urandom(length))


def bad(host: Host) -> list[tuple[str, str, bool]]:
    return [
        (data["node-name"], data["type"], "error" in data)
        for data in host.named("QUORUM_REPORT_BAD")
    ]


def states(node: Any) -> dict[str, str]:
    return {leg["node-name"]: leg["state"] for leg in node.describe_legs()}


async def submit(host: Host, op: int, offset: int, length: int, flags: int = 0) -> None:
    node = host.backend.graph.node("q").effective
    await host.backend.engine.submit(node, op, offset, None, length, flags=flags)


def test_all_changes_reach_all_legs() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await host.write("q", BLOCK, b"w" * BLOCK)
        await submit(host, OP_WRITE_ZEROES, 4 * BLOCK, BLOCK)
        await submit(host, OP_DISCARD, 8 * BLOCK, 2 * BLOCK, REQ_MAY_UNMAP)
        await submit(host, OP_FLUSH, 0, 0)
        a, b, c = (content(host, leg) for leg in "abc")
        assert a == b == c
        assert a[BLOCK : 2 * BLOCK] == b"w" * BLOCK
        assert a[4 * BLOCK : 5 * BLOCK] == bytes(BLOCK)
        assert a[8 * BLOCK : 10 * BLOCK] == bytes(2 * BLOCK)  # QEMU's discards do not get here
        assert await host.read("q", 0, MIB) == a
        assert bad(host) == []

    with_host(test)


@pytest.mark.parametrize("pattern", ["quorum", "fifo"])
@pytest.mark.parametrize("timeout", [0, 30000])
def test_as_many_legs_as_there_may_be(timeout: int, pattern: str) -> None:
    async def test(host: Host) -> None:
        legs = string.ascii_letters.replace("q", "")[:MAX_CHILDREN]
        await quorum(host, legs, leg_timeout=timeout, read_pattern=pattern)
        await host.write("q", 0, b"w" * BLOCK)
        spoil(host, legs[-1], 0)
        assert await host.read("q", 0, BLOCK) == b"w" * BLOCK
        if pattern == "quorum":
            await host.until(lambda: bad(host) == [(legs[-1], "read", False)])

    with_host(test)


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_leg_that_lies_is_outvoted(rewrite: bool) -> None:
    async def test(host: Host) -> None:
        await quorum(host, rewrite_corrupted=rewrite)
        truth = content(host, "a")
        spoil(host, "b", 3 * BLOCK + 1024)
        assert await host.read("q", 3 * BLOCK, BLOCK) == truth[3 * BLOCK : 4 * BLOCK]
        await host.until(lambda: bool(bad(host)))
        assert bad(host) == [("b", "read", False)]
        report = host.named("QUORUM_REPORT_BAD")[0]
        assert (report["sector-num"], report["sectors-count"]) == (3 * BLOCK // 512, 8)
        await host.until(lambda: (content(host, "b") == truth) is rewrite)
        # Whoever is right is not a question of order.
        spoil(host, "a", 0)
        assert await host.read("q", 0, 4096) == truth[:4096]
        assert host.named("QUORUM_FAILURE") == []

    with_host(test)


def test_no_majority_is_an_error() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        truth = content(host, "c")
        spoil(host, "a", 0)
        spoil(host, "b", 0)
        with pytest.raises(OSError) as caught:
            await host.read("q", 0, 4096)
        assert caught.value.errno == errno.EIO
        await host.until(lambda: bool(host.named("QUORUM_FAILURE")))
        assert host.named("QUORUM_FAILURE")[0] == {
            "reference": "q", "sector-num": 0, "sectors-count": 8,
        }  # fmt: skip
        assert await host.read("q", 4096, 4096) == truth[4096:8192]

    with_host(test)


def test_a_leg_that_is_bad_again_and_again_is_told_a_few_times() -> None:
    """As a client sees it: the first time, and the last."""
    events: list[tuple[float, str, dict[str, Any]]] = []

    async def test(host: Host) -> None:
        await with_failing_legs(host, "b", ["read"])
        for block in range(50):
            await host.read("q", block * 4096, 4096)
        await host.until(lambda: len(host.named("QUORUM_REPORT_BAD")) >= 50)
        events.extend((0.0, event.name, event.data) for event in host.events)

    with_host(test)
    sent = [events[number] for _, number in collect(events, 0.0)]
    assert [data["sector-num"] for _, name, data in sent if name == "QUORUM_REPORT_BAD"] == [
        0,
        49 * 8,
    ]


def test_a_flush_is_with_all_legs_at_the_same_time() -> None:
    async def test(host: Host) -> None:
        for leg in "abc":
            await host.add("file", f"file-{leg}", filename=host.file(leg))
            await host.add("test-faulty", leg, file=f"file-{leg}")
        await host.add("quorum", "q", children=list("abc"), vote_threshold=2)
        event = asyncio.Event()
        Faulty.hangs.update(dict.fromkeys("abc", event))
        flush = asyncio.ensure_future(submit(host, OP_FLUSH, 0, 0))
        await host.until(lambda: {*Faulty.seen} == {*"abc"})  # and none has been answered
        assert not flush.done()
        event.set()
        await flush
        assert [Faulty.seen[leg] for leg in "abc"] == [[("flush", 0, 0)]] * 3

    Faulty.faults, Faulty.hangs, Faulty.seen = {}, {}, {}
    with_host(test, Faulty)


async def with_failing_legs(host: Host, failing: str, operations: list[str], **options: Any) -> Any:
    """A quorum of a, b, c; of these the failing ones are below error-inject."""
    for leg in "abc":
        await host.add("file", leg, filename=host.file(leg))
    legs = []
    for leg in "abc":
        if leg in failing:
            inject = {"operations": operations, "errno": "ENOSPC"}
            await host.add("error-inject", f"bad-{leg}", file=leg, **inject)
            legs.append(f"bad-{leg}")
        else:
            legs.append(leg)
    return await host.add("quorum", "q", children=legs, **{"vote_threshold": 2, **options})


def test_failures_below_the_threshold_stay_below() -> None:
    async def test(host: Host) -> None:
        node = await with_failing_legs(host, "b", ["write", "flush", "read"])
        assert await host.read("q", 0, 4096) == bytes(4096)
        assert states(node) == {"a": "in-sync", "bad-b": "in-sync", "c": "in-sync"}
        await host.write("q", 0, b"x" * 4096)
        # From here on nobody asks it any more.
        assert states(node) == {"a": "in-sync", "bad-b": "failed", "c": "in-sync"}
        assert await host.read("q", 0, 4096) == b"x" * 4096
        await submit(host, OP_FLUSH, 0, 0)
        await host.until(lambda: len(bad(host)) == 2)
        assert bad(host) == [("bad-b", "read", True), ("bad-b", "write", True)]
        assert host.named("QUORUM_REPORT_BAD")[0]["error"] == os.strerror(errno.ENOSPC)
        assert content(host, "a")[:4096] == content(host, "c")[:4096] == b"x" * 4096

    with_host(test)


def test_too_many_failures_give_the_errno_of_most() -> None:
    async def test(host: Host) -> None:
        await with_failing_legs(host, "ac", ["write", "read"])
        for attempt in (host.write("q", 0, b"x" * 4096), host.read("q", 0, 4096)):
            with pytest.raises(OSError) as caught:
                await attempt
            assert caught.value.errno == errno.ENOSPC
        await host.until(lambda: len(host.named("QUORUM_FAILURE")) == 2)

    with_host(test)


def test_fifo_asks_one_after_the_other() -> None:
    async def test(host: Host) -> None:
        await with_failing_legs(host, "a", ["read"], read_pattern="fifo")
        await host.write("q", 0, b"x" * 8192)
        spoil(host, "c", 0)
        assert await host.read("q", 0, 8192) == b"x" * 8192
        await host.until(lambda: bool(bad(host)))
        assert bad(host) == [("bad-a", "read", True)]  # and nobody compared with c

    with_host(test)


def test_bad_options_are_refused() -> None:
    async def test(host: Host) -> None:
        for leg in "abc":
            await host.add("file", leg, filename=host.file(leg))
        await host.add("file", "small", filename=host.file("small", MIB // 2))
        legs = ["a", "b", "c"]
        with refused("vote-threshold", ">= 1"):
            await host.add("quorum", "q", children=legs, vote_threshold=0)
        with refused("threshold may not exceed children count", "3 children"):
            await host.add("quorum", "q", children=legs, vote_threshold=4)
        with refused("blkverify=on can only be set"):
            await host.add("quorum", "q", children=legs, vote_threshold=2, blkverify=True)
        with refused("rewrite-corrupted=on cannot be used with blkverify=on"):
            await host.add(
                "quorum", "q", children=["a", "b"], vote_threshold=2, blkverify=True,
                rewrite_corrupted=True,
            )  # fmt: skip
        with refused("differ in size", "'small' has 524288"):
            await host.add("quorum", "q", children=["a", "small"], vote_threshold=1)
        with refused("children"):
            await host.add("quorum", "q", children=[], vote_threshold=1)

    with_host(test)


def test_blkverify() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, "ab", vote_threshold=2, blkverify=True)
        truth = content(host, "a")
        assert await host.read("q", 0, MIB) == truth
        await host.write("q", 4096, b"x" * 4096)
        assert content(host, "a") == content(host, "b") != truth
        spoil(host, "b", 0)
        with pytest.raises(OSError):
            await host.read("q", 0, 4096)
        await host.until(lambda: bool(host.named("QUORUM_FAILURE")))
        assert await host.read("q", 4096, 4096) == b"x" * 4096
        assert states(node) == {"a": "in-sync", "b": "in-sync"}

    with_host(test)


def test_options_and_legs_change_under_a_guest() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, "ab", vote_threshold=2)
        graph = host.backend.graph
        await host.export("q")
        async with host.device() as guest:
            await guest.write(0, b"1" * 4096)
            Path(host.path("c")).write_bytes(content(host, "a"))
            await host.add("file", "c", filename=host.path("c"))
            async with graph.change() as change:
                change.set_child(node, "children.2", graph.node("c"))
            assert states(node)["c"] == "stale"  # whatever it contains
            await host.until(lambda: states(node)["c"] == "in-sync")
            await guest.write(4096, b"2" * 4096)
            assert content(host, "c")[:8192] == b"1" * 4096 + b"2" * 4096
            spoil(host, "a", 0)
            assert await guest.read(0, 4096) == b"1" * 4096
            with refused("threshold may not exceed"):
                async with graph.change() as change:
                    change.set_child(node, "children.1", None)
                    change.set_child(node, "children.2", None)
            await host.backend.blockdev_reopen(
                [
                    {
                        "driver": "quorum", "node-name": "q", "children": ["a", "b", "c"],
                        "vote-threshold": 1, "read-pattern": "fifo",
                    }
                ]
            )  # fmt: skip
            assert await guest.read(0, 512) != b"1" * 512  # leg a alone is asked now

    with_host(test)


def test_legs_are_equal_for_qemu(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        for i in range(32):
            await host.write("q", i * 17 * 512, os.urandom(5 * 512))
        await submit(host, OP_FLUSH, 0, 0)
        for leg in "bc":
            command = ["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw"]
            subprocess.run(
                [*command, host.path("a"), host.path(leg)], check=True, env=plain_environment()
            )

    with_host(test)
