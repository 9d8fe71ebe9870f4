# SPDX-License-Identifier: GPL-2.0-or-later
"""Exports with limits of their own: members of a throttle-group as nodes are."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from frontend import Daemon, Device, Qmp, Type
from frontend import vhostblk as serve
from in_process import MIB, Host, refused, with_host
from test_throttle import SLOW, disk, done, group, limit, queued, writes


def described(host: Host, id: str) -> dict[str, Any]:
    [entry] = [e for e in host.backend.query_block_exports() if e["id"] == id]
    return entry


async def move(host: Host, id: str, group: str | None) -> None:
    await host.backend.block_export_set_throttle_group(id, group)


async def exported(host: Host, id: str, **options: Any) -> None:
    """A disk of its own, without a filter."""
    await host.null(f"null-{id}")
    await host.export(f"null-{id}", id, **options)


def test_two_exports_and_a_node_share_one_group() -> None:
    """None of them starves, and all of them together get no more than the group grants."""

    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await exported(host, "a", throttle_group="g")
        await exported(host, "b", throttle_group="g")
        await disk(host, "c")
        assert made.users == ["export 'a'", "export 'b'", "node 'c'"]
        assert described(host, "a")["throttle-group"] == "g"
        assert "throttle-group" not in described(host, "c")
        async with host.device("a") as a, host.device("b") as b, host.device("c") as c:
            many = writes(a, 40)
            await host.until(lambda: queued(made) >= 35)
            waiting = queued(made)
            few, others = writes(b, 2), writes(c, 2)
            await host.until(lambda: queued(made) == waiting + 4)
            before = done(many, a)
            await limit(host, iops_total=20)
            await b.wait(*few)
            await c.wait(*others)
            await limit(host, iops_total=SLOW)
            assert done(many, a) - before <= 20
            await limit(host, iops_total=0)
            await a.wait(*many)
            statistics = made.statistics()["write"]
            assert (statistics["requests"], statistics["bytes"]) == (44, 44 * 512)
            assert statistics["waited"] >= 38
        for id in "ab":
            await host.backend.block_export_del(id, "hard")
        assert made.users == ["node 'c'"]
        assert made.statistics()["write"]["requests"] == 44  # what was done still counts

    with_host(test)


def test_another_group_while_requests_wait() -> None:
    async def test(host: Host) -> None:
        slow = await group(host, "slow", iops_total=SLOW)
        fast = await group(host, "fast")
        await exported(host, "e", throttle_group="slow")
        async with host.device("e") as guest:
            for to in ("fast", None):
                requests = writes(guest, 10)
                await host.until(lambda: queued(slow) >= 7)
                with refused('throttle-group "nowhere" not found'):
                    await move(host, "e", "nowhere")
                with refused("in use", "export 'e'"):
                    await host.backend.objects.delete("slow")
                assert queued(slow) >= 7
                await move(host, "e", to)
                await guest.wait(*requests, *writes(guest, 20))
                assert described(host, "e").get("throttle-group") == to
                assert slow.users == []
                assert fast.users == (["export 'e'"] if to else [])
                await move(host, "e", "slow")
            with refused("Export 'x' is not found"):
                await move(host, "x", None)
            await move(host, "e", None)
        assert fast.statistics()["write"]["requests"] == 20
        await host.backend.objects.delete("slow")
        await host.backend.objects.delete("fast")

    with_host(test)


def test_changes_of_the_tree_and_a_guest_that_stops_do_not_wait() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await exported(host, "e", throttle_group="g")
        async with host.device("e") as guest:
            requests = writes(guest, 10)
            await host.until(lambda: queued(made) >= 7)
            filter = {"driver": "raw", "node-name": "r"}
            await host.backend.transaction(
                [("block-filter-insert", {"export-id": "e", "filter": filter})]
            )
            await guest.wait(*requests)
            # It is above the new root, too, and below nothing has changed.
            requests = writes(guest, 10)
            await host.until(lambda: queued(made) >= 7)
            assert described(host, "e")["node-name"] == "r"
            await guest.stop()
            assert done(requests, guest) == 10

    with_host(test)


def test_it_ends_while_requests_wait() -> None:
    async def test(host: Host) -> None:
        made = await group(host, iops_total=SLOW)
        await exported(host, "e", throttle_group="g")
        async with host.device("e") as guest:
            writes(guest, 30)
            await host.until(lambda: queued(made) >= 25)
            await host.backend.block_export_del("e", "hard")
        assert queued(made) == 0
        assert made.users == []
        with refused('throttle-group "no" not found', "did you mean"):
            await group(host, "now")
            await host.export("null-e", "f", throttle_group="no")
        with refused("f.sock"):
            await host.export(
                "null-e", "f", throttle_group="g", addr={"type": "unix", "path": "/no/f.sock"}
            )
        assert made.users == []

    with_host(test)


@pytest.mark.parametrize("limits", [{"iops_total": 1000}, {"bps_total": 500_000}])
def test_many_threads(limits: dict[str, int]) -> None:
    """Two exports with five queues on three threads; groups come and go."""

    async def test(host: Host) -> None:
        for name in ("one", "two", "three"):
            await host.backend.objects.add({"qom-type": "iothread", "id": name})
        made = await group(host, **limits)
        await exported(host, "a", throttle_group="g", iothread=["one", "two"], num_queues=4)
        await exported(host, "b", throttle_group="g", iothread=["three"])
        async with host.device("a", queues=4) as first, host.device("b", queue_size=256) as second:
            for turn in range(6):
                requests = [request for queue in range(4) for request in writes(first, 30, queue)]
                others = writes(second, 60)
                if turn % 2:
                    await move(host, "a", None)
                    await move(host, "a", "g")
                await first.wait(*requests)
                await second.wait(*others)
        statistics = made.statistics()["write"]
        assert statistics["queued"] == 0
        assert statistics["waited"] > 0

    with_host(test)


def test_the_command_line_and_a_kill() -> None:
    """`--export …,throttle-group=`, the QMP command, and the state file."""
    words = ("--state", "{dir}/state", "--control", "{dir}/q.sock")
    address = "addr.type=unix,addr.path={dir}/e.sock"
    with serve(
        *("--object", "throttle-group,id=g,limits.bps-write=1"),
        *("--object", "throttle-group,id=h,limits.iops-total=5000"),
        *("--blockdev", "raw,node-name=n,file.driver=file,file.filename={dir}/disk.img"),
        *("--export", f"vhost-user-blk,id=e,node-name=n,{address},writable=on,throttle-group=g"),
        *words,
        files={"disk.img": MIB},
    ) as daemon:
        with Qmp(daemon.socket("q")) as qmp, Device(daemon.socket("e")) as device:
            [of] = qmp.command("query-block-exports")
            assert of["throttle-group"] == "g"
            device.write(0, b"x" * 512)  # leaves a debt
            late = device.submit(Type.OUT, 0, b"y" * 512)
            change = {"throttle-group": "h"}
            qmp.command("block-export-set-throttle-group", id="e", **change)
            device.wait(late)
            daemon.process.kill()
            daemon.process.wait()
        command = [sys.executable, "-m", "vhostblk", "serve"]
        command += [word.replace("{dir}", str(daemon.directory)) for word in words]
        again = Daemon(command, daemon.directory)
        try:
            again.wait_line("vhostblk: ready")
            with Qmp(again.socket("q")) as qmp:
                users = {e["id"]: e["users"] for e in qmp.command("query-throttle-groups")}
                assert users == {"g": [], "h": ["export 'e'"]}
                with Device(again.socket("e")) as device:
                    assert device.read(0, 512) == b"y" * 512
                qmp.command("block-export-set-throttle-group", id="e")
                [of] = qmp.command("query-block-exports")
                assert "throttle-group" not in of
        finally:
            again.close()
