# SPDX-License-Identifier: GPL-2.0-or-later
"""Every pair and triple of filters, in every order, above qcow2 overlays: a guest loses nothing.

For each stack a state machine makes random requests, many at once, while limits are reached, the
tree is drained, snapshots are taken below the filters, images are streamed, and filters come and
go. Requests are made to fail anywhere in the tree: below one leg of a quorum, no guest notices, and
the leg is rebuilt; elsewhere the guest is told, what it wrote is there or is not, sector by sector,
and afterwards all is as before. A model says what the disk must contain.
VHOSTBLK_STACK_EXAMPLES: how often each stack is tried, if not as often as VHOSTBLK_TEST_EXAMPLES
says; the first time is hypothesis' simplest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cor_images import some_data, tools, write_sparse
from dedup_lab import new_store, sound
from frontend import Request, Type
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from in_process import MIB, Host
from luks_headers import CHEAP1, header
from thoroughness import tries

from vhostblk.jobs.quorum import start_rebuild
from vhostblk.jobs.stream import StreamJob, start_stream
from vhostblk.nodes.driver import NodeDriver
from vhostblk.nodes.quorum.legs import LegState
from vhostblk.schema import VhostblkError
from vhostblk.snapshot.names import chain_below

T = TypeVar("T")
FILTERS = ("throttle", "luks", "quorum", "copy-on-read", "delay", "dedup")
STACKS = [stack for length in (2, 3) for stack in itertools.permutations(FILTERS, length)]
DISK = MIB
STORE = 4 * MIB  # what dedup has for a disk
SECTOR = 512
LEGS = 3
CLUSTERS = (65536, 16384, 4096)
PASSPHRASE = "the passphrase"
EXAMPLES = int(os.environ.get("VHOSTBLK_STACK_EXAMPLES", tries(2)))
STEPS = 12


class Images:
    """What all stacks begin with: an overlay on data with holes, encrypted or not, or on none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        content = some_data(DISK, seed=7)  # whole clusters of it are zeroes
        self._make("plain", content)
        self._make("luks", header(PASSPHRASE, CHEAP1) + content)
        self._make("empty", bytes(STORE))
        (directory / "header").write_bytes(header(PASSPHRASE, CHEAP1, detached=True))
        self.contents = {"plain": content, "empty": bytes(STORE)}
        self.contents["luks"] = asyncio.run(self._decrypted("luks"))
        self.contents["luks, empty"] = asyncio.run(self._decrypted("empty", header="header"))

    def _make(self, name: str, content: bytes) -> None:
        raw = self.directory / f"{name}.raw"
        write_sparse(raw, content)
        for size in CLUSTERS:  # legs of a quorum may be as unlike as they are
            path = self.directory / f"{name}.{size}.qcow2"
            options = {"backing": raw, "backing_format": "raw", "cluster_size": size}
            tools().create(path, len(content), "qcow2", **options)

    async def _decrypted(self, name: str, **header: str) -> bytes:
        """What a guest sees, read where no other filter is."""
        host = Host(self.directory, ())
        await host.backend.start()
        try:
            await host.backend.object_add({"qom-type": "secret", "id": "s", "data": PASSPHRASE})
            files = {"file": f"{name}.raw", **header}
            nodes = {
                role: {"driver": "file", "filename": host.path(file), "read-only": True}
                for role, file in files.items()
            }
            await host.add("luks", "luks", key_secret="s", read_only=True, **nodes)
            return await host.read("luks", 0, DISK)
        finally:
            await host.backend.close()

    def copy(self, name: str, to: Path) -> str:
        return str(shutil.copy(self.directory / name, to))


@pytest.fixture(scope="module")
def images_made(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("stacks"))


class Machine(RuleBasedStateMachine):
    """One disk, one guest."""

    def __init__(self, stack: tuple[str, ...], images: Images) -> None:
        super().__init__()
        self.stack = stack
        self.images = images
        self.exits = contextlib.ExitStack()
        self.runner = self.exits.enter_context(asyncio.Runner())
        self.directory = Path(self.exits.enter_context(tempfile.TemporaryDirectory(prefix="vb")))
        self.numbers = itertools.count()
        self.legs = itertools.count()
        self.snapshots = 0
        self.inserted: list[str] = []
        self.stores: list[str] = []
        self.unsure: dict[int, set[bytes]] = {}  # what sectors may be besides, after errors
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
        self.model = bytearray(self.images.contents[self.image()][:DISK])
        await self.compare()

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
        for node in await self.build(rest, count):
            made.append(await self.node(kind, file=node, **await self.options(kind, node)))
        return made

    async def options(self, kind: str, file: str) -> dict[str, Any]:
        if kind == "luks" and "dedup" in self.stack:  # nothing is there yet, no header either
            path = self.images.copy("header", self.directory / f"header{next(self.numbers)}")
            return {"key_secret": "s", "header": {"driver": "file", "filename": path}}
        if kind == "dedup":
            metadata = f"meta{next(self.numbers)}"
            await new_store(self.host, file, metadata)
            return {"metadata": self.host.path(metadata), "discard": "unmap"}
        if kind == "luks" and "quorum" in self.stack[: self.stack.index("luks")]:
            # By itself it would make noise of what is discarded, and each leg another one.
            return {"key_secret": "s", "discard": "unmap"}
        return {
            "throttle": {"throttle_group": "g"},
            "luks": {"key_secret": "s"},
            "delay": {"read_ns": 100_000, "write_ns": 300_000, "jitter_ns": 500_000},
        }.get(kind, {})

    async def node(self, driver: str, **options: Any) -> str:
        name = f"{driver}-{next(self.numbers)}"
        await self.host.add(driver, name, **options)
        if driver == "dedup":
            self.stores.append(name)
        return name

    def image(self) -> str:
        """What the disk has at the beginning."""
        kinds = [kind for kind in self.stack if kind in ("luks", "dedup")]
        if "dedup" in kinds:
            return "luks, empty" if kinds[0] == "luks" else "empty"
        return "luks" if kinds else "plain"

    async def leaf(self) -> str:
        image = self.image().split(", ")[-1]
        number = next(self.legs)
        image = f"{image}.{CLUSTERS[number % len(CLUSTERS)]}.qcow2"
        path = self.images.copy(image, self.directory / f"leg{number}.qcow2")
        file = {"driver": "file", "filename": path}
        allowed = str(self.images.directory)
        return await self.node("qcow2", file=file, discard="unmap", allow_backing_from=allowed)

    # ---- requests

    async def burst(
        self,
        seed: int,
        during: Coroutine[Any, Any, None] | None = None,
        *,
        may_fail: bool = False,
    ) -> None:
        """Requests that do not touch each other's sectors, and something else meanwhile."""
        rnd = random.Random(seed)
        cuts = sorted({0, DISK, *(rnd.randrange(0, DISK, SECTOR) for _ in range(12))})
        reads: list[tuple[int, Request]] = []
        changes: list[tuple[str, int, bytes, Request]] = []
        device = self.guest.device
        for begin, end in itertools.pairwise(cuts):
            what = rnd.choice(["read", "write", "write", "write", "zero", "discard", "none"])
            length = min(end - begin, rnd.choice([512, 4096, 64 << 10, 200 << 10]))
            if what == "read":
                reads.append((begin, device.submit(Type.IN, begin // SECTOR, length=length)))
            elif what == "write":
                data = rnd.randbytes(length)
                request = device.submit(Type.OUT, begin // SECTOR, data)
                changes.append((what, begin, data, request))
            elif what in ("zero", "discard"):
                kind = Type.WRITE_ZEROES if what == "zero" else Type.DISCARD
                flags = rnd.choice([0, 1]) if what == "zero" else 0
                segment = struct.pack("<QII", begin // SECTOR, length // SECTOR, flags)
                changes.append((what, begin, bytes(length), device.submit(kind, 0, segment)))
        requests = [request for *_, request in (*reads, *changes)]
        if rnd.random() < 0.5:
            requests.append(device.submit(Type.FLUSH))
        waiting = asyncio.create_task(self.guest.wait(*requests))
        try:
            if during is not None:
                await during
        finally:
            await waiting
            for begin, request in reads:
                if request.status == 0:
                    self.expect(begin, request.data)
            for what, begin, data, request in changes:
                self.changed(begin, data, unsure=request.status != 0 or what == "discard")
        if not may_fail:
            for request in requests:
                device.checked(request)
            await self.settle()

    def changed(self, begin: int, data: bytes, *, unsure: bool) -> None:
        """The disk has these data, or, if that is unsure, may have them."""
        for at in range(0, len(data), SECTOR):
            if unsure:
                self.unsure.setdefault(begin + at, set()).add(data[at : at + SECTOR])
            else:
                self.unsure.pop(begin + at, None)
        if not unsure:
            self.model[begin : begin + len(data)] = data

    def expect(self, begin: int, found: bytes) -> None:
        """What a read gives is what was written last, or has failed since."""
        if found == self.model[begin : begin + len(found)]:
            return
        for at in range(begin, begin + len(found), SECTOR):
            sector = found[at - begin : at - begin + SECTOR]
            good = {bytes(self.model[at : at + SECTOR])} | self.unsure.get(at, set())
            assert sector in good, (begin, len(found), at)

    async def settle(self) -> None:
        """Which sectors of what has failed were changed, and of what may be zeroes, are."""
        for begin, length in runs(self.unsure):
            found = await self.guest.read(begin, length)
            self.expect(begin, found)
            self.model[begin : begin + length] = found
        self.unsure = {}

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

    @precondition(lambda self: self.snapshots < 3 and self.broken is None)
    @rule(seed=st.integers(0, 1 << 30), below=st.booleans())
    def snapshot(self, seed: int, below: bool) -> None:
        """Of the disk, or of all images at the bottom: they are two things where dedup is."""
        template = f"{self.directory}/{{node}}.{{timestamp}}.qcow2"
        root = self.host.backend.graph.backend("e").root
        below |= "dedup" in self.stack  # which no new image can name as its backing file

        async def take() -> None:
            whose = [{"node-name": n.name} for n in images(root)] if below else [{"device": "e"}]
            given = [{**each, "snapshot-file-template": template} for each in whose]
            try:
                await self.host.backend.transaction(
                    [("blockdev-snapshot-sync", arguments) for arguments in given]
                )
            except VhostblkError as error:
                assert has_ended(error), error

        self.run(self.burst(seed, take()))
        self.snapshots += 1

    @rule(seed=st.integers(0, 1 << 30), below=st.booleans(), speed=st.sampled_from([0, MIB // 2]))
    def stream(self, seed: int, below: bool, speed: int) -> None:
        """All of the disk, or one image; whatever else happens meanwhile."""
        graph = self.host.backend.graph
        if list(self.host.backend.jobs):
            return
        device = "e"
        if below or "dedup" in self.stack:
            parents = [parent for parent, _ in self.edges(graph.backend("e").root.name)]
            overlays = [name for name in parents if graph.node(name).driver == "qcow2"]
            device = random.Random(seed).choice(overlays)

        async def begin() -> None:
            try:
                async with self.host.backend.changing():
                    await start_stream(self.host.backend, device, "stream", speed=speed)
            except VhostblkError as error:  # it has been streamed before
                assert (error.data or {}).get("code") == "no-backing", error

        self.run(self.burst(seed, begin()))

    async def end_stream(self) -> None:
        """Unless it has to wait for a leg for ever, all is there at its end."""
        for job in list(self.host.backend.jobs):
            if isinstance(job, StreamJob) and self.broken is None:
                with contextlib.suppress(VhostblkError):  # it is about to end
                    job.set_speed(0)
                await self.host.until(lambda: job not in list(self.host.backend.jobs), 30)  # noqa: B023

    @precondition(lambda self: len(self.inserted) < 2)
    @rule(seed=st.integers(0, 1 << 30), place=st.integers(0, 1000), kind=st.sampled_from(FILTERS))
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
            root = self.host.backend.graph.backend("e").root.name
            edges = self.edges(root)
            edge = (None, *edges)[place % (len(edges) + 1)]
            where = {"node-name": edge[0], "child": edge[1]} if edge else {"above": root}
            given = {**where, "filter": {"driver": kind, "node-name": name, **options}}
            try:
                await self.host.backend.transaction([("block-filter-insert", given)])
            except VhostblkError as error:
                assert has_ended(error), error
            else:
                self.inserted.append(name)

        self.run(self.burst(seed, change()))

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

    # ---- faults

    def edges(self, top: str) -> list[tuple[str, str]]:
        """Parents and roles below a node, as far as what all data go through."""
        found = []
        for role, child in self.host.backend.graph.node(top).children.items():
            if role == "file" or role.startswith("children."):
                found += [(top, role), *self.edges(child.node.name)]
        return found

    def is_of_stream(self, edge: tuple[str, str]) -> bool:
        """Whether the parent is the filter of a stream, which goes when that ends."""
        return edge[0].startswith("stream-")

    def quorum(self) -> Any:
        nodes = self.host.backend.graph.nodes.values()
        return next((node for node in nodes if node.driver == "quorum"), None)

    async def fail(self, rnd: random.Random, edge: tuple[str, str], count: int | None) -> None:
        """Put a filter there that makes requests fail."""
        operations = ["read", "write", "flush", "discard", "write-zeroes"]
        chosen = rnd.sample(operations, rnd.randint(1, len(operations)))
        broken: dict[str, Any] = {"driver": "error-inject", "node-name": "broken"}
        broken |= {"operations": chosen, "every": rnd.choice([1, 1, 3])}
        if count is not None:
            broken["count"] = count
        given = {"node-name": edge[0], "child": edge[1], "filter": broken}
        await self.host.backend.transaction([("block-filter-insert", given)])
        self.broken = "broken"

    async def mend(self) -> None:
        given = {"node-name": self.broken}
        await self.host.backend.transaction([("block-filter-remove", given)])
        self.broken = None

    @precondition(lambda self: self.broken is None)
    @rule(seed=st.integers(0, 1 << 30), count=st.sampled_from([None, 1, 5]))
    def requests_fail(self, seed: int, count: int | None) -> None:
        """Anywhere but below a quorum; the guest is told, and then goes on."""
        rnd = random.Random(seed)
        root = self.host.backend.graph.backend("e").root.name
        quorum = self.quorum()
        below = set() if quorum is None else set(self.edges(quorum.name))
        edges = [e for e in self.edges(root) if e not in below and not self.is_of_stream(e)]
        if not edges:
            return
        edge = rnd.choice(edges)
        note(f"{edge} fails")
        self.run(self.burst(seed, self.fail(rnd, edge, count), may_fail=True))
        self.run(self.burst(seed + 1, may_fail=True))
        self.run(self.mend())
        self.run(self.settle())
        self.run(self.burst(seed + 2))

    @precondition(lambda self: "quorum" in self.stack and self.broken is None)
    @rule(seed=st.integers(0, 1 << 30), leg=st.integers(0, LEGS - 1))
    def a_leg_fails(self, seed: int, leg: int) -> None:
        """Somewhere below it; the guest does not notice."""
        rnd = random.Random(seed)
        quorum = self.quorum()
        role = f"children.{leg}"
        edges = [(quorum.name, role), *self.edges(quorum.children[role].node.name)]
        edge = rnd.choice([edge for edge in edges if not self.is_of_stream(edge)])
        note(f"{edge} fails")
        self.run(self.burst(seed, self.fail(rnd, edge, None)))
        self.run(self.compare())

    @precondition(lambda self: self.broken is not None)
    @rule(seed=st.integers(0, 1 << 30))
    def a_leg_is_mended(self, seed: int) -> None:
        async def heal() -> None:
            await self.mend()
            quorum = self.quorum()
            for leg in quorum.legs:
                if leg.state is LegState.FAILED:
                    async with self.host.backend.changing():
                        start_rebuild(self.host.backend, quorum, leg)
            await self.host.until(
                lambda: all(leg.state is LegState.IN_SYNC for leg in quorum.legs), seconds=30
            )

        self.run(self.burst(seed, heal()))
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
            await self.end_stream()
            await self.compare()
            for name in self.stores:
                if self.broken is None:
                    await sound(self.host, name)
        finally:
            await self.context.__aexit__(None, None, None)
            await self.host.backend.close()
        for path in sorted(self.directory.glob("*.qcow2")):
            found = tools().check(path)
            assert (found.corruptions, found.errors) == (0, 0), found.text


def runs(sectors: Iterable[int]) -> list[tuple[int, int]]:
    """Where sectors are that follow one another, and how many bytes."""
    found: list[tuple[int, int]] = []
    for at in sorted(sectors):
        if not found or sum(found[-1]) != at:
            found.append((at, 0))
        begin, length = found[-1]
        found[-1] = (begin, length + SECTOR)
    return found


def has_ended(error: VhostblkError) -> bool:
    """Whether something was asked of a node that has gone with a stream.

    That is its filter, or what nobody but the engine has named: a part of what was below.
    """
    data = error.data or {}
    return data.get("code") == "no-such-node" and data["node"].startswith(("stream-", "#block"))


def images(node: NodeDriver) -> list[NodeDriver]:
    """The overlays at the bottom of a tree."""
    last = chain_below(node)[-1]
    if last.driver == "file":
        return [node]
    below = (role for role in last.children if role == "file" or role.startswith("children."))
    return [image for role in below for image in images(last.children[role].node)]


@pytest.mark.parametrize("stack", STACKS, ids="-".join)
def test_stack(
    stack: tuple[str, ...], images_made: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vhostblk.dedup.collection.UNMOVABLE_INTERVAL", 0.0
    )  # it works again at once
    run_state_machine_as_test(
        functools.partial(Machine, stack, images_made),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a shorter example takes minutes
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
