# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: legs are brought up to date, compared, added, taken away and replaced by spares."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import string
from pathlib import Path
from typing import Any

import pytest
from in_process import MIB, Host, refused
from quorum_legs import BLOCK, Faulty, content, quorum, restart, run, states, until_states

from vhostblk.engine import MAX_CHILDREN
from vhostblk.jobs import quorum as quorum_jobs
from vhostblk.jobs.quorum import start_rebuild, start_scrub
from vhostblk.nodes.driver import Perm


async def rebuild(host: Host, node: Any, leg: str, **options: Any) -> Any:
    async with host.backend.changing():
        return start_rebuild(host.backend, node, node.leg(leg), **options)


async def scrub(host: Host, node: Any, **options: Any) -> Any:
    async with host.backend.changing():
        job = start_scrub(host.backend, node, **{"repair": True, **options})
    await host.until(lambda: job.id not in {other.id for other in host.backend.jobs})
    return job


async def misses(host: Host, leg: str, *writes: tuple[int, bytes]) -> None:
    """The leg fails the first of these writes, and does not get the others."""
    Faulty.faults[leg] = {"write": errno.EIO}
    for offset, data in writes:
        await host.write("q", offset, data)
    Faulty.faults.clear()


def all_equal(host: Host, legs: str = "abc") -> bool:
    return len({content(host, leg) for leg in legs}) == 1


def test_a_flush_that_fails_may_have_lost_what_guests_wrote_during_the_rebuild() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, os.urandom(MIB))
        await misses(host, "b", (0, b"x" * 512))
        Faulty.hangs["b"] = asyncio.Event()
        Faulty.faults["b"] = {"flush": errno.EIO}
        await rebuild(host, node, "b")
        await until_states(host, node, "iri")
        Faulty.hangs.pop("b").set()
        before = content(host, "b")[5 * BLOCK : 6 * BLOCK]
        await host.write("q", 5 * BLOCK, b"y" * BLOCK)  # where it had missed nothing
        await until_states(host, node, "ifi")
        await host.until(lambda: bool(host.named("BLOCK_JOB_COMPLETED")))
        with open(host.path("b"), "r+b") as file:
            file.seek(5 * BLOCK)
            file.write(before)
        Faulty.faults.clear()
        await rebuild(host, node, "b")
        await until_states(host, node, "iii")
        assert all_equal(host)

    run(test)


def test_only_what_was_missed_is_copied() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, os.urandom(MIB))
        await misses(host, "b", (BLOCK, b"x" * 512), (9 * BLOCK, os.urandom(2 * BLOCK)))
        Faulty.seen.clear()
        job = await rebuild(host, node, "b", id="j")
        await until_states(host, node, "iii")
        assert all_equal(host)
        assert [entry for entry in Faulty.seen["b"] if entry[0] == "write"] == [
            ("write", BLOCK, BLOCK),
            ("write", 9 * BLOCK, 2 * BLOCK),
        ]
        assert job.copied == job.total_progress == 3 * BLOCK
        assert node.describe_legs()[1]["missed-bytes"] == 0
        # It counts again.
        Path(host.path("a")).write_bytes(bytes(MIB))
        assert await host.read("q", 0, MIB) == content(host, "b")
        assert [event["state"] for event in host.named("VHOSTBLK_QUORUM_LEG")] == [
            "failed",
            "rebuilding",
            "in-sync",
        ]
        await host.until(lambda: bool(host.named("BLOCK_JOB_COMPLETED")))
        assert host.named("BLOCK_JOB_COMPLETED")[0]["type"] == "quorum-rebuild"

    run(test)


@pytest.mark.parametrize("full", [False, True])
def test_a_leg_that_lost_more_than_it_is_known_to_have_missed(full: bool) -> None:
    """Its server lost power: what it had taken and nobody flushed is gone."""

    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, os.urandom(MIB))
        await misses(host, "b", (0, b"x" * 512))
        with open(host.path("b"), "r+b") as file:
            file.seek(MIB // 2)
            file.write(bytes(BLOCK))
        job = await rebuild(host, node, "b", full=full)
        await until_states(host, node, "iii")
        assert all_equal(host) is full
        assert job.copied == (2 if full else 1) * BLOCK
        assert job.total_progress == (MIB if full else BLOCK)

    run(test)


def test_what_is_equal_is_not_written() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, b"x" * MIB)
        await misses(host, "b", (0, b"x" * MIB))
        job = await rebuild(host, node, "b")
        await until_states(host, node, "iii")
        assert (job.copied, job.total_progress) == (0, MIB)

    run(test)


def test_the_guest_writes_meanwhile() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, region_size=4096)
        await host.export("q")
        async with host.device() as guest:
            await guest.write(0, os.urandom(MIB // 2))
            Faulty.faults["c"] = {"write": errno.EIO}
            await guest.write(0, os.urandom(MIB // 2))
            await guest.write(MIB // 2, os.urandom(MIB // 2))
            Faulty.faults.clear()
            job = await rebuild(host, node, "c", speed=2 * MIB)
            chance = random.Random(1)
            expected = bytearray(content(host, "a"))
            while job.status.value != "null":
                offset = chance.randrange(MIB // 512) * 512
                data = chance.randbytes(min(MIB - offset, 512 * chance.randrange(1, 33)))
                await guest.write(offset, data)
                expected[offset : offset + len(data)] = data
                assert await guest.read(offset, len(data)) == data
            assert states(node) == "iii"
            assert await guest.read(0, MIB) == expected
            assert all_equal(host) and content(host, "c") == expected

    run(test)


def test_a_rebuild_that_fails() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await misses(host, "c", (0, b"x" * MIB))
        Faulty.faults["c"] = {"write": errno.ENOSPC}
        await rebuild(host, node, "c")
        await host.until(lambda: bool(host.named("BLOCK_JOB_COMPLETED")))
        assert host.named("BLOCK_JOB_COMPLETED")[0]["error"] == os.strerror(errno.ENOSPC)
        assert states(node) == "iif"
        Faulty.faults["c"] = {"flush": errno.EIO}
        await rebuild(host, node, "c")
        await host.until(lambda: len(host.named("BLOCK_JOB_COMPLETED")) == 2)
        assert states(node) == "iif"
        Faulty.faults.clear()
        await rebuild(host, node, "c")
        await until_states(host, node, "iii")
        assert all_equal(host)

    run(test)


def test_a_rebuild_for_which_others_cannot_be_read_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quorum_jobs, "_REBUILD_PATIENCE", 0.05)

    async def test(host: Host) -> None:
        node = await quorum(host)
        await misses(host, "c", (0, b"x" * MIB))
        Faulty.faults["b"] = {"read": errno.EIO}
        await rebuild(host, node, "c")
        await host.until(lambda: len(host.named("BLOCK_JOB_COMPLETED")) >= 3)
        assert all("error" in event for event in host.named("BLOCK_JOB_COMPLETED"))
        assert states(node) in ("iis", "iir")
        Faulty.faults.clear()
        await until_states(host, node, "iii")
        assert all_equal(host)

    run(test)


def test_a_rebuild_that_is_cancelled_is_not_begun_again() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await misses(host, "c", (0, b"x" * MIB))
        job = await rebuild(host, node, "c", speed=1)
        await until_states(host, node, "iir")
        await host.until(lambda: job.current_progress > 0)
        with refused("is being rebuilt by job"):
            await rebuild(host, node, "c")
        job.cancel()
        await until_states(host, node, "iis")
        assert node.describe_legs()[2]["missed-bytes"] == MIB  # nothing was flushed yet
        await asyncio.sleep(0.1)
        assert states(node) == "iis"
        await rebuild(host, node, "c")
        await until_states(host, node, "iii")
        with refused("in sync"):
            await rebuild(host, node, "c")

    run(test)


def test_it_goes_on_after_a_restart() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await misses(host, "c", (0, os.urandom(MIB)))
        job = await rebuild(host, node, "c", speed=1)
        await host.until(lambda: job.current_progress > 0)
        await restart(host)
        node = await quorum(host)  # by itself
        await until_states(host, node, "iii")
        assert all_equal(host)

    run(test)


def test_a_new_leg_is_filled_before_it_votes() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, os.urandom(MIB))
        await host.add("file", "d", filename=host.file("d"))
        async with host.backend.changing(), host.backend.graph.change() as change:
            change.set_child(node, "children.3", host.backend.graph.node("d"))
        assert states(node) == "iiis"
        await until_states(host, node, "iiii")
        assert all_equal(host, "abcd")

    run(test)


def test_a_leg_that_was_away_is_not_believed() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, auto_rebuild=False)
        graph = host.backend.graph
        await host.write("q", 0, b"1" * 4096)
        async with host.backend.changing(), graph.change() as change:
            change.set_child(node, "children.2", None)
        await host.write("q", 0, b"2" * 4096)
        async with host.backend.changing(), graph.change() as change:
            change.set_child(node, "children.2", graph.node("c"))
        assert states(node) == "iis"

    run(test)


def test_a_change_that_fails_leaves_all_as_it_was() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await misses(host, "c", (BLOCK, b"x" * 512))
        await host.export("q")
        graph = host.backend.graph

        async def fail() -> None:
            raise OSError(errno.EIO, "no")

        graph.on_switched = fail
        await host.add("file", "d", filename=host.file("d"))
        for leg, new in (("children.2", None), ("children.2", "d"), ("children.3", "d")):
            with contextlib.suppress(OSError):
                async with graph.lock, graph.change() as change:
                    change.set_child(node, leg, graph.node(new) if new else None)
            assert states(node) == "iif"
            assert node.describe_legs()[2]["missed-bytes"] == BLOCK
        graph.on_switched = None
        with refused("would have 1 legs that are in sync, and needs 2"):
            async with graph.lock, graph.change() as change:
                change.set_child(node, "children.1", None)
        assert states(node) == "iif"

    run(test)


def test_a_filter_above_a_leg_changes_nothing() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        graph = host.backend.graph
        await misses(host, "c", (0, b"x" * 512))
        for leg, role in (("a", "children.0"), ("c", "children.2")):
            await host.add("delay", f"d{leg}", file=leg)
            async with host.backend.changing(), graph.change() as change:
                change.insert_filter(graph.node(f"d{leg}"), node, role)
        assert states(node) == "iif"
        async with host.backend.changing(), graph.change() as change:
            change.remove_filter(graph.node("da"))
            change.remove_filter(graph.node("dc"))
        assert states(node) == "iif"
        assert node.describe_legs()[2]["missed-bytes"] == BLOCK

    run(test)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_spare_takes_the_place(hangs: bool) -> None:
    async def test(host: Host) -> None:
        await host.add("file", "small", filename=host.file("small", MIB // 2))
        await host.add("file", "s", filename=host.file("s"))
        node = await quorum(host, spares=["nobody", "small", "s"], leg_timeout=1000)
        await host.export("q")
        async with host.device() as guest:
            await guest.write(0, os.urandom(MIB))
            if hangs:
                Faulty.hangs["b"] = asyncio.Event()
            else:
                Faulty.faults["b"] = {"write": errno.EIO}
            await guest.write(BLOCK, os.urandom(BLOCK))
            if hangs:
                await host.until(lambda: "f" in states(node))
                Faulty.hangs.pop("b").set()
            await host.until(lambda: names(node) in ("asc", "acs"), 20)
            await until_states(host, node, "iii")
            assert all_equal(host, "asc")
            assert all_equal(host, "ab") is hangs  # what was given up has been done after all

    run(test)


def names(node: Any) -> str:
    return "".join(leg.node.name for leg in node.legs)


def test_a_spare_votes_as_long_as_a_leg_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leg cannot be taken away before it has let go: until then there is one more."""
    monkeypatch.setattr(quorum_jobs, "_SPARE_PATIENCE", 0.05)

    async def test(host: Host) -> None:
        await host.add("file", "s", filename=host.file("s"))
        node = await quorum(host, spares=["s"], leg_timeout=1000)
        await host.export("q")
        async with host.device() as guest:
            await guest.write(0, os.urandom(MIB))
            event = Faulty.hangs["b"] = asyncio.Event()
            await guest.write(BLOCK, os.urandom(BLOCK))
            await host.until(lambda: names(node) == "abcs", 20)
            await until_states(host, node, "ifii")
            assert node.leg("b").handle.strays
            # It counts: without it nobody could tell who of a and c is wrong.
            truth = content(host, "s")
            with open(host.path("a"), "r+b") as file:
                file.write(b"rotten")
            assert await guest.read(0, 4096) == truth[:4096]
            await guest.write(2 * BLOCK, b"x" * BLOCK)
            await asyncio.sleep(0.2)
            assert names(node) == "abcs"
            event.set()
            await host.until(lambda: names(node) == "acs", 20)
            assert states(node) == "iii"
            await guest.write(3 * BLOCK, b"y" * BLOCK)
            assert all_equal(host, "cs")
            await host.backend.blockdev_del("b")

    run(test)


def test_a_leg_that_hangs_and_is_wanted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum_jobs, "_SPARE_PATIENCE", 0.05)

    async def test(host: Host) -> None:
        await host.add("file", "s", filename=host.file("s"))
        node = await quorum(host, spares=["s"], leg_timeout=1000)
        event = Faulty.hangs["b"] = asyncio.Event()
        await host.write("q", BLOCK, os.urandom(BLOCK))
        await until_states(host, node, "ifii")
        await rebuild(host, node, "b")  # waits for it
        event.set()
        del Faulty.hangs["b"]
        await until_states(host, node, "iiii")
        await asyncio.sleep(0.2)
        assert names(node) == "abcs" and all_equal(host, "abcs")

    run(test)


def test_where_there_is_no_room_a_spare_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quorum_jobs, "_SPARE_PATIENCE", 0.05)

    async def test(host: Host) -> None:
        def told() -> list[str]:
            return [r.getMessage() for r in caplog.records if "has to wait" in r.getMessage()]

        legs = string.ascii_letters.replace("q", "")[:MAX_CHILDREN]
        await host.add("file", "spare", filename=host.file("spare"))
        node = await quorum(host, legs, spares=["spare"], leg_timeout=1000)
        event = Faulty.hangs["b"] = asyncio.Event()
        await host.write("q", BLOCK, os.urandom(BLOCK))
        await host.until(lambda: bool(told()))
        await asyncio.sleep(0.2)
        [line] = told()
        assert "'b'" in line and "1 requests that were given up" in line
        event.set()
        await host.until(lambda: node.legs[1].node.name == "spare", 20)
        await until_states(host, node, "i" * MAX_CHILDREN)

    run(test)


def test_a_spare_that_fails_is_followed_by_the_next_one_and_never_taken_again() -> None:
    async def test(host: Host) -> None:
        for name in "st":
            await host.add("file", f"file-{name}", filename=host.file(name))
            await host.add("test-faulty", name, file=f"file-{name}")
            Faulty.faults[name] = {"write": errno.EIO}
        node = await quorum(host, spares=["s", "t"])
        await host.write("q", 0, os.urandom(MIB))
        Faulty.faults["b"] = {"write": errno.EIO}
        await host.write("q", BLOCK, os.urandom(BLOCK))
        await host.until(lambda: node.legs[1].node.name == "t" and states(node) == "ifi", 20)
        await host.until(lambda: not list(host.backend.jobs))
        told = len(host.events)
        await asyncio.sleep(0.3)
        assert len(host.events) == told and node.legs[1].node.name == "t"
        names = [e["leg"] for e in host.named("VHOSTBLK_QUORUM_LEG") if e["state"] == "failed"]
        assert names == ["b", "s", "t"]
        assert await host.read("q", 0, MIB) == content(host, "a") == content(host, "c")
        Faulty.faults.clear()
        await rebuild(host, node, "t")
        await until_states(host, node, "iii")
        assert all_equal(host, "act")

    run(test)


def test_what_happens_by_itself_can_be_changed_live() -> None:
    """auto-rebuild, spares and leg-timeout count from when they are given."""

    async def test(host: Host) -> None:
        node = await quorum(host, auto_rebuild=False)
        options = {"driver": "quorum", "node-name": "q", "children": list("abc"),
                   "vote-threshold": 2, "metadata-file": host.path("states")}  # fmt: skip
        await misses(host, "c", (0, b"x" * MIB))
        await host.backend.blockdev_reopen([{**options, "auto-rebuild": False}])
        await asyncio.sleep(0.1)
        assert states(node) == "iif"
        # A leg that hangs is waited for as long as the options of now say.
        await host.backend.blockdev_reopen([{**options, "leg-timeout": 300}])
        await rebuild(host, node, "c")
        await until_states(host, node, "iii")
        # That is far from what it was, for which a timer runs since the first write.
        Faulty.hangs["b"] = asyncio.Event()
        async with asyncio.timeout(15):
            await host.write("q", 0, b"y" * 512)
        assert states(node) == "ifi"
        Faulty.hangs.pop("b").set()
        await host.until(lambda: node.legs[1].handle.strays == 0)
        # A spare that is named when a leg fails takes its place.
        await rebuild(host, node, "b")
        await until_states(host, node, "iii")
        await host.add("file", "s", filename=host.file("s"))
        await host.backend.blockdev_reopen([{**options, "spares": ["s"]}])
        await misses(host, "a", (0, b"z" * 512))
        await host.until(lambda: node.legs[0].node.name == "s", 20)
        await until_states(host, node, "iii")
        assert all_equal(host, "sbc")

    run(test)


def test_blkverify_is_changed_live() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, "ab")
        options = {"driver": "quorum", "node-name": "q", "children": ["a", "b"],
                   "vote-threshold": 2, "metadata-file": host.path("states")}  # fmt: skip
        await host.write("q", 0, b"1" * BLOCK)
        with open(host.path("b"), "r+b") as file:
            file.write(b"rotten")
        with pytest.raises(OSError):
            await host.read("q", 0, 512)
        assert host.named("QUORUM_FAILURE")
        for verify in (True, False):
            await host.backend.blockdev_reopen([{**options, "blkverify": verify}])
            assert node.options.blkverify is verify
            with pytest.raises(OSError):
                await host.read("q", 0, 512)

    run(test)


def test_scrub() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, os.urandom(MIB))
        truth = content(host, "a")
        # Different legs in the same MiB: QEMU would find no majority if a guest read it at once.
        for leg, offset in (("a", 4096), ("b", 12 * 4096), ("c", 33 * 4096 + 512)):
            with open(host.path(leg), "r+b") as file:
                file.seek(offset)
                file.write(b"rotten")
        job = await scrub(host, node, repair=False)
        assert (job.found, job.repaired, job.lost) == (3, 0, 0)
        assert await host.read("q", 0, MIB) == truth
        assert not all_equal(host)
        job = await scrub(host, node)
        assert (job.found, job.repaired) == (3, 3 * 4096)
        assert all_equal(host) and content(host, "a") == truth
        assert {event["node-name"] for event in host.named("QUORUM_REPORT_BAD")} == set("abc")
        assert (await scrub(host, node)).found == 0

    run(test)


def test_what_a_scrub_has_written_is_flushed_before_it_ends() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await scrub(host, node)
        assert "flush" not in [operation for operation, *_ in Faulty.seen["b"]]
        with open(host.path("b"), "r+b") as file:
            file.write(b"rotten")
        Faulty.faults["b"] = {"flush": errno.EIO}
        job = await scrub(host, node)
        assert job.repaired == 4096
        assert states(node) == "ifi"  # nobody knows what has become of it

    run(test)


def test_scrub_where_nobody_is_right() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        for number, leg in enumerate("abc"):
            with open(host.path(leg), "r+b") as file:
                file.write(b"%d" % number)
        job = await scrub(host, node)
        assert (job.lost, job.repaired) == (4096, 0)
        assert host.named("BLOCK_JOB_COMPLETED")[0]["error"] == "4096 bytes have no majority"
        assert host.named("QUORUM_FAILURE")

    run(test)


def test_scrub_cures_what_cannot_be_read() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, b"1" * MIB)
        Faulty.faults["b"] = {"read": errno.EIO}
        Path(host.path("b")).write_bytes(bytes(MIB))
        job = await scrub(host, node)
        assert job.repaired == MIB
        assert content(host, "b") == content(host, "a")
        assert states(node) == "iii"

    run(test)


def test_a_write_on_its_way_is_no_corruption() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.export("q")
        async with host.device() as guest:

            async def write() -> None:
                for _ in range(200):
                    await guest.write(0, os.urandom(16 * 1024))

            writing = asyncio.create_task(write())
            while not writing.done():
                job = await scrub(host, node)
                assert (job.found, job.lost) == (0, 0)
                await host.read("q", 0, 16 * 1024)
        assert host.named("QUORUM_REPORT_BAD") == host.named("QUORUM_FAILURE") == []

    run(test)


async def paused_scrub(host: Host, node: Any, id: str) -> Any:
    async with host.backend.changing():
        job = start_scrub(host.backend, node, id, repair=True)
        job.pause()
    await host.until(lambda: job.status.value == "paused")
    return job


def users(host: Host, name: str) -> list[str]:
    graph = host.backend.graph
    return [edge.parent.name for edge in graph.parents_of(graph.node(name))]


def test_a_job_keeps_its_quorum_whatever_changes_above() -> None:
    """It works in the engine half of the node that it has begun with."""

    async def test(host: Host) -> None:
        backend = host.backend
        node = await quorum(host)
        await host.export("q", "e")
        await host.null("n", size=node.size)
        job = await paused_scrub(host, node, "j")

        async def change(action: str, **options: Any) -> None:
            data = {key.replace("_", "-"): value for key, value in options.items()}
            await backend.transaction([(action, data)])

        with refused("Node 'q' is in use: by job 'j' as 'root'"):
            await change("block-filter-remove", node_name="q", child="children.0")
        with refused("has no child 'd'; its children: children.0, children.1, children.2"):
            async with backend.graph.change() as undone:
                undone.set_child(node, "d", None)
        with refused("Export 'j' is not found"):
            await change("blockdev-replace", parent_type="export", export_id="j", new_child="n")
        # It is the job's alone in the end.
        await change("block-filter-insert", above="q", filter={"driver": "delay", "node-name": "d"})
        assert users(host, "q") == ["j", "d"]
        delay = {"driver": "delay", "node-name": "d", "file": "n"}
        await change("blockdev-reopen", options=[delay])
        assert users(host, "q") == ["j"]
        with refused("Node 'q' is in use: by job 'j' as 'root'"):
            await backend.blockdev_del("q")
        job.resume()
        await host.until(lambda: not list(backend.jobs))
        [end] = host.named("BLOCK_JOB_COMPLETED")
        assert "error" not in end
        await backend.blockdev_del("q")

    run(test)


def test_a_node_that_only_a_job_uses_goes_with_it() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await host.backend.blockdev_del("q")
        inside = {"driver": "quorum", "node-name": "q", "vote-threshold": 2}
        inside |= {"children": ["a", "b", "c"], "metadata-file": host.path("states")}
        await host.add("raw", "r", file=inside)
        job = await paused_scrub(host, host.backend.graph.node("q"), "j")
        await host.backend.blockdev_del("r")
        assert users(host, "q") == ["j"]
        job.resume()
        await host.until(lambda: not list(host.backend.jobs))
        graph = host.backend.graph
        assert "q" not in graph.nodes
        assert graph.permissions_of(graph.node("file-a"))[0] == Perm.NONE

    run(test)
