# SPDX-License-Identifier: GPL-2.0-or-later
"""Metadata that are lost, and made anew from the data device alone.

tests/test_dedup_crash.py does this at power cuts, test_dedup_kill.py after `kill -9`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dedup_lab import BLOCK, SEGMENT, contents, create, open_disk, rebuilt, sound, store_of
from in_process import MIB, Host, refused, with_host

from vhostblk.control.events import EVENTS
from vhostblk.dedup import ledger as ledger_module
from vhostblk.dedup import store as store_module
from vhostblk.dedup.format import Superblock
from vhostblk.dedup.ledger import BIGGEST, FRAME, GONE, HEADER, Entry, pack_entries, unpack_entries
from vhostblk.dedup.store import Store
from vhostblk.engine import OP_DISCARD, OP_FLUSH

SIZE = 2 * MIB


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_RETRY", 0.0)


async def submit(host: Host, node: str, op: int, offset: int = 0, length: int = 0) -> None:
    handle = host.backend.graph.node(node).effective
    await host.backend.engine.submit(handle, op, offset, None, length)


async def lose_and_rebuild(host: Host, *nodes: str) -> Any:
    """The directory is lost; the job makes it anew. What the event says."""
    for name in nodes:
        await host.backend.blockdev_del(name)
    shutil.rmtree(host.path("meta"))
    host.events.clear()
    await host.command("dedup-rebuild", job_id="r", file="data", metadata=host.path("meta"))
    await host.until(lambda: host.backend.query_jobs()[-1]["status"] == "concluded", 30)
    [job] = host.backend.query_jobs()
    assert "error" not in job, job["error"]
    assert job["current-progress"] == job["total-progress"] > 0
    host.backend.jobs.get("r").dismiss()
    [told] = host.named("DEDUP_REBUILT")
    assert EVENTS["DEDUP_REBUILT"].model_validate(told)
    return told


class Load:
    """Two disks on which everything happens that changes metadata."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host = host
        self.rnd = random.Random(seed)
        self.common = [self.rnd.randbytes(BLOCK // 2) * 2 for _ in range(8)]  # compressible
        self.content = {"disk": bytearray(SIZE), "other": bytearray(SIZE)}

    async def open(self) -> None:
        for name in self.content:
            await open_disk(self.host, name, disk=name, size=SIZE, discard="unmap", compress="zstd")

    async def work(self, steps: int) -> None:
        rnd = self.rnd
        for _ in range(steps):
            name = rnd.choice(list(self.content))
            count = rnd.randint(1, 24)
            at = rnd.randrange(SIZE // BLOCK - count) * BLOCK
            if rnd.random() < 0.2:
                data = bytes(count * BLOCK)
                await submit(self.host, name, OP_DISCARD, at, len(data))
            else:
                blocks = [rnd.choice([*self.common, rnd.randbytes(BLOCK)]) for _ in range(count)]
                data = b"".join(blocks)
                await self.host.write(name, at, data)
            self.content[name][at : at + len(data)] = data
            if rnd.random() < 0.1:
                await submit(self.host, name, OP_FLUSH)
            if rnd.random() < 0.02:
                await store_of(self.host).collector.collect()

    async def compare(self) -> None:
        for name, content in self.content.items():
            assert await self.host.read(name, 0, SIZE) == content


@pytest.mark.parametrize("seed", range(4))
def test_everything_is_there_again(seed: int) -> None:
    """Overwritten, discarded, shared, compressed, collected, deleted; again and again."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        load = Load(host, seed)
        await load.open()
        await open_disk(host, "third", disk="third", size=MIB)
        store = store_of(host)
        store.tuning.changes = 300
        store.ledger.least_log = 32 << 10
        for _ in range(3):
            await load.work(120)
            await host.write("third", 0, load.rnd.randbytes(MIB // 4))
        await host.backend.blockdev_del("third")
        await host.command("dedup-disk-delete", node_name="disk", disk="third")
        assert store.counters.moved and store.ledger.sound
        for _ in range(2):
            await host.backend.blockdev_del("disk")
            await host.backend.blockdev_del("other")
            before = contents(Path(host.path("meta")))
            told = await lose_and_rebuild(host)
            assert told["disks"] == ["disk", "other"] and not told["lost"] and not told["dropped"]
            assert contents(Path(host.path("meta"))) == before
            await load.open()
            await load.compare()
            await sound(host)
            await load.work(60)  # and it goes on as any store does
            await load.compare()
            await sound(host)

    with_host(test)


def test_what_was_flushed_is_there_without_an_orderly_end() -> None:
    """And the ledger of the life before is enough until the next one has been written."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        load = Load(host, 9)
        await load.open()
        for _ in range(6):
            await load.work(30)
            await submit(host, "disk", OP_FLUSH)
            copy = host.directory / "copy.raw"
            shutil.copy(host.path("data.raw"), copy)
            shutil.rmtree(host.path("meta2"), ignore_errors=True)
            report = await rebuilt(copy, Path(host.path("meta2")))
            assert not report.lost and not report.messages
            await host.add("file", "copy", filename=str(copy))
            for name, content in load.content.items():
                disk = {"disk": name, "metadata": host.path("meta2"), "file": "copy"}
                await host.add("dedup", f"{name}2", **disk)
                assert await host.read(f"{name}2", 0, SIZE) == content
                await host.backend.blockdev_del(f"{name}2")
            await host.backend.blockdev_del("copy")

    with_host(test)


def test_an_end_that_the_power_did_not_let_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says that a block has moved and ended, but what it has made room for is not there.

    The log is written before the flush of its checkpoint, so all of it may be on the data device
    when nothing of what it speaks of is. Then the block is where it was before.
    """

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        node = await open_disk(host)
        store = store_of(host)
        rnd = random.Random(11)
        old = rnd.randbytes(BLOCK)
        await host.write("disk", 0, old)
        await submit(host, "disk", OP_FLUSH)
        number = store.tables.get(node.number, 0)
        before = store.tables.block(number).offset
        await store.collector.gather(node.data, [number])
        moved = store.tables.block(number).offset
        assert moved != before
        await host.write("disk", 0, rnd.randbytes(BLOCK))
        new = store.tables.block(store.tables.get(node.number, 0)).offset
        copy = host.directory / "copy.raw"

        def power_goes(self: Any) -> Any:
            shutil.copy(host.path("data.raw"), copy)
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched, pytest.raises(OSError):
            patched.setattr(type(node.data), "flush", power_goes)
            await store.checkpoint()
        with copy.open("r+b") as file:
            for place in (moved, new):
                file.seek(place)
                file.write(bytes(BLOCK))
        report = await rebuilt(copy, Path(host.path("meta2")))
        assert report.dropped == 1 and not report.lost and not report.messages
        await host.add("file", "copy", filename=str(copy))
        left = await host.add("dedup", "left", file="copy", metadata=host.path("meta2"))
        assert await host.read("left", 0, BLOCK) == old
        found = await left.store.check(left.data, repair=False, content=True)
        assert found.sound and found.blocks == 1, found.messages

    with_host(test)


def test_a_crash_while_a_crash_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new life has begun to write what it has found: the log of the old one still holds."""

    async def test(host: Host) -> None:
        size = 12 * MIB
        await create(host, data=24 * MIB, size=size)
        node = await open_disk(host)
        store_of(host).tuning.changes = 1 << 20
        child = type(node.data)
        write = child.write
        content = random.Random(12).randbytes(size)
        for at in range(0, size, SEGMENT):
            await host.write("disk", at, content[at : at + SEGMENT])
        await submit(host, "disk", OP_FLUSH)
        crashed = host.directory / "crashed.raw"
        shutil.copy(host.path("data.raw"), crashed)
        shutil.copytree(host.path("meta"), host.path("crashed"))
        await host.backend.blockdev_del("disk")

        copies: list[Path] = []

        async def copied(self: Any, offset: int, data: Any, **options: Any) -> None:
            if bytes(data[:8]) == b"vbledger":
                copies.append(host.directory / f"copy.{len(copies)}")
                shutil.copy(crashed, copies[-1])
            await write(self, offset, data, **options)

        await host.add("file", "crashed", filename=str(crashed))
        with monkeypatch.context() as patched:
            patched.setattr(child, "write", copied)
            await open_disk(host, "again", file="crashed", metadata=host.path("crashed"))
        assert len(copies) > 1  # before the first chunk, after it, ...
        for number, copy in enumerate(copies):
            meta = host.path(f"meta.{number}")
            report = await rebuilt(copy, Path(meta))
            assert not report.lost and not report.messages and not report.dropped
            await host.add("file", "left", filename=str(copy))
            await open_disk(host, "judged", file="left", metadata=meta)
            for at in range(0, size, MIB):
                assert await host.read("judged", at, MIB) == content[at : at + MIB]
            await host.backend.blockdev_del("judged")
            await host.backend.blockdev_del("left")

    with_host(test)


def test_a_snapshot_of_many_chunks_under_load() -> None:
    """Guests write while it is made; the segments of the old generation become free."""

    async def test(host: Host) -> None:
        size = 16 * MIB
        await create(host, data=48 * MIB, size=size)
        await open_disk(host)
        store = store_of(host)
        rnd = random.Random(1)
        content = bytearray(rnd.randbytes(size))
        await host.write("disk", 0, bytes(content[: 4 * MIB]))
        for at in range(4 * MIB, size, MIB):
            await host.write("disk", at, bytes(content[at : at + MIB]))
        store.tuning.changes = 500
        old = store.ledger.state.segments[0]
        writes = 0
        while old in store.ledger.state.segments or store.ledger.turned or writes < 2000:
            at = rnd.randrange(size // BLOCK) * BLOCK
            content[at : at + BLOCK] = rnd.randbytes(BLOCK)
            await host.write("disk", at, bytes(content[at : at + BLOCK]))
            writes += 1
            if writes % 50 == 0:
                await submit(host, "disk", OP_FLUSH)
            assert writes < 50_000
        assert store.ledger.state.snapshot > 2 * BIGGEST
        assert store.ledger.state.snapshot / (size // BLOCK) <= 70  # docs/dedup.md
        await store.checkpoint()
        assert len(store.ledger.state.segments) * SEGMENT < 5 * store.ledger.state.snapshot
        assert store.ledger.size == len(store.space.ledger) * SEGMENT
        await lose_and_rebuild(host, "disk")
        await open_disk(host)
        for at in range(0, size, MIB):
            assert await host.read("disk", at, MIB) == content[at : at + MIB]
        await sound(host)

    with_host(test)


def test_a_ledger_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guests do not notice; what is rebuilt is older; later there is another ledger."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        node = await open_disk(host)
        store = store_of(host)
        rnd = random.Random(3)
        old = rnd.randbytes(MIB)
        await host.write("disk", 0, old)
        await submit(host, "disk", OP_FLUSH)
        assert store.stats()["ledger"] == "sound"
        write = type(node.data).write

        def failing(self: Any, offset: int, data: Any, **options: Any) -> Any:
            if bytes(data[:8]) == b"vbledger":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return write(self, offset, data, **options)

        new = rnd.randbytes(MIB)
        with monkeypatch.context() as patched:
            patched.setattr(type(node.data), "write", failing)
            await host.write("disk", 0, new)
            await submit(host, "disk", OP_FLUSH)
            assert "the ledger cannot be written: [Errno 5] Input/output error" in caplog.text
            assert store.stats()["ledger"] == "broken"
            [told] = host.named("DEDUP_LEDGER")
            assert EVENTS["DEDUP_LEDGER"].model_validate(told)
            assert told == {
                "metadata": host.path("meta"),
                "ledger": "broken",
                "reason": "Input/output error",
            }
            copy = host.directory / "copy.raw"
            shutil.copy(host.path("data.raw"), copy)
        report = await rebuilt(copy, Path(host.path("meta2")))
        assert report.blocks == MIB // BLOCK
        assert await host.read("disk", 0, MIB) == new
        await host.write("disk", MIB, new)
        await store.checkpoint()
        await host.until(lambda: store.stats()["ledger"] == "sound")
        told = host.named("DEDUP_LEDGER")[-1]
        assert told == {"metadata": host.path("meta"), "ledger": "sound"}
        await lose_and_rebuild(host, "disk")
        await open_disk(host)
        assert await host.read("disk", 0, SIZE) == new + new
        await sound(host)

    with_host(test)


def test_a_full_store_can_be_rebuilt() -> None:
    """The ledger stands back when there is no room, and comes again when there is."""

    async def test(host: Host) -> None:
        await create(host, data=4 * MIB, size=16 * MIB)
        await open_disk(host, discard="unmap")
        store = store_of(host)
        rnd = random.Random(4)
        for _ in range(3):
            with pytest.raises(OSError):
                for at in range(0, 16 * MIB, SEGMENT):
                    await host.write("disk", at, rnd.randbytes(SEGMENT))
            block = rnd.randbytes(BLOCK)
            for _ in range(200):  # the log goes on, with what needs no space
                await submit(host, "disk", OP_DISCARD, 0, BLOCK)
                with pytest.raises(OSError):
                    await host.write("disk", 8 * MIB, rnd.randbytes(MIB))
                await submit(host, "disk", OP_FLUSH)
            await submit(host, "disk", OP_DISCARD, 0, 16 * MIB)
            await host.write("disk", 0, block)
            await store.checkpoint()
        await host.until(lambda: store.stats()["ledger"] == "sound")
        await lose_and_rebuild(host, "disk")
        await open_disk(host)
        assert await host.read("disk", 0, MIB) == block.ljust(MIB, b"\0")
        await sound(host)

    with_host(test)


def test_an_older_copy_of_the_metadata_has_come_back(caplog: pytest.LogCaptureFixture) -> None:
    """What the store did after the backup is not mixed with what it did after its return."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        await open_disk(host)
        store_of(host).ledger.least_log = 4096
        rnd = random.Random(5)
        old = rnd.randbytes(MIB)
        await host.write("disk", 0, old)
        await host.command("dedup-backup", node_name="disk", directory=host.path("copy"))
        for _ in range(5):  # on other places, so that the backup is still good
            await host.write("disk", MIB, rnd.randbytes(MIB // 4))
            await submit(host, "disk", OP_FLUSH)
            await store_of(host).checkpoint()
        await host.backend.blockdev_del("disk")
        shutil.rmtree(host.path("meta"))
        Path(host.path("copy")).rename(host.path("meta"))
        assert "metadata are not those" not in caplog.text
        await open_disk(host)
        assert "metadata are not those" in caplog.text
        await host.until(lambda: store_of(host).stats()["ledger"] == "sound")
        await host.write("disk", MIB, old[:BLOCK])
        await submit(host, "disk", OP_FLUSH)
        expected = (old + old[:BLOCK]).ljust(SIZE, b"\0")
        assert await host.read("disk", 0, SIZE) == expected
        await host.backend.blockdev_del("disk")
        before = contents(Path(host.path("meta")))
        await lose_and_rebuild(host)
        assert contents(Path(host.path("meta"))) == before
        await open_disk(host)
        assert await host.read("disk", 0, SIZE) == expected

    with_host(test)


def test_a_snapshot_of_a_log_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not recorded meanwhile is in the next snapshot only; the first one is no use."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        node = await open_disk(host)
        store = store_of(host)
        content = random.Random(14).randbytes(SIZE)
        end = store._end_dump
        ended = asyncio.Event()

        async def failing(data: Any, *arguments: Any) -> None:
            monkeypatch.setattr(store, "_end_dump", end)
            try:
                store.ledger.fail(OSError(errno.EIO, os.strerror(errno.EIO)))
                await host.write("disk", MIB, content[MIB:])
                await submit(host, "disk", OP_FLUSH)
                await store.checkpoint_now(node.data)
                await end(data, *arguments)
            finally:
                ended.set()

        store.ledger.least_log = 4096
        await host.write("disk", 0, content[:MIB])
        monkeypatch.setattr(store, "_end_dump", failing)
        store.ledger.state.complete = False
        await store.checkpoint()
        await ended.wait()
        assert store.stats()["ledger"] == "broken"
        await host.until(lambda: store._dump is None)
        store._watch_ledger()  # not in ten seconds
        await host.until(lambda: store.stats()["ledger"] == "sound")
        await lose_and_rebuild(host, "disk")
        await open_disk(host)
        assert await host.read("disk", 0, SIZE) == content

    with_host(test)


def test_a_rebuilt_store_can_be_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a ledger of its own before long, whether anybody writes or not."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        await open_disk(host)
        content = random.Random(13).randbytes(SIZE)
        await host.write("disk", 0, content)
        monkeypatch.setattr(store_module, "_PORTION", 4096)  # opening it does not wait for that
        for _ in range(2):
            await lose_and_rebuild(host, "disk")
            await open_disk(host)
            await host.until(lambda: store_of(host).stats()["ledger"] == "sound")
            told = [event["ledger"] for event in host.named("DEDUP_LEDGER")]
            assert told == ["broken", "sound"]
            assert await host.read("disk", 0, SIZE) == content

    with_host(test)


def test_what_is_missing_is_said() -> None:
    """A chunk in the middle of the log is gone: what came before it is there, the rest is told."""

    async def test(host: Host) -> None:
        await create(host, data=12 * MIB, size=SIZE)
        await open_disk(host)
        rnd = random.Random(6)
        parts = [rnd.randbytes(MIB // 4) for _ in range(8)]
        heads = []
        for number, part in enumerate(parts):
            await host.write("disk", number * (MIB // 4), part)
            await submit(host, "disk", OP_FLUSH)
            heads.append(store_of(host).ledger.state.head)
            store_of(host).ledger.state.head = 0  # into another segment
        await host.backend.blockdev_del("disk")
        await host.write("data", heads[3] - 8192, bytes(8192))
        told = await lose_and_rebuild(host)
        assert told["lost"] > 0
        await open_disk(host)
        expected = b"".join(parts[:3]).ljust(SIZE, b"\0")
        assert await host.read("disk", 0, SIZE) == expected
        await sound(host)

    with_host(test)


def test_what_cannot_be_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(host: Host) -> None:
        await create(host)
        meta = Path(host.path("meta"))
        with refused("has metadata of a dedup store", "into another directory"):
            await rebuilt(Path(host.path("data.raw")), meta)
        partly = host.directory / "partly"
        shutil.copytree(meta, partly)
        (partly / "superblock").unlink()
        with refused("has metadata of a dedup store", "into another directory"):
            await rebuilt(Path(host.path("data.raw")), partly)
        assert (partly / "metadata.db").read_bytes() == (meta / "metadata.db").read_bytes()
        (host.directory / "file").write_text("")
        with refused("metadata cannot be made in", "Not a directory"):
            await rebuilt(Path(host.path("data.raw")), host.directory / "file" / "meta")
        host.file("empty.raw", 8 * MIB)
        with refused("there is no dedup store on the data device"):
            await rebuilt(Path(host.path("empty.raw")), Path(host.path("meta2")))
        # A store that has never been open.
        superblock = Superblock.parse((meta / "superblock").read_bytes())
        Path(host.path("empty.raw")).write_bytes(superblock.pack().ljust(8 * MIB, b"\0"))
        with refused("there are no records on the data device"):
            await rebuilt(Path(host.path("empty.raw")), Path(host.path("meta2")))
        await host.command("dedup-rebuild", job_id="r", file="data", metadata=host.path("meta"))
        await host.until(lambda: host.backend.query_jobs()[-1]["status"] == "concluded")
        assert "has metadata of a dedup store" in host.backend.query_jobs()[-1]["error"]
        host.backend.jobs.get("r").dismiss()
        # One that was interrupted begins from scratch.
        shutil.copy(meta / "metadata.db", host.path("meta2"))
        await rebuilt(Path(host.path("data.raw")), Path(host.path("meta2")))
        assert contents(Path(host.path("meta2"))) == contents(meta)

    with_host(test)


def test_stores_of_format_1() -> None:
    """They are used as before, and say that they cannot be rebuilt."""

    async def test(host: Host) -> None:
        host.file("data.raw", 8 * MIB)
        data = await host.add("file", "data", filename=host.path("data.raw"))
        super = Superblock(12, 18, "blake3", b"u" * 16, 1)
        async with host.backend.creator("x").image("data") as child:
            await Store.create(Path(host.path("meta")), child, super)
        assert data.size == 8 * MIB
        content = random.Random(7).randbytes(MIB)
        for _ in range(2):
            await open_disk(host, size=MIB)
            await host.write("disk", 0, content)
            await submit(host, "disk", OP_FLUSH)
            assert store_of(host).stats()["ledger"] == "none"
            assert store_of(host).super.version == 1 and not store_of(host).ledger.size
            await sound(host)
            await host.backend.blockdev_del("disk")
        with refused("made by an earlier version", "cannot be rebuilt"):
            await rebuilt(Path(host.path("data.raw")), Path(host.path("meta2")))

    with_host(test)


def test_entries_of_any_length() -> None:
    def entries() -> Iterator[Entry]:
        rnd = random.Random(8)
        for frame in range(200):
            length = rnd.choice([0, 1, 63, 64, 65, 1000, BIGGEST - HEADER, 3 * BIGGEST])
            yield Entry(rnd.choice([FRAME, FRAME, GONE]), frame, rnd.randbytes(length))

    room = BIGGEST - HEADER
    chunks = list(pack_entries(entries(), room))
    assert all(0 < len(chunk) <= room for chunk in chunks)
    found: list[Entry] = []
    parts = b""
    for chunk in chunks:
        for kind, frame, payload in unpack_entries(chunk):
            parts += payload
            if kind in (FRAME, GONE):
                found.append(Entry(kind, frame, parts))
                parts = b""
    assert found == list(entries())


def test_closing_while_a_snapshot_is_made() -> None:
    """It is given up, and nothing is lost by that."""

    async def test(host: Host) -> None:
        await create(host, data=24 * MIB, size=8 * MIB)
        await host.add("delay", "slow", file="data", write_ns=3_000_000)
        content = random.Random(10).randbytes(8 * MIB)
        for turn in range(4):
            await open_disk(host, file="slow")
            store = store_of(host)
            store.ledger.least_log = 4096
            await host.write("disk", turn * 2 * MIB, content[turn * 2 * MIB :][: 2 * MIB])
            await store.checkpoint()
            await asyncio.sleep(0.002 * turn)
            await host.backend.blockdev_del("disk")
        await host.backend.blockdev_del("slow")
        before = contents(Path(host.path("meta")))
        await lose_and_rebuild(host)
        assert contents(Path(host.path("meta"))) == before
        await open_disk(host)
        assert await host.read("disk", 0, 8 * MIB) == content
        await sound(host)

    with_host(test)
