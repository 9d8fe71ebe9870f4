# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 and power cuts: what was flushed is there, and no image is corrupt.

Each scenario is recorded once and cut at many moments, with many choices of what had reached the
disk; see tests/crash. VHOSTBLK_CRASH_SEED=n repeats a failure, or looks for another.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from crash import Drive, Stage, newest_tools

KIB = 1 << 10
MIB = 1 << 20
SIZE = 2 * MIB


def stage(
    directory: Path,
    create: dict[str, Any] | None = None,
    *,
    size: int = SIZE,
    filled: bool = False,
    backing: bool = False,
    **options: Any,
) -> Stage:
    """An image with 4 KiB clusters unless told otherwise."""
    tools = newest_tools()
    create = {"cluster_size": 4 * KIB, **(create or {})}
    companions: tuple[Path, ...] = ()
    if backing:
        below = directory / "below.raw"
        # Its end is inside a cluster, and before that of the overlay.
        below.write_bytes(random.Random(5).randbytes(size - 64 * KIB - 1536))
        companions = (below,)
        create |= {"backing": below.name, "backing_format": "raw"}
    path = tools.create(directory / "disk.qcow2", size, **create)
    if filled:
        tools.io(path, f"write -q -P 0x5a 0 {size}")
    made = Stage(path, int(create["cluster_size"]), options=options, companions=companions)
    if "data_file" in create:
        made.data_file = directory / create["data_file"]
    if create.get("compat") == "0.10" and backing:
        shows = companions[0].read_bytes()
        made.discards_show = shows + bytes(size - len(shows))
    return made


async def fill_and_flush(drive: Drive) -> None:
    """Fresh clusters, now and then a flush."""
    for _ in range(8):
        await drive.batch(8, ("write",))
        await drive.flush()


async def mixed(drive: Drive) -> None:
    """All kinds of requests, in flight together."""
    for _ in range(14):
        await drive.batch(12)


async def reuse(drive: Drive) -> None:
    """What is discarded is allocated again soon, for other places."""
    size = drive.size
    for turn in range(10):
        await drive.batch(10, ("discard", "discard", "write", "write"), 8 * drive.cluster)
        if turn % 3 == 2:
            await drive.flush()
        await drive.batch(6, ("write",), 8 * drive.cluster)
        if turn % 4 == 3:
            await drive.discard(0, size // 2 // drive.cluster * drive.cluster)


async def zeroes(drive: Drive) -> None:
    for _ in range(12):
        await drive.batch(8, ("write-zeroes", "write-zeroes", "write", "flush"))


async def overwrite(drive: Drive) -> None:
    """The same few clusters again and again."""
    for turn in range(12):
        for _ in range(5):
            at = drive.rnd.randrange(0, 16) * 512
            await drive.write(at * 8 + drive.rnd.randrange(0, 8) * 512, drive.rnd.randbytes(1024))
        if turn % 2:
            await drive.flush()


async def durable_writes(drive: Drive) -> None:
    """FUA instead of flushes: each is as durable as if it had been followed by one."""
    for _ in range(25):
        at = drive.rnd.randrange(0, drive.size // 512 - 16) * 512
        data = drive.rnd.randbytes(512 * drive.rnd.randint(1, 16))
        await drive.write(at, data, fua=drive.rnd.random() < 0.7)


async def sequential(drive: Drive) -> None:
    """From the beginning to the end: many refcount blocks, and tables of them, are needed."""
    step = drive.size // 24 // 512 * 512
    for turn in range(24):
        await drive.write(turn * step, drive.rnd.randbytes(step))
        if turn % 3 == 2:
            await drive.flush()


async def large_holes(drive: Drive) -> None:
    """Room for whole runs becomes free, and what is written there next does not fill its clusters.

    Nothing of what was there before may show around it.
    """
    half = drive.size // 2
    for start in (0, half):
        await drive.discard(start, half)
        await drive.flush()
        for _ in range(3):
            await asyncio.sleep(0.02)  # for what is freed after a flush
            for _ in range(12):
                at = drive.rnd.randrange(drive.size // 512 - 4) * 512
                await drive.write(at, drive.rnd.randbytes(512 * drive.rnd.randint(1, 4)))
            await drive.flush()
        await drive.check()


async def moving_on(drive: Drive) -> None:
    """One area after the other: tables for the next one come to be where data were."""
    step = drive.size // 32
    for turn in range(32):
        for _ in range(3):
            at = turn * step + drive.rnd.randrange(step // 512 - 8) * 512
            await drive.write(at, drive.rnd.randbytes(4096))
        if turn:
            await drive.discard((turn - 1) * step, step)
        if turn % 2:
            await drive.flush()
            await asyncio.sleep(0.005)


async def resizing(drive: Drive) -> None:
    sizes = [SIZE + MIB, SIZE // 2 + 512, SIZE, 3 * SIZE, SIZE - 4096 * 3 - 512]
    for size in sizes:
        await drive.batch(8, ("write", "write", "discard"))
        await drive.resize(size)
        await drive.batch(8, ("write",))
        await drive.flush()


SCENARIOS = {
    "allocation": (fill_and_flush, {}, {}),
    "mixed": (mixed, {}, {}),
    "overwrite": (overwrite, {}, {"filled": True}),
    "overwrite-fresh": (overwrite, {}, {}),
    "fua": (durable_writes, {}, {}),
    "reuse": (reuse, {"cluster_size": 2048}, {"size": 512 * KIB, "discard": "unmap"}),
    "reuse-unmap": (reuse, {}, {"discard": "unmap", "filled": True}),
    "reuse-runs": (large_holes, {}, {"discard": "unmap", "filled": True, "size": 6 * MIB}),
    "reuse-for-tables": (moving_on, {"cluster_size": 512}, {"discard": "unmap"}),
    "reuse-no-unref": (reuse, {}, {"discard": "unmap", "discard_no_unref": True, "filled": True}),
    "zeroes": (zeroes, {}, {"filled": True, "discard": "unmap"}),
    "v2": (mixed, {"compat": "0.10"}, {}),
    "v2-backing": (mixed, {"compat": "0.10"}, {"backing": True}),
    "backing": (mixed, {}, {"backing": True}),
    "backing-64k": (mixed, {"cluster_size": 64 * KIB}, {"backing": True}),
    "backing-fua": (durable_writes, {"cluster_size": 16 * KIB}, {"backing": True}),
    "backing-zeroes": (zeroes, {}, {"backing": True}),
    "refcounts-512": (sequential, {"cluster_size": 512}, {}),
    "refcounts-512-wide": (
        sequential,
        {"cluster_size": 512, "refcount_bits": 64},
        {"size": 3 * MIB},
    ),
    "refcounts-512-narrow": (sequential, {"cluster_size": 512, "refcount_bits": 1}, {}),
    "refcounts-mixed": (mixed, {"cluster_size": 512, "refcount_bits": 64}, {"size": MIB}),
    "small-cache": (mixed, {"cluster_size": 512},
                    {"l2_cache_size": 2048, "l2_cache_entry_size": 512}),
    "lazy": (mixed, {"lazy_refcounts": "on"}, {}),
    "lazy-reuse": (reuse, {"lazy_refcounts": "on"}, {"size": 512 * KIB, "discard": "unmap"}),
    "extended": (mixed, {"extended_l2": "on", "cluster_size": 16 * KIB}, {}),
    "extended-backing": (mixed, {"extended_l2": "on", "cluster_size": 16 * KIB}, {"backing": True}),
    "extended-reuse": (
        reuse,
        {"extended_l2": "on", "cluster_size": 16 * KIB},
        {"discard": "unmap"},
    ),
    "data-file": (mixed, {"data_file": "disk.data"}, {}),
    "data-file-raw": (mixed, {"data_file": "disk.data", "data_file_raw": "on"}, {}),
    "data-file-reuse": (reuse, {"data_file": "disk.data"}, {"size": 512 * KIB, "discard": "unmap"}),
    "resize": (resizing, {}, {}),
    "resize-512": (resizing, {"cluster_size": 512}, {}),
    "resize-extended": (resizing, {"extended_l2": "on", "cluster_size": 16 * KIB}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_power_cuts(tmp_path: Path, name: str) -> None:
    scenario, create, options = SCENARIOS[name]
    made = stage(tmp_path, create, **options)
    assert made.play(scenario, seed=1).cuts == made.cuts


@pytest.mark.parametrize(("name", "seed"), [("refcounts-512-wide", 7), ("resize-extended", 7)])
def test_power_cuts_that_found_something(tmp_path: Path, name: str, seed: int) -> None:
    scenario, create, options = SCENARIOS[name]
    made = stage(tmp_path, create, **options)
    made.cuts = 48  # the one in question was among so many
    made.play(scenario, seed)


async def a_little_of_all(drive: Drive) -> None:
    for _ in range(5):
        await drive.batch(6)


@pytest.mark.parametrize("name", ["mixed", "backing", "extended", "data-file", "refcounts-512"])
def test_killed_at_every_write(tmp_path: Path, name: str) -> None:
    """The process ends, the host lives on: everything it has written is there."""
    _, create, options = SCENARIOS[name]
    made = stage(tmp_path, create, **options)
    made.cuts = None
    made.play(a_little_of_all, seed=2)


def test_compressed_clusters_are_replaced(tmp_path: Path) -> None:
    """Several compressed clusters share one host cluster, whose count must not go down too far."""
    made = stage(tmp_path)
    source = tmp_path / "source"
    source.write_bytes(b"ab" * 1000)
    for number in range(0, 200, 2):
        newest_tools().io(
            made.image, *(f"write -q -c -s {source} {(number + n) * 4096} 4096" for n in range(2))
        )
    made.play(mixed, seed=3)


def test_images_that_qemu_left_dirty(tmp_path: Path) -> None:
    """Lazy refcounts: QEMU is killed, the counts on disk are wrong, and opening repairs them."""
    made = stage(tmp_path, {"lazy_refcounts": "on"})
    tools = newest_tools()
    tools.run(
        tools.qemu_io, *("-c", "write -P 7 0 1M"), *("-c", "flush"), *("-c", "sigraise 9"),
        made.image, ok=(-9,),
    )  # fmt: skip
    assert tools.check(made.image).errors or tools.check(made.image).corruptions
    made.play(fill_and_flush, seed=4)
