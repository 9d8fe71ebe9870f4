# SPDX-License-Identifier: GPL-2.0-or-later
"""Exports: sockets, connections that come and go, changes under a front-end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from typing import Any

import pytest
from frontend import Device, Status
from in_process import MIB, Host, refused, with_host

from vhostblk.filter import Filter, Request


def test_a_guest_reads_and_writes() -> None:
    async def test(host: Host) -> None:
        path = host.file("a", MIB)
        await host.add("raw", "r", file={"driver": "file", "filename": path})
        await host.export("r", serial="SN-1")
        async with host.device() as guest:
            await guest.write(4096, b"x" * 4096)
            await guest.flush()
            assert await guest.read(4096, 4096) == b"x" * 4096
            assert await guest.get_id() == b"SN-1"
            info = host.backend.query_block_exports()[0]
            assert info["connected"] and info["queues-started"] == 1 and info["connections"] == 1
        with open(path, "rb") as file:
            assert file.read()[4096:8192] == b"x" * 4096
        stats = {s.get("export"): s for s in host.backend.query_blockstats()}["e"]
        assert stats["stats"]["wr_operations"] == stats["latency"]["write"]["count"] == 1
        assert stats["stats"]["wr_bytes"] == 4096
        assert stats["latency"]["read"]["p50-ns"] > 0

    with_host(test)


def test_front_ends_come_and_go() -> None:
    async def test(host: Host) -> None:
        await host.null()
        await host.export("null")
        for _ in range(20):
            async with host.device() as guest:
                assert await guest.read(0, 512) == bytes(512)
        await host.until(lambda: len(host.named("VHOSTBLK_EXPORT_DISCONNECTED")) == 20)
        assert len(host.named("VHOSTBLK_EXPORT_CONNECTED")) == 20
        assert not any("reason" in data for data in host.named("VHOSTBLK_EXPORT_DISCONNECTED"))

    with_host(test)


def test_the_next_front_end_waits_for_the_first_to_go() -> None:
    async def test(host: Host) -> None:
        await host.null()
        await host.export("null")
        async with host.device() as first:
            second = asyncio.create_task(_one_read(host))
            await first.read(0, 512)
            await asyncio.sleep(0.1)
            assert not second.done()
        assert await second == bytes(512)

    async def _one_read(host: Host) -> bytes:
        async with host.device() as guest:
            data: bytes = await guest.read(0, 512)
            return data

    with_host(test)


def test_a_dropped_connection_is_one_line_and_an_event(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        await host.null()
        await host.export("null")
        caplog.clear()
        with socket.socket(socket.AF_UNIX) as sock:
            await asyncio.to_thread(sock.connect, host.path("e.sock"))
            sock.sendall(b"\xff" * 4096)
            await host.until(lambda: bool(host.named("VHOSTBLK_EXPORT_DISCONNECTED")))
        (data,) = host.named("VHOSTBLK_EXPORT_DISCONNECTED")
        assert data["id"] == "e" and data["reason"]
        (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert record.getMessage() == f"export 'e': connection dropped: {data['reason']}"
        async with host.device() as guest:
            assert await guest.read(0, 512) == bytes(512)
        assert host.backend.query_block_exports()[0]["broken-connections"] == 1

    with_host(test)


def test_removal_safe_and_hard() -> None:
    async def test(host: Host) -> None:
        await host.null()
        await host.export("null")
        async with host.device() as guest:
            await guest.read(0, 512)
            with refused("export 'e' still in use"):
                await host.backend.block_export_del("e")
            await host.backend.block_export_del("e", "hard")
            assert not os.path.exists(host.path("e.sock"))
        assert host.named("BLOCK_EXPORT_DELETED") == [{"id": "e"}]
        with refused("Export 'e' is not found"):
            await host.backend.block_export_del("e")
        await host.export("null")  # the name is free again

    with_host(test)


def test_removal_while_requests_are_in_flight() -> None:
    async def test(host: Host) -> None:
        await host.null("slow", latency_ns=200_000_000)
        await host.export("slow")
        async with host.device() as guest:
            for sector in range(8):
                guest.device.submit(0, sector, length=512)
            await asyncio.sleep(0.02)
            await host.backend.block_export_del("e", "hard")

    with_host(test)


def test_pausing_waits_for_what_is_in_flight_and_holds_the_rest() -> None:
    async def test(host: Host) -> None:
        node = await host.null("slow", latency_ns=50_000_000)
        await host.export("slow")
        graph = host.backend.graph
        async with host.device() as guest:
            early = guest.device.submit(0, 0, length=512)
            await host.until(lambda: host.backend.query_block_exports()[0]["inflight"] == 1)
            async with graph.drained([node]):
                assert host.backend.query_block_exports()[0]["inflight"] == 0
                async with graph.drained([node]):  # sections nest
                    late = guest.device.submit(0, 0, length=512)
                await asyncio.sleep(0.1)
                assert host.backend.query_block_exports()[0]["inflight"] == 0
            await guest.wait(early, late)
            assert early.status == late.status == Status.OK

    with_host(test)


def test_two_drives_are_paused_together() -> None:
    async def test(host: Host) -> None:
        node = await host.null("slow", latency_ns=100_000_000)
        await host.export("slow", "a", writable=False)
        await host.export("slow", "b", writable=False)
        async with host.device("a") as one, host.device("b") as two:
            requests = [g.device.submit(0, 0, length=512) for g in (one, two)]
            await host.until(lambda: all(e["inflight"] for e in host.backend.query_block_exports()))
            begun = asyncio.get_running_loop().time()
            async with host.backend.graph.drained([node]):
                assert asyncio.get_running_loop().time() - begun < 0.18
            for guest, request in zip((one, two), requests, strict=True):
                await guest.wait(request)

    with_host(test)


def test_a_guest_is_told_of_a_resize() -> None:
    async def test(host: Host) -> None:
        path = host.file("a", MIB)
        await host.add("file", "f", filename=path)
        await host.export("f")
        async with host.device() as guest:
            assert (await guest.config()).capacity * 512 == MIB
            waiting = asyncio.ensure_future(guest.backend_message(10))
            await host.backend.block_resize("f", 4 * MIB)
            assert await waiting == 2  # VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
            assert (await guest.config()).capacity * 512 == 4 * MIB
            await guest.write(3 * MIB, b"x" * 512)

    with_host(test)


# ---- sockets


def test_stale_and_live_sockets() -> None:
    async def test(host: Host) -> None:
        await host.null()
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(host.path("e.sock"))
        stale.close()
        await host.export("null")  # in its place
        with refused("this process itself listens there", host.path("e.sock")):
            await host.export(
                "null", "e2", writable=False, addr={"type": "unix", "path": host.path("e.sock")},
                share_rw=True,
            )  # fmt: skip
        async with host.device() as guest:  # unharmed
            await guest.read(0, 512)

    with_host(test)


@pytest.mark.parametrize(
    ("addr", "texts"),
    [
        ({"type": "unix"}, ["Parameter 'addr.path' is missing"]),
        ({"type": "unix", "path": "/" + "x" * 107}, ["is too long: 108 bytes", "at most 107"]),
        ({"type": "unix", "path": "/nonexistent/s"}, ["'/nonexistent' does not exist"]),
        ({"type": "unix", "path": "{dir}/file"}, ["something that is not a socket"]),
        ({"type": "unix", "path": "s", "str": "3"}, ["'addr.str' is unexpected"]),
        ({"type": "fd"}, ["Parameter 'addr.str' is missing"]),
        ({"type": "fd", "str": "x"}, ["the number of a file descriptor, not 'x'"]),
        ({"type": "fd", "str": "999"}, ["File descriptor 999", "Bad file"]),
        ({"type": "fd", "str": "0"}, ["File descriptor 0 is not a socket"]),
        ({"type": "unx", "path": "s"}, ["'addr.type'", "'unx'", "did you mean 'unix'?"]),
        ({"typ": "unix"}, ["Parameter 'addr.typ' is unexpected"]),
        ("unix", ["Invalid parameter type for 'addr', expected: object"]),
    ],
)
def test_addresses_that_do_not_work(addr: object, texts: list[str]) -> None:
    async def test(host: Host) -> None:
        await host.null()
        host.file("file", 0)
        given = addr
        if isinstance(addr, dict) and "path" in addr:
            given = {**addr, "path": addr["path"].format(dir=host.directory)}
        with refused(*texts):
            await host.export("null", addr=given)
        assert not host.backend.query_block_exports()
        await host.export("null")

    with_host(test)


def test_an_inherited_socket() -> None:
    async def test(host: Host) -> None:
        await host.null()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(host.path("e.sock"))
            listener.listen()
            fd = str(listener.fileno())
            await host.export("null", addr={"type": "fd", "str": fd})
        async with host.device() as guest:
            await guest.read(0, 512)
        await host.backend.block_export_del("e", "hard")
        assert os.path.exists(host.path("e.sock"))  # not ours to remove

    with_host(test)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num-queues": 0}, "'num-queues' expects a value from 1 to 256"),
        ({"num-queues": 257}, "'num-queues' expects a value from 1 to 256"),
        ({"logical-block-size": 513}, "'logical-block-size' expects a power of two"),
        ({"serial": "x" * 21}, "'serial' expects at most 20"),
        ({"serial": "\n"}, "'serial' expects at most 20"),
        ({"iothread": "io"}, 'iothread "io" not found; make it first'),
        ({"node-name": "nul"}, "did you mean 'null'?"),
        ({"type": "vhost-user-blkk"}, "did you mean 'vhost-user-blk'?"),
        ({"writeable": True}, "did you mean 'writable'?"),
    ],
)
def test_options_that_do_not_work(options: dict[str, Any], text: str) -> None:
    async def test(host: Host) -> None:
        await host.null()
        with refused(text):
            await host.export("null", **options)
        await host.export("null")

    with_host(test)


def test_iothreads() -> None:
    async def test(host: Host) -> None:
        backend = host.backend
        await host.null()
        await backend.object_add({"qom-type": "iothread", "id": "one"})
        await backend.object_add({"qom-type": "iothread", "id": "two", "poll-max-ns": "0"})
        await host.export("null", iothread=["one", "two"], num_queues=4)
        with refused("iothread \"on\" not found; did you mean 'one'?"):
            await host.export("null", "e2", iothread="on")
        with refused("object 'one' is in use", "export 'e'"):
            await backend.object_del("one")
        async with host.device(queues=4) as guest:
            for queue in range(4):
                await guest.read(0, 512, queue)
        served = {entry["id"]: entry["requests"] for entry in backend.query_iothreads()}
        assert served["one"] == served["two"] == 2
        await backend.block_export_del("e", "hard")
        await backend.object_del("one")

    with_host(test)


class Through(Filter):
    """Half of the requests are waited for, half are handed on."""

    driver = "through"

    async def read(self, request: Request) -> None:
        if request.offset % 1024:
            request.forward()
        else:
            await self.file.forward(request)

    write = read


def test_drained_sections_under_load() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        node = await host.add("through", "x", file="f")
        await host.export("x")
        stop = threading.Event()

        def load(device: Device) -> int:
            count = 0
            while not stop.is_set():
                count += 1
                data = count.to_bytes(4) * 128
                requests = [device.submit(1, sector, data) for sector in range(8)]
                device.wait(*requests)
                for sector in range(8):
                    assert device.read(sector * 512, 512) == data
            return count

        async with host.device() as guest:
            working = asyncio.create_task(asyncio.to_thread(load, guest.device))
            for i in range(200):
                async with host.backend.graph.drained([node]):
                    assert host.backend.query_block_exports()[0]["inflight"] == 0
                if i % 50 == 0:
                    await host.backend.block_resize("x", MIB + i * 512)
                await asyncio.sleep(0.001)
            stop.set()
            assert await working > 3

    with_host(test, Through)


def test_front_ends_that_vanish_with_requests_in_flight() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("through", "x", file="f")
        await host.export("x")
        for _ in range(30):
            async with host.device() as guest:
                for sector in range(16):
                    guest.device.submit(0, sector, length=512)
        await host.until(lambda: len(host.named("VHOSTBLK_EXPORT_DISCONNECTED")) == 30)
        assert not host.backend.engine.pending()
        assert not host.named("VHOSTBLK_FILTER_ERROR")

    with_host(test, Through)
