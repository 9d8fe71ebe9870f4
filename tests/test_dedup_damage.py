# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup: a damaged database never shows wrong data, and is no trouble for other disks.

tests/test_tree.py damages every page of the file that it is in; here are stores with disks.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from dedup_lab import BLOCK, create, database, files, new_store, open_disk, rebuilt, sound
from in_process import MIB, Host, refused, with_host

from vhostblk.control.events import EVENTS
from vhostblk.dedup.tables import FILE
from vhostblk.engine.tree import PAGE
from vhostblk.schema import VhostblkError

SIZE = 4 * MIB
PIECE = 16 * BLOCK


async def fill(host: Host) -> bytes:
    """A store `meta` with a history, that is closed; what its disk shows."""
    await create(host, size=SIZE, data=16 * MIB)
    node = await open_disk(host)
    rnd, content = random.Random(1), bytearray(SIZE)
    for _ in range(6):
        for at in rnd.sample(range(0, SIZE, PIECE), 40):
            content[at : at + PIECE] = rnd.randbytes(PIECE)
            await host.write("disk", at, content[at : at + PIECE])
        await node.store.checkpoint()
    await host.backend.blockdev_del("disk")
    return bytes(content)


async def bystanders(host: Host) -> bytes:
    """Another disk, and another store."""
    data = random.Random(2).randbytes(MIB)
    host.file("plain.raw", MIB)
    await host.add("file", "plain", filename=host.path("plain.raw"))
    host.file("data2.raw", 8 * MIB)
    await host.add("file", "data2", filename=host.path("data2.raw"))
    await new_store(host, "data2", "meta2")
    await open_disk(host, "other", file="data2", metadata=host.path("meta2"))
    for name in ("plain", "other"):
        await host.write(name, 0, data)
    return data


async def read_what_there_is(host: Host, content: bytes) -> int:
    """All that can be read is right; how many pieces cannot."""
    bad = 0
    for at in range(0, SIZE, PIECE):
        try:
            assert await host.read("disk", at, PIECE) == content[at : at + PIECE]
        except OSError as error:
            assert error.errno == 5
            bad += 1
    return bad


async def write_what_can_be(
    host: Host, content: bytes, rnd: random.Random
) -> tuple[bytes, dict[int, bytes]]:
    """Writes succeed or fail, and are as they say: what there is now, and what has failed."""
    new, failed = bytearray(content), {}
    for at in rnd.sample(range(0, SIZE, PIECE), 10):
        data = rnd.randbytes(PIECE)
        try:
            await host.write("disk", at, data)
        except OSError:
            failed[at] = data
        else:
            new[at : at + PIECE] = data
    return bytes(new), failed


@pytest.mark.parametrize("kind", ["zeroes", "flip"])
def test_a_damaged_page_is_an_error_and_nothing_else(kind: str) -> None:
    """Each page of the database of a store, with other disks beside it."""

    async def test(host: Host) -> None:
        content, others = await fill(host), await bystanders(host)
        meta, data = Path(host.path("meta")), Path(host.path("data.raw"))
        whole, blocks = files(meta), data.read_bytes()
        rnd = random.Random(kind)
        outcomes = []
        for page in range(0, len(whole[FILE]) // PAGE, 1 if kind == "zeroes" else 3):
            restore(meta, whole, data, blocks)
            with open(meta / FILE, "r+b") as file:
                at = page * PAGE + (rnd.randrange(PAGE) if kind == "flip" else 0)
                old = whole[FILE][at]
                os.pwrite(file.fileno(), bytes(PAGE) if kind == "zeroes" else bytes([old ^ 16]), at)
            outcomes.append(await one_damage(host, content, rnd, rebuild=len(outcomes) % 4 == 0))
            for name in ("plain", "other"):
                assert await host.read(name, 0, MIB) == others
        assert {"sound", "refused", "damaged"} == set(outcomes), outcomes

    with_host(test)


def restore(meta: Path, whole: dict[str, bytes], data: Path, blocks: bytes) -> None:
    shutil.rmtree(meta)
    meta.mkdir()
    for name, content in whole.items():
        (meta / name).write_bytes(content)
    data.write_bytes(blocks)


async def one_damage(host: Host, content: bytes, rnd: random.Random, *, rebuild: bool) -> str:
    told = len(host.named("DEDUP_DAMAGED"))
    try:
        node = await open_disk(host)
    except VhostblkError as error:
        assert "damaged" in error.desc and "dedup-rebuild" in error.desc
        return "refused"
    bad = await read_what_there_is(host, content)
    new, failed = await write_what_can_be(host, content, rnd)
    await read_what_there_is(host, new)
    try:
        await node.store.checkpoint()
    except OSError:
        bad += 1
    await read_what_there_is(host, new)
    await host.until(lambda: len(host.named("DEDUP_DAMAGED")) > told or not bad)
    for event in host.named("DEDUP_DAMAGED")[told:]:
        assert EVENTS["DEDUP_DAMAGED"].model_validate(event)
        assert "page" in event["reason"]
    await host.backend.blockdev_del("disk")
    if bad and rebuild:
        await compare_rebuilt(host, new, failed)
    return "damaged" if bad else "sound"


async def compare_rebuilt(host: Host, content: bytes, failed: dict[int, bytes]) -> None:
    """Metadata that are made anew have what was complete, and perhaps writes that failed."""
    anew = Path(host.path("anew"))
    shutil.rmtree(anew, ignore_errors=True)
    await rebuilt(Path(host.path("data.raw")), anew)
    await open_disk(host, metadata=str(anew))
    await sound(host)
    for at in range(0, SIZE, PIECE):
        there = await host.read("disk", at, PIECE)
        assert there in (content[at : at + PIECE], failed.get(at, b""))
    await host.backend.blockdev_del("disk")


def test_damage_while_the_store_is_in_use() -> None:
    """The file loses its end, or pages of it, below a store that has read none of them."""

    async def test(host: Host) -> None:
        content, others = await fill(host), await bystanders(host)
        path = Path(host.path("meta")) / FILE
        for shorter in (True, False):
            await open_disk(host)
            whole = path.read_bytes()
            spoilt = whole[: 6 * PAGE]
            path.write_bytes(spoilt if shorter else spoilt.ljust(len(whole), b"\0"))
            assert await read_what_there_is(host, content) > 0
            with refused("damaged"):
                await host.command("dedup-check", node_name="disk")
            for name in ("plain", "other"):
                assert await host.read(name, 0, MIB) == others
            path.write_bytes(whole)
            assert await read_what_there_is(host, content) == 0
            await sound(host)
            await host.backend.blockdev_del("disk")

    with_host(test)


def test_values_that_cannot_be_are_refused() -> None:
    """Right checksums do not make them right."""

    async def test(host: Host) -> None:
        await fill(host)
        path = Path(host.path("meta")) / FILE
        whole = path.read_bytes()
        for name in ("state", "ledger", "unref"):
            with database(host) as edited, edited.writing() as writer:
                writer.put_value(name, b"bad")
            with refused("damaged", "dedup-rebuild"):
                await open_disk(host)
            path.write_bytes(whole)

    with_host(test)
