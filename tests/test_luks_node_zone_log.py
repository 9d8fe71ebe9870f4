# SPDX-License-Identifier: GPL-2.0-or-later
"""Re-encryption and crashes: a disk that forgets, at any moment, any part of what was not flushed.

The node is the real one, above a disk in memory. That counts its operations and, at one of them,
becomes what a power cut would leave: what was flushed, and of each 512 bytes that were written
since one of the versions. Another node opens that, goes on, and finds what the guest had flushed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from in_process import Host, with_host
from raw_key_driver import RawKey

from vhostblk.engine.crypt import Half
from vhostblk.filter import Filter, Request
from vhostblk.nodes._zone_log import BLOCK, ZoneLog
from vhostblk.nodes.driver import ChildRole, NodeOptions
from vhostblk.nodes.qcow2.storage import ChildStorage

KIB = 1024
LOG_SIZE = 2 * BLOCK + 32 * KIB
SIZE = 256 * KIB
NEW, OLD = bytes(range(64)), bytes(range(64, 128))
RUN = b"r" * 16
SECTOR = 512


class Crash(Exception):
    """The power has gone."""


class Volatile(Filter):
    """A disk in memory, with a write cache that a power cut empties."""

    driver = "volatile"
    Options = NodeOptions
    child_roles: ClassVar[Mapping[str, ChildRole]] = {}
    size = LOG_SIZE + SIZE

    async def open(self) -> None:
        self.stable = bytearray(self.size)
        self.now = bytearray(self.size)
        self.versions: dict[int, list[bytes]] = {}
        self.operations = 0
        self.crash_at: int | None = None
        self.fail_at: int | None = None
        self.random = random.Random(0)
        self.image: bytes | None = None

    def _count(self) -> None:
        self.operations += 1
        if self.operations == self.fail_at:
            raise OSError(errno.EIO, "a bad moment")
        if self.operations == self.crash_at and self.image is None:
            self.image = self.after_power_cut()

    def after_power_cut(self) -> bytes:
        image = bytearray(self.stable)
        for at, versions in self.versions.items():
            image[at : at + SECTOR] = self.random.choice(versions)
        return bytes(image)

    def load(self, image: bytes) -> None:
        self.stable[:] = image
        self.now[:] = image
        self.versions.clear()

    async def read(self, request: Request) -> None:
        request.fill(self.now[request.offset : request.offset + request.length])

    async def write(self, request: Request) -> None:
        data = request.data()
        for at in range(0, len(data), SECTOR):
            place = request.offset + at
            old = bytes(self.stable[place : place + SECTOR])
            self.versions.setdefault(place, [old]).append(data[at : at + SECTOR])
        self.now[request.offset : request.offset + len(data)] = data
        self._count()

    async def flush(self, request: Request) -> None:
        self._count()
        self.stable[:] = self.now
        self.versions.clear()

    async def write_zeroes(self, request: Request) -> None:
        raise AssertionError("on an encrypted disk there are none")


async def opened(host: Host, image: bytes | None = None) -> tuple[Volatile, RawKey, ZoneLog]:
    """The disk, the node above it and its log; as after a crash if there is an image of one."""
    disk: Volatile = await host.add("volatile", "v")
    keys = {"key": NEW.hex(), "high_key": OLD.hex(), "offset": LOG_SIZE}
    if image is None:
        node: RawKey = await host.add("raw-key", "d", file="v", boundary=0, **keys)
        log = ZoneLog(ChildStorage(node.child("file")), 0, LOG_SIZE, RUN)
        await log.create()
        return disk, node, log
    disk.load(image)
    node = await host.add("raw-key", "d", file="v", boundary=0, **keys)
    log = ZoneLog(ChildStorage(node.child("file")), 0, LOG_SIZE, RUN)
    low, high = node.halves
    assert low is not None
    boundary = await node.recover(log, low)
    node.set_layout(low, high, boundary=boundary)
    return disk, node, log


async def closed(host: Host) -> None:
    await host.backend.blockdev_del("d")
    await host.backend.blockdev_del("v")


async def life(host: Host, disk: Volatile, node: RawKey, log: ZoneLog, seed: int) -> list[bytes]:
    """Re-encryption to the end, a guest that writes and flushes; for each sector what it may hold.

    That is: at the moment of the crash, what was flushed last and what was written after it.
    """
    random_ = random.Random(seed)
    flushed = bytearray(await host.read("d", 0, SIZE))
    allowed: dict[int, list[bytes]] = {}
    snapshot: list[Any] = []

    def remember() -> None:
        if disk.image is not None and not snapshot:
            snapshot.append((bytes(flushed), {at: list(v) for at, v in allowed.items()}))

    async def guest() -> None:
        while node.boundary < SIZE and disk.image is None:
            for _ in range(random_.randrange(3)):
                length = random_.choice([1, 2, 8]) * SECTOR
                offset = random_.randrange(0, SIZE - length, SECTOR)
                data = random_.randbytes(length)
                for at in range(0, length, SECTOR):
                    place = offset + at
                    known = allowed.setdefault(place, [bytes(flushed[place : place + SECTOR])])
                    known.append(data[at : at + SECTOR])
                await host.write("d", offset, data)
                remember()
            await host.backend.engine.submit(node.effective, 2, 0, None, 0)
            remember()
            if disk.image is None:
                for place, known in allowed.items():
                    flushed[place : place + SECTOR] = known[-1]
                allowed.clear()
            await asyncio.sleep(0)

    async def job() -> None:
        while node.boundary < SIZE and disk.image is None:
            await node.move_boundary(log, random_.choice([4, 16, 32]) * KIB)
            remember()
            await asyncio.sleep(0)

    await asyncio.gather(guest(), job())
    remember()
    base, changed = snapshot[0] if snapshot else (bytes(flushed), {})
    return [changed.get(at, [base[at : at + SECTOR]]) for at in range(0, SIZE, SECTOR)]


@pytest.mark.parametrize("chunk", range(6))
def test_a_power_cut_at_any_moment(chunk: int) -> None:
    async def test(host: Host) -> None:
        for crash_at in range(3 + chunk, 110, 6):
            disk, node, log = await opened(host)
            await host.write("d", 0, os.urandom(SIZE))
            await host.backend.engine.submit(node.effective, 2, 0, None, 0)
            disk.operations, disk.crash_at = 0, crash_at
            disk.random.seed(crash_at)
            allowed = await life(host, disk, node, log, crash_at)
            image = disk.image
            if image is None:
                assert node.boundary == SIZE
                await closed(host)
                continue
            await closed(host)
            # Another crash while it is being put in order must do no harm either.
            disk, node, log = await opened(host, image)
            if crash_at % 2:
                disk.random.seed(crash_at + 1)
                image = disk.after_power_cut()
                await closed(host)
                disk, node, log = await opened(host, image)
            data = await host.read("d", 0, SIZE)
            for index, versions in enumerate(allowed):
                sector = data[index * SECTOR : (index + 1) * SECTOR]
                assert sector in versions, (crash_at, index, node.boundary)
            while node.boundary < SIZE:
                await node.move_boundary(log, 32 * KIB)
            assert await host.read("d", 0, SIZE) == data
            await closed(host)

    with_host(test, Volatile, RawKey)


@pytest.mark.parametrize("fail_at", range(1, 10))
def test_a_failing_disk_shows_nobody_half_a_zone(fail_at: int) -> None:
    """Of the nine operations of three zones each fails once; the job tries again."""

    async def test(host: Host) -> None:
        disk, node, log = await opened(host)
        data = os.urandom(SIZE)
        await host.write("d", 0, data)
        disk.operations, disk.fail_at = 0, fail_at
        failures = 0
        while node.boundary < 4 * 16 * KIB:
            try:
                await node.move_boundary(log, 16 * KIB)
            except OSError:
                failures += 1
                try:
                    assert await host.read("d", 0, SIZE) == data
                except OSError as error:  # rather no answer than a wrong one
                    assert error.errno == errno.EIO
        assert failures == 1
        assert await host.read("d", 0, SIZE) == data
        await closed(host)

    with_host(test, Volatile, RawKey)


def test_a_log_of_another_run_is_none() -> None:
    async def test(host: Host) -> None:
        _disk, node, log = await opened(host)
        await node.move_boundary(log, 16 * KIB)
        storage = ChildStorage(node.child("file"))
        assert await ZoneLog(storage, 0, LOG_SIZE, RUN).load() == (16 * KIB, None)
        with pytest.raises(Exception, match="log is damaged"):
            await ZoneLog(storage, 0, LOG_SIZE, b"s" * 16).load()

    with_host(test, Volatile, RawKey)


def test_a_disk_that_cannot_be_written_is_not_opened_half_done() -> None:
    async def test(host: Host) -> None:
        disk, node, log = await opened(host)
        await log.begin(0, bytes(16 * KIB))
        node.options = node.options.model_copy(update={"read_only": True})
        low = node.halves[0]
        assert isinstance(low, Half)
        with pytest.raises(OSError, match="opened writable once"):
            await node.recover(log, low)
        node.options = node.options.model_copy(update={"read_only": False})
        assert await node.recover(log, low) == 16 * KIB
        assert disk.now[LOG_SIZE : LOG_SIZE + 16 * KIB] == bytes(16 * KIB)

    with_host(test, Volatile, RawKey)
