# SPDX-License-Identifier: GPL-2.0-or-later
"""A change of the graph that fails, wherever it does, leaves the old tree and an unharmed guest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from frontend import Status
from graph_changes import Through, act, load, picture, transaction
from in_process import Host, refused, with_host

from vhostblk.filter import Request
from vhostblk.graph import Change
from vhostblk.nodes.driver import Perm
from vhostblk.schema import Size, VhostblkError


class Failing(Through):
    """Fails at one step, with one node, once."""

    driver = "failing"

    class Options(Through.Options):
        extra: Size = 0

    options: Options
    step: ClassVar[str] = ""
    victim: ClassVar[str] = ""
    error: ClassVar[Exception] = ValueError("on purpose")
    closed: ClassVar[list[str]] = []

    def fail_at(self, step: str) -> None:
        if Failing.step == step and Failing.victim == self.name:
            Failing.step = ""
            raise Failing.error

    async def open(self) -> None:
        await super().open()
        self.fail_at("open")

    async def close(self) -> None:
        assert self.file.size  # the child can still be asked
        assert list(self.children) == ["file"]
        Failing.closed.append(f"{self.name} {self.options.extra}")

    def hooked_operations(self) -> set[str]:
        self.fail_at("hooked_operations")
        return super().hooked_operations()

    async def reopen_prepare(self, options: Any) -> None:
        self.fail_at("reopen_prepare")
        await super().reopen_prepare(options)

    async def reopen_commit(self) -> None:
        self.fail_at("before reopen_commit")
        await super().reopen_commit()
        self.fail_at("after reopen_commit")

    def children_changed(self) -> None:
        super().children_changed()
        self.fail_at("children_changed")

    def relink(self) -> None:
        super().relink()
        self.fail_at("relink")

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        self.fail_at("prepare_permissions")

    @property
    def size(self) -> int:
        return super().size - self.options.extra


FILTER = {"driver": "failing", "node-name": "new", "file": "f", "extra": 0}
REOPEN = {"driver": "failing", "node-name": "low", "file": "f", "extra": 0}

# What is done, and the steps of which node can fail in it.
CHANGES: dict[str, tuple[list[tuple[str, dict[str, Any]]], dict[str, list[str]]]] = {
    "insert": (
        [("block-filter-insert", {"node-name": "high", "child": "file", "filter": FILTER})],
        {
            "new": ["open", "hooked_operations", "relink", "prepare_permissions"],
            "high": ["children_changed", "relink"],
        },
    ),
    "reopen": (
        [("blockdev-reopen", {"options": [REOPEN]})],
        {
            "low": [
                "reopen_prepare",
                "before reopen_commit",
                "open",
                "hooked_operations",
                "after reopen_commit",
                "children_changed",
                "relink",
            ],
            "high": ["children_changed", "relink"],
        },
    ),
    "several": (
        [
            ("block-filter-insert", {"export-id": "e", "filter": FILTER}),
            ("blockdev-reopen", {"options": [REOPEN]}),
            (
                "blockdev-replace",
                {
                    "parent-type": "driver",
                    "node-name": "low",
                    "child": "file",
                    "new-child": "spare",
                },
            ),
            ("blockdev-add", {"driver": "null-co", "node-name": "another"}),
            ("block-filter-remove", {"node-name": "gone"}),
        ],
        {
            "new": ["open", "prepare_permissions"],
            "low": ["reopen_prepare", "after reopen_commit"],
            "high": ["children_changed", "relink"],
            "spare": ["prepare_permissions"],
        },
    ),
}
CASES = [
    (change, node, step)
    for change, (_, nodes) in CHANGES.items()
    for node, steps in nodes.items()
    for step in steps
]


async def tree(host: Host) -> None:
    """high (exported) > gone > low > f, and spare > g"""
    await host.add("file", "f", filename=host.file("a"))
    await host.add("file", "g", filename=host.file("b"))
    await host.add("failing", "spare", file="g")
    await host.add("failing", "low", file="f")
    await host.add("failing", "gone", file="low")
    await host.add("failing", "high", file="gone")
    await host.export("high")


def open_files() -> list[str]:
    """Where the descriptors on files of this process lead to."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith("/"))


@pytest.fixture(autouse=True)
def no_failure() -> None:
    Failing.step = ""
    Failing.error = ValueError("on purpose")
    Failing.closed = []


@pytest.mark.parametrize(("change", "node", "step"), CASES)
def test_a_failure_at_each_step(
    change: str, node: str, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(host: Host) -> None:
        await tree(host)
        actions = CHANGES[change][0]
        async with host.device() as guest, load(guest):
            before = picture(host.backend.graph)
            descriptors = open_files()
            Failing.victim, Failing.step = node, step
            with refused("on purpose", node):
                await transaction(host, *actions)
            assert Failing.step == "", "it was not reached"
            assert picture(host.backend.graph) == before
            assert open_files() == descriptors
            Failing.victim = ""
            # Nothing is in the way of the same change now.
            if change != "several":
                await transaction(host, *actions)
                await host.until(lambda: host.backend.graph.node("low").seen > 8)
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

    with_host(test, Failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), VhostblkError("as is")])
def test_errors_are_sentences(error: Exception) -> None:
    async def test(host: Host) -> None:
        await tree(host)
        Failing.victim, Failing.step, Failing.error = "low", "open", error
        with refused(str(getattr(error, "strerror", None) or error)):
            await act(host, "blockdev-reopen", options=[REOPEN])

    with_host(test, Failing)


def test_a_size_that_changes_on_the_way_up() -> None:
    async def test(host: Host) -> None:
        await tree(host)
        async with host.device() as guest, load(guest):
            before = picture(host.backend.graph)
            with refused("The size of export 'e' would change from 1048576 to 1048064 bytes"):
                await act(host, "blockdev-reopen", options=[{**REOPEN, "extra": 512}])
            assert picture(host.backend.graph) == before

    with_host(test, Failing)


def test_steps_inside_the_pause_are_undone_in_reverse() -> None:
    async def test(host: Host) -> None:
        await tree(host)
        await host.add("failing", "x", file="gone")
        graph = host.backend.graph
        done: list[str] = []

        def step(text: str) -> Callable[[], Any]:
            async def do() -> None:
                assert host.backend.query_block_exports()[0]["inflight"] == 0
                done.append(text)

            return do

        async def fail() -> None:
            raise OSError(5, "Input/output error")

        def plan(change: Change) -> None:
            change.insert_filter(graph.node("x"), graph.node("high"), "file")
            for number in "12":
                change.inside(step(f"do {number}"), step(f"undo {number}"))
            change.after(step("after"))
            change.on_failure(step("failed"))

        before = picture(graph)
        with pytest.raises(OSError, match="Input/output"):
            async with graph.change() as change:
                plan(change)
                change.inside(fail, step("never"))
        assert done == ["do 1", "do 2", "undo 2", "undo 1", "failed"]
        assert picture(graph) == before
        done.clear()
        with refused("not after all"):
            async with graph.change() as change:
                plan(change)
                raise VhostblkError("not after all")
        assert done == ["failed"] and picture(graph) == before
        done.clear()
        async with graph.change() as change:
            plan(change)
        assert done == ["do 1", "do 2", "after"]

    with_host(test, Failing)


def test_abort() -> None:
    async def test(host: Host) -> None:
        await tree(host)
        async with host.device() as guest, load(guest):
            before = picture(host.backend.graph)
            with refused("Transaction aborted using Abort action"):
                await transaction(host, *CHANGES["several"][0], ("abort", {}))
            assert picture(host.backend.graph) == before
        result = await transaction(host, *CHANGES["several"][0])
        assert result["pause-us"] > 0
        graph = host.backend.graph
        assert [n.name for n in graph.backend("e").filters] == ["new", "high", "low", "spare"]
        assert graph.backend("e").top_node_below_filters.name == "g"
        assert "gone" not in graph.nodes and "another" in graph.nodes

    with_host(test, Failing)


def test_a_change_whose_asker_goes_away_is_completed_or_undone() -> None:
    class Slow(Failing):
        driver = "slow"
        entered: ClassVar[asyncio.Event]

        async def reopen_commit(self) -> None:
            self.entered.set()
            await asyncio.sleep(0.05)
            await super().reopen_commit()

    async def test(host: Host) -> None:
        Slow.entered = asyncio.Event()
        await host.add("file", "f", filename=host.file("a"))
        node = await host.add("slow", "low", file="f")
        await host.export("low")
        async with host.device() as guest, load(guest):
            for fails in (False, True):
                Slow.entered.clear()
                given = {**REOPEN, "driver": "slow"}
                given |= {"discard": "ignore"} if fails else {"discard": "unmap"}
                task = asyncio.create_task(act(host, "blockdev-reopen", options=[given]))
                await Slow.entered.wait()
                if fails:
                    Failing.victim, Failing.step = "low", "open"
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not host.backend.graph.lock.locked()
                assert node.options.discard == "unmap"
                assert not host.backend.graph.is_drained(node)

    with_host(test, Slow)


def test_a_filter_starts_afresh_with_new_options() -> None:
    async def test(host: Host) -> None:
        await tree(host)
        low = host.backend.graph.node("low")
        async with host.device() as guest:
            await guest.read(0, 512)
            assert low.seen == 1
            await act(host, "blockdev-reopen", options=[REOPEN])
            assert low.seen == 0 and Failing.closed == ["low 0"]
            await guest.read(0, 512)
            assert low.seen == 1
            Failing.victim, Failing.step = "high", "relink"
            with refused("on purpose"):
                await act(host, "blockdev-reopen", options=[REOPEN])
            assert low.seen == 1  # with what it had before
            assert Failing.closed == ["low 0", "low 0"]

    with_host(test, Failing)


def test_a_filter_that_starts_afresh_in_the_pause_holds_nothing_back() -> None:
    class Held(Failing):
        driver = "held"
        calls: ClassVar[list[str]] = []

        def drain_begin(self) -> None:
            self.calls.append(f"begin {self.options.discard}")

        def drain_end(self) -> None:
            self.calls.append(f"end {self.options.discard}")

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("held", "x", file="f")
        await host.export("x")
        options = {"driver": "held", "node-name": "x", "file": "f"}
        await act(host, "blockdev-reopen", options=[{**options, "discard": "unmap"}])
        assert Held.calls == ["begin ignore", "begin unmap", "end unmap"]
        Held.calls.clear()
        Failing.victim, Failing.step = "x", "relink"
        with refused("on purpose"):
            await act(host, "blockdev-reopen", options=[options])
        assert Held.calls == ["begin unmap", "begin ignore", "end unmap"]

    with_host(test, Held)


def test_views_and_hooks_survive_a_reopening_under_load() -> None:
    class Copying(Through):
        driver = "copying"
        uses_tasks = True

        async def write(self, request: Request) -> None:
            await self.file.write(request.offset, request.data())

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("copying", "x", file="f")
        await host.export("x")
        async with host.device() as guest, load(guest):
            for _ in range(30):
                options = [{"driver": "copying", "node-name": "x", "file": "f"}]
                await act(host, "blockdev-reopen", options=options)
                await asyncio.sleep(0.002)
        assert not host.named("VHOSTBLK_FILTER_ERROR")

    with_host(test, Copying)


def test_requests_that_do_not_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that hangs holds up its own guest; nothing is changed, and others go on."""
    monkeypatch.setattr("vhostblk.graph.graph.PAUSE_PATIENCE", 0.1)

    async def test(host: Host) -> None:
        await host.null("hangs", latency_ns=2_000_000_000)
        await host.null("fast")
        await host.export("hangs", "slow")
        await host.export("fast", "other")
        replace = [
            ("block-filter-insert", {"export-id": id, "filter": {**FILTER, "node-name": id}})
            for id in ("slow", "other")
        ]
        for _, arguments in replace:
            del arguments["filter"]["file"]
        async with host.device("slow") as slow, host.device("other") as other:
            request = slow.device.submit(0, 0, length=512)
            await host.until(lambda: any(e["inflight"] for e in host.backend.query_block_exports()))
            before = picture(host.backend.graph)
            with refused("requests of export 'slow' have not finished for 0.1 s"):
                await transaction(host, *replace)
            assert picture(host.backend.graph) == before
            assert request.status != Status.OK
            await other.read(0, 512)
            await slow.wait(request)
            assert request.status == Status.OK
            monkeypatch.undo()
            await transaction(host, *replace)
            await slow.read(0, 512)
            assert host.backend.graph.node("slow").seen == 1
            monkeypatch.setattr("vhostblk.graph.graph.PAUSE_PATIENCE", 0.1)
            slow.device.submit(0, 0, length=512)
            await host.until(lambda: any(e["inflight"] for e in host.backend.query_block_exports()))
            with refused("have not finished"):
                await act(host, "block-filter-remove", node_name="slow")
            await host.backend.block_export_del("slow", "hard")  # waits for what is under way

    with_host(test, Failing)


def test_nodes_that_are_being_opened_do_not_confuse_anybody() -> None:
    class Slow(Failing):
        driver = "slow"
        go_on: ClassVar[asyncio.Event]
        entered: ClassVar[asyncio.Event]

        async def open(self) -> None:
            Slow.entered.set()
            await Slow.go_on.wait()
            self.ready = True
            await super().open()

        @property
        def size(self) -> int:
            assert self.ready
            return super().size

    async def test(host: Host) -> None:
        Slow.go_on, Slow.entered = asyncio.Event(), asyncio.Event()
        await host.null("n")
        task = asyncio.create_task(host.add("slow", "x", file="n"))
        await Slow.entered.wait()
        backend = host.backend
        for open_nodes in ({"n"}, {"n", "x"}):
            assert {n["node-name"] for n in backend.query_named_block_nodes()} == open_nodes
            graph = backend.query_block_graph()
            assert {n["node-name"] for n in graph["nodes"]} == open_nodes
            assert len(graph["edges"]) == len(open_nodes) - 1
            assert {s["node-name"] for s in backend.query_blockstats()} == open_nodes
            Slow.go_on.set()
            await task

    with_host(test, Slow)
