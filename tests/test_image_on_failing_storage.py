# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 and QED on storage that fails now and then: writes, barriers, discards.

A request that failed may have been done in part; all others count. As soon as a flush succeeds, the
file as it is at that moment (as after a power cut) is an image without corruption that has
everything in it. The same holds where storage forgets, once, what it could not write.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from crash import newest_tools
from in_process import MIB, Host, with_host

from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES
from vhostblk.filter import Filter, Request
from vhostblk.schema import VhostblkError

SECTOR = 512
SIZE = 8 * MIB
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("qcow2", {}),
    "cluster-512": ("qcow2", {"cluster_size": 512}),
    "cluster-4k": ("qcow2", {"cluster_size": "4k"}),
    "extended": ("qcow2", {"extended_l2": "on", "cluster_size": "16k"}),
    "refcount-1": ("qcow2", {"refcount_bits": 1, "cluster_size": "4k"}),
    "v2": ("qcow2", {"compat": "0.10", "cluster_size": "4k"}),
    "qed": ("qed", {}),
}


class Disk:
    """Random requests, and what must be there afterwards."""

    def __init__(self, host: Host, node: Any, content: bytearray, rnd: random.Random) -> None:
        self.host = host
        self.node = node
        self.content = content
        self.known = bytearray(b"\1" * (SIZE // SECTOR))
        """For each sector whether its content is: not after a failure, nor after a discard."""
        self.rnd = rnd
        self.failed = 0

    async def submit(self, op: int, offset: int = 0, data: Any = None, **more: Any) -> bool:
        try:
            handle = self.node.effective
            await self.host.backend.engine.submit(handle, op, offset, data, **more)
        except OSError:
            self.failed += 1
            return False
        return True

    async def request(self) -> None:
        count = self.rnd.choice((1, 2, 8, 64, 200))
        first = self.rnd.randrange(SIZE // SECTOR - count)
        begin, length = first * SECTOR, count * SECTOR
        ops = (OP_READ, OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD)
        op = self.rnd.choices(ops, weights=(3, 6, 1, 1))[0]
        if op == OP_READ:
            buffer = bytearray(length)
            if await self.submit(op, begin, buffer):
                assert self.wrong(first, buffer) == []
            return
        data = self.rnd.randbytes(length) if op == OP_WRITE else bytes(length)
        self.known[first : first + count] = bytes(count)
        if op == OP_WRITE:
            done = await self.submit(op, begin, data)
        else:
            done = await self.submit(op, begin, length=length)
        if done and op != OP_DISCARD:
            self.content[begin : begin + length] = data
            self.known[first : first + count] = b"\1" * count

    def wrong(self, first: int, data: bytes | bytearray) -> list[int]:
        """The sectors of `data`, which begin at `first`, that are not what was written."""
        found = []
        for number in range(len(data) // SECTOR):
            at = (first + number) * SECTOR
            there = data[number * SECTOR : (number + 1) * SECTOR]
            if self.known[first + number] and there != self.content[at : at + SECTOR]:
                found.append(first + number)
        return found


@pytest.mark.parametrize("backing", [False, True], ids=["", "backing"])
@pytest.mark.parametrize("name", IMAGES)
def test_what_was_flushed_is_there(name: str, backing: bool) -> None:
    format, options = IMAGES[name]
    seed = int.from_bytes(os.urandom(3), "big")
    print(f"seed {seed}")
    rnd = random.Random(seed)
    tools = newest_tools()

    async def test(host: Host) -> None:
        path, copy = host.directory / "disk", host.directory / "copy"
        content = bytearray(SIZE)
        command: list[Any] = ["create", "-q", "-f", format]
        if backing:
            below = host.directory / "below"
            content[:] = rnd.randbytes(SIZE)
            below.write_bytes(content)
            command += ["-b", below, "-F", "raw"]
        for key, value in options.items():
            command += ["-o", f"{key}={value}"]
        tools.img(*command, path, str(SIZE))
        file = {"driver": "file", "filename": str(path)}
        disk = Disk(host, await host.add(format, "d", file=file, discard="unmap"), content, rnd)
        for _ in range(3):
            for _ in range(rnd.randrange(30)):
                await disk.request()
            broken: dict[str, Any] = {"driver": "error-inject", "node-name": "broken"}
            broken |= {"operations": ["write", "write-zeroes", "discard", "flush"]}
            broken |= {"every": rnd.choice([3, 5, 11, 30]), "skip": rnd.randrange(40)}
            insert = {"filter": broken, "node-name": "d", "child": "file"}
            await host.backend.transaction([("block-filter-insert", insert)])
            for _ in range(60):
                await disk.request()
                if rnd.random() < 0.15:
                    await disk.submit(OP_FLUSH)
            await host.backend.transaction([("block-filter-remove", {"node-name": "broken"})])
            assert await disk.submit(OP_FLUSH)
            shutil.copy(path, copy)
            judge(disk, copy)
        assert disk.failed
        await host.backend.blockdev_del("d")
        judge(disk, path)

    def judge(disk: Disk, path: Any) -> None:
        check = tools.check(path, format=format)
        assert not check.corruptions and not check.errors, check.text
        assert disk.wrong(0, tools.content(path, format)) == []

    with_host(test)


class Forgetful(Filter):
    """Storage that, once, forgets what it was to make durable, as Linux' page cache does.

    `durable` is what a power cut leaves.
    """

    driver = "forgetful"
    keeps_data = True
    durable: ClassVar[bytearray]
    written: ClassVar[list[tuple[int, bytes]]]
    fail_in: ClassVar[int | None]
    """How many flushes go well before one fails; None: all do."""

    async def write(self, request: Request) -> None:
        data = bytes(request.data())
        self.written.append((request.offset, data))
        await self.file.write(request.offset, data)

    async def write_zeroes(self, request: Request) -> None:
        self.written.append((request.offset, bytes(request.length)))
        await self.file.forward(request)

    async def flush(self, request: Request) -> None:
        if Forgetful.fail_in is not None:
            Forgetful.fail_in -= 1
            if Forgetful.fail_in < 0:
                Forgetful.fail_in = None
                self.written.clear()
                raise OSError(errno.EIO, "what was written is lost")
        for offset, data in self.written:
            self.durable[offset : offset + len(data)] = data
        self.written.clear()
        await self.file.forward(request)

    async def truncate(self, size: int) -> None:
        await self.file.node.truncate(size)
        self.file.refresh()
        self.durable[size:] = bytes(max(0, size - len(self.durable)))


async def _snapshot(host: Host, what: str) -> None:
    await host.backend.internal_snapshot("disk", what, "s")


async def _flush(host: Host) -> None:
    handle = host.backend.graph.node("disk").effective
    await host.backend.engine.submit(handle, OP_FLUSH, 0, None)


async def _fill(host: Host) -> None:
    """More than the table of reference counts can describe."""
    await host.write("disk", 0, b"\2" * SIZE)
    await _flush(host)


CHANGES: dict[str, tuple[int, Callable[[Host], Awaitable[Any]]]] = {
    "create": (4096, lambda host: _snapshot(host, "create")),
    "delete": (4096, lambda host: _snapshot(host, "delete")),
    "larger": (512, lambda host: host.backend.block_resize("disk", 24 * MIB)),
    "counts": (512, _fill),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_storage_forgets(what: str) -> None:
    """At whichever of its barriers; it is not tried again, and the next flush is good."""
    cluster, change = CHANGES[what]
    tools = newest_tools()

    def attempt(number: int) -> bool:
        done = False

        async def test(host: Host) -> None:
            nonlocal done
            path, cut = Path(host.path("disk.qcow2")), Path(host.path("cut.qcow2"))
            tools.create(path, SIZE, cluster_size=cluster)
            Forgetful.durable = bytearray(path.read_bytes())
            Forgetful.written, Forgetful.fail_in = [], None
            await host.add("file", "file", filename=str(path))
            await host.add("forgetful", "storage", file="file")
            await host.add("qcow2", "disk", file="storage")
            content = bytearray(SIZE)

            async def write(offset: int, value: int, length: int = 8192) -> None:
                await host.write("disk", offset, bytes([value]) * length)
                content[offset : offset + length] = bytes([value]) * length

            for offset in (0, 2 * MIB, 5 * MIB):
                await write(offset, 1)
            await _flush(host)
            if what == "delete":
                await _snapshot(host, "create")
                await write(0, 2)
                await _flush(host)
            Forgetful.fail_in = number
            try:
                await change(host)
            except OSError as error:
                assert error.errno == errno.EIO
            done = Forgetful.fail_in is not None
            Forgetful.fail_in = None
            if what == "counts":
                await write(0, 3, SIZE)
            for index in range(64):
                await write(index * 65536, index + 3)
            await _flush(host)
            cut.write_bytes(Forgetful.durable)
            await host.backend.blockdev_del("disk")
            for image in (cut, path):
                check = tools.check(image)
                assert not check.corruptions and not check.errors, check.text
                assert tools.content(image)[:SIZE] == content

        with_host(test, Forgetful)
        return done

    number = 0
    while not attempt(number):
        number += 1
        assert number < 100
    assert number > 1


@pytest.mark.parametrize("place", ["old", "new"])
@pytest.mark.parametrize("failing", ["read", "write", "flush"])
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_a_move_that_fails(format: str, failing: str, place: str) -> None:
    """To other storage, at whichever request to the old or the new one; the next attempt works."""
    tools = newest_tools()

    def attempt(skip: int) -> bool:
        done = False

        async def test(host: Host) -> None:
            nonlocal done
            content = bytearray(SIZE)
            old, new = Path(host.path("old")), Path(host.path("new"))
            tools.create(old, SIZE, format)

            async def storage(path: Path) -> None:
                await host.add("file", f"{path.name}-file", filename=str(path))
                await host.add("error-inject", path.name, file=f"{path.name}-file", count=0)

            async def fail(count: int) -> None:
                broken = {"driver": "error-inject", "node-name": place, "file": f"{place}-file"}
                broken |= {"operations": [failing], "skip": skip, "count": count}
                await host.command("blockdev-reopen", options=[broken])

            await storage(old)
            node = await host.add(format, "disk", file="old")
            for offset in (0, 3 * MIB):
                await host.write("disk", offset, b"\1" * 8192)
                content[offset : offset + 8192] = b"\1" * 8192
            shutil.copy(old, new)
            await storage(new)
            await fail(1)
            replace = {"parent-type": "driver", "node-name": "disk", "child": "file"}
            actions = [("blockdev-replace", {**replace, "new-child": "new"})]
            try:
                await host.backend.transaction(actions)
                done = True
            except (OSError, VhostblkError):
                await fail(0)
                if format == "qcow2":
                    assert node.log.path.exists() and node.map.log is node.log
                    assert old.read_bytes()[88:96] != bytes(8)  # which say that there is a log
                await _flush(host)
                assert await host.read("disk", 0, SIZE) == content
                await host.backend.transaction(actions)
            await fail(0)
            judge(old, content)
            await host.write("disk", MIB, b"\3" * 8192)
            content[MIB : MIB + 8192] = b"\3" * 8192
            await host.backend.blockdev_del("disk")
            judge(new, content)

        with_host(test)
        return done

    def judge(path: Path, content: bytearray) -> None:
        check = tools.check(path, format=format)
        assert not check.corruptions and not check.errors, check.text
        assert tools.content(path, format) == content

    attempts = 0
    while not attempt(attempts):
        attempts += 1
        assert attempts < 60
    assert attempts or (format, failing, place) == ("qed", "write", "new")
