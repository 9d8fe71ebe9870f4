# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests of many MiB, for which a guest needs little memory: none has a thread for itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from frontend import Device, GuestMemory, Segment, Status, Type
from frontend.protocol import DISCARD_SEGMENT, NO_STATUS, REQUEST_HEADER
from in_process import MIB, Host, with_host
from raw_key_driver import RawKey

GIB = 1024 * MIB
SIZE = 64 * GIB
PIECE = 4 * MIB
KEY = bytes(range(64)).hex()


async def null(host: Host, name: str = "d") -> None:
    await host.add("null-co", name, size=SIZE, read_zeroes=True)


async def encrypted(host: Host) -> None:
    await null(host, "below")
    await host.add("raw-key", "d", file="below", key=KEY)


async def encrypted_quorum(host: Host) -> None:
    legs = ["one", "two", "three"]
    for leg in legs:
        await null(host, leg)
    await host.add("quorum", "below", children=legs, vote_threshold=2)
    await host.add("raw-key", "d", file="below", key=KEY)


STACKS = [null, encrypted, encrypted_quorum]


class Chain:
    """A request of any size; its data are in the same piece of guest memory all over again."""

    def __init__(self, device: Device, type_: int, length: int, sector: int = 0) -> None:
        self.memory = device.memory
        self.queue = device.queues[0]
        self.status_at = self.memory.alloc(1)
        self.memory.write(self.status_at, bytes([NO_STATUS]))
        header = self.memory.alloc(16)
        self.memory.write(header, REQUEST_HEADER.pack(type_, 0, sector))
        segments = [Segment(header, 16), *self._data(type_, length)]
        self.head = self.queue.add([*segments, Segment(self.status_at, 1, True)])

    def _data(self, type_: int, length: int) -> list[Segment]:
        if type_ == Type.WRITE_ZEROES:
            at = self.memory.alloc(16)
            self.memory.write(at, DISCARD_SEGMENT.pack(0, length // 512, 0))
            return [Segment(at, 16)]
        count = min(-(-length // MIB), 900)
        each = length // count // 512 * 512
        buffer = self.memory.alloc(length - each * (count - 1))
        lengths = [each] * (count - 1) + [length - each * (count - 1)]
        return [Segment(buffer, part, type_ == Type.IN) for part in lengths]

    @property
    def status(self) -> int:
        return self.memory.read(self.status_at, 1)[0]


def answers(device: Device, *chains: Chain) -> list[int]:
    """Made available at once; the heads in the order in which they are answered."""
    queue, heads = device.queues[0], []
    queue.submit(*(chain.head for chain in chains))
    while len(heads) < len(chains):
        heads += [used.head for used in queue.wait(60)]
    return heads


def with_disk(make: Callable[[Host], Awaitable[None]], test: Callable[[Device], None]) -> None:
    async def run(host: Host) -> None:
        await make(host)
        await host.export("d")
        guest_memory = GuestMemory([(0, 64 * MIB)])
        async with host.device(queue_size=1024, memory=guest_memory) as guest:
            await asyncio.to_thread(test, guest.device)

    with_host(run, RawKey)


@pytest.mark.parametrize("make", STACKS)
@pytest.mark.parametrize("type_", [Type.IN, Type.OUT])
def test_a_small_request_is_answered_before_a_large_one(
    make: Callable[[Host], Awaitable[None]], type_: Type
) -> None:
    """Both are there at once, the large one first, and no disk has to be waited for."""

    def test(device: Device) -> None:
        large = Chain(device, type_, 4 * PIECE)
        small = Chain(device, Type.IN, 512)
        assert answers(device, large, small) == [small.head, large.head]
        assert (large.status, small.status) == (Status.OK, Status.OK)

    with_disk(make, test)


@pytest.mark.parametrize("make", [encrypted, encrypted_quorum])
def test_zeroes_are_encrypted_little_by_little(make: Callable[[Host], Awaitable[None]]) -> None:
    def test(device: Device) -> None:
        zeroes = Chain(device, Type.WRITE_ZEROES, 16 * MIB)
        small = Chain(device, Type.IN, 512)
        assert answers(device, zeroes, small) == [small.head, zeroes.head]
        assert zeroes.status == Status.OK

    with_disk(make, test)


def test_a_request_as_large_as_any_may_be() -> None:
    """2 GiB less a sector; and of more than that, as with QEMU, none is carried out."""

    def test(device: Device) -> None:
        largest = Chain(device, Type.IN, 2 * GIB - 512)
        answers(device, largest)
        assert largest.status == Status.OK
        larger = Chain(device, Type.IN, 2 * GIB)
        answers(device, larger)
        assert larger.status == Status.IOERR

    with_disk(null, test)


def cuts(random_: random.Random, length: int) -> list[int]:
    """Where buffers of a request begin and end: with their ends in the middle of sectors, too."""
    return sorted({random_.randrange(1, length) for _ in range(random_.randrange(1, 40))})


@pytest.mark.parametrize("sector_size", [None, 512, 4096])
def test_pieces_fit_together(sector_size: int | None) -> None:
    """Whatever buffers the guest's data are in."""
    random_ = random.Random(1)
    data = bytearray(random_.randbytes(32 * MIB))

    async def run(host: Host) -> None:
        host.file("f", len(data))
        Path(host.path("f")).write_bytes(data)
        options: dict[str, Any] = {"filename": host.path("f")}
        if sector_size is None:
            await host.add("file", "d", **options)
        else:
            await host.add("file", "below", **options)
            await host.add("raw-key", "d", file="below", key=KEY, sector_size=sector_size)
        await host.export("d", logical_block_size=4096)
        async with host.device(memory=GuestMemory([(0, 64 * MIB)]), queue_size=128) as guest:
            await asyncio.to_thread(story, guest.device)

    def story(device: Device) -> None:
        if sector_size is not None:
            for at in range(0, len(data), 2 * MIB):
                device.write(at, bytes(data[at : at + 2 * MIB]))
        for _ in range(12):
            length = random_.randrange(1, 3 * PIECE // 4096 + 1) * 4096
            offset = random_.randrange((len(data) - length) // 4096 + 1) * 4096
            split = cuts(random_, length)
            if random_.random() < 0.5:
                new = random_.randbytes(length)
                data[offset : offset + length] = new
                lengths = [16] + [b - a for a, b in zip([0, *split], split, strict=False)]
                request = device.submit(Type.OUT, offset // 512, new, out_split=lengths)
                device.checked(request)
            else:
                lengths = [b - a for a, b in zip([0, *split], [*split, length], strict=True)]
                request = device.submit(Type.IN, offset // 512, length=length, in_split=lengths)
                assert device.checked(request).data == data[offset : offset + length]
                assert request.used_length == length + 1

    with_host(run, RawKey)
