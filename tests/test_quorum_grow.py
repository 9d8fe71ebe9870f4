# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum under an image: its legs become longer while guests write, one of them does not, or gets
it later. Whatever happens, a leg that votes has everything, up to the end of today."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cor_images import NEEDS_TOOLS, tools
from frontend import BlockError, Daemon, Device, Qmp
from in_process import Guest, Host
from quorum_legs import Faulty, content, quorum, restart, run, states, until_states

from vhostblk.engine.quorum import LegHandle
from vhostblk.nodes.quorum import metadata as metadata_module
from vhostblk.schema import VhostblkError

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 2 * MIB
LEGS = "abc"


class Disk:
    """A qcow2 image on a quorum, and what has been written to it."""

    def __init__(self, host: Host, node: Any, guest: Guest, size: int) -> None:
        self.host, self.node, self.guest = host, node, guest
        self.data = bytearray(size)
        self._random = random.Random(1)

    async def write(self, *offsets: int, length: int = 256 * KIB) -> None:
        for offset in offsets:
            self.data[offset : offset + length] = piece = self._random.randbytes(length)
            await self.guest.write(offset, piece)

    async def settle(self) -> None:
        """No clusters are being made ready for writes to come, for which legs grow one by one."""
        top: Any = self.host.backend.graph.node("top")
        await top.allocator.settle()

    def missed(self, leg: str) -> int:
        return int(self.node.describe_legs()[LEGS.index(leg)]["missed-bytes"])

    async def rebuild(self, leg: str) -> None:
        await self.host.command("quorum-rebuild", node_name="q", leg=leg)

    async def close(self) -> None:
        """All legs are the same image, with that in it."""
        await self.host.backend.close()
        check_legs(self.host.directory, bytes(self.data))


def check_legs(directory: Path, data: bytes) -> None:
    first, *others = (directory / leg for leg in LEGS)
    assert tools().check(first).corruptions == 0
    assert tools().content(first, "qcow2") == data
    for leg in others:
        assert leg.read_bytes() == first.read_bytes()


def create(directory: Path, size: int, **options: Any) -> None:
    tools().create(directory / LEGS[0], size, "qcow2", **options)
    for leg in LEGS[1:]:
        shutil.copy(directory / LEGS[0], directory / leg)


def with_disk(test: Any, size: int = 16 * MIB, cluster_size: int = 65536, **options: Any) -> None:
    async def opened(host: Host) -> None:
        create(host.directory, size, cluster_size=cluster_size)
        node = await quorum(host, **options)
        await host.add("qcow2", "top", file="q")
        await host.export("top")
        async with host.device() as guest:
            await test(Disk(host, node, guest, size))

    run(opened)


# ---- missing what is behind the old end


@NEEDS_TOOLS
def test_a_leg_fails_while_they_grow() -> None:
    async def test(disk: Disk) -> None:
        await disk.write(0)
        end = disk.node.size
        Faulty.faults["b"] = {"write": errno.EIO}
        await disk.write(*range(MIB, 14 * MIB, MIB), length=512 * KIB)
        await until_states(disk.host, disk.node, "ifi")
        assert disk.node.size > end + 2 * MIB
        assert disk.missed("b") > 2 * MIB
        Faulty.faults.clear()
        await disk.rebuild("b")
        # It goes on growing.
        await disk.write(14 * MIB, 15 * MIB, 15 * MIB + 512 * KIB)
        await until_states(disk.host, disk.node, "iii")
        assert disk.missed("b") == 0
        await disk.close()

    with_disk(test)


@NEEDS_TOOLS
def test_a_leg_fails_after_they_have_grown() -> None:
    async def test(disk: Disk) -> None:
        await disk.write(*range(0, 8 * MIB, MIB))
        await disk.guest.flush()
        Faulty.faults["c"] = {"write": errno.EIO}
        await disk.write(*range(0, 8 * MIB, MIB))
        await until_states(disk.host, disk.node, "iif")
        assert disk.missed("c") >= 8 * 256 * KIB
        Faulty.faults.clear()
        await disk.rebuild("c")
        await until_states(disk.host, disk.node, "iii")
        await disk.close()

    with_disk(test)


@NEEDS_TOOLS
@pytest.mark.parametrize("changes", [False, True])
def test_more_than_the_maps_are_for(monkeypatch: pytest.MonkeyPatch, changes: bool) -> None:
    """All that is behind a map has its last bit, until a pause brings a larger one."""
    monkeypatch.setattr(metadata_module, "ROOM", 1)
    size = 320 * MIB

    async def test(disk: Disk) -> None:
        bits = disk.node.metadata.layout.bits
        assert bits << 12 == 128 * MIB
        # Each of them takes a cluster of the file.
        await disk.write(*range(0, 200 * MIB, CLUSTER), length=4096)
        assert disk.node.size > 200 * MIB
        for leg in "ac":
            assert disk.missed(leg) == 0
        Faulty.faults["b"] = {"write": errno.EIO}
        await disk.write(198 * MIB + 4096, length=4096)
        await until_states(disk.host, disk.node, "ifi")
        tail = disk.node.size - ((bits - 1) << 12)
        assert disk.missed("b") >= tail
        Faulty.faults.clear()
        await disk.write(*range(200 * MIB, 220 * MIB, CLUSTER), length=4096)
        if changes:
            await disk.settle()
            await disk.host.command("blockdev-reopen", options=[disk.node.state_options()])
            assert disk.node.metadata.layout.bits << 12 > disk.node.size
            assert disk.missed("b") >= tail
        await disk.rebuild("b")
        await disk.write(*range(220 * MIB, 230 * MIB, CLUSTER), length=4096)
        await until_states(disk.host, disk.node, "iii")
        assert disk.missed("b") == 0
        await disk.close()

    with_disk(test, size, CLUSTER, region_size=4096)


@NEEDS_TOOLS
def test_a_rebuild_that_fails_behind_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied before is no reason to take the last bit away."""
    monkeypatch.setattr(metadata_module, "ROOM", 1)

    async def test(disk: Disk) -> None:
        await disk.write(*range(0, 200 * MIB, CLUSTER), length=4096)
        Faulty.faults["b"] = {"write": errno.EIO}
        await disk.write(*range(0, 240 * MIB, CLUSTER), length=4096)
        await until_states(disk.host, disk.node, "ifi")
        for _ in range(2):
            Faulty.faults["b"] = {"write": errno.EIO}
            await disk.rebuild("b")
            await disk.host.until(lambda: bool(disk.host.named("BLOCK_JOB_COMPLETED")), 30)
            disk.host.events.clear()
            assert states(disk.node) == "ifi"
            assert disk.missed("b") > 100 * MIB
        Faulty.faults.clear()
        await disk.rebuild("b")
        await until_states(disk.host, disk.node, "iii")
        await disk.close()

    with_disk(test, 320 * MIB, CLUSTER, region_size=4096)


def test_the_last_bit_stands_for_all_behind_it() -> None:
    """Against a list of regions; what is behind the map stays as it is."""
    rnd, bits, regions = random.Random(4), 128, 300
    memory = bytearray(8 + bits // 8 + 64)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    leg = LegHandle(address, address + 8, bits, 12)
    dirty = [False] * regions
    for _ in range(2000):
        first = rnd.randrange(regions)
        count = rnd.choice((0, 1, 2, 64, rnd.randrange(regions))) % (regions - first + 1)
        mark = rnd.random() < 0.5
        leg.mark(first, count, mark)
        for region in range(first, first + count):
            dirty[min(region, bits - 1)] = mark
        dirty[bits:] = [dirty[bits - 1]] * (regions - bits)
        end = rnd.randrange(first, regions + 1)
        assert leg.count_dirty(end) == sum(dirty[:end])
        found = (region for region in range(first, end) if dirty[region])
        assert leg.next_dirty(first, end) == next(found, end)
    assert memory[8 + bits // 8 :] == bytes(64)
    leg.free()


# ---- not growing


@NEEDS_TOOLS
def test_a_leg_that_cannot_grow_is_out() -> None:
    async def test(disk: Disk) -> None:
        await disk.write(0)
        async with disk.node.sizing:
            end = disk.node.size
            Faulty.faults["c"] = {"truncate": errno.ENOSPC}
        await disk.write(*range(MIB, 8 * MIB, MIB), length=MIB)
        await until_states(disk.host, disk.node, "iif")
        assert "No space left" in disk.node.describe_legs()[2]["reason"]
        assert disk.node.size > end + MIB
        assert os.path.getsize(disk.host.path("c")) < disk.node.size
        await disk.rebuild("c")
        await disk.host.until(lambda: bool(disk.host.named("BLOCK_JOB_COMPLETED")))
        assert states(disk.node) == "iif"
        Faulty.faults.clear()
        await disk.rebuild("c")
        await disk.write(*range(8 * MIB, 12 * MIB, MIB))
        await until_states(disk.host, disk.node, "iii")
        await disk.close()

    with_disk(test)


@NEEDS_TOOLS
def test_a_leg_that_hangs_while_it_grows() -> None:
    async def test(disk: Disk) -> None:
        await disk.write(0)
        async with disk.node.sizing:
            Faulty.hangs["c"] = asyncio.Event()
        await disk.write(*range(MIB, 8 * MIB, MIB), length=MIB)
        assert states(disk.node) == "iif"
        await disk.rebuild("c")
        await disk.write(*range(8 * MIB, 12 * MIB, MIB), length=MIB)
        assert states(disk.node) == "iif"  # its file may still get the length of that time
        Faulty.hangs.pop("c").set()
        await until_states(disk.host, disk.node, "iii")
        await disk.close()

    with_disk(test, leg_timeout=300)


@NEEDS_TOOLS
def test_too_few_can_grow() -> None:
    async def test(disk: Disk) -> None:
        await disk.write(0)
        async with disk.node.sizing:  # one of them may be on its way
            end = disk.node.size
            Faulty.faults.update(b={"truncate": errno.ENOSPC}, c={"truncate": errno.ENOSPC})
        with pytest.raises(BlockError):
            await disk.write(*range(MIB, 16 * MIB, MIB), length=MIB)
        assert states(disk.node) == "iii" and disk.node.size == end
        assert {os.path.getsize(disk.host.path(leg)) for leg in LEGS} == {end}
        Faulty.faults.clear()
        await disk.write(*range(MIB, 16 * MIB, MIB), length=MIB)
        await disk.close()

    with_disk(test)


@NEEDS_TOOLS
def test_a_leg_that_was_out_is_shorter_after_a_restart() -> None:
    async def test(disk: Disk) -> None:
        host = disk.host
        Faulty.faults["b"] = {"write": errno.EIO}
        await disk.write(*range(0, 16 * MIB, MIB), length=MIB)
        await until_states(host, disk.node, "ifi")
        Faulty.faults.clear()
        await restart(host)
        assert os.path.getsize(host.path("b")) < os.path.getsize(host.path("a"))
        node = await quorum(host, auto_rebuild=False)
        assert states(node) == "isi"
        [missed] = [leg["missed-bytes"] for leg in node.describe_legs() if leg["node-name"] == "b"]
        assert missed >= node.size - os.path.getsize(host.path("b"))
        await host.command("quorum-rebuild", node_name="q", leg="b")
        await until_states(host, node, "iii")
        await disk.close()

    with_disk(test)


# ---- block_resize


def test_resize_with_a_leg_out() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.export("q")
        async with host.device() as guest:
            Faulty.faults["b"] = {"write": errno.EIO}
            await guest.write(0, b"1" * 4096)
            assert states(node) == "ifi"
            Faulty.faults["b"]["truncate"] = errno.EIO  # nobody asks it
            await host.backend.block_resize("q", 4 * MIB)
            assert node.describe_legs()[1]["missed-bytes"] == 64 * KIB + 3 * MIB
            await guest.write(4 * MIB - 4096, b"2" * 4096)
            Faulty.faults.clear()
            await host.backend.block_resize("q", 3 * MIB)
            await host.backend.block_resize("q", 6 * MIB)
            await guest.write(3 * MIB, b"3" * 4096)
            await host.command("quorum-rebuild", node_name="q", leg="b")
            await until_states(host, node, "iii")
            # One more, that two of the others cannot follow: nothing has happened.
            Faulty.faults.update(b={"truncate": errno.EIO}, c={"truncate": errno.EIO})
            with pytest.raises(VhostblkError):
                await host.backend.block_resize("q", 8 * MIB)
            assert states(node) == "iii" and node.size == 6 * MIB
            del Faulty.faults["c"]
            await host.backend.block_resize("q", 8 * MIB)
            assert states(node) == "ifi" and node.size == 8 * MIB
            Faulty.faults.clear()
            await host.command("quorum-rebuild", node_name="q", leg="b")
            await until_states(host, node, "iii")
        await host.backend.close()
        a = content(host, "a")
        assert len(a) == 8 * MIB
        assert a[:4096] == b"1" * 4096 and a[3 * MIB : 3 * MIB + 4096] == b"3" * 4096
        assert content(host, "b") == content(host, "c") == a

    run(test)


def test_one_leg_alone_was_made_smaller() -> None:
    """The others cannot: what was cut off is missing, and it knows."""

    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, b"1" * MIB)
        Faulty.faults.update(b={"truncate": errno.EIO}, c={"truncate": errno.EIO})
        with pytest.raises(VhostblkError):
            await host.backend.block_resize("q", MIB // 2)
        assert states(node) == "fii" and node.size == MIB
        assert node.describe_legs()[0]["missed-bytes"] == MIB // 2
        Faulty.faults.clear()
        await host.command("quorum-rebuild", node_name="q", leg="a")
        await until_states(host, node, "iii")
        assert content(host, "a") == b"1" * MIB

    run(test)


# ---- kill -9


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Not under a long name, which sockets do not have."""
    short = Path("/tmp") / f"vbg-{tmp_path.name[-12:]}-{random.randrange(1 << 30):x}"
    short.mkdir()
    yield short
    shutil.rmtree(short)


def start(directory: Path) -> Daemon:
    words = ["--state", str(directory / "state"), "--control", str(directory / "q.sock")]
    for leg in LEGS:
        words += ["--blockdev", f"file,node-name={leg},filename={directory}/{leg}"]
    children = ",".join(f"children.{index}={leg}" for index, leg in enumerate(LEGS))
    words += ["--blockdev", f"quorum,node-name=q,{children},vote-threshold=2"]
    words += ["--blockdev", "qcow2,node-name=top,file=q"]
    words += ["--export", f"vhost-user-blk,id=e,node-name=top,addr.type=unix,"
              f"addr.path={directory}/e.sock,writable=on"]  # fmt: skip
    return Daemon([sys.executable, "-m", "vhostblk", "serve", *words], directory).when_ready()


@NEEDS_TOOLS
@pytest.mark.parametrize("longer", ["a", "bc", "c"])
def test_killed_between_two_legs(directory: Path, longer: str) -> None:
    """Some have been made longer, and nobody has been told."""
    create(directory, 16 * MIB)
    data = bytearray(16 * MIB)
    data[: 2 * MIB] = random.Random(2).randbytes(2 * MIB)
    with start(directory) as daemon, Device(daemon.socket("e")) as device:
        for offset in range(0, 2 * MIB, 256 * KIB):
            device.write(offset, bytes(data[offset : offset + 256 * KIB]))
        device.flush()
        daemon.kill()
        end = (directory / "a").stat().st_size
        for leg in longer:
            os.truncate(directory / leg, end + MIB)
        with start(directory) as again, Qmp(again.socket("q")) as qmp:
            assert (directory / "a").stat().st_size >= end + MIB
            [node] = qmp.command("query-quorum", **{"node-name": "q"})
            assert {leg["state"] for leg in node["legs"]} == {"in-sync"}
            device.reconnect()
            data[8 * MIB : 9 * MIB] = b"8" * MIB
            for offset in range(8 * MIB, 9 * MIB, 256 * KIB):
                device.write(offset, b"8" * (256 * KIB))
            assert device.read(0, MIB) == data[:MIB]
            again.terminate()
    check_legs(directory, bytes(data))


@NEEDS_TOOLS
def test_killed_again_and_again_while_they_grow(directory: Path) -> None:
    """What was flushed is there."""
    create(directory, 64 * MIB)
    data = bytearray(64 * MIB)
    rnd = random.Random(3)
    at = 0
    daemon = start(directory)
    try:
        with Device(daemon.socket("e")) as device:
            for _ in range(3):
                for _ in range(rnd.randrange(4, 16)):
                    data[at : at + 256 * KIB] = rnd.randbytes(256 * KIB)
                    device.write(at, bytes(data[at : at + 256 * KIB]))
                    at += MIB
                device.flush()
                data[at : at + MIB] = b"\1" * MIB
                device.write(at, b"\1" * MIB)  # they grow once more
                daemon.kill()
                daemon.close()
                daemon = start(directory)
                device.reconnect()
                device.write(at, b"\1" * MIB)
                at += MIB
            for offset in range(0, at, MIB):
                assert device.read(offset, 256 * KIB) == data[offset : offset + 256 * KIB]
        daemon.terminate()
    finally:
        daemon.close()
    check_legs(directory, bytes(data))


async def killed_while_one_grew(host: Host) -> None:
    await quorum(host)
    await host.write("q", 0, b"1" * MIB)
    left = Path(host.path("states")).read_bytes()
    await restart(host)
    Path(host.path("states")).write_bytes(left)
    os.truncate(host.path("b"), 2 * MIB)


def test_killed_between_two_legs_of_which_one_cannot_grow() -> None:
    async def test(host: Host) -> None:
        await killed_while_one_grew(host)
        Faulty.faults["c"] = {"truncate": errno.ENOSPC}
        node = await quorum(host)
        assert states(node) == "iif" and node.size == 2 * MIB
        await host.write("q", 2 * MIB - 4096, b"2" * 4096)
        Faulty.faults.clear()
        await host.command("quorum-rebuild", node_name="q", leg="c")
        await until_states(host, node, "iii")
        assert content(host, "a") == content(host, "b") == content(host, "c")

    run(test)


def test_killed_between_two_legs_and_opened_read_only() -> None:
    """What all of them have counts, until something may be written."""

    async def test(host: Host) -> None:
        await killed_while_one_grew(host)
        node = await quorum(host, read_only=True)
        assert states(node) == "iii" and node.size == MIB
        await host.add("test-faulty", "d", file="a")
        place = {"parent_type": "driver", "node_name": "q", "child": "children.0"}
        await host.command("blockdev-replace", **place, new_child="d")
        assert states(node) == "iii" and node.size == MIB
        assert os.path.getsize(host.path("a")) == MIB
        options = {"driver": "quorum", **node.state_options(), "read-only": False}
        await host.command("blockdev-reopen", options=[options])
        assert states(node) == "iii" and node.size == 2 * MIB
        await host.write("q", 2 * MIB - 4096, b"2" * 4096)
        assert content(host, "a") == content(host, "b") == content(host, "c")

    run(test)


def test_legs_of_other_sizes_after_an_orderly_end() -> None:
    """Nobody was making them longer: one has lost something, and does not get zeroes for it."""

    async def test(host: Host) -> None:
        await quorum(host)
        await host.write("q", 0, b"1" * MIB)
        await restart(host)
        os.truncate(host.path("c"), MIB // 2)
        with pytest.raises(VhostblkError, match="differ in size"):
            await quorum(host)
        assert os.path.getsize(host.path("c")) == MIB // 2

    run(test)
