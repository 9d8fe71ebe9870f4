# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: whatever becomes of one leg, its storage or its server, the guest does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from crash.tools import plain_environment
from in_process import MIB, Host
from quorum_legs import BLOCK, content, recorded, restart, run, states, submit, until_states

from vhostblk.engine import OP_DISCARD
from vhostblk.engine.quorum import LEG_FAILED, LEG_WHOLE
from vhostblk.jobs.quorum import start_rebuild

SIZE = 4 * MIB


class Guest:
    """Writes and reads at random, and never gets an error or wrong data."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._random = random.Random(1)
        self.data = bytearray(SIZE)
        self._stop = asyncio.Event()
        self.rounds = 0

    async def run(self) -> None:
        chance = self._random
        while not self._stop.is_set():
            offset = chance.randrange(SIZE // 4096) * 4096
            length = min(SIZE - offset, 4096 * chance.randrange(1, 9))
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                await self._device.write(offset, data)
                self.data[offset : offset + length] = data
            else:
                found = await self._device.read(offset, length)
                assert found == self.data[offset : offset + length]
            if chance.random() < 0.05:
                await self._device.flush()
            self.rounds += 1

    async def more(self, host: Host, rounds: int = 50) -> None:
        """Until it has done some more."""
        wanted = self.rounds + rounds
        await host.until(lambda: self.rounds >= wanted or self.task.done(), 30)
        if self.task.done():
            self.task.result()

    async def end(self) -> None:
        self._stop.set()
        await self.task
        assert await self._device.read(0, SIZE) == self.data

    task: asyncio.Task[None]


@contextlib.asynccontextmanager
async def guest_of(host: Host) -> AsyncIterator[Guest]:
    await host.export("q")
    async with host.device() as device:
        guest = Guest(device)
        guest.task = asyncio.create_task(guest.run())
        try:
            yield guest
            await guest.end()
        finally:
            guest.task.cancel()
            await asyncio.wait([guest.task])


async def quorum(host: Host, third: str, **options: Any) -> Any:
    """Two files, and something else."""
    for leg in "ab":
        await host.add("file", leg, filename=host.file(leg, SIZE))
    await host.add("file", "c", filename=third)
    given = {"vote_threshold": 2, "metadata_file": host.path("states"), **options}
    return await host.add("quorum", "q", children=["a", "b", "c"], **given)


class FuseLeg:
    """A file that an NBD server has, through FUSE: two processes that can be killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.path = str(directory / "leg")
        command = ["nbdfuse", self.path, "--command", "nbdkit", "-s", "memory", str(SIZE)]
        self.process = subprocess.Popen(command, start_new_session=True, env=plain_environment())
        end = time.monotonic() + 20
        while not os.path.exists(self.path) or os.stat(self.path).st_size != SIZE:
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()
        subprocess.run(
            ["umount", "-l", str(self.directory)],
            check=False,
            capture_output=True,
            env=plain_environment(),
        )


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[FuseLeg]:
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("mounting FUSE needs root and /dev/fuse")
    if shutil.which("nbdfuse") is None or shutil.which("nbdkit") is None:
        pytest.skip("needs nbdfuse and nbdkit: scripts/setup --with=test")
    leg = FuseLeg(tmp_path / "mounted")
    yield leg
    leg.close()


def test_the_server_of_a_leg_is_killed(fuse: FuseLeg) -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, fuse.path)
        async with guest_of(host) as guest:
            await guest.more(host)
            assert states(node) == "iii"
            fuse.signal(signal.SIGKILL)
            await host.until(lambda: states(node) == "iif" or guest.task.done())
            # Whatever it had in memory; that is said a moment after its state.
            await host.until(lambda: node.describe_legs()[2]["missed-bytes"] == SIZE)
            await guest.more(host)
        assert content(host, "a") == content(host, "b")

    run(test)


def test_nobody_knows_what_fuse_makes_of_a_discard(fuse: FuseLeg) -> None:
    """It may be a TRIM, after which a server shows what it likes: so all legs keep the data."""

    async def test(host: Host) -> None:
        for leg, path in (("a", host.file("a", SIZE)), ("b", host.file("b", SIZE)),
                          ("c", fuse.path)):  # fmt: skip
            await host.add("file", leg, filename=path, discard="unmap")
        await host.add("quorum", "q", children=["a", "b", "c"], vote_threshold=2)
        data = random.Random(1).randbytes(SIZE)
        await host.write("q", 0, data)
        [info] = await host.command("query-quorum")
        assert ["discard-granularity" in leg for leg in info["legs"]] == [True, True, False]
        await submit(host, OP_DISCARD, 0, SIZE)
        assert {await host.read(leg, 0, SIZE) for leg in "abc"} == {data}

    run(test)


def test_what_a_server_had_in_memory_is_missing_with_the_state(fuse: FuseLeg) -> None:
    """The engine says so without Python: whoever looks, or is killed, at any moment."""

    async def test(host: Host) -> None:
        node = await quorum(host, fuse.path)
        await host.export("q")
        async with host.device() as device:
            await device.write(0, b"x" * BLOCK)
            fuse.signal(signal.SIGKILL)
            write = asyncio.create_task(device.write(BLOCK, b"y" * BLOCK))
            await asyncio.sleep(0)
            end = time.monotonic() + 20
            while states(node) != "iif" and time.monotonic() < end:
                time.sleep(0.001)  # the control thread does nothing else
            assert node.describe_legs()[2]["missed-bytes"] == SIZE
            assert recorded(host).legs[2].word == LEG_FAILED | LEG_WHOLE
            await write

    run(test)


def test_a_server_that_has_forgotten_is_not_believed_by_the_next_process(fuse: FuseLeg) -> None:
    """Same file, same boot: more is missing than what the leg is known to have missed."""

    async def test(host: Host) -> None:
        node = await quorum(host, fuse.path, auto_rebuild=False)
        await host.write("q", 0, random.Random(1).randbytes(SIZE))
        fuse.signal(signal.SIGKILL)
        await host.write("q", 0, b"x" * 512)
        assert states(node) == "iif"
        await restart(host)
        fuse.close()
        fuse.directory.rmdir()
        again = FuseLeg(fuse.directory)
        try:
            for leg in "ab":
                await host.add("file", leg, filename=host.path(leg))
            await host.add("file", "c", filename=again.path)
            node = await host.add("quorum", "q", children=["a", "b", "c"], vote_threshold=2,
                                  metadata_file=host.path("states"))  # fmt: skip
            await until_states(host, node, "iii")
            assert content(host, "a") == content(host, "b") == Path(again.path).read_bytes()
        finally:
            again.close()

    run(test)


def test_the_server_of_a_leg_is_killed_and_another_one_started(
    fuse: FuseLeg, tmp_path: Path
) -> None:
    """The new one has nothing of what the old one had in its memory."""

    async def test(host: Host) -> None:
        node = await quorum(host, fuse.path)
        again = FuseLeg(tmp_path / "again")
        try:
            async with guest_of(host) as guest:
                await guest.more(host)
                fuse.signal(signal.SIGKILL)
                await host.until(lambda: states(node) == "iif" or guest.task.done())
                await guest.more(host)
                await host.add("file", "d", filename=again.path)
                async with host.backend.changing(), host.backend.graph.change() as change:
                    change.set_child(node, "children.2", host.backend.graph.node("d"))
                await until_states(host, node, "iii")
                await guest.more(host)
            assert content(host, "a") == content(host, "b") == Path(again.path).read_bytes()
        finally:
            again.close()

    run(test)


def test_the_server_of_a_leg_stands_still(fuse: FuseLeg) -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, fuse.path, leg_timeout=1500)
        async with guest_of(host) as guest:
            await guest.more(host)
            fuse.signal(signal.SIGSTOP)
            await host.until(lambda: states(node) == "iif" or guest.task.done(), 20)
            await guest.more(host)
            assert node.legs[2].handle.strays
            fuse.signal(signal.SIGCONT)
            await host.until(lambda: node.legs[2].handle.strays == 0)
            # What came much too late has not spoilt anything that cannot be cured.
            async with host.backend.changing():
                start_rebuild(host.backend, node, node.leg("c"))
            await until_states(host, node, "iii")
            await guest.more(host)
        assert content(host, "a") == content(host, "b") == Path(fuse.path).read_bytes()

    run(test)


def test_the_file_of_a_leg_is_shortened() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, host.file("c", SIZE), rewrite_corrupted=True)
        async with guest_of(host) as guest:
            await guest.more(host)
            os.truncate(host.path("c"), 0)
            os.truncate(host.path("c"), SIZE)
            await guest.more(host, 200)
            assert host.named("QUORUM_REPORT_BAD")
            assert host.named("QUORUM_FAILURE") == []
            assert states(node) == "iii"

    run(test)


def test_the_file_of_a_leg_vanishes() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host, host.file("c", SIZE))
        async with guest_of(host) as guest:
            await guest.more(host)
            os.unlink(host.path("c"))
            await guest.more(host)
            # Another file, with whatever in it, is filled before it votes.
            Path(host.path("c")).write_bytes(os.urandom(SIZE))
            await host.add("file", "d", filename=host.path("c"))
            await host.backend.transaction(
                [
                    (
                        "blockdev-replace",
                        {
                            "parent-type": "driver",
                            "node-name": "q",
                            "child": "children.2",
                            "new-child": "d",
                        },
                    )
                ]
            )
            await host.until(lambda: bool(host.named("BLOCK_JOB_COMPLETED")), 20)
            await until_states(host, node, "iii")
            await guest.more(host)
        assert content(host, "a") == content(host, "b") == content(host, "c")

    run(test)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_the_disk_of_a_leg_is_full(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "none", mount],
        check=True,
        env=plain_environment(),
    )

    async def test(host: Host) -> None:
        with open(mount / "leg", "wb") as file:
            file.truncate(SIZE)
        node = await quorum(host, str(mount / "leg"))
        async with guest_of(host) as guest:
            await host.until(lambda: states(node) == "iif" or guest.task.done(), 30)
            await guest.more(host)
            assert "No space left" in node.describe_legs()[2]["reason"]
            subprocess.run(
                ["mount", "-o", f"remount,size={2 * SIZE}", mount],
                check=True,
                env=plain_environment(),
            )
            async with host.backend.changing():
                start_rebuild(host.backend, node, node.leg("c"))
            await until_states(host, node, "iii")
            await guest.more(host)
        assert content(host, "a") == content(host, "b") == (mount / "leg").read_bytes()

    try:
        run(test)
    finally:
        subprocess.run(["umount", "-l", mount], check=True, env=plain_environment())


def test_a_leg_of_qcow2_is_overwritten() -> None:
    async def test(host: Host) -> None:
        legs = []
        for leg in "abc":
            path = host.path(f"{leg}.qcow2")
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)],
                check=True,
                env=plain_environment(),
            )
            legs.append({"driver": "qcow2", "node-name": leg,
                         "file": {"driver": "file", "filename": path}})  # fmt: skip
        await host.add("quorum", "q", children=legs, vote_threshold=2, rewrite_corrupted=True)
        async with guest_of(host) as guest:
            await guest.more(host)
            with open(host.path("b.qcow2"), "r+b") as file:  # its data, and some of its tables
                file.seek(3 * BLOCK)
                file.write(os.urandom(8 * BLOCK))
            await guest.more(host, 200)
            assert host.named("QUORUM_FAILURE") == []

    run(test)
