# SPDX-License-Identifier: GPL-2.0-or-later
"""Two disks of one store against a model in memory, in any order of operations.

Content comes from a small set, so that blocks are shared, lose their last user, and come back; the
store is small, so that garbage is collected meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from dedup_lab import BLOCK, SEGMENT, create, open_disk, store_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import MIB, Host, with_host
from thoroughness import tries

from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_WRITE_ZEROES

SIZE = MIB // 2 + 1536  # of the last block there are three sectors
DISKS = ("disk", "other")
SECTORS = SIZE // 512
CONTENT = [random.Random(number).randbytes(BLOCK) for number in range(12)]

ranges = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 96)).map(
    lambda pair: (pair[0] * 512, min(pair[1], SECTORS - pair[0]) * 512)
)
aligned = st.tuples(st.integers(0, SIZE // BLOCK - 1), st.integers(1, 24)).map(
    lambda pair: (pair[0] * BLOCK, min(pair[1], SIZE // BLOCK - pair[0]) * BLOCK)
)
steps = st.one_of(
    st.tuples(st.just("blocks"), st.sampled_from(DISKS), aligned, st.integers(0, 1 << 30)),
    st.tuples(st.just("write"), st.sampled_from(DISKS), ranges, st.integers(0, 1 << 30)),
    st.tuples(st.just("zero"), st.sampled_from(DISKS), ranges, st.just(0)),
    st.tuples(st.just("discard"), st.sampled_from(DISKS), ranges, st.just(0)),
    st.tuples(
        st.sampled_from(["flush", "checkpoint", "collect", "reopen", "check"]),
        st.sampled_from(DISKS),
        st.just((0, 0)),
        st.just(0),
    ),
)


def data_of(kind: str, length: int, seed: int) -> bytes:
    rnd = random.Random(seed)
    if kind == "blocks":
        return b"".join(rnd.choice([*CONTENT, bytes(BLOCK)]) for _ in range(length // BLOCK))
    return rnd.randbytes(length)


class Model:
    def __init__(self, host: Host, options: dict[str, Any]) -> None:
        self.host = host
        self.options = options
        self.content = {name: bytearray(SIZE) for name in DISKS}

    async def open(self) -> None:
        for name in DISKS:
            await open_disk(self.host, name, disk=name, size=SIZE, discard="unmap", **self.options)

    async def close(self) -> None:
        for name in DISKS:
            await self.host.backend.blockdev_del(name)

    async def check(self) -> None:
        for name in DISKS:
            assert await self.host.read(name, 0, SIZE) == self.content[name]
        store = store_of(self.host)
        found = await store.check(store.members[0].data, repair=False, content=True)
        assert found.sound, found.messages

    async def step(self, kind: str, name: str, where: tuple[int, int], seed: int) -> None:
        offset, length = where
        content, store = self.content[name], store_of(self.host)
        submit = self.host.backend.engine.submit
        handle = self.host.backend.graph.node(name).effective
        if kind in ("blocks", "write"):
            data = data_of(kind, length, seed)
            await self.host.write(name, offset, data)
            content[offset : offset + length] = data
        elif kind == "zero":
            await submit(handle, OP_WRITE_ZEROES, offset, None, length)
            content[offset : offset + length] = bytes(length)
        elif kind == "discard":
            await submit(handle, OP_DISCARD, offset, None, length)
            first, end = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
            end = SIZE if offset + length == SIZE else end
            if first < end:
                content[first:end] = bytes(end - first)
        elif kind == "flush":
            await submit(handle, OP_FLUSH)
        elif kind == "checkpoint":
            await store.checkpoint()
        elif kind == "collect":
            await store.collector.collect()
        elif kind == "reopen":
            await self.close()
            await self.open()
        else:
            await self.check()


@settings(max_examples=tries(40), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plan=st.lists(steps, min_size=5, max_size=40),
    compress=st.sampled_from(["off", "zstd"]),
    verify=st.sampled_from(["off", "on"]),
)
def test_two_disks(plan: list[Any], compress: str, verify: str) -> None:
    async def test(host: Host) -> None:
        await create(host, data=4 * MIB, segment_size=SEGMENT, size=SIZE)
        model = Model(host, {"compress": compress, "verify": verify})
        await model.open()
        for step in plan:
            await model.step(*step)
        await model.check()
        await model.close()
        await model.open()
        await model.check()

    with_host(test)


def test_many_at_once() -> None:
    """Requests in flight together: the same content at many places, and parts of one block."""

    async def test(host: Host) -> None:
        await create(host, data=4 * MIB, segment_size=SEGMENT, size=SIZE)
        model = Model(host, {"compress": "off"})
        await model.open()
        rnd = random.Random(1)
        for _ in range(40):
            taken: set[tuple[str, int]] = set()
            running = []
            for _ in range(24):
                name = rnd.choice(DISKS)
                first, count = rnd.randrange(SECTORS), rnd.randint(1, 40)
                count = min(count, SECTORS - first)
                if any((name, first + i) in taken for i in range(count)):
                    continue
                taken.update((name, first + i) for i in range(count))
                kind = rnd.choice(["write", "write", "zero"])
                if first % 8 == 0 and count >= 8:
                    kind, count = "blocks", count // 8 * 8
                where = (first * 512, count * 512)
                running.append(model.step(kind, name, where, rnd.randrange(1 << 30)))
            await asyncio.gather(*running)
        await model.check()

    with_host(test)
