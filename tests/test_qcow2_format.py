# SPDX-License-Identifier: GPL-2.0-or-later
"""The qcow2 format's modules on images at rest, judged by qemu-img."""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash.tools import plain_environment
from qcow2_files import ImageFile, run

from vhostblk.nodes.qcow2 import bitmaps, snapshots
from vhostblk.nodes.qcow2.check import CheckResult, check
from vhostblk.nodes.qcow2.create import Qcow2CreateOptions, create
from vhostblk.nodes.qcow2.create import check as check_options
from vhostblk.nodes.qcow2.header import BadImage, Header
from vhostblk.nodes.qcow2.refcounts import Refcounts, pack_counts, unpack_counts
from vhostblk.schema import VhostblkError

KIB, MIB = 1024, 1 << 20


def qemu_img(*arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=plain_environment(),
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    given = [part for command in commands for part in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *given, path],
        check=True,
        capture_output=True,
        env=plain_environment(),
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image.qcow2"


@pytest.fixture
def opened() -> Iterator[Any]:
    files: list[ImageFile] = []

    def open_image(path: Path, **options: Any) -> ImageFile:
        files.append(ImageFile(path, **options))
        return files[-1]

    yield open_image
    for file in files:
        file.close()


def checked(storage: ImageFile, repair: Any = "none") -> CheckResult:
    result = run(check(storage, storage.header(), repair))
    assert isinstance(result, CheckResult)
    return result


# ---- headers


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "compression_type=zstd",
        "extended_l2=on,cluster_size=64k",
        "backing_file=base.raw,backing_fmt=raw",
    ],
)
def test_headers_survive_being_parsed_and_written(image: Path, options: str, opened: Any) -> None:
    qemu_img("create", "-u", "-q", "-f", "qcow2", "-o", options, image, "64M")
    (image.parent / "base.raw").touch()
    header = Header.parse(image.read_bytes())
    info = json.loads(qemu_img("info", "--output=json", image))
    assert (header.size, header.cluster_size) == (64 * MIB, info["cluster-size"])
    data = info["format-specific"]["data"]
    assert header.refcount_bits == data.get("refcount-bits", 16)
    assert header.lazy_refcounts == data.get("lazy-refcounts", False)
    assert header.extended_l2 == data.get("extended-l2", False)
    assert header.compression == data.get("compression-type", "zlib")
    assert header.backing_file == info.get("backing-filename")
    assert header.backing_format == info.get("backing-filename-format")
    with image.open("r+b") as file:
        file.write(header.pack())
    after = json.loads(qemu_img("info", "--output=json", image))
    assert after["format-specific"] == info["format-specific"]
    assert Header.parse(image.read_bytes()) == header
    qemu_img("check", "-q", image)


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        (0, b"QFI\xfa", "not in qcow2 format"),
        (4, struct.pack(">I", 4), "Unsupported qcow2 version 4"),
        (20, struct.pack(">I", 8), "Unsupported cluster size: 2^8"),
        (20, struct.pack(">I", 22), "Unsupported cluster size: 2^22"),
        (36, struct.pack(">I", 1 << 30), "L1 table too large"),
        (36, struct.pack(">I", 0), "too small"),
        (40, struct.pack(">Q", 12345), "Active L1 table offset invalid"),
        (48, struct.pack(">Q", 7), "Reference count table offset invalid"),
        (56, struct.pack(">I", 1 << 20), "Reference count table too large"),
        (56, struct.pack(">I", 0), "does not contain a reference count table"),
        (60, struct.pack(">I", 1 << 20), "Snapshot table too large"),
        (72, struct.pack(">Q", 1 << 40), "Unknown incompatible feature: bit 40"),
        (72, struct.pack(">Q", 1 << 3), "compression type"),
        (96, struct.pack(">I", 7), "Reference count entry width too large"),
        (100, struct.pack(">I", 96), "header length"),
        (104, b"\x09", "unknown compression type: 9"),
        (116, struct.pack(">I", 1 << 20), "too large"),
    ],
)
def test_broken_headers_are_refused_by_name(
    image: Path, offset: int, value: bytes, text: str
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    data = bytearray(image.read_bytes())
    data[offset : offset + len(value)] = value
    with pytest.raises(BadImage) as caught:
        Header.parse(bytes(data))
    assert text in caught.value.desc


def test_random_headers_never_do_anything_but_parse_or_refuse(image: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    good = image.read_bytes()[:65536]
    rng = random.Random(20)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(200)] = rng.randrange(256)
        try:
            header = Header.parse(bytes(data[: rng.choice((72, 104, 512, 65536))]))
        except BadImage:
            continue
        assert header.l1_size * 8 <= 32 * MIB
        assert header.refcount_table_clusters * header.cluster_size <= 8 * MIB


# ---- creating


def made(path: Path, opened: Any, **given: Any) -> ImageFile:
    options = Qcow2CreateOptions(driver="qcow2", file="f", **given)
    check_options(options)
    storage = opened(path, create=True)
    run(create(options, storage, None, None))
    assert isinstance(storage, ImageFile)
    return storage


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
def test_what_we_create_qemu_finds_clean(
    image: Path, opened: Any, cluster_size: int, preallocation: str
) -> None:
    for bits, size, version in itertools.product((1, 16, 64), (0, MIB + 512), ("v3", "v2")):
        if version == "v2" and bits != 16:
            continue
        storage = made(
            image,
            opened,
            size=size,
            cluster_size=cluster_size,
            refcount_bits=bits,
            preallocation=preallocation,
            version=version,
        )
        qemu_img("check", "-q", image)
        info = json.loads(qemu_img("info", "--output=json", image))
        assert (info["virtual-size"], info["cluster-size"]) == (size, cluster_size)
        result = checked(storage)
        assert (result.corruptions, result.leaks) == (0, 0)


def test_creation_options_reach_the_image(image: Path, opened: Any) -> None:
    (image.parent / "base").write_bytes(bytes(MIB))
    made(
        image,
        opened,
        size=MIB,
        backing_file="base",
        backing_fmt="raw",
        compression_type="zstd",
        lazy_refcounts=True,
        extended_l2=True,
    )
    info = json.loads(qemu_img("info", "--output=json", image))
    data = info["format-specific"]["data"]
    assert info["backing-filename"] == "base" and info["backing-filename-format"] == "raw"
    assert data["compression-type"] == "zstd"
    assert data["lazy-refcounts"] and data["extended-l2"]
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, image.parent / "base")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cluster_size": 3000}, "power of two"),
        ({"cluster_size": 256}, "between 512"),
        ({"refcount_bits": 3}, "Refcount width"),
        ({"version": "v2", "lazy_refcounts": True}, "lazy-refcounts"),
        ({"version": "v2", "refcount_bits": 8}, "refcount-bits"),
        ({"extended_l2": True, "cluster_size": 4096}, "16384"),
        ({"data_file_raw": True}, "requires data-file"),
        ({"backing_file": "a"}, "without backing format"),
        ({"backing_fmt": "raw"}, "without backing file"),
        ({"backing_file": "a", "backing_fmt": "raw", "preallocation": "full"}, "extended-l2"),
        ({"size": 1 << 45, "cluster_size": 512}, "L1 table"),
    ],
)
def test_what_cannot_be_created_is_refused(
    image: Path, opened: Any, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(VhostblkError) as caught:
        made(image, opened, **{"size": MIB, **given})
    assert text in caught.value.desc
    assert not image.exists() or image.stat().st_size == 0


# ---- reference counts


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_counts_are_packed_as_they_were(bits: int) -> None:
    data = os.urandom(4096)
    assert pack_counts(unpack_counts(data, bits), bits) == data


@pytest.mark.parametrize("bits", [1, 16, 64])
def test_the_refcount_table_grows(image: Path, opened: Any, bits: int) -> None:
    """With clusters of 512 bytes a table of one cluster describes little."""
    storage = made(image, opened, size=MIB, cluster_size=512, refcount_bits=bits)
    header = storage.header()

    async def work() -> int:
        counts = Refcounts(storage, header)
        await counts.load()
        clusters = counts.per_block * len(counts.table) + 1000
        taken = 0
        while taken < clusters:
            taken += 500
            await counts.reserve(500)
        await storage.truncate((taken + 2000) * 512 * 2)
        await counts.write_dirty()
        assert counts.table_offset != header.refcount_table_offset
        return taken

    taken = run(work())
    # Reserved and used by nobody: leaks, and nothing worse.
    report = json.loads(qemu_img("check", "--output=json", image, status=3))
    assert report["leaks"] == taken and report.get("corruptions", 0) == 0
    ours = checked(storage)
    assert (ours.leaks, ours.corruptions) == (taken, 0)
    assert checked(storage, "leaks").clean
    qemu_img("check", "-q", image)


# ---- check


def fill(image: Path, options: str = "", size: str = "8M") -> None:
    given = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *given, image, size)
    qemu_io(image, "write -P 1 0 1M", "write -P 2 3M 300k", "write -z 5M 1M", "write -P 3 7M 64k")


@pytest.mark.parametrize(
    "options", ["", "cluster_size=4k", "extended_l2=on", "refcount_bits=1", "compat=0.10"]
)
def test_check_agrees_with_qemu(image: Path, opened: Any, options: str) -> None:
    fill(image, options)
    report = json.loads(qemu_img("check", "--output=json", image))
    result = checked(opened(image))
    assert (result.corruptions, result.leaks) == (0, 0)
    assert result.total_clusters == report["total-clusters"]
    assert result.allocated_clusters == report["allocated-clusters"]
    assert result.fragmented_clusters == report.get("fragmented-clusters", 0)
    assert result.image_end_offset == report["image-end-offset"]


def test_check_counts_compressed_clusters(image: Path, opened: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(range(256)) * 4096 * 4)
    qemu_img("convert", "-c", "-O", "qcow2", raw, image)
    report = json.loads(qemu_img("check", "--output=json", image))
    result = checked(opened(image))
    assert (result.corruptions, result.leaks) == (0, 0)
    assert result.compressed_clusters == report["compressed-clusters"] > 0


def test_damage_is_found_as_qemu_finds_it_and_repaired(image: Path, opened: Any) -> None:
    """Random counts and flags are wrong; afterwards QEMU finds nothing any more."""
    rng = random.Random(7)
    for _ in range(12):
        image.unlink(missing_ok=True)
        fill(image, "cluster_size=64k")
        content = qemu_img("map", "--output=json", image)
        storage = opened(image)
        header = storage.header()

        async def damage(storage: ImageFile = storage, header: Header = header) -> None:
            block = struct.unpack(">Q", await storage.read(header.refcount_table_offset, 8))[0]
            for _ in range(rng.randrange(1, 4)):
                cluster = rng.randrange(1, 40)
                await storage.write(block + 2 * cluster, struct.pack(">H", rng.randrange(4)))
            l1 = struct.unpack(">Q", await storage.read(header.l1_table_offset, 8))[0]
            table = l1 & 0x00FF_FFFF_FFFF_FE00
            entry = table + 8 * rng.randrange(8)
            word = struct.unpack(">Q", await storage.read(entry, 8))[0]
            await storage.write(entry, struct.pack(">Q", word ^ 1 << 63))

        run(damage())
        done = subprocess.run(
            ["qemu-img", "check", "--output=json", image],
            capture_output=True,
            check=False,
            env=plain_environment(),
        )
        report = json.loads(done.stdout)
        ours = checked(storage)
        assert ours.leaks == report.get("leaks", 0)
        assert bool(ours.corruptions) == bool(report.get("corruptions", 0))
        assert checked(storage, "all").clean
        qemu_img("check", "-q", image)
        assert qemu_img("map", "--output=json", image) == content


def test_pointers_out_of_the_file_are_corruptions(image: Path, opened: Any) -> None:
    fill(image)
    storage = opened(image)
    header = storage.header()

    async def damage() -> None:
        l1 = struct.unpack(">Q", await storage.read(header.l1_table_offset, 8))[0]
        table = l1 & 0x00FF_FFFF_FFFF_FE00
        await storage.write(table, struct.pack(">Q", 1 << 63 | 1 << 50))
        await storage.write(table + 8, struct.pack(">Q", 1 << 63 | 0x12345 << 9))

    run(damage())
    result = checked(storage)
    assert result.corruptions >= 2
    assert any("beyond the end" in message for message in result.messages)
    assert any("not properly aligned" in message for message in result.messages)


# ---- internal snapshots


def test_snapshots_that_qemu_made(image: Path, opened: Any) -> None:
    fill(image)
    qemu_img("snapshot", "-c", "first", image)
    qemu_io(image, "write -P 9 0 64k")
    qemu_img("snapshot", "-c", "second", image)
    storage = opened(image)
    table = run(snapshots.read_table(storage, storage.header()))
    assert [(one.id, one.name) for one in table.snapshots] == [("1", "first"), ("2", "second")]
    assert all(one.disk_size == 8 * MIB for one in table.snapshots)
    assert checked(storage).clean


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on", "compat=0.10"])
def test_snapshots_that_we_make(image: Path, opened: Any, options: str, tmp_path: Path) -> None:
    fill(image, options)
    storage = opened(image)
    states = []
    for number in range(3):
        raw = tmp_path / f"state{number}"
        qemu_img("convert", "-O", "raw", image, raw)
        states.append(raw)
        made = run(snapshots.Editor(storage, storage.header()).create(f"s{number}"))
        assert made.id == str(number + 1)
        qemu_img("check", "-q", image)
        assert checked(storage).clean
        qemu_io(image, f"write -P {10 + number} {number}M 200k", "write -P 77 6M 64k")
        qemu_img("check", "-q", image)
    listing = qemu_img("snapshot", "-l", image)
    assert all(f"s{number}" in listing for number in range(3))
    for number, raw in enumerate(states):
        out = tmp_path / "out"
        qemu_img("convert", "-l", f"snapshot.name=s{number}", "-O", "raw", image, out)
        assert out.read_bytes() == raw.read_bytes()
    run(snapshots.Editor(storage, storage.header()).delete("s1"))
    qemu_img("check", "-q", image)
    run(snapshots.Editor(storage, storage.header()).apply("s0"))
    qemu_img("check", "-q", image)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, states[0])
    with pytest.raises(VhostblkError) as caught:
        run(snapshots.Editor(storage, storage.header()).apply("s1"))
    assert "does not exist" in caught.value.desc
    for name in ("s0", "s2"):
        run(snapshots.Editor(storage, storage.header()).delete(name))
    qemu_img("check", "-q", image)
    assert storage.header().nb_snapshots == 0


# ---- bitmaps


def test_bitmaps_are_found_and_counted(image: Path, opened: Any) -> None:
    fill(image)
    qemu_img("bitmap", "--add", "-g", "64k", image, "b0")
    qemu_img("bitmap", "--add", image, "b1")
    storage = opened(image)
    found = run(bitmaps.read_directory(storage, storage.header()))
    assert [(one.name, one.granularity) for one in found.bitmaps] == [("b0", 65536), ("b1", 65536)]
    assert checked(storage).clean
