# SPDX-License-Identifier: GPL-2.0-or-later
"""Re-encryption in trees: limits, quorums above and below, snapshots and filters meanwhile."""

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
from frontend import Device, Type
from in_process import Host, with_host
from luks_headers import MIB, opens
from test_luks_reencrypt import (
    CHEAP,
    DISK,
    ONE,
    Writer,
    command,
    content_of,
    disk,
    ended_well,
    formatted,
    until_done,
)

from crash import newest_tools  # isort: skip
from vhostblk.control.client import ControlClient
from vhostblk.jobs.stream import start_stream


def legs(directory: Path) -> list[Path]:
    """Three copies of one volume, in qcow2."""
    tools, raw = newest_tools(), formatted(directory / "raw")
    found = [directory / f"{number}.qcow2" for number in range(3)]
    for path in found:
        tools.img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    return found


def plain(image: Path) -> bytes:
    """What an image of the volume says, with its chain of backing files."""
    copy = image.parent / "plain"
    copy.write_bytes(newest_tools().content(image))
    return content_of(copy)


def test_below_a_limit_and_above_a_quorum(tmp_path: Path) -> None:
    """The flagship: throttle, luks, quorum, qcow2; a snapshot and filters come meanwhile."""
    images = legs(tmp_path)
    after: list[bytes] = []
    at_snapshot: list[bytes] = []

    async def test(host: Host) -> None:
        for number, image in enumerate(images):
            file = {"driver": "file", "filename": str(image)}
            await host.add("qcow2", f"leg{number}", file=file)
        await host.add("quorum", "q", children=["leg0", "leg1", "leg2"], vote_threshold=2)
        node = await disk(host, images[0], file="q")
        await host.write("disk", 0, os.urandom(DISK))
        await host.backend.object_add(
            {"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100_000}}
        )
        await host.add("throttle", "t", throttle_group="g", file="disk")
        await host.export("t", "e")

        async def change(name: str, **given: Any) -> None:
            given = {key.replace("_", "-"): value for key, value in given.items()}
            await host.backend.transaction([(name, given)])

        async with host.device("e") as guest:
            writer = Writer(guest, await host.read("disk", 0, DISK), 3)
            working = asyncio.create_task(writer.work())
            await command(host, "luks-reencrypt", speed=2 * MIB, **CHEAP)
            job = host.backend.block_job("reencrypt-disk")
            await host.until(lambda: job.current_progress > MIB, 30)
            await change("block-filter-insert", export_id="e",
                         filter={"driver": "copy-on-read", "node-name": "above"})  # fmt: skip
            await change("block-filter-insert", above="q",
                         filter={"driver": "throttle", "node-name": "below",
                                 "throttle-group": "g"})  # fmt: skip
            writer.done = True
            await working
            at_snapshot.append(bytes(writer.content))
            before = node.boundary
            await change("blockdev-snapshot-sync", device="e")
            assert before < DISK
            writer.done = False
            working = asyncio.create_task(writer.work())
            job.pause()
            await asyncio.sleep(0.1)
            job.resume()
            await change("block-filter-remove", node_name="below")
            job.set_speed(0)
            await until_done(host)
            assert ended_well(host)
            writer.done = True
            await working
        assert await host.read("disk", 0, DISK) == writer.content
        after.append(bytes(writer.content))

    with_host(test)
    for number, image in enumerate(images):
        [overlay] = tmp_path.glob(f"{number}.leg{number}.*.qcow2")
        assert plain(overlay) == after[0]
        assert plain(image) == at_snapshot[0], "the snapshot has both keys, and its own boundary"


def test_legs_of_a_quorum_one_by_one(tmp_path: Path) -> None:
    """Each leg has a key of its own; the guest's votes agree all the time."""
    paths = [formatted(tmp_path / f"leg{number}") for number in range(3)]
    after: list[bytes] = []

    async def test(host: Host) -> None:
        given = {"qom-type": "secret", "id": "one", "data": ONE.decode()}
        await host.backend.object_add(given)
        for number, path in enumerate(paths):
            await host.add("luks", f"leg{number}", key_secret="one",
                           file={"driver": "file", "filename": str(path)})  # fmt: skip
            await host.write(f"leg{number}", 0, bytes(DISK))
        await host.add("quorum", "q", children=["leg0", "leg1", "leg2"], vote_threshold=2)
        await host.export("q", "e")
        async with host.device("e") as guest:
            writer = Writer(guest, bytes(DISK), 4)
            working = asyncio.create_task(writer.work())
            for number in range(3):
                await command(host, "luks-reencrypt", node_name=f"leg{number}", speed=40 * MIB,
                              **CHEAP)  # fmt: skip
                if number:  # the last two at the same time
                    continue
                await until_done(host)
            await until_done(host)
            writer.done = True
            await working
        assert not any("error" in data for data in host.named("BLOCK_JOB_COMPLETED"))
        assert not host.named("QUORUM_REPORT_BAD")
        after.append(bytes(writer.content))

    with_host(test)
    for path in paths:
        assert content_of(path) == after[0]
        assert opens(path, ONE)


def test_kill_9_with_snapshots(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    """Killed at any moment, with a guest that writes and snapshots that are taken."""
    images, size = legs(short_dir), DISK
    (short_dir / "key").write_bytes(ONE)
    options = ["--object", "throttle-group,id=g", "--object", "secret,id=one,file={dir}/key"]
    for number in range(3):
        options += ["--blockdev", f"qcow2,node-name=leg{number},file.driver=file,"
                    f"file.filename={images[number]}"]  # fmt: skip
    children = "".join(f",children.{number}=leg{number}" for number in range(3))
    options += [
        "--blockdev", f"quorum,node-name=q,vote-threshold=2{children}",
        "--blockdev", "luks,node-name=disk,key-secret=one,file=q",
        "--blockdev", "throttle,node-name=t,throttle-group=g,file=disk",
        "--export", "vhost-user-blk,id=e,node-name=t,writable=on,addr.type=unix,"
        "addr.path={dir}/e.sock",
    ]  # fmt: skip
    rnd = random.Random(11)
    content = bytearray(size)
    written: set[int] = set()  # sectors; what they say before that is noise
    doubtful: tuple[int, bytes] | None = None
    kills, began, snapshots = 0, False, 0

    def check(device: Device) -> None:
        for at in range(0, size // 512, 64):
            found = device.read(512 * at, min(64 * 512, size - 512 * at))
            for sector in range(at, min(at + 64, size // 512)):
                if sector in written:
                    mine = content[512 * sector : 512 * (sector + 1)]
                    assert found[512 * (sector - at) : 512 * (sector - at + 1)] == mine, sector

    while True:
        backend = start_backend(
            "--state", "{dir}/state.json", "--control", "{dir}/qmp.sock", *options
        )
        with ControlClient(str(short_dir / "qmp.sock")) as client:
            if not began:
                client.execute("luks-reencrypt", {"node-name": "disk", "speed": 3 * MIB, **CHEAP})
                end = time.monotonic() + 30
                while "luks-reencrypt" not in (short_dir / "state.json").read_text():
                    assert time.monotonic() < end
                    time.sleep(0.02)
                began = True
            if not client.execute("query-block-jobs"):
                break
            with Device(str(short_dir / "e.sock")) as device:
                if doubtful is not None:
                    at, data = doubtful
                    found = device.read(at, len(data))
                    assert found in (content[at : at + len(data)], data)
                    content[at : at + len(data)] = found
                check(device)
                deadline = time.monotonic() + rnd.uniform(0.1, 0.4)
                while time.monotonic() < deadline:
                    length = 512 * rnd.choice((1, 8, 64))
                    at = 512 * rnd.randrange((size - length) // 512)
                    data = rnd.randbytes(length)
                    device.write(at, data)
                    content[at : at + length] = data
                    written.update(range(at // 512, (at + length) // 512))
                    if rnd.random() < 0.02 and snapshots < 4:
                        snapshots += 1
                        client.execute("blockdev-snapshot-sync", {"device": "e"})
                at = 512 * rnd.choice(sorted(written))
                doubtful = at, rnd.randbytes(512)
                device.submit(Type.OUT, at // 512, doubtful[1])
                backend.process.kill()
                assert backend.wait() == -signal.SIGKILL
        kills += 1
    assert kills > 2
    assert snapshots
    with Device(str(short_dir / "e.sock")) as device:
        if doubtful is not None:
            at, data = doubtful
            found = device.read(at, len(data))
            assert found in (content[at : at + len(data)], data)
            content[at : at + len(data)] = found
        check(device)
    assert backend.stop() == 0


@pytest.mark.parametrize("seed", range(2))
def test_while_the_disk_becomes_independent_of_its_origin(tmp_path: Path, seed: int) -> None:
    """block-stream fills the overlay from below, re-encryption rewrites it from above."""
    tools, raw = newest_tools(), formatted(tmp_path / "raw")
    content = os.urandom(DISK)

    async def fill(host: Host) -> None:
        await disk(host, raw)
        await host.write("disk", 0, content)

    with_host(fill)
    top = tmp_path / "top.qcow2"
    tools.create(top, raw.stat().st_size, "qcow2", backing=raw, backing_format="raw")
    after: list[bytes] = []

    async def test(host: Host) -> None:
        await host.add("qcow2", "top", file={"driver": "file", "filename": str(top)})
        await disk(host, top, file="top")
        await host.export("disk", "e")
        async with host.device("e") as guest:
            writer = Writer(guest, content, seed)
            working = asyncio.create_task(writer.work())
            await command(host, "luks-reencrypt", speed=4 * MIB, **CHEAP)
            async with host.backend.changing():
                await start_stream(host.backend, "e", "stream", speed=16 * MIB)
            await until_done(host)
            writer.done = True
            await working
        assert not any("error" in data for data in host.named("BLOCK_JOB_COMPLETED"))
        assert await host.read("disk", 0, DISK) == writer.content
        after.append(bytes(writer.content))

    with_host(test)
    assert content_of(raw) == content, "the origin has its own header, and nothing was written"
    raw.unlink()
    assert tools.check(top, format="qcow2").corruptions == 0
    assert plain(top) == after[0]
