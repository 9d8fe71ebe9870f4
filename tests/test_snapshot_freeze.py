# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's file systems are frozen for a snapshot, and thawed whatever happens."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cow_driver import Cow
from frontend import listens
from graph_changes import act, transaction
from guest_agent_peer import GuestAgentPeer
from in_process import Host, refused, with_host

from vhostblk.snapshot import freeze
from vhostblk.snapshot.guest_agent import GuestAgent

Test = Callable[[Host, GuestAgentPeer], Awaitable[None]]


def with_agent(test: Test) -> None:
    async def run(host: Host) -> None:
        async with GuestAgentPeer(host.path("ga.sock")) as peer:
            await one_disk(host)
            await test(host, peer)

    with_host(run, Cow)


async def one_disk(host: Host) -> None:
    await host.add("file", "f", filename=host.file("disk.img"))
    await host.export("f")


async def snapshot(host: Host, **arguments: Any) -> dict[str, Any]:
    given = {"device": "e", "format": "cow", "guest_agent": host.path("ga.sock"), **arguments}
    answer = await act(host, "blockdev-snapshot-sync", **given)
    return {**answer, **answer["results"][0]}


def is_covered(host: Host) -> bool:
    return host.backend.graph.backend("e").root.name != "f"


def test_frozen_in_the_pause_and_thawed_after_it() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        in_the_pause = []

        async def look() -> None:
            in_the_pause.append(peer.frozen)

        host.backend.graph.on_switched = look
        result = await snapshot(host)
        assert in_the_pause == [True] and not peer.frozen and is_covered(host)
        assert peer.commands == [
            "guest-sync-delimited",
            "guest-fsfreeze-freeze",
            "guest-fsfreeze-thaw",
        ]
        report = result["freeze"]
        assert report["filesystems"] == 2 and report["frozen-us"] >= result["pause-us"]
        assert "error" not in report

    with_agent(test)


def test_several_disks_of_one_guest() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        await host.add("file", "f2", filename=host.file("disk2.img"))
        await host.export("f2", "e2")
        actions = [
            (
                "blockdev-snapshot-sync",
                {"device": name, "format": "cow", "guest-agent": peer.path},
            )
            for name in ("e", "e2")
        ]
        answer = await transaction(host, *actions)
        assert peer.count("freeze") == peer.count("thaw") == 1
        assert all(entry["freeze"]["filesystems"] == 2 for entry in answer["results"])

    with_agent(test)


def test_what_another_client_left_is_skipped() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.noise = b'{"return": 1}\n{"retu\xff{"return": 77}\n'
        await snapshot(host)
        assert is_covered(host) and not peer.frozen

    with_agent(test)


def test_a_guest_that_is_frozen_already_is_not_thawed() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.frozen = True
        with refused("the agent refuses to freeze", "frozen state", "no snapshot was made"):
            await snapshot(host)
        assert peer.frozen and not is_covered(host) and peer.count("thaw") == 0

    with_agent(test)


def test_an_agent_that_refuses() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.refuse = "failed to freeze /: Operation not permitted"
        with refused("Operation not permitted"):
            await snapshot(host)
        assert not is_covered(host)
        assert sorted(os.listdir(host.directory)) == ["disk.img", "e.sock", "ga.sock"]

    with_agent(test)


def test_a_freeze_that_comes_too_late_is_undone() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.freeze_seconds = 1.3
        with refused("no answer within 1 seconds", "freeze-timeout"):
            await snapshot(host, freeze_timeout=1)
        assert peer.count("freeze") == 1 and not peer.frozen and peer.count("thaw") >= 1
        assert not is_covered(host)
        peer.freeze_seconds = 0
        await snapshot(host)
        assert is_covered(host) and not peer.frozen

    with_agent(test)


def test_an_agent_that_hangs_up_after_freezing() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.hang_up_after = ["guest-fsfreeze-freeze"]
        with refused("socket was closed"):
            await snapshot(host)
        assert peer.count("freeze") == 1 and not peer.frozen and not is_covered(host)

    with_agent(test)


def test_thawing_is_tried_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeze, "THAW_INTERVAL", 0.01)

    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.hang_up_after = ["guest-fsfreeze-thaw", "guest-sync-delimited"]
        with refused("socket was closed"):
            await snapshot(host)  # it hangs up at once
        peer.hang_up_after = ["guest-fsfreeze-thaw"] * 3
        result = await snapshot(host)
        assert is_covered(host) and not peer.frozen and peer.count("thaw") == 4
        assert "error" not in result["freeze"]

    with_agent(test)


def test_the_answer_does_not_wait_for_ever_for_the_thaw(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(freeze, "THAW_INTERVAL", 0.02)
    monkeypatch.setattr(freeze, "THAW_ATTEMPT", 0.05)

    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.hang_up_after = ["guest-fsfreeze-thaw"] * 40
        thawed = asyncio.Event()
        execute = peer._execute

        async def stuck(message: dict[str, Any]) -> dict[str, Any]:
            if message["execute"] == "guest-fsfreeze-thaw" and not thawed.is_set():
                peer.commands.append("in vain")
                return {}
            return await execute(message)

        peer._execute = stuck  # type: ignore[method-assign]
        result = await snapshot(host)
        assert is_covered(host) and peer.frozen
        assert "not thawed yet" in result["freeze"]["error"]
        assert "fsfreeze -u" in caplog.text
        thawed.set()
        await host.until(lambda: not peer.frozen)

    with_agent(test)


def test_thawed_when_the_snapshot_fails() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        action = {"device": "e", "format": "cow", "guest-agent": peer.path}
        with refused("Transaction aborted"):
            await transaction(host, ("blockdev-snapshot-sync", action), ("abort", {}))
        assert peer.count("freeze") == 1 and not peer.frozen and not is_covered(host)

    with_agent(test)


def test_thawed_when_the_client_goes_away() -> None:
    async def test(host: Host, peer: GuestAgentPeer) -> None:
        peer.freeze_seconds = 0.2
        task = asyncio.create_task(snapshot(host))
        await host.until(lambda: peer.count("freeze") == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not peer.frozen and peer.count("thaw") == 1

    with_agent(test)


def test_without_an_agent() -> None:
    async def test(host: Host) -> None:
        await one_disk(host)
        with refused("Guest agent", "No such file or directory", "no snapshot was made"):
            await snapshot(host)
        assert not is_covered(host)

    with_host(test, Cow)


@pytest.mark.skipif(shutil.which("qemu-ga") is None, reason="needs qemu-ga")
def test_with_the_real_agent() -> None:
    """qemu-ga itself, without the rights to freeze anything of this machine."""

    async def test(host: Host) -> None:
        await one_disk(host)
        os.chmod(host.directory, 0o777)
        path = host.path("ga.sock")
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            options = {"user": 65534, "group": 65534, "extra_groups": []}
        program = subprocess.Popen(
            ["qemu-ga", "-m", "unix-listen", "-p", path, "-t", str(host.directory)],
            stderr=subprocess.PIPE,
            **options,
        )
        try:
            await host.until(lambda: listens(path))
            agent = await GuestAgent.connect(path)
            assert await agent.execute("guest-fsfreeze-status") == "thawed"
            agent.close()
            try:
                result = await snapshot(host)
            except Exception as error:
                assert "the agent refuses to freeze: failed to" in str(error)
                assert not is_covered(host)
            else:
                assert result["freeze"]["filesystems"] == 0 and is_covered(host)
            agent = await GuestAgent.connect(path)
            assert await agent.execute("guest-fsfreeze-status") == "thawed"
            agent.close()
        finally:
            program.terminate()
            program.communicate()

    with_host(test, Cow)
