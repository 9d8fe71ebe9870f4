# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that were made to do harm: a clear error or none, with bounded memory and reading."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import struct
import tempfile
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from file_storage import FileStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcow2_memory import MemoryDisk
from qcow2_variants import VARIANTS, make
from thoroughness import tries

from vhostblk.nodes.qcow2 import bitmaps, snapshots
from vhostblk.nodes.qcow2 import check as check_module
from vhostblk.nodes.qcow2.check import check
from vhostblk.nodes.qcow2.compression import compress, decompress
from vhostblk.nodes.qcow2.geometry import OFFSET_MASK, BrokenEntry, Geometry, translate, units_of
from vhostblk.nodes.qcow2.header import (
    BITMAPS,
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    BadImage,
    Header,
)
from vhostblk.nodes.qcow2.layout import read_header, words_of
from vhostblk.nodes.qcow2.refcounts import Refcounts
from vhostblk.schema import VhostblkError

KINDS = ("v2-4k", "cluster-512", "snapshots", "extended-snapshots", "bitmaps", "zstd", "refcount-1")
# What an operator is told; anything else would be a traceback.
CLEAR = (VhostblkError, OSError)
KIB = 1 << 10
MIB = 1 << 20


@functools.cache
def image(name: str) -> tuple[bytes, tuple[int, ...]]:
    """An image, and where its metadata are."""
    with tempfile.TemporaryDirectory() as directory:
        variant = next(v for v in VARIANTS if v.name == name)
        data = make(Path(directory), variant, newest_tools(), seed=21).path.read_bytes()

    async def find() -> tuple[int, ...]:
        disk = MemoryDisk(bytearray(data))
        header = await read_header(disk)
        found = [header.l1_table_offset, header.refcount_table_offset]
        for table, count in (
            (header.l1_table_offset, header.l1_size),
            (header.refcount_table_offset, 4),
        ):
            words = words_of(await disk.read(table, 8 * count))
            found += [word & OFFSET_MASK for word in words if word]
        if header.nb_snapshots:
            found.append(header.snapshots_offset)
        directory = await bitmaps.read_directory(disk, header)
        if directory is not None:
            found.append(directory.offset)
            found += [one.table_offset for one in directory.bitmaps]
        return tuple(found)

    return data, asyncio.run(find())


INTERESTING = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, 511, 512, 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 62]),
    st.integers(0, 64).map(lambda n: 1 << 63 | n * 4096),
    st.integers(0, 63).map(lambda bit: 1 << bit),
)


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    data, tables = image(draw(st.sampled_from(KINDS)))
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        base = draw(st.sampled_from((0, 0, *tables)))
        # Most headers with a wrong start are not looked at any further.
        at = base + draw(st.integers(20, 160) if base == 0 else st.integers(0, 256))
        width = draw(st.sampled_from([1, 2, 4, 8]))
        value = draw(INTERESTING) & ((1 << 8 * width) - 1)
        broken[at : at + width] = value.to_bytes(width, "big")
    if draw(st.booleans()):
        del broken[draw(st.integers(72, len(broken))) :]
    return bytes(broken)


async def use_it(disk: MemoryDisk) -> None:
    """All that is done with an image, each on its own copy."""
    header = await read_header(disk)
    data = bytes(disk.data)
    counts = Refcounts(disk, header)

    async def guarded(work: Any) -> None:
        try:
            await work
        except CLEAR as error:
            assert str(error)

    await guarded(snapshots.read_table(disk, header))
    await guarded(bitmaps.read_directory(disk, header))
    await guarded(counts.load())
    for repair in ("none", "leaks", "all"):
        copy = MemoryDisk(bytearray(data))
        await guarded(check(copy, header, repair))  # type: ignore[arg-type]
        disk.bytes_read += copy.bytes_read
    for what, name in (("create", "new"), ("apply", "snap0"), ("delete", "snap0")):
        copy = MemoryDisk(bytearray(data))
        editor = snapshots.Editor(copy, header)
        await guarded(getattr(editor, what)(name))
        disk.bytes_read += copy.bytes_read
        assert copy.size < len(data) + 64 * MIB
    await guarded(bitmaps.mark_in_use(MemoryDisk(bytearray(data)), header))


@settings(
    max_examples=tries(60),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(hostile())
def test_nothing_but_clear_errors(data: bytes) -> None:
    disk = MemoryDisk(bytearray(data))
    try:
        asyncio.run(use_it(disk))
    except CLEAR as error:
        assert str(error)
    # Tables are read once or twice for each thing that is done, however often they are named.
    assert disk.bytes_read < 40 * len(data) + 400 * MIB


@settings(max_examples=tries(300), deadline=None, derandomize=True)
@given(st.binary(min_size=0, max_size=700), st.booleans())
def test_any_bytes_as_header(data: bytes, valid_start: bool) -> None:
    if valid_start:
        data = struct.pack(">II", 0x514649FB, 2 + len(data) % 2) + data
    try:
        header = Header.parse(data)
    except BadImage:
        return
    assert Header.parse(header.pack()) == header


WORDS = st.one_of(
    INTERESTING,
    st.just(0),
    st.builds(
        lambda host, flags: host << 16 | flags,
        st.integers(1, 1000),
        st.sampled_from([0, 1, 1 << 62, 1 << 63, 1 << 63 | 1]),
    ),
    st.sampled_from([(1 << 32) - 1, ((1 << 32) - 1) << 32, 0xFF, 0xFF << 40]),
)
SLICES = st.one_of(
    st.lists(WORDS, min_size=64, max_size=64),
    st.lists(st.integers(0, 1 << 20).map(lambda n: 1 << 63 | n << 16), min_size=64, max_size=64),
    st.integers(1, 1 << 20).map(
        lambda n: [w for i in range(32) for w in (1 << 63 | n + i << 16, (1 << 32) - 1)]
    ),
)


@settings(max_examples=tries(400), deadline=None, derandomize=True)
@given(SLICES, st.booleans(), st.sampled_from([2, 3]), st.booleans(), st.booleans())
def test_any_entries_as_l2_table(
    words: list[int], extended: bool, version: int, external: bool, writable: bool
) -> None:
    """All at once or one at a time, the same comes out."""
    geometry = Geometry(
        cluster_bits=16, extended=extended, version=version, slice_bytes=512, external=external
    )
    table = array("Q", words)
    each: list[int] = []
    broken = None
    for index in range(geometry.slice_entries):
        try:
            each += units_of(geometry, table, index, 2, writable)
        except BrokenEntry as error:
            broken = error.index
            break
    try:
        entries = translate(geometry, table, 2, writable)
    except BrokenEntry as error:
        assert error.index == broken and str(error)
        return
    assert broken is None and list(entries) == each
    for entry in entries:
        # Nothing writable but data, and never the header.
        assert not entry & 8 or (writable and entry & 7 == 1 and (external or entry >> 9))


def test_unknown_features_are_refused_by_the_name_in_the_image() -> None:
    data = bytearray(image("cluster-512")[0])
    header = asyncio.run(read_header(MemoryDisk(data)))
    table = struct.pack(">BB46s", 0, 17, b"self-destruction") + struct.pack(
        ">BB46s", 1, 18, b"wrong kind"
    )
    named = header.replace(cluster_bits=16).with_extension(EXT_FEATURE_NAMES, table)
    packed = bytearray(named.pack())
    struct.pack_into(">Q", packed, 72, 1 << 17 | 1 << 18)
    with pytest.raises(BadImage) as caught:
        Header.parse(bytes(packed))
    assert "self-destruction" in caught.value.desc
    assert "bit 18" in caught.value.desc and "wrong kind" not in caught.value.desc


@pytest.mark.parametrize("same", [True, False])
def test_tables_that_are_named_a_million_times_are_read_once(same: bool) -> None:
    """3000 snapshots with L1 tables, the same or overlapping ones, of 2^18 entries each."""
    size = 4096
    entries, snaps = 1 << 18, 3000
    disk = MemoryDisk(bytearray(24 * MIB))

    async def go() -> Any:
        header = Header(
            version=3,
            cluster_bits=12,
            size=entries * size * 512,
            l1_size=entries,
            l1_table_offset=MIB,
            refcount_table_offset=size,
            refcount_table_clusters=1,
            nb_snapshots=snaps,
            snapshots_offset=20 * MIB,
        )
        await disk.write(0, header.pack())
        await disk.write(size, struct.pack(">Q", 2 * size))
        await disk.write(MIB, struct.pack(">Q", 1 << 63 | 23 * MIB) * 2 * entries)
        await disk.write(23 * MIB, struct.pack(">Q", 1 << 63 | 23 * MIB + size) * 512)
        for number in range(snaps):
            l1 = MIB + (0 if same else number * size % (4 * MIB))
            fixed = struct.pack(">QIHHIIQII", l1, entries, 1, 1, 0, 0, 0, 0, 16)
            await disk.write(20 * MIB + 64 * number, fixed + bytes(16) + b"ab" + bytes(6))
        disk.bytes_read = 0
        return await check(disk, await read_header(disk))

    if same:
        result = asyncio.run(go())
        assert result.corruptions and len(result.messages) <= 1000
    else:
        with pytest.raises(BadImage, match="overlap"):
            asyncio.run(go())
    assert disk.bytes_read < 128 * MIB


def test_tables_far_behind_the_end_take_no_memory() -> None:
    async def go() -> Any:
        disk = MemoryDisk(bytearray(64 * 1024))
        header = Header(
            version=3,
            cluster_bits=9,
            size=1 << 30,
            l1_size=1 << 22,
            l1_table_offset=1024,
            refcount_table_offset=512,
            refcount_table_clusters=16384,
            refcount_order=0,
        )
        await disk.write(0, header.pack())
        return await check(disk, await read_header(disk))

    tracemalloc.start()
    try:
        result = asyncio.run(go())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.corruptions and any("beyond the end" in text for text in result.messages)
    assert peak < 32 * MIB


def bitmaps_image(tables: list[int], entries: int) -> MemoryDisk:
    """An image with bitmaps that have their tables there, all entries naming one cluster."""
    size, end = 4096, 64 * KIB + max(tables) + 8 * entries
    disk = MemoryDisk(bytearray(end))
    directory = b""
    for number, table in enumerate(tables):
        entry = struct.pack(">QIIBBHI", 64 * KIB + table, entries, 0, 1, 16, 4, 0)
        directory += entry + struct.pack(">I", number) + bytes(4)
    header = Header(
        version=3,
        cluster_bits=12,
        size=MIB,
        l1_size=1,
        l1_table_offset=size,
        refcount_table_offset=2 * size,
        refcount_table_clusters=1,
        autoclear=BITMAPS,
        extensions=((EXT_BITMAPS, struct.pack(">IIQQ", len(tables), 0, len(directory), 4 * size)),),
    )
    for at, data in (
        (0, header.pack()),
        (4 * size, directory),
        (64 * KIB, struct.pack(">Q", 3 * size) * ((end - 64 * KIB) // 8)),
    ):
        asyncio.run(disk.write(at, data))
    return disk


def test_a_table_of_many_bitmaps_is_read_once() -> None:
    disk = bitmaps_image([0] * 1000, 16384)

    async def go() -> Any:
        header = await read_header(disk)
        disk.bytes_read = 0
        return await check(disk, header)

    result = asyncio.run(go())
    assert any("reference=16384000" in text for text in result.messages)
    assert disk.bytes_read < MIB


def test_tables_of_bitmaps_that_overlap_are_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "MAX_ALL_BITMAP_TABLE_BYTES", 2 * MIB)
    disk = bitmaps_image([4096 * number for number in range(1000)], 1024)

    async def go() -> None:
        await check(disk, await read_header(disk))

    with pytest.raises(BadImage, match="tables of the bitmaps"):
        asyncio.run(go())


def test_a_bitmap_is_not_longer_than_qemu_has_them() -> None:
    disk = bitmaps_image([0], 131073)

    async def go() -> None:
        await bitmaps.read_directory(disk, await read_header(disk))

    with pytest.raises(BadImage, match="not valid"):
        asyncio.run(go())


@pytest.mark.parametrize("limit", ["MAX_TABLES", "MAX_ALL_L1_BYTES"])
def test_a_sparse_file_has_no_room_for_any_number_of_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Nothing is written where the L1 tables of its 40 snapshots are."""
    monkeypatch.setattr(check_module, limit, 1 << 16)
    path, length, snaps = tmp_path / "image", MIB, 40
    header = Header(
        version=3,
        cluster_bits=9,
        size=MIB,
        l1_size=32,
        l1_table_offset=512,
        refcount_table_offset=1024,
        refcount_table_clusters=1,
        nb_snapshots=snaps,
        snapshots_offset=2048,
    )
    table = b""
    for number in range(snaps):
        l1 = (number + 1) * length
        fixed = struct.pack(">QIHHIIQII", l1, length // 8, 1, 1, 0, 0, 0, 0, 16)
        table += fixed + bytes(16) + b"ab" + bytes(6)
    path.write_bytes(header.pack().ljust(2048, b"\0") + table)
    os.truncate(path, (snaps + 1) * length)

    async def go() -> None:
        with FileStorage(path) as storage:
            await check(storage, await read_header(storage))

    text = "clusters of tables" if limit == "MAX_TABLES" else "bytes together"
    with pytest.raises(BadImage, match=text):
        asyncio.run(go())


@pytest.mark.parametrize("bomb", ["zlib", "zstd"])
def test_compressed_clusters_give_a_cluster_and_no_more(bomb: str) -> None:
    import zlib

    import zstandard

    plain = bytes(256 * MIB)
    if bomb == "zlib":
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        data = packer.compress(plain) + packer.flush()
    else:
        data = zstandard.ZstdCompressor().compress(plain)
    del plain
    tracemalloc.start()
    try:
        assert decompress(bomb, data, 65536) == bytes(65536)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    for broken in (b"", b"\xff" * 512, data[:20]):
        with pytest.raises(OSError, match="compressed cluster"):
            decompress(bomb, broken, 65536)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_what_is_compressed_comes_back_and_what_gets_no_smaller_is_not(kind: str) -> None:
    data = bytes(range(256)) * 16
    packed = compress(kind, data)
    assert packed is not None and len(packed) < len(data)
    # The rest of the last sector is whatever was there.
    assert decompress(kind, packed + b"\xa5" * 300, len(data)) == data
    assert compress(kind, random.Random(1).randbytes(4096)) is None
