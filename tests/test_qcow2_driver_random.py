# SPDX-License-Identifier: GPL-2.0-or-later
"""Random requests, many at a time, on every kind of qcow2 image, against a model in memory.

Requests of one batch do not overlap but share clusters, so that copies, allocations in the
engine, and discards meet. In the end QEMU judges the image and reads the same from it.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from crash import Tools
from crash.tools import all_tools
from in_process import Host, with_host
from qcow2_variants import VARIANTS, Image, Variant, make

from vhostblk.engine import (
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    REQ_FUA,
    REQ_MAY_UNMAP,
)

SECTOR = 512
TOOLS = all_tools()

pytestmark = pytest.mark.skipif(not TOOLS, reason="qemu-img is not here")


def tools_for(variant: Variant) -> Tools:
    for tools in TOOLS:
        if tools.version >= variant.needs:
            return tools
    pytest.skip(f"needs QEMU {variant.needs}")


class Model:
    """The disk as it must be, and random requests for it."""

    def __init__(self, host: Host, image: Image, rnd: random.Random, **options: Any) -> None:
        self.host = host
        self.image = image
        self.rnd = rnd
        self.data = bytearray(image.content)
        self.options = options

    async def open(self) -> None:
        image = self.image
        self.node = await self.host.add(
            "qcow2",
            "disk",
            file={"driver": "file", "filename": str(image.path)},
            discard="unmap",
            **self.options,
        )
        assert self.node.size == len(self.data)

    async def close(self) -> None:
        await self.host.backend.blockdev_del("disk")

    async def submit(self, op: int, offset: int, data: Any = None, **more: Any) -> None:
        handle = self.node.effective
        await self.host.backend.engine.submit(handle, op, offset, data, **more)

    def requests(self, count: int) -> list[tuple[int, int, int]]:
        """Operation, offset, length: no two overlap, most are near others."""
        rnd, size = self.rnd, len(self.data) // SECTOR
        taken: list[tuple[int, int]] = []
        found = []
        near = rnd.randrange(size)
        for _ in range(count):
            if rnd.random() < 0.3:
                near = rnd.randrange(size)
            length = rnd.choice((1, 1, 2, 8, 8, 16, 64, 128, 300))
            start = min(max(0, near + rnd.randint(-64, 64)), size - 1)
            length = min(length, size - start)
            if any(start < end and begin < start + length for begin, end in taken):
                continue
            taken.append((start, start + length))
            op = rnd.choices(
                (OP_READ, OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD), weights=(40, 45, 8, 7)
            )[0]
            found.append((op, start * SECTOR, length * SECTOR))
        return found

    async def one(self, op: int, offset: int, length: int) -> None:
        rnd, data = self.rnd, self.data
        if op == OP_READ:
            buffer = bytearray(length)
            await self.submit(op, offset, buffer)
            assert buffer == data[offset : offset + length], f"{length} bytes at {offset}"
        elif op == OP_WRITE:
            new = rnd.randbytes(length)
            flags = REQ_FUA if rnd.random() < 0.1 else 0
            data[offset : offset + length] = new
            await self.submit(op, offset, new, flags=flags)
        elif op == OP_WRITE_ZEROES:
            flags = rnd.choice((0, REQ_MAY_UNMAP, REQ_FUA))
            data[offset : offset + length] = bytes(length)
            await self.submit(op, offset, None, length=length, flags=flags)
        else:
            self._discard(offset, length)
            await self.submit(op, offset, None, length=length)

    def _discard(self, offset: int, length: int) -> None:
        variant, cluster = self.image.variant, self.image.variant.cluster
        if variant.compat == "0.10" and self.image.backing is not None:
            return
        end = offset + length
        first = -(-offset // cluster) * cluster
        last = end if end == len(self.data) else end // cluster * cluster
        if first < last:
            self.data[first:last] = bytes(last - first)

    async def batch(self, count: int) -> None:
        work = [self.one(*request) for request in self.requests(count)]
        if self.rnd.random() < 0.3:
            work.insert(self.rnd.randrange(len(work)), self.submit(OP_FLUSH, 0))
        await asyncio.gather(*work)

    async def compare(self) -> None:
        step = 128 << 10
        for offset in range(0, len(self.data), step):
            length = min(step, len(self.data) - offset)
            buffer = bytearray(length)
            await self.submit(OP_READ, offset, buffer)
            assert buffer == self.data[offset : offset + length], offset


def judge(tools: Tools, image: Image, content: bytes) -> None:
    """What QEMU says about the image at rest."""
    check = tools.check(image.path)
    assert (check.corruptions, check.leaks, check.errors) == (0, 0, 0), check.text
    assert tools.content(image.path) == content
    for name, was in image.snapshots.items():
        assert tools.content(image.path, "qcow2", "-l", f"snapshot.name={name}") == was, name


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_random_requests(variant: Variant) -> None:
    tools = tools_for(variant)
    seed = int.from_bytes(os.urandom(3), "big")

    async def test(host: Host) -> None:
        rnd = random.Random(seed)
        with tempfile.TemporaryDirectory(prefix="vb") as directory:
            image = await asyncio.to_thread(make, Path(directory), variant, tools, seed)
            # Few slices: some must go while others come.
            model = Model(host, image, rnd, l2_cache_size=4096 * 4)
            await model.open()
            await model.compare()
            for _ in range(12):
                await model.batch(24)
            await model.submit(OP_FLUSH, 0)
            await model.batch(24)
            await model.compare()
            await model.close()
            await asyncio.to_thread(judge, tools, image, bytes(model.data))
            await model.open()
            await model.compare()
            await model.batch(24)
            await model.close()
            await asyncio.to_thread(judge, tools, image, bytes(model.data))

    print(f"seed {seed}")
    with_host(test)
