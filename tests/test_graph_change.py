# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of the graph under guests: all or nothing."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, ClassVar

from graph_changes import (
    Copies,
    Through,
    act,
    content,
    has_seen,
    load,
    picture,
    roles,
    transaction,
)
from in_process import MIB, Host, refused, with_host

from vhostblk.jobs.create import Creator


def test_a_filter_above_the_exported_root_and_away_again() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        await host.add("file", "f", filename=host.file("a"))
        await host.export("f")
        drive = graph.backend("e")
        async with host.device() as guest, load(guest):
            for _ in range(20):
                through = await host.add("through", "x", file="f")
                async with graph.change() as change:
                    change.insert_filter(through, drive, "root")
                assert drive.root is through and drive.filters == [through]
                assert change.pause_us > 0
                await host.until(partial(has_seen, through, 20))
                async with graph.change() as change:
                    change.remove_filter(through)
                seen = through.seen
                await asyncio.sleep(0.002)
                assert through.seen == seen and drive.root.name == "f"
                await host.backend.blockdev_del("x")

    with_host(test, Through)


# ---- filters anywhere


def test_between_two_filters() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("through", "low", file="f")
        high = await host.add("through", "high", file="low")
        await host.export("high")
        async with host.device() as guest, load(guest):
            for place in (
                {"node_name": "high", "child": "file"},
                {"above": "low"},
            ):
                filter = {"driver": "through", "node-name": "x"}
                result = await act(host, "block-filter-insert", filter=filter, **place)
                assert result["pause-us"] > 0 and result["results"] == [{"node-name": "x"}]
                assert roles(host, "high") == {"file": "x"} and roles(host, "x") == {"file": "low"}
                inserted = host.backend.graph.node("x")
                await host.until(partial(has_seen, inserted, 10))
                assert high.file.node is inserted
                await act(host, "block-filter-remove", node_name="x")
                assert roles(host, "high") == {"file": "low"}
                assert "x" not in host.backend.graph.nodes

    with_host(test, Through)


def test_under_one_leg_of_a_filter_with_many_children() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        for name in "abc":
            await host.add("file", name, filename=host.file(name))
        copies = await host.add("copies", "q", children=["a", "b", "c"])
        await host.export("q")
        async with host.device() as guest, load(guest):
            await act(
                host, "block-filter-insert",
                node_name="q", child="children.1", filter={"driver": "through", "node-name": "x"},
            )  # fmt: skip
            assert roles(host, "q") == {"children.0": "a", "children.1": "x", "children.2": "c"}
            await host.until(lambda: graph.node("x").seen > 10)
            # Siblings are siblings to everyone, whatever filters are in between.
            for one, others in (("a", ["b", "c"]), ("b", ["a", "c"]), ("c", ["a", "b"])):
                assert sorted(n.name for n in graph.siblings(graph.node(one))) == others
            drive = graph.backend("e")
            assert {n.name for n in drive.top_nodes_below_filters} == {"a", "b", "c"}
            assert [n.name for n in drive.filters] == ["q", "x"]
            # Another leg, and one leg less.
            await host.add("file", "d", filename=host.file("d"))
            async with graph.change() as change:
                change.set_child(copies, "children.3", graph.node("d"))
            assert list(roles(host, "q")) == [f"children.{i}" for i in range(4)]
            await host.until(lambda: any(content(host, "d")))
            async with graph.change() as change:
                change.set_child(copies, "children.3", None)
            await host.backend.blockdev_del("d")
            await act(host, "block-filter-remove", node_name="x")
        contents = [content(host, name) for name in "abc"]
        assert contents[0] == contents[1] == contents[2] and any(contents[0])

    with_host(test, Through, Copies)


def test_a_many_children_filter_comes_and_goes() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "a", filename=host.file("a"))
        await host.add("file", "b", filename=host.file("b"))
        await host.export("a")
        async with host.device() as guest, load(guest):
            filter = {"driver": "copies", "node-name": "q", "children": ["a", "b"]}
            await act(
                host, "block-filter-insert",
                export_id="e", filter=filter, filter_child="children.0",
            )  # fmt: skip
            with refused("Node 'q' (copies) has 2 children", "children.0, children.1"):
                await act(host, "block-filter-remove", node_name="q")
            with refused("has no child 'children.7'", "children.0, children.1"):
                await act(host, "block-filter-remove", node_name="q", child="children.7")
            await act(host, "block-filter-remove", node_name="q", child="children.0", keep=True)
            assert host.backend.graph.backend("e").root.name == "a"
            await host.backend.blockdev_del("q")

    with_host(test, Copies)


def test_above_a_node_with_two_users() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.add("raw", "one", file="n")
        await host.add("raw", "two", file="n")
        await host.export("one", "e1", writable=False)
        await host.export("two", "e2", writable=False)
        filter = {"driver": "through", "node-name": "x"}
        async with host.device("e1") as first, host.device("e2") as second:
            await act(host, "block-filter-insert", above="n", filter=filter)
            assert roles(host, "one") == roles(host, "two") == {"file": "x"}
            await first.read(0, 512)
            await second.read(0, 512)
            assert host.backend.graph.node("x").seen == 2
            await act(host, "block-filter-remove", node_name="x")
            await first.read(0, 512)
            assert roles(host, "one") == roles(host, "two") == {"file": "n"}

    with_host(test, Through)


def test_one_filter_moves_about() -> None:
    async def test(host: Host) -> None:
        for name in "ab":
            await host.add("file", name, filename=host.file(name))
        await host.add("raw", "r", file="a")
        await host.export("r")
        through = await host.add("through", "x", file="b")  # not where it will be
        async with host.device() as guest, load(guest):
            places: list[dict[str, Any]] = [
                {"export_id": "e"},
                {"node_name": "r", "child": "file"},
                {"above": "a"},
            ]
            for place in places:
                await act(host, "block-filter-insert", filter="x", **place)
                seen = through.seen
                await host.until(partial(has_seen, through, seen + 8))
                assert roles(host, "x") == {"file": "r" if "export_id" in place else "a"}
                await act(host, "block-filter-remove", node_name="x", keep=True)
                assert not host.backend.graph.parents_of(through)
        assert not any(content(host, "b"))

    with_host(test, Through)


def test_filters_change_places_in_one_transaction() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("through", "low", file="f")
        await host.add("through", "high", file="low")
        await host.export("high")

        def put(parent: str, child: str) -> tuple[str, dict[str, Any]]:
            return "blockdev-replace", {
                "parent-type": "driver", "node-name": parent, "child": "file", "new-child": child
            }  # fmt: skip

        root = {"parent-type": "export", "export-id": "e", "new-child": "low"}
        async with host.device() as guest, load(guest):
            with refused("Making 'high' a file child of 'low' would create a cycle"):
                await transaction(host, put("low", "high"))
            await transaction(
                host, put("low", "high"), put("high", "f"), ("blockdev-replace", root)
            )
            assert [n.name for n in host.backend.graph.backend("e").filters] == ["low", "high"]

    with_host(test, Through)


def test_a_filter_inserted_while_guests_are_held_up_holds_nothing_back() -> None:
    class Held(Through):
        driver = "held"
        calls: ClassVar[list[str]] = []

        def drain_begin(self) -> None:
            self.calls.append("begin")

        def drain_end(self) -> None:
            self.calls.append("end")

    async def test(host: Host) -> None:
        graph = host.backend.graph
        await host.null("n")
        await host.export("n")
        drive = graph.backend("e")
        with graph.releasing([drive]):  # QEMU waits for its requests
            await act(
                host, "block-filter-insert",
                export_id="e", filter={"driver": "held", "node-name": "x"},
            )  # fmt: skip
            assert Held.calls == ["begin"]
        assert Held.calls == ["begin", "end"]

    with_host(test, Held)


def test_more_children_than_the_engine_has_places_for() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        await host.null("n", **{"read-only": True})
        with refused("Node 'q' cannot have more than 32 children"):
            await host.add("copies", "q", children=["n"] * 33)
        assert set(graph.nodes) == {"n"}
        node = await host.add("copies", "q", children=["n"] * 32)
        for role in ("children.x", "children.", "children", "children.01", "children.-1"):
            with refused(f"Node 'q' has no child '{role}'"):
                async with graph.change() as change:
                    change.set_child(node, role, graph.node("n"))
        before = picture(graph)
        with refused("Node 'q' cannot have more than 32 children"):
            async with graph.change() as change:
                change.set_child(node, "children.32", graph.node("n"))
        assert picture(graph) == before

    with_host(test, Copies)


# ---- storage


def test_storage_is_replaced_under_a_node() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "old", filename=host.file("old"))
        await host.add("file", "new", filename=host.file("new"))
        await host.add("through", "x", file={"driver": "raw", "node-name": "r", "file": "old"})
        await host.export("x")
        async with host.device() as guest:
            await guest.write(4096, b"o" * 4096)
            replace = {"parent_type": "driver", "node_name": "r", "child": "file"}
            await act(host, "blockdev-replace", **replace, new_child="new")
            assert await guest.read(4096, 4096) == bytes(4096)
            await guest.write(8192, b"n" * 4096)
            await host.backend.blockdev_del("old")
        assert content(host, "new")[8192:12288] == b"n" * 4096
        assert content(host, "old")[8192:12288] == bytes(4096)

    with_host(test, Through)


def test_an_exported_drive_keeps_its_size_unless_asked() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.null("large", size=2 * MIB)
        await host.export("n")
        replace = {"parent_type": "export", "export_id": "e", "new_child": "large"}
        async with host.device() as guest:
            before = picture(host.backend.graph)
            with refused("The size of export 'e' would change from 1048576 to 2097152 bytes"):
                await act(host, "blockdev-replace", **replace)
            assert picture(host.backend.graph) == before
            assert (await guest.config()).capacity * 512 == MIB
            waiting = asyncio.ensure_future(guest.backend_message(10))
            await act(host, "blockdev-replace", **replace, allow_size_change=True)
            assert await waiting == 2  # VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
            assert (await guest.config()).capacity * 512 == 2 * MIB
            await guest.read(2 * MIB - 512, 512)

    with_host(test)


# ---- refusals


def test_what_would_break_something_is_refused_with_the_reason() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        await host.null("n")
        await host.null("busy")
        await host.null("ro", **{"read-only": True})
        await host.add("raw", "r", file="n")
        await host.add("through", "x", file="r")
        await host.add("raw", "window", file="n", offset=4096, size=8192)
        await host.null("tiny", size=8192)
        await host.export("x")
        await host.export("busy", "other")
        driver = {"parent_type": "driver", "node_name": "r", "child": "file"}
        export = {"parent_type": "export", "export_id": "e"}
        filter = {"driver": "through", "node-name": "new"}
        before = picture(graph)
        for texts, name, arguments in [
            (["Making 'x' a file child of 'r' would create a cycle"],
             "blockdev-replace", {**driver, "new_child": "x"}),
            (["Making 'r' a file child of 'r' would create a cycle"],
             "blockdev-replace", {**driver, "new_child": "r"}),
            (["Node 'r' has no child 'fil'", "did you mean 'file'?"],
             "blockdev-replace", {**driver, "child": "fil", "new_child": "busy"}),
            (["Permission conflict on node 'busy'", "export 'other'"],
             "blockdev-replace", {**driver, "new_child": "busy"}),
            (["Block node 'ro' is read-only"], "blockdev-replace", {**driver, "new_child": "ro"}),
            (["Failed to find node with node-name='nn'", "did you mean 'n'?"],
             "blockdev-replace", {**driver, "new_child": "nn"}),
            (["Export 'f' is not found"],
             "blockdev-replace", {**export, "export_id": "f", "new_child": "n"}),
            (["Parameter 'export-id' is missing"],
             "blockdev-replace", {"parent_type": "export", "new_child": "n"}),
            (["Parameter 'child' is unexpected"],
             "blockdev-replace", {**export, "child": "file", "new_child": "n"}),
            (["Parameter 'parent-type' does not accept value 'qdev'"],
             "blockdev-replace", {"parent_type": "qdev", "new_child": "n"}),
            (["sum of offset (4096) and size (8192)"],
             "blockdev-replace", {**driver, "node_name": "window", "new_child": "tiny"}),
            (["Node 'n' cannot be put above 'x'", "driver 'null-co' has no child 'file'"],
             "block-filter-insert", {"export_id": "e", "filter": "n"}),
            (["One of 'export-id', 'above' and 'node-name'"],
             "block-filter-insert", {"filter": filter}),
            (["One of 'export-id', 'above' and 'node-name'"],
             "block-filter-insert", {"filter": filter, "export_id": "e", "above": "n"}),
            (["'node-name' must be specified"],
             "block-filter-insert", {"filter": {"driver": "through"}, "export_id": "e"}),
            (["Duplicate nodes with node-name='x'"],
             "block-filter-insert", {"filter": {**filter, "node-name": "x"}, "export_id": "e"}),
            (["Node 'busy' (null-co) has no child that could take its place"],
             "block-filter-remove", {"node_name": "busy"}),
            (["Node 'window' is below nothing; blockdev-del deletes it"],
             "block-filter-remove", {"node_name": "window"}),
            (["Node 'n' is in use: by node 'r' as 'file', node 'window' as 'file'"],
             "blockdev-del", {"node_name": "n"}),
            (["Parameter 'type' does not accept value 'blockdev-ad'", "'blockdev-add'?"],
             "blockdev-ad", {}),
        ]:  # fmt: skip
            with refused(*texts):
                await act(host, name, **arguments)
            assert picture(graph) == before, texts
        async with host.device() as guest:
            await guest.write(0, b"x" * 512)

    with_host(test, Through)


def test_children_that_drivers_need_or_do_not_have() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        await host.null("n")
        raw = await host.add("raw", "r", file="n")
        with refused("Child 'file' of node 'r' cannot be removed: driver 'raw' needs it"):
            async with graph.change() as change:
                change.set_child(raw, "file", None)
        for role in ("backing", "file.0"):
            with refused(f"Node 'r' has no child '{role}'; its children: file"):
                async with graph.change() as change:
                    change.set_child(raw, role, graph.node("n"))

    with_host(test)


def test_a_long_chain() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "n0", filename=host.file("a"))
        for number in range(1, 300):
            await host.add("raw", f"n{number}", file=f"n{number - 1}")
        await host.backend.block_resize("n0", 2 * MIB)
        await host.export("n299")
        async with host.device() as guest:
            filter = {"driver": "through", "node-name": "x"}
            await act(host, "block-filter-insert", node_name="n150", child="file", filter=filter)
            await guest.write(MIB, b"x" * 512)
            assert await guest.read(MIB, 512) == b"x" * 512
            assert host.backend.graph.node("x").seen == 2
            graph = host.backend.query_block_graph()
            assert len(graph["nodes"]) == 301 and len(graph["edges"]) == 301
            await act(host, "block-filter-remove", node_name="x")

    with_host(test, Through)


def test_what_has_grown_in_use_is_no_change_of_size() -> None:
    """A job holds on to a filter beside the image that makes its file longer."""

    async def test(host: Host) -> None:
        await host.add("file", "file", filename=host.file("image", 0))
        await host.backend.blockdev_create(
            "j", {"driver": "qcow2", "file": "file", "size": 16 * MIB}
        )
        await host.until(lambda: host.named("JOB_STATUS_CHANGE")[-1]["status"] == "concluded")
        await host.add("qcow2", "image", file="file")
        beside = await host.add("delay", "beside", file="file")
        graph = host.backend.graph
        async with graph.using(beside, "job", "job"):
            await host.write("image", 0, b"x" * 8 * MIB)
            assert beside.size < graph.node("file").size
            await act(host, "block-filter-insert", node_name="image", child="file",
                      filter={"driver": "delay", "node-name": "new"})  # fmt: skip
            assert beside.size == graph.node("file").size

    with_host(test)


def test_a_filter_above_a_file_that_an_image_is_being_written_to() -> None:
    """The job goes on with the file itself, which stays since somebody uses it now."""

    async def test(host: Host) -> None:
        backend, graph = host.backend, host.backend.graph
        creator = Creator(graph, backend.driver_registry, "job", locked=False)
        file = {"driver": "file", "node-name": "f", "filename": host.file("a")}
        async with creator.image(file) as child:
            await host.add("delay", "d", file="f")
            with refused("Export 'job' is not found"):
                await act(host, "block-filter-insert", export_id="job", filter="d")
            assert child.node is graph.node("f")
            await child.write(0, b"x" * 512)
        assert not graph.permissions_of(graph.node("f"))[0]
        assert await host.read("d", 0, 512) == b"x" * 512
        await backend.blockdev_del("d")
        assert not graph.nodes

    with_host(test)
