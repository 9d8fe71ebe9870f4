# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of every variant written to by our driver and judged by QEMU's tools, old and new."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crash import Clock, Drive, History, all_tools, newest_tools
from in_process import Host, with_host
from qcow2_variants import VARIANTS, Image, Variant, make

by_name = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
ROUNDS = 6


def judge(image: Image, content: bytes) -> None:
    """Every version of the tools: clean, nothing leaked, the right bytes, snapshots untouched."""
    for tools in all_tools():
        found = tools.check(image.path)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
        read = tools.content(image.path)
        if read != content:
            at = next((i for i in range(len(read)) if read[i : i + 1] != content[i : i + 1]), -1)
            raise AssertionError(f"{tools.name} reads something else from byte {at:#x} on")
        for name, old in image.snapshots.items():
            now = tools.content(image.path, "qcow2", "-l", f"snapshot.name={name}")
            assert now == old, f"{tools.name}: snapshot {name} has changed"


def below(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.glob("below*")}


async def work(host: Host, image: Image, seed: int, rounds: int = ROUNDS) -> bytes:
    """Random requests, many at once; what must be in the image now."""
    drive = Drive(
        host,
        "disk",
        History(Clock(), image.content),
        random.Random(seed),
        min(image.variant.cluster, 64 << 10),
    )
    if image.variant.compat == "0.10":
        drive.discards_show = image.backing
    for _ in range(rounds):
        await drive.batch(16)
        await drive.check()
    return bytes(drive.history.content)


@pytest.mark.parametrize("cut_short", [False, True], ids=["closed", "reopened"])
@by_name
def test_random_work(tmp_path: Path, variant: Variant, cut_short: bool) -> None:
    image = make(tmp_path, variant, newest_tools(), seed=7)
    untouched = below(tmp_path)
    content = b""

    async def test(host: Host) -> None:
        nonlocal content
        for turn in range(2 if cut_short else 1):
            file = {"driver": "file", "filename": str(image.path), "discard": "unmap"}
            await host.add("qcow2", "disk", file=file, discard="unmap")
            content = await work(host, image, seed=7 + turn)
            image.content = content
            await host.backend.blockdev_del("disk")

    with_host(test)
    judge(image, content)
    assert below(tmp_path) == untouched, "a backing file has changed"
    if variant.options.get("data_file_raw") == "on":
        assert (tmp_path / "disk.data").read_bytes()[: len(content)] == content


@by_name
def test_qemu_goes_on_with_it(tmp_path: Path, variant: Variant) -> None:
    """Ours, then QEMU's, then ours: nobody leaves anything that confuses the other."""
    tools = newest_tools()
    image = make(tmp_path, variant, tools, seed=8)

    async def test(host: Host) -> None:
        for turn in range(2):
            await host.add("qcow2", "disk", file={"driver": "file", "filename": str(image.path)})
            image.content = await work(host, image, seed=80 + turn, rounds=3)
            await host.backend.blockdev_del("disk")
            judge(image, image.content)
            tools.io(image.path, f"write -q -P {turn + 1} 1M 300k", "write -q -z 2M 10k")
            content = bytearray(image.content)
            content[1 << 20 : (1 << 20) + 307200] = bytes([turn + 1]) * 307200
            content[2 << 20 : (2 << 20) + 10240] = bytes(10240)
            image.content = bytes(content)
            judge(image, image.content)

    with_host(test)


def test_bitmaps_are_not_believed_after_our_writes(tmp_path: Path) -> None:
    """qcow2 specification, "Bitmaps extension": who does not keep them says so.

    Either the autoclear bit is cleared, and QEMU drops them, or they are marked in use; or they
    have been kept up to date, and show what has been written.
    """
    variant = next(v for v in VARIANTS if v.name == "bitmaps")
    image = make(tmp_path, variant, newest_tools(), seed=9)

    async def test(host: Host) -> None:
        await host.add("qcow2", "disk", file={"driver": "file", "filename": str(image.path)})
        image.content = await work(host, image, seed=9)

    with_host(test)
    judge(image, image.content)
    bitmaps = newest_tools().info(image.path)["format-specific"]["data"].get("bitmaps", [])
    for bitmap in bitmaps:
        assert "in-use" in bitmap["flags"], "the bitmap is stale and nothing says so"


def test_bitmaps_survive_reading(tmp_path: Path) -> None:
    variant = next(v for v in VARIANTS if v.name == "bitmaps")
    image = make(tmp_path, variant, newest_tools(), seed=9)
    before = newest_tools().info(image.path)["format-specific"]["data"]["bitmaps"]

    async def test(host: Host) -> None:
        await host.add("qcow2", "disk", file={"driver": "file", "filename": str(image.path)})
        await host.read("disk", 0, 4096)

    with_host(test)
    after = newest_tools().info(image.path)["format-specific"]["data"].get("bitmaps", [])
    assert [bitmap["name"] for bitmap in after] == [bitmap["name"] for bitmap in before]
    judge(image, image.content)
