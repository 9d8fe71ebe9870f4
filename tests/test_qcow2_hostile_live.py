# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that were made to do harm, opened and used as a guest's disk: a clear error or none."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from hypothesis import HealthCheck, given, settings
from in_process import Host, refused, with_host
from test_qcow2_driver import KIB, MIB, Disk, new_disk
from test_qcow2_hostile import CLEAR, hostile
from thoroughness import tries

from vhostblk import backend as backend_module
from vhostblk.nodes.qcow2.header import Header
from vhostblk.nodes.qcow2.layout import bytes_of

FAR = 1 << 48
L1_OFFSET, TABLE_OFFSET, SNAPSHOTS, SNAPSHOTS_OFFSET = 40, 48, 60, 64


def put(path: Path, offset: int, form: str, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


def number(path: Path, offset: int) -> int:
    return int(struct.unpack_from(">Q", path.read_bytes(), offset)[0])


async def attempt(work: Any) -> None:
    try:
        await work
    except CLEAR as error:
        assert str(error)


async def use(disk: Disk) -> None:
    """All that a guest and an operator may do, each of which may fail."""
    backend = disk.host.backend
    end = min(disk.node.size, 2 * MIB) // (64 * KIB) * 64 * KIB
    for offset in range(0, end, 64 * KIB):
        await attempt(disk.read(offset, 64 * KIB))
    for offset in range(0, end, 256 * KIB):
        await attempt(disk.write(offset, b"\x55" * 8192))
        await attempt(disk.discard(offset + 4096, 8192))
        await attempt(disk.zero(offset + 16384, 4096, unmap=True))
    await attempt(disk.flush())
    for what in ("create", "delete"):
        await attempt(backend.internal_snapshot("disk", what, "another"))
    await attempt(backend.block_image_check("disk"))
    await attempt(backend.block_image_map("disk", 0, None, 1000))
    await attempt(backend.block_resize("disk", 6 * MIB))
    await attempt(disk.flush())


@settings(
    max_examples=tries(100),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(hostile())
def test_nothing_but_clear_errors(data: bytes) -> None:
    async def test(host: Host) -> None:
        disk = Disk(host, newest_tools(), Path(host.path("disk.qcow2")))
        disk.path.write_bytes(data)
        try:
            await disk.open(backing=None)
        except CLEAR as error:
            assert str(error)
            return
        await use(disk)
        await disk.close()
        assert disk.path.stat().st_size < len(data) + 256 * MIB

    with_host(test)


@pytest.mark.parametrize("field", [L1_OFFSET, TABLE_OFFSET, SNAPSHOTS_OFFSET])
def test_tables_beyond_the_end_of_the_file(field: int) -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        put(disk.path, SNAPSHOTS, ">I", field == SNAPSHOTS_OFFSET)
        put(disk.path, field, ">Q", FAR)
        with refused("Could not open", f"table ({FAR:#x}) is outside the image file"):
            await disk.open()

    with_host(test)


def test_an_l2_table_beyond_the_end_of_the_file() -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host)
        put(disk.path, number(disk.path, L1_OFFSET), ">Q", 1 << 63 | FAR)
        await disk.open()
        with pytest.raises(OSError, match="beyond the end of the file"):
            await disk.node.load_slice(0)
        for work in (disk.read(0, 512), disk.write(0, b"\x55" * 512)):
            with pytest.raises(OSError):
                await work
        assert host.named("BLOCK_IMAGE_CORRUPTED")
        await disk.close()
        assert disk.path.stat().st_size < 4 * MIB

    with_host(test)


@pytest.mark.parametrize("where", ["beyond the end", "the block before"])
def test_counts_that_are_elsewhere_do_not_make_clusters_free(where: str) -> None:
    async def test(host: Host) -> None:
        disk = new_disk(host, cluster_size="512")
        disk.tools.io(disk.path, "write -q -P 5 0 4M")
        entry = number(disk.path, TABLE_OFFSET) + 8 * 20
        wrong = 1 << 40 if where == "beyond the end" else number(disk.path, entry - 8)
        put(disk.path, entry, ">Q", wrong)
        await disk.open(overlap_check="none")
        with pytest.raises(OSError):
            for offset in range(4 * MIB, 8 * MIB, 64 * KIB):
                await disk.write(offset, b"n" * 64 * KIB)
            await disk.flush()
        assert await disk.read(0, 4 * MIB) == b"\x05" * 4 * MIB
        await disk.close()

    with_host(test)


def longest_tables(path: Path) -> None:
    """An L1 table of 32 MiB and a refcount table of 8 MiB, all entries of which are lies."""
    cluster, tables, blocks = 4096, 1 << 22, 1 << 20
    header = Header(
        version=3,
        cluster_bits=12,
        size=tables * (cluster // 8) * cluster,
        l1_size=tables,
        l1_table_offset=MIB,
        refcount_table_offset=64 * MIB,
        refcount_table_clusters=8 * MIB // cluster,
    )
    with open(path, "wb") as file:
        file.write(header.pack())
        for offset, first, count in ((MIB, 20000, tables), (64 * MIB, 30000, blocks)):
            file.seek(offset)
            file.write(
                bytes_of(array("Q", range(first * cluster, (first + count) * cluster, cluster)))
            )
        file.truncate(256 * MIB)


def test_the_longest_tables_take_their_own_size_in_memory() -> None:
    async def test(host: Host) -> None:
        disk = Disk(host, newest_tools(), Path(host.path("disk.qcow2")))
        longest_tables(disk.path)
        tracemalloc.start()
        try:
            await disk.open()
            opened, most = tracemalloc.get_traced_memory()
            # Both tables, twice; a read of one of them, and its copies, while it is opened.
            assert opened < 96 * MIB and most < 192 * MIB
            await attempt(disk.read(0, 512))
            await attempt(disk.write(0, b"x" * 512))
            assert tracemalloc.get_traced_memory()[1] < 192 * MIB
        finally:
            tracemalloc.stop()

    with_host(test)


def test_a_check_does_not_hold_up_guests_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "CHECK_PATIENCE", 0.5)

    async def test(host: Host) -> None:
        disk = Disk(host, newest_tools(), Path(host.path("disk.qcow2")))
        longest_tables(disk.path)
        await disk.open(read_only=True)
        await host.export("disk", writable=False)
        with refused("The check of node 'disk' has taken more than 0.5 s"):
            await host.backend.block_image_check("disk")
        async with host.device() as guest:
            await guest.read(0, 512)

    with_host(test)


@pytest.mark.parametrize("kind", ["backing file", "data file"])
def test_names_with_a_null_byte(kind: str) -> None:
    async def test(host: Host) -> None:
        host.file("other.raw")
        if kind == "backing file":
            disk = new_disk(host, MIB, backing="other.raw", backing_format="raw")
        else:
            disk = new_disk(host, MIB, data_file="other.raw")
        data = disk.path.read_bytes()
        put(disk.path, data.index(b"other.raw") + 1, ">B", 0)
        with refused(f"{kind} name contains a null byte".capitalize()):
            await disk.open()

    with_host(test)
