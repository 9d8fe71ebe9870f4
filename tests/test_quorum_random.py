# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: all that can happen to one, in any order, under a guest that notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
from typing import Any

import pytest
from in_process import MIB, Host
from quorum_legs import Faulty, quorum, run, states

from vhostblk.jobs.quorum import start_rebuild, start_scrub
from vhostblk.schema import VhostblkError


class Story:
    """One guest, and a sequence of things that happen."""

    def __init__(self, host: Host, node: Any, seed: int, options: dict[str, Any]) -> None:
        self.host = host
        self.node = node
        self.options = options
        self.random = random.Random(seed)
        self.data = bytearray(MIB)
        self.rounds = 0
        self.added = 0
        self.over = False

    async def guest(self, device: Any) -> None:
        chance = random.Random(self.random.random())
        while not self.over:
            offset = chance.randrange(MIB // 512) * 512
            length = min(MIB - offset, 512 * chance.randrange(1, 40))
            kind = chance.random()
            if kind < 0.5:
                data = chance.randbytes(length)
                await device.write(offset, data)
                self.data[offset : offset + length] = data
            elif kind < 0.55:
                await device.write_zeroes(offset, length)
                self.data[offset : offset + length] = bytes(length)
            elif kind < 0.6:
                await device.flush()
            else:
                assert await device.read(offset, length) == self.data[offset : offset + length]
            self.rounds += 1

    # ---- what happens; each leaves all legs in sync

    async def a_leg_fails(self) -> None:
        leg = self.random.choice(self.legs())
        operations = self.random.sample(("write", "flush", "read", "write-zeroes"), 2)
        Faulty.faults[leg] = dict.fromkeys(operations, errno.EIO)
        await self.more()
        Faulty.faults.pop(leg)
        await self.more(2)  # or the leg fails when it has been found healthy
        await self.heal()

    async def a_leg_hangs(self) -> None:
        leg = self.random.choice(self.legs())
        event = Faulty.hangs[leg] = asyncio.Event()
        await self.host.until(lambda: "f" in states(self.node), 30)
        await self.more()
        Faulty.hangs.pop(leg)
        event.set()
        await self.heal()

    async def a_leg_rots(self) -> None:
        leg = self.random.choice(self.legs())
        node = self.host.backend.graph.node(leg).child("file").node
        # Behind everybody's back, but not while a write is on its way to the same place.
        offset = self.random.randrange(MIB // 4096) * 4096
        async with self.node.repair.locked(offset, 4096):
            engine = self.host.backend.engine
            await engine.submit(node.effective, 1, offset, os.urandom(4096))
        await self.more()
        async with self.host.backend.changing():
            job = start_scrub(self.host.backend, self.node, repair=True)
        await self.host.until(lambda: job.status.value == "null", 30)
        assert job.lost == 0

    async def a_snapshot(self) -> None:
        await self.host.backend.transaction([("blockdev-snapshot-sync", {"device": "e"})])

    async def a_leg_comes_and_goes(self) -> None:
        self.added += 1
        name = f"n{self.added}"
        await self.host.add("file", f"file-{name}", filename=self.host.file(name))
        await self.host.add("test-faulty", name, file=f"file-{name}")
        graph = self.host.backend.graph
        async with self.host.backend.changing(), graph.change() as change:
            change.set_child(self.node, f"children.{len(self.legs())}", graph.node(name))
        await self.more(5)
        await self.heal()
        leaves = self.random.randrange(len(self.legs()))
        options = {**self.options, "children": self.legs()}
        options["children"].pop(leaves)
        await self.host.backend.blockdev_reopen([options])

    async def other_options(self) -> None:
        for name, values in (
            ("read-pattern", ("quorum", "fifo")),
            ("write-threshold", (0, 2, 3)),
            ("rewrite-corrupted", (False, True)),
        ):
            self.options[name] = self.random.choice(values)
        await self.host.backend.blockdev_reopen([{**self.options, "children": self.legs()}])

    # ---- parts

    def legs(self) -> list[str]:
        return [child.node.name for child in self.node.children.values()]

    async def more(self, rounds: int = 30) -> None:
        wanted = self.rounds + rounds
        await self.host.until(lambda: self.rounds >= wanted or self.task.done(), 30)
        if self.task.done():
            self.task.result()

    async def heal(self) -> None:
        async with asyncio.timeout(40):
            while set(states(self.node)) != {"i"}:
                for leg in self.node.legs:
                    # On a busy machine it may fail once more: it is given little time.
                    if leg.state.text == "failed" and leg.handle.strays == 0:
                        async with self.host.backend.changing():
                            with contextlib.suppress(VhostblkError):
                                start_rebuild(self.host.backend, self.node, leg)
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.01)
        await self.more(5)

    task: asyncio.Task[None]


@pytest.mark.parametrize("seed", range(3))
def test_all_of_it(seed: int) -> None:
    async def test(host: Host) -> None:
        options = {"leg_timeout": 700, "region_size": 4096}
        node = await quorum(host, **options)
        reopened = {"driver": "quorum", "node-name": "q", "vote-threshold": 2, "leg-timeout": 700,
                    "region-size": 4096, "metadata-file": host.path("states")}  # fmt: skip
        story = Story(host, node, seed, reopened)
        await host.export("q")
        async with host.device() as device:
            story.task = asyncio.create_task(story.guest(device))
            events = [
                story.a_leg_fails,
                story.a_leg_hangs,
                story.a_leg_rots,
                story.a_snapshot,
                story.a_leg_comes_and_goes,
                story.other_options,
            ]
            try:
                for _ in range(2):
                    for event in story.random.sample(events, len(events)):
                        print(event.__name__)
                        if (
                            story.options.get("read-pattern") == "fifo"
                            and event == story.a_leg_rots
                        ):
                            continue  # nobody would compare
                        await event()
                        await story.more(10)
            finally:
                story.over = True
                await story.task
            await device.flush()
            for leg in node.legs:
                assert await host.read(leg.node.name, 0, MIB) == await device.read(0, MIB)
        assert host.named("QUORUM_FAILURE") == []

    run(test)
