# SPDX-License-Identifier: GPL-2.0-or-later
"""Random changes of a tree, many of which fail, while a guest writes and verifies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from graph_changes import Copies, Through, act, content, load, picture, transaction
from in_process import Host, with_host

from vhostblk.engine import UpcallHandle
from vhostblk.graph import Graph
from vhostblk.nodes.driver import Perm
from vhostblk.schema import Size, VhostblkError


class Moody(Through):
    """Fails at a random step, sometimes."""

    driver = "moody"

    class Options(Through.Options):
        hooks: Size = 1

    options: Options
    mood: ClassVar[random.Random | None] = None
    permissions = (Perm.NONE, Perm.ALL)

    def maybe(self) -> None:
        if Moody.mood is not None and Moody.mood.random() < 0.06:
            Moody.mood = None  # not again on the way back
            raise OSError(5, "bad mood")

    async def open(self) -> None:
        await super().open()
        self.maybe()

    def hooked_operations(self) -> set[str]:
        self.maybe()
        return [set(), {"write"}, {"read", "write"}][self.options.hooks]  # type: ignore[return-value]

    def children_changed(self) -> None:
        super().children_changed()
        self.maybe()

    async def reopen_prepare(self, options: Any) -> None:
        self.maybe()
        await super().reopen_prepare(options)

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        used, allowed = self.permissions
        if perm & ~used or allowed & ~shared:  # to let go of something always works
            self.maybe()

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        self.permissions = (perm, shared)


class Walk:
    """A tree, and one random change after the other."""

    driver = "moody"
    files: Sequence[str] = ()
    """Nodes of driver file that are reopened, too."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host = host
        self.random = random.Random(seed)
        self.graph = host.backend.graph
        self.names = 0

    def options(self, name: str) -> dict[str, Any]:
        return {"driver": self.driver, "node-name": name, "hooks": self.random.randrange(3)}

    def filters(self) -> list[str]:
        return [name for name, node in self.graph.nodes.items() if node.driver == self.driver]

    def places(self) -> list[dict[str, Any]]:
        """Where a filter can be inserted."""
        found: list[dict[str, Any]] = [{"export-id": "e"}]
        for name, node in self.graph.nodes.items():
            found += [{"node-name": name, "child": role} for role in node.children]
            if self.graph.parents_of(node):
                found.append({"above": name})
        return found

    def insert(self) -> tuple[str, dict[str, Any]]:
        self.names += 1
        where = self.random.choice(self.places())
        return "block-filter-insert", {**where, "filter": self.options(f"x{self.names}")}

    def remove(self) -> tuple[str, dict[str, Any]]:
        return "block-filter-remove", {"node-name": self.random.choice(self.filters())}

    def reopen(self) -> tuple[str, dict[str, Any]]:
        chosen = self.random.sample(self.filters(), min(2, len(self.filters())))
        options = []
        for name in chosen:
            below = self.graph.node(name).children["file"].node.name
            options.append({**self.options(name), "file": below})
        if self.files:
            leg = self.random.choice(self.files)
            options.append(
                {
                    "driver": "file",
                    "node-name": leg,
                    "filename": self.host.path(leg),
                    "cache": {"direct": self.random.random() < 0.5},
                    "discard": self.random.choice(["unmap", "ignore"]),
                }
            )
        return "blockdev-reopen", {"options": options}

    def step(self) -> list[tuple[str, dict[str, Any]]]:
        """One change: one action, or several."""
        actions = []
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            kinds = [self.insert]
            if self.filters():
                kinds += [self.reopen, self.remove]
                if len(self.filters()) > 6:
                    kinds += [self.remove] * 4
            actions.append(self.random.choice(kinds)())
        if self.random.random() < 0.1:
            actions.append(("abort", {}))
        return actions


def check(host: Host) -> None:
    """The engine has the graph's picture, and parents and children agree."""
    graph = host.backend.graph
    for node in graph.nodes.values():
        for index, (role, child) in enumerate(node.children.items()):
            assert [e.role for e in graph.parents_of(child.node) if e.child is child] == [role]
            assert child._target is child.node.effective and child.size == child.node.size
            if node.handle is not None:
                assert node.handle._children[index] is child.node.effective
        if isinstance(node.handle, UpcallHandle):
            assert set(node.handle.operations) == node.hooked_operations()  # type: ignore[attr-defined]
        assert not graph.is_drained(node)
    drive = graph.backend("e")
    assert drive._linked is drive.root.effective
    assert drive.root in graph.nodes.values()


def check_permissions(graph: Graph) -> None:
    """Those that a change has left alone are what they would be if all were worked out anew."""
    nodes = list(graph.nodes.values())
    anew = graph._wanted_permissions(nodes)
    assert anew == {node: graph.permissions_of(node) for node in nodes}


@pytest.mark.parametrize("seed", range(6))
def test_random_changes(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        for name in "ab":
            await host.add("file", name, filename=host.file(name))
        await host.add("copies", "q", children=["a", "b"])
        await host.export("q")
        walk = Walk(host, seed)
        walk.files = "ab"

        async def switched() -> None:
            check_permissions(walk.graph)

        walk.graph.on_switched = switched
        done = failed = 0
        async with host.device() as guest, load(guest):
            while done + failed < 150:
                before = picture(walk.graph)
                actions = walk.step()
                Moody.mood = walk.random
                try:
                    result = await transaction(host, *actions)
                    done += 1
                    assert result["pause-us"] >= 0
                except VhostblkError:
                    failed += 1
                    Moody.mood = None
                    assert picture(walk.graph) == before, actions
                finally:
                    Moody.mood = None
                check(host)
        assert done > 20 and failed > 20, (done, failed)
        while unused := [
            n for n in walk.filters() if not walk.graph.parents_of(walk.graph.node(n))
        ]:
            await act(host, "blockdev-del", node_name=unused[0])
        while walk.filters():
            await act(host, "block-filter-remove", node_name=walk.filters()[0])
        await host.backend.block_export_del("e", "hard")
        assert content(host, "a") == content(host, "b") != bytes(len(content(host, "a")))
        assert set(walk.graph.nodes) == {"a", "b", "q"}
        assert not host.named("VHOSTBLK_FILTER_ERROR")
        assert not caplog.records

    with_host(test, Moody, Copies)
