# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-reopen: other options and children for nodes that guests use."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any

import pytest
from frontend.device import BlockError
from graph_changes import Copies, Through, act, load, picture, roles
from in_process import MIB, Host, refused, with_host


def locked(fd: int) -> set[str]:
    """Which of QEMU's lock bytes others hold: what they do, and what they let nobody else do."""
    wanted = {100: "read", 101: "write", 103: "resize", 201: "no-write", 203: "no-resize"}
    found = set()
    for start, name in wanted.items():
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
        if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
            found.add(name)
    return found


async def reopen(host: Host, *options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return await act(host, "blockdev-reopen", options=list(options), **more)


def flags(path: str) -> list[set[str]]:
    """The flags of every descriptor that this process has open on a file."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != path:
                continue
            with open(f"/proc/self/fdinfo/{fd}") as file:
                value = next(int(line.split()[1], 8) for line in file if line.startswith("flags"))
        except OSError:
            continue
        names = {"direct"} if value & os.O_DIRECT else set()
        found.append(names | {"write" if value & os.O_RDWR else "read"})
    return found


def test_options_of_a_file_change_under_load() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        options = {"driver": "file", "node-name": "f", "filename": path}
        node = await host.add("file", "f", filename=path)
        await host.add("through", "x", file="f")
        await host.export("x")
        descriptors = len(flags(path))
        async with host.device() as guest, load(guest):
            for _ in range(5):
                await reopen(host, {**options, "cache": {"direct": True}})
                assert {"direct", "write"} in flags(path)
                await reopen(host, {**options, "cache": {"no-flush": True}, "discard": "unmap"})
                assert node.options.cache.no_flush and not node.options.cache.direct
                assert {"direct", "write"} not in flags(path)
                await reopen(host, {**options, "discard": "unmap", "detect-zeroes": "unmap"})
        async with host.device() as guest:
            await guest.write(0, b"x" * MIB)
            await guest.write(0, bytes(MIB))
            assert os.stat(path).st_blocks == 0
            await reopen(host, options)  # what is left out is the default
            assert node.options.detect_zeroes == "off" and node.options.discard == "ignore"
            await guest.write(0, bytes(MIB))
            assert os.stat(path).st_blocks > 0
        assert len(flags(path)) == descriptors

    with_host(test, Through)


def test_read_only_and_back() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        options = {"driver": "file", "node-name": "f", "filename": path}
        node = await host.add("file", "f", filename=path)
        await host.export("f")
        async with host.device() as guest, load(guest):
            before = picture(host.backend.graph)
            with refused("Block node 'f' is read-only"):
                await reopen(host, {**options, "read-only": True})
            assert picture(host.backend.graph) == before
        await host.backend.block_export_del("e", "hard")
        await reopen(host, {**options, "read-only": True})
        assert node.read_only and node.size == MIB
        with refused("read-only"):
            await host.export("f")
        await reopen(host, options)
        assert not node.read_only
        await host.export("f")
        async with host.device() as guest:
            await guest.write(0, b"x" * 512)

    with_host(test)


def test_the_same_file_whatever_has_become_of_its_name() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path)
        await host.export("f")
        async with host.device() as guest:
            await guest.write(0, b"x" * 512)
            os.rename(path, path + ".moved")
            host.file("a")
            await reopen(
                host, {"driver": "file", "node-name": "f", "filename": path, "discard": "unmap"}
            )
            assert await guest.read(0, 512) == b"x" * 512

    with_host(test)


def test_locks_stay_through_a_reopening() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        options = {"driver": "file", "node-name": "f", "filename": path}
        await host.add("file", "f", filename=path)
        await host.export("f")
        with open(path, "rb") as other:  # as another process would see it
            for direct in (True, False, True):
                await reopen(host, {**options, "cache": {"direct": direct}})
                assert locked(other.fileno()) == {"read", "write", "no-write"}
            await host.backend.block_export_del("e", "hard")
            assert locked(other.fileno()) == set()

    with_host(test)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"filename": "other"}, ["Cannot change the option 'filename' of node 'f' (file)"]),
        ({"locking": "off"}, ["Cannot change the option 'locking'"]),
        ({"driver": "null-co"}, ["Cannot change the option 'driver'"]),
        ({"node-name": "g"}, ["Failed to find node with node-name='g'"]),
        ({"node-name": None}, ["node-name not specified"]),
        ({"driver": None}, ["Parameter 'driver' is missing"]),
        ({"discrd": "unmap"}, ["Parameter 'discrd' is unexpected", "did you mean 'discard'?"]),
        ({"detect-zeroes": "unmap"}, ["setting detect-zeroes to unmap is not allowed"]),
        ({"aio": "native"}, ["requires cache.direct=on"]),
    ],
)
def test_options_that_cannot_be(change: dict[str, Any], texts: list[str]) -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path)
        before = picture(host.backend.graph)
        given = {"driver": "file", "node-name": "f", "filename": path, **change}
        with refused(*texts):
            await reopen(host, {name: value for name, value in given.items() if value is not None})
        assert picture(host.backend.graph) == before

    with_host(test)


def test_all_of_a_list_or_none() -> None:
    async def test(host: Host) -> None:
        await host.null("a")
        await host.null("b")
        await host.add("raw", "r", file="a")
        null = {"driver": "null-co", "size": MIB, "read-zeroes": True}
        before = picture(host.backend.graph)
        with refused("Cannot change the option 'driver' of node 'r'"):
            await reopen(
                host,
                {**null, "node-name": "a", "latency-ns": 1000},
                {"driver": "file", "node-name": "r", "filename": "/x"},
            )
        assert picture(host.backend.graph) == before
        await reopen(
            host,
            {**null, "node-name": "a", "latency-ns": 1000},
            {"driver": "raw", "node-name": "r", "file": "b"},
            {**null, "node-name": "b", "latency-ns": 2000},
        )
        graph = host.backend.graph
        assert [graph.node(n).options.latency_ns for n in "ab"] == [1000, 2000]
        assert roles(host, "r") == {"file": "b"}

    with_host(test)


def test_null_and_its_latency() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.export("n")
        null = {"driver": "null-co", "node-name": "n", "read-zeroes": True}
        async with host.device() as guest:
            await host.backend.block_resize("n", 2 * MIB)
            await reopen(host, {**null, "size": MIB, "latency-ns": 1000})
            assert host.backend.graph.node("n").size == 2 * MIB  # an option that did not change
            with refused("The size of export 'e' would change from 2097152 to 4194304"):
                await reopen(host, {**null, "size": 4 * MIB})
            await reopen(host, {**null, "size": 4 * MIB}, allow_size_change=True)
            assert (await guest.config()).capacity * 512 == 4 * MIB
            stats = {s.get("node-name"): s for s in host.backend.query_blockstats()}
            await guest.read(0, 512)
            assert stats["n"]

    with_host(test)


def test_a_window_moves() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        with open(path, "wb") as file:
            for number in range(16):
                file.write(bytes([number]) * 65536)
        await host.add("file", "f", filename=path)
        window = {"driver": "raw", "node-name": "r", "file": "f", "size": 65536}
        node = await host.add("raw", "r", file="f", size=65536)
        await host.export("r")
        async with host.device() as guest:
            for number in (3, 0, 15, 7):
                await reopen(host, {**window, "offset": number * 65536})
                assert await guest.read(0, 65536) == bytes([number]) * 65536
                assert (node.handle is None) == (number == 0)
            before = picture(host.backend.graph)
            with refused("The sum of offset (983041) and size (65536)"):
                await reopen(host, {**window, "offset": 15 * 65536 + 1})
            with refused("The size of export 'e' would change"):
                await reopen(host, {"driver": "raw", "node-name": "r", "file": "f"})
            assert picture(host.backend.graph) == before
            assert await guest.read(0, 512) == bytes([7]) * 512

    with_host(test)


def test_filters_with_other_operations() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        delay = await host.add("delay", "d", file="n")
        inject = await host.add("error-inject", "x", file="d", count=0)
        await host.export("x")
        assert delay.handle is None  # passive: it costs nothing
        fails = {"driver": "error-inject", "node-name": "x", "file": "d"}
        async with host.device() as guest:
            await reopen(host, {"driver": "delay", "node-name": "d", "file": "n", "read-ns": 1000})
            assert delay.handle is not None and delay.handle.operations == ["read"]
            await reopen(host, {**fails, "operations": "flush", "errno": "ENOSPC"})
            with pytest.raises(BlockError):
                await guest.flush()
            assert inject.handle.operations == ["flush"]
            with refused("Parameter 'errno' expects the name or number", "did you mean 'EIO'?"):
                await reopen(host, {**fails, "errno": "EI0"})
            await reopen(host, {**fails, "operations": "flush", "count": 0})
            await guest.flush()
            await reopen(host, {"driver": "delay", "node-name": "d", "file": "n"})
            assert delay.handle is None and delay.effective is host.backend.graph.node("n").handle

    with_host(test)


# ---- children


def test_children_of_any_role() -> None:
    async def test(host: Host) -> None:
        for name in "ab":
            await host.add("file", name, filename=host.file(name))
        await host.add("through", "x", file="a")
        await host.add("raw", "r", file="x")
        await host.export("r")
        raw = {"driver": "raw", "node-name": "r"}
        async with host.device() as guest:
            await guest.write(0, b"a" * 512)
            await reopen(host, {**raw, "file": "b"})
            assert await guest.read(0, 512) == bytes(512)
            await reopen(host, {**raw, "file": "x"}, {
                "driver": "through", "node-name": "x", "file": "b"})  # fmt: skip
            assert roles(host, "r") == {"file": "x"} and roles(host, "x") == {"file": "b"}
            await reopen(host, {"driver": "through", "node-name": "x", "file": "a"})
            assert await guest.read(0, 512) == b"a" * 512
            for texts, options in [
                (["Parameter 'file' is missing"], raw),
                (["Failed to find node with node-name='c'"], {**raw, "file": "c"}),
                (["would create a cycle"], {**raw, "file": "r"}),
                (["Cannot change the option 'file.driver' of node 'x'"],
                 {**raw, "file": {"driver": "raw", "file": "b"}}),
                (["Cannot change the option 'file.node-name' of node 'x'"],
                 {**raw, "file": {"driver": "through", "node-name": "y", "file": "a"}}),
            ]:  # fmt: skip
                before = picture(host.backend.graph)
                with refused(*texts):
                    await reopen(host, options)
                assert picture(host.backend.graph) == before

    with_host(test, Through)


def test_children_defined_inside_follow_their_parent() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        path = host.file("a")
        inner = {"driver": "file", "filename": path}
        await host.add("raw", "r", file=inner, discard="unmap")
        child = graph.node("#block0")
        assert child.options.discard == "unmap"
        # A reference to the child as it is: what it inherits changes with the parent.
        await reopen(host, {"driver": "raw", "node-name": "r", "file": "#block0"})
        assert child.options.discard == "ignore"
        await reopen(
            host, {"driver": "raw", "node-name": "r", "file": "#block0", "read-only": True}
        )
        assert child.read_only
        # A set of options: the child is reopened with those.
        options = {**inner, "cache": {"direct": True}}
        await reopen(host, {"driver": "raw", "node-name": "r", "file": options, "discard": "unmap"})
        assert child.options.cache.direct and child.options.discard == "unmap"
        assert not child.read_only and child is graph.node("#block0")
        # Replaced, it goes: it was its parent's.
        await host.null("n")
        await reopen(host, {"driver": "raw", "node-name": "r", "file": "n"})
        assert set(graph.nodes) == {"r", "n"}
        await host.backend.blockdev_del("r")
        assert set(graph.nodes) == {"n"}

    with_host(test)


def test_a_child_of_the_operators_own_does_not_follow() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("raw", "r", file="f")
        await reopen(host, {"driver": "raw", "node-name": "r", "file": "f", "discard": "unmap"})
        graph = host.backend.graph
        assert graph.node("f").options.discard == "ignore"
        assert graph.node("r").options.discard == "unmap"

    with_host(test)


def test_some_options_only() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        node = await host.add("file", "f", filename=host.file("a"), discard="unmap")
        raw = await host.add("raw", "r", file="f")
        async with graph.change() as change:
            change.reopen(node, {"read-only": True}, keep=True)
            change.reopen(raw, {"read-only": True}, keep=True)
        assert node.read_only and node.options.discard == "unmap" and raw.read_only
        assert graph.given_options(node) == {
            "driver": "file", "node-name": "f", "filename": host.path("a"),
            "discard": "unmap", "read-only": True,
        }  # fmt: skip

    with_host(test)


def test_lists_of_children_grow_and_shrink() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        for name in "abc":
            await host.add("file", name, filename=host.file(name))
        copies = await host.add("copies", "q", children=["a", "b"])
        await host.export("q")
        options = {"driver": "copies", "node-name": "q"}
        async with host.device() as guest, load(guest):
            for wanted in (["a", "b", "c"], ["a", "c"], ["a"], ["a", "c", "b"]):
                await reopen(host, {**options, "children": wanted})
                assert [child.node.name for child in copies.children.values()] == wanted
                assert list(copies.children) == [f"children.{i}" for i in range(len(wanted))]
                assert list(copies.child_index) == list(copies.children)
                for name in set("abc") - set(wanted):
                    assert not graph.parents_of(graph.node(name))
            before = picture(graph)
            with refused("Node 'q' has no child 'children.3' to reopen"):
                await reopen(host, {**options, "children": ["a", "c", "b", {"driver": "null-co"}]})
            with refused("Failed to find node with node-name='d'"):
                await reopen(host, {**options, "children": ["a", "c", "b", "d"]})
            assert picture(graph) == before
            inner = {"driver": "file", "filename": host.path("c"), "discard": "unmap"}
            await reopen(host, {**options, "children": ["a", inner, "b"]})
            assert graph.node("c").options.discard == "unmap"

    with_host(test, Copies)
