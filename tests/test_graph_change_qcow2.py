# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes around a format: between it and its file, below its backing file."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from typing import Any

import pytest
from graph_changes import Through, act, content, load, picture, roles, transaction
from in_process import MIB, Host, refused, with_host


def qemu_img(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        ["qemu-img", *arguments], check=True, capture_output=True, text=True, env=environment
    ).stdout


def create(path: str, *options: str, size: int = 64 * MIB) -> str:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, str(size))
    return path


async def disk(host: Host, name: str = "disk", **options: Any) -> Any:
    file = {"driver": "file", "node-name": f"{name}-file", "filename": create(host.path(name))}
    return await host.add("qcow2", name, file=file, **options)


def test_a_filter_between_a_format_and_its_file() -> None:
    async def test(host: Host) -> None:
        node = await disk(host)
        await host.export("disk")
        async with host.device() as guest:
            async with load(guest):
                for _ in range(10):
                    log = node.log.path
                    assert log.exists() and content(host, "disk")[88:96] != bytes(8)
                    await act(
                        host, "block-filter-insert",
                        node_name="disk", child="file",
                        filter={"driver": "through", "node-name": "x"},
                    )  # fmt: skip
                    through = host.backend.graph.node("x")
                    await host.until(lambda node=through: node.seen > 8)  # type: ignore[misc]
                    # The next process would not look for a log below a filter like this one.
                    assert node.log is None and not log.exists()
                    assert content(host, "disk")[88:96] == bytes(8)
                    await act(host, "block-filter-remove", node_name="x")
                    assert roles(host, "disk") == {"file": "disk-file"}
            # It grows through the filter, too.
            await act(
                host, "block-filter-insert",
                above="disk-file", filter={"driver": "through", "node-name": "x"},
            )  # fmt: skip
            for offset in range(0, 48 * MIB, 4 * MIB):
                await guest.write(offset, (offset // MIB + 1).to_bytes(4) * (MIB // 4))
            await act(host, "block-filter-remove", node_name="x")
            for offset in range(48 * MIB, 64 * MIB, 4 * MIB):
                await guest.write(offset, (offset // MIB + 1).to_bytes(4) * (MIB // 4))
            for offset in range(0, 64 * MIB, 4 * MIB):
                assert await guest.read(offset, MIB) == (offset // MIB + 1).to_bytes(4) * (MIB // 4)
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("disk")
        qemu_img("check", host.path("disk"))

    with_host(test, Through)


def test_a_filter_that_was_there_before_the_file_grew() -> None:
    async def test(host: Host) -> None:
        await disk(host)
        early = await host.add("through", "early", file="disk-file")
        raw = await host.add("raw", "spare", file="early")
        await host.export("disk")
        async with host.device() as guest:
            for offset in range(0, 16 * MIB, MIB):
                await guest.write(offset, b"1" * MIB)
            await act(host, "block-filter-insert", node_name="disk", child="file", filter="early")
            size = host.backend.graph.node("disk-file").size
            assert size > 16 * MIB and early.size == raw.size == size
            for offset in range(16 * MIB, 32 * MIB, MIB):
                await guest.write(offset, b"2" * MIB)
            await act(host, "block-filter-remove", node_name="early", keep=True)
            await guest.write(32 * MIB, b"3" * 4 * MIB)
            await host.add("through", "above", file="spare")
            assert host.backend.graph.node("above").size > 36 * MIB
            for offset in range(0, 32 * MIB, MIB):
                assert await guest.read(offset, MIB) == (b"2" if offset >= 16 * MIB else b"1") * MIB
        await host.backend.block_export_del("e", "hard")
        for name in ("above", "spare", "early", "disk"):
            await host.backend.blockdev_del(name)
        qemu_img("check", host.path("disk"))

    with_host(test, Through)


def test_storage_below_a_format_is_replaced_by_a_copy() -> None:
    async def test(host: Host) -> None:
        await disk(host)
        await host.export("disk")
        async with host.device() as guest:
            await guest.write(0, b"x" * MIB)
            await guest.flush()

            async def copy() -> None:  # in the pause: nothing is being written
                shutil.copy(host.path("disk"), host.path("copy"))

            host.file("copy", 0)
            qemu_img("resize", "-q", "-f", "raw", host.path("copy"), str(8 * MIB))
            new = await host.add("file", "new", filename=host.path("copy"))
            graph = host.backend.graph
            async with graph.change() as change:
                change.inside(copy)
                change.replace_child(graph.node("disk"), "file", new)
            assert set(graph.nodes) == {"disk", "new"}  # the old file was the format's own
            await guest.write(MIB, b"y" * MIB)
            await guest.flush()
            assert await guest.read(0, 2 * MIB) == b"x" * MIB + b"y" * MIB
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("disk")
        qemu_img("check", host.path("copy"))
        assert qemu_img("map", host.path("copy")).count(host.path("copy")) >= 1

    with_host(test)


async def replace(host: Host, node: str, new: str) -> None:
    place = {"parent_type": "driver", "node_name": node, "child": "file"}
    await act(host, "blockdev-replace", **place, new_child=new)


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_storage_that_does_not_hold_the_image(format: str) -> None:
    async def test(host: Host) -> None:
        image = host.path("disk")
        qemu_img("create", "-q", "-f", format, image, str(64 * MIB))
        file = {"driver": "file", "filename": image}
        node = await host.add(format, "disk", file=file)
        shutil.copy(image, host.path("early"))
        await host.export("disk")
        async with host.device() as guest:
            await guest.write(0, b"x" * MIB)
            await guest.flush()
            qemu_img("create", "-q", "-f", format, host.path("another"), str(32 * MIB))
            with open(host.path("raw"), "wb") as raw:
                raw.write(b"P" * 8 * MIB)
            with open(image, "rb") as whole, open(host.path("short"), "wb") as short:
                short.write(whole.read(MIB // 2))
            stored = {name: content(host, name) for name in ("another", "raw", "short", "early")}
            for name in stored:
                if (format, name) != ("qed", "early"):  # which cannot be told from a good one
                    await host.add("file", name, filename=host.path(name))
                    with refused("cannot become the file of node 'disk'", "no copy of the image"):
                        await replace(host, "disk", name)
                    assert content(host, name) == stored[name]
            assert roles(host, "disk")["file"] != "short"
            await guest.write(MIB, b"y" * MIB)
            await guest.flush()
            assert await guest.read(0, 2 * MIB) == b"x" * MIB + b"y" * MIB
            # One that is good is put back when another part of the change fails.
            shutil.copy(image, host.path("copy"))
            copied = content(host, "copy")
            await host.add("file", "copy", filename=host.path("copy"))
            create(host.path("disk2"))
            file = {"driver": "file", "filename": host.path("disk2")}
            await host.add("qcow2", "disk2", file=file)
            replacements = [
                {"parent-type": "driver", "node-name": name, "child": "file", "new-child": new}
                for name, new in (("disk", "copy"), ("disk2", "raw"))
            ]
            before = picture(host.backend.graph, sizes=False)
            with refused("cannot become the file of node 'disk2'"):
                await transaction(host, *(("blockdev-replace", r) for r in replacements))
            assert picture(host.backend.graph, sizes=False) == before
            if format == "qcow2":
                assert content(host, "copy")[:512] == copied[:512]
                assert node.log.path.exists() and node.map.log is node.log
                assert content(host, "disk")[88:96] == copied[88:96] != bytes(8)
            await guest.write(2 * MIB, b"z" * MIB)
            await guest.flush()
            await host.backend.blockdev_del("copy")
            shutil.copy(image, host.path("copy"))
            await host.add("file", "copy", filename=host.path("copy"))
            await replace(host, "disk", "copy")
            await guest.write(3 * MIB, b"w" * MIB)
            wanted = b"".join(bytes([value]) * MIB for value in b"xyzw")
            assert await guest.read(0, 4 * MIB) == wanted
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("disk")
        for name in ("disk", "copy"):
            qemu_img("check", "-f", format, host.path(name))
        assert content(host, "disk")[88:96] == content(host, "copy")[88:96] == bytes(8) or (
            format == "qed"
        )

    with_host(test)


def test_under_the_backing_file() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "base", filename=host.file("base", 64 * MIB))
        await disk(host, backing="base")
        await host.export("disk")
        async with host.device() as guest:
            async with load(guest):
                for _ in range(5):
                    await act(
                        host, "block-filter-insert",
                        node_name="disk", child="backing",
                        filter={"driver": "through", "node-name": "x"},
                    )  # fmt: skip
                    assert roles(host, "disk")["backing"] == "x"
                    await guest_reads_elsewhere(host)
                    await act(host, "block-filter-remove", node_name="x")
            before = picture(host.backend.graph)
            reopen = {"driver": "qcow2", "node-name": "disk", "file": "disk-file"}
            with refused("backing is missing for 'disk'"):
                await act(host, "blockdev-reopen", options=[reopen])
            with refused("Permission conflict on node 'base'"):
                await host.export("base", "writer")
            with refused("would create a cycle"):
                await act(host, "blockdev-reopen", options=[{**reopen, "backing": "disk"}])
            assert picture(host.backend.graph) == before
            await act(host, "blockdev-reopen", options=[{**reopen, "backing": "base"}])
            await host.write("base", 32 * MIB, b"b" * 512)
            assert await guest.read(32 * MIB, 512) == b"b" * 512
            await act(host, "blockdev-reopen", options=[{**reopen, "backing": None}])
            assert "backing" not in roles(host, "disk")
            assert await guest.read(32 * MIB, 512) == bytes(512)
            await act(host, "blockdev-reopen", options=[{**reopen, "backing": "base"}])
            assert await guest.read(32 * MIB, 512) == b"b" * 512

    async def guest_reads_elsewhere(host: Host) -> None:
        assert await host.read("disk", 40 * MIB, 512) == bytes(512)
        assert host.backend.graph.node("x").seen > 0

    with_host(test, Through)


def test_options_of_a_format_and_of_its_file() -> None:
    async def test(host: Host) -> None:
        node = await disk(host)
        await host.export("disk")
        file = host.backend.graph.node("disk-file")
        inner = {"driver": "file", "filename": host.path("disk")}
        reopen = {"driver": "qcow2", "node-name": "disk"}
        async with host.device() as guest, load(guest):
            before = picture(host.backend.graph, sizes=False)
            with refused("read-only"):
                await act(host, "blockdev-reopen", options=[{**reopen, "file": "disk-file",
                                                             "read-only": True}])  # fmt: skip
            assert picture(host.backend.graph, sizes=False) == before
            options = {**reopen, "file": {**inner, "cache": {"direct": True}}, "discard": "unmap"}
            await act(host, "blockdev-reopen", options=[options])
            assert file.options.cache.direct and file.options.discard == "unmap"
            assert node.options.discard == "unmap"
            await act(host, "blockdev-reopen", options=[{**reopen, "file": "disk-file"}])
            assert file.options.cache.direct and file.options.discard == "ignore"
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("disk")
        qemu_img("check", host.path("disk"))

    with_host(test)


def test_snapshots_filters_and_additions_in_one_transaction() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        await disk(host)
        await host.export("disk")
        drive = graph.backend("e")
        actions = [
            ("blockdev-add", {"driver": "null-co", "node-name": "spare"}),
            (
                "block-filter-insert",
                {"export-id": "e", "filter": {"driver": "through", "node-name": "x"}},
            ),
            (
                "blockdev-snapshot-sync",
                {
                    "device": "e",
                    "snapshot-file": host.path("overlay"),
                    "snapshot-node-name": "top",
                },
            ),
            (
                "block-filter-insert",
                {
                    "node-name": "top",
                    "child": "file",
                    "filter": {"driver": "through", "node-name": "y"},
                },
            ),
        ]
        async with host.device() as guest:
            await guest.write(MIB, b"before" * 512)
            async with load(guest):
                before, files = picture(graph, sizes=False), sorted(os.listdir(host.directory))
                with refused("Transaction aborted"):
                    await transaction(host, *actions, ("abort", {}))
                assert (
                    picture(graph, sizes=False) == before
                    and sorted(os.listdir(host.directory)) == files
                )
                result = await transaction(host, *actions)
                assert result["pause-us"] > 0
                assert [n.name for n in drive.filters] == ["x"]
                assert drive.top_node_below_filters.name == "top"
                assert roles(host, "top") == {"file": "y", "backing": "disk"}
                await host.until(lambda: bool(graph.node("disk").read_only))
            await guest.write(MIB, b"after!" * 512)
            assert await guest.read(MIB, 3072) == b"after!" * 512
        await host.backend.block_export_del("e", "hard")
        for name in ("x", "top", "y", "disk", "spare"):
            await host.backend.blockdev_del(name)
        assert not graph.nodes
        for name in ("disk", "overlay"):
            qemu_img("check", host.path(name))
        qemu_img("convert", "-f", "qcow2", "-O", "raw", host.path("disk"), host.path("raw"))
        assert content(host, "raw")[MIB : MIB + 3072] == b"before" * 512

    with_host(test, Through)


def test_what_becomes_of_discards_changes_live() -> None:
    async def test(host: Host) -> None:
        await disk(host, discard="unmap")
        await host.export("disk")
        reopen = {"driver": "qcow2", "node-name": "disk", "file": "disk-file"}

        def allocated() -> int:
            return os.stat(host.path("disk")).st_blocks * 512

        async with host.device() as guest:
            for options, gives_back in (
                ({"discard": "unmap"}, True),
                ({}, False),
                ({"pass-discard-request": True, "discard": "unmap"}, True),
                ({"pass-discard-request": False, "discard": "unmap"}, False),
            ):
                await act(host, "blockdev-reopen", options=[{**reopen, **options}])
                await guest.write(0, b"x" * 4 * MIB)
                await guest.flush()
                full = allocated()
                await guest.discard((0, 4 * MIB))
                await guest.flush()
                if gives_back:  # when nobody can be on the way there any more
                    await host.until(lambda full=full: allocated() <= full - 3 * MIB)  # type: ignore[misc]
                else:
                    await asyncio.sleep(0.05)
                    assert allocated() > full - MIB, options
            before = picture(host.backend.graph)
            for texts, options in (
                (["Cannot change the option 'l2-cache-size'"], {"l2-cache-size": MIB}),
                (
                    ["discard-no-unref without pass-discard-request"],
                    {"discard-no-unref": True, "pass-discard-request": False},
                ),
            ):
                with refused(*texts):
                    await act(host, "blockdev-reopen", options=[{**reopen, **options}])
            assert picture(host.backend.graph) == before
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("disk")
        qemu_img("check", host.path("disk"))

    with_host(test)
