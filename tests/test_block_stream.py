# SPDX-License-Identifier: GPL-2.0-or-later
"""block-stream: a disk that needs its backing files no more, and guests that go on meanwhile."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from cor_images import KIB, MIB, NEEDS_TOOLS, Chain, make_chain, tools
from frontend import Daemon, Qmp, vhostblk
from in_process import Host, refused, with_host
from luks_headers import CHEAP1, header
from quorum_legs import Faulty, run, states

from vhostblk.jobs.quorum import start_rebuild
from vhostblk.state import document

pytestmark = NEEDS_TOOLS


async def start(host: Host, device: str, *, id: str = "job", **options: Any) -> Any:
    from vhostblk.jobs.stream import start_stream

    async with host.backend.changing():
        return await start_stream(host.backend, device, id, **options)


async def ended(host: Host, error: str | None = None) -> None:
    def done() -> list[dict[str, Any]]:
        return [*host.named("BLOCK_JOB_COMPLETED"), *host.named("BLOCK_JOB_CANCELLED")]

    await host.until(lambda: bool(done()), 40)
    await host.until(lambda: not list(host.backend.jobs))
    [event] = done()
    assert event.get("error") == error


def independent(chain: Chain) -> None:
    """The topmost image has all that the guest sees, and names nothing else."""
    for path in chain.paths[:-1]:
        path.unlink()
    assert "backing" not in tools().img("info", "-f", chain.format, chain.top)
    chain.check()


@pytest.mark.parametrize("formats", [("qcow2",), ("qcow2", "qcow2"), ("qed",)], ids="-".join)
def test_an_overlay_becomes_independent(formats: tuple[str, ...]) -> None:
    chains: list[Chain] = []

    async def test(host: Host) -> None:
        chain = make_chain(host, *formats)
        chains.append(chain)
        await chain.open()
        await host.export("top", "e")
        async with host.device("e") as guest:
            await start(host, "e")
            await ended(host)
            assert await guest.read(0, len(chain.data)) == chain.data
            assert list(host.backend.graph.node("top").children) == ["file"]
            # What is free now is free.
            for node in list(host.backend.graph.nodes.values()):
                assert node.driver != "copy-on-read"
            data = os.urandom(4096)
            await guest.write(MIB + 512, data)
            chain.data[MIB + 512 : MIB + 512 + 4096] = data
        await host.backend.close()
        independent(chain)

    with_host(test)


@pytest.mark.parametrize(
    "options", [{"compat": "0.10"}, {"extended_l2": "on"}, {"cluster_size": 512}]
)
def test_kinds_of_qcow2(options: dict[str, Any]) -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", **options)
        await chain.open()
        await start(host, "top")  # a node, without an export
        await ended(host)
        await host.backend.close()
        independent(chain)

    with_host(test)


def test_all_legs_of_a_quorum_below_filters() -> None:
    chains: list[Chain] = []

    async def test(host: Host) -> None:
        for name in "abc":
            chain = make_chain(host, "qcow2", name=name, seed=7)
            chains.append(chain)
            await chain.open(name)
        await host.add("quorum", "q", children=["a", "b", "c"], vote_threshold=2)
        await host.add("delay", "d", file="q")
        await host.export("d", "e")
        await start(host, "e", filter_node_name="streaming")
        [drive] = host.backend.query_block_graph()["drives"][:1]
        assert drive["filters"] == ["d", "streaming", "q"]
        await ended(host)
        [drive] = host.backend.query_block_graph()["drives"]
        assert drive["filters"] == ["d", "q"]
        await host.backend.close()
        for chain in chains:
            independent(chain)

    with_host(test)


def test_guests_write_and_snapshots_are_taken_meanwhile() -> None:
    """What was copied never lands on top of what was written; a new overlay is streamed, too."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rnd = random.Random(seed)

    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", size=8 * MIB)
        await chain.open()
        await host.export("top", "e")
        async with host.device("e") as guest:
            job = await start(host, "e", speed=8 * MIB)
            for number in range(150):
                length = rnd.choice((512, 4 * KIB, 64 * KIB, 100 * KIB))
                offset = rnd.randrange(0, len(chain.data) - length, 512)
                data = rnd.randbytes(length)
                await guest.write(offset, data)
                chain.data[offset : offset + length] = data
                if number in (30, 60):
                    overlay = host.path(f"snapshot{number}.qcow2")
                    given = {"device": "e", "snapshot-file": overlay, "format": "qcow2"}
                    await host.backend.transaction([("blockdev-snapshot-sync", given)])
                    chain.paths.append(Path(overlay))
                    chain.formats.append("qcow2")
            if list(host.backend.jobs):
                job.set_speed(0)
            await ended(host)
            for offset in range(0, len(chain.data), MIB):
                assert await guest.read(offset, MIB) == chain.data[offset : offset + MIB]
        await host.backend.close()
        independent(chain)

    with_host(test)


def test_it_can_be_given_up() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        job = await start(host, "top", speed=64 * KIB)
        await host.until(lambda: job.current_progress > 0)
        job.cancel()
        await host.until(lambda: bool(host.named("BLOCK_JOB_CANCELLED")))
        await host.until(lambda: not list(host.backend.jobs))
        assert list(host.backend.graph.node("top").children) == ["file", "backing"]
        assert all(n.driver != "copy-on-read" for n in host.backend.graph.nodes.values())
        await host.backend.close()
        assert "backing file" in tools().img("info", "-f", chain.format, chain.top)
        chain.check()

    with_host(test)


def test_an_overlay_that_is_full() -> None:
    """With on-error=enospc the job waits for space; the backing file stays until all is there."""

    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        file = {"driver": "file", "filename": str(chain.top)}
        broken = {"driver": "error-inject", "node-name": "full", "operations": ["write"]}
        broken |= {"errno": "ENOSPC", "skip": 3}
        await host.add("qcow2", "top", file={**broken, "file": file})
        job = await start(host, "top", on_error="enospc")
        await host.until(lambda: job.io_status == "nospace")
        assert list(host.backend.graph.node("top").children) == ["file", "backing"]
        await host.backend.transaction([("block-filter-remove", {"node-name": "full"})])
        job.resume()
        await ended(host)
        await host.backend.close()
        independent(chain)

    with_host(test)


@pytest.mark.parametrize("given_up", [False, True])
def test_no_state_names_a_filter_that_has_gone(given_up: bool) -> None:
    """Whatever is recorded can be started from: the filter goes in a change of its own."""
    states: list[dict[str, Any]] = []

    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        await host.export("top", "e")

        async def record() -> None:
            states.append(json.loads(document.describe(host.backend)))

        host.backend.graph.on_switched = record
        job = await start(host, "e", speed=64 * KIB if given_up else 0)
        if given_up:
            job.cancel()
            await host.until(lambda: not list(host.backend.jobs))
        else:
            await ended(host)
        assert len(states) > 1
        for state in states:
            names = [node["name"] for node in state["nodes"]]
            for entry in state["jobs"]:
                assert entry["filter-node-name"] in names

    with_host(test)


def test_what_is_refused() -> None:
    async def test(host: Host) -> None:
        await host.null("null")
        with refused("has no backing file"):
            await start(host, "null")
        assert list(host.backend.graph.nodes) == ["null"]
        with refused("nobody"):
            await start(host, "nobody")

    with_host(test)


# ---- legs that are out


async def faulty_legs(host: Host, **options: Any) -> tuple[list[Chain], Any]:
    """A quorum of three overlays, each below a filter that can go wrong; and an export `e`."""
    chains = []
    for name in "abc":
        chain = make_chain(host, "qcow2", name=name, seed=7, size=4 * MIB)
        chains.append(chain)
        await chain.open(f"image-{name}")
        await host.add("test-faulty", name, file=f"image-{name}")
    states = host.path("states")
    given = {"vote_threshold": 2, "metadata_file": states, **options}
    quorum = await host.add("quorum", "q", children=["a", "b", "c"], **given)
    await host.export("q", "e")
    return chains, quorum


async def leg_fails(host: Host, quorum: Any) -> None:
    Faulty.faults["b"] = {"write": errno.EIO, "write_zeroes": errno.EIO}
    await host.until(lambda: states(quorum) == "ifi", 30)


async def leg_is_rebuilt(host: Host, quorum: Any) -> None:
    Faulty.faults.clear()
    async with host.backend.changing():
        start_rebuild(host.backend, quorum, quorum.leg("b"))
    await host.until(lambda: states(quorum) == "iii", 30)


def has_backing(chains: list[Chain]) -> bool:
    return all("backing file" in tools().img("info", "-U", chain.top) for chain in chains)


async def completed(host: Host) -> list[dict[str, Any]]:
    await host.until(lambda: "job" not in [job.id for job in host.backend.jobs], 40)
    return [data for data in host.named("BLOCK_JOB_COMPLETED") if data["device"] == "job"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_leg_fails_and_is_rebuilt_meanwhile(rounds: int) -> None:
    """Rebuilding gives it nothing of what it could read through its backing file."""

    async def test(host: Host) -> None:
        chains, quorum = await faulty_legs(host)
        job = await start(host, "e", speed=2 * MIB)
        for number in range(rounds):
            await host.until(lambda: job.current_progress > number * MIB + 512 * KIB)  # noqa: B023
            await leg_fails(host, quorum)
            await leg_is_rebuilt(host, quorum)
        assert has_backing(chains)
        job.set_speed(0)
        [event] = await completed(host)
        assert "error" not in event
        await host.backend.close()
        for chain in chains:
            independent(chain)
            tools().img("compare", "-f", "qcow2", "-F", "qcow2", chains[0].top, chain.top)

    run(test)


def test_a_leg_that_stays_failed_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        chains, quorum = await faulty_legs(host)
        job = await start(host, "e", speed=2 * MIB)
        await host.until(lambda: job.current_progress > 512 * KIB)
        await leg_fails(host, quorum)
        job.set_speed(0)
        await host.until(lambda: "waits-for" in job.describe_block(), 30)
        [entry] = await host.command("query-block-jobs")
        assert entry["waits-for"] == "leg 'b' of quorum 'q' is failed"
        assert (entry["status"], entry["busy"]) == ("running", False)
        assert has_backing(chains)
        # Nothing is read or written again and again.
        Faulty.seen.clear()
        await asyncio.sleep(3)
        assert Faulty.seen == {}
        told = [text for text in caplog.messages if "'job' waits" in text]
        assert len(told) == 1
        assert "overlay 'image-b'" in told[0]
        async with host.device("e") as guest:
            await guest.write(MIB, b"w" * 4096)
        for chain in chains:
            chain.data[MIB : MIB + 4096] = b"w" * 4096
        job.pause()
        await host.until(lambda: job.status.value == "paused")
        job.resume()
        await leg_is_rebuilt(host, quorum)
        [event] = await completed(host)
        assert "error" not in event
        await host.backend.close()
        for chain in chains:
            independent(chain)

    run(test)


def test_a_job_that_waits_for_a_leg_can_be_given_up() -> None:
    async def test(host: Host) -> None:
        chains, quorum = await faulty_legs(host)
        job = await start(host, "e", speed=2 * MIB)
        await host.until(lambda: job.current_progress > 512 * KIB)
        await leg_fails(host, quorum)
        job.set_speed(0)
        await host.until(lambda: "waits-for" in job.describe_block(), 30)
        job.cancel()
        await host.until(lambda: bool(host.named("BLOCK_JOB_CANCELLED")))
        await host.until(lambda: not list(host.backend.jobs))
        assert has_backing(chains)
        Faulty.faults.clear()
        await host.backend.close()
        for chain in chains:
            chain.check()

    run(test)


def test_a_leg_that_fails_before_the_end_keeps_its_backing_file() -> None:
    """All has been copied, and the operator is asked; nobody knows what such a leg has."""

    async def test(host: Host) -> None:
        chains, quorum = await faulty_legs(host)
        job = await start(host, "e", auto_finalize=False)
        await host.until(lambda: job.status.value == "pending", 30)
        Faulty.faults["b"] = {"write": errno.EIO}
        async with host.device("e") as guest:
            await guest.write(0, b"w" * 512)
        await host.until(lambda: states(quorum) == "ifi")
        job.finalize()
        [event] = await completed(host)
        assert "leg 'b' of quorum 'q' is failed" in event["error"]
        assert has_backing(chains)
        assert all(node.driver != "copy-on-read" for node in host.backend.graph.nodes.values())
        await leg_is_rebuilt(host, quorum)
        host.events.clear()
        await start(host, "e")
        [event] = await completed(host)
        assert "error" not in event
        await host.backend.close()
        for chain in chains:
            chain.data[:512] = b"w" * 512
            independent(chain)

    run(test)


# ---- what is beside the disk


@pytest.mark.parametrize("detached", [False, True])
def test_encrypted_legs(detached: bool) -> None:
    """The filter is above them: it sees neither their headers, nor where there are holes."""
    begin = header("words", CHEAP1, detached=detached)

    async def test(host: Host) -> None:
        await host.backend.object_add({"qom-type": "secret", "id": "s", "data": "words"})
        chains = []
        for name in "abc":
            options: dict[str, Any] = {"key_secret": "s", "file": f"image-{name}"}
            if detached:
                path = Path(host.path(f"header-{name}"))
                path.write_bytes(begin)
                options["header"] = {"driver": "file", "filename": str(path)}
            given = {} if detached else {"header": begin}
            chain = make_chain(host, "qcow2", name=name, seed=7, size=5 * MIB, **given)
            chains.append(chain)
            await chain.open(f"image-{name}")
            await host.add("luks", name, **options)
        quorum = await host.add("quorum", "q", children=["a", "b", "c"], vote_threshold=2)
        await host.export("q", "e")
        before = await host.read("q", 0, quorum.size)
        await start(host, "e")
        await ended(host)
        assert await host.read("q", 0, quorum.size) == before
        await host.backend.close()
        for chain in chains:
            independent(chain)
            content = tools().content(chain.top, "qcow2")
            assert detached or content[: len(begin)] == begin

    with_host(test)


@pytest.mark.parametrize("size", [MIB, None])
def test_a_part_of_an_overlay(size: int | None) -> None:
    """What is around it needs the backing file no more either."""

    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", size=4 * MIB)
        await chain.open()
        options = {} if size is None else {"size": size}
        await host.add("raw", "part", file="top", offset=MIB + 20 * KIB, **options)
        await host.export("part", "e")
        async with host.device("e") as guest:
            job = await start(host, "e", speed=2 * MIB)
            await guest.write(4096, b"w" * 4096)
            at = MIB + 24 * KIB
            chain.data[at : at + 4096] = b"w" * 4096
            job.set_speed(0)
            await ended(host)
        await host.backend.close()
        independent(chain)

    with_host(test)


@pytest.mark.parametrize("on_error", ["report", "stop", "ignore"])
def test_what_is_beside_the_disk_cannot_be_copied(on_error: str) -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", size=4 * MIB)
        chain.data[:] = chain.paths[0].read_bytes()
        await host.add("file", "file", filename=str(chain.paths[0]), read_only=True)
        broken = {"driver": "error-inject", "node-name": "broken", "file": "file"}
        await host.backend.blockdev_add({**broken, "operations": "read", "length": MIB})
        await chain.open(backing="broken")
        await host.add("raw", "part", file="top", offset=2 * MIB)
        job = await start(host, "part", on_error=on_error)
        if on_error == "stop":
            await host.until(lambda: job.io_status == "failed")
            assert has_backing([chain])
            await host.backend.blockdev_reopen([{**broken, "operations": "discard"}])
            job.resume()
        [event] = await completed(host)
        [failed, *_] = host.named("BLOCK_JOB_ERROR")
        assert (failed["operation"], failed["action"]) == ("read", on_error)
        await host.backend.close()
        if on_error == "stop":
            assert "error" not in event
            independent(chain)
        else:
            expected = "Input/output error"
            if on_error == "ignore":
                expected = f"up to {MIB} bytes could not be copied"
            assert event["error"] == expected
            assert has_backing([chain])

    with_host(test)


# ---- kill -9


def serve(directory: Path, first: bool) -> Daemon:
    words = ["--state", str(directory / "state"), "--control", str(directory / "q.sock")]
    if first:
        file = f"file.driver=file,file.filename={directory / 'image.0.qcow2'}"
        words += ["--blockdev", f"qcow2,node-name=top,{file}"]
        address = f"addr.type=unix,addr.path={directory / 'e.sock'}"
        words += ["--export", f"vhost-user-blk,id=e,node-name=top,writable=on,{address}"]
    return vhostblk(*words)


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed again and again, it comes to its end, and every state on the way is good."""
    chains: list[Chain] = []

    async def make(host: Host) -> None:
        chain = make_chain(host, "qcow2", size=8 * MIB)
        chain.paths = [path.rename(tmp_path / path.name) for path in chain.paths]
        tools().img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", chain.paths[0], chain.top)
        chains.append(chain)
        await asyncio.sleep(0)

    with_host(make)
    [chain] = chains
    daemon = serve(tmp_path, True)
    with Qmp(str(tmp_path / "q.sock")) as qmp:
        qmp.command("block-stream", device="e", **{"job-id": "job"}, speed=2 * MIB)
    kills = 0
    while True:
        time.sleep(0.3 + kills * 0.1)
        daemon.kill()
        kills += 1
        assert tools().check(chain.top).corruptions == 0
        daemon = serve(tmp_path, False)
        with Qmp(str(tmp_path / "q.sock")) as qmp:
            [job] = qmp.command("query-block-jobs") or [None]
            if job is None:
                break
            if kills >= 4:
                qmp.command("block-job-set-speed", device="job", speed=0)
                end = time.monotonic() + 60
                while qmp.command("query-block-jobs"):
                    assert time.monotonic() < end
                    time.sleep(0.05)
                break
    assert kills >= 2, "it was never there after a kill"
    assert daemon.terminate() == 0
    daemon.close()
    independent(chain)


def test_one_job_at_a_time_fills_an_overlay() -> None:
    """The second would fail at its end, when the first has changed the overlay."""

    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        await host.export("top", "e")
        job = await start(host, "e", auto_finalize=False)
        job.pause()
        with refused("Node 'top' is being streamed by job 'job'"):
            await start(host, "e", id="second")
        with refused("Node 'top' is being streamed by job 'job'"):
            await start(host, "top", id="second")
        assert [node.driver for node in host.backend.graph.nodes.values()].count(
            "copy-on-read"
        ) == 1
        with refused("Node 'job-copy-on-read' is in use: by job 'job'"):
            await host.backend.transaction(
                [("block-filter-remove", {"node-name": "job-copy-on-read"})]
            )
        job.resume()
        await host.until(lambda: job.status.value == "pending")
        job.finalize()
        await ended(host)

    with_host(test)


def test_a_job_may_have_a_longer_name_than_nodes() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        await host.null("copy-on-read-1")
        job = await start(host, "top", id="j" * 100, auto_finalize=False)
        assert "copy-on-read-2" in host.backend.graph.nodes
        await host.until(lambda: job.status.value == "pending")
        job.finalize()
        await ended(host)

    with_host(test)
