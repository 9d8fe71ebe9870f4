# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's crypt node, with keys given as they are: requests of all shapes against a model."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest
from frontend.protocol import Type
from in_process import MIB, Host, with_host
from raw_key_driver import RawKey

from vhostblk.engine import (
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    REQ_FUA,
    Engine,
)
from vhostblk.engine.crypt import CipherSpec, new_cipher

KEY, OTHER = bytes(range(64)), bytes(range(64, 128))
SIZE = 8 * MIB


def plain(host: Host, name: str, key: bytes = KEY, sector_size: int = 512) -> bytes:
    """What is in a file, decrypted by a cipher of our own."""
    data = bytearray(Path(host.path(name)).read_bytes())
    engine = host.backend.engine
    spec = CipherSpec.parse("aes-xts-plain64")
    cipher = new_cipher(engine, spec, key, sector_size=sector_size, xts=1)
    cipher.apply(False, 0, data)
    cipher.free()
    return bytes(data)


async def disk(host: Host, size: int = SIZE, **options: Any) -> RawKey:
    """A file of noise below the node `d`."""
    Path(host.file("f", size)).write_bytes(os.urandom(size))
    await host.add("file", "f", filename=host.path("f"), discard="unmap")
    node: RawKey = await host.add("raw-key", "d", file="f", **{"key": KEY.hex(), **options})
    return node


async def submit(host: Host, op: int, offset: int, what: bytes | int, flags: int = 0) -> bytes:
    engine: Engine = host.backend.engine
    node = host.backend.graph.node("d").effective
    if op == OP_READ:
        assert isinstance(what, int)
        buffer = bytearray(what)
        await engine.submit(node, op, offset, buffer)
        return bytes(buffer)
    if isinstance(what, bytes):
        await engine.submit(node, op, offset, what, flags=flags)
    else:
        await engine.submit(node, op, offset, None, what, flags=flags)
    return b""


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_guest_memory_is_only_read_by_writes(sector_size: int) -> None:
    """And what a guest sees of a read is the plain text, in whatever pieces its memory is."""

    async def test(host: Host) -> None:
        await disk(host, sector_size=sector_size)
        await host.export("d")
        random_ = random.Random(1)
        async with host.device() as guest:
            for _ in range(60):
                length = random_.choice([512, 4096, 4608, 65536, 131072]) // 512
                sector = random_.randrange(SIZE // 512 - length)
                length *= 512
                data = random_.randbytes(length)
                cuts: list[int] = []
                while sum(cuts) < length - 1 and len(cuts) < 20:
                    # Pieces that end inside of sectors are what some guests send.
                    rest = length - sum(cuts) - 1
                    cuts.append(random_.choice([1, 15, 511, 512, 513, 4096, 5000]) % rest + 1)
                request = await guest.submit(
                    Type.OUT, sector, data, out_split=[16, *cuts], in_split=[]
                )
                await guest.wait(request)
                assert request.status == 0
                memory = guest.device.memory
                assert memory.read(request.out + 16, length) == data
                read = await guest.submit(Type.IN, sector, length=length, in_split=cuts)
                await guest.wait(read)
                assert read.status == 0 and read.data == data
                expected = plain(host, "f", sector_size=sector_size)
                assert expected[sector * 512 : sector * 512 + length] == data

    with_host(test, RawKey)


@pytest.mark.parametrize("boundary", [None, 3 * MIB, 4 * MIB + 8192])
@pytest.mark.parametrize("sector_size", [512, 1024, 4096])
def test_random_requests_against_a_model(sector_size: int, boundary: int | None) -> None:
    """Many at once where they do not overlap; with large sectors, many that write parts of them."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    random_ = random.Random(seed)

    async def test(host: Host) -> None:
        keys: dict[str, Any] = {"sector_size": sector_size}
        if boundary is not None:
            keys |= {"high_key": OTHER.hex(), "boundary": boundary}
        await disk(host, **keys)
        model = bytearray(await submit(host, OP_READ, 0, SIZE))

        async def one(begin: int, end: int) -> None:
            """Some requests in a part of the disk that is nobody else's."""
            for _ in range(6):
                offset = random_.randrange(begin, end, 512)
                length = min(random_.choice([1, 1, 2, 8, 9, 128, 3000]) * 512, end - offset)
                op = random_.choice([OP_READ, OP_READ, OP_WRITE, OP_WRITE, OP_WRITE_ZEROES])
                flags = random_.choice([0, 0, REQ_FUA])
                if op == OP_READ:
                    data = await submit(host, OP_READ, offset, length)
                    assert data == model[offset : offset + length]
                elif op == OP_WRITE:
                    data = random_.randbytes(length)
                    model[offset : offset + length] = data
                    await submit(host, op, offset, data, flags)
                else:
                    model[offset : offset + length] = bytes(length)
                    await submit(host, op, offset, length, flags)

        for _ in range(4):
            cuts = sorted({0, SIZE, *(random_.randrange(0, SIZE, 512) for _ in range(30))})
            await asyncio.gather(*(one(*part) for part in itertools.pairwise(cuts)))
        assert await submit(host, OP_READ, 0, SIZE) == model
        edge = SIZE if boundary is None else boundary
        low = plain(host, "f", sector_size=sector_size)
        high = plain(host, "f", OTHER, sector_size=sector_size)
        assert low[:edge] + high[edge:] == model

    with_host(test, RawKey)


def test_neighbours_in_one_sector_do_not_lose_each_other() -> None:
    async def test(host: Host) -> None:
        await disk(host, sector_size=4096)
        for round in range(20):
            data = os.urandom(16384)
            await asyncio.gather(
                *(submit(host, OP_WRITE, at, data[at : at + 512]) for at in range(0, 16384, 512))
            )
            assert await submit(host, OP_READ, 0, 16384) == data, round
            # A write of all of it while parts are being written: one or the other, never the past.
            whole, part = os.urandom(4096), os.urandom(512)
            await asyncio.gather(
                submit(host, OP_WRITE, 512, part), submit(host, OP_WRITE, 0, whole)
            )
            now = await submit(host, OP_READ, 0, 4096)
            assert now[:512] + now[1024:] == whole[:512] + whole[1024:]
            assert now[512:1024] in (part, whole[512:1024])

    with_host(test, RawKey)


def test_zeroes_are_data_and_discards_stay_where_they_are() -> None:
    async def test(host: Host) -> None:
        await disk(host)
        before = Path(host.path("f")).read_bytes()
        await submit(host, OP_DISCARD, 0, MIB)
        assert Path(host.path("f")).read_bytes() == before
        await submit(host, OP_WRITE_ZEROES, MIB, 2 * MIB + 512)
        assert await submit(host, OP_READ, MIB, 2 * MIB + 512) == bytes(2 * MIB + 512)
        there = Path(host.path("f")).read_bytes()[MIB : 3 * MIB]
        # A file of which one cannot see where the zeroes are.
        assert len({there[at : at + 16] for at in range(0, 2 * MIB, 16)}) == 2 * MIB // 16

    with_host(test, RawKey)


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer has memory of its own")
def test_a_long_request_that_ends_inside_sectors_takes_no_memory() -> None:
    """A guest may ask for 2 GiB of zeroes: only the ends of that are Python's."""

    async def test(host: Host) -> None:
        size = 1 << 30
        await host.null("f", size=size)
        await host.add("raw-key", "d", file="f", key=KEY.hex(), sector_size=4096)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await submit(host, OP_WRITE_ZEROES, 512, size - 1024)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 << 10  # KiB

    with_host(test, RawKey)


@pytest.mark.parametrize("op", [OP_WRITE, OP_WRITE_ZEROES])
def test_the_ends_of_a_request_and_what_is_between(op: int) -> None:
    async def test(host: Host) -> None:
        await disk(host, sector_size=4096)
        model = bytearray(await submit(host, OP_READ, 0, SIZE))
        for begin, end in (
            (512, 1024), (3584, 4608), (512, 4096), (4096, 4608), (512, 8192), (4096, 8704),
            (512, 9216), (3584, 12800), (512, 2 * MIB + 512), (MIB - 512, SIZE - 512),
        ):  # fmt: skip
            data = os.urandom(end - begin) if op == OP_WRITE else bytes(end - begin)
            await submit(host, op, begin, data if op == OP_WRITE else end - begin, REQ_FUA)
            model[begin:end] = data
            assert await submit(host, OP_READ, 0, SIZE) == model, (begin, end)
        await host.export("d")
        async with host.device() as guest:  # whose memory is in pieces
            data = os.urandom(70000 // 512 * 512)
            cuts = [16, 1, 511, 5000, 4096, 20000]
            await guest.wait(await guest.submit(Type.OUT, 3, data, out_split=cuts))
            model[1536 : 1536 + len(data)] = data
        assert await submit(host, OP_READ, 0, SIZE) == model
        assert plain(host, "f", sector_size=4096) == model

    with_host(test, RawKey)


def test_discards_are_passed_on_when_the_operator_says_so() -> None:
    async def test(host: Host) -> None:
        await disk(host, discard="unmap", sector_size=4096)
        before = Path(host.path("f")).read_bytes()
        await submit(host, OP_DISCARD, 512, MIB)
        after = Path(host.path("f")).read_bytes()
        assert after[4096:MIB] == bytes(MIB - 4096)  # whole sectors only
        assert after[:4096] + after[MIB:] == before[:4096] + before[MIB:]
        await submit(host, OP_FLUSH, 0, 0)

    with_host(test, RawKey)


@pytest.mark.parametrize("op", [OP_READ, OP_WRITE, OP_WRITE_ZEROES])
def test_errors_of_the_child_are_the_guests(op: int) -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("f"))
        failing = {"operations": ["read", "write"], "errno": "ENOSPC"}
        await host.add("error-inject", "e", file="f", **failing)
        await host.add("raw-key", "d", file="e", key=KEY.hex(), sector_size=4096)
        for offset in (0, 512):  # as it is, and by way of Python
            what: bytes | int = bytes(8192) if op == OP_WRITE else 8192
            with pytest.raises(OSError) as caught:
                await submit(host, op, offset, what)
            assert caught.value.errno == errno.ENOSPC

    with_host(test, RawKey)


def test_what_is_held_waits_and_the_rest_does_not() -> None:
    async def test(host: Host) -> None:
        node = await disk(host)
        data = os.urandom(MIB)
        async with node.held(MIB, 2 * MIB):
            inside = [
                asyncio.ensure_future(submit(host, OP_WRITE, 2 * MIB - 4096, data)),
                asyncio.ensure_future(submit(host, OP_READ, MIB, 512)),
            ]
            await submit(host, OP_WRITE, 4 * MIB, data)
            assert await submit(host, OP_READ, 4 * MIB, MIB) == data
            assert await submit(host, OP_READ, 0, MIB)
            assert await submit(host, OP_READ, 3 * MIB, MIB)
            done, _ = await asyncio.wait(inside, timeout=0.1)
            assert not done
        await asyncio.gather(*inside)
        assert await submit(host, OP_READ, 2 * MIB - 4096, MIB) == data

    with_host(test, RawKey)


def test_a_boundary_that_moves_under_a_guest() -> None:
    """What re-encryption does, without its state: guests on four queues see nothing of it."""

    async def test(host: Host) -> None:
        node = await disk(host, boundary=0, key=OTHER.hex(), high_key=KEY.hex())
        await host.export("d", num_queues=4)
        model = bytearray(await submit(host, OP_READ, 0, SIZE))

        async def move() -> None:
            low, high = node.halves
            assert low is not None and high is not None
            while node.boundary < SIZE:
                begin = node.boundary
                end = min(begin + 128 * 1024, SIZE)
                async with node.held(begin, end):
                    buffer = memoryview(bytearray(end - begin))
                    await node.read_sectors(high, begin, buffer)
                    await node.write_sectors(low, begin, buffer)
                    node.boundary = end
                await asyncio.sleep(0)

        async def writes(guest: Any, queue: int) -> None:
            random_ = random.Random(queue)
            begin, end = SIZE // 4 * queue, SIZE // 4 * (queue + 1)
            while node.boundary < SIZE:
                offset = random_.randrange(begin, end - 65536, 512)
                data = random_.randbytes(random_.choice([512, 4096, 65536]))
                await guest.write(offset, data, queue)
                model[offset : offset + len(data)] = data
                at = random_.randrange(begin, end - 65536, 512)
                assert await guest.read(at, 4096, queue) == model[at : at + 4096]

        async with host.device(queues=4) as guest:
            # The device is not made for many threads: its requests take turns.
            await asyncio.gather(move(), _in_turns(guest, writes))
        assert node.boundary == SIZE
        assert await submit(host, OP_READ, 0, SIZE) == model
        assert plain(host, "f", OTHER) == model

    async def _in_turns(guest: Any, writes: Any) -> None:
        lock = asyncio.Lock()

        class Turns:
            async def write(self, *args: Any) -> None:
                async with lock:
                    await guest.write(*args)

            async def read(self, *args: Any) -> bytes:
                async with lock:
                    return bytes(await guest.read(*args))

        await asyncio.gather(*(writes(Turns(), queue) for queue in range(4)))

    with_host(test, RawKey)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_cached_reads_are_decrypted_where_they_are(sector_size: int) -> None:
    """Without a system call, in whatever pieces; a file that is cut off does no harm."""

    async def test(host: Host) -> None:
        await disk(host, sector_size=sector_size)
        expected = plain(host, "f", sector_size=sector_size)

        def mapped() -> int:
            return sum(thread.info().mapped_ios for thread in host.backend.engine.iothreads)

        async def check(offset: int, length: int) -> None:
            data = await submit(host, OP_READ, offset, length)
            assert data == expected[offset : offset + length]

        await check(0, 128 << 10)  # now they are known to be in memory
        before = mapped()
        for offset, length in ((0, 65536), (4096, 4096), (512, 1024), (3584, 60928), (0, 131072)):
            await check(offset, length)
        assert mapped() == before + 5
        encrypted = Path(host.path("f")).read_bytes()
        os.truncate(host.path("f"), 8192)
        # Whatever comes of what is not there any more, it comes in order.
        with contextlib.suppress(OSError):
            await submit(host, OP_READ, 65536, 32768)
        await check(0, 8192)
        Path(host.path("f")).write_bytes(encrypted)
        await check(0, 131072)

    with_host(test, RawKey)
