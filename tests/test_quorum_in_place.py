# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: what all legs have in the page cache is compared and overwritten where it is."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
from frontend import Type
from in_process import MIB, Host, with_host
from raw_key_driver import RawKey

from crash import newest_tools  # isort: skip

KIB = 1024
CACHED = 128 * KIB


def mapped(host: Host) -> int:
    """How many requests to files took no system call."""
    return sum(thread.info().mapped_ios for thread in host.backend.engine.iothreads)


async def quorum(host: Host, legs: str = "abc", **options: Any) -> bytes:
    """Files as legs with the same data, the beginning of which is known to be in memory."""
    noise = os.urandom(MIB)
    for leg in legs:
        path = Path(host.file(leg))
        path.write_bytes(noise)
        await host.add("file", leg, filename=str(path))
    given = {"vote_threshold": len(legs) // 2 + 1, **options}
    await host.add("quorum", "q", children=list(legs), **given)
    assert await host.read("q", 0, CACHED) == noise[:CACHED]
    return noise


def change(host: Host, leg: str, offset: int, data: bytes) -> None:
    with open(host.path(leg), "r+b") as file:
        file.seek(offset)
        file.write(data)


PIECES = [(0, 4096), (4096, 65536), (512, 1024), (0, CACHED)]


@pytest.mark.parametrize("leg_timeout", [0, 30000])
def test_equal_data_are_compared_where_they_are(leg_timeout: int) -> None:
    async def test(host: Host) -> None:
        noise = await quorum(host, leg_timeout=leg_timeout)
        before = mapped(host)
        for offset, length in PIECES:
            assert await host.read("q", offset, length) == noise[offset : offset + length]
        assert mapped(host) == before + 3 * len(PIECES)

    with_host(test)


@pytest.mark.parametrize("leg_timeout", [0, 30000])
@pytest.mark.parametrize("liar", "abc")
def test_a_leg_that_lies_in_memory_is_outvoted(liar: str, leg_timeout: int) -> None:
    async def test(host: Host) -> None:
        noise = await quorum(host, leg_timeout=leg_timeout)
        # The last byte, so that all that is compared before it is equal.
        change(host, liar, 8191, bytes([noise[8191] ^ 1]))
        for offset, length in ((4096, 4096), (0, 65536), (0, 4096), (7680, 512)):
            assert await host.read("q", offset, length) == noise[offset : offset + length]
        await host.until(lambda: bool(host.named("QUORUM_REPORT_BAD")))
        assert {data["node-name"] for data in host.named("QUORUM_REPORT_BAD")} == {liar}

    with_host(test)


@pytest.mark.parametrize("short", "abc")
def test_a_leg_that_is_cut_off_while_it_is_mapped(short: str) -> None:
    """Its pages are gone: the signal comes while the others' pages are looked at, too."""

    async def test(host: Host) -> None:
        noise = await quorum(host)
        os.truncate(host.path(short), 4096)
        for offset, length in ((8192, 4096), (0, 65536), (0, 4096)):
            assert await host.read("q", offset, length) == noise[offset : offset + length]

    with_host(test)


@pytest.mark.parametrize("cold", "abc")
def test_only_some_legs_have_it_in_memory(cold: str) -> None:
    async def test(host: Host) -> None:
        noise = await quorum(host)
        before = mapped(host)
        # A new node for the file does not know yet what of it is in memory.
        await host.add("file", "again", filename=host.path(cold), read_only=True, locking="off")
        children = ["again" if leg == cold else leg for leg in "abc"]
        await host.add("quorum", "r", children=children, vote_threshold=2, read_only=True)
        assert await host.read("r", 0, 4096) == noise[:4096]
        assert mapped(host) == before + 2

    with_host(test)


def test_a_quorum_of_quorums_with_a_leg_in_common() -> None:
    async def test(host: Host) -> None:
        noise = await quorum(host)
        await host.add("quorum", "r", children=["b", "c"], vote_threshold=2, read_only=True)
        await host.add("quorum", "top", children=["q", "r"], vote_threshold=2, read_only=True)
        before = mapped(host)
        assert await host.read("top", 0, 65536) == noise[:65536]
        assert mapped(host) == before + 5
        change(host, "a", 1000, b"?")
        assert await host.read("top", 0, 65536) == noise[:65536]

    with_host(test)


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("at", [0, 4095, 4096, 40000, 65535])
@pytest.mark.parametrize("liar", "abc")
def test_a_leg_that_lies_below_a_cipher(liar: str, at: int, sector_size: int) -> None:
    """Which gets piece after piece of what has been found equal, until one is not."""

    async def test(host: Host) -> None:
        noise = await quorum(host)
        key = {"key": "11" * 32 + "22" * 32, "sector_size": sector_size}
        await host.add("raw-key", "disk", file="q", **key)
        plain = await host.read("disk", 0, CACHED)
        before = mapped(host)
        assert await host.read("disk", 0, 65536) == plain[:65536]
        assert mapped(host) == before + 3
        change(host, liar, at, bytes([noise[at] ^ 1]))
        await host.export("disk")
        async with host.device() as guest:
            for offset, length in ((0, 65536), (at & ~4095, 4096), (0, 512), (0, CACHED)):
                assert await guest.read(offset, length) == plain[offset : offset + length]
        await host.until(lambda: bool(host.named("QUORUM_REPORT_BAD")))
        assert {data["node-name"] for data in host.named("QUORUM_REPORT_BAD")} == {liar}

    with_host(test, RawKey)


@pytest.mark.parametrize("short", "abc")
def test_a_leg_that_is_cut_off_below_a_cipher(short: str) -> None:
    """Some pieces are decrypted already when the signal comes."""

    async def test(host: Host) -> None:
        await quorum(host)
        await host.add("raw-key", "disk", file="q", key="11" * 32 + "22" * 32)
        plain = await host.read("disk", 0, CACHED)
        os.truncate(host.path(short), 5 * 4096)
        for offset, length in ((0, 65536), (8192, 4096), (5 * 4096, 4096), (0, CACHED)):
            assert await host.read("disk", offset, length) == plain[offset : offset + length]

    with_host(test, RawKey)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_cipher_takes_pieces_wherever_a_guest_wants_them(sector_size: int) -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        key = {"key": "11" * 32 + "22" * 32, "sector_size": sector_size}
        await host.add("raw-key", "disk", file="q", **key)
        plain = await host.read("disk", 0, CACHED)
        rnd = random.Random(sector_size)
        await host.export("disk")
        async with host.device() as guest:
            for _ in range(100):
                offset = rnd.randrange(0, CACHED - 65536, 512)
                length = rnd.randrange(512, 65536, 512)
                cuts = sorted(rnd.randrange(1, length) for _ in range(rnd.randrange(6)))
                ends = [*dict.fromkeys(cuts), length]
                sizes = [end - begin for begin, end in itertools.pairwise([0, *ends])]
                before = mapped(host)
                read = await guest.submit(Type.IN, offset // 512, length=length, in_split=sizes)
                done = await guest.checked(read)
                assert done.data == plain[offset : offset + length]
                assert mapped(host) == before + 3

    with_host(test, RawKey)


def test_readers_never_see_anything_but_old_or_new() -> None:
    """Writers change all legs one after the other, under readers that compare them in place."""

    async def test(host: Host) -> None:
        await quorum(host)
        for value in range(200):
            await host.write("q", 0, bytes([value]) * 4096)
            reads = [host.read("q", 0, 4096) for _ in range(4)]
            write = host.write("q", 0, bytes([value + 1]) * 4096)
            _, *seen = await asyncio.gather(write, *reads)
            for data in seen:
                assert set(data) <= {value, value + 1}
        assert host.named("QUORUM_FAILURE") == []

    with_host(test)


def test_guests_overwrite_what_is_there(tmp_path: Path) -> None:
    """On the flagship tree, through its device; nothing else goes there than guests' writes."""
    images = [tmp_path / f"{leg}.qcow2" for leg in "abc"]
    tools, rnd = newest_tools(), random.Random(6)
    plain = bytearray(4 * MIB)

    async def test(host: Host) -> None:
        for leg, image in zip("abc", images, strict=True):
            tools.img("create", "-f", "qcow2", image, "4M")
            file = {"driver": "file", "filename": str(image)}
            await host.add("qcow2", leg, file=file)
        await host.add("quorum", "q", children=["a", "b", "c"], vote_threshold=2)
        await host.add("raw-key", "disk", file="q", key="11" * 32 + "22" * 32)
        await host.export("disk")
        async with host.device() as guest:

            async def write(offset: int, length: int) -> int:
                before = mapped(host)
                plain[offset : offset + length] = data = rnd.randbytes(length)
                await guest.write(offset, data)
                return mapped(host) - before

            for offset in range(0, 4 * MIB, CACHED):
                assert await write(offset, CACHED) == 0  # clusters, tables: by system calls
            for offset, length in PIECES:
                assert await write(MIB + offset, length) == 3
            for _ in range(200):
                length = rnd.choice((512, 4096, 65536))
                await write(rnd.randrange((4 * MIB - length) // 512) * 512, length)
            assert await guest.read(0, 4 * MIB) == plain
            await guest.flush()
            assert await write(MIB, CACHED) == 0

    with_host(test, RawKey)
    for image in images:
        tools.img("check", "-f", "qcow2", image)
    assert len({tools.content(image) for image in images}) == 1
