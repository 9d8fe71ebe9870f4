# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in a dedup store: what is written is read, once stored, shared, and given back."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from dedup_lab import BLOCK, SEGMENT, create, new_store, open_disk, sound, store_of
from in_process import MIB, Host, refused, with_host
from loop_devices import attached

from vhostblk.dedup.format import HASHES
from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_WRITE, OP_WRITE_ZEROES
from vhostblk.engine.dedup import blake3
from vhostblk.nodes.dedup import Dedup


async def submit(host: Host, node: str, op: int, offset: int = 0, length: int = 0) -> None:
    handle = host.backend.graph.node(node).effective
    await host.backend.engine.submit(handle, op, offset, None, length)


@pytest.mark.parametrize("block", [4096, 16384, 65536])
def test_written_and_read_again(block: int) -> None:
    async def test(host: Host) -> None:
        await create(host, block_size=block)
        await open_disk(host)
        rnd = random.Random(1)
        content = bytearray(MIB)
        assert await host.read("disk", 0, MIB) == content
        for _ in range(60):
            length = 512 * rnd.randint(1, 300)
            offset = 512 * rnd.randint(0, (MIB - length) // 512)
            data = rnd.randbytes(length)
            await host.write("disk", offset, data)
            content[offset : offset + length] = data
            assert await host.read("disk", offset, length) == data
        assert await host.read("disk", 0, MIB) == content
        await submit(host, "disk", OP_FLUSH)
        await sound(host)
        await host.backend.blockdev_del("disk")
        await open_disk(host)
        assert await host.read("disk", 0, MIB) == content
        await sound(host)

    with_host(test)


def test_equal_blocks_are_stored_once() -> None:
    async def test(host: Host) -> None:
        await create(host, data=8 * MIB, size=16 * MIB)
        await open_disk(host)
        data = random.Random(2).randbytes(MIB)
        for copy in range(12):
            await host.write("disk", copy * MIB, data)
        store = store_of(host)
        assert store.tables.state.blocks == MIB // BLOCK
        assert store.counters.hits == 11 * MIB // BLOCK
        assert await host.read("disk", 11 * MIB, MIB) == data
        result = await sound(host)
        assert (result.blocks, result.mapped) == (MIB // BLOCK, 12 * MIB // BLOCK)

    with_host(test)


def test_zeroes_need_no_space() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await host.write("disk", 0, b"x" * MIB)
        await host.write("disk", 0, bytes(MIB // 2))
        await submit(host, "disk", OP_WRITE_ZEROES, MIB // 2, MIB // 2)
        assert await host.read("disk", 0, MIB) == bytes(MIB)
        await sound(host)
        assert store_of(host).tables.state.blocks == 0

    with_host(test)


def test_partial_zero_writes_and_discards() -> None:
    async def test(host: Host) -> None:
        await create(host, size=MIB + 512)
        await open_disk(host)
        rnd = random.Random(3)
        content = bytearray(rnd.randbytes(MIB + 512))
        await host.write("disk", 0, bytes(content))
        for _ in range(40):
            length = 512 * rnd.randint(1, 40)
            offset = 512 * rnd.randint(0, (MIB + 512 - length) // 512)
            await submit(host, "disk", OP_WRITE_ZEROES, offset, length)
            content[offset : offset + length] = bytes(length)
        assert await host.read("disk", 0, MIB + 512) == content
        await submit(host, "disk", OP_DISCARD, 0, MIB + 512)
        assert await host.read("disk", 0, MIB + 512) == bytes(MIB + 512)
        await sound(host)

    with_host(test)


@pytest.mark.parametrize("compress", ["off", "zstd"])
def test_parts_of_a_last_block_that_the_disk_cuts_off(compress: str) -> None:
    """What a write does not cover stays, in a block of which the disk has the beginning, too."""

    async def test(host: Host) -> None:
        size = MIB + BLOCK // 2
        await create(host, size=size)
        await open_disk(host, compress=compress)
        rnd = random.Random(4)
        content = bytearray(rnd.randbytes(size))
        await host.write("disk", 0, bytes(content))
        for step in range(30):
            length = 512 * rnd.randint(1, 4)
            offset = size - 512 * rnd.randint(length // 512, 6)
            if step % 3:
                data = rnd.randbytes(length)
                await host.write("disk", offset, data)
            else:
                data = bytes(length)
                await submit(host, "disk", OP_WRITE_ZEROES, offset, length)
            content[offset : offset + length] = data
            assert await host.read("disk", 0, size) == content
        await host.backend.block_resize("disk", size - 512)
        await host.backend.block_resize("disk", size + BLOCK)
        assert await host.read("disk", 0, size + BLOCK) == content[:-512] + bytes(512 + BLOCK)
        await sound(host)

    with_host(test)


def test_two_disks_share_blocks() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await open_disk(host, "other", disk="other", size=2 * MIB)
        data = random.Random(4).randbytes(MIB)
        await host.write("disk", 0, data)
        await host.write("other", MIB, data)
        assert store_of(host).tables.state.blocks == MIB // BLOCK
        await submit(host, "disk", OP_DISCARD, 0, MIB)
        assert await host.read("disk", 0, MIB) == bytes(MIB)
        assert await host.read("other", MIB, MIB) == data
        await host.backend.blockdev_del("disk")
        await sound(host, "other")
        assert await host.read("other", MIB, MIB) == data
        await host.backend.blockdev_del("other")
        await open_disk(host, "other", disk="other")
        assert await host.read("other", MIB, MIB) == data

    with_host(test)


def test_discard_returns_space() -> None:
    """A disk twice as large as the store is filled again and again."""

    async def test(host: Host) -> None:
        await create(host, data=5 * MIB, size=3 * MIB)
        await open_disk(host, discard="unmap")
        rnd = random.Random(5)
        for _ in range(5):
            data = rnd.randbytes(3 * MIB)
            for at in range(0, 3 * MIB, SEGMENT):
                await host.write("disk", at, data[at : at + SEGMENT])
            assert await host.read("disk", 0, 3 * MIB) == data
            await submit(host, "disk", OP_DISCARD, 0, 3 * MIB)
        store = store_of(host)
        await store.checkpoint()
        assert store.tables.state.blocks == 0
        assert store.space.free >= store.space.size - 2 * SEGMENT - store.ledger.size
        await sound(host)

    with_host(test)


def test_overwriting_forever_with_little_room() -> None:
    """Garbage collection makes room out of segments that are half empty."""

    async def test(host: Host) -> None:
        await create(host, data=4 * MIB, size=2 * MIB)
        await open_disk(host)
        rnd = random.Random(6)
        content = bytearray(2 * MIB)
        for _ in range(1200):
            offset = BLOCK * rnd.randrange(2 * MIB // BLOCK)
            data = rnd.randbytes(BLOCK)
            await host.write("disk", offset, data)
            content[offset : offset + BLOCK] = data
        assert await host.read("disk", 0, 2 * MIB) == content
        assert store_of(host).counters.moved > 0
        await sound(host)

    with_host(test)


def test_a_full_store_says_so() -> None:
    async def test(host: Host) -> None:
        await create(host, data=3 * MIB, size=8 * MIB)
        await open_disk(host)
        rnd = random.Random(7)
        written: dict[int, bytes] = {}
        with pytest.raises(OSError) as caught:
            for at in range(0, 8 * MIB, SEGMENT):
                data = rnd.randbytes(SEGMENT)
                await host.write("disk", at, data)
                written[at] = data
        assert caught.value.errno == 28
        assert host.named("DEDUP_FULL")[0]["device"] == "data"
        for at, data in written.items():
            assert await host.read("disk", at, SEGMENT) == data
        # What is deleted makes room for others.
        await submit(host, "disk", OP_DISCARD, 0, 2 * SEGMENT)
        data = rnd.randbytes(SEGMENT)
        await host.write("disk", 7 * MIB, data)
        assert await host.read("disk", 7 * MIB, SEGMENT) == data
        await sound(host)

    with_host(test)


def test_held_writes_go_on_when_there_is_space() -> None:
    async def test(host: Host) -> None:
        await create(host, data=3 * MIB, size=8 * MIB)
        await open_disk(host, on_enospc="hold")
        rnd = random.Random(8)
        data = rnd.randbytes(8 * MIB)

        async def fill() -> None:
            for at in range(0, 2 * MIB, SEGMENT):
                await host.write("disk", at, data[at : at + SEGMENT])

        filling = asyncio.create_task(fill())
        await host.until(lambda: bool(host.named("DEDUP_FULL")))
        assert host.named("DEDUP_FULL")[0]["action"] == "hold"
        assert not filling.done()
        while not filling.done():
            await submit(host, "disk", OP_DISCARD, 0, MIB)
            await asyncio.sleep(0.1)
        await filling
        assert await host.read("disk", MIB, MIB) == data[MIB : 2 * MIB]
        await sound(host)

    with_host(test)


def test_what_cannot_be_opened() -> None:
    async def test(host: Host) -> None:
        await create(host)
        with refused("no disk 'else' (it has 'disk')", "give its size"):
            await open_disk(host, disk="else")
        with refused("no dedup store in", "blockdev-create"):
            await open_disk(host, metadata=host.path("nowhere"))
        host.file("other.raw", 8 * MIB)
        await host.add("file", "other", filename=host.path("other.raw"))
        with refused("no dedup store on the data device"):
            await open_disk(host, file="other")
        await open_disk(host)
        with refused("disk 'disk' of the store is node 'disk' already"):
            await open_disk(host, "again")
        with refused("on node 'data' already"):
            await open_disk(host, "again", disk="new", size=MIB, file="other")

    with_host(test)


def test_no_view_of_a_request_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        rnd = random.Random(9)
        for _ in range(20):
            length = 512 * rnd.randint(1, 100)
            await host.write("disk", 512 * rnd.randint(0, 1000), rnd.randbytes(length))
        data = rnd.randbytes(64 << 10)
        await asyncio.gather(*(host.write("disk", at << 16, data) for at in range(8)))

    with_host(test)
    assert not [record for record in caplog.records if "was kept" in record.message]


@pytest.mark.parametrize("block", [4096, 65536])
def test_compressed_blocks(block: int) -> None:
    async def test(host: Host) -> None:
        await create(host, block_size=block, size=2 * MIB)
        await open_disk(host, compress="zstd")
        rnd = random.Random(10)
        content = bytearray()
        while len(content) < 2 * MIB:  # some can be compressed, some cannot
            content += rnd.randbytes(64) * 64 if rnd.random() < 0.8 else rnd.randbytes(4096)
        await host.write("disk", 0, bytes(content))
        for _ in range(30):
            length = 512 * rnd.randint(1, 200)
            offset = 512 * rnd.randint(0, (2 * MIB - length) // 512)
            data = bytes(length - 300) + rnd.randbytes(300)
            await host.write("disk", offset, data)
            content[offset : offset + length] = data
        assert await host.read("disk", 0, 2 * MIB) == content
        store = store_of(host)
        await store.collector.collect()
        stats = store.stats()
        assert stats["compressed"] < 0.8 * stats["unique"]
        await sound(host)
        await host.backend.blockdev_del("disk")
        await open_disk(host)  # without: what is compressed is read all the same
        assert await host.read("disk", 0, 2 * MIB) == content
        await host.write("disk", 0, bytes(content[MIB:]))
        assert await host.read("disk", 0, MIB) == content[MIB:]
        await sound(host)

    with_host(test)


def test_where_data_are() -> None:
    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        await host.write("disk", 4 * BLOCK, random.Random(11).randbytes(8 * BLOCK))
        await host.write("disk", 40 * BLOCK + 512, b"x" * 512)
        found = [extent async for extent in node.extents(512, MIB - 512)]
        assert [(e.start, e.length, e.zero, e.data) for e in found][:4] == [
            (512, 4 * BLOCK - 512, True, False),
            (4 * BLOCK, 8 * BLOCK, False, True),
            (12 * BLOCK, 28 * BLOCK, True, False),
            (40 * BLOCK, BLOCK, False, True),
        ]
        assert sum(e.length for e in found) == MIB - 512
        assert found[1].filename == host.path("data.raw")
        assert await host.read("data", found[1].offset or 0, BLOCK) == await host.read(
            "disk", 4 * BLOCK, BLOCK
        )

    with_host(test)


DIGESTS = {  # b3sum's, of the bytes 0, 1, ... 250, 0, 1, ...
    12: "015094013f57a5277b59d8475c0501042c0b642e531b0a1c8f58d2163229e969",
    14: "f875d6646de28985646f34ee13be9a576fd515f76b5b0a26bb324735041ddde4",
    16: "68d647e619a930e7b1082f74f334b0c65a315725569bdc123f0ee11881717bfe",
}


@pytest.mark.parametrize("vector", [0, 16, 32, 64])
def test_blake3(vector: int) -> None:
    flags = Path("/proc/cpuinfo").read_text()
    if {32: "avx2", 64: "avx512vl"}.get(vector, "") not in flags:
        pytest.skip("this CPU has no vectors of that width")
    for bits, digest in DIGESTS.items():
        data = bytes(at % 251 for at in range(1 << bits))
        assert blake3(data, vector=vector).hex() == digest


@pytest.mark.parametrize("hash", ["blake3", "sha256"])
@pytest.mark.parametrize("block", [4096, 16384, 65536])
def test_fingerprints_of_many_blocks(hash: str, block: int) -> None:
    """What the I/O threads compute for a request is what is computed for each block alone."""

    async def test(host: Host) -> None:
        await create(host, size=2 * MIB, block_size=block, hash=hash)
        await open_disk(host)
        data = random.Random(9).randbytes(MIB + 5 * 512)
        await host.write("disk", 3 * 512, data)
        assert await host.read("disk", 3 * 512, len(data)) == data
        found = await store_of(host).check(
            host.backend.graph.node("disk").data, repair=False, content=True
        )
        assert found.sound, found.messages

    with_host(test)


def test_the_data_device_is_written_from_front_to_back() -> None:
    """Wherever guests write, and whatever they overwrite."""

    async def test(host: Host) -> None:
        await create(host, size=4 * MIB, data=16 * MIB)
        await open_disk(host)
        store, rnd = store_of(host), random.Random(3)
        heads: list[int] = []
        for _ in range(600):
            await host.write("disk", rnd.randrange(4 * MIB // BLOCK) * BLOCK, rnd.randbytes(BLOCK))
            heads.append(store.space.head)
        assert heads == sorted(heads)
        jumps = sum(after - before != BLOCK for before, after in itertools.pairwise(heads))
        assert jumps <= 600 * BLOCK // SEGMENT + 1  # to another segment

    with_host(test)


def test_the_data_device_sees_large_writes(tmp_path: Path) -> None:
    """However small those of the guest are: they are side by side in the log."""

    def writes(device: str) -> tuple[int, int]:
        """So far, and 512-byte sectors (Linux, Documentation/block/stat.rst)."""
        fields = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
        return int(fields[4]), int(fields[6])

    async def test(host: Host) -> None:
        await host.add("host_device", "data", filename=device)
        await new_store(host, "data", size=16 * MIB, segment_size=4 * MIB)
        await open_disk(host)
        rnd, before = random.Random(1), writes(device)
        for _ in range(640):
            await host.write("disk", rnd.randrange(16 * MIB // BLOCK) * BLOCK, rnd.randbytes(BLOCK))
        await store_of(host).flush(host.backend.graph.node("disk").data)
        count, sectors = (new - old for old, new in zip(before, writes(device), strict=True))
        assert sectors * 512 >= 640 * BLOCK
        assert count <= 640 * BLOCK // (64 << 10)

    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 * MIB)
    with attached(image) as device:
        with_host(test)


def test_a_write_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the disk nor in the way of the same content; once is tried again."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        store, child = store_of(host), type(node.data)
        forward, failures = child.forward_part, 0

        async def failed() -> None:
            raise OSError(5, "Input/output error")

        def failing(self: Any, *where: Any) -> Any:
            nonlocal failures
            if failures:
                failures -= 1
                return failed()
            return forward(self, *where)

        monkeypatch.setattr(child, "forward_part", failing)
        data = random.Random(1).randbytes(4 * BLOCK)
        await host.write("disk", 0, data)
        new = random.Random(2).randbytes(4 * BLOCK)
        failures = 2
        with pytest.raises(OSError):
            await host.write("disk", 0, new)
        assert await host.read("disk", 0, 4 * BLOCK) == data
        failures = 1
        await asyncio.gather(*(host.write("disk", at * 4 * BLOCK, new) for at in range(8)))
        assert await host.read("disk", 0, 32 * BLOCK) == 8 * new
        assert not store.being_written and not store._storing and not store.space._flying
        await store.checkpoint()
        assert store.tables.state.blocks == 4
        await sound(host)

    with_host(test)


@pytest.mark.parametrize("hash", ["blake3", "sha256"])
def test_what_stays_in_c(hash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of what the map has never come up, and nothing that is written is hashed by Python."""
    upcalls: list[int] = []
    start = Dedup._start

    def counted(self: Dedup, handle: int, op: int, *rest: int) -> None:
        upcalls.append(op)
        start(self, handle, op, *rest)

    def python(data: object) -> bytes:
        raise AssertionError("hashed by Python")

    async def test(host: Host) -> None:
        await create(host, hash=hash)
        monkeypatch.setattr(Dedup, "_start", counted)
        await open_disk(host)
        await host.export("disk")
        data = random.Random(1).randbytes(MIB)
        monkeypatch.setitem(HASHES, hash, python)
        monkeypatch.setattr(store_of(host), "hash", python)
        async with host.device() as device:
            for at in range(0, MIB, 64 << 10):
                await device.write(at, data[at : at + (64 << 10)])
            await device.read(0, 4096)
            await device.read(512 << 10, 4096)  # the other page of the map
            upcalls.clear()
            for at in range(0, MIB, 64 << 10):
                assert await device.read(at, 64 << 10) == data[at : at + (64 << 10)]
            assert not upcalls
            await device.write(0, data[: 64 << 10])
            assert upcalls == [OP_WRITE]  # which can be seen
            # Blocks that are covered partly, and to whose edges zeroes are written.
            for at, length in ((512, 512), (3 * BLOCK - 512, 3 * BLOCK), (9 * BLOCK, 512)):
                await device.write(at, data[:length])
                data = data[:at] + data[:length] + data[at + length :]
            await device.write_zeroes(20 * BLOCK + 512, BLOCK)
            data = data[: 20 * BLOCK + 512] + bytes(BLOCK) + data[21 * BLOCK + 512 :]
            await host.backend.block_resize("disk", MIB - 512)
            data = data[: MIB - 512]
            assert await host.read("disk", 0, len(data)) == data
        monkeypatch.undo()
        await sound(host)

    with_host(test)


def test_each_io_thread_hashes_what_arrives_on_it() -> None:
    """Two guests on two threads: the time that it takes is on both, not on one for all."""
    block, piece, turns = 64 << 10, 256 << 10, 200
    data = random.Random(1).randbytes(piece)

    async def test(host: Host) -> None:
        await create(host, hash="sha256", block_size=block)
        for name in ("one", "two"):
            thread = {"qom-type": "iothread", "id": name, "poll-max-ns": 0}
            await host.backend.object_add(thread)
            await open_disk(host, name, disk=name, size=MIB)
            await host.export(name, name, iothread=name)
        ids = {thread["id"]: thread["thread-id"] for thread in host.backend.query_iothreads()}
        used = {name: -processor_time(ids[name]) for name in ("one", "two")}
        async with host.device("one") as one, host.device("two") as two:
            for _ in range(turns):  # nothing of it is new but for the first time
                await asyncio.gather(one.write(0, data), two.write(0, data))
        for name in used:
            used[name] += processor_time(ids[name])
        needed = -time.thread_time()
        for _ in range(turns * piece // block):
            hashlib.sha256(data[:block]).digest()
        needed += time.thread_time()
        # The copies that are hashed cost less than that.
        assert min(used.values()) > needed / 2, (used, needed)
        assert store_of(host, "one").counters.hits > turns

    def processor_time(thread: int) -> float:
        fields = Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii").split()
        return int(fields[0]) / 1e9

    with_host(test)


def test_a_disk_stays_while_the_store_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is removed while segments become free: its map is asked for grace first."""

    async def test(host: Host) -> None:
        await create(host)
        first = await open_disk(host)
        await open_disk(host, "other", disk="other", size=MIB)
        for seed in range(2):  # the first MiB is nobody's then, all its segments are
            await host.write("disk", 0, random.Random(seed).randbytes(MIB))
        asked, go_on = asyncio.Event(), asyncio.Event()
        grace = Dedup.grace

        async def slow(self: Dedup) -> None:
            if self is first:
                asked.set()
                await go_on.wait()
            await grace(self)

        monkeypatch.setattr(Dedup, "grace", slow)
        checkpoint = asyncio.create_task(first.store.checkpoint())
        await asked.wait()
        deleting = asyncio.create_task(host.backend.blockdev_del("other"))
        await asyncio.wait([deleting], timeout=0.2)
        assert not deleting.done()
        go_on.set()
        await checkpoint
        await deleting
        await sound(host)

    with_host(test)
