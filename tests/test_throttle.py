# SPDX-License-Identifier: GPL-2.0-or-later
"""throttle: who waits for what, and who does not have to any more."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash.tools import plain_environment
from frontend import Daemon, Device, Qmp, Request, Type
from frontend import vhostblk as serve
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import MIB, Guest, Host, refused, with_host
from thoroughness import tries

from vhostblk.engine.throttle import DIRECTIONS
from vhostblk.objects.throttle_group import VALUE_MAX, ThrottleGroup, ThrottleGroupOptions
from vhostblk.schema import VhostblkError, validate

SLOW = 1  # operations a second: nothing that waits for its turn gets it while a test runs


async def group(host: Host, id: str = "g", **limits: int) -> ThrottleGroup:
    given = {name.replace("_", "-"): value for name, value in limits.items()}
    made = await host.backend.objects.add({"qom-type": "throttle-group", "id": id, "limits": given})
    assert isinstance(made, ThrottleGroup)
    return made


async def limit(host: Host, id: str = "g", **limits: int) -> None:
    given = {name.replace("_", "-"): value for name, value in limits.items()}
    await host.backend.objects.qom_set(f"/objects/{id}", "limits", given)


async def disk(host: Host, name: str = "t", group: str = "g", **export: Any) -> None:
    await host.null(f"null-{name}")
    await host.add("throttle", name, file=f"null-{name}", throttle_group=group)
    await host.export(name, name, **export)


def queued(of: ThrottleGroup) -> int:
    return sum(of.statistics()[name]["queued"] for name in DIRECTIONS)


def arrived(at: ThrottleGroup) -> int:
    """Requests that have passed, or wait."""
    return queued(at) + sum(at.statistics()[name]["requests"] for name in DIRECTIONS)


def done(requests: list[Request], guest: Guest) -> int:
    guest.device.reap()
    return sum(request.done for request in requests)


def writes(guest: Guest, count: int, queue: int = 0) -> list[Request]:
    return [
        guest.device.submit(Type.OUT, number, bytes(512), queue=queue) for number in range(count)
    ]


# ---- what waits


def test_no_limits() -> None:
    async def test(host: Host) -> None:
        made = await group(host)
        await disk(host)
        async with host.device("t") as guest:
            requests = writes(guest, 40)
            await guest.wait(*requests)
            await guest.read(0, 4096)
        statistics = made.statistics()
        assert statistics["write"] == {
            "requests": 40,
            "bytes": 40 * 512,
            "queued": 0,
            "waited": 0,
            "waited-ns": 0,
        }
        assert (statistics["read"]["requests"], statistics["read"]["bytes"]) == (1, 4096)

    with_host(test)


def test_what_is_too_much_waits_and_a_new_limit_lets_it_go() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await disk(host)
        async with host.device("t") as guest:
            requests = writes(guest, 20)
            await host.until(lambda: queued(made) == 19)
            assert done(requests, guest) == 1
            await limit(host, iops_total=100_000)
            await guest.wait(*requests)
        statistics = made.statistics()["write"]
        assert statistics["queued"] == 0
        assert statistics["waited"] == 19
        assert statistics["waited-ns"] > 0
        assert statistics["requests"] == 20

    with_host(test)


@pytest.mark.parametrize("limits", [{"bps_write": 4096}, {"iops_write": SLOW, "iops_size": 512}])
def test_each_operation_counts_as_what_it_is(limits: dict[str, int]) -> None:
    """Discards and zero writes as writes, by their length; reads and flushes not at all."""

    async def test(host: Host) -> None:
        made = await group(host, **limits)
        await disk(host)
        async with host.device("t") as guest:
            await guest.discard((0, MIB // 2))  # passes, and leaves a debt of minutes
            late = guest.device.prepare(Type.OUT, 0, bytes(512))
            guest.device.publish(late)
            await host.until(lambda: queued(made) == 1)
            for _ in range(5):
                await guest.read(0, 65536)
                await guest.flush()
            assert queued(made) == 1
            assert not done([late], guest)
            await limit(host, **dict.fromkeys([*limits], 0))
            await guest.wait(late)
            await limit(host, **limits)
            # Nothing is remembered of what passed without limits.
            await guest.write_zeroes(0, MIB // 2)
            late = guest.device.submit(Type.OUT, 0, bytes(512))
            await host.until(lambda: queued(made) == 1)
            await limit(host, **dict.fromkeys([*limits], 0))
            await guest.wait(late)

    with_host(test)


def test_flushes_have_a_limit_of_their_own() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW, iops_flush=0)
        await disk(host)
        async with host.device("t") as guest:
            for _ in range(30):
                await guest.flush()
            await limit(host, iops_total=0, iops_flush=SLOW)
            requests = [guest.device.submit(Type.FLUSH) for _ in range(4)]
            await host.until(lambda: made.statistics()["flush"]["queued"] >= 2)
            for _ in range(30):
                await guest.write(0, bytes(512))
            await limit(host, iops_flush=0)
            await guest.wait(*requests)

    with_host(test)


def test_a_burst() -> None:
    """iops-total-max for iops-total-max-length seconds at once, a tenth of a second's at a time."""

    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW, iops_total_max=1000, iops_total_max_length=1)
        await disk(host)
        async with host.device("t") as guest:
            for _ in range(10):
                await guest.wait(*writes(guest, 40))
            assert made.statistics()["write"]["waited"] == 0

    with_host(test)


def test_waiting_ends_by_itself() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=200)
        await disk(host)
        async with host.device("t") as guest:
            begin = time.monotonic()
            requests = writes(guest, 42)
            await guest.wait(*requests)
            # 20 fit into the bucket; no upper bound, the machine may be busy.
            assert time.monotonic() - begin >= 0.1
            assert made.statistics()["write"]["waited"] > 0

    with_host(test)


# ---- who shares


def test_members_take_turns() -> None:
    """Two requests of one disk do not wait for thirty of another that came before."""

    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await disk(host, "a")
        await disk(host, "b")
        async with host.device("a") as first, host.device("b") as second:
            many = writes(first, 40)
            await host.until(lambda: queued(made) >= 35)
            waiting = queued(made)
            few = writes(second, 2)
            await host.until(lambda: queued(made) == waiting + 2)
            before = done(many, first)
            await limit(host, iops_total=20)
            await second.wait(*few)
            await limit(host, iops_total=SLOW)
            # One or two of the others had their turn before each, and some after the last until
            # we looked.
            assert done(many, first) - before <= 20
            await limit(host, iops_total=0)
            await first.wait(*many)

    with_host(test)


@pytest.mark.parametrize("limits", [{"iops_total": 1000}, {"bps_total": 500_000}])
def test_many_threads(limits: dict[str, int]) -> None:
    """Four queues on two threads, and another disk on a third; nothing is lost or stuck."""

    async def test(host: Host) -> None:
        for name in ("one", "two", "three"):
            await host.backend.objects.add({"qom-type": "iothread", "id": name})
        made = await group(host, **limits)
        await disk(host, "a", iothread=["one", "two"], num_queues=4)
        await disk(host, "b", iothread=["three"])
        async with host.device("a", queues=4) as first, host.device("b", queue_size=256) as second:
            for turn in range(8):
                requests = [request for queue in range(4) for request in writes(first, 30, queue)]
                others = writes(second, 60)
                if turn % 2:
                    await limit(host, iops_write=0, iops_total=0, bps_total=0)
                    await limit(host, **limits)
                await first.wait(*requests)
                await second.wait(*others)
        statistics = made.statistics()["write"]
        assert statistics["queued"] == 0
        assert statistics["requests"] == 8 * 180
        assert statistics["waited"] > 0

    with_host(test)


def test_groups_in_a_chain() -> None:
    """A disk's own limit above one that it shares."""

    async def test(host: Host) -> None:
        shared = await group(host, "shared", iops_total=SLOW)
        own = await group(host, "own")
        await host.null("null")
        await host.add("throttle", "low", file="null", throttle_group="shared")
        await host.add("throttle", "high", file="low", throttle_group="own")
        await host.export("high", "t")
        async with host.device("t") as guest:
            requests = writes(guest, 10)
            await host.until(lambda: queued(shared) >= 7)
            assert queued(own) == 0
            await limit(host, "own", iops_total=SLOW)
            more = writes(guest, 10)
            await host.until(lambda: queued(own) >= 7)
            await limit(host, "own", iops_total=0)
            await host.until(lambda: queued(shared) >= 16)
            await limit(host, "shared", iops_total=0)
            await guest.wait(*requests, *more)

    with_host(test)


# ---- changes while requests wait


def test_a_drained_section_waits_for_nobody() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await disk(host)
        async with host.device("t") as guest:
            requests = writes(guest, 30)
            await host.until(lambda: queued(made) >= 25)
            async with host.backend.graph.drained([host.backend.graph.node("t")]):
                assert queued(made) == 0
            await guest.wait(*requests)
            # What passed has been counted.
            last = writes(guest, 1)
            await host.until(lambda: queued(made) == 1)
            await limit(host, iops_total=0)
            await guest.wait(*last)

    with_host(test)


@pytest.mark.parametrize("drained", ["top", "t", "null"])
@pytest.mark.parametrize("exported", [True, False])
def test_background_work_does_not_hold_up_a_drained_section(exported: bool, drained: str) -> None:
    """What a job has under way passes, too, whether or not a drive is above."""

    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await host.null("null")
        await host.add("throttle", "t", file="null", throttle_group="g")
        await host.add("raw", "top", file="t")
        if exported:
            await host.export("top")
        graph = host.backend.graph

        async def step() -> None:
            async with graph.working(graph.node("top")):
                await asyncio.gather(*(host.read("top", n * 512, 512) for n in range(15)))

        work = asyncio.ensure_future(step())
        await host.until(lambda: queued(made) >= 12)
        async with graph.drained([graph.node(drained)]):
            assert work.done()
        await work
        # Afterwards limits hold again.
        late = asyncio.ensure_future(host.read("top", 0, 512))
        await host.until(lambda: queued(made) == 1)
        await limit(host, iops_total=0)
        await late

    with_host(test)


def test_limits_survive_a_kill() -> None:
    """Changed limits, a filter and its group are there after kill -9; and requests that waited."""
    words = ("--state", "{dir}/state", "--control", "{dir}/q.sock")
    tree = (
        *("--object", "throttle-group,id=g,limits.iops-total=100,limits.iops-total-max=200"),
        *("--object", "throttle-group,id=own"),
        *("--blockdev", "raw,node-name=n,file.driver=file,file.filename={dir}/disk.img"),
        *("--blockdev", "throttle,node-name=low,throttle-group=g,file=n"),
        "--export",
        "vhost-user-blk,id=e,node-name=low,addr.type=unix,addr.path={dir}/e.sock,writable=on",
    )

    def set_limits(qmp: Qmp, id: str, **limits: int) -> None:
        given = {name.replace("_", "-"): value for name, value in limits.items()}
        qmp.command("qom-set", path=f"/objects/{id}", property="limits", value=given)

    def all_of(qmp: Qmp) -> dict[str, Any]:
        return {
            entry["id"]: {name: value for name, value in entry["limits"].items() if value > 1}
            for entry in qmp.command("query-throttle-groups")
        }

    expected = {"g": {"iops-total": 5000, "iops-total-max": 9000}, "own": {"bps-write": 512}}
    with serve(*tree, *words, files={"disk.img": MIB}) as daemon:
        with Qmp(daemon.socket("q")) as qmp:
            set_limits(qmp, "g", iops_total=5000, iops_total_max=9000)
            set_limits(qmp, "own", bps_write=512)
            filter = {"driver": "throttle", "node-name": "high", "throttle-group": "own"}
            qmp.command("block-filter-insert", **{"export-id": "e", "filter": filter})
            assert all_of(qmp) == expected
            with Device(daemon.socket("e")) as device:
                requests = [device.submit(Type.OUT, n, b"x" * 512) for n in range(10)]
                end = time.monotonic() + 30
                while _queued(qmp, "own") < 8:
                    assert time.monotonic() < end
                    time.sleep(0.01)
                daemon.process.kill()
                daemon.process.wait()
                device.reap()
                assert not all(request.done for request in requests)
        command = [sys.executable, "-m", "vhostblk", "serve"]
        command += [word.replace("{dir}", str(daemon.directory)) for word in words]
        again = Daemon(command, daemon.directory)
        try:
            again.wait_line("vhostblk: ready")
            with Qmp(again.socket("q")) as qmp:
                assert all_of(qmp) == expected
                users = {e["id"]: e["users"] for e in qmp.command("query-throttle-groups")}
                assert users == {"g": ["node 'low'"], "own": ["node 'high'"]}
                set_limits(qmp, "own", bps_write=0)
            with Device(again.socket("e")) as device:
                device.write(0, b"y" * 512)
                assert device.read(0, 512) == b"y" * 512
        finally:
            again.close()


def _queued(qmp: Qmp, id: str) -> int:
    [of] = [e for e in qmp.command("query-throttle-groups") if e["id"] == id]
    return sum(entry["queued"] for entry in of["statistics"].values())


def test_a_guest_that_stops_gets_what_it_asked_for() -> None:
    """GET_VRING_BASE is answered when all is done; the limits do not hold it up."""

    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await disk(host)
        async with host.device("t") as guest:
            requests = writes(guest, 30)
            await host.until(lambda: queued(made) >= 25)
            await guest.stop()
            assert done(requests, guest) == 30

    with_host(test)


def test_a_node_moves_to_another_group() -> None:
    async def test(host: Host) -> None:
        slow = await group(host, "slow", iops_total=SLOW)
        await group(host, "fast")
        await disk(host, group="slow")
        with refused("in use", "slow"):
            await host.backend.objects.delete("slow")
        async with host.device("t") as guest:
            requests = writes(guest, 10)
            await host.until(lambda: queued(slow) >= 7)
            options = {"driver": "throttle", "node-name": "t", "file": "null-t"}
            with refused('throttle-group "nowhere" not found'):
                await host.backend.blockdev_reopen([{**options, "throttle-group": "nowhere"}])
            assert queued(slow) >= 7
            await host.backend.blockdev_reopen([{**options, "throttle-group": "fast"}])
            await guest.wait(*requests, *writes(guest, 20))
            await host.backend.objects.delete("slow")
            with refused("in use"):
                await host.backend.objects.delete("fast")

    with_host(test)


def test_each_group_counts_what_was_done_in_it() -> None:
    async def test(host: Host) -> None:
        groups = [await group(host, "one"), await group(host, "two")]

        def counted() -> list[tuple[int, int]]:
            all_of = [made.statistics()["write"] for made in groups]
            return [(entry["requests"], entry["bytes"]) for entry in all_of]

        async def move(to: str) -> None:
            options = {"driver": "throttle", "node-name": "b", "file": "null-b"}
            await host.backend.blockdev_reopen([{**options, "throttle-group": to}])

        await disk(host, "a", "one")
        await disk(host, "b", "one")
        async with host.device("a") as first, host.device("b") as second:
            await first.wait(*writes(first, 10))
            await second.wait(*writes(second, 10))
            assert counted() == [(20, 20 * 512), (0, 0)]
            await move("two")
            assert counted() == [(20, 20 * 512), (0, 0)]
            await first.wait(*writes(first, 3))
            await second.wait(*writes(second, 5))
            assert counted() == [(23, 23 * 512), (5, 5 * 512)]
            await move("one")
            await second.wait(*writes(second, 2))
            assert counted() == [(25, 25 * 512), (5, 5 * 512)]
        await host.backend.block_export_del("b", "hard")  # the front-end may be noticed to go later
        await host.backend.blockdev_del("b")
        assert counted() == [(25, 25 * 512), (5, 5 * 512)]

    with_host(test)


def test_a_lower_limit_after_a_burst_does_not_stop_the_guest() -> None:
    """What was permitted is not paid for at the new rate: that would take half an hour."""

    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW, iops_total_max=20_000)
        await disk(host)
        async with host.device("t") as guest:
            for _ in range(50):
                await guest.wait(*writes(guest, 40))
            assert made.statistics()["write"]["waited"] == 0
            await limit(host, iops_total=10, iops_total_max=0)
            await guest.wait(*writes(guest, 3))  # within the 20 s that a device waits

    with_host(test)


def test_it_comes_and_goes_above_a_disk_in_use() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await host.null("null")
        await host.export("null", "t")
        async with host.device("t") as guest:
            for turn in range(1, 4):
                await host.backend.transaction(
                    [
                        (
                            "block-filter-insert",
                            {
                                "above": "null",
                                "filter": {
                                    "driver": "throttle",
                                    "node-name": "t",
                                    "throttle-group": "g",
                                },
                            },
                        )
                    ]
                )
                requests = writes(guest, 10)
                # What is still in the ring when the filter goes never comes by it.
                await host.until(lambda all=10 * turn: arrived(made) == all)
                await host.backend.transaction([("block-filter-remove", {"node-name": "t"})])
                await guest.wait(*requests)
        assert made.statistics()["write"]["requests"] == 30

    with_host(test)


def test_properties() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=100, iops_total_max=200)
        limits = host.backend.objects.qom_get("/objects/g", "limits")
        assert (limits["iops-total"], limits["iops-total-max"], limits["bps-read"]) == (100, 200, 0)
        await limit(host, bps_read=5)  # the others stay
        limits = host.backend.objects.qom_get("/objects/g", "limits")
        assert (limits["iops-total"], limits["iops-total-max"], limits["bps-read"]) == (100, 200, 5)
        with refused("iops-total-max (200) cannot be lower than iops-total (300)"):
            await limit(host, iops_total=300)
        assert made.options.limits.iops_total == 100
        await host.backend.objects.add(
            {"qom-type": "throttle-group", "id": "flat", "x-iops-read": "7", "x-bps-write": 9}
        )
        limits = host.backend.objects.qom_get("/objects/flat", "limits")
        assert (limits["iops-read"], limits["bps-write"]) == (7, 9)

    with_host(test)


# ---- what may be asked for: QEMU decides


@contextlib.contextmanager
def storage_daemon(directory: Path) -> Iterator[Qmp]:
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is not installed")
    socket = directory / "qmp"
    process = subprocess.Popen(
        [
            program,
            *("--chardev", f"socket,id=m,path={socket},server=on,wait=off"),
            *("--monitor", "chardev=m"),
            *("--pidfile", str(directory / "pid")),  # written when all else is ready
        ],
        env=plain_environment(),
    )
    try:
        end = time.monotonic() + 30
        while not (directory / "pid").exists() and time.monotonic() < end:
            time.sleep(0.01)
        with Qmp(str(socket)) as qmp:
            yield qmp
    finally:
        process.kill()
        process.wait()


_NAMES = [
    f"{unit}-{what}{suffix}"
    for unit in ("iops", "bps")
    for what in ("total", "read", "write")
    for suffix in ("", "-max", "-max-length")
]


def test_the_rules_are_qemus(tmp_path: Path) -> None:
    """What may be asked for at first, then changed, and what the limits are afterwards."""
    values = st.sampled_from([0, 1, 2, 10, 100, 10**6, VALUE_MAX, VALUE_MAX + 1])
    limits = st.dictionaries(st.sampled_from([*_NAMES[:6], *_NAMES[9:15], "iops-size"]), values)
    path = {"path": "/objects/g", "property": "limits"}
    with storage_daemon(tmp_path) as qmp:

        def theirs(name: str, **arguments: Any) -> str:
            try:
                qmp.command(name, **arguments)
                return ""
            except AssertionError as error:
                return str(error)

        def ours(limits: dict[str, int]) -> ThrottleGroupOptions | str:
            given = {"qom-type": "throttle-group", "id": "g", "limits": limits}
            try:
                return validate(ThrottleGroupOptions, given)
            except VhostblkError as error:
                return error.desc

        @settings(max_examples=tries(400), deadline=None)
        @given(limits, limits)
        def check(first: dict[str, int], then: dict[str, int]) -> None:
            new = {"qom-type": "throttle-group", "id": "g", "limits": first}
            refused, made = theirs("object-add", **new), ours(first)
            assert bool(refused) == isinstance(made, str), (refused, made)
            if isinstance(made, str):
                return
            refused = theirs("qom-set", **path, value=then)
            changed = ours({**made.limits.model_dump(by_alias=True), **then})
            there = qmp.command("qom-get", **path)
            qmp.command("object-del", id="g")
            assert bool(refused) == isinstance(changed, str), (refused, changed)
            valid = made if isinstance(changed, str) else changed
            mine = valid.limits.model_dump(by_alias=True)
            assert {name: mine[name] for name in there} == there

        check()


def test_all_of_qemus_limits_are_there(tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as qmp:
        qmp.command("object-add", **{"qom-type": "throttle-group"}, id="g")
        theirs = qmp.command("qom-get", path="/objects/g", property="limits")

    async def test(host: Host) -> None:
        await group(host)
        ours = host.backend.objects.qom_get("/objects/g", "limits")
        assert len(theirs) == 19
        assert {name: ours[name] for name in theirs} == theirs
        assert {name for name in ours if name not in theirs} == {
            "iops-flush",
            "iops-flush-max",
            "iops-flush-max-length",
        }
        await asyncio.sleep(0)

    with_host(test)
