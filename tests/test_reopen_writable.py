# SPDX-License-Identifier: GPL-2.0-or-later
"""Formats that go from read-only to writable and back where they are (blockdev-reopen)."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crash import Tools
from crash.tools import all_tools
from graph_changes import act, load, picture, transaction
from in_process import MIB, Host, refused, with_host
from test_graph_change_reopen import locked, reopen

from vhostblk.engine import OP_FLUSH
from vhostblk.schema import VhostblkError

TOOLS = all_tools()
SIZE = 8 * MIB
FORMATS = ["qcow2", "qed"]

pytestmark = pytest.mark.skipif(not TOOLS, reason="qemu-img is not here")


@pytest.fixture(scope="module")
def tools() -> Tools:
    return TOOLS[-1]


def new_image(tools: Tools, path: Path, form: str = "qcow2", **options: Any) -> Path:
    tools.create(path, SIZE, form, **options)
    return path


def judge(tools: Tools, path: Path, form: str = "qcow2") -> None:
    check = tools.check(path, format=form)
    assert (check.corruptions, check.leaks, check.errors) == (0, 0, 0), check.text


class Image:
    """A node `disk`, its file defined inside, and the options for the other state."""

    def __init__(self, host: Host, path: Path, form: str = "qcow2", **more: Any) -> None:
        self.host = host
        self.path = path
        self.options = {
            "driver": form,
            "node-name": "disk",
            "file": {"driver": "file", "filename": str(path)},
            **more,
        }

    async def open(self, *, read_only: bool = True) -> Any:
        await self.host.backend.blockdev_add({**self.options, "read-only": read_only})
        return self.host.backend.graph.node("disk")

    def as_(self, *, read_only: bool) -> dict[str, Any]:
        return {**self.options, "read-only": read_only}

    async def writable(self) -> None:
        await reopen(self.host, self.as_(read_only=False))

    async def read_only(self) -> None:
        await reopen(self.host, self.as_(read_only=True))

    def locks(self) -> set[str]:
        with open(self.path, "rb") as other:
            return locked(other.fileno())


async def flush(host: Host) -> None:
    await host.backend.engine.submit(host.backend.graph.node("disk").effective, OP_FLUSH, 0, None)


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back_with_guests(tmp_path: Path, tools: Tools, form: str) -> None:
    path = new_image(tools, tmp_path / "a", form)
    expected = bytearray(SIZE)

    async def test(host: Host) -> None:
        image = Image(host, path, form)
        node = await image.open()
        descriptors = []
        for number in range(1, 6):
            assert "write" not in image.locks()
            with refused("read-only"):
                await host.export("disk")
            await image.writable()
            assert not node.read_only and "write" in image.locks()
            await host.export("disk")
            async with host.device() as guest:
                data = bytes([number]) * (MIB + 512)
                await guest.write(number * MIB, data)
                expected[number * MIB : number * MIB + len(data)] = data
                with refused("it is written to"):
                    await image.read_only()
                assert await guest.read(number * MIB, len(data)) == data
            await host.backend.block_export_del("e", "hard")
            await image.read_only()
            assert node.read_only and "write" not in image.locks()
            # At rest now: others may read it.
            judge(tools, path, form)
            assert await host.read("disk", 0, SIZE) == expected
            assert tools.content(path, form) == expected
            descriptors.append(len(os.listdir("/proc/self/fd")))
        assert descriptors[0] == descriptors[-1]
        await host.backend.blockdev_del("disk")

    with_host(test)
    assert tools.content(path, form) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_a_reader_goes_on(tmp_path: Path, tools: Tools, form: str) -> None:
    """An export that only reads does not notice."""
    path = new_image(tools, tmp_path / "a", form)

    async def test(host: Host) -> None:
        image = Image(host, path, form)
        await image.open(read_only=False)
        await host.write("disk", MIB, b"x" * MIB)
        await flush(host)
        await host.export("disk", writable=False)
        async with host.device() as guest:
            for _ in range(10):
                await image.read_only()
                assert await guest.read(MIB, MIB) == b"x" * MIB
                await image.writable()
                assert await guest.read(MIB, MIB) == b"x" * MIB
        await host.backend.block_export_del("e", "hard")
        await host.write("disk", 0, b"y" * MIB)
        await host.backend.blockdev_del("disk")

    with_host(test)
    assert tools.content(path, form)[: 2 * MIB] == b"y" * MIB + b"x" * MIB
    judge(tools, path, form)


def header_word(path: Path, offset: int, form: str) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def patch(path: Path, offset: int, form: str, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


def test_what_was_not_closed_is_repaired(tmp_path: Path, tools: Tools) -> None:
    path = new_image(tools, tmp_path / "a", lazy_refcounts="on")
    tools.io(path, "write -P 1 0 1M")
    patch(path, 72, ">Q", 1)  # incompatible features: dirty
    table = header_word(path, 48, ">Q")
    block = header_word(path, table, ">Q")
    patch(path, block + 2 * 6, ">H", 0)  # a cluster that is used counts as free

    async def test(host: Host) -> None:
        image = Image(host, path)
        await image.open()
        assert header_word(path, 72, ">Q") & 1
        await image.writable()
        await host.write("disk", 4 * MIB, b"y" * MIB)
        await host.backend.blockdev_del("disk")

    with_host(test)
    judge(tools, path)
    content = tools.content(path)
    assert content[:MIB] == b"\1" * MIB and content[4 * MIB : 5 * MIB] == b"y" * MIB


def test_qed_that_was_not_closed_is_checked(tmp_path: Path, tools: Tools) -> None:
    path = new_image(tools, tmp_path / "a", "qed")
    tools.io(path, "write -P 1 0 1M", options=("-f", "qed"))
    patch(path, 16, "<Q", 2)  # features: need check

    async def test(host: Host) -> None:
        image = Image(host, path, "qed")
        await image.open()
        assert header_word(path, 16, "<Q") & 2
        await image.writable()
        assert not header_word(path, 16, "<Q") & 2
        await host.backend.blockdev_del("disk")

    with_host(test)
    judge(tools, path, "qed")


def test_corrupt_images_stay_as_they_are(tmp_path: Path, tools: Tools) -> None:
    path = new_image(tools, tmp_path / "a")
    patch(path, 72, ">Q", 2)  # incompatible features: corrupt

    async def test(host: Host) -> None:
        image = Image(host, path)
        await image.open()
        before, bytes_before = picture(host.backend.graph), path.read_bytes()
        with refused("is corrupt; cannot be opened read/write"):
            await image.writable()
        assert picture(host.backend.graph) == before
        assert path.read_bytes() == bytes_before and "write" not in image.locks()
        assert await host.read("disk", 0, MIB) == bytes(MIB)

    with_host(test)


class Boom(Exception):
    pass


@pytest.mark.parametrize("form", FORMATS)
def test_a_later_step_fails(tmp_path: Path, tools: Tools, form: str) -> None:
    """The state file cannot be written: everything is as it was, byte for byte."""
    path = new_image(tools, tmp_path / "a", form)
    tools.io(path, "write -P 1 0 1M", options=("-f", form))

    async def test(host: Host) -> None:
        image = Image(host, path, form)
        await image.open()
        graph = host.backend.graph
        before, bytes_before = picture(graph), path.read_bytes()
        saved, graph.on_switched = graph.on_switched, fail
        for _ in range(3):
            with pytest.raises(Boom):
                await image.writable()
            assert picture(graph) == before and "write" not in image.locks()
            assert path.read_bytes() == bytes_before
            assert await host.read("disk", 0, 2 * MIB) == b"\1" * MIB + bytes(MIB)
        graph.on_switched = saved
        await image.writable()
        await host.write("disk", MIB, b"y" * MIB)
        await host.backend.blockdev_del("disk")

    async def fail() -> None:
        raise Boom

    with_host(test)
    judge(tools, path, form)
    assert tools.content(path, form)[: 2 * MIB] == b"\1" * MIB + b"y" * MIB


def test_a_later_step_and_a_read_fail(tmp_path: Path, tools: Tools) -> None:
    """What cannot be read again is not served from old tables; nor is an image called corrupt."""
    path = new_image(tools, tmp_path / "a")
    tools.io(path, "write -P 1 0 1M")
    before = path.read_bytes()
    given_up: list[bool] = []

    def attempt(skip: int) -> None:
        async def test(host: Host) -> None:
            await host.add("file", "f", filename=str(path))
            broken = {"file": "f", "operations": ["read"], "skip": skip, "count": 1}
            await host.add("error-inject", "broken", **broken)
            options = {"driver": "qcow2", "node-name": "disk", "file": "broken"}
            try:
                await host.backend.blockdev_add({**options, "read-only": True})
            except (OSError, VhostblkError):
                return
            host.backend.graph.on_switched = fail
            with pytest.raises((Boom, VhostblkError)):
                await reopen(host, {**options, "read-only": False})
            host.backend.graph.on_switched = None
            await act(host, "block-filter-remove", node_name="broken")
            lost = host.named("BLOCK_IMAGE_CORRUPTED")
            given_up.append(bool(lost))
            if lost:
                assert lost[0]["fatal"] and "cannot be read again" in lost[0]["msg"]
                with pytest.raises(OSError):
                    await host.read("disk", 0, MIB)
            else:
                assert await host.read("disk", 0, 2 * MIB) == b"\1" * MIB + bytes(MIB)

        path.write_bytes(before)
        with_host(test)
        judge(tools, path)

    async def fail() -> None:
        raise Boom

    for skip in range(24):
        attempt(skip)
    assert True in given_up and not given_up[-1]


def test_one_of_two_fails(tmp_path: Path, tools: Tools) -> None:
    """The other image, already writable, is read-only again; a transaction as a whole."""
    good, bad = new_image(tools, tmp_path / "a"), new_image(tools, tmp_path / "b")
    patch(bad, 72, ">Q", 2)

    async def test(host: Host) -> None:
        one = Image(host, good)
        await one.open()
        other = {**one.options, "node-name": "other", "read-only": True,
                 "file": {"driver": "file", "filename": str(bad)}}  # fmt: skip
        await host.backend.blockdev_add(other)
        before, bytes_before = picture(host.backend.graph), good.read_bytes()
        with refused("is corrupt"):
            await transaction(
                host,
                ("blockdev-reopen", {"options": [one.as_(read_only=False)]}),
                ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": MIB}),
                ("blockdev-reopen", {"options": [{**other, "read-only": False}]}),
            )
        assert picture(host.backend.graph) == before and good.read_bytes() == bytes_before
        assert "write" not in one.locks()
        await one.writable()

    with_host(test)


def test_an_image_that_another_process_writes_to(tmp_path: Path, tools: Tools) -> None:
    """Without the lock nothing is written."""
    path = new_image(tools, tmp_path / "a")

    async def test(host: Host) -> None:
        image = Image(host, path)
        await image.open()
        before, bytes_before = picture(host.backend.graph), path.read_bytes()
        with open(path, "rb") as other:
            for byte in (201, 203):  # somebody who does not share writing
                lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
                fcntl.fcntl(other.fileno(), fcntl.F_OFD_SETLK, lock)
            with refused("is another process using the image"):
                await image.writable()
            assert picture(host.backend.graph) == before
            assert path.read_bytes() == bytes_before
        await image.writable()

    with_host(test)


def test_bitmaps_are_out_of_date_only_if_it_worked(tmp_path: Path, tools: Tools) -> None:
    path = new_image(tools, tmp_path / "a")
    tools.img("bitmap", "--add", str(path), "b0")

    async def test(host: Host) -> None:
        image = Image(host, path)
        await image.open()
        graph, bytes_before = host.backend.graph, path.read_bytes()

        async def fail() -> None:
            raise Boom

        saved, graph.on_switched = graph.on_switched, fail
        with pytest.raises(Boom):
            await image.writable()
        graph.on_switched = saved
        assert path.read_bytes() == bytes_before
        await image.writable()
        await host.backend.blockdev_del("disk")

    with_host(test)
    assert "in-use" in tools.img("info", str(path))


def test_a_file_of_the_operators_own_must_be_writable_first(tmp_path: Path, tools: Tools) -> None:
    path = new_image(tools, tmp_path / "a")
    file = {"driver": "file", "node-name": "f", "filename": str(path)}
    disk = {"driver": "qcow2", "node-name": "disk", "file": "f"}

    async def test(host: Host) -> None:
        await host.backend.blockdev_add({**file, "read-only": True})
        await host.backend.blockdev_add({**disk, "read-only": True})
        bytes_before = path.read_bytes()
        with refused("read-only"):
            await reopen(host, disk)
        assert path.read_bytes() == bytes_before
        # Both, in either order.
        await reopen(host, disk, file)
        await host.write("disk", 0, b"x" * MIB)
        await reopen(host, {**file, "read-only": True}, {**disk, "read-only": True})
        assert await host.read("disk", 0, MIB) == b"x" * MIB
        await reopen(host, file, disk)
        await host.write("disk", MIB, b"y" * MIB)
        assert await host.read("disk", 0, 2 * MIB) == b"x" * MIB + b"y" * MIB

    with_host(test)
    judge(tools, path)


def test_unflushed_writes_of_a_killed_backend(tmp_path: Path, tools: Tools) -> None:
    """Made writable it has a log as any other; who makes it writable after a kill replays that."""
    path = new_image(tools, tmp_path / "a")
    logs = tmp_path / "logs"
    logs.mkdir()
    program = f"""
import asyncio, os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from in_process import Host, MIB
from pathlib import Path
async def main():
    host = Host(Path({str(tmp_path)!r}), ())
    await host.backend.start()
    disk = {{"driver": "qcow2", "file": {{"driver": "file", "filename": {str(path)!r}}}}}
    disk["node-name"] = "disk"
    await host.backend.blockdev_add({{**disk, "read-only": True}})
    await host.backend.blockdev_reopen([disk])
    await host.write("disk", MIB, b"x" * MIB)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    environment = {**os.environ, "VHOSTBLK_LOG_DIR": str(logs)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == -9
    assert list(logs.rglob("*.log"))

    async def test(host: Host) -> None:
        image = Image(host, path)
        await image.open()
        await image.writable()
        assert await host.read("disk", 0, 3 * MIB) == bytes(MIB) + b"x" * MIB + bytes(MIB)
        await image.read_only()
        assert not list(logs.rglob("*.log"))
        assert await host.read("disk", MIB, MIB) == b"x" * MIB

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VHOSTBLK_LOG_DIR", str(logs))
        with_host(test)
    judge(tools, path)
    assert tools.content(path)[MIB : 2 * MIB] == b"x" * MIB


def test_a_covered_image_is_writable_again_for_its_heirs(tmp_path: Path, tools: Tools) -> None:
    """Read-only since a snapshot: when the overlay is gone it may be written to again."""
    path = new_image(tools, tmp_path / "a")

    async def test(host: Host) -> None:
        image = Image(host, path)
        await image.open(read_only=False)
        await host.export("disk")
        async with host.device() as guest:
            await guest.write(0, b"x" * MIB)
            await act(
                host, "blockdev-snapshot-sync", node_name="disk",
                snapshot_node_name="top", snapshot_file=str(tmp_path / "top"), format="qcow2",
            )  # fmt: skip
            await guest.write(0, b"y" * MIB)
            async with load(guest):
                pass
            await host.until(lambda: host.backend.graph.node("disk").read_only)
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("top")
        await image.writable()
        assert await host.read("disk", 0, MIB) == b"x" * MIB
        await host.write("disk", 0, b"z" * MIB)
        await host.backend.blockdev_del("disk")

    with_host(test)
    judge(tools, path)
    assert tools.content(path)[:MIB] == b"z" * MIB
