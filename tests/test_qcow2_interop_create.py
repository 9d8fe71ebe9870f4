# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that we create, judged by QEMU: the same header as its own, clean, and usable by both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from crash import Clock, Drive, History, Tools, all_tools, newest_tools
from in_process import Host, with_host

KIB = 1 << 10
MIB = 1 << 20

# Options of blockdev-create, and the same for qemu-img create.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "v2": ({"version": "v2"}, {"compat": "0.10"}),
    "cluster-512": ({"cluster-size": 512}, {"cluster_size": 512}),
    "cluster-4k": ({"cluster-size": 4 * KIB}, {"cluster_size": 4 * KIB}),
    "cluster-2M": ({"cluster-size": 2 * MIB}, {"cluster_size": 2 * MIB}),
    **{
        f"refcount-{bits}": ({"refcount-bits": bits}, {"refcount_bits": bits})
        for bits in (1, 2, 4, 8, 32, 64)
    },
    "lazy": ({"lazy-refcounts": True}, {"lazy_refcounts": "on"}),
    "zstd": ({"compression-type": "zstd"}, {"compression_type": "zstd"}),
    "extended": ({"extended-l2": True}, {"extended_l2": "on"}),
    "extended-16k": (
        {"extended-l2": True, "cluster-size": 16 * KIB},
        {"extended_l2": "on", "cluster_size": 16 * KIB},
    ),
    "metadata": ({"preallocation": "metadata"}, {"preallocation": "metadata"}),
    "falloc": ({"preallocation": "falloc"}, {"preallocation": "falloc"}),
    "full": ({"preallocation": "full"}, {"preallocation": "full"}),
    "backing": (
        {"backing-file": "below.raw", "backing-fmt": "raw"},
        {"backing": "below.raw", "backing_format": "raw"},
    ),
}
SIZE = 8 * MIB + 1536


async def create(host: Host, path: Path, size: int, **options: Any) -> None:
    """blockdev-create on a new file, as far as its success."""
    path.touch()
    name = f"created-{path.stem}"
    await host.add("file", name, filename=str(path))
    await host.backend.blockdev_create(
        "create", {"driver": "qcow2", "file": name, "size": size, **options}
    )
    job = host.backend.jobs.get("create")
    await host.until(lambda: job.status.value == "concluded")
    assert job.error is None
    job.dismiss()
    await host.backend.blockdev_del(name)


def facts(tools: Tools, path: Path) -> dict[str, Any]:
    """What `qemu-img info` says of the header."""
    info = tools.info(path)
    names = ("virtual-size", "cluster-size", "format", "dirty-flag", "backing-filename",
             "backing-filename-format")  # fmt: skip
    found = {name: info[name] for name in names if name in info}
    return {**found, **info["format-specific"]["data"]}


@pytest.mark.parametrize("kind", KINDS)
def test_as_qemu_would(tmp_path: Path, kind: str) -> None:
    ours, theirs = KINDS[kind]
    (tmp_path / "below.raw").write_bytes(random.Random(1).randbytes(3 * MIB))
    path = tmp_path / "disk.qcow2"
    reference = newest_tools().create(tmp_path / "reference.qcow2", SIZE, **theirs)
    before = newest_tools().content(reference)

    async def test(host: Host) -> None:
        await create(host, path, SIZE, **ours)
        for tools in all_tools():
            assert facts(tools, path) == facts(tools, reference)
            found = tools.check(path)
            assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
            assert tools.content(path) == before
        if "preallocation" in ours:
            # What was allocated in advance must not be more than QEMU's, nor less.
            sizes = [image.stat().st_size for image in (path, reference)]
            assert abs(sizes[0] - sizes[1]) <= 4 * 64 * KIB
        newest_tools().io(path, "write -q -P 0x77 1M 100k")
        content = bytearray(before)
        content[MIB : MIB + 100 * KIB] = b"\x77" * 100 * KIB
        await host.add("qcow2", "disk", file={"driver": "file", "filename": str(path)})
        drive = Drive(host, "disk", History(Clock(), bytes(content)), random.Random(2))
        await drive.check()
        for _ in range(4):
            await drive.batch(10, ("write", "write", "write-zeroes", "flush"))
        await drive.check()
        await host.backend.blockdev_del("disk")
        for tools in all_tools():
            found = tools.check(path)
            assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
            assert tools.content(path) == drive.history.content

    with_host(test)


def test_with_a_data_file(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    data.touch()

    async def test(host: Host) -> None:
        await host.add("file", "data", filename=str(data))
        await create(host, path, 4 * MIB, **{"data-file": "data", "data-file-raw": True})
        await host.backend.blockdev_del("data")
        info = newest_tools().info(path)["format-specific"]["data"]
        assert info["data-file-raw"] is True
        assert Path(info["data-file"]).name == "disk.data"
        newest_tools().io(path, "write -q -P 0x33 1M 64k")
        assert data.read_bytes()[MIB : MIB + 64 * KIB] == b"\x33" * 64 * KIB
        found = newest_tools().check(path)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text

    with_host(test)


def test_a_raw_data_file_is_the_disk_whatever_is_in_it(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    content = random.Random(3).randbytes(MIB) + bytes(3 * MIB)
    data.write_bytes(content[:MIB])

    async def test(host: Host) -> None:
        await host.add("file", "data", filename=str(data))
        await create(host, path, 4 * MIB, **{"data-file": "data", "data-file-raw": True})
        await host.backend.blockdev_del("data")
        found = newest_tools().check(path)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
        assert newest_tools().content(path) == content
        await host.add("qcow2", "disk", file={"driver": "file", "filename": str(path)})
        await host.write("disk", 512, b"\x33" * 512)
        after = content[:512] + b"\x33" * 512 + content[1024:]
        assert await host.read("disk", 0, 4 * MIB) == after
        await host.backend.blockdev_del("disk")
        assert data.read_bytes() == newest_tools().content(path) == after

    with_host(test)


@pytest.mark.parametrize("size", [0, 512, 1 << 40])
def test_sizes(tmp_path: Path, size: int) -> None:
    async def test(host: Host) -> None:
        path = tmp_path / "disk.qcow2"
        await create(host, path, size)
        for tools in all_tools():
            assert tools.info(path)["virtual-size"] == size
            found = tools.check(path)
            assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text

    with_host(test)
