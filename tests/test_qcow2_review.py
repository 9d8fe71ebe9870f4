# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 where its parts meet: the log and who opens the image next, errors in the middle.

A backend that is killed is a process of its own: this module run as a program.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from in_process import Host, with_host
from test_qcow2_driver import Disk, new_disk

from vhostblk.nodes.qcow2 import journal, writeback
from vhostblk.nodes.qcow2.header import Header
from vhostblk.nodes.qcow2.refcounts import Refcounts
from vhostblk.schema import VhostblkError

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB


# ---- what is in memory only ------------------------------------------------------------------


def test_tables_that_are_installed_again_know_what_the_engine_did() -> None:
    """A change of the backing file does so; nobody has flushed before."""

    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        await disk.write(0, b"\x10" * CLUSTER)  # the slice is in memory now, and there is a run
        await disk.write(4 * CLUSTER, b"\x11" * CLUSTER)
        disk.node.l2.install_again()
        assert await disk.read(4 * CLUSTER, CLUSTER) == b"\x11" * CLUSTER
        await disk.write(4 * CLUSTER, b"\x22" * 512)
        await disk.close()
        content = bytearray(8 * MIB)
        content[:CLUSTER] = b"\x10" * CLUSTER
        content[4 * CLUSTER : 5 * CLUSTER] = b"\x22" * 512 + b"\x11" * (CLUSTER - 512)
        disk.judge(bytes(content))

    with_host(test)


def test_tables_are_exchanged_while_some_are_loaded_and_others_dropped() -> None:
    """cache-clean-interval may end in the middle of an internal snapshot."""

    async def test(host: Host) -> None:
        disk = new_disk(host, size=128 * MIB)
        await disk.open()
        await disk.write(0, b"\x10" * CLUSTER)
        await disk.flush()
        l2 = disk.node.l2
        await l2.settle()
        l2.get(0).fresh = False
        await l2.drop_unused()  # it has been used since it was looked at last
        dropped = asyncio.create_task(l2.drop_unused())
        while l2.get(0) is not None:
            await asyncio.sleep(0)
        loaded = asyncio.create_task(l2.pin(1))
        while not l2._loading:
            await asyncio.sleep(0)
        l2.clear()
        assert not len(l2)
        await dropped
        l2.unpin(await loaded)
        assert await disk.read(0, CLUSTER) == b"\x10" * CLUSTER
        await disk.close()

    with_host(test)


def test_a_flush_that_can_not_be_done_is_not_acknowledged() -> None:
    """The image turned out to be corrupt: nothing on disk names what was written last."""

    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        await disk.write(0, b"\x10" * CLUSTER)
        await disk.flush()
        await disk.write(4 * CLUSTER, b"\x11" * CLUSTER)
        disk.node.corrupt("for a test")
        with pytest.raises(OSError):
            await disk.flush()
        await disk.close()

    with_host(test)


def test_a_flush_of_a_corrupt_image_with_nothing_to_lose() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        await disk.write(0, b"\x10" * CLUSTER)
        await disk.flush()
        disk.node.corrupt("for a test")
        await disk.flush()
        await disk.close()

    with_host(test)


def test_a_discard_ends_when_the_image_is_found_to_be_corrupt() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host, size=64 * MIB, cluster_size=4096)
        await disk.open()
        for offset in range(0, 16 * MIB, MIB):
            await disk.write(offset, b"\x10" * MIB)
        await disk.flush()
        discard = asyncio.ensure_future(disk.discard(0, 16 * MIB))
        await host.until(lambda: bool(disk.node.l2.dirty))
        disk.node.corrupt("for a test")
        async with asyncio.timeout(10):
            with pytest.raises(OSError):
                await discard
        await disk.close()

    with_host(test)


def test_the_place_of_an_outgrown_refcount_table_is_used_again() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host, size=24 * MIB, cluster_size=512)
        await disk.open()
        data = os.urandom(64 * KIB)
        for offset in range(0, 20 * MIB, len(data)):
            await disk.write(offset, data)
        await disk.flush()
        for offset in range(20 * MIB, 20 * MIB + 64 * KIB, 512):
            await disk.write(offset, data[:512])
        await disk.close()
        assert not host.named("BLOCK_IMAGE_CORRUPTED")
        disk.judge((data * 320 + data[:512] * 128).ljust(24 * MIB, b"\0"))

    with_host(test)


# ---- errors ----------------------------------------------------------------------------------


class Forgetful:
    """A disk that loses what was not flushed when a flush fails, as Linux's page cache does."""

    def __init__(self, path: Path) -> None:
        self.cache = bytearray(path.read_bytes())
        self.disk = bytearray(self.cache)
        self.unsure: list[tuple[int, bytes]] = []
        self.fail = False

    @property
    def size(self) -> int:
        return len(self.cache)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.cache[offset : offset + length]).ljust(length, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        for memory in (self.cache,):
            memory.extend(bytes(max(0, offset + len(data) - len(memory))))
            memory[offset : offset + len(data)] = data
        self.unsure.append((offset, bytes(data)))

    async def flush(self) -> None:
        writes, self.unsure = self.unsure, []
        if self.fail:
            raise OSError(5, "flush fails")  # and nobody will ever write these pages
        for offset, data in writes:
            self.disk.extend(bytes(max(0, offset + len(data) - len(self.disk))))
            self.disk[offset : offset + len(data)] = data


def test_counts_are_written_again_after_a_failed_flush(tmp_path: Path) -> None:
    path = newest_tools().create(tmp_path / "a.qcow2", 8 * MIB)

    async def run() -> None:
        disk = Forgetful(path)
        header = Header.parse(bytes(disk.cache[:4096]))
        counts = Refcounts(disk, header)
        await counts.load()
        host = await counts.reserve(3)
        disk.fail = True
        with pytest.raises(OSError):
            await counts.write_dirty()
            await counts.barrier(disk.flush)
        disk.fail = False
        await counts.write_dirty()
        await disk.flush()
        block = struct.unpack_from(">Q", disk.disk, header.refcount_table_offset)[0]
        for cluster in range(host // CLUSTER, host // CLUSTER + 3):
            assert struct.unpack_from(">H", disk.disk, block + 2 * cluster)[0] == 1

    asyncio.run(run())


def test_a_block_of_counts_whose_clusters_are_all_taken(tmp_path: Path) -> None:
    """By the log: the block is put elsewhere."""
    path = newest_tools().create(tmp_path / "a.qcow2", 8 * MIB, cluster_size=512)

    async def run() -> None:
        disk = Forgetful(path)
        header = Header.parse(bytes(disk.cache[:4096]))
        counts = Refcounts(disk, header)
        await counts.load()
        per_block = counts.per_block
        assert not counts.table[3] and not counts.table[4]
        wanted = range(3 * per_block, 5 * per_block)
        await counts.adopt(wanted)
        await counts.write_dirty()
        await disk.flush()
        again = Refcounts(disk, header)
        await again.load()
        assert [await again.get(cluster) for cluster in wanted] == [1] * len(wanted)
        places = [place // 512 for place in again.table if place]
        assert not set(places) & set(wanted)
        assert [await again.get(place) for place in places] == [1] * len(places)

    asyncio.run(run())


def test_closing_waits_for_what_is_being_freed() -> None:
    """Even if nothing is written to the image any more."""

    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        await disk.write(0, b"\x10" * MIB)
        await disk.flush()
        await disk.discard(0, MIB)
        with disk.node.reading():
            await disk.flush()  # they are free when the reader has ended
            disk.node.corrupt("for a test")
            closing = asyncio.ensure_future(disk.close())
            await asyncio.sleep(0.2)
            assert not closing.done()
        await closing

    with_host(test)


# ---- killed, and what the next one finds --------------------------------------------------------


def in_another_process(what: str, image: Path, **environment: str) -> None:
    """Run one of the functions below, which ends in a kill."""
    done = subprocess.run(
        [sys.executable, __file__, what, str(image)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def kill_after_write(disk: Disk) -> None:
    await disk.open()
    await disk.write(0, b"\x01" * CLUSTER)
    await disk.write(MIB, b"\x02" * CLUSTER)
    die()


async def kill_after_flushed_changes(disk: Disk) -> None:
    """What the first one's log says is not true any more afterwards."""
    await disk.open()
    await change(disk)
    die()


async def kill_behind_a_filter(disk: Disk) -> None:
    await disk.host.add("file", "storage", filename=str(disk.path))
    await disk.host.add("error-inject", "between", operations="read", skip=1 << 40, file="storage")
    disk.node = await disk.host.add("qcow2", "disk", file="between", discard="unmap")
    await change(disk)
    die()


async def change(disk: Disk) -> None:
    await disk.discard(0, 2 * MIB)
    await disk.flush()
    for offset in range(4 * MIB, 6 * MIB, CLUSTER):
        await disk.write(offset, b"\x03" * CLUSTER)
    await disk.flush()


async def kill_with_many_slices(disk: Disk) -> None:
    await disk.open()
    for number in range(64):
        await disk.write(number * 32 * MIB, bytes([number + 1]) * 4096)
    die()


async def kill_in_replay(disk: Disk) -> None:
    flush = writeback.Writeback.flush

    async def flush_and_die(self: writeback.Writeback) -> None:
        await flush(self)
        die()

    writeback.Writeback.flush = flush_and_die  # type: ignore[method-assign]
    await disk.open(l2_cache_size=2 * CLUSTER, l2_cache_entry_size=4096)


def logs(directory: Path) -> str:
    directory.mkdir()
    return str(directory)


def after(image: Path, look: Callable[[Disk], Awaitable[None]]) -> None:
    async def test(host: Host) -> None:
        disk = Disk(host, newest_tools(), image)
        await disk.open()
        await look(disk)
        await disk.close()

    with_host(test)


def test_an_image_that_stays_writable_after_all_keeps_its_log() -> None:
    """A change that would have made it read-only is undone."""

    async def test(host: Host) -> None:
        disk = new_disk(host)
        await disk.open()
        before = disk.node.header.autoclear & journal.HAS_LOG
        assert before
        given = {"driver": "qcow2", "node-name": disk.node.name, "read-only": True}
        given["file"] = disk.node.child("file").node.name
        with pytest.raises(VhostblkError):
            await host.backend.transaction(
                [("blockdev-reopen", {"options": [given]}), ("abort", {})]
            )
        assert not disk.node.read_only
        on_disk = Header.parse(Path(disk.node.filename()).read_bytes()[:65536])
        assert on_disk.autoclear & journal.HAS_LOG == before
        await disk.write(0, b"\x10" * CLUSTER)
        await disk.close()

    with_host(test)


def test_a_log_that_another_opening_has_not_seen_is_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log in one directory, an opening that looks for it in another, one that finds it."""
    image = newest_tools().create(tmp_path / "a.qcow2", 8 * MIB)
    first, second = logs(tmp_path / "1"), logs(tmp_path / "2")
    in_another_process("kill_after_write", image, VHOSTBLK_LOG_DIR=first)
    in_another_process("kill_after_flushed_changes", image, VHOSTBLK_LOG_DIR=second)
    monkeypatch.setenv("VHOSTBLK_LOG_DIR", first)
    after(image, has_changes)
    check = newest_tools().check(image)
    assert check.corruptions == 0, check.text


def test_an_opening_without_a_log_ends_the_one_that_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = newest_tools().create(tmp_path / "a.qcow2", 8 * MIB)
    first = logs(tmp_path / "1")
    in_another_process("kill_after_write", image, VHOSTBLK_LOG_DIR=first)
    nowhere = str(tmp_path / "not-there")
    in_another_process("kill_after_flushed_changes", image, VHOSTBLK_LOG_DIR=nowhere)
    monkeypatch.setenv("VHOSTBLK_LOG_DIR", first)
    after(image, has_changes)


def test_a_filter_below_the_image_does_not_hide_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = newest_tools().create(tmp_path / "a.qcow2", 8 * MIB)
    first = logs(tmp_path / "1")
    in_another_process("kill_after_write", image, VHOSTBLK_LOG_DIR=first)
    in_another_process("kill_behind_a_filter", image, VHOSTBLK_LOG_DIR=first)
    monkeypatch.setenv("VHOSTBLK_LOG_DIR", first)
    after(image, has_changes)


async def has_changes(disk: Disk) -> None:
    assert await disk.read(0, 4 * MIB) == bytes(4 * MIB)
    assert await disk.read(4 * MIB, 2 * MIB) == b"\x03" * (2 * MIB)


def test_killed_while_the_log_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More slices than the cache has, so that some are written in the middle."""
    image = newest_tools().create(tmp_path / "a.qcow2", 64 * 32 * MIB)
    monkeypatch.setenv("VHOSTBLK_LOG_DIR", logs(tmp_path / "1"))
    in_another_process("kill_with_many_slices", image)
    in_another_process("kill_in_replay", image)

    async def look(disk: Disk) -> None:
        for number in range(64):
            assert await disk.read(number * 32 * MIB, 4096) == bytes([number + 1]) * 4096

    after(image, look)
    check = newest_tools().check(image)
    assert check.corruptions == 0, check.text


def main() -> None:
    what: Any = globals()[sys.argv[1]]
    with_host(lambda host: what(Disk(host, newest_tools(), Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
