# SPDX-License-Identifier: GPL-2.0-or-later
"""Extended L2 entries: the engine gives clusters a place, and writes their subclusters, by itself.

What random requests read and write, and what is left after a kill or a power cut, is tested with
those of all other images (variants "extended…" and "subclusters").
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from in_process import Host, with_host

from vhostblk.engine import OP_DISCARD, OP_WRITE, OP_WRITE_ZEROES
from vhostblk.engine.map import MAP_OFFSET
from vhostblk.filter import Filter

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 128 * KIB
UNIT = CLUSTER // 32
SIZE = 8 * MIB


class Gate(Filter):
    """Keeps a write of a sector to a watched place until something larger is written there."""

    driver = "gate"
    watched: int | None = None

    def watch(self, place: int) -> None:
        self.watched = place
        self.arrived, self.go_on, self.ended = (asyncio.Event() for _ in range(3))

    async def write(self, request: Any) -> None:
        end = request.offset + request.length
        if self.watched is None or not request.offset <= self.watched < end:
            request.forward()
        elif request.length == 512:
            self.arrived.set()
            await self.go_on.wait()
            await self.file.forward(request)
            self.ended.set()
        else:
            self.go_on.set()
            await self.ended.wait()
            request.forward()


class Overlay:
    """An image with subclusters of 4 KiB on a raw one that is full, and its nodes."""

    def __init__(self, host: Host, size: int = SIZE) -> None:
        self.host = host
        self.path = Path(host.path("overlay.qcow2"))
        self.below = random.Random(1).randbytes(size)
        Path(host.path("below.raw")).write_bytes(self.below)
        newest_tools().create(
            self.path, size, cluster_size=CLUSTER, extended_l2="on", backing="below.raw"
        )

    async def open(self, file: str | None = None, **options: Any) -> None:
        backing = {"driver": "file", "filename": self.host.path("below.raw")}
        await self.host.add("raw", "below", file=backing)
        if file is None:
            file = "storage"
            await self.host.add("file", file, filename=str(self.path))
        self.node = await self.host.add("qcow2", "o", file=file, backing="below", **options)
        self.came_up = 0
        write: Callable[..., Any] = self.node._hooks[OP_WRITE]

        async def counted(request: Any) -> None:
            self.came_up += 1
            await write(request)

        self.node._hooks[OP_WRITE] = counted

    async def write_all(self, writes: dict[int, bytes]) -> None:
        await asyncio.gather(*(self.host.write("o", at, data) for at, data in writes.items()))

    def below_has_read(self) -> int:
        """Bytes that were read from the image below."""
        return int(self.host.backend.graph.nodes["below"].stats().read.bytes)

    def expected(self, writes: dict[int, bytes]) -> bytes:
        content = bytearray(self.below)
        for at, data in writes.items():
            content[at : at + len(data)] = data
        return bytes(content)

    async def close_and_judge(self, content: bytes) -> None:
        await self.host.backend.blockdev_del("o")
        check = newest_tools().check(self.path)
        assert (check.corruptions, check.leaks, check.errors) == (0, 0, 0), check.text
        assert newest_tools().content(self.path) == content


def test_whole_subclusters_are_written_without_a_look_at_what_is_below() -> None:
    async def test(host: Host) -> None:
        overlay = Overlay(host)
        await overlay.open()
        await host.write("o", 0, b"\1" * UNIT)  # loads the table, asks for clusters
        await host.until(lambda: overlay.node.allocator._wanted is None)
        overlay.came_up, before = 0, overlay.below_has_read()
        rnd = random.Random(2)
        units = rnd.sample(range(1, SIZE // UNIT), 300)
        writes = {unit * UNIT: rnd.randbytes(UNIT) for unit in units}
        for start in range(0, 300, 50):
            some = dict(list(writes.items())[start : start + 50])
            await overlay.write_all(some)
            await host.until(lambda: overlay.node.allocator._wanted is None)
        assert overlay.came_up == 0
        assert overlay.below_has_read() == before
        writes[0] = b"\1" * UNIT
        await overlay.close_and_judge(overlay.expected(writes))

    with_host(test)


def test_a_part_of_a_subcluster_copies_that_subcluster_alone() -> None:
    async def test(host: Host) -> None:
        overlay = Overlay(host)
        await overlay.open()
        await host.write("o", 0, b"\1" * UNIT)
        overlay.came_up, before = 0, overlay.below_has_read()
        writes = {0: b"\1" * UNIT, CLUSTER + UNIT + 512: b"\2" * 512, 5 * UNIT - 512: b"\3" * 1024}
        for at, data in list(writes.items())[1:]:
            await host.write("o", at, data)
        assert overlay.came_up == 0
        assert overlay.below_has_read() == before + 3 * UNIT
        await overlay.close_and_judge(overlay.expected(writes))

    with_host(test)


def test_large_writes_over_many_clusters() -> None:
    async def test(host: Host) -> None:
        overlay = Overlay(host)
        await overlay.open()
        await host.write("o", SIZE - UNIT, b"\1" * UNIT)
        rnd = random.Random(3)
        writes = {
            SIZE - UNIT: b"\1" * UNIT,
            3 * UNIT + 512: rnd.randbytes(12 * CLUSTER),
            30 * CLUSTER - 512: rnd.randbytes(CLUSTER + 1024),
        }
        await overlay.write_all(writes)
        await overlay.close_and_judge(overlay.expected(writes))

    with_host(test)


def test_a_write_that_fails_leaves_what_was_there_and_the_place_serves_the_next() -> None:
    async def test(host: Host) -> None:
        overlay = Overlay(host)
        await host.add("file", "storage", filename=str(overlay.path))
        await host.add("error-inject", "broken", file="storage", count=0)
        await overlay.open("broken")
        await host.write("o", 0, b"\1" * UNIT)

        async def fail(count: int) -> None:
            broken: dict[str, Any] = {"driver": "error-inject", "node-name": "broken"}
            broken |= {"file": "storage", "operations": ["write"], "count": count}
            await host.command("blockdev-reopen", options=[broken])

        for at, length in ((CLUSTER, UNIT), (2 * CLUSTER, 512), (3 * CLUSTER + 7 * UNIT, UNIT)):
            await fail(1)
            with pytest.raises(OSError) as caught:
                await host.write("o", at, b"\2" * length)
            assert caught.value.errno == errno.EIO
            await fail(0)
            assert await host.read("o", at, UNIT) == overlay.below[at : at + UNIT]
        overlay.came_up = 0
        again = dict.fromkeys((CLUSTER + UNIT, 2 * CLUSTER, 3 * CLUSTER), b"\x03" * UNIT)
        await overlay.write_all(again)
        assert overlay.came_up == 0
        await overlay.close_and_judge(overlay.expected({0: b"\1" * UNIT, **again}))
        assert sum(1 for used in places(overlay.path) if used) == 4

    with_host(test)


def test_what_is_being_written_to_a_cluster_is_not_copied_for_its_neighbour() -> None:
    """The words may not say yet that the engine has given a cluster its place."""

    async def test(host: Host) -> None:
        overlay = Overlay(host)
        newest_tools().io(overlay.path, f"write -q -c -P 7 {CLUSTER} {CLUSTER}")
        await host.add("file", "storage", filename=str(overlay.path))
        gate = await host.add("gate", "gate", file="storage")
        await overlay.open("gate")
        writes = {5 * CLUSTER: b"\1" * UNIT, CLUSTER: b"\7" * CLUSTER}
        await host.write("o", 5 * CLUSTER, writes[5 * CLUSTER])
        await host.until(lambda: overlay.node.allocator._wanted is None)
        for unit in (3, 30):
            writes[unit * UNIT] = bytes([unit]) * UNIT
            await host.write("o", unit * UNIT, writes[unit * UNIT])
        assert not overlay.node.l2.get(0).words[0]  # it is in the log only
        gate.watch((overlay.node.map.get(3) & MAP_OFFSET) + 512)
        writes |= {3 * UNIT + 512: b"\2" * 512, 30 * UNIT: b"\3" * (3 * UNIT)}
        first = asyncio.create_task(host.write("o", 3 * UNIT + 512, writes[3 * UNIT + 512]))
        await gate.arrived.wait()
        overlay.came_up = 0
        await host.write("o", 30 * UNIT, writes[30 * UNIT])
        assert overlay.came_up  # since its second cluster is compressed
        gate.go_on.set()
        await first
        await overlay.close_and_judge(overlay.expected(writes))

    with_host(test, Gate)


def places(image: Path) -> list[bool]:
    """Which clusters of the disk have a place in the file, from the L2 table."""
    data = image.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    return [any(data[l2 + 16 * at : l2 + 16 * at + 8]) for at in range(SIZE // CLUSTER)]


def test_half_a_log_is_flushed_before_writes_have_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is needed for those writes, which would be another occasion."""
    monkeypatch.setattr("vhostblk.nodes._map_log.RECORDS", 64)

    async def test(host: Host) -> None:
        overlay = Overlay(host)
        await overlay.open()
        writes = {unit * 2 * UNIT: bytes([unit + 1]) * UNIT for unit in range(48)}
        first = {at: data for at, data in writes.items() if at % CLUSTER == 0}
        await overlay.write_all(first)  # the places
        await overlay.node.writeback.flush()
        await host.until(lambda: overlay.node.allocator._wanted is None)
        overlay.came_up = 0
        for at, data in writes.items():
            if at not in first:
                await host.write("o", at, data)
        await host.until(lambda: len(overlay.node.log.pending()) < 32)
        assert overlay.came_up == 0
        await overlay.close_and_judge(overlay.expected(writes))

    with_host(test)


def test_what_is_behind_the_end_of_a_disk_is_zeroes_when_it_grows() -> None:
    """A place that is kept has older data in it, and QEMU, which makes it grow here, trusts us."""

    async def test(host: Host) -> None:
        path = Path(host.path("disk.qcow2"))
        newest_tools().create(path, SIZE, cluster_size=CLUSTER, extended_l2="on")
        file = {"driver": "file", "filename": str(path)}
        node = await host.add("qcow2", "o", file=file)
        await host.write("o", 0, b"\x11" * CLUSTER)
        await host.backend.engine.submit(node.effective, OP_WRITE_ZEROES, 0, length=CLUSTER)
        await host.backend.block_resize("o", UNIT + 512)
        await host.write("o", UNIT, b"\x22" * 512)
        await host.backend.blockdev_del("o")
        newest_tools().img("resize", "-q", "-f", "qcow2", path, str(SIZE))
        content = newest_tools().content(path)
        assert content[UNIT : 2 * UNIT] == b"\x22" * 512 + bytes(UNIT - 512)

    with_host(test)


def test_the_end_of_a_disk_is_discarded_while_somebody_writes_there() -> None:
    """The last cluster has subclusters behind the end: nobody can be waited for there."""

    async def test(host: Host) -> None:
        path, size = Path(host.path("disk.qcow2")), SIZE + 2 * UNIT
        newest_tools().create(path, size, cluster_size=CLUSTER, extended_l2="on")
        file = {"driver": "file", "filename": str(path)}
        node = await host.add("qcow2", "o", file=file, discard="unmap")
        await host.write("o", SIZE, b"\x11" * 2 * UNIT)
        last = SIZE // CLUSTER
        pinned = await node.path.pin(range(last, last + 1))
        [slice] = pinned.values()
        claim = node.path.claim(last, slice, last, [1])  # as who writes there does

        async def discard() -> None:
            await host.backend.engine.submit(node.effective, OP_DISCARD, SIZE, length=2 * UNIT)

        discarded = asyncio.create_task(discard())
        await host.until(lambda: slice.pins > 1)
        await asyncio.sleep(0)
        node.path.release(claim)
        node.path.unpin(pinned)
        await discarded
        assert await host.read("o", SIZE, 2 * UNIT) == bytes(2 * UNIT)

    with_host(test)


def test_a_file_that_qemu_ended_inside_a_cluster(tmp_path: Path) -> None:
    """It writes one subcluster; the engine writes others of that cluster, behind the end."""

    async def test(host: Host) -> None:
        path = tmp_path / "disk.qcow2"
        newest_tools().create(path, SIZE, cluster_size=CLUSTER, extended_l2="on")
        newest_tools().io(path, f"write -q -c -P 7 0 {CLUSTER}", f"write -q -P 8 {CLUSTER} {UNIT}")
        assert path.stat().st_size % CLUSTER
        await host.add("file", "storage", filename=str(path))
        await host.add("qcow2", "o", file="storage")
        await host.write("o", CLUSTER + 8 * UNIT, b"\x09" * UNIT)
        content = b"\7" * CLUSTER + b"\x08" * UNIT + bytes(7 * UNIT) + b"\x09" * UNIT
        # With a compressed cluster in it Python reads all of it, from a file whose end it knows.
        assert await host.read("o", 0, len(content)) == content

    with_host(test)


def test_a_copy_of_a_file_that_qemu_ended_inside_a_cluster(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        path = tmp_path / "disk.qcow2"
        newest_tools().create(path, SIZE, cluster_size=CLUSTER, extended_l2="on")
        newest_tools().io(path, f"write -q -P 8 {CLUSTER} {UNIT}")
        assert path.stat().st_size % CLUSTER
        await host.add("file", "storage", filename=str(path))
        await host.add("qcow2", "o", file="storage")
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        await host.add("file", "copy", filename=str(copy))
        await host.command(
            "blockdev-replace", parent_type="driver", node_name="o", child="file", new_child="copy"
        )
        assert await host.read("o", CLUSTER, UNIT) == b"\x08" * UNIT

    with_host(test)


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


needs_plain_memory = pytest.mark.skipif(
    "VHOSTBLK_SANITIZED" in os.environ, reason="a sanitizer takes memory itself"
)


@needs_plain_memory
def test_tables_that_say_the_same_everywhere_take_no_memory() -> None:
    """An overlay that has nothing yet: 64 KiB for each 32 MiB of disk otherwise."""

    async def test(host: Host) -> None:
        path, size = Path(host.path("empty.qcow2")), 128 << 30
        newest_tools().create(path, size, cluster_size=CLUSTER, extended_l2="on")
        file = {"driver": "file", "filename": str(path)}
        node = await host.add("qcow2", "o", file=file, l2_cache_size=1 << 30)
        before = memory()
        for at in range(0, size, 32 * MIB):
            assert await host.read("o", at, 512) == bytes(512)
        assert len(node.l2) == 4096
        assert memory() - before < 64 * MIB  # the words: 4 KiB each
        for at in range(0, size, size // 16):
            await host.write("o", at + UNIT, b"\1" * UNIT)
            assert await host.read("o", at, 3 * UNIT) == bytes(UNIT) + b"\1" * UNIT + bytes(UNIT)

    with_host(test)


@needs_plain_memory
def test_the_end_of_a_large_disk_takes_no_memory_for_what_lies_before() -> None:
    async def test(host: Host) -> None:
        path, size = Path(host.path("large.qcow2")), 128 << 40
        newest_tools().create(path, size, cluster_size=64 * KIB, extended_l2="on")
        await host.add("qcow2", "o", file={"driver": "file", "filename": str(path)})
        await host.read("o", 0, 512)
        before = memory()
        for at in (size // 2, size - 512):  # the room for the first is too small for the second
            assert await host.read("o", at, 512) == bytes(512)
        assert memory() - before < 32 * MIB

    with_host(test)
