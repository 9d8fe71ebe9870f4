# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup disks that are resized, and metadata on a file system that is full."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dedup_lab import BLOCK, SEGMENT, create, open_disk, sound, store_of
from in_process import MIB, Host, refused, with_host

from vhostblk.dedup.format import Mapped, Superblock, pack_records
from vhostblk.dedup.journal import Journal
from vhostblk.dedup.space import FreeSegments
from vhostblk.dedup.tables import PAGE, Tables
from vhostblk.engine import OP_DISCARD, OP_FLUSH


def test_resizing() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        data = random.Random(1).randbytes(MIB)
        await host.write("disk", 0, data)
        await host.backend.block_resize("disk", 2 * MIB)
        assert await host.read("disk", 0, 2 * MIB) == data + bytes(MIB)
        await host.backend.block_resize("disk", MIB // 2)
        await host.backend.block_resize("disk", MIB)
        assert await host.read("disk", 0, MIB) == data[: MIB // 2] + bytes(MIB // 2)
        await sound(host)
        await host.backend.blockdev_del("disk")
        node = await open_disk(host)
        assert node.size == MIB

    with_host(test)


def test_resizing_in_the_middle_of_a_block() -> None:
    """What a disk that has become shorter has lost does not come back when it grows."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await host.write("disk", 0, b"x" * MIB)
        await host.backend.block_resize("disk", BLOCK + 512)
        await host.backend.block_resize("disk", MIB)
        expected = (b"x" * (BLOCK + 512)).ljust(MIB, b"\0")
        assert await host.read("disk", 0, MIB) == expected
        await sound(host)

    with_host(test)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A few MiB, for the metadata."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(tmp_path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_data_device_grows_under_writes_that_wait() -> None:
    """Each time that it is full the operator is told; it does not become smaller again."""

    async def test(host: Host) -> None:
        await create(host, data=3 * MIB, size=8 * MIB)
        await open_disk(host, on_enospc="hold")
        content = random.Random(5).randbytes(6 * MIB)
        writing = asyncio.create_task(host.write("disk", 0, content))
        for times, size in enumerate([5 * MIB, 16 * MIB], 1):
            await host.until(lambda n=times: len(host.named("DEDUP_FULL")) == n)  # type: ignore[misc]
            assert host.named("DEDUP_FULL")[-1]["device"] == "data"
            assert store_of(host).stats()["full"]
            await host.backend.block_resize("data", size)
        await writing
        assert not store_of(host).stats()["full"]
        assert await host.read("disk", 0, 6 * MIB) == content
        with refused("Node 'data' cannot be resized: node 'disk' does not allow it"):
            await host.backend.block_resize("data", 8 * MIB)
        await sound(host)

    with_host(test)


def test_free_segments() -> None:
    free = FreeSegments()
    for number in (5, 1, 3, 1):
        free.add(number)
    free.discard(3)
    free.discard(4)
    assert (len(free), set(free)) == (2, {1, 5})
    assert free.pop() == 1
    free.add(3)
    free.discard(5)
    free.add(5)
    assert [free.pop() for _ in range(2)] == [3, 5]
    assert len(free) == 0


def test_the_operator_hears_of_a_metadata_device_that_becomes_full(
    small_file_system: Path,
) -> None:
    async def test(host: Host) -> None:
        meta = str(small_file_system / "meta")
        await create(host, size=64 * MIB, data=64 * MIB, metadata=meta)
        await open_disk(host, metadata=meta)
        store_of(host).tuning.changes = 64
        there = os.statvfs(small_file_system)
        (small_file_system / "ballast").write_bytes(
            bytes(there.f_frsize * there.f_bavail * 9 // 10)
        )
        rnd = random.Random(6)
        for at in range(0, MIB, BLOCK):
            await host.write("disk", at, rnd.randbytes(BLOCK))
        told = [event for event in host.named("DEDUP_SPACE") if event["device"] == "metadata"]
        assert told and told[0]["percent"] >= 80
        assert told[0]["metadata"] == meta

    with_host(test)


def test_commands_when_the_metadata_cannot_be_written(small_file_system: Path) -> None:
    """What needs no room goes on, and the rest says what is missing."""

    async def test(host: Host) -> None:
        meta = str(small_file_system / "meta")
        await create(host, size=64 * MIB, data=64 * MIB, metadata=meta)
        await open_disk(host, metadata=meta)
        await host.write("disk", 0, random.Random(7).randbytes(MIB))
        fill_up(small_file_system / "ballast")
        found = await host.command("query-dedup", node_name="disk")
        assert found["logical"] == MIB
        for name in ("dedup-collect", "dedup-check"):
            with refused("The dedup store", "cannot do it now"):
                await host.command(name, node_name="disk")
        (small_file_system / "ballast").unlink()
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert found["corruptions"] == found["wrong"] == 0

    with_host(test)


@pytest.mark.parametrize("action", ["report", "hold"])
def test_metadata_device_full(small_file_system: Path, action: str) -> None:
    """Writes fail, or wait; nothing that was written is lost; they go on when there is space."""

    async def test(host: Host) -> None:
        meta = str(small_file_system / "meta")
        await create(host, size=64 * MIB, data=64 * MIB, metadata=meta, segment_size=MIB)
        await open_disk(host, metadata=meta, on_enospc=action)
        store_of(host).tuning.changes = 200
        ballast = small_file_system / "ballast"
        rnd = random.Random(2)
        content: dict[int, bytes] = {}
        for at in range(0, 4 * MIB, BLOCK):
            content[at] = rnd.randbytes(BLOCK)
            await host.write("disk", at, content[at])
        fill_up(ballast)

        async def write_more() -> None:
            for at in range(4 * MIB, 12 * MIB, BLOCK):
                data = rnd.randbytes(BLOCK)
                await host.write("disk", at, data)
                content[at] = data

        writing = asyncio.create_task(write_more())
        await host.until(lambda: bool(host.named("DEDUP_FULL")))
        assert host.named("DEDUP_FULL")[0]["device"] == "metadata"
        if action == "report":
            with pytest.raises(OSError) as caught:
                await writing
            assert caught.value.errno == 28
        await check(host, content)
        ballast.unlink()
        if action == "hold":
            await asyncio.sleep(0.6)
            stopped = len(content)
            await host.until(lambda: writing.done() or len(content) > stopped)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        data = rnd.randbytes(BLOCK)
        await host.write("disk", 0, data)
        content[0] = data
        handle = host.backend.graph.node("disk").effective
        await host.backend.engine.submit(handle, OP_FLUSH)
        await check(host, content)
        await sound(host)

    with_host(test)


@pytest.mark.parametrize("action", ["report", "hold"])
def test_a_journal_that_fills_its_file_system_begins_anew(
    small_file_system: Path, action: str
) -> None:
    """With a checkpoint, which needs less space than it gives back; writes and flushes go on."""

    async def test(host: Host) -> None:
        meta = str(small_file_system / "meta")
        await create(host, size=64 * MIB, data=64 * MIB, metadata=meta, segment_size=MIB)
        await open_disk(host, metadata=meta, on_enospc=action)
        store, handle = store_of(host), host.backend.graph.node("disk").effective
        two = [random.Random(seed).randbytes(BLOCK) for seed in range(2)]
        await host.write("disk", 0, two[0] + two[1])
        for at in range(6):  # the database has pages that it can use again
            await host.write("disk", 0, two[(at + 1) % 2])
            await store.checkpoint()
        ballast = small_file_system / "ballast"
        fill_up(ballast)
        os.truncate(ballast, ballast.stat().st_size - (128 << 10))
        before, at = store.counters.checkpoints, 0
        while store.counters.checkpoints < before + 2:
            await host.write("disk", 0, two[at % 2])
            at += 1
        # The same where it is a flush that finds no room for its mark, the shortest of all records.
        while 4096 - store.journal.size % 4096 > 40:
            await host.write("disk", 0, two[at % 2])
            at += 1
        fill_up(small_file_system / "more")
        before = store.counters.checkpoints
        await host.backend.engine.submit(handle, OP_FLUSH)
        assert store.counters.checkpoints == before + 1 and not store.dirty
        assert not host.named("DEDUP_FULL")
        assert await host.read("disk", 0, BLOCK) == two[(at - 1) % 2]
        await sound(host)

    with_host(test)


def test_what_was_never_written_costs_a_discard_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large disk the pages are looked at that show something, in the database or not yet."""

    async def test(host: Host) -> None:
        await create(host, size=1 << 40, data=8 * MIB)
        await open_disk(host)
        await open_disk(host, "other", disk="other", size=1 << 40)
        store = store_of(host)
        data = random.Random(5).randbytes(4 * BLOCK)
        page = PAGE * BLOCK
        inside = [at * page - 2 * BLOCK for at in (300, 301, 5000, 70000, 1 << 20)]
        outside = [200 * page, (1 << 20) * page + 2 * BLOCK]
        for at in (*inside[::2], *outside):
            await host.write("disk", at, data)
            await host.write("other", at, data)
        await store.checkpoint()
        for at in inside[1::2]:
            await host.write("disk", at, data)
        looked: list[int] = []
        look = store.tables.page

        def spied(disk: int, number: int) -> Any:
            looked.append(number)
            return look(disk, number)

        handle = host.backend.graph.node("disk").effective
        monkeypatch.setattr(store.tables, "page", spied)
        begin, end = inside[0] + BLOCK, (1 << 20) * page + BLOCK
        await host.backend.engine.submit(handle, OP_DISCARD, begin, None, end - begin)
        monkeypatch.undo()
        assert len(looked) <= 4 * len(inside)
        kept = data[:BLOCK] + bytes(3 * BLOCK), bytes(3 * BLOCK) + data[3 * BLOCK :]
        assert await host.read("disk", inside[0], len(data)) == kept[0]
        assert await host.read("disk", inside[-1], len(data)) == kept[1]
        for at in inside[1:-1]:
            assert await host.read("disk", at, len(data)) == bytes(len(data))
        for at in outside:
            assert await host.read("disk", at, len(data)) == data
        for at in (*inside[::2], *outside):
            assert await host.read("other", at, len(data)) == data
        await sound(host)

    with_host(test)


def fill_up(path: Path) -> None:
    """All that the file system has left."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


async def check(host: Host, content: dict[int, Any]) -> None:
    for at, data in list(content.items()):
        assert await host.read("disk", at, BLOCK) == data, at


def test_a_journal_that_could_not_be_synced_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second fdatasync() may report success although the kernel has given up the pages."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        store = store_of(host)
        handle = host.backend.graph.node("disk").effective
        submit = host.backend.engine.submit
        data = random.Random(3).randbytes(4 * BLOCK)
        await host.write("disk", 0, data)

        def failing(fd: int) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr("vhostblk.dedup.journal.os.fdatasync", failing)
            with pytest.raises(OSError):
                await submit(handle, OP_FLUSH)
        before = store.counters.checkpoints
        await submit(handle, OP_FLUSH)
        assert store.counters.checkpoints == before + 1 and not store.tables.changes
        assert await host.read("disk", 0, 4 * BLOCK) == data
        await sound(host)

    with_host(test)


def test_a_disk_survives_its_creation() -> None:
    """It is in the database when the job has ended, not only in a journal that nobody synced."""

    async def test(host: Host) -> None:
        await create(host)
        directory = Path(host.path("meta"))
        super = Superblock.parse((directory / "superblock").read_bytes())
        tables = Tables(directory, super, 1 << 30)
        assert tables.disks() == {1: (MIB, "disk")}
        tables.close()

    with_host(test)


def test_changes_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A discard of a whole disk is many changes at once."""

    async def test(host: Host) -> None:
        await create(host, size=8 * MIB, data=16 * MIB)
        await open_disk(host)
        store = store_of(host)
        for at in range(0, 8 * MIB, MIB):
            await host.write("disk", at, random.Random(at).randbytes(MIB))
        await store.checkpoint()
        store.tuning.changes = 100
        most, apply = 0, store.tables.apply

        def watched(record: Any) -> None:
            nonlocal most
            apply(record)
            most = max(most, store.tables.changes)

        monkeypatch.setattr(store.tables, "apply", watched)
        handle = host.backend.graph.node("disk").effective
        await host.backend.engine.submit(handle, OP_DISCARD, 0, None, 8 * MIB)
        assert 400 < most <= 400 + 3 * PAGE
        assert await host.read("disk", 0, MIB) == bytes(MIB)
        monkeypatch.undo()
        await sound(host)

    with_host(test)


def test_what_waits_for_the_ledger_is_bounded() -> None:
    """However few blocks change, and though nobody flushes."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        store, rnd = store_of(host), random.Random(8)
        store.tuning.changes = 64
        most = 0
        for _ in range(400):
            await host.write("disk", 0, rnd.randbytes(BLOCK))
            most = max(most, store.ledger.waiting)
        assert 0 < most < 200

    with_host(test)


def test_a_long_journal_is_replayed_a_little_at_a_time() -> None:
    """It is not in memory as a whole, and others have their turns."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        data = random.Random(3).randbytes(2 * BLOCK)
        await host.write("disk", 0, data)
        await host.write("disk", BLOCK, bytes(BLOCK))
        shown = node.store.tables.page(node.number, 0)[0]
        number, frame = node.store.journal.number, node.store.journal.next_frame
        there = host.directory / "killed"
        shutil.copytree(host.path("meta"), there)
        await host.backend.blockdev_del("disk")
        records = [Mapped(node.number, 9, 1, shown), Mapped(node.number, 9, 1, 0)]
        grown = Journal(there, node.store.super.uuid)
        path = there / f"journal.{number}"
        before = path.read_bytes()
        grown.begin(number, frame)
        for _ in range(400):
            grown.append(pack_records(records * 250))
        grown.append(pack_records([Mapped(node.number, 1, 1, shown)]))
        frames = path.read_bytes()
        grown.close()
        path.write_bytes(before + frames)
        turns = 0

        async def other_device() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(other_device())
        tracemalloc.start()
        try:
            again = await open_disk(host, metadata=str(there))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            counting.cancel()
        assert again.store.tables.state.frame == frame + 401
        assert await host.read("disk", 0, 3 * BLOCK) == data[:BLOCK] * 2 + bytes(BLOCK)
        assert peak < 3 * len(frames), (peak, len(frames))  # the ledger gets all of them, packed
        assert turns > 400
        await sound(host)

    with_host(test)


def test_the_memory_of_changes_is_bounded_by_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as the option says, even when the database takes nothing any more."""
    limit = 4 * MIB

    async def test(host: Host) -> None:
        await create(host, size=256 * MIB, data=8 * MIB)
        await open_disk(host, changes_size=limit)
        store = store_of(host)
        block = random.Random(1).randbytes(BLOCK)
        await host.write("disk", 0, block * 256)
        blocked = threading.Event()

        def stuck(self: Any) -> None:
            blocked.wait()

        monkeypatch.setattr(type(store.tables), "write", stuck)
        tracemalloc.start()
        try:
            writing = asyncio.create_task(fill(host, block))
            await host.until(
                lambda: store.tables.frozen and store.tables.changes > 4 * store.tuning.changes, 30
            )
            await asyncio.sleep(0.2)
            used, _ = tracemalloc.get_traced_memory()
            assert not writing.done() and limit / 8 < used <= limit + MIB
        finally:
            tracemalloc.stop()
            monkeypatch.undo()
            blocked.set()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def fill(host: Host, block: bytes) -> None:
        for at in range(0, 256 * MIB, 64 * BLOCK):
            await host.write("disk", at, block * 64)

    with_host(test)


@pytest.mark.parametrize("action", ["report", "hold"])
def test_database_full(action: str) -> None:
    """The journal has space, the database has none: held writes wait, others fail with ENOSPC."""

    async def test(host: Host) -> None:
        await create(host, size=64 * MIB, data=128 * MIB)
        await open_disk(host, on_enospc=action, metadata_size=1 << 20)
        store_of(host).tuning.changes = 200
        content: dict[int, bytes] = {}

        async def fill() -> None:
            for at in range(0, 64 * MIB, 16 * BLOCK):
                data = random.Random(at).randbytes(16 * BLOCK)
                await host.write("disk", at, data)
                content[at] = data[:BLOCK]

        writing = asyncio.create_task(fill())
        await host.until(lambda: bool(host.named("DEDUP_FULL")), seconds=30)
        if action == "report":
            with pytest.raises(OSError) as caught:
                await writing
            assert caught.value.errno == 28
        else:
            await asyncio.sleep(0.7)
            assert not writing.done()
            store_of(host).tuning.hold = False
            with pytest.raises(OSError):
                await writing
        await check(host, content)

    with_host(test)


def test_a_segment_that_cannot_be_read_for_a_while_does_not_stop_collection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(host: Host) -> None:
        await create(host, data=4 * MIB)
        await open_disk(host)
        node = host.backend.graph.node("disk")
        rnd = random.Random(5)
        data = rnd.randbytes(MIB)
        await host.write("disk", 0, data)
        used = node.store.space.used
        first = min(segment for segment in used if used[segment])
        bad = node.store.super.segment_at(first)
        read = type(node.data).read

        def failing(self: Any, offset: int, into: Any) -> Any:
            if bad <= offset < bad + SEGMENT:
                raise OSError(5, "Input/output error")
            return read(self, offset, into)

        for at in range(0, MIB, 4 * BLOCK):  # holes everywhere
            await host.write("disk", at, rnd.randbytes(3 * BLOCK))
        with monkeypatch.context() as patch:
            patch.setattr(type(node.data), "read", failing)
            patch.setattr("vhostblk.dedup.collection.UNMOVABLE_INTERVAL", 0.2)
            assert await node.store.collector.collect() >= 2
        assert used[first] > 0
        # Once it can be read again, it is emptied, too.
        await asyncio.sleep(0.2)
        await node.store.collector.collect()
        assert not used.get(first)
        assert (await host.read("disk", 0, MIB))[3 * BLOCK : 4 * BLOCK] == (
            data[3 * BLOCK : 4 * BLOCK]
        )
        await sound(host)

    with_host(test)


def test_the_map_in_memory_is_bounded_and_metadata_are_small() -> None:
    """cache-size, and what docs/dedup.md says that a stored block costs."""

    async def test(host: Host) -> None:
        size = 32 * MIB
        await create(host, size=size, data=2 * size)
        node = await open_disk(host, cache_size=16 << 10)
        for at in range(0, size, MIB):
            await host.write("disk", at, random.Random(at).randbytes(MIB))
        for at in range(0, size, MIB):
            assert await host.read("disk", at, MIB) == random.Random(at).randbytes(MIB)
            assert len(node._tables) <= 16
        assert size // BLOCK // PAGE > 16  # all of them would have been more
        store = store_of(host)
        await store.checkpoint()
        blocks = store.tables.state.blocks
        assert blocks == size // BLOCK
        assert store.tables.size / blocks <= 300
        copy = host.directory / "copy.mdb"
        store.tables.copy(copy, b"")
        assert copy.stat().st_size / blocks <= 200

    with_host(test)


def test_a_check_takes_a_few_bytes_for_each_block() -> None:
    """A store has millions of them; rebuilding one ends with a check, too."""
    count = 8192

    async def test(host: Host) -> None:
        await create(host, size=count * BLOCK, data=2 * count * BLOCK)
        node = await open_disk(host)
        rnd = random.Random(2)
        for at in range(0, count * BLOCK, MIB):
            await host.write("disk", at, rnd.randbytes(MIB))
        await node.store.check(node.data, repair=False)  # nothing waits any more
        tracemalloc.start()
        try:
            found = await node.store.check(node.data, repair=True, content=True)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert found.sound and found.blocks == count
        assert peak < 64 * count

    with_host(test)
