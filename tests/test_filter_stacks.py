# SPDX-License-Identifier: GPL-2.0-or-later
"""Every pair and triple of filters, in every order, above qcow2 overlays: a guest loses nothing.

For each stack a state machine makes random requests, many at once, while limits are reached, the
tree is drained, snapshots are taken below the filters, filters come and go, and a leg of a quorum
fails; a model says what the disk must contain. VHOSTBLK_STACK_EXAMPLES: how often each is tried.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cor_images import tools
from frontend import Request, Type
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from in_process import MIB, Host
from luks_headers import CHEAP1, Memory

from vhostblk import luks

T = TypeVar("T")
FILTERS = ("throttle", "luks", "quorum", "copy-on-read", "delay")
STACKS = [stack for length in (2, 3) for stack in itertools.permutations(FILTERS, length)]
DISK = MIB
LEGS = 3
PASSPHRASE = "the passphrase"
EXAMPLES = int(os.environ.get("VHOSTBLK_STACK_EXAMPLES", "2"))
STEPS = 12


class Images:
    """What all stacks begin with: an overlay on a file with data, encrypted or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._plain, self._encrypted = (self._make(name) for name in ("plain", "luks"))

    def _make(self, name: str) -> Path:
        raw = self.directory / f"{name}.raw"
        content = random.Random(1).randbytes(DISK)
        if name == "luks":
            memory = Memory()
            options = luks.CreateOptions(**CHEAP1)
            volume = asyncio.run(luks.create(memory, PASSPHRASE.encode(), options))
            content = bytes(memory.content).ljust(volume.segment.offset, b"\0") + content
        raw.write_bytes(content)
        path = self.directory / f"{name}.qcow2"
        tools().create(path, len(content), "qcow2", backing=raw, backing_format="raw")
        return path

    def copy(self, to: Path, *, encrypted: bool) -> Path:
        return Path(shutil.copy(self._encrypted if encrypted else self._plain, to))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("stacks"))


class Machine(RuleBasedStateMachine):
    """One disk, one guest."""

    stack: tuple[str, ...]
    images: Images

    def __init__(self) -> None:
        super().__init__()
        self.exits = contextlib.ExitStack()
        self.runner = self.exits.enter_context(asyncio.Runner())
        self.directory = Path(self.exits.enter_context(tempfile.TemporaryDirectory(prefix="vb")))
        self.numbers = itertools.count()
        self.legs = itertools.count()
        self.snapshots = 0
        self.inserted: list[str] = []
        self.broken: str | None = None
        try:
            self.run(self.begin())
        except BaseException:
            self.exits.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await work

        return self.runner.run(bounded())

    # ---- the tree

    async def begin(self) -> None:
        self.host = Host(self.directory, ())
        await self.host.backend.start()
        objects = self.host.backend.objects
        await objects.add({"qom-type": "secret", "id": "s", "data": PASSPHRASE})
        limits = {"iops-total": 20000, "iops-total-max": 20000}
        await objects.add({"qom-type": "throttle-group", "id": "g", "limits": limits})
        [root] = await self.build(list(self.stack), 1)
        await self.host.export(root, "e")
        self.context = self.host.device("e", queue_size=256)
        self.guest = await self.context.__aenter__()
        self.model = bytearray(await self.guest.read(0, DISK))

    async def build(self, stack: list[str], count: int) -> list[str]:
        """`count` of what `stack` says, from the top down; the names of the topmost nodes."""
        if not stack:
            return [await self.leaf() for _ in range(count)]
        kind, *rest = stack
        made = []
        if kind == "quorum":
            below = await self.build(rest, count * LEGS)
            for number in range(count):
                legs = below[number * LEGS : (number + 1) * LEGS]
                made.append(await self.node(kind, children=legs, vote_threshold=2))
            return made
        given: dict[str, Any] = {
            "throttle": {"throttle_group": "g"},
            "luks": {"key_secret": "s"},
            "delay": {"read_ns": 100_000, "write_ns": 300_000, "jitter_ns": 500_000},
        }.get(kind, {})
        for node in await self.build(rest, count):
            made.append(await self.node(kind, file=node, **given))
        return made

    async def node(self, driver: str, **options: Any) -> str:
        name = f"{driver}-{next(self.numbers)}"
        await self.host.add(driver, name, **options)
        return name

    async def leaf(self) -> str:
        path = self.directory / f"leg{next(self.legs)}.qcow2"
        self.images.copy(path, encrypted="luks" in self.stack)
        file = {"driver": "file", "filename": str(path)}
        allowed = str(self.images.directory)
        return await self.node("qcow2", file=file, discard="unmap", allow_backing_from=allowed)

    # ---- requests

    async def burst(self, seed: int, during: Coroutine[Any, Any, None] | None = None) -> None:
        """Requests that do not touch each other's sectors, and something else meanwhile."""
        rnd = random.Random(seed)
        cuts = sorted({0, DISK, *(rnd.randrange(0, DISK, 512) for _ in range(12))})
        device = self.guest.device
        reads: list[tuple[int, int, Request]] = []
        requests: list[Request] = []
        for begin, end in itertools.pairwise(cuts):
            what = rnd.choice(["read", "write", "write", "write", "zero", "discard", "none"])
            length = min(end - begin, rnd.choice([512, 4096, 64 << 10, 200 << 10]))
            if what == "read":
                request = device.submit(Type.IN, begin // 512, length=length)
                reads.append((begin, length, request))
            elif what == "write":
                data = rnd.randbytes(length)
                self.model[begin : begin + length] = data
                request = device.submit(Type.OUT, begin // 512, data)
            elif what == "zero":
                self.model[begin : begin + length] = bytes(length)
                flags = rnd.choice([0, 1])
                segment = (begin // 512).to_bytes(8, "little") + (length // 512).to_bytes(
                    4, "little"
                )
                request = device.submit(Type.WRITE_ZEROES, 0, segment + flags.to_bytes(4, "little"))
            else:
                continue
            requests.append(request)
        if rnd.random() < 0.5:
            requests.append(device.submit(Type.FLUSH))
        waiting = asyncio.create_task(self.guest.wait(*requests))
        try:
            if during is not None:
                await during
        finally:
            await waiting
        for request in requests:
            device.checked(request)
        for begin, length, request in reads:
            assert request.data == self.model[begin : begin + length], (begin, length)

    async def compare(self) -> None:
        assert await self.guest.read(0, DISK) == self.model

    @rule(seed=st.integers(0, 1 << 30))
    def requests(self, seed: int) -> None:
        self.run(self.burst(seed))

    @rule()
    def read_all(self) -> None:
        self.run(self.compare())

    # ---- and meanwhile

    @rule(seed=st.integers(0, 1 << 30))
    def drain(self, seed: int) -> None:
        async def drained() -> None:
            graph = self.host.backend.graph
            async with graph.lock, graph.drained([graph.backend("e").root]):
                await asyncio.sleep(0.002)

        self.run(self.burst(seed, drained()))

    @precondition(lambda self: self.snapshots < 3)
    @rule(seed=st.integers(0, 1 << 30))
    def snapshot(self, seed: int) -> None:
        async def take() -> None:
            await self.host.backend.transaction([("blockdev-snapshot-sync", {"device": "e"})])

        self.run(self.burst(seed, take()))
        self.snapshots += 1

    @precondition(lambda self: len(self.inserted) < 2)
    @rule(seed=st.integers(0, 1 << 30), place=st.integers(0, 100), kind=st.sampled_from(FILTERS))
    def insert(self, seed: int, place: int, kind: str) -> None:
        options = {
            "throttle": {"throttle-group": "g"},
            "copy-on-read": {},
            "delay": {"write-ns": 200_000},
        }.get(kind)
        if options is None:
            return
        name = f"inserted-{next(self.numbers)}"

        async def change() -> None:
            nodes = self.host.backend.graph.backend("e").filters
            above = nodes[place % len(nodes)].name
            filter = {"driver": kind, "node-name": name, **options}
            given = {"above": above, "filter": filter}
            await self.host.backend.transaction([("block-filter-insert", given)])

        self.run(self.burst(seed, change()))
        self.inserted.append(name)

    @precondition(lambda self: self.inserted)
    @rule(seed=st.integers(0, 1 << 30))
    def remove(self, seed: int) -> None:
        async def change() -> None:
            given = {"node-name": self.inserted.pop()}
            await self.host.backend.transaction([("block-filter-remove", given)])

        self.run(self.burst(seed, change()))

    @rule(seed=st.integers(0, 1 << 30), iops=st.sampled_from([0, 3000, 20000]))
    def limit(self, seed: int, iops: int) -> None:
        async def change() -> None:
            value = {"iops-total": iops, "iops-total-max": iops}
            await self.host.backend.objects.qom_set("/objects/g", "limits", value)

        self.run(self.burst(seed, change()))

    @precondition(lambda self: "quorum" in self.stack and self.broken is None)
    @rule(seed=st.integers(0, 1 << 30), leg=st.integers(0, LEGS - 1))
    def break_a_leg(self, seed: int, leg: int) -> None:
        """It fails for good, and the guest does not notice."""

        async def change() -> None:
            graph = self.host.backend.graph
            quorum = next(n for n in graph.nodes.values() if n.driver == "quorum")
            broken = {"driver": "error-inject", "node-name": "broken"}
            broken |= {"operations": ["read", "write", "write-zeroes"]}
            given = {"node-name": quorum.name, "child": f"children.{leg}", "filter": broken}
            await self.host.backend.transaction([("block-filter-insert", given)])

        self.broken = "broken"
        self.run(self.burst(seed, change()))
        self.run(self.compare())

    # ---- the end

    def teardown(self) -> None:
        try:
            if not self.exits:
                return
            self.run(self.end())
        finally:
            self.exits.close()

    async def end(self) -> None:
        try:
            await self.compare()
        finally:
            await self.context.__aexit__(None, None, None)
            await self.host.backend.close()
        for path in sorted(self.directory.glob("*.qcow2")):
            found = tools().check(path)
            assert (found.corruptions, found.errors) == (0, 0), found.text


@pytest.mark.parametrize("stack", STACKS, ids="-".join)
def test_stack(stack: tuple[str, ...], images: Images) -> None:
    kind = type("Machine", (Machine,), {"stack": stack, "images": images})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a shorter example takes minutes
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
