# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest writes and verifies, on every kind of qcow2 image, while all that can be done to an
image in use is done to it: snapshots of both kinds, filters, other options, checks, maps, and,
where the guest must not be in the way, other sizes.

Afterwards QEMU says what it thinks of every image there is, and reads the same from it.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from crash import Tools
from crash.tools import all_tools
from frontend import Device, Status, Type
from frontend.device import DISCARD_SEGMENT
from in_process import Host, with_host
from qcow2_variants import VARIANTS, Image, Variant, make

SECTOR = 512
ROUNDS = 3
CACHE = 8 * 4096  # few slices: some must go while others come
WHAT = """
    internal internal forget cover filter filter unfilter reopen reopen check map info
"""
TOOLS = all_tools()

pytestmark = pytest.mark.skipif(not TOOLS, reason="qemu-img is not here")


class Writer(threading.Thread):
    """Requests, some at a time, none of which overlap; what is read is what was written."""

    def __init__(self, path: str, content: bytearray, known: bytearray, seed: int) -> None:
        super().__init__()
        self.path = path
        self.content = content
        self.known = known
        """For each sector whether its content is; it is not after a discard."""
        self.rnd = random.Random(seed)
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self.requests = 0

    def run(self) -> None:
        try:
            with Device(self.path, timeout=30) as device:
                while not self.stopping.is_set():
                    self._batch(device)
                device.flush()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.stopping.set()
        self.join()
        if self.error is not None:
            raise self.error

    def check(self, start: int, data: bytes) -> None:
        for number in range(len(data) // SECTOR):
            if self.known[start + number]:
                at, here = (start + number) * SECTOR, number * SECTOR
                want = self.content[at : at + SECTOR]
                assert data[here : here + SECTOR] == want, f"sector {start + number}"

    def _batch(self, device: Device) -> None:
        rnd, sectors = self.rnd, len(self.content) // SECTOR
        taken: list[range] = []
        running = []
        near = rnd.randrange(sectors)
        for _ in range(8):
            start = min(max(0, near + rnd.randint(-64, 64)), sectors - 1)
            where = range(start, min(sectors, start + rnd.choice((1, 2, 8, 16, 64, 200))))
            if any(max(where.start, o.start) < min(where.stop, o.stop) for o in taken):
                continue
            taken.append(where)
            kind = rnd.choices((Type.IN, Type.OUT, Type.WRITE_ZEROES, Type.DISCARD), (4, 5, 1, 1))
            running.append((kind[0], where, self._submit(device, kind[0], where)))
        if rnd.random() < 0.2:
            device.flush()
        for kind_, where, request in running:
            device.wait(request)
            assert request.status == Status.OK, (kind_, where)
            if kind_ == Type.IN:
                self.check(where.start, request.data)
            self.requests += 1

    def _submit(self, device: Device, kind: int, where: range) -> Any:
        begin, end, length = where.start * SECTOR, where.stop * SECTOR, len(where) * SECTOR
        if kind == Type.IN:
            return device.submit(kind, where.start, length=length)
        self.known[where.start : where.stop] = bytes([kind != Type.DISCARD]) * len(where)
        if kind == Type.OUT:
            data = self.rnd.randbytes(length)
            self.content[begin:end] = data
            return device.submit(kind, where.start, data)
        if kind == Type.WRITE_ZEROES:
            self.content[begin:end] = bytes(length)
        flags = self.rnd.randint(0, 1) if kind == Type.WRITE_ZEROES else 0
        segment = DISCARD_SEGMENT.pack(where.start, len(where), flags)
        return device.submit(kind, data=segment)


class Operator:
    """What is done to the image meanwhile."""

    def __init__(self, host: Host, variant: Variant, seed: int) -> None:
        self.host = host
        self.variant = variant
        self.rnd = random.Random(seed)
        self.top = "disk"
        self.names = 0
        self.filters: list[str] = []
        self.internal: list[str] = []

    def _name(self) -> str:
        self.names += 1
        return f"n{self.names}"

    @property
    def countable(self) -> bool:
        """Whether reference counts are wide enough for another snapshot, and can be had."""
        bits = self.variant.options.get("refcount_bits", 16) if self.top == "disk" else 16
        return not self.variant.has_data_file and len(self.internal) + 3 < 1 << bits

    async def act(self) -> None:
        backend = self.host.backend
        what = self.rnd.choice(WHAT.split())
        if what == "internal" and self.countable:
            name = self._name()
            await backend.internal_snapshot(self.top, "create", name)
            self.internal.append(name)
        elif what == "forget" and self.internal:
            name = self.internal.pop(self.rnd.randrange(len(self.internal)))
            await backend.internal_snapshot(self.top, "delete", name)
        elif what == "cover":
            name = self._name()
            file = self.host.path(f"{name}.qcow2")
            await backend.transaction(
                [("blockdev-snapshot-sync", {"device": "e", "snapshot-file": file,
                                             "snapshot-node-name": name})]
            )  # fmt: skip
            self.top, self.internal = name, []
        elif what == "filter":
            name = self._name()
            where = {"export-id": "e"} if self.rnd.random() < 0.5 else {"above": self.top}
            filter = {"driver": "delay", "node-name": name}
            await backend.transaction([("block-filter-insert", {"filter": filter, **where})])
            self.filters.append(name)
        elif what == "unfilter" and self.filters:
            name = self.filters.pop(self.rnd.randrange(len(self.filters)))
            await backend.transaction([("block-filter-remove", {"node-name": name})])
        elif what == "reopen":
            node = backend.graph.node(self.top)
            options = {
                "driver": "qcow2",
                "node-name": self.top,
                "discard": self.rnd.choice(["unmap", "ignore"]),
                **{role: child.node.name for role, child in node.children.items()},
            }
            options.setdefault("backing", None)
            if self.top == "disk":
                options["l2-cache-size"] = CACHE
            await backend.blockdev_reopen([options])
        elif what == "check":
            found = await backend.block_image_check("e")
            assert not found.get("corruptions") and not found.get("leaks"), found
        elif what == "map":
            await backend.block_image_map("e", 0, None, 1000)
        elif what == "info":
            backend.query_named_block_nodes(await backend.actual_sizes())


def tools_for(variant: Variant) -> Tools:
    for tools in TOOLS:
        if tools.version >= variant.needs:
            return tools
    pytest.skip(f"needs QEMU {variant.needs}")


def judge(tools: Tools, image: Image, top: str, writer: Writer) -> None:
    for path in sorted(image.path.parent.glob("*.qcow2")):
        if path.name.startswith("below"):
            continue
        check = tools.check(path)
        assert (check.corruptions, check.leaks, check.errors) == (0, 0, 0), (path, check.text)
    writer.check(0, tools.content(Path(top)))
    for name, was in image.snapshots.items():
        found = tools.content(image.path, "qcow2", "-l", f"snapshot.name={name}")
        assert found == was, name


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_everything_at_once(variant: Variant) -> None:
    tools = tools_for(variant)
    seed = int.from_bytes(os.urandom(3), "big")
    print(f"seed {seed}")

    async def test(host: Host) -> None:
        image = await asyncio.to_thread(make, host.directory, variant, tools, seed)
        await host.add(
            "qcow2",
            "disk",
            file={"driver": "file", "filename": str(image.path)},
            discard="unmap",
            l2_cache_size=CACHE,
        )
        await host.export("disk")
        content = bytearray(image.content)
        known = bytearray(b"\1" * (len(content) // SECTOR))
        operator = Operator(host, variant, seed)
        for number in range(ROUNDS):
            writer = Writer(host.path("e.sock"), content, known, seed + number)
            writer.start()
            try:
                for _ in range(4):
                    begun = writer.requests
                    await host.until(
                        lambda begun=begun, w=writer: w.requests > begun + 10 or not w.is_alive(),
                        seconds=20,
                    )
                    await operator.act()
            finally:
                await asyncio.to_thread(writer.end)
        top = host.backend.graph.node(operator.top).filename()
        await host.backend.block_export_del("e", "hard")
        writer.check(0, await host.read(operator.top, 0, len(content)))
        graph = host.backend.graph
        while tops := [node for node in graph.nodes.values() if not graph.parents_of(node)]:
            for node in tops:
                await host.backend.blockdev_del(node.name)
        await asyncio.to_thread(judge, tools, image, top, writer)

    with_host(test)
