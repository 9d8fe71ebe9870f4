# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum after a power cut or kill -9: legs may differ, and none of the versions is wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest
from frontend import Daemon, Device, Qmp
from in_process import MIB, Host
from quorum_legs import (
    BLOCK,
    Faulty,
    content,
    edit_states,
    leave_late,
    quorum,
    recorded,
    restart,
    run,
    states,
    until_states,
)
from test_quorum_kill import LEGS, directory, legs_equal, metadata, start

from vhostblk.jobs.quorum import start_scrub
from vhostblk.nodes.quorum.metadata import IN_USE, POWER_CUT, UNCLEAN, WHOLE, boot

__all__ = ["directory"]


def crash(host: Host, *, power_cut: bool) -> None:
    """What the metadata say if the process that has just been closed had not been."""

    def change(content: bytearray) -> None:
        (flags,) = struct.unpack_from("<I", content, 20)
        struct.pack_into("<I", content, 20, flags | IN_USE)
        if power_cut:
            content[:] = content.replace(boot().encode(), str(uuid.uuid4()).encode())

    edit_states(host, change)


def put(host: Host, offset: int, *versions: bytes) -> None:
    """What each leg has kept of a write."""
    legs = [leg for leg in LEGS if os.path.exists(host.path(leg))]
    for leg, version in zip(legs, versions, strict=False):
        with open(host.path(leg), "r+b") as file:
            file.seek(offset)
            file.write(version)


async def crashed(host: Host, *, power_cut: bool, **options: Any) -> Any:
    """Three versions in the first block, and a split in another one; the next process."""
    legs = options.pop("legs", LEGS)
    await quorum(host, legs)
    await host.write("q", 0, b"0" * MIB)
    await restart(host)
    crash(host, power_cut=power_cut)
    put(host, 512, b"1" * 512, b"2" * 512, b"3" * 512)
    put(host, BLOCK, b"4" * 512, b"5" * 512, b"5" * 512)
    Faulty.hangs.update(options.pop("hangs", {}))
    return await quorum(host, legs, **options)


async def no_jobs(host: Host) -> None:
    await host.until(lambda: not list(host.backend.jobs))


def flags(host: Host) -> int:
    return recorded(host).flags & ~WHOLE


def test_a_quorum_that_was_closed_is_believed() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        assert flags(host) == IN_USE
        assert not node.unclean
        await host.write("q", 0, b"1" * BLOCK)
        Faulty.seen.clear()
        await restart(host)
        # Before it said so the legs were flushed.
        assert [Faulty.seen[leg][-1][0] for leg in LEGS] == ["flush"] * 3
        assert struct.unpack_from("<I", Path(host.path("states")).read_bytes(), 20)[0] == WHOLE
        put(host, 0, b"2", b"3", b"4")
        node = await quorum(host)
        assert not node.unclean
        with pytest.raises(OSError):
            await host.read("q", 0, 4096)
        assert host.named("VHOSTBLK_QUORUM_UNCLEAN") == []

    run(test)


def test_a_flush_at_the_end_that_fails() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        Faulty.faults = {leg: {"flush": errno.EIO} for leg in LEGS}
        await restart(host)
        Faulty.faults.clear()
        node = await quorum(host)
        assert node.unclean

    run(test)


def test_that_it_is_in_use_is_on_the_disk_before_the_first_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(host: Host) -> None:
        synced: list[bytes] = []
        fsync = os.fsync

        def note(fd: int) -> None:
            fsync(fd)
            if os.path.isfile(f"/proc/self/fd/{fd}"):
                with open(f"/proc/self/fd/{fd}", "rb") as file:
                    synced.append(file.read(64))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", note)
            await quorum(host)
        assert struct.unpack_from("<I", synced[-1], 20)[0] == WHOLE | IN_USE

    run(test)


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("timeout", [0, 30000])
def test_a_read_without_majority_takes_one_version_for_good(power_cut: bool, timeout: int) -> None:
    async def test(host: Host) -> None:
        node = await crashed(host, power_cut=power_cut, auto_rebuild=False, leg_timeout=timeout)
        assert node.unclean
        assert host.named("VHOSTBLK_QUORUM_UNCLEAN") == [{"node-name": "q", "power-cut": power_cut}]
        [entry] = await host.command("query-quorum")
        assert entry["unclean"] is True
        assert await host.read("q", 512, 512) == b"1" * 512
        # All of them have it now, whoever leaves.
        for leg in LEGS:
            assert content(host, leg)[:4096] == b"0" * 512 + b"1" * 512 + b"0" * 3072
        # A split is decided, and then holds, too.
        assert await host.read("q", BLOCK, 4096) == b"5" * 512 + b"0" * 3584
        await host.until(lambda: content(host, "a")[BLOCK : BLOCK + 512] == b"5" * 512)
        assert host.named("QUORUM_FAILURE") == []

    run(test)


def test_a_power_cut_makes_a_scrub_begin() -> None:
    async def test(host: Host) -> None:
        node = await crashed(host, power_cut=True)
        await host.until(lambda: not node.unclean)
        assert flags(host) == IN_USE
        [found] = {content(host, leg) for leg in LEGS}
        assert found[512:1024] == b"1" * 512
        assert found[BLOCK : BLOCK + 512] == b"5" * 512
        # Each leg has been flushed, with what was written to it.
        assert all(Faulty.seen[leg][-1][0] == "flush" for leg in LEGS)
        assert host.named("QUORUM_FAILURE") == []
        await host.until(lambda: bool(host.named("BLOCK_JOB_COMPLETED")))
        assert "error" not in host.named("BLOCK_JOB_COMPLETED")[0]
        # What differs from here on is wrong.
        put(host, 0, b"2", b"3", b"4")
        with pytest.raises(OSError):
            await host.read("q", 0, 4096)

    run(test)


def test_a_scrub_that_has_not_come_to_its_end_begins_again() -> None:
    """In whatever order the next process ends, and the one after that."""

    async def test(host: Host) -> None:
        held = asyncio.Event()
        node = await crashed(host, power_cut=True, hangs={"b": held})
        await host.until(lambda: bool(list(host.backend.jobs)))
        [job] = list(host.backend.jobs)
        job.cancel()
        Faulty.hangs.clear()
        held.set()
        await no_jobs(host)
        await restart(host)
        flags_left = struct.unpack_from("<I", Path(host.path("states")).read_bytes(), 20)[0]
        assert flags_left & ~WHOLE == UNCLEAN | POWER_CUT
        put(host, MIB - 512, b"7" * 512, b"8" * 512, b"9" * 512)
        node = await quorum(host, read_only=True)
        assert await host.read("q", MIB - 512, 512) == b"7" * 512
        assert content(host, "b").endswith(b"8" * 512)
        assert list(host.backend.jobs) == []
        await restart(host)
        node = await quorum(host)
        await host.until(lambda: not node.unclean)
        assert len({content(host, leg) for leg in LEGS}) == 1

    run(test)


def test_late_writes_and_a_power_cut() -> None:
    """The table may have got to the disk at any time: what it says is true, or does no harm."""

    async def test(host: Host) -> None:
        await quorum(host, write_threshold=2)
        await host.write("q", 0, b"0" * MIB)
        await restart(host)
        crash(host, power_cut=True)
        put(host, 0, b"0" * 512, b"1" * 512, b"1" * 512)  # late on a
        put(host, BLOCK, b"2" * 512, b"0" * 512, b"2" * 512)  # that b had it has been lost
        # Something that all have got since, and flushed; and nonsense.
        leave_late(host, (0, 512, 0b001), (BLOCK, BLOCK + 512, 0b010),
                   (2 * BLOCK, 3 * BLOCK, 0b100), (MIB, 2 * MIB, 0b111),
                   (5 * BLOCK, 4 * BLOCK, 0b1111000))  # fmt: skip
        node = await quorum(host, write_threshold=2, auto_rebuild=False)
        assert states(node) == "iii"
        [found] = {content(host, leg) for leg in LEGS}
        assert found[:512] == b"1" * 512 and found[BLOCK : BLOCK + 512] == b"2" * 512
        assert found.count(b"0") == MIB - 1024
        assert node.unclean

    run(test)


def test_read_only_is_no_more() -> None:
    async def test(host: Host) -> None:
        node = await crashed(host, power_cut=True, read_only=True)
        assert flags(host) == UNCLEAN | POWER_CUT
        options = {"driver": "quorum", "node-name": "q", "children": list(LEGS),
                   "vote-threshold": 2, "metadata-file": host.path("states")}  # fmt: skip
        await host.backend.blockdev_reopen([options])
        assert flags(host) & IN_USE
        await host.until(lambda: not node.unclean)
        assert len({content(host, leg) for leg in LEGS}) == 1

    run(test)


def test_after_kill_9_only_who_is_asked_to_compares() -> None:
    async def test(host: Host) -> None:
        node = await crashed(host, power_cut=False)
        assert list(host.backend.jobs) == []
        async with host.backend.changing():
            job = start_scrub(host.backend, node, repair=False)
        await host.until(lambda: job.status.value == "null")
        assert (job.found, job.lost, job.settled) == (1, 4096, 0)
        assert node.unclean
        async with host.backend.changing():
            job = start_scrub(host.backend, node, repair=True)
        await host.until(lambda: job.status.value == "null")
        assert (job.found, job.lost, job.settled) == (1, 0, 4096)
        assert job.repaired == 3 * 4096
        assert not node.unclean

    run(test)


def test_blkverify_answers_and_writes_nothing() -> None:
    async def test(host: Host) -> None:
        node = await crashed(host, power_cut=True, legs="ab", blkverify=True)
        assert await host.read("q", 0, 4096) == content(host, "a")[:4096]
        assert content(host, "b")[512:1024] == b"2" * 512
        assert list(host.backend.jobs) == []
        assert node.unclean

    run(test)


def test_legs_that_do_not_vote_get_what_was_chosen() -> None:
    """One is out for another reason, in the same boot: it is not compared as a whole."""

    async def test(host: Host) -> None:
        await quorum(host)
        await host.write("q", 0, b"0" * MIB)
        Faulty.faults["c"] = {"write": errno.EIO}
        await host.write("q", 8 * BLOCK, b"6" * 512)
        Faulty.faults.clear()
        await restart(host)
        crash(host, power_cut=False)
        put(host, 0, b"1" * 512, b"2" * 512, b"3" * 512)
        node = await quorum(host, auto_rebuild=False)
        assert states(node) == "iis"
        assert await host.read("q", 0, 512) == b"1" * 512
        await host.command("quorum-rebuild", node_name="q", leg="c")
        await until_states(host, node, "iii")
        assert content(host, "a") == content(host, "b") == content(host, "c")

    run(test)


def test_too_few_legs_that_can_be_read_are_still_an_error() -> None:
    async def test(host: Host) -> None:
        node = await crashed(host, power_cut=False)
        Faulty.faults = {leg: {"read": errno.EIO} for leg in "ab"}
        with pytest.raises(OSError):
            await host.read("q", 0, 4096)
        assert states(node) == "iii"

    run(test)


def test_the_host_goes_down_under_a_guest(directory: Path) -> None:
    """A block that was overwritten and not flushed; each leg's disk has another version."""
    with start(directory) as daemon, Device(daemon.socket("e")) as device:
        device.write(0, b"0" * 4096)
        device.flush()
        for version in b"12":
            device.write(0, bytes([version]) * 4096)
        daemon.kill()
    for leg, version in zip(LEGS, b"012", strict=True):
        with open(directory / leg, "r+b") as file:
            file.write(bytes([version]) * 4096)
    path = metadata(directory)
    other = path.read_bytes().replace(boot().encode(), str(uuid.uuid4()).encode())
    path.write_bytes(other)
    # Killed while it compares them, too.
    with start(directory) as again:
        again.kill()
    with start(directory) as again, Device(again.socket("e")) as device:
        found = device.read(0, 4096)
        assert found in (b"0" * 4096, b"1" * 4096, b"2" * 4096)
        with Qmp(again.socket("q")) as qmp:
            wait_until_clean(again, qmp)
        assert device.read(0, 4096) == found
        again.terminate()
    assert legs_equal(directory)[:4096] == found


def wait_until_clean(daemon: Daemon, qmp: Qmp) -> None:
    daemon.wait_line("the legs are equal again")
    assert "unclean" not in qmp.command("query-quorum")[0]
