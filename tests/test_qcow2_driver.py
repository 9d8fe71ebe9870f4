# SPDX-License-Identifier: GPL-2.0-or-later
"""The live qcow2 driver: what is freed, resized, cached, flushed; what becomes of broken images.

What requests read and write is tested with random ones in test_qcow2_driver_random.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from crash import Tools, newest_tools
from in_process import Host, refused, with_host

from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES, REQ_MAY_UNMAP
from vhostblk.schema import VhostblkError

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB


class Disk:
    """An image and its node."""

    def __init__(self, host: Host, tools: Tools, path: Path) -> None:
        self.host, self.tools, self.path = host, tools, path

    async def open(self, **options: Any) -> None:
        self.node = await self.host.add(
            "qcow2",
            "disk",
            file={"driver": "file", "filename": str(self.path)},
            **{"discard": "unmap", **options},
        )

    async def close(self) -> None:
        await self.host.backend.blockdev_del("disk")

    async def submit(self, op: int, offset: int = 0, data: Any = None, **more: Any) -> None:
        await self.host.backend.engine.submit(self.node.effective, op, offset, data, **more)

    async def write(self, offset: int, data: bytes) -> None:
        await self.submit(OP_WRITE, offset, data)

    async def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        await self.submit(OP_READ, offset, buffer)
        return bytes(buffer)

    async def flush(self) -> None:
        await self.submit(OP_FLUSH)

    async def discard(self, offset: int, length: int) -> None:
        await self.submit(OP_DISCARD, offset, length=length)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        flags = REQ_MAY_UNMAP if unmap else 0
        await self.submit(OP_WRITE_ZEROES, offset, length=length, flags=flags)

    def judge(self, content: bytes) -> None:
        """At rest."""
        check = self.tools.check(self.path)
        assert (check.corruptions, check.leaks, check.errors) == (0, 0, 0), check.text
        assert self.tools.content(self.path) == content

    def allocated(self) -> int:
        """Bytes of the file that are in use, at rest."""
        return os.stat(self.path).st_blocks * 512


def new_disk(host: Host, size: int = 8 * MIB, **options: Any) -> Disk:
    tools = newest_tools()
    path = Path(host.path("disk.qcow2"))
    tools.create(path, size, **options)
    return Disk(host, tools, path)


def test_what_is_discarded_is_used_again() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        for value in range(1, 12):
            data = bytes([value]) * (4 * MIB)
            for offset in range(0, len(data), MIB):
                await disk.write(offset, data[offset : offset + MIB])
            await disk.flush()
            assert await disk.read(3 * MIB, 4096) == bytes([value]) * 4096
            await disk.discard(0, 4 * MIB)
            assert await disk.read(3 * MIB, 4096) == bytes(4096)
            await disk.flush()
        await disk.write(0, b"\x55" * CLUSTER)
        await disk.close()
        disk.judge(b"\x55" * CLUSTER + bytes(8 * MIB - CLUSTER))
        # Without reuse it would be 44 MiB.
        assert disk.path.stat().st_size < 20 * MIB
        assert disk.allocated() < 2 * MIB

    with_host(test)


def test_discards_are_ignored_unless_asked_for() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open(discard="ignore")
        await disk.write(0, b"\x11" * MIB)
        await disk.discard(0, MIB)
        assert await disk.read(0, MIB) == b"\x11" * MIB
        await disk.close()
        disk.judge(b"\x11" * MIB + bytes(7 * MIB))

    with_host(test)


@pytest.mark.parametrize("extended", ["off", "on"])
def test_places_that_are_kept(extended: str) -> None:
    """discard-no-unref, and zero writes that may not unmap."""

    async def test(host: Host) -> None:
        disk = new_disk(host, extended_l2=extended)
        await disk.open(discard_no_unref=True)
        await disk.write(0, b"\x11" * MIB)
        await disk.flush()
        size = disk.path.stat().st_size
        await disk.discard(0, MIB)
        await disk.zero(0, 512 * KIB, unmap=False)
        assert await disk.read(0, MIB) == bytes(MIB)
        await disk.write(4096, b"\x22" * 8192)
        for offset in range(512 * KIB, MIB, CLUSTER):
            await disk.write(offset + 512, b"\x33" * 512)
        await disk.flush()
        assert disk.path.stat().st_size == size
        await disk.close()
        content = bytearray(8 * MIB)
        content[4096 : 4096 + 8192] = b"\x22" * 8192
        for offset in range(512 * KIB, MIB, CLUSTER):
            content[offset + 512 : offset + 1024] = b"\x33" * 512
        disk.judge(bytes(content))

    with_host(test)


@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 512}, {"extended_l2": "on"}, {"compat": "0.10", "cluster_size": 4096}],
    ids=["64k", "512", "extended", "v2"],
)
def test_resizes(options: dict[str, Any]) -> None:
    async def test(host: Host) -> None:
        rnd = random.Random(5)
        disk = new_disk(host, 3 * MIB + 512, **options)
        await disk.open()
        content = bytearray(rnd.randbytes(3 * MIB + 512))
        for offset in range(0, len(content), MIB):
            await disk.write(offset, bytes(content[offset : offset + MIB]))
        for size in (5 * MIB, MIB + 1536, MIB + 1024, 3 * MIB, 512, 40 * MIB + 512, 8 * MIB):
            await host.backend.block_resize("disk", size)
            assert disk.node.size == size
            content = content[:size] + bytes(max(0, size - len(content)))
            assert await disk.read(0, min(size, 4 * MIB)) == content[: 4 * MIB]
            if size > MIB:
                data = rnd.randbytes(100 * KIB)
                offset = size - len(data)
                await disk.write(offset, data)
                content[offset:] = data
        await disk.close()
        disk.judge(bytes(content))

    with_host(test)


def test_resizing_with_bitmaps() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        disk.tools.img("bitmap", "--add", disk.path, "b0")
        disk.tools.img("bitmap", "--add", "--disable", disk.path, "b1")
        await disk.open()
        await host.backend.block_resize("disk", 40 * MIB)
        await disk.write(39 * MIB, b"\x31" * MIB)
        await disk.close()
        disk.judge(bytes(39 * MIB) + b"\x31" * MIB)
        data = disk.tools.info(disk.path)["format-specific"]["data"]
        flags = {entry["name"]: entry["flags"] for entry in data["bitmaps"]}
        assert "in-use" in flags["b0"] and "in-use" in flags["b1"]

    with_host(test)


def test_growing_when_the_data_file_can_not_grow() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host, data_file="data")
        await host.add("file", "storage", filename=host.path("data"))
        await host.add("raw", "part", file="storage", size=8 * MIB)
        await disk.open(data_file="part")
        for _ in range(2):
            with pytest.raises((OSError, VhostblkError)):
                await host.backend.block_resize("disk", 16 * MIB)
            assert disk.node.size == 8 * MIB
        await disk.write(8 * MIB - 512, b"\x11" * 512)
        await host.backend.block_resize("disk", 4 * MIB)
        await disk.close()
        disk.judge(bytes(4 * MIB))

    with_host(test)


@pytest.mark.parametrize("extended", ["off", "on"])
def test_a_data_file_that_is_as_long_as_the_disk(extended: str) -> None:
    """A device, say, that ends inside the last cluster."""

    async def test(host: Host) -> None:
        size = 8 * MIB + 1536
        disk = new_disk(host, size, data_file="data", extended_l2=extended)
        await host.add("file", "storage", filename=host.path("data"))
        await host.add("raw", "part", file="storage", size=size)
        await disk.open(data_file="part")
        await disk.write(size - 1024, b"\x11" * 512)
        await disk.write(size - CLUSTER - 512, b"\x22" * 1024)
        await disk.close()
        content = bytearray(size)
        content[size - 1024 : size - 512] = b"\x11" * 512
        content[size - CLUSTER - 512 : size - CLUSTER + 512] = b"\x22" * 1024
        disk.judge(bytes(content))

    with_host(test)


def test_growing_over_a_larger_backing_file() -> None:
    """What the backing file has beyond the old end must not appear."""

    async def test(host: Host) -> None:
        Path(host.path("base.raw")).write_bytes(b"\x77" * 4 * MIB)
        disk = new_disk(host, MIB + 512, backing="base.raw", backing_format="raw")
        await disk.open()
        await host.backend.block_resize("disk", 6 * MIB)
        assert await disk.read(0, 2 * MIB) == b"\x77" * (MIB + 512) + bytes(MIB - 512)
        assert await disk.read(2 * MIB, 4 * MIB) == bytes(4 * MIB)
        await disk.close()
        disk.judge(b"\x77" * (MIB + 512) + bytes(5 * MIB - 512))

    with_host(test)


def test_the_l2_cache_is_bounded() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host, 64 * MIB, cluster_size=512)
        await disk.open(l2_cache_size=64 * KIB)
        limit = 64 * KIB // 512
        rnd = random.Random(6)
        content: dict[int, bytes] = {}

        async def one(sector: int) -> None:
            if sector in content:
                assert await disk.read(sector * 512, 512) == content[sector]
            else:
                data = content[sector] = rnd.randbytes(512)
                await disk.write(sector * 512, data)

        for _ in range(60):
            await asyncio.gather(*(one(s) for s in rnd.sample(range(64 * MIB // 512), 30)))
            await asyncio.gather(*(one(s) for s in rnd.sample(sorted(content), 30)))
            await disk.flush()
            assert len(disk.node.l2) <= limit + 60
        await disk.node.l2.settle()
        assert len(disk.node.l2) <= limit
        await disk.close()
        whole = bytearray(64 * MIB)
        for sector, data in content.items():
            whole[sector * 512 : sector * 512 + 512] = data
        disk.judge(bytes(whole))

    with_host(test)


def test_a_flush_makes_what_is_on_disk_complete() -> None:
    """After each flush the file as it is holds everything, without any help of the process."""

    async def test(host: Host) -> None:
        rnd = random.Random(7)
        disk = new_disk(host)
        await disk.open()
        content = bytearray(8 * MIB)
        for _ in range(8):
            for _ in range(10):
                offset, data = 512 * rnd.randrange(12000), rnd.randbytes(512 * rnd.randint(1, 100))
                await disk.write(offset, data)
                content[offset : offset + len(data)] = data
            await disk.discard(1 * MIB, MIB)
            content[1 * MIB : 2 * MIB] = bytes(MIB)
            await disk.flush()
            copy = disk.path.with_name("copy.qcow2")
            copy.write_bytes(disk.path.read_bytes())
            check = disk.tools.check(copy)
            assert check.corruptions == 0 and check.errors == 0, check.text
            assert disk.tools.content(copy) == content
        await disk.close()
        disk.judge(bytes(content))

    with_host(test)


@pytest.mark.parametrize("extended", ["off", "on"])
def test_a_log_that_is_full(monkeypatch: pytest.MonkeyPatch, extended: str) -> None:
    """More changes than there is room for between two flushes, by the engine and by Python."""
    monkeypatch.setattr("vhostblk.nodes._map_log.RECORDS", 8)

    async def test(host: Host) -> None:
        rnd = random.Random(10)
        disk = new_disk(host, extended_l2=extended, cluster_size=16 * KIB)
        await disk.open()
        assert disk.node.log is not None and disk.node.log.records == 8
        content = bytearray(8 * MIB)
        for _ in range(6):
            work = []
            for cluster in rnd.sample(range(512), 60):
                data = rnd.randbytes(1024)
                content[cluster * 16 * KIB : cluster * 16 * KIB + 1024] = data
                work.append(disk.write(cluster * 16 * KIB, data))
            await asyncio.gather(*work)
            start = 16 * KIB * rnd.randrange(400)
            content[start : start + MIB] = bytes(MIB)
            await disk.discard(start, MIB)
        assert await disk.read(0, 8 * MIB) == content
        await disk.close()
        disk.judge(bytes(content))

    with_host(test)


def test_a_dirty_image_is_repaired() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        disk.tools.io(disk.path, "write -P 9 0 1M", options=("-f", "qcow2"))
        data = bytearray(disk.path.read_bytes())
        data[79] |= 1  # incompatible feature: dirty
        table = struct.unpack_from(">Q", data, 48)[0]
        block = struct.unpack_from(">Q", data, table)[0]
        struct.pack_into(">H", data, block + 2 * 5, 0)  # a cluster in use is counted as free
        disk.path.write_bytes(data)
        await disk.open()
        assert await disk.read(0, MIB) == b"\x09" * MIB
        await disk.write(MIB, b"\x0a" * MIB)
        await disk.close()
        disk.judge(b"\x09" * MIB + b"\x0a" * MIB + bytes(6 * MIB))

    with_host(test)


def broken_disk(host: Host, entry: int) -> Disk:
    """The second cluster's L2 entry is `entry`; the first is in order."""
    disk = new_disk(host)
    disk.tools.io(disk.path, "write -P 9 0 128k", options=("-f", "qcow2"))
    data = bytearray(disk.path.read_bytes())
    l1 = struct.unpack_from(">Q", data, 40)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", data, l2 + 8, entry)
    disk.path.write_bytes(data)
    return disk


@pytest.mark.parametrize(
    "entry",
    [1 << 63 | 0x10000, 1 << 63 | 0x50200, 1 << 63 | 1 << 40, 1 << 63 | 0x50010, 1 << 63],
    ids=["metadata", "half a cluster", "beyond the end", "reserved bits", "the header"],
)
def test_a_broken_entry_stops_writing(entry: int) -> None:
    async def test(host: Host) -> None:
        disk = broken_disk(host, entry)
        await disk.open()
        for _ in range(2):
            with pytest.raises(OSError):
                await disk.write(CLUSTER, bytes(512))
            with pytest.raises(OSError):
                await disk.read(CLUSTER, 512)
            with pytest.raises(OSError):
                await disk.write(4 * MIB, bytes(512))
        (event,) = host.named("BLOCK_IMAGE_CORRUPTED")
        assert event["node-name"] == "disk" and event["fatal"] is True
        assert event["offset"] == CLUSTER
        await disk.close()
        assert disk.path.read_bytes()[79] & 2  # the corrupt bit
        with refused("is corrupt; cannot be opened read/write"):
            await disk.open()
        await disk.open(read_only=True)
        await disk.close()

    with_host(test)


def test_a_cluster_that_nobody_counted() -> None:
    """What a discard is to free counts as free already: others may use it, too."""

    async def test(host: Host) -> None:
        disk = new_disk(host)
        disk.tools.io(disk.path, "write -P 9 0 128k", options=("-f", "qcow2"))
        data = bytearray(disk.path.read_bytes())
        table = struct.unpack_from(">Q", data, 48)[0]
        block = struct.unpack_from(">Q", data, table)[0]
        l1 = struct.unpack_from(">Q", data, 40)[0]
        l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FFFFFFFFFFFE00
        host_cluster = (struct.unpack_from(">Q", data, l2)[0] & 0x00FFFFFFFFFFFE00) // CLUSTER
        struct.pack_into(">H", data, block + 2 * host_cluster, 0)
        disk.path.write_bytes(data)
        await disk.open()
        await disk.discard(0, CLUSTER)
        await disk.flush()
        await host.until(lambda: bool(host.named("BLOCK_IMAGE_CORRUPTED")))
        with pytest.raises(OSError):
            await disk.write(0, bytes(512))
        assert await disk.read(CLUSTER, 512) == b"\x09" * 512
        await disk.close()
        assert disk.path.read_bytes()[79] & 2

    with_host(test)


def test_broken_images_that_are_only_read_stay_as_they_are() -> None:
    async def test(host: Host) -> None:
        disk = broken_disk(host, 1 << 63 | 0x10000)
        before = disk.path.read_bytes()
        await disk.open(read_only=True)
        with pytest.raises(OSError):
            await disk.read(CLUSTER, 512)
        (event,) = host.named("BLOCK_IMAGE_CORRUPTED")
        assert event["fatal"] is False
        await disk.close()
        assert disk.path.read_bytes() == before

    with_host(test)


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}, {"cluster_size": 512}])
def test_internal_snapshots_while_it_is_written(options: dict[str, Any]) -> None:
    async def test(host: Host) -> None:
        rnd = random.Random(9)
        disk = new_disk(host, 2 * MIB, **options)
        await disk.open()
        content = bytearray(2 * MIB)
        was: dict[str, bytes] = {}

        async def work() -> None:
            for _ in range(20):
                offset, data = 512 * rnd.randrange(3900), rnd.randbytes(512 * rnd.randint(1, 100))
                await disk.write(offset, data)
                content[offset : offset + len(data)] = data
            await disk.discard(MIB, 256 * KIB)
            content[MIB : MIB + 256 * KIB] = bytes(256 * KIB)

        for number in range(4):
            await work()
            name = f"s{number}"
            assert (await host.backend.internal_snapshot("disk", "create", name))["name"] == name
            was[name] = bytes(content)
            assert await disk.read(0, 2 * MIB) == content
        await host.backend.internal_snapshot("disk", "delete", "s1")
        del was["s1"]
        await work()
        await host.backend.internal_snapshot("disk", "apply", "s2")
        assert await disk.read(0, 2 * MIB) == was["s2"]
        content[:] = was["s2"]
        await work()
        with refused("s2", "exists"):
            await host.backend.internal_snapshot("disk", "create", "s2")
        await work()
        await disk.close()
        disk.judge(bytes(content))
        for name, data in was.items():
            found = disk.tools.content(disk.path, "qcow2", "-l", f"snapshot.name={name}")
            assert found == data

    with_host(test)


def test_two_writers_of_one_cluster() -> None:
    """All sectors of a few clusters over a backing file, each in a request of its own, at once."""

    async def test(host: Host) -> None:
        Path(host.path("base.raw")).write_bytes(b"\x77" * MIB)
        disk = new_disk(host, MIB, backing="base.raw", backing_format="raw")
        await disk.open()
        content = bytearray(b"\x77" * MIB)
        sectors = random.Random(8).sample(range(2048), 1000)
        work = []
        for number, sector in enumerate(sectors):
            data = struct.pack("=I", number) * 128
            content[sector * 512 : sector * 512 + 512] = data
            work.append(disk.write(sector * 512, data))
        await asyncio.gather(*work)
        assert await disk.read(0, MIB) == content
        await disk.close()
        disk.judge(bytes(content))

    with_host(test)


def test_options_that_make_no_sense() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        with refused("l2-cache-size may not exceed cache-size"):
            await disk.open(cache_size=MIB, l2_cache_size=2 * MIB)
        with refused("power of two between 512 and the cluster size"):
            await disk.open(l2_cache_entry_size=1000)
        with refused("is not encrypted"):
            await disk.open(encrypt={"format": "luks", "key-secret": "s"})
        with refused("'data-file' can only be set"):
            await disk.open(data_file={"driver": "null-co"})
        assert not host.backend.graph.nodes

    with_host(test)


def test_under_an_export() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        await host.export("disk")
        async with host.device() as guest:
            await guest.write(0, b"\x42" * 4096)
            await guest.flush()
            assert await guest.read(0, 8192) == b"\x42" * 4096 + bytes(4096)
        await host.backend.block_export_del("e", mode="hard")
        await disk.close()
        disk.judge(b"\x42" * 4096 + bytes(8 * MIB - 4096))

    with_host(test)
