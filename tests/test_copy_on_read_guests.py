# SPDX-License-Identifier: GPL-2.0-or-later
"""copy-on-read and block-stream below guests with several queues, and from bases of each kind.

What a guest writes while its disk is being filled is never lost to a copy of older data: here many
requests are in flight on two I/O threads, while the filter comes and goes and a job copies too.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backend_process import BackendProcess
from cor_images import KIB, MIB, NEEDS_TOOLS, make_chain, tools
from frontend import Device, Type
from in_process import Guest, Host, with_host
from test_block_stream import ended, independent, start

from vhostblk.control.client import ControlClient

pytestmark = NEEDS_TOOLS


class Load:
    """Rounds of requests on all queues that do not overlap one another, and what must be there."""

    def __init__(self, guest: Guest, data: bytearray, seed: int) -> None:
        self.guest, self.data = guest, data
        self.rnd = random.Random(seed)
        self.over = False
        self.rounds = 0

    async def work(self) -> None:
        while not self.over:
            made = self._requests()
            await self.guest.wait(*(request for request, _, _ in made))
            for request, at, length in made:
                assert request.status == 0
                if length:
                    assert request.data == self.data[at : at + length], at
            self.rounds += 1

    def _requests(self) -> list[tuple[Any, int, int]]:
        """For each the request, and where and how much it reads."""
        rnd, device, made, taken = self.rnd, self.guest.device, [], []
        near = rnd.randrange(0, len(self.data), 512)
        for number in range(24):
            length = rnd.choice((512, 1024, 4 * KIB, 20 * KIB, 64 * KIB))
            at = near + rnd.randrange(-256 * KIB, 256 * KIB, 512)
            at = max(0, min(at, len(self.data) - length))
            if any(at < end and begin < at + length for begin, end in taken):
                continue
            taken.append((at, at + length))
            queue = number % 4
            if rnd.random() < 0.5:
                request = device.submit(Type.IN, at // 512, length=length, queue=queue)
                made.append((request, at, length))
                continue
            new = rnd.randbytes(length)
            made.append((device.submit(Type.OUT, at // 512, new, queue=queue), at, 0))
            self.data[at : at + length] = new
        return made


@pytest.mark.parametrize("formats", [("qcow2",), ("qed", "qcow2")], ids="-".join)
@pytest.mark.parametrize("seed", range(2))
def test_a_busy_guest(formats: tuple[str, ...], seed: int) -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, *formats, size=8 * MIB, seed=seed)
        await chain.open()
        for name in ("one", "two"):
            await host.backend.objects.add({"qom-type": "iothread", "id": name})
        await host.export("top", "e", iothread=["one", "two"], num_queues=4)

        async def change(name: str, **given: Any) -> None:
            given = {key.replace("_", "-"): value for key, value in given.items()}
            await host.backend.transaction([(name, given)])

        async with host.device("e", queues=4) as guest:
            load = Load(guest, chain.data, seed)
            working = asyncio.create_task(load.work())
            for _ in range(4):
                await change("block-filter-insert", export_id="e",
                             filter={"driver": "copy-on-read", "node-name": "cor"})  # fmt: skip
                rounds = load.rounds
                await host.until(lambda: load.rounds > rounds + 4 or working.done(), 30)  # noqa: B023
                await change("block-filter-remove", node_name="cor")
            await start(host, "e", speed=16 * MIB)
            await ended(host)
            load.over = True
            await working
            for at in range(0, len(chain.data), MIB):
                assert await guest.read(at, MIB) == chain.data[at : at + MIB]
        await host.backend.close()
        independent(chain)

    with_host(test)


async def base_of(host: Host, kind: str, path: Path, data: bytes) -> None:
    """A node `base` with this content."""
    file = {"driver": "file", "filename": str(path)}
    if kind.startswith("luks"):
        await host.backend.object_add({"qom-type": "secret", "id": "s", "data": "words"})
        path.touch()
        await host.backend.blockdev_create("make", {
            "driver": "luks", "version": kind, "file": file, "size": len(data), "key-secret": "s",
            "pbkdf-force-iterations": 1000, **({"pbkdf": "pbkdf2"} if kind == "luks2" else {}),
        })  # fmt: skip
        await host.until(lambda: host.backend.jobs.get("make").status.value == "concluded", 30)
        assert host.backend.jobs.get("make").error is None
        host.backend.jobs.get("make").dismiss()
        await host.add("luks", "base", file=file, key_secret="s")
        await host.write("base", 0, data)
        return
    raw = path.with_suffix(".raw")
    raw.write_bytes(data)
    tools().img("convert", "-q", "-f", "raw", "-O", kind, raw, path)
    await host.add(kind, "base", file=file, read_only=True)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "qed", "luks1", "luks2"])
def test_any_base(kind: str) -> None:
    """Read through the filter, then streamed: the base is needed no more, whatever it is."""

    async def test(host: Host) -> None:
        data = bytearray(os.urandom(2 * MIB))
        await base_of(host, kind, Path(host.path("base")), data)
        top = Path(host.path("top"))
        tools().create(top, len(data), "qcow2")
        file = {"driver": "file", "filename": str(top)}
        await host.add("qcow2", "top", file=file, backing="base")
        await host.add("copy-on-read", "cor", file="top")
        await host.export("cor", "e")
        async with host.device("e") as guest:
            assert await guest.read(MIB, 4096) == data[MIB : MIB + 4096]
            await guest.write(512, b"w" * 512)
            data[512:1024] = b"w" * 512
            await start(host, "e")
            await ended(host)
            await host.backend.blockdev_del("base")
            for at in range(0, len(data), MIB):
                assert await guest.read(at, MIB) == data[at : at + MIB]
        await host.backend.close()
        assert tools().content(top, "qcow2") == bytes(data)
        assert tools().check(top, format="qcow2").corruptions == 0

    with_host(test)


def test_kill_9_while_a_guest_writes(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    """Killed again and again, the job goes on; what the guest was told is written is there."""
    size = 8 * MIB
    content = bytearray(random.Random(21).randbytes(size))
    base, top = short_dir / "base.raw", short_dir / "top.qcow2"
    base.write_bytes(content)
    tools().create(top, size, "qcow2", backing=base, backing_format="raw")
    rnd = random.Random(22)
    doubtful: tuple[int, bytes] | None = None
    kills, began = 0, False

    def check(device: Device) -> None:
        if doubtful is not None:  # the last write of a guest that was not answered
            at, new = doubtful
            found = device.read(at, len(new))
            assert found in (content[at : at + len(new)], new)
            content[at : at + len(new)] = found
        for at in rnd.sample(range(0, size, 64 * KIB), 8):  # what is read is copied: not all of it
            assert device.read(at, 4 * KIB) == content[at : at + 4 * KIB], at

    while True:
        backend = start_backend(
            "--state", "{dir}/state.json", "--control", "{dir}/qmp.sock",
            "--blockdev", "qcow2,node-name=top,file.driver=file,file.filename={dir}/top.qcow2",
            "--export", "vhost-user-blk,id=e,node-name=top,writable=on,addr.type=unix,"
            "addr.path={dir}/e.sock",
        )  # fmt: skip
        with ControlClient(str(short_dir / "qmp.sock")) as client:
            if not began:
                client.execute("block-stream", {"device": "e", "job-id": "j", "speed": 2 * MIB})
                began = True
            jobs = client.execute("query-block-jobs")
        with Device(str(short_dir / "e.sock")) as device:
            check(device)
            if not jobs:
                break
            deadline = time.monotonic() + rnd.uniform(0.1, 0.4)
            while time.monotonic() < deadline:
                length = 512 * rnd.choice((1, 8, 64))
                at = 512 * rnd.randrange((size - length) // 512)
                data = rnd.randbytes(length)
                device.write(at, data)
                content[at : at + length] = data
                time.sleep(0.01)
            doubtful = 512 * rnd.randrange(size // 512), rnd.randbytes(512)
            device.submit(Type.OUT, doubtful[0] // 512, doubtful[1])
            backend.process.kill()
            assert backend.wait() == -signal.SIGKILL
        kills += 1
    assert kills > 2
    assert backend.stop() == 0
    base.unlink()
    assert tools().check(top, format="qcow2").corruptions == 0
    assert tools().content(top, "qcow2") == content
