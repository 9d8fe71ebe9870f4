# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's map node, under a small format of the test's own.

`Toy` keeps its tables in a dict in Python, evicts them when it likes, gives runs and copies what
the engine cannot. Every answer is compared with a model; every allocation must be in the log.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from compiled import loaded
from frontend import Status, Type
from in_process import MIB, Host, with_host
from vhostblk._engine import ffi, lib

from vhostblk.engine import OP_FLUSH, OP_READ, OP_WRITE, REQ_FUA
from vhostblk.engine.map import (
    MAP_BACKING,
    MAP_DATA,
    MAP_MISS,
    MAP_OFFSET,
    MAP_PENDING,
    MAP_TYPE,
    MAP_WRITABLE,
    MAP_ZERO,
    MapHandle,
    new_map,
)
from vhostblk.nodes._map_log import LogFile, open_log
from vhostblk.nodes.driver import ChildRole, NodeOptions, RoleKind
from vhostblk.nodes.hooks import HookedChild, HookedNode, Request
from vhostblk.schema import BlockdevRef

BITS = 12
UNIT = 1 << BITS
TABLE_BITS = 4
PER_TABLE = 1 << TABLE_BITS
IN_PLACE = MAP_DATA | MAP_WRITABLE


class ToyOptions(NodeOptions):
    file: BlockdevRef
    backing: BlockdevRef | None = None
    size: int = MIB


class Toy(HookedNode):
    """A format without a disk layout."""

    driver = "toy"
    Options = ToyOptions
    child_class = HookedChild
    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole(RoleKind.STORAGE),
        "backing": ChildRole(RoleKind.BACKING, optional=True),
    }
    log: LogFile | None = None
    options: ToyOptions

    async def open(self) -> None:
        self._prepare_hooks()
        self._hooks = [self.on_read, self.on_write, self.on_flush, self.on_other, self.on_other]
        self.truth: dict[int, int] = {}  # cluster: entry
        self.free = 0
        self.run = 8 * UNIT
        self.came_up: list[int] = []
        self.lows = 0
        self.logged: list[tuple[int, int]] = []
        self.locks: dict[int, asyncio.Lock] = {}
        self.nothing = MAP_BACKING if self.options.backing is not None else MAP_ZERO
        self.map: MapHandle = new_map(
            self.engine,
            size=self.options.size,
            unit_bits=BITS,
            cluster_bits=BITS,
            table_bits=TABLE_BITS,
            has_backing=self.options.backing is not None,
            backing_size=self.child("backing").size if self.options.backing is not None else 0,
            allocate=True,
            sink=self._start,
            low=self.is_low,
            log=self.log,
        )
        self.handle = self.map

    @property
    def size(self) -> int:
        return self.options.size

    def relink(self) -> None:
        for index, child in enumerate(self.children.values()):
            child.refresh()
            self.map.set_child(index, child.node.effective)

    def is_low(self) -> None:
        self.lows += 1
        self.give()

    def give(self) -> None:
        if self.run and self.map.give(self.free, self.run):
            self.free += self.run

    def apply_log(self) -> None:
        changes = ffi.new("struct vb_map_change[]", 512)
        while count := lib.vb_map_take_log(self.map.pointer, changes, len(changes)):
            for change in changes[0:count]:
                assert change.units == 1 and change.entry & MAP_TYPE == MAP_DATA
                self.truth[change.guest >> BITS] = change.entry
                self.logged.append((change.guest, change.entry & MAP_OFFSET))

    def tables_of(self, request: Request) -> range:
        first = request.offset >> BITS + TABLE_BITS
        return range(first, ((request.offset + request.length - 1) >> BITS + TABLE_BITS) + 1)

    def load(self, request: Request) -> bool:
        """Install what is missing; whether anything was."""
        any_missing = False
        for table in self.tables_of(request):
            self.apply_log()
            first = table << TABLE_BITS
            entries = [self.truth.get(first + i, self.nothing) for i in range(PER_TABLE)]
            try:
                self.map.install(table, array("Q", entries))
                any_missing = True
            except OSError as error:
                assert error.errno == errno.EEXIST
        return any_missing

    async def on_read(self, request: Request) -> None:
        self.came_up.append(request.op)
        assert self.load(request)
        request.retry()

    async def on_write(self, request: Request) -> None:
        self.came_up.append(request.op)
        if request.fua:
            io = self.engine.submit(
                self.map, OP_WRITE, request.offset, None, request.length, request=request.handle
            )
            request._inflight += 1
            io.owner = request
            await io
            await self.on_flush(request)
            return
        if not self.load(request):
            self.give()
            for cluster in {request.offset >> BITS, (request.offset + request.length - 1) >> BITS}:
                await self.copy(cluster)
        request.retry()

    async def copy(self, cluster: int) -> None:
        """A cluster that is written in part gets what the backing file has."""
        if self.map.get(cluster) != MAP_BACKING or not self.map.claim(cluster, MAP_BACKING):
            return
        old = bytes(await self.child("backing").read(cluster << BITS, UNIT))
        host, self.free = self.free, self.free + UNIT
        await self.child("file").write(host, old)
        self.truth[cluster] = host | IN_PLACE
        self.map.set(cluster, 1, host | IN_PLACE, 0)

    async def on_flush(self, request: Request) -> None:
        self.came_up.append(OP_FLUSH)
        self.apply_log()
        await self.child("file").flush()
        self.map.set_dirty(False)

    async def on_other(self, request: Request) -> None:
        self.came_up.append(request.op)

    async def evict(self, table: int) -> bool:
        found = self.map.evict(table)
        await self.map.grace()
        self.apply_log()
        return found


async def toy(host: Host, *, backing: bool = False, size: int = MIB) -> Toy:
    await host.add("file", "f", filename=host.file("data", 16 * MIB))
    options: dict[str, Any] = {"file": "f", "size": size}
    if backing:
        path = host.file("base", size)
        with open(path, "wb") as file:
            file.write(os.urandom(size))
        await host.add("file", "b", filename=path, read_only=True)
        options["backing"] = "b"
    node = await host.add("toy", "t", **options)
    assert isinstance(node, Toy)
    return node


async def flush(host: Host, flags: int = 0) -> None:
    await host.backend.engine.submit(host.backend.graph.node("t").effective, OP_FLUSH, flags=flags)


def test_what_is_mapped_never_comes_up() -> None:
    async def test(host: Host) -> None:
        node = await toy(host)
        node.give()
        await host.write("t", 0, b"a" * UNIT)
        assert node.came_up == [OP_WRITE]  # for its table
        await host.write("t", 512, b"b" * 512)
        await host.write("t", 3 * UNIT - 512, b"c" * 1024)  # two fresh clusters, in part
        got = await host.read("t", 0, 4 * UNIT)
        assert got[:UNIT] == b"a" * 512 + b"b" * 512 + b"a" * 3072
        assert got[UNIT:] == bytes(2 * UNIT - 512) + b"c" * 1024 + bytes(UNIT - 512)
        assert node.came_up == [OP_WRITE]
        node.apply_log()
        assert sorted(guest for guest, _ in node.logged) == [0, 2 * UNIT, 3 * UNIT]
        assert len({host for _, host in node.logged}) == 3
        with open(host.path("data"), "rb") as file:
            file.seek(node.truth[2] & ~511)
            assert file.read(UNIT) == bytes(UNIT - 512) + b"c" * 512

    with_host(test, Toy)


def test_flush_comes_up_only_if_something_is_dirty() -> None:
    async def test(host: Host) -> None:
        node = await toy(host)
        await flush(host)
        assert node.came_up == []
        node.give()
        await host.write("t", 0, b"a" * UNIT)
        node.came_up.clear()
        await flush(host)
        assert node.came_up == [OP_FLUSH]
        await flush(host)
        await host.write("t", 0, b"b" * UNIT)
        await flush(host)
        assert node.came_up == [OP_FLUSH]
        node.map.set_dirty(True)
        await flush(host)
        assert node.came_up == [OP_FLUSH] * 2
        # Taking the log is no flush: until Python says otherwise the map is dirty.
        await host.write("t", 5 * UNIT, b"a" * 512)
        node.apply_log()
        await flush(host)
        assert node.came_up == [OP_FLUSH] * 3

    with_host(test, Toy)


def test_fua_goes_through_python_while_the_map_is_ahead_of_the_disk() -> None:
    async def test(host: Host) -> None:
        node = await toy(host)
        node.give()
        engine = host.backend.engine
        await host.write("t", 0, b"a" * UNIT)
        await flush(host)
        node.came_up.clear()
        await engine.submit(node.map, OP_WRITE, 0, b"b" * 512, flags=REQ_FUA)
        assert node.came_up == []
        await engine.submit(node.map, OP_WRITE, UNIT, b"c" * 512, flags=REQ_FUA)  # allocates
        assert node.came_up == [OP_WRITE, OP_FLUSH]
        await host.write("t", 2 * UNIT, b"d" * 512)
        await engine.submit(node.map, OP_WRITE, 0, b"e" * 512, flags=REQ_FUA)
        assert node.came_up == [OP_WRITE, OP_FLUSH] * 2
        assert await host.read("t", 0, 512) == b"e" * 512

    with_host(test, Toy)


def test_backing_is_read_copied_and_replaced() -> None:
    async def test(host: Host) -> None:
        node = await toy(host, backing=True)
        with open(host.path("base"), "rb") as file:
            model = bytearray(file.read())
        assert await host.read("t", 0, MIB) == model
        node.give()
        node.came_up.clear()
        await host.write("t", 4 * UNIT, b"w" * 2 * UNIT)  # whole clusters: the engine's
        assert node.came_up == []
        # Parts, the second over a border: the engine copies what is around them.
        await host.write("t", 8 * UNIT + 512, b"p" * 512)
        await host.write("t", 12 * UNIT - 1024, b"q" * 2048)
        assert node.came_up == []
        node.map.reclaim()
        node.run = 0
        await host.write("t", 20 * UNIT + 512, b"r" * 512)  # no cluster for it: Python's
        assert OP_WRITE in node.came_up
        model[4 * UNIT : 6 * UNIT] = b"w" * 2 * UNIT
        model[8 * UNIT + 512 : 8 * UNIT + 1024] = b"p" * 512
        model[12 * UNIT - 1024 : 12 * UNIT + 1024] = b"q" * 2048
        model[20 * UNIT + 512 : 20 * UNIT + 1024] = b"r" * 512
        assert await host.read("t", 0, MIB) == model

    with_host(test, Toy)


def test_a_backing_file_that_is_shorter_ends_in_zeroes() -> None:
    async def test(host: Host) -> None:
        node = await toy(host, backing=True)
        node.map.set_size(MIB, 5 * UNIT + 512)
        with open(host.path("base"), "rb") as file:
            model = file.read(5 * UNIT + 512)
        assert await host.read("t", 0, 16 * UNIT) == model + bytes(16 * UNIT - len(model))

    with_host(test, Toy)


def test_requests_wait_for_a_pending_entry() -> None:
    async def test(host: Host) -> None:
        node = await toy(host)
        engine = host.backend.engine
        node.give()
        await host.write("t", 0, b"a" * UNIT)
        entry = node.map.get(0)
        assert node.map.claim(0, entry) and not node.map.claim(0, entry)
        assert node.map.get(0) == MAP_PENDING
        buffer = bytearray(2 * UNIT)
        read = engine.submit(node.map, OP_READ, 0, buffer)
        write = engine.submit(node.map, OP_WRITE, 512, b"w" * 512)
        await host.read("t", UNIT, UNIT)  # others go on
        assert not read.done() and not write.done()
        node.map.set(0, 1, entry, 0)
        await read
        await write
        assert await host.read("t", 512, 512) == b"w" * 512
        # A table that goes away while somebody waits sends him to Python.
        assert node.map.claim(0, entry)
        read = engine.submit(node.map, OP_READ, 0, buffer)
        await asyncio.sleep(0.01)
        node.truth[0] = entry
        node.map.evict(0)
        await read
        assert bytes(buffer[:512]) == b"a" * 512

    with_host(test, Toy)


def test_a_write_without_a_run_comes_up_and_a_run_asks_for_the_next() -> None:
    async def test(host: Host) -> None:
        node = await toy(host)
        node.run = 0
        write = host.backend.engine.submit(node.map, OP_WRITE, 0, b"a" * UNIT)
        await host.until(lambda: len(node.came_up) > 3)  # it has nothing to give
        assert not write.done()
        node.run = 4 * UNIT
        await write
        await host.until(lambda: node.lows > 0)
        await host.write("t", 0, b"b" * 16 * UNIT)  # more than one run
        assert await host.read("t", 0, 16 * UNIT) == b"b" * 16 * UNIT
        left = node.map.reclaim()
        node.apply_log()
        used = {host for _, host in node.logged}
        for start, length in left:
            assert not used & set(range(start, start + length, UNIT))
        assert len(used) + sum(length for _, length in left) // UNIT == node.free // UNIT
        assert node.map.reclaim() == []

    with_host(test, Toy)


@pytest.mark.parametrize("length", [2 * UNIT, 512])
def test_a_failed_write_over_the_backing_file_leaves_that(length: int) -> None:
    data = b"a" * length

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("data", 16 * MIB))
        await host.add("error-inject", "bad", file="f", operations="write", errno="ENOSPC", count=1)
        await host.null("b")
        node = await host.add("toy", "t", file="bad", backing="b", size=MIB)
        node.give()
        with pytest.raises(OSError) as caught:
            await host.write("t", 0, data)
        assert caught.value.errno == errno.ENOSPC
        assert await host.read("t", 0, 2 * UNIT) == bytes(2 * UNIT)
        assert node.map.get(0) == MAP_BACKING
        node.apply_log()
        assert node.logged == []
        await host.write("t", 0, data)
        assert await host.read("t", 0, len(data)) == data

    with_host(test, Toy)


def test_grace_waits_for_those_that_began_before() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("data", 16 * MIB))
        await host.add("delay", "slow", file="f", read_ns=1_000_000_000)
        node = await host.add("toy", "t", file="slow", size=MIB)
        node.give()
        await host.write("t", 0, b"a" * UNIT)
        await node.map.grace()
        old = host.backend.engine.submit(node.map, OP_READ, 0, bytearray(512))
        first = asyncio.create_task(node.map.grace())
        await asyncio.sleep(0.5)
        new = host.backend.engine.submit(node.map, OP_READ, 0, bytearray(512))
        second = asyncio.create_task(node.map.grace())
        await first
        assert old.done() and not new.done() and not second.done()
        await second
        assert new.done()
        await asyncio.gather(*(node.map.grace() for _ in range(5)))

    with_host(test, Toy)


def test_eviction_and_use() -> None:
    async def test(host: Host) -> None:
        node = await toy(host)
        assert not node.map.evict(0) and not node.map.used(0)
        node.give()
        await host.write("t", 0, b"a" * UNIT)
        assert node.map.used(0) and not node.map.used(0)
        await host.read("t", 0, 512)
        assert node.map.used(0)
        node.came_up.clear()
        assert await node.evict(0)
        assert node.map.get(0) == MAP_MISS
        assert await host.read("t", 0, UNIT) == b"a" * UNIT
        assert node.came_up == [OP_READ]
        with pytest.raises(OSError):
            node.map.install(MIB, array("Q", bytes(8 * PER_TABLE)))

    with_host(test, Toy)


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_random_requests_from_several_threads(threads: int, backing: bool) -> None:
    """Each queue has a part of the disk; tables are shared, come and go, and nothing is lost."""
    rounds, queues, part = 60, 4, 24 * UNIT

    async def test(host: Host) -> None:
        size = queues * part
        node = await toy(host, backing=backing, size=size)
        node.run = 16 * UNIT
        names = [f"io{i}" for i in range(threads)]
        for name in names:
            await host.backend.object_add({"qom-type": "iothread", "id": name})
        await host.export("t", num_queues=queues, iothread=names)
        model = bytearray(await host.read("t", 0, size))
        stop = asyncio.Event()

        async def disturb() -> None:
            table = 0
            while not stop.is_set():
                await node.evict(table % (size >> BITS + TABLE_BITS))
                await flush(host)
                table += 1
                await asyncio.sleep(0.002)

        async with host.device(queues=queues) as guest:

            def work() -> None:
                device, rng = guest.device, random.Random(threads + 10 * backing)
                for _ in range(rounds):
                    running = []
                    for queue in range(queues):
                        # Two writes to different halves, so that the outcome is certain.
                        for half in range(2):
                            room = part // 2
                            offset = rng.randrange(room // 512) * 512
                            length = min(rng.randrange(1, 40) * 512, room - offset)
                            offset += queue * part + half * room
                            data = rng.randbytes(length)
                            model[offset : offset + length] = data
                            request = device.prepare(Type.OUT, offset // 512, data, queue=queue)
                            running.append(request)
                    device.publish(*running)
                    device.wait(*running)
                    assert all(request.status == Status.OK for request in running)
                    offset = rng.randrange(size // 512 - 64) * 512
                    assert device.read(offset, 64 * 512, rng.randrange(queues)) == bytes(
                        model[offset : offset + 64 * 512]
                    )

            disturbing = asyncio.create_task(disturb())
            await asyncio.to_thread(work)
            stop.set()
            await disturbing
        assert await host.read("t", 0, size) == model
        node.apply_log()
        hosts = [host for _, host in node.logged]
        assert len(hosts) == len(set(hosts))  # no cluster for two
        guests = [guest for guest, _ in node.logged]
        assert len(guests) == len(set(guests))  # none allocated twice

    with_host(test, Toy)


def test_the_log_outlives_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(host: Host) -> None:
        monkeypatch.setenv("VHOSTBLK_LOG_DIR", str(host.directory))
        image = host.file("image")
        log = open_log(image, b"token", fresh=True)
        assert log is not None
        monkeypatch.setattr(Toy, "log", log)
        node = await toy(host)
        node.give()
        await host.write("t", 7 * UNIT, b"a" * UNIT)
        assert node.map.add_to_log(3 * UNIT, 0x1234, 0x5678)
        taken = node.map.log_taken()
        node.apply_log()
        found = [(record.guest, record.python) for record in log.pending()]
        assert found == [(7 * UNIT, False), (3 * UNIT, True)]
        assert (log.pending()[1].entry, log.pending()[1].extra) == (0x1234, 0x5678)
        await host.write("t", 8 * UNIT, b"a" * UNIT)
        node.map.log_done(taken + 2)  # the first two are on disk
        assert [record.guest for record in log.pending()] == [8 * UNIT]
        # Who comes later finds it, if it is the same image in the same state.
        await host.backend.blockdev_del("t")
        log.close(remove=False)
        log = open_log(image, b"token", fresh=False)
        assert log is not None and [record.guest for record in log.pending()] == [8 * UNIT]
        log.close(remove=False)
        log = open_log(image, b"another", fresh=False)
        assert log is not None and log.pending() == []
        log.close(remove=True)
        assert not log.path.exists()

    with_host(test, Toy)


def test_a_full_log_makes_writes_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(host: Host) -> None:
        monkeypatch.setenv("VHOSTBLK_LOG_DIR", str(host.directory))
        monkeypatch.setattr("vhostblk.nodes._map_log.RECORDS", 4)
        log = open_log(host.file("image"), b"", fresh=True)
        assert log is not None
        monkeypatch.setattr(Toy, "log", log)
        node = await toy(host)
        node.give()
        for cluster in range(4):
            await host.write("t", cluster * UNIT, b"a" * 512)
        assert not node.map.add_to_log(0, 0, 0)
        node.came_up.clear()
        write = host.backend.engine.submit(node.map, OP_WRITE, 4 * UNIT, b"a" * 512)
        await host.until(lambda: len(node.came_up) > 2)
        assert not write.done()
        node.apply_log()
        node.map.log_done(node.map.log_taken())
        await write
        assert node.map.get(4) & MAP_TYPE == MAP_DATA
        await host.backend.blockdev_del("t")
        log.close(remove=True)

    with_host(test, Toy)


def test_a_table_that_the_control_thread_looks_at_is_not_freed_by_an_io_thread(
    tmp_path: Path,
) -> None:
    engine = Path(__file__).parent.parent / "cffi_build" / "engine"
    sources = [engine / "nodes" / name for name in ("map_table.c", "map_runs.c")]
    sources.append(Path(__file__).with_name("c") / "map_spread.c")
    library = loaded(tmp_path, sources, f"-I{engine}", "-Dfree=noted_free")
    assert library.map_spread() == 2
