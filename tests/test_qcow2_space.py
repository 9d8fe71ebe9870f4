# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 where space is short: the reference counts find every free cluster, wherever it lies."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from file_storage import FileStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import Host, with_host
from test_qcow2_driver import new_disk
from thoroughness import tries

from vhostblk.nodes.qcow2.header import Header
from vhostblk.nodes.qcow2.refcounts import Refcounts

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB
WINDOW = 2000  # clusters that the model looks at: more than it ever takes


@pytest.mark.parametrize("bits", [1, 4, 16, 64])
@settings(max_examples=tries(15), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_counts_against_a_model(bits: int, seed: int) -> None:
    """Nothing is given to two, the lowest place that fits is taken, and all of it is used."""
    rng = random.Random(seed)

    async def run(path: Path) -> None:
        storage = FileStorage(path, writable=True)
        header = Header.parse(await storage.read(0, 4096))
        counts = Refcounts(storage, header)
        await counts.load()
        size, used = header.cluster_size, set[int]()
        for cluster in range(WINDOW):
            if await counts.get(cluster):
                used.add(cluster)
        taken: list[tuple[int, int]] = []
        for _ in range(rng.randint(1, 30)):
            if taken and rng.random() < 0.45:
                host, count = taken.pop(rng.randrange(len(taken)))
                part = rng.randint(1, count)
                assert await counts.free(host, part)
                used -= set(range(host // size, host // size + part))
                if part < count:
                    taken.append((host + part * size, count - part))
                continue
            most = rng.choice([1, 2, 3, 7, 40])
            before = {n for n in range(WINDOW) if await counts.get(n)}
            if rng.random() < 0.5:
                host, count = await counts.reserve(most), most
            else:
                host, count = await counts.reserve_some(most)
                assert 1 <= count <= most
            first = host // size
            got = set(range(first, first + count))
            assert not got & used
            # What else is used now are blocks of counts, or a larger table.
            others = {n for n in range(WINDOW) if await counts.get(n)} - before - got
            if not others:
                free = [n for n in range(first) if n not in before]
                if count == most:
                    rows = "".join("1" if n in before else "0" for n in range(first))
                    assert "0" * most not in rows
                else:
                    assert not free, "something lower was free"
            used |= got | others
            taken.append((host, count))
        for cluster in range(WINDOW):
            assert (await counts.get(cluster) > 0) == (cluster in used)

    with tempfile.TemporaryDirectory() as directory:
        path = newest_tools().create(
            Path(directory) / "a.qcow2", MIB, cluster_size=512, refcount_bits=bits
        )
        asyncio.run(run(path))


def test_a_full_device_with_gaps() -> None:
    """A write that needs four clusters gets single ones, the last that the engine holds too."""

    async def test(host: Host) -> None:
        disk = new_disk(host, 8 * MIB)
        os.truncate(disk.path, 4 * MIB)
        device: dict[str, Any] = {"driver": "raw", "size": 4 * MIB}
        device["file"] = {"driver": "file", "filename": str(disk.path)}
        disk.node = await host.add("qcow2", "disk", file=device, discard="unmap")
        content = bytearray(8 * MIB)

        async def write(offset: int, data: bytes) -> None:
            await disk.write(offset, data)
            content[offset : offset + len(data)] = data

        async def fill(offset: int) -> int:
            """Clusters until there is none left; how many that were."""
            for number in range(64):
                try:
                    await write(offset + number * CLUSTER, os.urandom(CLUSTER))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    return number
            raise AssertionError("a device that is never full")

        assert await fill(0) > 50
        await disk.flush()
        for offset in range(2 * MIB, 3 * MIB, 2 * CLUSTER):  # eight gaps
            await disk.discard(offset, CLUSTER)
            content[offset : offset + CLUSTER] = bytes(CLUSTER)
        await disk.flush()
        # Takes three: a table of snapshots, a copy of the L1 table, then one of the L2 table.
        await host.backend.internal_snapshot("disk", "create", "before")
        was = bytes(content)
        await write(2 * MIB, b"\x77" * 512)  # the engine gets two in advance, and uses one
        await write(0, b"\x55" * (4 * CLUSTER))
        assert await fill(MIB) == 0
        assert await disk.read(0, 8 * MIB) == content
        await disk.close()
        disk.judge(bytes(content))
        assert disk.tools.content(disk.path, "qcow2", "-l", "snapshot.name=before") == was

    with_host(test)


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("length", [CLUSTER, 4 * KIB], ids=["whole", "part"])
def test_a_write_that_fails_takes_no_space(backing: bool, length: int) -> None:
    """New clusters that the device cannot write go to the next write that needs some."""

    async def test(host: Host) -> None:
        disk = new_disk(host, 8 * MIB)
        content = bytearray(8 * MIB)
        if backing:
            below = disk.path.with_name("below.raw")
            below.write_bytes(b"\x33" * (8 * MIB))
            disk.path.unlink()
            disk.tools.create(disk.path, 8 * MIB, backing_file=below, backing_fmt="raw")
            content[:] = below.read_bytes()
        device: dict[str, Any] = {"driver": "error-inject", "node-name": "broken"}
        device["operations"] = ["write"]
        device["errno"], device["every"], device["skip"] = "ENOSPC", 3, 6
        device["file"] = {"driver": "file", "filename": str(disk.path)}
        disk.node = await host.add("qcow2", "disk", file=device)
        failed = 0
        for number in range(100):
            offset = number * CLUSTER
            data = os.urandom(length)
            try:
                await disk.write(offset, data)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failed += 1
                # Some of it may have been written, as on any disk; here there was no place for it.
                assert await disk.read(offset, length) == content[offset : offset + length]
            else:
                content[offset : offset + length] = data
        assert failed > 20
        await host.backend.transaction([("block-filter-remove", {"node-name": "broken"})])
        await disk.flush()
        assert await disk.read(0, 8 * MIB) == content
        await disk.close()
        disk.judge(bytes(content))

    with_host(test)


def test_runs_are_short_where_space_is_limited() -> None:
    """What is in a run is lost in a crash, and zeroes are written to a device."""

    async def test(host: Host) -> None:
        path = Path(host.path("disk.qcow2"))
        newest_tools().create(path, 1 << 30)
        os.truncate(path, 256 * MIB)
        await host.add("file", "storage", filename=str(path))
        part = {"driver": "raw", "file": "storage", "size": 256 * MIB}
        for file, most in (("storage", 64 * MIB), (part, 16 * MIB)):
            node = await host.add("qcow2", "disk", file=file)
            for _ in range(12):  # faster than a run lasts
                node.allocator._given_at = time.monotonic()
                node.allocator._learn_from_pace()
            assert node.allocator._run == most
            await host.backend.blockdev_del("disk")

    with_host(test)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_large_write_to_tiny_clusters(compat: str) -> None:
    """80 000 clusters at once, of which a run has 128."""

    async def test(host: Host) -> None:
        disk = new_disk(host, size=48 * MIB, cluster_size=512, compat=compat)
        await disk.open()
        data = os.urandom(MIB) * 40
        async with asyncio.timeout(50):
            await disk.write(4096, data)
            await disk.flush()
        await disk.close()
        disk.judge((bytes(4096) + data).ljust(48 * MIB, b"\0"))

    with_host(test)


def test_a_snapshot_when_the_table_of_counts_has_moved() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host, 16 * MIB, cluster_size=512)  # the table is enough for 8 MiB
        await disk.open()
        await disk.write(0, b"a" * (12 * MIB))
        await disk.flush()
        found = await disk.node.check_image(None)
        assert found["check-errors"] == 0 and "corruptions" not in found and "leaks" not in found
        await host.backend.internal_snapshot("disk", "create", "snap")
        await disk.write(0, b"b" * MIB)
        await disk.close()
        disk.judge(b"b" * MIB + b"a" * (11 * MIB) + bytes(4 * MIB))

    with_host(test)


@pytest.mark.parametrize("failing", ["write", "flush", "read"])
@pytest.mark.parametrize("what", ["larger", "smaller", "create", "delete"])
def test_a_change_of_the_image_that_fails_changes_nothing(what: str, failing: str) -> None:
    """At whichever of its writes (barriers, reads) the device fails; afterwards it works."""
    old, new = 16 * MIB, {"larger": 24 * MIB, "smaller": 10 * MIB}.get(what, 16 * MIB)

    async def change(host: Host) -> None:
        if what in ("create", "delete"):
            await host.backend.internal_snapshot("disk", what, "snap")
        else:
            await host.backend.block_resize("disk", new)

    def attempt(skip: int) -> bool:
        done = False

        async def test(host: Host) -> None:
            nonlocal done
            disk = new_disk(host, old, cluster_size=512)  # an L1 table of 8 clusters
            content = bytearray(max(old, new))
            await disk.open()
            for number in range(2):
                for offset in (0, 7 * MIB, 12 * MIB, 16 * MIB - 4096):
                    await disk.write(offset, bytes([number + 1]) * 4096)
                    content[offset : offset + 4096] = bytes([number + 1]) * 4096
                if what == "delete" and not number:
                    await host.backend.internal_snapshot("disk", "create", "snap")
            await disk.flush()
            broken = {"driver": "error-inject", "node-name": "broken", "skip": skip, "count": 1}
            broken |= {"operations": [failing], "errno": "ENOSPC"}
            place = {"node-name": "disk", "child": "file"}
            await host.backend.transaction([("block-filter-insert", {"filter": broken, **place})])
            try:
                await change(host)
                done = True
            except OSError as error:
                assert error.errno == errno.ENOSPC
            await host.backend.transaction([("block-filter-remove", {"node-name": "broken"})])
            kept = min(old, new)
            assert await disk.read(0, kept) == content[:kept]
            await disk.write(5 * MIB, b"\x66" * 4096)
            content[5 * MIB : 5 * MIB + 4096] = b"\x66" * 4096
            if not done:
                await change(host)
            assert await disk.read(0, new) == content[:new]
            await disk.close()
            check = disk.tools.check(disk.path)
            assert not check.corruptions and not check.errors, check.text
            assert disk.tools.content(disk.path) == content[:new]
            snapshots = disk.tools.info(disk.path).get("snapshots", [])
            assert [entry["name"] for entry in snapshots] == ["snap"] * (what == "create")
            leaks.append(check.leaks)

        with_host(test)
        return done

    leaks: list[int] = []
    while not attempt(len(leaks)):
        assert len(leaks) < 60
    assert len(leaks) > 1 or (failing == "read" and what in ("larger", "smaller"))
    assert not any(leaks), leaks
