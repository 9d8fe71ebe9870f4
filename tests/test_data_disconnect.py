# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests and backends that die in the middle of I/O, and what must have survived.

What had completed is there. What was in flight is there or not, sector by sector, but nothing else
ever is. What is sent again afterwards is done, whether it had been done before or not.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from blkio import Disk, Op, Request, Server, needs_vhostblk
from blkio.guest import SECTOR, contents, records
from blkio.library import plain_environment
from blkio.model import pattern
from blkio.stacks import MIB, SIZE, Stack, by_name

TESTS = Path(__file__).resolve().parent
KILLED = by_name(
    "file",
    "file-direct",
    "raw-offset-size",
    "aio-threads",
    "python-hand-over",
    "python-wait-direct",
)


class Survivors:
    """For each sector what it may hold: the last completed write, or one that was in flight."""

    def __init__(self, size: int) -> None:
        self.may: list[set[bytes]] = [{bytes(SECTOR)} for _ in range(size // SECTOR)]

    def started(self, sector: int, data: bytes) -> None:
        self.may[sector].add(data)

    def completed(self, sector: int, data: bytes) -> None:
        self.may[sector] = {data}

    def check(self, disk: Disk) -> None:
        """Look at the disk; from now on every sector has to stay as it is."""
        data = disk.read(0, len(self.may) * SECTOR)
        for sector, may in enumerate(self.may):
            found = data[sector * SECTOR : (sector + 1) * SECTOR]
            if found not in may:
                raise AssertionError(
                    f"sector {sector} holds {found[:16].hex()}…, expected one of "
                    f"{[one[:16].hex() for one in may]}"
                )
            self.may[sector] = {found}


@pytest.mark.parametrize("stack", KILLED, ids=str)
def test_the_guest_is_killed(stack: Stack, tmp_path: Path) -> None:
    survivors = Survivors(stack.size)
    with stack.server(tmp_path, queues=2) as server:
        for turn in range(4):
            with (tmp_path / "report").open("wb+") as report:
                guest = subprocess.Popen(
                    [sys.executable, "-m", "blkio.guest", str(server.path), "2", str(turn)],
                    env=plain_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=report,
                    cwd=TESTS,
                )
                try:
                    deadline = time.monotonic() + 20
                    while report.seek(0, 2) < 20_000 and time.monotonic() < deadline:
                        assert guest.poll() is None
                        time.sleep(0.005)
                finally:
                    guest.kill()
                    guest.wait()
                report.seek(0)
                said = records(report.read())
            assert sum(kind == b"c" for kind, _, _ in said) > 100
            for kind, sector, number in said:
                if kind == b"s":
                    survivors.started(sector, contents(sector, number))
                else:
                    survivors.completed(sector, contents(sector, number))
            server.check_alive()
            with Disk(server.path) as disk:
                survivors.check(disk)
                assert disk.read(0, 65536) == disk.read(0, 65536)


def _load(
    disk: Disk, survivors: Survivors, rnd: random.Random, turn: int, stop_after: int, server: Server
) -> list[Request]:
    """Writes until the backend is killed after `stop_after` completions; what was in flight."""
    queue, busy, done, number = disk.queues[0], set[int](), 0, turn << 32
    sectors = len(survivors.may)
    while True:
        while queue.room and len(queue.flying) < 24:
            count = rnd.choice((1, 1, 8, 64))
            first = rnd.randrange(sectors - count)
            if busy & set(range(first, first + count)):
                break
            number += 1
            busy |= set(range(first, first + count))
            parts = [contents(sector, number) for sector in range(first, first + count)]
            for sector, data in enumerate(parts, first):
                survivors.started(sector, data)
            queue.write(first * SECTOR, b"".join(parts))
        queue.submit()
        if done >= stop_after:
            server.kill()
            # What it had completed before it died counts as completed.
            finished, flying = queue.wait(0), list(queue.flying.values())
        else:
            finished, flying = queue.wait(1), []
        for request in finished:
            request.checked()
            first, count = request.offset // SECTOR, request.length // SECTOR
            for index, sector in enumerate(range(first, first + count)):
                busy.discard(sector)
                survivors.completed(sector, request.data[index * SECTOR : (index + 1) * SECTOR])
        done += len(finished)
        if flying:
            return flying
        if server.process is not None and server.process.poll() is not None:
            return []


@pytest.mark.parametrize("stack", KILLED, ids=str)
def test_the_backend_is_killed(stack: Stack, tmp_path: Path) -> None:
    rnd = random.Random(7)
    survivors = Survivors(stack.size)
    server = stack.server(tmp_path)
    try:
        for turn in range(1, 4):
            server.start()
            with Disk(server.path) as disk:
                survivors.check(disk)
                flying = _load(disk, survivors, rnd, turn, rnd.randint(0, 300), server)
            server.start()
            with Disk(server.path) as disk:
                survivors.check(disk)
                # The guest sends again what had no answer.
                for request in flying:
                    assert request.op is Op.WRITE
                    disk.write(request.offset, request.data)
                    for index in range(request.length // SECTOR):
                        part = request.data[index * SECTOR : (index + 1) * SECTOR]
                        survivors.completed(request.offset // SECTOR + index, part)
                survivors.check(disk)
                disk.flush()
            server.kill()
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.mark.parametrize("stack", KILLED, ids=str)
def test_flushed_data_survive_the_backend(stack: Stack, tmp_path: Path) -> None:
    data = pattern(256 * 1024, 3)
    server = stack.server(tmp_path).start()
    try:
        with Disk(server.path) as disk:
            disk.write(4096, data)
            disk.flush()
            server.kill()
        image = stack.image(tmp_path).read_bytes()
        assert image[stack.offset + 4096 :][: len(data)] == data
        with server, Disk(server.path) as disk:
            assert disk.read(4096, len(data)) == data
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.mark.parametrize("stack", by_name("file", "file-direct", "aio-threads"), ids=str)
def test_nothing_of_the_dead_arrives_late(stack: Stack, tmp_path: Path) -> None:
    """The kernel goes on with what a killed process has submitted, for a while.

    The successor has to wait for that, or its own newer writes would be overwritten. It must not
    give up either: the image is still locked then.
    """
    server = stack.server(tmp_path)
    try:
        for turn in range(4):
            server.start()
            with Disk(server.path, slots=24, slot_size=MIB) as disk:
                queue = disk.queues[0]
                for number in range(24):
                    queue.write(number % 8 * MIB, b"old!" * (MIB // 4))
                queue.submit()
                time.sleep(turn / 500)
                server.kill()
            server.start()
            with Disk(server.path, slots=8, slot_size=MIB) as disk:
                new = pattern(MIB, turn)
                for at in range(0, SIZE, MIB):
                    disk.write(at, new)
                time.sleep(0.05)
                assert disk.read(0, SIZE) == new * (SIZE // MIB)
                server.kill()
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@needs_vhostblk
def test_a_restart_waits_for_the_lock(tmp_path: Path) -> None:
    """Deterministic: somebody else stands for the kernel, which holds the lock for a while."""
    stack = by_name("file")[0]
    old, new = stack.server(tmp_path), stack.server(tmp_path)
    old.start()
    timer = threading.Timer(1.0, old.kill)
    timer.start()
    try:
        new.path = new.path.with_name("new.sock")
        new.command[-1] = new.command[-1].replace("disk.sock", "new.sock")
        with new, Disk(new.path) as disk:
            assert old.process is not None and old.process.poll() is not None
            disk.write(0, pattern(4096, 1))
            assert disk.read(0, 4096) == pattern(4096, 1)
    finally:
        timer.join()


def test_a_guest_does_not_hang_the_end(tmp_path: Path) -> None:
    """SIGTERM with a guest connected and requests in flight: a clean end, and soon."""
    stack = by_name("file")[0]
    server = stack.server(tmp_path).start()
    with Disk(server.path) as disk:
        queue = disk.queues[0]
        for number in range(16):
            queue.write(number * 65536, b"\x42" * 65536)
        queue.submit()
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 5
    data = stack.image(tmp_path).read_bytes()
    assert len(data) == SIZE
    for number in range(16):
        assert set(data[number * 65536 : (number + 1) * 65536]) in ({0}, {0x42})
