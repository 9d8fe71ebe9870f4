# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes, edges, names, permissions, sizes."""

from __future__ import annotations

import os
import subprocess

import pytest
from in_process import MIB, Host, refused, with_host

from vhostblk.graph import BlockBackend
from vhostblk.nodes.driver import Perm
from vhostblk.schema import VhostblkError


def test_raw_is_left_out_of_the_engines_picture_unless_it_has_an_offset() -> None:
    async def test(host: Host) -> None:
        file = await host.add("file", "f", filename=host.file("a"))
        plain = await host.add("raw", "r", file="f")
        window = await host.add("raw", "w", file="r", offset=4096, size=8192)
        assert plain.handle is None and plain.effective is file.handle
        assert window.handle is not None and window.size == 8192
        await host.write("w", 0, b"x" * 512)
        assert await host.read("f", 4096, 512) == b"x" * 512

    with_host(test)


def test_nested_definitions_inherit_and_go_with_their_parent() -> None:
    async def test(host: Host) -> None:
        inner = {"driver": "file", "filename": host.file("a")}
        await host.add("raw", "r", file=inner, read_only=True, discard="unmap")
        nodes = {n["node-name"]: n for n in host.backend.query_named_block_nodes()}
        assert set(nodes) == {"r", "#block0"}
        assert nodes["#block0"]["ro"]
        assert host.backend.graph.node("#block0").options.discard == "unmap"
        with refused("Node '#block0' is in use: by node 'r' as 'file'"):
            await host.backend.blockdev_del("#block0")
        await host.backend.blockdev_del("r")
        assert not host.backend.graph.nodes

    with_host(test)


def test_a_failed_addition_leaves_nothing_behind() -> None:
    async def test(host: Host) -> None:
        before = len(os.listdir("/proc/self/fd"))
        inner = {"driver": "file", "filename": host.file("a"), "node-name": "f"}
        with refused("Offset (2097152) cannot be greater than"):
            await host.add("raw", "r", file=inner, offset="2M")
        with refused("'node-name' must be specified"):
            await host.backend.blockdev_add({"driver": "raw", "file": inner})
        assert not host.backend.graph.nodes
        assert len(os.listdir("/proc/self/fd")) == before

    with_host(test)


def test_names() -> None:
    async def test(host: Host) -> None:
        await host.null("a")
        with refused("Duplicate nodes with node-name='a'"):
            await host.null("a")
        with refused("Parameter 'file.node-name'", "starts with a letter"):
            await host.add("raw", "r", file={"driver": "null-co", "node-name": "0"})
        with refused("Failed to find node with node-name='aa'", "did you mean 'a'?"):
            await host.backend.blockdev_del("aa")
        with refused("'driver' does not accept value 'nul-co'", "did you mean 'null-co'?"):
            await host.add("nul-co", "x")
        with refused("'file.driver' does not accept value 'fil'", "did you mean 'file'?"):
            await host.add("raw", "x", file={"driver": "fil"})
        with refused("Parameter 'file.driver' is missing"):
            await host.add("raw", "x", file={})
        with refused("Parameter 'filename' is missing"):
            await host.add("file", "x")

    with_host(test)


def test_a_node_in_use_says_by_whom() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.export("n")
        with refused("Node 'n' is in use: by export 'e' as 'root'"):
            await host.backend.blockdev_del("n")
        await host.backend.block_export_del("e")
        await host.backend.blockdev_del("n")

    with_host(test)


def test_two_writers_only_if_they_share() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.export("n", "one")
        with refused(
            "Permission conflict on node 'n': permissions 'write' are both required by "
            "export 'two' (uses node 'n' as 'root' child) and unshared by export 'one'"
        ):
            await host.export("n", "two")
        with refused("Permission conflict"):
            await host.export("n", "two", writable=False)  # nor a reader that wants calm
        await host.backend.block_export_del("one")
        await host.export("n", "one", share_rw=True)
        await host.export("n", "two", share_rw=True)
        assert len(host.backend.query_block_exports()) == 2

    with_host(test)


def test_a_conflict_is_found_below_filters_too() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.add("raw", "a", file="n")
        await host.add("raw", "b", file="n")
        await host.export("a", "one")
        with refused("Permission conflict on node 'n'", "node 'b'", "node 'a'"):
            await host.export("b", "two")

    with_host(test)


def test_readers_do_not_disturb_each_other() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        for i in range(3):
            await host.export("n", f"e{i}", writable=False)

    with_host(test)


def test_read_only_nodes_are_not_exported_writable() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path, read_only=True)
        await host.add("raw", "r", file="f")
        with refused("Cannot export read-only node 'f' as writable"):
            await host.export("f")
        with refused("Block node 'f' is read-only"):
            await host.export("r")
        await host.export("r", writable=False)
        assert host.backend.graph.permissions_of(host.backend.graph.node("f"))[0] == (
            Perm.CONSISTENT_READ
        )

    with_host(test)


def test_resize_reaches_the_file_and_everyone_above() -> None:
    async def test(host: Host) -> None:
        path = host.file("a", MIB)
        await host.add("raw", "r", file={"driver": "file", "filename": path, "node-name": "f"})
        await host.export("r")
        await host.backend.block_resize("r", 2 * MIB)
        assert os.path.getsize(path) == 2 * MIB
        assert host.backend.query_block_exports()[0]["size"] == 2 * MIB
        await host.backend.block_resize("f", MIB // 2)
        assert host.backend.graph.node("r").size == MIB // 2
        assert host.backend.query_block_exports()[0]["size"] == MIB // 2
        drive = host.backend.query_block_exports()[0]["id"]
        await host.backend.block_resize(None, MIB, drive)
        assert host.backend.graph.node("r").size == os.path.getsize(path) == MIB
        with refused("Export 'r2' is not found"):
            await host.backend.block_resize(None, MIB, "r2")
        with refused("One of 'device' (an export) and 'node-name' must be given"):
            await host.backend.block_resize(None, MIB)

    with_host(test)


def test_resize_that_cannot_be() -> None:
    async def test(host: Host) -> None:
        path = host.file("a", MIB)
        await host.add("file", "f", filename=path)
        await host.add("raw", "w", file="f", size=4096)
        with refused("Cannot resize fixed-size raw disks"):
            await host.backend.block_resize("w", 8192)
        with refused("cannot be resized: node 'w' does not allow it"):
            await host.backend.block_resize("f", 8192)
        await host.add("file", "ro", filename=path, read_only=True)
        with refused("Block node 'ro' is read-only"):
            await host.backend.block_resize("ro", 0)

    with_host(test)


def test_block_backend_knows_its_filters_and_what_is_below() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        raw = await host.add("raw", "r", file="n")
        inner = await host.add("delay", "inner", file="r")
        outer = await host.add("error-inject", "outer", file="inner")
        backend = BlockBackend(host.backend.graph, "drive", outer, perm=Perm.NONE, shared=Perm.ALL)
        assert backend.filters == [outer, inner]
        assert backend.top_node_below_filters is raw
        assert backend.top_nodes_below_filters == [raw]

    with_host(test)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            {"filename": "{dir}/none"},
            ["Could not open", "No such file", "file system mounted?"],
        ),
        ({"filename": "{dir}/no/ne"}, ["Could not open", "no' does not exist"]),
        ({"filename": "{dir}"}, ["Is a directory"]),
        ({"filename": "/dev/null"}, ["requires '/dev/null' to be a regular file", "special file"]),
        ({"filename": "{dir}/a", "aio": "native"}, ["aio=native", "requires cache.direct=on"]),
        ({"filename": "{dir}/a", "aio": "nativ"}, ["allowed: threads, native, io_uring"]),
        ({"filename": "{dir}/a", "detect-zeroes": "unmap"}, ["detect-zeroes to unmap"]),
        ({"filename": "{dir}/a", "force-share": True}, ["read-only images"]),
        ({"filename": "{dir}/a", "filenam": "x"}, ["'filenam' is unexpected", "'filename'?"]),
    ],
)
def test_files_that_cannot_be_opened(options: dict[str, str], texts: list[str]) -> None:
    async def test(host: Host) -> None:
        host.file("a")
        filename = options["filename"].format(dir=host.directory)
        with refused(*texts):
            await host.add("file", "f", **{**options, "filename": filename})

    with_host(test)


def test_a_file_that_is_no_disk() -> None:
    async def test(host: Host) -> None:
        with refused("requires", "to be a block device", "use driver 'file'"):
            await host.add("host_device", "f", filename=host.file("a"))

    with_host(test)


def test_direct_io_and_odd_sizes() -> None:
    async def test(host: Host) -> None:
        path = host.file("odd", 1000)
        file = await host.add("file", "f", filename=path, cache={"direct": "on"})
        assert file.size == 1024  # whole sectors, as QEMU sees it
        assert await host.read("f", 512, 512) == bytes(512)

    with_host(test)


def test_error_data_is_for_programs() -> None:
    async def test(host: Host) -> None:
        with pytest.raises(VhostblkError) as caught:
            await host.add("file", "f", filename=host.path("none"))
        assert caught.value.data is not None
        assert caught.value.data["filename"] == host.path("none")
        assert caught.value.error_class == "GenericError"

    with_host(test)


def test_resize_through_filters() -> None:
    async def test(host: Host) -> None:
        path = host.file("a", MIB)
        await host.add("file", "f", filename=path)
        await host.add("delay", "d", file="f", **{"read-ns": 1})
        await host.add("error-inject", "x", file="d", operations="flush")
        await host.backend.block_resize("x", 4096)
        assert os.path.getsize(path) == host.backend.graph.node("x").size == 4096
        assert await host.read("x", 3584, 512) == bytes(512)

    with_host(test)


def test_a_file_that_can_only_be_read() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
            pytest.skip("needs root and a file system with immutable files")
        try:
            with refused("Could not open", "read-only=on or auto-read-only=on"):
                await host.add("file", "f", filename=path)
            node = await host.add("file", "f", filename=path, auto_read_only=True)
            assert node.read_only
        finally:
            subprocess.run(["chattr", "-i", path], check=True)

    with_host(test)


def test_a_block_device() -> None:
    async def test(host: Host) -> None:
        made = subprocess.run(
            ["losetup", "--find", "--show", host.file("a", MIB)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            pytest.skip("needs root and loop devices")
        device = made.stdout.strip()
        try:
            with refused("to be a regular file", "use driver 'host_device'"):
                await host.add("file", "d", filename=device)
            for name, direct in (("d", True), ("c", False)):
                node = await host.add(
                    "host_device", name, filename=device, cache={"direct": direct}
                )
                assert node.size == MIB
                await host.write(name, 512, b"x" * 512)
                assert await host.read(name, 0, 1024) == bytes(512) + b"x" * 512
            with refused("Cannot grow device files"):
                await host.backend.block_resize("d", 2 * MIB)
            for name in ("c", "d"):
                await host.backend.blockdev_del(name)
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)

    with_host(test)


def test_detect_zeroes_works_where_data_are_stored() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path)
        with refused("Parameter 'detect-zeroes' has no effect on driver 'raw'", "below 'f'"):
            await host.add("raw", "r", file="f", detect_zeroes="on")
        await host.backend.blockdev_del("f")
        inner = {"driver": "file", "filename": path, "node-name": "f"}
        await host.add("raw", "r", file=inner, detect_zeroes="unmap", discard="unmap")
        await host.write("r", 0, b"x" * MIB)
        await host.write("r", 0, bytes(MIB))
        assert os.stat(path).st_blocks == 0

    with_host(test)
