# SPDX-License-Identifier: GPL-2.0-or-later
"""QED and power cuts: what was flushed is there, and opening repairs what the need-check bit marks.

See tests/crash. QED has no reference counts: with its need-check bit set, tables may point to
clusters that a crash has left without data, or twice, and a check of all tables comes first.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from crash import Drive, Stage, newest_tools

from vhostblk.nodes.qed import driver

MIB = 1 << 20
SIZE = 2 * MIB


def stage(directory: Path, *, backing: bool = False, filled: bool = False) -> Stage:
    tools = newest_tools()
    companions: tuple[Path, ...] = ()
    # QEMU refuses to open images with tables of one cluster, its own too.
    create = {"cluster_size": 4096, "table_size": 2}
    below = directory / "below.raw"
    if backing:
        below.write_bytes(random.Random(5).randbytes(SIZE - 100 * 1024 - 512))
        companions = (below,)
        image = tools.create(directory / "disk.qed", SIZE, "qed", backing=below.name, **create)
    else:
        image = tools.create(directory / "disk.qed", SIZE, "qed", **create)
    if filled:
        tools.io(image, f"write -q -P 0x5a 0 {SIZE // 2}", options=("-f", "qed"))
    return Stage(image, 4096, "qed", companions=companions)


async def fill_and_flush(drive: Drive) -> None:
    for _ in range(8):
        await drive.batch(8, ("write",))
        await drive.flush()


async def mixed(drive: Drive) -> None:
    for _ in range(14):
        await drive.batch(12, ("write", "write", "write", "write-zeroes", "flush"))


async def durable_writes(drive: Drive) -> None:
    for _ in range(25):
        at = drive.rnd.randrange(0, drive.size // 512 - 16) * 512
        data = drive.rnd.randbytes(512 * drive.rnd.randint(1, 16))
        await drive.write(at, data, fua=drive.rnd.random() < 0.7)


@pytest.mark.parametrize("below", ["alone", "backing", "filled"])
@pytest.mark.parametrize("scenario", [fill_and_flush, mixed, durable_writes])
def test_power_cuts(
    tmp_path: Path, scenario: Callable[[Drive], Awaitable[None]], below: str
) -> None:
    made = stage(tmp_path, backing=below == "backing", filled=below == "filled")
    assert made.play(scenario, seed=1).cuts == made.cuts


@pytest.mark.parametrize("below", ["alone", "backing"])
def test_power_cuts_while_the_file_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """It usually does in steps that are larger than this disk."""
    monkeypatch.setattr(driver, "_MIN_STEP", 4096)
    monkeypatch.setattr(driver, "_MAX_STEP", 8192)
    made = stage(tmp_path, backing=below == "backing")
    assert made.play(fill_and_flush, seed=3).cuts == made.cuts


def test_power_cuts_while_the_bit_comes_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that nobody changes for a while loses its need-check bit."""
    monkeypatch.setattr(driver, "_IDLE", 0.0)
    made = stage(tmp_path)
    assert made.play(durable_writes, seed=4).cuts == made.cuts
