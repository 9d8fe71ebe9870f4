# SPDX-License-Identifier: GPL-2.0-or-later
"""What a snapshot does while guests are paused, and what it has done before or leaves for later."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import fcntl
import gc
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from frontend.device import BlockError
from graph_changes import act, transaction
from in_process import MIB, Host, refused, with_host

from vhostblk.engine import OP_FLUSH, OP_WRITE, REQ_FUA, Engine
from vhostblk.engine.map import MapHandle
from vhostblk.export.vhost_user_blk import VhostUserBlkExport
from vhostblk.filter import Filter, Request
from vhostblk.garbage import no_collection
from vhostblk.graph import Graph
from vhostblk.state import StateFile

# What may have to wait for a disk, or for another thread. (Taking an OFD lock never does.)
SLOW = {
    os: [
        *("open", "fsync", "fdatasync", "sync", "posix_fallocate", "ftruncate", "truncate"),
        *("stat", "lstat", "fstat", "statvfs", "readlink", "listdir", "scandir", "mkdir", "rmdir"),
        *("read", "write", "pread", "pwrite", "preadv", "pwritev", "utime", "chmod"),
    ],
    builtins: ["open"],
    fcntl: ["flock"],
    threading.Thread: ["start"],
    asyncio.BaseEventLoop: ["run_in_executor"],
    Engine: ["submit", "submit_upcall"],
}
# A quorum's metadata must name the new legs before the first write reaches one. They were written
# before the pause; what remains changes a directory in the page cache.
NAMES = {os: ["rename", "link", "unlink", "replace"]}


class Watch:
    """Calls during a pause."""

    def __init__(self) -> None:
        self.paused = False
        self.pauses = 0
        self.calls: list[str] = []
        self.names: list[str] = []


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    pause, resume = Graph._pause, VhostUserBlkExport.resume

    async def paused(graph: Graph, drives: Any) -> Any:
        devices = await pause(graph, drives)
        watch.paused = True
        watch.pauses += 1
        return devices

    def resumed(export: VhostUserBlkExport) -> None:
        watch.paused = False
        resume(export)

    def count(owner: Any, name: str, calls: list[str]) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            if watch.paused:
                what = f" {args[2]}" if owner is Engine else ""
                calls.append(f"{getattr(owner, '__name__', owner)}.{name}{what}")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    monkeypatch.setattr(Graph, "_pause", paused)
    monkeypatch.setattr(VhostUserBlkExport, "resume", resumed)
    for calls, owners in ((watch.calls, SLOW), (watch.names, NAMES)):
        for owner, names in owners.items():
            for name in names:
                count(owner, name, calls)
    return watch


async def drive(host: Host, name: str, size: int = 4 * MIB) -> None:
    """An export of a quorum of three qcow2 images."""
    legs = [f"{name}{leg}" for leg in range(3)]
    for leg in legs:
        path = host.path(f"{leg}.qcow2")
        file = {"driver": "file", "filename": path}
        host.file(f"{leg}.qcow2", 0)
        create = {"driver": "qcow2", "file": file, "size": size}
        await host.backend.blockdev_create(f"create-{leg}", create)
        job = host.backend.jobs.get(f"create-{leg}")
        await host.until(lambda job=job: job.status.value == "concluded")  # type: ignore[misc]
        await host.add("qcow2", leg, file=file)
    await host.add("quorum", f"q{name}", children=legs, vote_threshold=2)
    await host.export(f"q{name}", name)


@contextlib.asynccontextmanager
async def state_of(host: Host) -> AsyncIterator[StateFile]:
    file = StateFile(host.path("state"))
    host.backend.graph.state_path = file.path
    yield file
    file.close()


def test_nothing_slow_is_done_in_the_pause(watch: Watch) -> None:
    """Two drives of three legs each, with a state file: no file system call, no I/O, no thread."""

    async def test(host: Host) -> None:
        async with state_of(host) as state:
            await drive(host, "a")
            await drive(host, "b")
            await host.backend.keep_state(state)
            async with host.device("a") as a, host.device("b") as b:
                for number in range(3):
                    await a.write(0, bytes([number]) * 4096)
                    await b.write(0, bytes([number]) * 4096)
                    actions = [("blockdev-snapshot-sync", {"device": name}) for name in "ab"]
                    await transaction(host, *actions)
                    assert watch.pauses == number + 1
                    assert watch.calls == []
                    text = Path(state.path).read_text()
                    assert f"a0-{number + 1}" in text and "covered" not in text
                assert await a.read(0, 4096) == bytes([2]) * 4096
        # For each quorum: the old file stays beside the new one until that is on the disk.
        assert set(watch.names) <= {"os.rename", "os.link", "os.unlink"}
        assert len(watch.names) <= 3 * 2 * 3

    with_host(test)


def test_what_is_slow_in_the_pause_is_noticed(watch: Watch) -> None:
    """By the test above: this one has what must not be there."""

    async def test(host: Host) -> None:
        await drive(host, "a")
        graph = host.backend.graph

        async def slow() -> None:
            os.stat(host.path("a0.qcow2"))
            await asyncio.to_thread(os.sync)
            await host.backend.engine.submit(graph.node("a0").effective, OP_FLUSH)

        async with host.device("a"), graph.lock, graph.change() as change:
            change.inside(slow)
            change.replace_child(graph.backend("a"), "root", graph.node("a0"))
        assert "os.stat" in watch.calls
        assert "BaseEventLoop.run_in_executor" in watch.calls
        assert f"Engine.submit {OP_FLUSH}" in watch.calls

    with_host(test)


def test_tables_are_not_given_to_the_engine_again(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay is opened without what it is to cover, and knows that something shows through."""
    installed: list[bool] = []
    install = MapHandle.install

    def counting(handle: MapHandle, *args: Any) -> None:
        installed.append(watch.paused)
        install(handle, *args)

    async def test(host: Host) -> None:
        await drive(host, "a", 256 * MIB)
        monkeypatch.setattr(MapHandle, "install", counting)
        async with host.device("a") as guest:
            await guest.write(0, b"1" * 4096)
            installed.clear()
            await act(host, "blockdev-snapshot-sync", device="a")
            assert installed and not any(installed)
            assert await guest.read(0, 8192) == b"1" * 4096 + bytes(4096)

    with_host(test)


def test_an_overlay_that_comes_to_nothing_shows_nothing() -> None:
    async def test(host: Host) -> None:
        await drive(host, "a")
        path = host.path("o.qcow2")
        await host.write("a0", 0, b"1" * 4096)
        file = {"driver": "file", "filename": path}
        host.file("o.qcow2", 0)
        await host.backend.blockdev_create(
            "create", {"driver": "qcow2", "file": file, "size": 4 * MIB}
        )
        await host.until(lambda: host.backend.jobs.get("create").status.value == "concluded")
        overlay = await host.add("qcow2", "o", file=file, backing=None)
        snapshot = ("blockdev-snapshot", {"node": "a0", "overlay": "o"})
        for _ in range(2):
            with refused("aborted"):
                await transaction(host, snapshot, ("abort", {}))
            assert not overlay.has_backing and not overlay.children.get("backing")
            assert await host.read("o", 0, 8192) == bytes(8192)
        await transaction(host, snapshot)
        assert await host.read("o", 0, 8192) == b"1" * 4096 + bytes(4096)

    with_host(test)


# ---- the flush that is left for later


class Flaky(Filter):
    """Counts flushes, and fails those after the first `good` ones."""

    driver = "flaky"
    keeps_data = True
    flushes = 0
    good = 1 << 30

    async def flush(self, request: Request) -> None:
        Flaky.flushes += 1
        if Flaky.flushes > Flaky.good:
            raise OSError(errno.EIO, "flaky")
        await self.file.forward(request)


async def flaky_disk(host: Host, good: int) -> None:
    await host.add("file", "f", filename=host.file("disk.img", 4 * MIB))
    await host.add("flaky", "flaky", file="f")
    await host.add("raw", "leg", file="flaky")
    await host.export("leg")
    Flaky.flushes, Flaky.good = 0, good


def flush(host: Host, node: str, op: int = OP_FLUSH) -> Any:
    handle = host.backend.graph.node(node).effective
    if op == OP_FLUSH:
        return host.backend.engine.submit(handle, OP_FLUSH)
    return host.backend.engine.submit(handle, op, MIB, b"3" * 512, flags=REQ_FUA)


def test_a_flush_of_the_overlay_is_one_of_what_it_covers_until_that_has_succeeded() -> None:
    async def test(host: Host) -> None:
        await flaky_disk(host, good=1)
        template = {"snapshot-file": host.path("o.qcow2")}
        async with host.device() as guest:
            await guest.write(0, b"1" * 4096)
            answer = await transaction(
                host, ("blockdev-snapshot-sync", {"device": "e", **template})
            )
            [made] = answer["results"][0]["snapshots"]
            assert "'leg' cannot be flushed" in made["error"] and made["overlay"] == "leg-1"
            assert Flaky.flushes == 2
            assert {node.name for node in host.backend.covered} == {"leg"}
            await guest.write(4096, b"2" * 4096)
            for op in (OP_FLUSH, OP_WRITE):  # nothing may be promised
                with pytest.raises(OSError, match="Input/output error"):
                    await flush(host, "leg-1", op)
            with pytest.raises(BlockError):
                await guest.flush()
            Flaky.good = 1 << 30
            await guest.flush()
            count = Flaky.flushes
            await guest.write(8192, b"3" * 4096)
            await guest.flush()
            assert Flaky.flushes == count  # it has been paid
            assert await guest.read(0, 8192) == b"1" * 4096 + b"2" * 4096

    with_host(test, Flaky)


def test_what_is_covered_is_flushed_before_the_answer() -> None:
    async def test(host: Host) -> None:
        await flaky_disk(host, good=1 << 30)
        async with host.device() as guest:
            await guest.write(0, b"1" * 4096)
            await act(host, "blockdev-snapshot-sync", device="e")
            assert Flaky.flushes == 2  # before the pause, and after it
            assert not host.backend.covered
            await guest.flush()
            assert Flaky.flushes == 2

    with_host(test, Flaky)


def test_a_process_that_takes_over_owes_the_flush() -> None:
    """Guests may be faster than it: what a killed one has covered was perhaps not flushed."""

    async def test(host: Host) -> None:
        await flaky_disk(host, good=1 << 30)
        async with host.device() as guest:
            await act(host, "blockdev-snapshot-sync", device="e")
            count = Flaky.flushes
            host.backend.expect_covered(["leg"])
            await guest.write(0, b"1" * 4096)
            await guest.flush()
            assert Flaky.flushes == count + 1

    with_host(test, Flaky)


def test_an_overlay_that_cannot_owe_a_flush_is_waited_for() -> None:
    async def test(host: Host) -> None:
        await flaky_disk(host, good=1)
        with refused("No snapshot was taken: node 'leg' cannot be flushed"):
            await act(host, "blockdev-snapshot-sync", device="e", format="qed")
        assert Flaky.flushes == 2 and not host.backend.covered
        assert host.backend.graph.backend("e").root.name == "leg"

    with_host(test, Flaky)


# ---- garbage


def test_nobody_looks_for_garbage_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []

    async def test(host: Host) -> None:
        await drive(host, "a")

        async def look() -> None:
            looked.append(gc.isenabled())

        host.backend.graph.on_switched = look
        async with host.device("a"):
            await act(host, "blockdev-snapshot-sync", device="a")
        assert looked == [False] and gc.isenabled()

    with_host(test)


def test_sections_without_collection_nest() -> None:
    assert gc.isenabled()
    with contextlib.suppress(ZeroDivisionError), no_collection():
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()  # somebody wants it like that
    finally:
        gc.enable()
