# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about dedup stores: statistics, check and repair, backup, deleting disks, collecting."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from dedup_lab import BLOCK, SEGMENT, create, open_disk, store_of
from in_process import MIB, Host, refused, with_host

from vhostblk.cli import status
from vhostblk.control.events import EVENTS
from vhostblk.dedup import store as store_module
from vhostblk.dedup.check import Check, Result
from vhostblk.dedup.format import Superblock
from vhostblk.dedup.tables import INDEX_KEY, Edit
from vhostblk.engine import OP_DISCARD


@pytest.mark.parametrize("name", ["", "x" * 256, "ü" * 128])
def test_names_that_a_disk_cannot_have(name: str) -> None:
    async def test(host: Host) -> None:
        await create(host)
        with refused("is no name of a disk: these have 1 to 255 bytes"):
            await open_disk(host, "other", disk=name, size=MIB)
        await open_disk(host, "other", disk="ü" * 127, size=MIB)

    with_host(test)


@pytest.mark.parametrize(("block_bits", "segment_bits"), [(0, 22), (31, 22), (14, 0), (14, 63)])
def test_superblocks_that_nobody_has_made(block_bits: int, segment_bits: int) -> None:
    """Their checksum is right all the same."""
    packed = Superblock(block_bits, segment_bits, "blake3", bytes(16)).pack()
    with refused("there are none like that"):
        Superblock.parse(packed)


def test_statistics() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await open_disk(host, "other", disk="other", size=2 * MIB)
        data = random.Random(1).randbytes(MIB // 2)
        await host.write("disk", 0, data + data)
        await host.write("other", MIB, data)
        await host.command("dedup-collect", node_name="disk")
        found = await host.command("query-dedup", node_name="other")
        assert (found["logical"], found["unique"]) == (3 * MIB // 2, MIB // 2)
        assert (found["compressed"], found["ratio"]) == (MIB // 2, 3.0)
        assert found["hits"] == MIB // BLOCK and found["stored-blocks"] == MIB // 2 // BLOCK
        assert found["data-free"] + found["physical"] == found["data-size"]
        assert found["physical"] >= found["compressed"]
        [disk, other] = found["disks"]
        assert (disk["disk"], disk["size"], disk["extents"]) == ("disk", MIB, 2)
        assert (other["blocks"], other["extents"]) == (MIB // 2 // BLOCK, 1)
        [node] = [n for n in host.backend.query_named_block_nodes() if n["node-name"] == "disk"]
        assert node["dedup"]["ratio"] == 3.0

    with_host(test)


def test_statistics_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event with all that QMP's schema says of it, while a guest writes, and then no more."""
    monkeypatch.setattr(store_module, "STATISTICS_INTERVAL", 0.05)

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host, compress="zstd")
        data = (b"text " * BLOCK)[:BLOCK]
        await host.write("disk", 0, data * 2)
        await host.until(lambda: bool(host.named("DEDUP_STATISTICS")))
        [told] = host.named("DEDUP_STATISTICS")
        assert EVENTS["DEDUP_STATISTICS"].model_validate(told)
        assert (told["logical"], told["unique"]) == (2 * BLOCK, BLOCK)
        assert 0 < told["compressed"] < BLOCK < told["physical"]
        await asyncio.sleep(0.2)
        assert host.named("DEDUP_STATISTICS") == [told]

    with_host(test)


def test_events_while_there_is_still_time() -> None:
    async def test(host: Host) -> None:
        await create(host, data=8 * MIB, size=8 * MIB)
        await open_disk(host)
        rnd = random.Random(2)
        for at in range(0, 6 * MIB, SEGMENT):
            await host.write("disk", at, rnd.randbytes(SEGMENT))
        percents = [event["percent"] for event in host.named("DEDUP_SPACE")]
        assert percents and percents == sorted(percents) and percents[0] < 90, percents

    with_host(test)


@pytest.mark.parametrize(
    "damage", ["references", "leak", "index", "unindexed", "swapped", "places", "segments", "state"]
)
def test_what_can_be_recomputed_is_repaired(damage: str) -> None:
    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        data = random.Random(3).randbytes(MIB)
        await host.write("disk", 0, data)
        await host.write("disk", 0, data[:BLOCK] * 4)
        store = store_of(host)
        await store.checkpoint()
        with store.tables.transaction() as edit:
            spoil(edit, damage)
        found = await host.command("dedup-check", node_name="disk")
        assert found["leaks"] + found["wrong"] > 0 and found["messages"]
        assert not found["corruptions"] and not found["repaired"]
        assert (await host.command("dedup-check", node_name="disk", repair=True))["repaired"]
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert not found["leaks"] + found["wrong"] + found["corruptions"], found
        await host.backend.blockdev_del("disk")
        node = await open_disk(host)
        assert (await host.read("disk", 0, MIB))[4 * BLOCK :] == data[4 * BLOCK :]
        await host.write("disk", 0, data[4 * BLOCK :])  # all of it is found
        assert node.store.tables.state.blocks == MIB // BLOCK - 3

    with_host(test)


def spoil(edit: Edit, damage: str) -> None:
    """Something that a check must find."""
    key, value = next(edit.scan("blocks"))
    if damage == "references":
        edit.put("blocks", key, value[:12] + (99).to_bytes(4, "little") + value[16:])
    elif damage == "leak":
        gone = (MIB // BLOCK + 5000).to_bytes(8, "big")
        edit.put("blocks", gone, (70 * MIB).to_bytes(8, "little") + value[8:])
    elif damage == "index":
        edit.put("index", b"x" * INDEX_KEY, (7777).to_bytes(8, "little"))
    elif damage == "unindexed":
        for name, _ in list(edit.scan("index"))[::3]:
            edit.put("index", name, None)
    elif damage == "swapped":
        (one, first), (other, second), *_ = edit.scan("index")
        edit.put("index", one, second)
        edit.put("index", other, first)
    elif damage == "state":
        edit.put("segments", b"a number", bytes(8))
    else:
        edit.put(damage, next(edit.scan(damage))[0], None)


def test_content_is_checked_beside_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """In large pieces, each bad block found, and garbage is collected meanwhile."""

    async def test(host: Host) -> None:
        await create(host)
        node = await open_disk(host)
        store = node.store
        await host.write("disk", 0, random.Random(4).randbytes(MIB))
        for number in (100, 101, 200):
            await host.write("data", store.tables.block(number).offset, b"rotten".ljust(512))
        began, go_on, lengths = asyncio.Event(), asyncio.Event(), []
        read = type(node.data).read

        async def slow(self: Any, offset: int, into: Any) -> Any:
            lengths.append(into)
            began.set()
            await go_on.wait()
            return await read(self, offset, into)

        monkeypatch.setattr(type(node.data), "read", slow)
        check = asyncio.create_task(host.command("dedup-check", node_name="disk", content=True))
        await began.wait()
        await store.collector.collect()
        go_on.set()
        found = await check
        assert found["corruptions"] == 3
        assert [message.split()[2] for message in found["messages"]] == ["100", "101", "200"]
        assert sum(lengths) == MIB and len(lengths) < 16

    with_host(test)


def test_bad_content_is_found() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await host.write("disk", 0, random.Random(4).randbytes(MIB))
        await host.write("data", store_of(host).tables.block(5).offset, b"rotten".ljust(512))
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert found["corruptions"] == 1 and "another content" in found["messages"][0]

    with_host(test)


def test_equal_content_is_compared_if_wanted() -> None:
    """What has rotted on the data device is not shared."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host, verify=True)
        data = random.Random(5).randbytes(MIB // 2)
        await host.write("disk", 0, data)
        await host.write("data", store_of(host).tables.block(5).offset, b"rotten".ljust(512))
        await host.write("disk", MIB // 2, data)
        assert await host.read("disk", MIB // 2, MIB // 2) == data
        assert store_of(host).tables.state.blocks == MIB // 2 // BLOCK + 1

    with_host(test)


def test_a_backup_made_under_load_is_a_store() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        rnd = random.Random(6)
        data = rnd.randbytes(MIB)
        await host.write("disk", 0, data)
        with refused("a backup cannot be made", "exists"):
            await host.command("dedup-backup", node_name="disk", directory=host.path("meta"))
        await host.command("dedup-backup", node_name="disk", directory=host.path("copy"))
        await host.write("disk", 0, rnd.randbytes(BLOCK))
        await host.backend.blockdev_del("disk")
        shutil.rmtree(host.path("meta"))
        Path(host.path("copy")).rename(host.path("meta"))
        await open_disk(host)
        assert await host.read("disk", 0, MIB) == data
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert not found["corruptions"] and not found["wrong"]

    with_host(test)


def test_a_backup_after_a_failed_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is older than the journal that is being written; the copy needs all of it."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        data = random.Random(8).randbytes(MIB)
        await host.write("disk", 0, data)
        store = store_of(host)

        def full() -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(store.tables, "write", full)
            with pytest.raises(OSError):
                await store.checkpoint()
            await host.command("dedup-backup", node_name="disk", directory=host.path("copy"))
        await host.backend.blockdev_del("disk")
        shutil.rmtree(host.path("meta"))
        Path(host.path("copy")).rename(host.path("meta"))
        await open_disk(host)
        assert await host.read("disk", 0, MIB) == data

    with_host(test)


def test_repairs_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests go on writing; places that are being written to stay taken."""

    class Spoiling(Check):
        def run(self) -> Result:
            with self._tables.transaction() as edit:
                spoil(edit, "segments")
            return super().run()

    async def test(host: Host) -> None:
        await create(host, data=16 * MIB)
        await host.add("delay", "slow", file="data", write_ns=2_000_000)
        await open_disk(host, file="slow")
        store = store_of(host)
        content: dict[int, bytes] = {}
        ended = False

        async def guest(number: int) -> None:
            rnd = random.Random(number)
            common = [random.Random(99 + n).randbytes(BLOCK) for n in range(8)]
            count = 8 * rnd.randint(1, 3)
            while not ended:
                at = (number * 64 + rnd.randrange(64 - count)) * BLOCK
                blocks = [rnd.choice([*common, rnd.randbytes(BLOCK)]) for _ in range(count)]
                await host.write("disk", at, b"".join(blocks))
                content.update({at + n * BLOCK: block for n, block in enumerate(blocks)})

        guests = [asyncio.create_task(guest(number)) for number in range(4)]
        await host.until(lambda: len(content) > 40)
        for _ in range(8):
            with monkeypatch.context() as patched:
                patched.setattr(store_module, "Check", Spoiling)
                async with asyncio.timeout(60):
                    found = await host.command("dedup-check", node_name="disk", repair=True)
            assert found["repaired"] and not found["corruptions"]
            async with asyncio.timeout(60):
                found = await host.command("dedup-check", node_name="disk", content=True)
            assert not found["leaks"] + found["wrong"] + found["corruptions"], found
        ended = True
        await asyncio.gather(*guests)
        for at, data in content.items():
            assert await host.read("disk", at, BLOCK) == data, at
        found = await store.check(host.backend.graph.node("disk").data, repair=False, content=True)
        assert found.sound, found.messages
        assert {s: n for s, n in store.space.used.items() if n} == store.tables.segments()

    with_host(test)


def test_a_disk_is_deleted() -> None:
    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await open_disk(host, "other", disk="other", size=MIB)
        rnd = random.Random(7)
        data = rnd.randbytes(MIB // 2)
        await host.write("disk", 0, data)
        await host.write("other", 0, data + rnd.randbytes(MIB // 2))
        with refused("is in use"):
            await host.command("dedup-disk-delete", node_name="disk", disk="other")
        await host.backend.blockdev_del("other")
        with refused("has no disk 'another'"):
            await host.command("dedup-disk-delete", node_name="disk", disk="another")
        await host.command("dedup-disk-delete", node_name="disk", disk="other")
        found = await host.command("query-dedup", node_name="disk")
        assert [disk["disk"] for disk in found["disks"]] == ["disk"]
        assert found["unique"] == MIB // 2
        assert await host.read("disk", 0, MIB // 2) == data
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert not found["corruptions"] + found["leaks"] + found["wrong"]

    with_host(test)


def test_a_command_keeps_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """While everything is checked the disk cannot go; the end of the backend ends the check."""
    never = asyncio.Event()
    began = asyncio.Event()

    async def endless(*_: Any) -> None:
        began.set()
        await never.wait()

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        monkeypatch.setattr(store_module, "check_content", endless)
        check = asyncio.create_task(host.command("dedup-check", node_name="disk", content=True))
        await began.wait()
        with refused("is in use", "command 'dedup-check'"):
            await host.backend.blockdev_del("disk")
        await host.backend.close()
        with refused("shutting down"):
            await check

    with_host(test)


def test_a_disk_that_is_being_deleted_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    unmap = store_module.Store.unmap

    async def slow(*arguments: Any) -> Any:
        began.set()
        await go_on.wait()
        async for part in unmap(*arguments):
            yield part

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await open_disk(host, "other", disk="other", size=MIB)
        await host.backend.blockdev_del("other")
        monkeypatch.setattr(store_module.Store, "unmap", slow)
        deletion = asyncio.create_task(
            host.command("dedup-disk-delete", node_name="disk", disk="other")
        )
        await began.wait()
        with refused("'other'", "is being deleted"):
            await open_disk(host, "other", disk="other", size=MIB)
        with refused("'other'", "is in use"):
            await host.command("dedup-disk-delete", node_name="disk", disk="other")
        go_on.set()
        await deletion
        await open_disk(host, "other", disk="other", size=2 * MIB)
        assert host.backend.graph.node("other").size == 2 * MIB

    with_host(test)


def test_garbage_is_collected_when_asked_for() -> None:
    async def test(host: Host) -> None:
        await create(host, data=8 * MIB, size=4 * MIB)
        await open_disk(host)
        rnd = random.Random(8)
        content = bytearray(rnd.randbytes(4 * MIB))
        await host.write("disk", 0, bytes(content))
        handle = host.backend.graph.node("disk").effective
        for block in range(4 * MIB // BLOCK):
            if block % 8:
                offset = block * BLOCK
                await host.backend.engine.submit(handle, OP_DISCARD, offset, None, BLOCK)
                content[offset : offset + BLOCK] = bytes(BLOCK)
        assert await host.read("disk", 0, 4 * MIB) == content
        assert (await host.command("dedup-collect", node_name="disk"))["segments"] > 8
        assert await host.read("disk", 0, 4 * MIB) == content
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert not found["corruptions"] + found["leaks"] + found["wrong"]

    with_host(test)


def test_a_disk_is_defragmented() -> None:
    async def test(host: Host) -> None:
        await create(host, data=16 * MIB, size=4 * MIB)
        await open_disk(host)
        rnd = random.Random(9)
        content = bytearray(4 * MIB)
        places = list(range(0, 4 * MIB, BLOCK))
        rnd.shuffle(places)
        for at in places:
            content[at : at + BLOCK] = rnd.randbytes(BLOCK)
            await host.write("disk", at, bytes(content[at : at + BLOCK]))
        before = (await host.command("query-dedup", node_name="disk"))["disks"][0]
        assert before["extents"] > 900
        await host.command("dedup-defragment", node_name="disk", job_id="d")
        await host.until(lambda: bool(host.named("BLOCK_JOB_COMPLETED")))
        assert "error" not in host.named("BLOCK_JOB_COMPLETED")[0]
        assert await host.read("disk", 0, 4 * MIB) == content
        store = store_of(host)
        await store.checkpoint()
        after = (await host.command("query-dedup", node_name="disk"))["disks"][0]
        assert after["extents"] <= 4 * MIB // SEGMENT + 1
        found = await host.command("dedup-check", node_name="disk", content=True)
        assert not found["corruptions"] + found["leaks"] + found["wrong"]

    with_host(test)


def test_status_has_a_line_for_each_store() -> None:
    """Not for each of its disks."""

    async def test(host: Host) -> None:
        await create(host)
        nodes = [await open_disk(host, name, disk=name, size=MIB) for name in ("one", "two")]
        block = random.Random(4).randbytes(BLOCK)
        for name in ("one", "two"):
            await host.write(name, 0, block)
        head, line = status.dedup_stores([node.describe() for node in nodes]).split("\n")[:2]
        shown = dict(zip(head.split(), line.replace(" KiB", "KiB").split(), strict=False))
        assert shown["STORE"] == host.path("meta")
        assert shown["LOGICAL"] == "8KiB" and shown["UNIQUE"] == "4KiB" and shown["RATIO"] == "2.00"
        assert line.split()[-1] == "sound" and head.split()[-1] == "LEDGER"

    with_host(test)
