# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: whatever its legs are, all of them make the same of a discard."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from frontend import Daemon, Device, Qmp, Type
from frontend import Request as Sent
from frontend.protocol import DISCARD_SEGMENT
from in_process import MIB, Host, with_host
from leg_kinds import GRANULARITIES, KIB, SIZE, UNABLE, contents, make, secret, space
from loop_devices import attached
from quorum_legs import Faulty, run, states, submit
from thoroughness import tries

from vhostblk.engine import OP_DISCARD, OP_FLUSH
from vhostblk.filter import Filter, Request
from vhostblk.jobs.quorum import start_rebuild, start_scrub

MIXES = [
    ("raw", "qcow2", "small"),
    ("qcow2", "qcow2", "qcow2"),
    ("overlay", "raw", "large"),
    ("extended", "qed", "direct"),
    ("window", "dedup", "encrypted"),
    ("data-file", "kept", "v2"),
    ("copy-on-read", "nested", "small"),
    ("device", "qcow2", "raw"),
]
Devices = Callable[[], str]


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    """Block devices, as many as are wanted."""
    with contextlib.ExitStack() as stack:

        def one() -> str:
            image = tmp_path / f"{random.randrange(1 << 40)}"
            with image.open("wb") as file:
                file.truncate(SIZE)
            return stack.enter_context(attached(image))

        yield one


async def quorum_of(host: Host, kinds: Any, devices: Devices | None = None, **options: Any) -> Any:
    """Legs a, b, … below filters that can go wrong, with the same content."""
    await secret(host)
    content = os.urandom(SIZE)
    for name, kind in zip("abcdef", kinds, strict=False):
        device = devices() if kind == "device" and devices is not None else ""
        await make(host, kind, f"leg-{name}", content, device)
        await host.add("test-faulty", name, file=f"leg-{name}")
    given = {"vote_threshold": 2, "metadata_file": host.path("states"), **options}
    return await host.add("quorum", "q", children=list("abcdef"[: len(kinds)]), **given)


async def discard(host: Host, offset: int, length: int) -> None:
    await submit(host, OP_DISCARD, offset, length)


def zeroed(content: bytearray, offset: int, length: int, granularity: int) -> None:
    """What a discard leaves of what was there."""
    begin, end = -(-offset // granularity) * granularity, offset + length
    if end < SIZE:
        end = end // granularity * granularity
    if begin < end:
        content[begin:end] = bytes(end - begin)


async def all_the_same(host: Host, node: Any) -> bytes:
    """The legs one by one, and what a guest sees."""
    [content] = set(await contents(host, [leg.node.name for leg in node.legs]))
    for at in range(0, SIZE, MIB):
        assert await host.read("q", at, MIB) == content[at : at + MIB]
    return content


async def finish(host: Host, job: Any) -> None:
    await host.until(lambda: job.status.value == "null", 30)


async def scrubbed(host: Host, node: Any) -> None:
    """There is nothing to be found."""
    async with host.backend.changing():
        job = start_scrub(host.backend, node, repair=True)
    await finish(host, job)
    assert (job.found, job.repaired, job.lost) == (0, 0, 0)


async def rebuilt(host: Host, node: Any, leg: str) -> None:
    async with host.backend.changing():
        start_rebuild(host.backend, node, node.leg(leg))
    await host.until(lambda: set(states(node)) == {"i"}, 30)


def bad_legs(host: Host) -> set[str]:
    return {report["node-name"] for report in host.named("QUORUM_REPORT_BAD")}


RANGES = [
    (0, 64 * KIB),
    (100 * KIB + 512, 512),
    (130 * KIB, 300 * KIB + 512),
    (MIB - 512, 2 * MIB + 1024),
    (SIZE - 100 * KIB, 100 * KIB),
]


@pytest.mark.parametrize("kinds", MIXES, ids="+".join)
def test_unlike_legs_make_the_same_of_a_discard(kinds: Any, devices: Devices) -> None:
    async def test(host: Host) -> None:
        node = await quorum_of(host, kinds, devices)
        expected = bytearray(await all_the_same(host, node))
        [info] = await host.command("query-quorum", node_name="q")
        granularity = info["discard-granularity"]
        assert granularity <= max(GRANULARITIES[kind] for kind in kinds)
        for offset, length in RANGES:
            await discard(host, offset, length)
            zeroed(expected, offset, length, granularity)
        assert await all_the_same(host, node) == expected
        # One leg is out; those that are left are as many as have to agree.
        Faulty.faults["b"] = {"write": errno.EIO}
        await host.write("q", 2 * MIB + 4096, b"new" * 4096)
        expected[2 * MIB + 4096 : 2 * MIB + 16384] = b"new" * 4096
        Faulty.faults.clear()
        for offset, length in ((0, 200 * KIB), (2 * MIB - 512, MIB), (3 * MIB, MIB)):
            await discard(host, offset, length)
            zeroed(expected, offset, length, granularity)
        assert states(node) == "ifi"
        for at in range(0, SIZE, 64 * KIB):
            assert await host.read("q", at, 64 * KIB) == expected[at : at + 64 * KIB]
        await rebuilt(host, node, "b")
        assert await all_the_same(host, node) == expected
        await scrubbed(host, node)
        assert bad_legs(host) == {"b"} and host.named("QUORUM_FAILURE") == []

    run(test)


@pytest.mark.parametrize("kind", sorted(GRANULARITIES.keys() - {"kept", "overlay", "copy-on-read"}))
def test_space_is_returned(kind: str, devices: Devices) -> None:
    """As much as that leg alone would return."""

    async def test(host: Host) -> None:
        device = ""
        if kind == "device":
            device = devices()
        content = os.urandom(SIZE)
        await secret(host)
        await make(host, "raw", "leg-a", content)
        await make(host, kind, "leg-b", content, device)
        await host.add("quorum", "q", children=["leg-a", "leg-b"], vote_threshold=2)
        await submit(host, OP_FLUSH, 0, 0)
        image = _file_of(device) if device else None

        def taken() -> int:
            return image.stat().st_blocks * 512 if image else space(host, "leg-b")

        before = taken()
        assert before >= SIZE
        await discard(host, 0, 2 * MIB)
        await submit(host, OP_FLUSH, 0, 0)
        if kind == "dedup":
            await host.backend.graph.node("leg-b").store.checkpoint()
        await host.until(lambda: taken() <= before - 2 * MIB + 64 * KIB, 20)
        assert not any(await host.read("q", 0, 2 * MIB))
        assert await host.read("q", 2 * MIB, 2 * MIB) == content[2 * MIB :]

    run(test)


def _file_of(device: str) -> Path:
    return Path(Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text().strip())


@pytest.mark.parametrize("kind", UNABLE)
def test_where_a_leg_cannot_all_keep_what_was_discarded(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", kind, "qcow2"))
        # No leg but that one stands in the way; it is told once.
        [line] = [r.message for r in caplog.records if "discards return no space" in r.message]
        assert "'b'" in line and "'a'" not in line and "'c'" not in line
        [info] = await host.command("query-quorum", node_name="q")
        assert "discard-granularity" not in info
        able = ["discard-granularity" in leg for leg in info["legs"]]
        assert able == [True, False, True]
        before = await all_the_same(host, node)
        await submit(host, OP_FLUSH, 0, 0)
        taken = space(host, "leg")
        Faulty.seen.clear()
        for offset, length in RANGES:
            await discard(host, offset, length)
        await submit(host, OP_FLUSH, 0, 0)
        operations = {operation for seen in Faulty.seen.values() for operation, *_ in seen}
        assert operations == {"flush"}
        assert await all_the_same(host, node) == before
        assert space(host, "leg") == taken
        # With the leg out they are as equal.
        Faulty.faults["a"] = {"write": errno.EIO}
        await host.write("q", 4096, b"new" * 4096)
        Faulty.faults.clear()
        await discard(host, 0, SIZE)
        for at in range(0, SIZE, 64 * KIB):
            await host.read("q", at, 64 * KIB)
        await rebuilt(host, node, "a")
        await all_the_same(host, node)
        await scrubbed(host, node)
        assert host.named("QUORUM_FAILURE") == []

    run(test)


def test_legs_that_are_all_encrypted(caplog: pytest.LogCaptureFixture) -> None:
    """Each would make other noise of it. Nobody is warned where no leg is able."""
    caplog.set_level("INFO")

    async def test(host: Host) -> None:
        node = await quorum_of(host, ("luks", "luks", "luks"))
        before = await all_the_same(host, node)
        await discard(host, 0, SIZE)
        assert await all_the_same(host, node) == before

    run(test)
    [record] = [r for r in caplog.records if "discards return no space" in r.message]
    assert record.levelname == "INFO"


class Inverted(Filter):
    """Its data are its own: nobody knows what a zero write means to it."""

    driver = "test-inverted"

    async def read(self, request: Request) -> None:
        data = bytearray(request.length)
        await self.file.read(request.offset, data)
        request.fill(bytes(255 - byte for byte in data))

    async def write(self, request: Request) -> None:
        await self.file.write(request.offset, bytes(255 - byte for byte in request.data()))

    async def write_zeroes(self, request: Request) -> None:
        await self.file.write(request.offset, b"\xff" * request.length)


def test_a_filter_that_changes_data() -> None:
    """What is discarded below would be no zeroes above."""

    async def test(host: Host) -> None:
        content = os.urandom(SIZE)
        await make(host, "raw", "a", content)
        await make(host, "raw", "b-file", bytes(255 - byte for byte in content))
        await host.add("test-inverted", "b", file="b-file")
        await host.add("quorum", "q", children=["a", "b"], vote_threshold=2)
        await discard(host, 0, SIZE)
        assert await host.read("q", 0, SIZE) == content

    with_host(test, Inverted)


# ---- changes


async def granularity(host: Host) -> int | None:
    [info] = await host.command("query-quorum", node_name="q")
    found: int | None = info.get("discard-granularity")
    return found


def test_a_leg_gets_other_options(caplog: pytest.LogCaptureFixture) -> None:
    """Deep below, while a guest discards; legs are the same at any time."""

    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "qcow2", "small"))
        path = host.path("leg-a.raw")
        file = {"driver": "file", "node-name": "leg-a", "filename": path}
        expected = bytearray(await all_the_same(host, node))
        await host.export("q")
        async with host.device() as device:
            over = False

            async def guest() -> int:
                rounds = 0
                while not over:
                    offset = random.randrange(SIZE // 512) * 512
                    await device.discard((offset, min(SIZE - offset, 200 * KIB)))
                    rounds += 1
                return rounds

            discards = asyncio.create_task(guest())
            for wanted in ("ignore", "unmap", "ignore", "unmap"):
                await asyncio.sleep(0.05)
                await host.backend.blockdev_reopen([{**file, "discard": wanted}])
                assert await granularity(host) == (64 * KIB if wanted == "unmap" else None)
            over = True
            assert await discards > 0
        after = await all_the_same(host, node)
        assert all(
            after[at : at + 512] in (bytes(512), expected[at : at + 512])
            for at in range(0, SIZE, 512)
        )
        await scrubbed(host, node)
        assert bad_legs(host) == set()

    run(test)
    assert sum("discards return no space: 'a'" in r.message for r in caplog.records) == 2


def test_legs_come_and_go() -> None:
    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "raw", "raw"))
        assert await granularity(host) == 1
        for kind, name, wanted in (("large", "d", 2 * MIB), ("ignore", "e", None)):
            await make(host, kind, name, bytes(SIZE))
            await host.command("x-blockdev-change", parent="q", node=name)
            # It counts before it is rebuilt: from now on it gets what guests change.
            assert await granularity(host) == wanted
            await host.until(lambda: set(states(node)) == {"i"}, 30)
        before = await all_the_same(host, node)
        await discard(host, 0, SIZE)
        assert await all_the_same(host, node) == before
        await host.command("x-blockdev-change", parent="q", child="children.4")
        assert await granularity(host) == 2 * MIB
        await discard(host, MIB, 3 * MIB)
        expected = bytearray(before)
        zeroed(expected, MIB, 3 * MIB, 2 * MIB)
        assert await all_the_same(host, node) == expected
        await host.command("x-blockdev-change", parent="q", child="children.3")
        assert await granularity(host) == 1

    run(test)


def test_a_change_that_fails_leaves_it(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "raw", "raw"))
        file = {"driver": "file", "node-name": "leg-a", "filename": host.path("leg-a.raw")}
        with contextlib.suppress(Exception):
            # The second one is refused, in the pause, after the first one.
            options = {"driver": "quorum", "node-name": "q", "children": ["a", "b", "c"],
                       "vote-threshold": 4, "metadata-file": host.path("states")}  # fmt: skip
            await host.backend.blockdev_reopen([{**file, "discard": "ignore"}, options])
            raise AssertionError("not refused")
        assert await granularity(host) == 1
        await discard(host, 0, MIB)
        assert not any((await all_the_same(host, node))[:MIB])

    run(test)
    assert not any("discards return no space" in r.message for r in caplog.records)


def test_overlays_with_other_clusters() -> None:
    """A snapshot changes what the legs are: overlays have clusters, the files below had none."""

    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "raw", "raw"))
        before = await all_the_same(host, node)
        await host.export("q")
        await discard(host, 512, 1024)
        await host.command("blockdev-snapshot-sync", device="e")
        overlay = host.backend.graph.node("a").child("file").node
        unit = overlay.geometry.cluster_size
        assert await granularity(host) == unit > 1
        await discard(host, 2048, MIB)
        expected = bytearray(before)
        zeroed(expected, 512, 1024, 1)
        zeroed(expected, 2048, MIB, unit)
        assert await all_the_same(host, node) == expected

    run(test)


def test_a_new_size() -> None:
    """The last unit is whole where the disk ends, and only there."""

    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "large", "qcow2"))
        end = SIZE + MIB
        await host.command("block_resize", node_name="q", size=end)
        await host.write("q", SIZE, os.urandom(MIB))
        data = await host.read("q", 0, end)
        await discard(host, 2 * MIB, 2 * MIB + 512 * KIB)  # to the middle of the last one
        expected = data[: 2 * MIB] + bytes(2 * MIB) + data[SIZE:]
        assert await host.read("q", 0, end) == expected
        await discard(host, SIZE, MIB)
        assert await host.read("q", SIZE, MIB) == bytes(MIB)
        for leg in node.legs:
            assert await host.read(leg.node.name, 0, end) == expected[:SIZE] + bytes(MIB)

    run(test)


# ---- late


def test_a_discard_that_is_late_on_a_leg() -> None:
    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "small", "qcow2"), write_threshold=2)
        expected = bytearray(await all_the_same(host, node))
        hang = Faulty.hangs["a"] = asyncio.Event()
        await discard(host, 64 * KIB - 512, MIB)  # without a
        assert node.handle.late == 1
        zeroed(expected, 64 * KIB - 512, MIB, 64 * KIB)
        for at in range(64 * KIB, MIB, 64 * KIB):  # a is not asked there
            assert await host.read("q", at, 64 * KIB) == bytes(64 * KIB)
        Faulty.hangs.clear()
        hang.set()
        await submit(host, OP_FLUSH, 0, 0)
        assert await all_the_same(host, node) == expected
        assert states(node) == "iii" and bad_legs(host) == set()

    run(test)


# ---- as a whole, they fail


async def fails(host: Host, offset: int, length: int) -> None:
    with pytest.raises(OSError):
        await discard(host, offset, length)


@pytest.mark.parametrize("faults", [("write-zeroes",), ("write-zeroes", "write")], ids="+".join)
@pytest.mark.parametrize("legs", ["ab", "ba"])
def test_one_of_two_legs_cannot(faults: Any, legs: str) -> None:
    """The guest is told. It can read there nevertheless, and both legs have the same."""

    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "qcow2"))
        before = await all_the_same(host, node)
        Faulty.faults[legs[0]] = dict.fromkeys(faults, errno.EIO)
        await fails(host, 64 * KIB, 2 * MIB)
        found = await host.read("q", 0, SIZE)
        Faulty.faults.clear()
        assert found in (before, before[: 64 * KIB] + bytes(2 * MIB) + before[2112 * KIB :])
        if "write" in faults:
            assert found == before
        await host.until(lambda: not node._suspects)
        assert await all_the_same(host, node) == found
        assert states(node) == "ii"
        await scrubbed(host, node)

    run(test)


def test_a_leg_is_rebuilt_from_those_that_did_not_all_do_it() -> None:
    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "qcow2", "small"))
        Faulty.faults["c"] = {"write": errno.EIO}
        await host.write("q", 0, bytes(512))
        Faulty.faults = {"b": {"write-zeroes": errno.EIO}}
        await fails(host, 0, MIB)
        # At once: nobody has had time to make them equal.
        Faulty.faults.clear()
        await rebuilt(host, node, "c")
        await all_the_same(host, node)
        await scrubbed(host, node)

    run(test)


@pytest.mark.parametrize("rebuilding", [False, True])
def test_most_legs_cannot(rebuilding: bool) -> None:
    """The one that could is not wrong, and nobody says so."""

    async def test(host: Host) -> None:
        node = await quorum_of(host, ("raw", "qcow2", "small", "raw"))
        before = await all_the_same(host, node)
        job = None
        if rebuilding:  # it did it, too, and is to have what those have that count
            Faulty.faults["d"] = {"write": errno.EIO}
            await host.write("q", SIZE - 512, before[-512:])
            Faulty.faults.clear()
            node.leg("d").mark_whole()
            async with host.backend.changing():
                job = start_rebuild(host.backend, node, node.leg("d"), speed=MIB)
            await host.until(lambda: job.current_progress >= MIB, 20)
        codes = dict.fromkeys(("write-zeroes",), errno.ENOSPC)
        Faulty.faults.update({"b": codes, "c": codes})
        if not rebuilding:
            Faulty.faults["d"] = codes
        await fails(host, 0, MIB)
        for _ in range(4):
            assert await host.read("q", 0, MIB) == before[:MIB]
        Faulty.faults.clear()
        if job is not None:
            job.set_speed(0)
        await host.until(lambda: set(states(node)) == {"i"}, 20)
        await host.until(lambda: not node._suspects)
        assert await all_the_same(host, node) == before
        assert all("error" in report for report in host.named("QUORUM_REPORT_BAD"))

    run(test)


# ---- kill -9


LEGS = {"a": "raw", "b": "qcow2", "c": "small"}


def start(directory: Path, *options: str) -> Daemon:
    """Three unlike legs, each as slow as it likes."""
    words = ["--state", str(directory / "state"), "--control", str(directory / "q.sock")]
    for leg, kind in LEGS.items():
        file = f"file,filename={directory}/leg-{leg}"
        if kind == "raw":
            words += ["--blockdev", f"{file}.raw,node-name=leg-{leg},discard=unmap"]
        else:
            words += ["--blockdev", f"{file}-file.raw,node-name=file-{leg},discard=unmap"]
            words += ["--blockdev", f"qcow2,node-name=leg-{leg},file=file-{leg},discard=unmap"]
        slow = "write-ns=1,jitter-ns=20000000"
        words += ["--blockdev", f"delay,node-name={leg},file=leg-{leg},{slow}"]
    children = ",".join(f"children.{index}={leg}" for index, leg in enumerate(LEGS))
    words += ["--blockdev", ",".join((f"quorum,node-name=q,{children},vote-threshold=2", *options))]
    words += ["--export", f"vhost-user-blk,id=e,node-name=q,addr.type=unix,"
              f"addr.path={directory}/e.sock,writable=on"]  # fmt: skip
    return Daemon([sys.executable, "-m", "vhostblk", "serve", *words], directory).when_ready()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """With three legs that have the same content. Sockets do not have long names."""
    short = Path("/tmp") / f"vbd-{tmp_path.name[-12:]}-{random.randrange(1 << 30):x}"
    short.mkdir()
    content = os.urandom(SIZE)

    async def fill() -> None:
        host = Host(short, ())
        await host.backend.start()
        for leg, kind in LEGS.items():
            await make(host, kind, f"leg-{leg}", content)
        await host.backend.close()

    asyncio.run(fill())
    yield short
    shutil.rmtree(short)


def of_legs(directory: Path) -> list[bytes]:
    """What they have, with no quorum above."""

    async def read() -> list[bytes]:
        host = Host(directory, ())
        await host.backend.start()
        try:
            await host.add("file", "leg-a", filename=host.path("leg-a.raw"))
            for leg in "bc":
                await host.add("file", f"file-{leg}", filename=host.path(f"leg-{leg}-file.raw"))
                await host.add("qcow2", f"leg-{leg}", file=f"file-{leg}")
            return await contents(host, [f"leg-{leg}" for leg in LEGS])
        finally:
            await host.backend.close()

    return asyncio.run(read())


def some_discards(device: Device) -> list[Sent]:
    found = []
    for _ in range(24):
        offset = random.randrange(SIZE // 512)
        sectors = min(SIZE // 512 - offset, random.choice((1, 7, 128, 300, 2000)))
        data = DISCARD_SEGMENT.pack(offset, sectors, 0)
        found.append(device.submit(Type.DISCARD, data=data))
    return found


@pytest.mark.parametrize("early", [False, True])
def test_killed_in_the_middle_of_discards(directory: Path, early: bool) -> None:
    """The guest sends again what was on its way, and all legs have the same once more."""
    options = ("write-threshold=2",) if early else ()
    daemon = start(directory, *options)
    try:
        with Device(daemon.socket("e"), timeout=30) as device:
            for _ in range(tries(4)):
                requests = some_discards(device)
                device.wait(*random.sample(requests, 3))
                daemon.kill()
                device.reap()
                daemon = start(directory, *options)
                device.reconnect()
                device.wait(*requests)
                assert {request.status for request in requests} == {0}
                seen = device.read(0, SIZE)
            device.flush()
        assert daemon.terminate() == 0
    finally:
        daemon.close()
    assert set(of_legs(directory)) == {seen}


def test_killed_in_the_middle_of_discards_with_the_guest(directory: Path) -> None:
    """Nobody sends them again: one version counts, with whichever legs, and is put on all."""
    daemon, begun = start(directory), time.monotonic()
    try:
        while True:
            with Device(daemon.socket("e"), timeout=30) as device:
                some_discards(device)
                time.sleep(random.uniform(0, 0.02))
                daemon.kill()
            differ = len(set(of_legs(directory))) > 1
            daemon = start(directory)
            if differ:
                break
            assert time.monotonic() < begun + 60
        with Device(daemon.socket("e"), timeout=30) as device, Qmp(daemon.socket("q")) as qmp:
            broken = {"driver": "error-inject", "node-name": "broken", "operations": ["write"]}
            qmp.command("block-filter-insert", **{"node-name": "c", "child": "file",
                                                  "filter": broken})  # fmt: skip
            device.write(SIZE - 512, bytes(512))
            seen = device.read(0, SIZE)
            qmp.command("block-filter-remove", **{"node-name": "broken"})
            qmp.command("quorum-rebuild", **{"node-name": "q", "leg": "c"})
            end = time.monotonic() + 30
            while any(leg["state"] != "in-sync" for leg in
                      qmp.command("query-quorum", **{"node-name": "q"})[0]["legs"]):  # fmt: skip
                assert time.monotonic() < end
                time.sleep(0.02)
            qmp.command("quorum-scrub", **{"node-name": "q", "repair": True})
            while qmp.command("query-block-jobs"):
                assert time.monotonic() < end
                time.sleep(0.02)
            assert device.read(0, SIZE) == seen
        assert daemon.terminate() == 0
    finally:
        daemon.close()
    assert set(of_legs(directory)) == {seen}


# ---- all of it, in any order


# Without what no overlay can be put on.
KINDS = sorted({*GRANULARITIES, *UNABLE} - {"device", "dedup"})


class Story:
    """A guest that discards, while legs fail, heal, and become something else."""

    def __init__(self, host: Host, node: Any, seed: int, content: bytes) -> None:
        self.host = host
        self.node = node
        self.random = random.Random(seed)
        self.data = bytearray(content)
        self.rounds = 0
        self.over = False
        self.numbers = itertools.count()

    async def guest(self, device: Any) -> None:
        chance = random.Random(self.random.random())
        while not self.over:
            offset = chance.choice((512, 4096, 65536)) * chance.randrange(SIZE // 65536)
            length = chance.choice((512, 4096, 65536)) * chance.randrange(1, 40)
            length = min(SIZE - offset, length, MIB)
            kind = chance.choice(
                ("write", "write", "zeroes", "discard", "discard", "read", "flush")
            )
            if kind == "write":
                data = chance.randbytes(length)
                await device.write(offset, data)
                self.data[offset : offset + length] = data
            elif kind == "zeroes":
                await device.write_zeroes(offset, length, unmap=chance.random() < 0.5)
                self.data[offset : offset + length] = bytes(length)
            elif kind == "discard":
                await device.discard((offset, length))
                self.discarded(offset, await device.read(offset, length))
            elif kind == "read":
                assert await device.read(offset, length) == self.data[offset : offset + length]
            else:
                await device.flush()
            self.rounds += 1

    def discarded(self, offset: int, found: bytes) -> None:
        """It is there or it is not, and stays that way."""
        for at in range(0, len(found), 512):
            sector = found[at : at + 512]
            assert sector in (bytes(512), self.data[offset + at : offset + at + 512])
        self.data[offset : offset + len(found)] = found

    # ---- what happens; each leaves all legs in sync

    async def a_leg_fails(self) -> None:
        leg = self.random.choice(self.legs())
        operations = self.random.sample(("write", "flush", "write-zeroes"), 2)
        Faulty.faults[leg] = dict.fromkeys(operations, errno.EIO)
        await self.host.until(lambda: "f" in states(self.node), 30)
        await self.more()
        Faulty.faults.pop(leg)
        await rebuilt(self.host, self.node, leg)

    async def a_snapshot(self) -> None:
        await self.host.command("blockdev-snapshot-sync", device="e")

    async def another_leg(self) -> None:
        """Of another kind, in the place of one."""
        name = f"n{next(self.numbers)}"
        await make(self.host, self.random.choice(KINDS), f"leg-{name}", bytes(SIZE))
        await self.host.add("test-faulty", name, file=f"leg-{name}")
        role = self.random.choice(list(self.node.children))
        change = {"parent-type": "driver", "node-name": "q", "child": role, "new-child": name}
        await self.host.backend.transaction([("blockdev-replace", change)])
        await self.host.until(lambda: set(states(self.node)) == {"i"}, 30)

    async def a_scrub(self) -> None:
        await scrubbed(self.host, self.node)

    async def other_options(self) -> None:
        options = {
            "driver": "quorum",
            "node-name": "q",
            "children": self.legs(),
            "vote-threshold": 2,
            "metadata-file": self.host.path("states"),
            "write-threshold": self.random.choice((0, 2)),
            "read-pattern": self.random.choice(("quorum", "fifo")),
        }
        await self.host.backend.blockdev_reopen([options])

    # ---- parts

    def legs(self) -> list[str]:
        return [child.node.name for child in self.node.children.values()]

    async def more(self, rounds: int = 15) -> None:
        wanted = self.rounds + rounds
        await self.host.until(lambda: self.rounds >= wanted or self.task.done(), 30)
        if self.task.done():
            self.task.result()

    task: asyncio.Task[None]


@pytest.mark.parametrize("seed", range(tries(4)))
def test_all_of_it(seed: int) -> None:
    async def test(host: Host) -> None:
        kinds = random.Random(seed).choices(KINDS, k=3)
        print(kinds)
        node = await quorum_of(host, kinds)
        await host.export("q")
        story = Story(host, node, seed, await all_the_same(host, node))
        async with host.device() as device:
            story.task = asyncio.create_task(story.guest(device))
            events = [
                story.a_leg_fails,
                story.another_leg,
                story.a_snapshot,
                story.other_options,
                story.a_scrub,
            ]
            try:
                for _ in range(2):
                    for event in story.random.sample(events, len(events)):
                        print(event.__name__)
                        await event()
                        await story.more()
            finally:
                story.over = True
                await story.task
            await device.flush()
        assert await all_the_same(host, node) == story.data
        assert host.named("QUORUM_FAILURE") == []
        assert all("error" in report for report in host.named("QUORUM_REPORT_BAD"))

    run(test)
