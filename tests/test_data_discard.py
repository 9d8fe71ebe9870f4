# SPDX-License-Identifier: GPL-2.0-or-later
"""Discards and zero writes: what they do to the data, and what to the space."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from blkio import Disk, DiskError, Server, needs_vhostblk
from blkio.library import plain_environment
from blkio.model import pattern
from blkio.stacks import MIB

GIB = 1 << 30


def allocated(path: Path) -> int:
    """Bytes that the file takes on its disk."""
    return path.stat().st_blocks * 512


def image_of(directory: Path, *, data: int = 0, size: int = 0) -> Path:
    image = directory / "image.raw"
    with image.open("wb") as file:
        if data:
            file.write(pattern(data, 1))
        if size:
            file.truncate(size)
    # Blocks that are not written yet are not counted everywhere.
    subprocess.run(["sync", image], env=plain_environment(), check=True, timeout=60)
    return image


def server_of(directory: Path, image: Path, options: str = "", **more: object) -> Server:
    node = f"driver=file,node-name=disk,filename={image}{options}"
    return Server(directory, [node], **more)  # type: ignore[arg-type]


RAW = [
    "driver=raw,node-name=mid,file=disk0,discard=unmap",
    "driver=raw,node-name=disk,file=mid,discard=unmap",
]


@pytest.mark.parametrize("cache", ["", ",cache.direct=on"], ids=["buffered", "direct"])
def test_discard_gives_space_back(cache: str, tmp_path: Path) -> None:
    image = image_of(tmp_path, data=4 * MIB)
    before = allocated(image)
    with (
        server_of(tmp_path, image, f",discard=unmap{cache}") as server,
        Disk(server.path) as disk,
    ):
        disk.discard(MIB, 2 * MIB)
        disk.flush()
        assert allocated(image) <= before - 2 * MIB
        assert disk.read(MIB, 2 * MIB) == bytes(2 * MIB)
        assert disk.read(0, MIB) == pattern(4 * MIB, 1)[:MIB]
        assert disk.read(3 * MIB, MIB) == pattern(4 * MIB, 1)[3 * MIB :]
        assert disk.capacity == 4 * MIB and image.stat().st_size == 4 * MIB


def test_discard_through_raw(tmp_path: Path) -> None:
    image = image_of(tmp_path, data=4 * MIB)
    before = allocated(image)
    nodes = [f"driver=file,node-name=disk0,filename={image},discard=unmap", *RAW]
    with Server(tmp_path, nodes) as server, Disk(server.path) as disk:
        disk.discard(0, 4 * MIB)
    assert allocated(image) <= before - 4 * MIB


def test_discard_is_ignored_unless_asked_for(tmp_path: Path) -> None:
    """QEMU's default, discard=ignore: the guest is told that all went well."""
    image = image_of(tmp_path, data=4 * MIB)
    before = allocated(image)
    with server_of(tmp_path, image) as server, Disk(server.path) as disk:
        disk.discard(0, 4 * MIB)
        assert disk.read(0, 4 * MIB) == pattern(4 * MIB, 1)
    assert allocated(image) == before


def test_zero_writes_may_unmap_or_not(tmp_path: Path) -> None:
    image = image_of(tmp_path, data=4 * MIB)
    before = allocated(image)
    with server_of(tmp_path, image, ",discard=unmap") as server, Disk(server.path) as disk:
        disk.write_zeroes(0, MIB, unmap=False)
        disk.flush()
        assert disk.read(0, MIB) == bytes(MIB)
        assert allocated(image) >= before
        disk.write_zeroes(MIB, MIB, unmap=True)
        disk.flush()
        assert disk.read(MIB, MIB) == bytes(MIB)
        assert allocated(image) <= before - MIB


def test_zero_writes_of_a_sector(tmp_path: Path) -> None:
    """Smaller than any block that could be unmapped, across block boundaries."""
    image = image_of(tmp_path, data=MIB)
    expected = bytearray(pattern(MIB, 1))
    with server_of(tmp_path, image, ",discard=unmap") as server, Disk(server.path) as disk:
        for offset, length in ((512, 512), (7 * 512, 1024), (65536 - 512, 8192), (MIB - 512, 512)):
            disk.write_zeroes(offset, length)
            expected[offset : offset + length] = bytes(length)
        assert disk.read(0, MIB) == expected


@needs_vhostblk
@pytest.mark.parametrize("length", [16 * MIB, 16 * MIB + 512, 100 * MIB, 5 * GIB // 4])
@pytest.mark.parametrize("objects", [(), ("iothread,id=io,aio=threads",)], ids=["uring", "threads"])
def test_larger_than_16_mib(length: int, objects: tuple[str, ...], tmp_path: Path) -> None:
    image = image_of(tmp_path, size=2 * GIB)
    with (
        server_of(
            tmp_path, image, ",discard=unmap", objects=objects, iothread="io" if objects else ""
        ) as server,
        Disk(server.path) as disk,
    ):
        begin = 3 * MIB + 512
        marks = (begin - 512, begin, begin + length // 512 // 2 * 512, begin + length - 512)
        for clear in (disk.discard, disk.write_zeroes):
            for mark in (*marks, begin + length):
                disk.write(mark, b"\xee" * 512)
            clear(begin, length)
            for mark in marks[1:]:
                assert disk.read(mark, 512) == bytes(512), f"at {mark:#x}"
            assert disk.read(begin - 512, 512) == b"\xee" * 512
            assert disk.read(begin + length, 512) == b"\xee" * 512
    assert allocated(image) < MIB


@needs_vhostblk
def test_the_whole_of_a_huge_disk(tmp_path: Path) -> None:
    """mkfs discards all there is; the ranges are cut by what the device says it takes."""
    image = image_of(tmp_path, size=5 * 1024 * GIB)
    with server_of(tmp_path, image, ",discard=unmap") as server, Disk(server.path) as disk:
        queue = disk.queues[0]
        step = int(disk.get("max-discard-len"))
        assert step > 16 * MIB
        end = 5 * 1024 * GIB - 512
        disk.write(end, b"\x99" * 512)
        for at in range(0, end + 512, step):
            length = min(step, end + 512 - at)
            if len(queue.flying) == 16:
                queue.wait(1)[0].checked()
            queue.discard(at, length)
        for request in queue.drain():
            request.checked()
        assert disk.read(end, 512) == bytes(512)


@pytest.mark.parametrize("detect", ["on", "unmap"])
def test_detect_zeroes(detect: str, tmp_path: Path) -> None:
    image = image_of(tmp_path, data=4 * MIB)
    before = allocated(image)
    options = f",discard=unmap,detect-zeroes={detect}"
    with server_of(tmp_path, image, options) as server, Disk(server.path) as disk:
        disk.write(0, bytes(2 * MIB))
        disk.write(2 * MIB, bytes(MIB - 1) + b"\x01")  # one byte is enough
        disk.flush()
        assert disk.read(0, 3 * MIB) == bytes(3 * MIB - 1) + b"\x01"
    if detect == "unmap":
        assert allocated(image) <= before - 2 * MIB + 256 * 1024
        assert allocated(image) >= MIB


def test_a_sparse_file_stays_sparse(tmp_path: Path) -> None:
    image = image_of(tmp_path, size=64 * MIB)
    with server_of(tmp_path, image, ",discard=unmap") as server, Disk(server.path) as disk:
        disk.write_zeroes(0, 16 * MIB)
        disk.discard(16 * MIB, 16 * MIB)
        assert disk.read(0, 64 * MIB) == bytes(64 * MIB)
        disk.write(20 * MIB, b"\x01" * 4096)
    assert allocated(image) <= MIB


def test_read_only(tmp_path: Path) -> None:
    image = image_of(tmp_path, data=MIB)
    for options, writable in ((",read-only=on", False), ("", False)):
        with server_of(tmp_path, image, options, writable=writable) as server:
            with pytest.raises(DiskError):
                Disk(server.path)  # libblkio will not open it for writing: VIRTIO_BLK_F_RO
            with Disk(server.path, read_only=True) as disk:
                assert disk.read(0, MIB) == pattern(MIB, 1)
                disk.flush()
    assert image.read_bytes() == pattern(MIB, 1)
