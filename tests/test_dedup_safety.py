# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup: what was flushed stays, and no place is written to while something needs it.

Power cuts are in tests/test_dedup_crash.py; here are moments that these do not meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import struct
import threading
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from dedup_lab import BLOCK, SEGMENT, create, database, new_store, open_disk, sound
from frontend import Status, Type
from frontend.protocol import NO_STATUS
from in_process import MIB, Guest, Host, refused, with_host

from vhostblk.dedup.errors import InconsistentError
from vhostblk.dedup.format import Marked, Superblock, pack_block
from vhostblk.dedup.ledger import State
from vhostblk.dedup.space import Space
from vhostblk.dedup.tables import FILE, PAGE, Tables
from vhostblk.engine import OP_DISCARD, OP_FLUSH
from vhostblk.filter import Filter, Request
from vhostblk.graph import PAUSE_PATIENCE
from vhostblk.nodes.dedup import driver
from vhostblk.schema import VhostblkError

_KEY = struct.Struct(">Q")
_PAGE_KEY = struct.Struct(">IQ")


async def submit(host: Host, op: int, offset: int = 0, length: int = 0, node: str = "disk") -> None:
    handle = host.backend.graph.node(node).effective
    await host.backend.engine.submit(handle, op, offset, None, length)


async def killed(host: Host, **options: Any) -> Any:
    """A disk `again` of the store as kill -9 would leave it now; its node."""
    there = host.directory / "killed"
    there.mkdir()
    shutil.copy(host.path("data.raw"), there)
    shutil.copytree(host.path("meta"), there / "meta")
    await host.add("file", "data2", filename=str(there / "data.raw"), discard="unmap")
    return await host.add("dedup", "again", file="data2", metadata=str(there / "meta"), **options)


# ---- segments


def test_a_segment_that_the_ledger_has_taken_is_not_the_logs() -> None:
    """The database's head may be at the end of a segment that has become free since."""
    super = Superblock(12, 18, "blake3", bytes(16))
    space = Space(super, 20 * SEGMENT, {5: BLOCK}, super.segment_at(4) - BLOCK, ())
    space.taken(3)
    space.check()
    assert 3 not in space.empty() and space.allocate(BLOCK)[0] < super.segment_at(3)
    with pytest.raises(InconsistentError):
        space.release(3)
    space.give_back(3)
    space.add_free(3)
    with pytest.raises(InconsistentError):
        space.give_back(3)
    with pytest.raises(InconsistentError):
        space.release(5)
    space.ledger.add(5)
    with pytest.raises(InconsistentError):
        space.check()


def test_what_is_flushed_after_a_kill_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment becomes free while the database is written whose head is at its end, and the
    ledger takes it."""

    async def test(host: Host) -> None:
        await create(host, data=16 * MIB, size=8 * MIB)
        node = await open_disk(host, discard="unmap")
        store, space, rnd = node.store, node.store.space, random.Random(1)
        at = 0
        while space.head % SEGMENT != store.super.segment_at(0) % SEGMENT or not at:
            await host.write("disk", at, rnd.randbytes(BLOCK))
            at += BLOCK
        last = store.super.segment_of(space.head - 1)
        await submit(host, OP_DISCARD, 0, at)
        gate, write = threading.Event(), Tables.write

        def slow(self: Tables) -> None:
            gate.wait()
            write(self)

        with monkeypatch.context() as patch:
            patch.setattr(Tables, "write", slow)
            checkpoint = asyncio.create_task(store.checkpoint())
            await host.until(lambda: store.tables.frozen)
            await host.write("disk", 4 * MIB, rnd.randbytes(BLOCK))
            gate.set()
            await checkpoint
        taken = set(space.ledger)
        blocks = [rnd.randbytes(BLOCK) for _ in range(3)]
        count = 0
        while space.ledger == taken:
            for _ in range(400):
                await host.write("disk", count % 1024 * BLOCK, blocks[count % 3])
                count += 1
            await submit(host, OP_FLUSH)
        assert last in space.ledger
        again = await killed(host, discard="unmap")
        assert last in again.store.space.ledger
        content = {}
        for at in range(0, 2 * MIB, BLOCK):
            content[at] = rnd.randbytes(BLOCK)
            await host.write("again", at, content[at])
        await submit(host, OP_FLUSH, node="again")
        again.store.ledger.least_log = 1  # soon there is a new generation
        for at in range(4 * MIB, 4 * MIB + 6 * BLOCK, BLOCK):
            content[at] = rnd.randbytes(BLOCK)
            await host.write("again", at, content[at])
            await again.store.checkpoint()
            await host.until(lambda: again.store._dump is None)
        await host.until(lambda: last not in again.store.space.ledger)
        again.forget_places()
        for at, data in content.items():
            assert await host.read("again", at, BLOCK) == data, at
        await sound(host, "again")

    with_host(test)


def test_a_store_that_contradicts_itself_stops() -> None:
    """Nothing is written any more; what was complete is there when it is opened again."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        store, data = node.store, random.Random(2).randbytes(MIB)
        await host.write("disk", 0, data)
        await store.checkpoint()
        tables = store.tables
        wrong = store.super.segment_of(tables.block(tables.get(node.number, 0)).offset)
        await submit(host, OP_DISCARD, 0, SEGMENT)
        store.space.ledger.add(wrong)
        store.tuning.changes = SEGMENT // BLOCK  # a checkpoint is due
        await host.write("disk", 0, b"x" * BLOCK)
        await host.until(lambda: store._stopped)
        await check_that_it_fails(host, random.Random(4).randbytes(BLOCK))
        await check_that_it_fails(host, data[MIB // 2 : MIB // 2 + BLOCK])  # it is stored
        await check_that_it_fails(host, bytes(BLOCK))
        expected = b"x" * BLOCK + bytes(SEGMENT - BLOCK) + data[SEGMENT:]
        assert await host.read("disk", 0, MIB) == expected
        with pytest.raises(OSError):
            await store.checkpoint()
        await host.backend.blockdev_del("disk")
        await open_disk(host)
        assert await host.read("disk", 0, MIB) == expected
        await host.write("disk", 0, bytes(BLOCK))
        await sound(host)

    with_host(test)


async def check_that_it_fails(host: Host, data: bytes) -> None:
    with pytest.raises(OSError) as caught:
        await host.write("disk", 8 * BLOCK, data)
    assert caught.value.errno == 5


def test_background_work_that_fails_as_nobody_expects_stops_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(host: Host) -> None:
        await create(host)
        store, data = (await open_disk(host)).store, random.Random(19).randbytes(BLOCK)

        async def checkpoint() -> None:
            raise KeyError("no such segment")

        with monkeypatch.context() as patch:
            patch.setattr(store, "checkpoint", checkpoint)
            store.tuning.changes = 1
            await host.write("disk", 0, data)
            await host.until(lambda: store._stopped)
        await check_that_it_fails(host, bytes(BLOCK))
        await host.backend.blockdev_del("disk")
        await open_disk(host)
        assert await host.read("disk", 0, BLOCK) == data
        await sound(host)

    with_host(test)


def test_metadata_that_give_a_segment_to_two_are_refused() -> None:
    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        await host.write("disk", 0, random.Random(3).randbytes(MIB))
        await node.store.checkpoint()
        [wrong, *_] = [segment for segment, used in node.store.space.used.items() if used]
        await host.backend.blockdev_del("disk")
        with database(host) as edited:
            state = State.parse(edited.value("ledger") or b"")
            state.segments.append(wrong)
            with edited.writing() as writer:
                writer.put_value("ledger", state.pack())
        with refused("two things", "dedup-rebuild"):
            await open_disk(host)

    with_host(test)


# ---- flushes


def test_a_flush_beside_one_that_fails_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fdatasync() reports success although the kernel has given up the pages."""

    async def test(host: Host) -> None:
        await create(host)
        store, data = (await open_disk(host)).store, random.Random(5).randbytes(2 * BLOCK)
        failing, sync = [threading.Event()], os.fdatasync

        def fails_once(fd: int) -> None:
            if failing:
                failing.pop().wait()
                raise OSError(5, "Input/output error")
            sync(fd)

        await host.write("disk", 0, data[:BLOCK])
        monkeypatch.setattr("vhostblk.dedup.journal.os.fdatasync", fails_once)
        event, before = failing[0], store.counters.checkpoints
        first = asyncio.create_task(submit(host, OP_FLUSH))
        await host.until(lambda: not failing)
        await host.write("disk", 2 * BLOCK, data[BLOCK:])
        second = asyncio.create_task(submit(host, OP_FLUSH))
        await host.until(lambda: len(store._protected) == 2)
        event.set()
        with pytest.raises(OSError):
            await first
        await second
        assert store.counters.checkpoints == before + 1
        assert store.tables.state.frame == store.journal.next_frame

    with_host(test)


def test_a_flush_after_one_that_failed_ends_while_others_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(host: Host) -> None:
        await create(host, data=32 * MIB)
        node = await open_disk(host)
        store = node.store
        await open_disk(host, "other", disk="other", size=MIB)
        write = Tables.write

        def fails(fd: int) -> None:
            raise OSError(5, "Input/output error")

        def busy(self: Tables) -> None:
            """Something has changed whenever the database has been written."""
            asyncio.run_coroutine_threadsafe(change(), loop).result()
            write(self)

        async def change() -> None:
            nonlocal count
            count += 1
            await host.write("other", count % 64 * BLOCK, random.Random(count).randbytes(BLOCK))

        count, loop = 0, asyncio.get_running_loop()
        await host.write("disk", 0, random.Random(6).randbytes(BLOCK))
        with monkeypatch.context() as patch:
            patch.setattr("vhostblk.dedup.journal.os.fdatasync", fails)
            with pytest.raises(OSError):
                await submit(host, OP_FLUSH)
        await host.write("disk", BLOCK, random.Random(7).randbytes(BLOCK))
        monkeypatch.setattr(Tables, "write", busy)
        before = store.counters.checkpoints
        await asyncio.wait_for(submit(host, OP_FLUSH), 20)
        assert store.counters.checkpoints == before + 1 and store.tables.changes
        # And where nothing changes but the journal has lost something.
        monkeypatch.undo()
        await store.checkpoint()
        with monkeypatch.context() as patch:
            patch.setattr("vhostblk.dedup.journal.os.fdatasync", fails)
            store._append([Marked(0)])
            with pytest.raises(OSError):
                await store.flush(node.data)
        await asyncio.wait_for(store.flush(node.data), 20)
        await sound(host)

    with_host(test)


def full(self: Tables) -> None:
    raise OSError(28, "the metadata of the dedup store are full")


def test_a_store_opens_after_a_kill_when_its_database_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes on with the journal, of which the old files are synced by the next flush, too."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        rnd = random.Random(12)
        content = rnd.randbytes(MIB // 2)
        await host.write("disk", 0, content)
        synced: set[str] = set()
        sync = os.fdatasync

        def watched(fd: int) -> None:
            synced.add(os.readlink(f"/proc/self/fd/{fd}"))
            sync(fd)

        with monkeypatch.context() as patch:
            patch.setattr(Tables, "write", full)
            patch.setattr("vhostblk.dedup.journal.os.fdatasync", watched)
            again = await killed(host, on_enospc="hold")
            journals = {str(path) for path in Path(again._directory).glob("journal.*")}
            assert len(journals) >= 2
            await submit(host, OP_FLUSH, node="again")
            assert synced == journals
            content += rnd.randbytes(BLOCK)
            await host.write("again", MIB // 2, content[-BLOCK:])
            await submit(host, OP_FLUSH, node="again")
            assert await host.read("again", 0, len(content)) == content
            # And once more.
            there = host.directory / "once more"
            shutil.copytree(host.directory / "killed", there)
            await host.add("file", "data3", filename=str(there / "data.raw"))
            meta = str(there / "meta")
            await host.add("dedup", "third", file="data3", metadata=meta, on_enospc="hold")
            assert await host.read("third", 0, len(content)) == content
        for name in ("third", "again"):
            await host.write(name, 0, rnd.randbytes(BLOCK))
            await sound(host, name)
            assert (await host.read(name, 0, len(content)))[BLOCK:] == content[BLOCK:]

    with_host(test)


def test_a_store_that_lost_blocks_with_the_power_does_not_open_without_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With frames that do not hold the journal cannot go on: marks would say that they do."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        await host.write("disk", 0, random.Random(13).randbytes(BLOCK))
        tables = node.store.tables
        lost = tables.block(tables.get(node.number, 0)).offset
        await host.write("data", lost, bytes(BLOCK))
        with monkeypatch.context() as patch:
            patch.setattr(Tables, "write", full)
            with pytest.raises((VhostblkError, OSError)) as caught:
                await killed(host)
            assert "full" in str(caught.value)

    with_host(test)


# ---- blocks that nothing shows


class Held:
    """Writes of new blocks to the data device wait, and then fail."""

    def __init__(self, node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = asyncio.Event()
        self.waiting = 0

        async def forward_part(*_: Any) -> None:
            self.waiting += 1
            await self.go.wait()
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(type(node.data), "forward_part", forward_part)


async def orphan(host: Host, node: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Held, Any]:
    """The only user of a block goes while another write is about to use it; that write."""
    data = random.Random(8).randbytes(2 * BLOCK)
    await host.write("disk", 0, data[:BLOCK])
    held = Held(node, monkeypatch)
    write = asyncio.create_task(host.write("disk", 40 * BLOCK, data))
    await host.until(lambda: held.waiting > 0)
    await host.write("disk", 0, bytes(BLOCK))
    await node.store.checkpoint()
    return held, write


@pytest.mark.parametrize("repair", [True, False])
def test_a_block_whose_last_user_goes_while_a_write_wants_it_is_given_back(
    monkeypatch: pytest.MonkeyPatch, repair: bool
) -> None:
    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        store = node.store
        held, write = await orphan(host, node, monkeypatch)
        held.go.set()
        with pytest.raises(OSError):
            await write
        monkeypatch.undo()
        assert not store.tables.changes
        found = await host.command("dedup-check", node_name="disk", repair=repair)
        assert found["leaks"] + found["wrong"] + found["corruptions"] == 0, found
        assert store.tables.state.blocks == 0
        await host.write("disk", 0, random.Random(9).randbytes(BLOCK))
        await store.checkpoint()
        await sound(host)

    with_host(test)


def test_a_block_that_nothing_shows_is_given_back_after_a_kill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        held, write = await orphan(host, node, monkeypatch)
        assert node.store.tables.state.blocks == 1
        try:
            again = await killed(host)
        finally:
            held.go.set()
        with pytest.raises(OSError):
            await write
        assert again.store.tables.state.blocks == 0
        await sound(host, "again")

    with_host(test)


def test_a_leak_is_a_leak_and_nothing_else() -> None:
    """What knows the block is no corruption."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        tables = node.store.tables
        await host.write("disk", 0, random.Random(10).randbytes(4 * BLOCK))
        await node.store.checkpoint()
        with tables.transaction() as edit:
            edit.put("map", _PAGE_KEY.pack(node.number, 0), None)
        tables.state.mapped = 0
        found = await node.check_image(None)
        assert (found["corruptions"], found["leaks"]) == (0, 4)
        found = await host.command("dedup-check", node_name="disk", repair=True)
        assert (found["corruptions"], found["wrong"], found["leaks"]) == (0, 0, 4), found
        assert found["repaired"]
        await sound(host)
        await host.write("disk", 0, random.Random(10).randbytes(4 * BLOCK))
        await node.store.checkpoint()
        await sound(host)

    with_host(test)


def test_references_that_are_repaired_are_believed() -> None:
    """A block that a write holds, and whose references were wrong."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        store, tables = node.store, node.store.tables
        await host.write("disk", 0, random.Random(11).randbytes(2 * BLOCK))
        await store.checkpoint()
        shown, other = tables.page(node.number, 0)[:2]
        with tables.transaction() as edit:
            for number, refs in ((shown, 0), (other, 1)):
                key, block = _KEY.pack(number), tables.block(number)
                edit.put("blocks", key, pack_block(block._replace(refs=refs)))
            page = array("Q", [shown]).tobytes().ljust(8 * PAGE, b"\0")
            edit.put("map", _PAGE_KEY.pack(node.number, 0), page)
        tables.state.mapped = 1
        tables.pins |= {shown: 1, other: 1}
        tables._unreferenced.add(shown)
        assert (await store.check(node.data, repair=True)).leaks == 2
        tables.pins.clear()
        await store.checkpoint()
        assert tables.state.blocks == 1
        await sound(host)

    with_host(test)


# ---- who writes to the data device


def test_a_copy_of_the_metadata_is_not_opened_beside_the_store() -> None:
    """Both would write to the same segments; nor does anybody else write there."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await open_disk(host, "other", disk="other", size=MIB)
        await host.command("dedup-backup", node_name="disk", directory=host.path("copy"))
        copy = {"metadata": host.path("copy"), "disk": "disk"}
        with refused("Permission conflict on node 'data'", "'write'"):
            await open_disk(host, "third", **copy)
        with refused("data.raw", "lock"):
            await open_disk(
                host, "third", file={"driver": "file", "filename": host.path("data.raw")}, **copy
            )
        with refused("Permission conflict on node 'data'"):
            await host.export("data")
        await host.backend.blockdev_del("disk")
        await host.backend.blockdev_del("other")
        await open_disk(host, "third", **copy)
        with refused("Permission conflict"):
            await open_disk(host)

    with_host(test)


# ---- writes that are held, and somebody who waits for them


@contextlib.asynccontextmanager
async def held_write(host: Host) -> AsyncIterator[tuple[Guest, Any]]:
    """A guest whose write waits for space, and that write."""
    await create(host, data=3 * MIB, size=8 * MIB)
    await open_disk(host, on_enospc="hold")
    await host.export("disk")
    rnd = random.Random(14)

    written = 0

    async def fill() -> None:
        nonlocal written
        while True:
            await host.write("disk", written, rnd.randbytes(SEGMENT))
            written += SEGMENT

    filling = asyncio.create_task(fill())
    await host.until(lambda: bool(host.named("DEDUP_FULL")))
    try:
        async with host.device() as guest:
            data = rnd.randbytes(SEGMENT)
            write = guest.device.prepare(Type.OUT, 6 * MIB // 512, data)
            guest.device.publish(write)
            await asyncio.sleep(0.3)
            assert not filling.done() and write.status == NO_STATUS
            try:
                yield guest, write
            finally:
                filling.cancel()
                await submit(host, OP_DISCARD, 0, written)
    finally:
        await asyncio.gather(filling, return_exceptions=True)


def test_a_held_write_fails_when_its_vm_is_being_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU hangs until GET_VRING_BASE is answered."""
    assert driver.HOLD_PATIENCE > PAUSE_PATIENCE
    monkeypatch.setattr(driver, "HOLD_PATIENCE", 0.5)

    async def test(host: Host) -> None:
        async with held_write(host) as (guest, write):
            await guest.stop_queue(guest.device.queues[0])
            assert write.status == Status.IOERR

    with_host(test)


def test_a_held_write_is_not_answered_when_the_process_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one finds it in the front-end's record (tests/test_dedup_kill.py)."""
    monkeypatch.setattr(driver, "HOLD_PATIENCE", 0.0)

    async def test(host: Host) -> None:
        async with held_write(host) as (_, write):
            graph = host.backend.graph
            graph.closing = True
            with graph.releasing([], [graph.node("disk")]):
                await asyncio.sleep(1.2)  # it is tried again twice
                assert write.status == NO_STATUS
            graph.closing = False

    with_host(test)


def test_a_held_write_outlives_a_change_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is given up, and the write goes on waiting."""
    monkeypatch.setattr("vhostblk.graph.graph.PAUSE_PATIENCE", 0.5)

    async def test(host: Host) -> None:
        async with held_write(host) as (guest, write):
            with refused("Nothing was changed"):
                await host.backend.block_resize("disk", 9 * MIB)
            await asyncio.sleep(1.0)  # it has been tried again
            assert write.status == NO_STATUS
            await submit(host, OP_DISCARD, 0, MIB)
            await guest.wait(write)
            assert write.status == Status.OK

    with_host(test)


# ---- metadata that are damaged


async def fill_and_close(host: Host, **options: Any) -> bytes:
    """A store that is closed, with everything in its database; what its disk shows."""
    await create(host, size=4 * MIB, data=16 * MIB, **options)
    node = await open_disk(host)
    content = random.Random(15).randbytes(4 * MIB)
    await host.write("disk", 0, content)
    await node.store.checkpoint()
    await host.backend.blockdev_del("disk")
    return content


def test_a_database_that_has_lost_its_end_is_refused() -> None:
    async def test(host: Host) -> None:
        content = await fill_and_close(host)
        path = Path(host.path("meta")) / FILE
        before = path.read_bytes()
        for size in (len(before) // 2, len(before) // 2 + 100, 8192, 5000, 100):
            os.truncate(path, size)
            with refused("damaged", "dedup-rebuild"):
                await open_disk(host)
            path.write_bytes(before)
        os.truncate(path, 0)
        with refused("missing", "dedup-rebuild"):
            await open_disk(host)
        path.unlink()
        with refused("missing", "dedup-rebuild"):
            await open_disk(host)
        path.write_bytes(before)
        await open_disk(host)
        assert await host.read("disk", 0, 4 * MIB) == content
        await sound(host)

    with_host(test)


# ---- places that are used again


class Holding(Filter):
    """Holds one request of the kind that it is armed for, until it is let go."""

    driver = "holding"

    async def open(self) -> None:
        self.armed = ""
        self.caught, self.go = asyncio.Event(), asyncio.Event()

    async def read(self, request: Request) -> None:
        await self._hold(request)
        request.forward()

    async def write(self, request: Request) -> None:
        await self._hold(request)
        request.forward()

    async def discard(self, request: Request) -> None:
        await self._hold(request)
        request.forward()

    async def _hold(self, request: Request) -> None:
        if self.armed == request.operation:
            self.armed = ""
            self.caught.set()
            await self.go.wait()


@pytest.mark.parametrize("way", ["engine", "compressed", "duplicate"])
def test_a_place_is_not_used_again_while_somebody_needs_it(way: str) -> None:
    """A read that the engine's map has sent to it, one by way of Python, and a write that has
    found the block. All else that was in the segment is overwritten meanwhile."""

    async def test(host: Host) -> None:
        host.file("data.raw", 8 * MIB)
        await host.add("file", "storage", filename=host.path("data.raw"), discard="unmap")
        data = await host.add("holding", "data", file="storage")
        await new_store(host, "data", size=4 * MIB)
        options = {"compress": "zstd"} if way == "compressed" else {}
        store = (await open_disk(host, discard="unmap", **options)).store
        rnd = random.Random(16)
        old = b"".join(rnd.randbytes(BLOCK // 2) * 2 for _ in range(2 * SEGMENT // BLOCK))
        await host.write("disk", 0, old)
        await store.checkpoint()
        assert await host.read("disk", 0, len(old)) == old
        fresh = rnd.randbytes(BLOCK)
        if way == "duplicate":
            data.armed = "write"
            held = asyncio.create_task(host.write("disk", 3 * MIB, old[:BLOCK] + fresh))
        else:
            data.armed = "read"
            held = asyncio.create_task(host.read("disk", 0, BLOCK))
        await data.caught.wait()
        await host.write("disk", 0, bytes(len(old)))
        checkpoint = asyncio.create_task(store.checkpoint())
        await asyncio.wait([checkpoint], timeout=0.5)
        await host.write("disk", MIB, rnd.randbytes(MIB))  # the segment that is free would be next
        data.go.set()
        got = await held
        if way == "duplicate":
            got = await host.read("disk", 3 * MIB, 2 * BLOCK)
        assert got == old[:BLOCK] + (fresh if way == "duplicate" else b"")
        await checkpoint
        await sound(host)

    with_host(test, Holding)


def test_a_segment_is_free_when_its_discard_is_done() -> None:
    async def test(host: Host) -> None:
        host.file("data.raw", 8 * MIB)
        await host.add("file", "storage", filename=host.path("data.raw"), discard="unmap")
        data = await host.add("holding", "data", file="storage")
        await new_store(host, "data", size=4 * MIB)
        store = (await open_disk(host, discard="unmap")).store
        rnd = random.Random(18)
        await host.write("disk", 0, rnd.randbytes(MIB))
        await store.checkpoint()
        await submit(host, OP_DISCARD, 0, MIB)
        data.armed = "discard"
        checkpoint = asyncio.create_task(store.checkpoint())
        await data.caught.wait()
        content = rnd.randbytes(MIB)
        await host.write("disk", MIB, content)
        data.go.set()
        await checkpoint
        assert await host.read("disk", MIB, MIB) == content
        await sound(host)

    with_host(test, Holding)


def test_a_discard_gives_space_back_to_the_device() -> None:
    async def test(host: Host) -> None:
        await create(host, size=4 * MIB)
        node = await open_disk(host, discard="unmap")
        rnd = random.Random(17)
        for at in range(0, 4 * MIB, MIB):
            await host.write("disk", at, rnd.randbytes(MIB))
        await node.store.checkpoint()
        used = os.stat(host.path("data.raw")).st_blocks * 512
        assert used >= 4 * MIB
        await submit(host, OP_DISCARD, 0, 4 * MIB)
        await node.store.checkpoint()
        assert os.stat(host.path("data.raw")).st_blocks * 512 <= used - 3 * MIB

    with_host(test)
