# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of a backend with dedup disks, at random moments under load.

A guest that lives on finds all that it was told had been written, flushed or not; and the
store is sound, down to the content of each block.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from backend_process import BackendProcess
from crash import Clock, History
from crash.stage import SEED_VARIABLE
from dedup_lab import rebuild
from frontend import Device, Type
from test_qcow2_crash_kill import SIZE, Load

from vhostblk.dedup.check import Result
from vhostblk.dedup.file import FileData
from vhostblk.dedup.format import Superblock
from vhostblk.dedup.interface import Tuning
from vhostblk.dedup.store import Store

Start = Callable[..., BackendProcess]
SEGMENT_BITS = 18


def make_store(directory: Path, block_bits: int, disks: int, size: int | None = None) -> None:
    """A store with room for all its disks and what is under way, if no size is given."""
    path = directory / "data.raw"
    with open(path, "wb") as file:
        file.truncate(size or disks * SIZE * 2)

    async def make() -> None:
        data = FileData(path)
        super = Superblock(block_bits, SEGMENT_BITS, "sha256", os.urandom(16))
        await Store.create(directory / "meta", data, super)
        data.close()

    asyncio.run(make())


def check(directory: Path) -> Result:
    """What a check of everything says of a store that nobody uses."""

    async def run() -> Result:
        data = FileData(directory / "data.raw")
        store = Store(directory / "meta", Tuning())
        await store.open(data)
        try:
            return await store.check(data, repair=False, content=True)
        finally:
            await store.close(data)
            data.close()

    return asyncio.run(run())


def arguments(directory: Path, disks: int, options: str = "") -> list[str]:
    """A backend's command line, with more options for its disks."""
    given = ["--control", "none"]
    given += ["--blockdev", f"driver=file,node-name=data,filename={directory}/data.raw"]
    for disk in range(disks):
        given += [
            "--blockdev",
            f"driver=dedup,node-name=d{disk},disk=d{disk},file=data,metadata={directory}/meta,"
            f"size={SIZE}{options}",
            "--export",
            f"type=vhost-user-blk,id=e{disk},node-name=d{disk},writable=on,num-queues=2,"
            f"addr.type=unix,addr.path={{dir}}/d{disk}.sock",
        ]
    return given


@pytest.mark.parametrize("block_bits", [12, 14, 16])
def test_guests_that_live_on(short_dir: Path, start_backend: Start, block_bits: int) -> None:
    seed = int(os.environ.get(SEED_VARIABLE, 1))
    print(f"{SEED_VARIABLE}={seed}")
    rnd = random.Random(seed)
    make_store(short_dir, block_bits, 2)
    backend = start_backend(*arguments(short_dir, 2))
    loads = [
        Load(short_dir / f"d{disk}.sock", History(Clock(), bytes(SIZE)), rnd) for disk in range(2)
    ]
    with loads[0].device, loads[1].device:
        for _ in range(5):
            for _ in range(rnd.randint(2, 8)):
                for load in loads:
                    load.work(rnd.randint(5, 40))
            backend.stop(signal.SIGKILL)
            assert check(short_dir).sound
            backend = start_backend(*arguments(short_dir, 2))
            for load in loads:
                load.device.reconnect()
                load.settle()
                load.check()
        for load in loads:
            load.work(100)
            load.settle()
            load.check()
    assert backend.stop() == 0, "\n".join(backend.log[-80:])
    result = check(short_dir)
    assert result.sound, result.messages


def test_flushed_and_killed_at_once(short_dir: Path, start_backend: Start) -> None:
    """Many short lives: each write is followed by a flush, and some of those by a kill."""
    rnd = random.Random(2)
    make_store(short_dir, 12, 1)
    content = bytearray(SIZE)
    for _ in range(8):
        backend = start_backend(*arguments(short_dir, 1))
        with Device(short_dir / "d0.sock", timeout=30) as device:
            for _ in range(rnd.randint(1, 12)):
                length = 512 * rnd.randint(1, 64)
                offset = 512 * rnd.randint(0, (SIZE - length) // 512)
                data = rnd.randbytes(length)
                device.write(offset, data)
                device.flush()
                content[offset : offset + length] = data
            backend.stop(signal.SIGKILL)
        # All of it was flushed: the data device alone has it, too.
        shutil.rmtree(short_dir / "meta")
        rebuild(short_dir / "data.raw", short_dir / "meta")
        assert check(short_dir).sound
    backend = start_backend(*arguments(short_dir, 1))
    with Device(short_dir / "d0.sock", timeout=30) as device:
        step = 256 << 10
        read = b"".join(device.read(at, step) for at in range(0, SIZE, step))
        assert read == content
    assert backend.stop() == 0, "\n".join(backend.log[-80:])
    assert check(short_dir).sound


def test_a_write_that_is_held_outlives_the_backend(short_dir: Path, start_backend: Start) -> None:
    """It ends without it, and the next one holds it until there is space."""
    make_store(short_dir, 12, 1, size=3 << 20)
    given = [*arguments(short_dir, 1, ",on-enospc=hold,discard=unmap"), "--stop-timeout", "1"]
    backend = start_backend(*given)
    rnd, piece, at = random.Random(3), 64 << 10, 0
    with Device(short_dir / "d0.sock", timeout=30) as device:
        deadline = time.monotonic() + 30
        while True:
            data = rnd.randbytes(piece)
            write = device.submit(Type.OUT, at // 512, data)
            while not write.done and not any("writes wait" in line for line in backend.log):
                assert time.monotonic() < deadline
                device.settle(seconds=0.01)
                device.reap()
            if not write.done:
                break
            at += piece
        assert backend.stop() == 1, "\n".join(backend.log[-80:])
        device.reap()
        assert not write.done
        backend = start_backend(*given)
        device.reconnect()
        device.discard((0, at))
        device.wait(write)
        assert write.status == 0 and device.read(at, piece) == data
    assert backend.stop() == 0, "\n".join(backend.log[-80:])
    assert check(short_dir).sound
