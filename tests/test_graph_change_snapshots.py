# SPDX-License-Identifier: GPL-2.0-or-later
"""Random changes and snapshots of two qcow2 legs, many of which fail, while a guest verifies."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from graph_changes import Copies, load, picture, transaction
from in_process import Host, with_host
from test_graph_change_qcow2 import create, qemu_img
from test_graph_change_random import Moody, Walk

from vhostblk.schema import VhostblkError


class Same(Moody):
    """An image below it can be named without it."""

    driver = "same"
    keeps_data = True


class SnapshotWalk(Walk):
    """Filters anywhere, also between a format and its file, and snapshots of all legs."""

    driver = "same"
    snapshots = 0

    def step(self) -> list[tuple[str, dict[str, Any]]]:
        actions = super().step()
        if self.random.random() < 0.15 and self.snapshots < 10:
            self.snapshots += 1
            name = self.host.path(f"{self.snapshots}-{{node}}.qcow2")
            snapshot = {"device": "e", "snapshot-file-template": name}
            actions.insert(
                self.random.randrange(len(actions) + 1), ("blockdev-snapshot-sync", snapshot)
            )
        return actions


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_and_snapshots(seed: int) -> None:
    async def test(host: Host) -> None:
        for name in "ab":
            file = {"driver": "file", "filename": create(host.path(f"{name}.qcow2"))}
            await host.add("qcow2", name, file=file)
        await host.add("copies", "q", children=["a", "b"])
        await host.export("q")
        walk = SnapshotWalk(host, seed)
        graph = walk.graph
        done = failed = taken = 0
        async with host.device() as guest, load(guest):
            while done + failed < 100:
                before = picture(graph, sizes=False)
                files = set(os.listdir(host.directory))
                actions = walk.step()
                Moody.mood = walk.random
                try:
                    await transaction(host, *actions)
                    done += 1
                    taken += any(name.startswith("blockdev-snapshot") for name, _ in actions)
                except VhostblkError:
                    failed += 1
                    Moody.mood = None
                    assert picture(graph, sizes=False) == before, actions
                    assert set(os.listdir(host.directory)) == files
                finally:
                    Moody.mood = None
        assert done > 15 and failed > 15 and taken, (done, failed, taken)
        tops = [top.filename() for top in graph.backend("e").top_nodes_below_filters]
        await host.backend.block_export_del("e", "hard")
        while graph.nodes:
            for node in [n for n in graph.nodes.values() if not graph.parents_of(n)]:
                await host.backend.blockdev_del(node.name)
        assert "identical" in qemu_img("compare", *tops)
        for name in os.listdir(host.directory):
            if name.endswith(".qcow2"):
                try:
                    qemu_img("check", host.path(name))
                except subprocess.CalledProcessError as error:
                    raise AssertionError(f"{name}: {error.stdout}{error.stderr}") from None

    with_host(test, Same, Copies)
