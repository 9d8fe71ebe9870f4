# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine through asyncio: awaitables, batches, objects, statistics."""

from __future__ import annotations

import asyncio
import errno

import pytest
from in_process import MIB, Host, refused, with_host

from vhostblk.engine import (
    COMMAND_BATCH,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    OpStats,
    histogram_floors,
)
from vhostblk.events import EventBus
from vhostblk.ratelimit import RateLimitedLog
from vhostblk.schema import DeviceNotFound


def test_all_operations_on_a_file() -> None:
    async def test(host: Host) -> None:
        file = await host.add("file", "f", filename=host.file("a"), discard="unmap")
        submit, handle = host.backend.engine.submit, file.handle
        data = bytearray(b"abcd" * 1024)
        assert await submit(handle, OP_WRITE, 8192, data) is data
        assert await submit(handle, OP_FLUSH) is None
        back = bytearray(4096)
        await submit(handle, OP_READ, 8192, back)
        assert back == data
        await submit(handle, OP_WRITE_ZEROES, 8192, length=512)
        await submit(handle, OP_DISCARD, 12288, length=4096)
        await submit(handle, OP_READ, 8192, back)
        assert back == bytes(512) + data[512:]
        # A part of a buffer, a read-only one, and an empty one.
        await submit(handle, OP_WRITE, 0, b"0123456789" * 100, 512, buffer_offset=10)
        await submit(handle, OP_READ, 0, memoryview(back)[:512])
        assert bytes(back[:10]) == b"0123456789"
        await submit(handle, OP_WRITE, 0, b"")

    with_host(test)


def test_mistakes_are_refused_before_they_reach_c() -> None:
    async def test(host: Host) -> None:
        node = await host.null()
        submit = host.backend.engine.submit
        with pytest.raises((BufferError, ValueError, TypeError)):
            submit(node.handle, OP_READ, 0, b"read-only")
        with pytest.raises(ValueError):
            submit(node.handle, OP_READ, 0, bytearray(8), 9)
        with pytest.raises(ValueError):
            submit(node.handle, OP_READ, 0)

    with_host(test)


def test_errors_are_oserrors() -> None:
    async def test(host: Host) -> None:
        file = await host.add("file", "f", filename=host.file("a"), read_only=True)
        with pytest.raises(OSError) as caught:
            await host.backend.engine.submit(file.handle, OP_WRITE, 0, b"x" * 512)
        assert caught.value.errno in (errno.EBADF, errno.EPERM, errno.EROFS, errno.EACCES)

    with_host(test)


def test_many_at_once_and_in_every_asyncio_way() -> None:
    async def test(host: Host) -> None:
        file = await host.add("file", "f", filename=host.file("a", 8 * MIB))
        submit = host.backend.engine.submit
        count = 3 * COMMAND_BATCH + 7
        await asyncio.gather(
            *(submit(file.handle, OP_WRITE, i * 512, i.to_bytes(2) * 256) for i in range(count))
        )
        buffers = [bytearray(512) for _ in range(count)]
        ios = [submit(file.handle, OP_READ, i * 512, buffer) for i, buffer in enumerate(buffers)]
        done, pending = await asyncio.wait(ios, timeout=10)  # type: ignore[type-var]
        assert len(done) == count and not pending
        assert all(buffer == i.to_bytes(2) * 256 for i, buffer in enumerate(buffers))
        assert not host.backend.engine.pending()
        # Awaited twice, late, in a task, and by several.
        io = submit(file.handle, OP_READ, 0, bytearray(512))
        await asyncio.sleep(0.05)
        assert await io is await io
        again = submit(file.handle, OP_READ, 0, bytearray(512))

        async def wait() -> bytearray:
            return await again  # type: ignore[no-any-return]

        assert len({id(buffer) for buffer in await asyncio.gather(wait(), wait(), again)}) == 1

    with_host(test)


def test_cancelling_a_task_does_not_let_go_of_memory_in_use() -> None:
    async def test(host: Host) -> None:
        node = await host.null("slow", latency_ns=100_000_000)
        buffer = bytearray(512)
        io = host.backend.engine.submit(node.handle, OP_READ, 0, buffer)

        async def wait() -> None:
            await io

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        with pytest.raises(BufferError):
            buffer.extend(b"x")  # the engine may still write to it
        with pytest.raises(asyncio.CancelledError):
            await task
        assert io.done()
        buffer.extend(b"x")

    with_host(test)


def test_percentiles() -> None:
    floors = histogram_floors()
    assert floors[0] == 0 and floors[1] == 128 and list(floors) == sorted(floors)
    histogram = [0] * len(floors)
    bucket = next(i for i, floor in enumerate(floors) if floor >= 1000)
    histogram[bucket] = 98
    histogram[bucket + 40] = 2
    op = OpStats(100, 0, 0, 100_000, 0, tuple(histogram))
    assert floors[bucket] <= op.percentile(50) <= floors[bucket + 1]
    assert op.percentile(99) >= floors[bucket + 40]
    assert op.mean_ns == 1000
    assert op.buckets() == [(floors[bucket], 98), (floors[bucket + 40], 2)]
    empty = OpStats(0, 0, 0, 0, 0, tuple([0] * len(floors)))
    assert empty.percentile(50) == 0 and empty.mean_ns == 0 and empty.buckets() == []


def test_objects() -> None:
    async def test(host: Host) -> None:
        backend = host.backend
        await backend.object_add({"qom-type": "iothread", "id": "io", "poll-max-ns": "1000"})
        assert backend.qom_list("/objects") == [{"name": "io", "type": "child<iothread>"}]
        assert backend.qom_get("/objects/io", "poll-max-ns") == 1000
        await backend.qom_set("/objects/io", "poll-max-ns", 0)
        await backend.qom_set("io", "poll-shrink", "4")
        assert backend.qom_get("io", "poll-max-ns") == 0
        assert backend.qom_get("io", "poll-shrink") == 4
        (thread,) = backend.query_iothreads()
        assert thread["id"] == "io" and thread["poll-max-ns"] == 0 and thread["thread-id"] > 0
        with refused("Property 'iothread.aio' is not writable", "poll-grow, poll-max-ns"):
            await backend.qom_set("io", "aio", "threads")
        with refused("Property 'iothread.poll-max' not found", "did you mean 'poll-max-ns'?"):
            backend.qom_get("io", "poll-max")
        with refused("'poll-max-ns' expects a value from 0"):
            await backend.qom_set("io", "poll-max-ns", -1)
        with pytest.raises(DeviceNotFound, match="did you mean"):
            backend.qom_get("/objects/iO", "type")
        with refused("exists already"):
            await backend.object_add({"qom-type": "iothread", "id": "io"})
        with refused("Parameter 'qom-type' does not accept value 'iothred'", "'iothread'?"):
            await backend.object_add({"qom-type": "iothred", "id": "io2"})
        with refused("Parameter 'qom-type' is missing"):
            await backend.object_add({"id": "io2"})
        with refused("object 'io2' not found", "did you mean 'io'?"):
            await backend.object_del("io2")
        await backend.object_del("io")
        assert backend.query_iothreads() == []

    with_host(test)


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
def test_both_ways_of_file_io(aio: str) -> None:
    async def test(host: Host) -> None:
        await host.backend.object_add({"qom-type": "iothread", "id": "io", "aio": aio})
        await host.add("file", "f", filename=host.file("a"))
        await host.export("f", iothread="io")
        async with host.device() as guest:
            await guest.write(0, b"x" * 65536)
            assert await guest.read(0, 65536) == b"x" * 65536
        (thread,) = [t for t in host.backend.query_iothreads() if t["id"] == "io"]
        assert thread["aio"] == aio
        # A node is used by all threads above it: what it was told, for QEMU's sake, says nothing.
        assert not any("aio" in node for node in host.backend.query_named_block_nodes())

    with_host(test)


def test_a_backend_can_be_made_again_and_leaves_no_descriptors() -> None:
    import os

    async def test(host: Host) -> None:
        await host.null()
        await host.export("null")
        async with host.device() as guest:
            await guest.read(0, 512)

    with_host(test)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with_host(test)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_event_bus() -> None:
    bus = EventBus()
    one: list[str] = []
    two: list[str] = []
    bus.listen(lambda event: one.append(event.name))
    stop = bus.listen(lambda event: two.append(event.name))
    bus.emit("FIRST", {})
    stop()
    bus.emit("LAST", {})
    assert (one, two) == (["FIRST", "LAST"], ["FIRST"])


def test_rate_limited_log(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    now = [0.0]
    log = RateLimitedLog(logging.getLogger("x"), burst=3, per_second=1, clock=lambda: now[0])
    told = [log.log(logging.WARNING, "line %d", i) for i in range(10)]
    assert told == [True] * 3 + [False] * 7
    now[0] = 1.5
    assert log.log(logging.WARNING, "again")
    assert caplog.messages[-1] == "again (and 7 more like it before, not shown)"
