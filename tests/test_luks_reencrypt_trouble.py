# SPDX-License-Identifier: GPL-2.0-or-later
"""Re-encryption, and what may go wrong while it begins, goes on and ends.

The node is the real one with its header, above a disk in memory that counts its operations and
keeps, of one of them, what a power cut would have left (test_luks_node_zone_log.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from backend_process import BackendProcess
from frontend import Device, Type
from in_process import Host, refused, with_host
from luks_headers import MIB, cryptsetup, opens, run
from test_luks_node_zone_log import Volatile
from test_luks_reencrypt import (
    CHEAP,
    DISK,
    ONE,
    TWO,
    command,
    content_of,
    disk,
    ended_well,
    formatted,
    until_done,
)

from vhostblk import luks
from vhostblk.control.client import ControlClient
from vhostblk.filter import Filter, Request
from vhostblk.graph import graph
from vhostblk.jobs import luks_reencrypt
from vhostblk.luks.file import open_storage
from vhostblk.luks.reencryption import find
from vhostblk.nodes import _zone_log
from vhostblk.nodes._reencrypt import REQUIREMENTS
from vhostblk.nodes._zone_log import BLOCK, Record
from vhostblk.schema import VhostblkError

KIB = 1024
HEADER = 2 * 16 * KIB + 704 * KIB
SMALL = 192 * KIB


class Small(Volatile):
    """A disk with a small LUKS2 header."""

    driver = "small"
    size: ClassVar[int] = HEADER + SMALL  # type: ignore[misc]

    async def write_zeroes(self, request: Request) -> None:
        self.now[request.offset : request.offset + request.length] = bytes(request.length)
        for at in range(0, request.length, 512):
            self.versions.setdefault(request.offset + at, []).append(bytes(512))


async def prepared(host: Host) -> Small:
    """With a header, and a node `disk` above."""
    for id, words in (("one", ONE), ("two", TWO)):
        await host.backend.object_add({"qom-type": "secret", "id": id, "data": words.decode()})
    made: Small = await host.add("small", "v")
    options = {
        "driver": "luks", "version": "luks2", "file": "v", "size": SMALL, "key-secret": "one",
        "metadata-size": 16 * KIB, "keyslots-size": 704 * KIB, "data-offset": HEADER,
        "cipher-alg": "aes-128", **CHEAP,
    }  # fmt: skip
    await host.backend.blockdev_create("make", options)
    await host.until(lambda: host.backend.jobs.get("make").status.value == "concluded")
    assert host.backend.jobs.get("make").error is None
    host.backend.jobs.get("make").dismiss()
    await host.add("luks", "disk", key_secret="one", file="v")
    return made


async def flush(host: Host) -> None:
    await host.backend.engine.submit(host.backend.graph.node("disk").effective, 2, 0, None, 0)


@pytest.mark.parametrize("chunk", range(10))
def test_a_power_cut_at_any_moment(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first write to the header to the last old key slot; then it goes on to the end."""
    monkeypatch.setattr(luks_reencrypt, "ZONE", 64 * KIB)

    async def test(host: Host) -> None:
        made = await prepared(host)
        content = os.urandom(SMALL)
        await host.write("disk", 0, content)
        await flush(host)
        start = bytes(made.stable)
        moments, total = set(), 0
        crash_at = 1 + chunk
        while not total or crash_at <= total:
            made.load(start)
            await host.backend.blockdev_del("disk")
            await host.add("luks", "disk", key_secret="one", file="v")
            made.operations, made.crash_at, made.image = 0, crash_at, None
            made.random = random.Random(crash_at)
            await command(host, "luks-reencrypt", secrets=["two"], **CHEAP)
            await until_done(host)
            total = made.operations
            image, made.crash_at = made.image, None
            assert image is not None
            await host.backend.blockdev_del("disk")
            made.load(image)
            node = await host.add("luks", "disk", key_secret="one", file="v")
            assert await host.read("disk", 0, SMALL) == content, crash_at
            over = node.log is None and len(node.volume.slots()) == 2
            moments.add("over" if over else "before" if node.log is None else node.boundary)
            if not over:
                await command(host, "luks-reencrypt", secrets=["two"], **CHEAP)
                await until_done(host)
                assert "error" not in host.named("BLOCK_JOB_COMPLETED")[-1]
                assert await host.read("disk", 0, SMALL) == content
            await command(host, "luks-key-slot-test", key_secret="two")
            assert not node.volume.is_reencrypting
            assert len(node.volume.slots()) == 2, "nothing is left of the first attempt"
            crash_at += 10
        assert len(moments) > 2, "before, in between, and after"

    with_host(test, Small)


@pytest.mark.parametrize("chunk", range(12))
def test_each_write_and_flush_fails_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first to the last: an error, a disk that reads as before, and it can go on."""
    monkeypatch.setattr(luks_reencrypt, "ZONE", 64 * KIB)

    async def test(host: Host) -> None:
        made = await prepared(host)
        content = os.urandom(SMALL)
        await host.write("disk", 0, content)
        await flush(host)
        start = bytes(made.stable)
        fail_at, failed = 1 + chunk, True
        while failed:
            made.load(start)
            await host.backend.blockdev_del("disk")
            node = await host.add("luks", "disk", key_secret="one", file="v")
            made.operations, made.fail_at = 0, fail_at
            await command(host, "luks-reencrypt", secrets=["two"], **CHEAP)
            await until_done(host)
            failed = made.operations >= fail_at
            assert ("error" in host.named("BLOCK_JOB_COMPLETED")[-1]) == failed
            made.fail_at = None
            if node.volume.is_reencrypting or len(node.volume.slots()) == 1:
                await command(host, "luks-reencrypt", secrets=["two"], **CHEAP)
                await until_done(host)
                assert "error" not in host.named("BLOCK_JOB_COMPLETED")[-1], fail_at
            assert await host.read("disk", 0, SMALL) == content, fail_at
            await host.backend.blockdev_del("disk")
            node = await host.add("luks", "disk", key_secret="one", file="v")
            assert await host.read("disk", 0, SMALL) == content, fail_at
            assert not node.volume.is_reencrypting
            assert len(node.volume.slots()) == 2
            fail_at += 12

    with_host(test, Small)


class Hanging(Filter):
    """Reads of one place wait until the test lets them go."""

    driver = "hanging"
    is_filter = True
    at: ClassVar[int] = 16 * MIB + MIB
    free: asyncio.Event

    async def open(self) -> None:
        self.free = asyncio.Event()
        self.free.set()

    async def read(self, request: Request) -> None:
        if request.offset == self.at:
            await self.free.wait()
        await self.file.forward(request)


def test_a_beginning_that_is_not_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs when the layout is to change: the next attempt must not think it is done."""
    path = formatted(tmp_path / "image")
    content = os.urandom(DISK)

    async def test(host: Host) -> None:
        file = {
            "driver": "hanging",
            "node-name": "h",
            "file": {"driver": "file", "filename": str(path)},
        }
        node = await disk(host, path, file=file)
        hanging = host.backend.graph.node("h")
        await host.export("disk")
        await host.write("disk", 0, content)
        async with host.device() as guest:
            hanging.free.clear()
            late = asyncio.create_task(guest.read(MIB, 512))
            await asyncio.sleep(0.1)
            monkeypatch.setattr(graph, "PAUSE_PATIENCE", 0.2)
            await command(host, "luks-reencrypt", **CHEAP)
            await until_done(host)
            [told] = host.named("BLOCK_JOB_COMPLETED")
            assert "does the storage hang?" in told["error"]
            hanging.free.set()
            assert await late == content[MIB : MIB + 512]
            monkeypatch.setattr(graph, "PAUSE_PATIENCE", 10)
            assert await host.read("disk", 0, DISK) == content
            await command(host, "luks-reencrypt", **CHEAP)
            await until_done(host)
            assert "error" not in host.named("BLOCK_JOB_COMPLETED")[-1]
            assert node.log is None
            assert await host.read("disk", 0, DISK) == content

    with_host(test, Hanging)
    assert content_of(path) == content
    assert opens(path, ONE)


@pytest.mark.parametrize("first", ["rotate", "add"])
def test_key_slots_that_change_when_it_begins(tmp_path: Path, first: str) -> None:
    """Neither takes back what the other has written: whatever the header lists opens the disk."""
    path = formatted(tmp_path / "image")
    content = os.urandom(DISK)

    async def test(host: Host) -> None:
        node = await disk(host, path)
        await host.write("disk", 0, content)
        await command(host, "luks-key-slot-add", key_secret="one", new_secret="two", **CHEAP)
        given = {"old_secret": "two", "new_secret": "two"}
        if first == "add":
            given = {"key_secret": "one", "new_secret": "two"}
        slow = CHEAP | {"pbkdf-force-iterations": 1_000_000}
        change = asyncio.create_task(command(host, f"luks-key-slot-{first}", **given, **slow))
        await host.until(lambda: node.volume.changing.locked())
        await command(host, "luks-reencrypt", speed=MIB, **CHEAP)
        with contextlib.suppress(VhostblkError):  # it came second
            await change
        await host.until(lambda: node.log is not None, 30)
        for slot in node.volume.active():
            words = ONE if slot.number == 0 or slot.digest != "0" else TWO
            assert await node.volume.test(words, slot.number) == slot.number
        host.backend.block_job("reencrypt-disk").set_speed(0)
        await until_done(host)
        assert ended_well(host)
        assert await host.read("disk", 0, DISK) == content

    with_host(test)
    assert content_of(path) == content


def test_a_slot_in_the_place_of_an_old_one_is_left_alone(tmp_path: Path) -> None:
    path = formatted(tmp_path / "image")

    async def test() -> None:
        with open_storage(str(path), write=True) as storage:
            volume = await luks.open_volume(storage)
            assert isinstance(volume, luks.Luks2)
            _, key = await volume.unlock(ONE)
            start, size = volume.keyslots_area
            with key:
                await volume.add_slot(key, TWO, None, luks.KdfOptions(**{
                    name.replace("-", "_"): value for name, value in CHEAP.items()}))  # fmt: skip
            await volume.destroy_leftovers(
                [(start, 4096), (start + 4096 * 100, 4096), (start + size - 4096, 4096)]
            )

    run(test())
    assert opens(path, ONE)
    assert opens(path, TWO)


def test_the_nodes_secret_must_still_open_it(tmp_path: Path) -> None:
    """The secret object has the old passphrase after a rotation; the new key must not get that."""
    path = formatted(tmp_path / "image")

    async def test(host: Host) -> None:
        node = await disk(host, path)

        async def reopen(secret: str) -> None:
            below = node.child("file").node.name
            given = {"driver": "luks", "node-name": "disk", "key-secret": secret, "file": below}
            await host.backend.blockdev_reopen([given])

        with refused("Invalid password, cannot unlock any keyslot"):
            await reopen("two")
        await command(host, "luks-key-slot-rotate", old_secret="one", new_secret="two", **CHEAP)
        await command(host, "luks-reencrypt", **CHEAP)
        await until_done(host)
        [told] = host.named("BLOCK_JOB_COMPLETED")
        assert "The secret of node 'disk' does not open its header any more" in told["error"]
        assert "blockdev-reopen" in told["error"]
        assert "equirement" not in cryptsetup("luksDump", path)
        with refused("one"):
            await host.backend.object_del("one")
        await reopen("two")
        await host.backend.object_del("one")
        await command(host, "luks-reencrypt", speed=4 * MIB, **CHEAP)
        await host.until(lambda: node.log is not None and node.boundary > 0, 30)
        # Half way both keys have to be opened.
        for id, words in (("wrong", "wrong"), ("same", TWO.decode())):
            await host.backend.object_add({"qom-type": "secret", "id": id, "data": words})
        with refused("Invalid password"):
            await reopen("wrong")
        await reopen("same")
        await host.backend.object_del("two")
        host.backend.block_job("reencrypt-disk").set_speed(0)
        await until_done(host)
        assert "error" not in host.named("BLOCK_JOB_COMPLETED")[-1]
        await host.backend.blockdev_del("disk")
        await host.backend.object_del("same")

    with_host(test)
    assert opens(path, TWO)
    assert not opens(path, ONE)


# ---- a header that is damaged half way


def half_done(path: Path, content: bytes, *, boundary: int = MIB) -> None:
    async def begin(host: Host) -> None:
        node = await disk(host, path)
        await host.write("disk", 0, content)
        await command(host, "luks-reencrypt", speed=2 * MIB, **CHEAP)
        job = host.backend.block_job("reencrypt-disk")
        await host.until(lambda: node.log is not None and node.boundary >= boundary, 30)
        job.cancel()
        await until_done(host)
        # What is written after that must not be overwritten with what the log has.
        at = node.boundary - 8192
        await host.write("disk", at, content[at : at + 4096][::-1])

    with_host(begin)


def log_of(path: Path) -> tuple[int, bytes, int]:
    """Offset of the log, its run, offset of the second header."""

    async def look() -> tuple[int, bytes, int]:
        with open_storage(str(path), write=False) as storage:
            volume = await luks.open_volume(storage, requirements=REQUIREMENTS)
            assert isinstance(volume, luks.Luks2)
            found = find(volume)
            assert found is not None
            return found.log_offset, found.run, volume.header_size

    result: tuple[int, bytes, int] = run(look())
    return result


@pytest.mark.parametrize("damage", ["first header", "second header", "record 0", "record 1"])
def test_a_header_with_damage(tmp_path: Path, damage: str) -> None:
    """Any one block of what describes the state may be lost: nothing of the disk is."""
    path = formatted(tmp_path / "image")
    content = bytearray(os.urandom(DISK))
    half_done(path, bytes(content))
    log, _, size = log_of(path)
    place = {"first header": 0, "second header": size, "record 0": log, "record 1": log + BLOCK}
    with open(path, "r+b") as file:
        file.seek(place[damage] + (512 if "header" in damage else 0))
        file.write(os.urandom(512))
    reached = []

    async def go_on(host: Host) -> None:
        node = await disk(host, path)
        at = node.boundary - 8192
        content[at : at + 4096] = content[at : at + 4096][::-1]
        reached.append(await host.read("disk", 0, DISK) == content)
        await command(host, "luks-reencrypt")
        await until_done(host)
        assert ended_well(host)
        reached.append(await host.read("disk", 0, DISK) == content)

    with_host(go_on)
    assert reached == [True, True]
    assert opens(path, ONE)
    assert content_of(path) == content


def test_a_log_without_records(tmp_path: Path) -> None:
    """Nobody guesses: the disk is not opened."""
    path = formatted(tmp_path / "image")
    half_done(path, os.urandom(DISK))
    log, _, _ = log_of(path)
    with open(path, "r+b") as file:
        file.seek(log)
        file.write(bytes(2 * BLOCK))

    async def test(host: Host) -> None:
        with refused("Cannot open node 'disk'", "its log is damaged"):
            await disk(host, path)

    with_host(test)


@pytest.mark.parametrize(
    ("boundary", "length"), [(MIB + 256, 0), (MIB, 1000), (1 << 62, 4096), ((1 << 64) - 512, 0)]
)
def test_a_log_made_to_mislead(tmp_path: Path, boundary: int, length: int) -> None:
    """Whoever writes the header can write the log: no crash, no loop, nothing outside the disk."""
    path = formatted(tmp_path / "image")
    half_done(path, os.urandom(DISK))
    log, run_, _ = log_of(path)
    record = Record(1000, boundary, length, _zone_log.hashlib.sha256(bytes(length)).digest())
    with open(path, "r+b") as file:
        file.seek(log)
        file.write(record.pack(run_))
        file.write(bytes(BLOCK + length))

    async def test(host: Host) -> None:
        try:
            node = await disk(host, path)
        except Exception as error:
            assert "Cannot open node 'disk'" in str(error) or "disk" in str(error)
            return
        assert node.size == DISK
        await host.write("disk", 0, bytes(DISK))
        assert await host.read("disk", 0, DISK) == bytes(DISK)

    with_host(test)
    assert path.stat().st_size == 16 * MIB + DISK


# ---- a wrong key, another place, another size


def test_a_passphrase_that_opens_one_key_only(tmp_path: Path) -> None:
    """Half way both keys are needed."""
    path = formatted(tmp_path / "image")
    content = os.urandom(DISK)

    async def begin(host: Host) -> None:
        node = await disk(host, path)
        await host.write("disk", 0, content)
        await command(host, "luks-reencrypt", secrets=["two"], speed=2 * MIB, **CHEAP)
        await host.until(lambda: node.log is not None and node.boundary >= MIB, 30)

    async def look(host: Host) -> None:
        for id, words in (("one", "wrong"), ("two", TWO.decode())):
            await host.backend.object_add({"qom-type": "secret", "id": id, "data": words})
        for secret in ("one", "two"):
            with refused("Invalid password, cannot unlock any keyslot"):
                await host.add("luks", "disk", key_secret=secret,
                               file={"driver": "file", "filename": str(path)})  # fmt: skip

    with_host(begin)
    with_host(look)
    assert content_of(path) == content


def test_the_end_of_a_disk_that_has_no_whole_sector(tmp_path: Path) -> None:
    """It is refused before anything is encrypted."""
    header = tmp_path / "header"
    header.touch()

    async def test(host: Host) -> None:
        await host.backend.object_add({"qom-type": "secret", "id": "one", "data": ONE.decode()})
        await host.add("file", "f", filename=host.file("raw", DISK))
        await host.add("file", "h", filename=str(header))
        await host.backend.blockdev_create("make", {
            "driver": "luks", "version": "luks2", "file": "f", "header": "h", "in-place": True,
            "size": 6 * MIB, "sector-size": 4096, "key-secret": "one", **CHEAP,
        })  # fmt: skip
        await host.until(lambda: host.backend.jobs.get("make").status.value == "concluded")
        assert host.backend.jobs.get("make").error is None
        host.backend.jobs.get("make").dismiss()
        with refused(f"a disk of {DISK} bytes cannot be encrypted with sectors of 4096"):
            await host.add("luks", "disk", key_secret="one", header="h", file="f")
        await host.backend.block_resize("f", 6 * MIB)
        await host.add("luks", "disk", key_secret="one", header="h", file="f")
        with refused("cannot be encrypted with sectors of 4096"):
            await host.backend.block_resize("disk", 6 * MIB + 512)
        await command(host, "luks-reencrypt", **CHEAP)
        await until_done(host)
        assert ended_well(host)

    with_host(test)


def test_an_image_is_not_set_back_under_an_open_header(tmp_path: Path) -> None:
    raw = formatted(tmp_path / "raw")
    from crash import newest_tools

    newest_tools().img("convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "q.qcow2")
    content = os.urandom(DISK)

    async def test(host: Host) -> None:
        await host.add("qcow2", "q", file={"driver": "file", "filename": str(tmp_path / "q.qcow2")})
        await disk(host, raw, file="q")
        await host.write("disk", 0, content)
        await host.backend.internal_snapshot("q", "create", "old")
        await command(host, "luks-reencrypt", **CHEAP)
        await until_done(host)
        assert ended_well(host)
        with refused("in use by the encrypted node 'disk'"):
            await host.backend.internal_snapshot("q", "apply", "old")
        await host.write("disk", 0, bytes(DISK))
        await host.backend.blockdev_del("disk")
        await host.backend.internal_snapshot("q", "apply", "old")
        await disk(host, raw, file="q")
        assert await host.read("disk", 0, DISK) == content

    with_host(test)


# ---- kill -9, with a guest


def test_the_first_key_and_kill_9_under_a_guest(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    """Plain to LUKS2 with the header elsewhere: what a guest was told is written is there."""
    path, header, size = short_dir / "image", short_dir / "header", 16 * MIB
    content = bytearray(random.Random(7).randbytes(size))
    path.write_bytes(content)
    header.touch()
    (short_dir / "key").write_bytes(ONE)
    rnd = random.Random(8)
    doubtful: tuple[int, bytes] | None = None
    kills, began = 0, False
    while True:
        backend = start_backend(
            "--state", "{dir}/state.json", "--control", "{dir}/qmp.sock",
            "--object", "secret,id=one,file={dir}/key",
            "--blockdev", "raw,node-name=plain,file.driver=file,file.filename={dir}/image",
            "--blockdev", "file,node-name=h,filename={dir}/header",
            "--export", "vhost-user-blk,id=e,node-name=plain,writable=on,addr.type=unix,"
            "addr.path={dir}/e.sock",
        )  # fmt: skip
        with ControlClient(str(short_dir / "qmp.sock")) as client:
            if not began:
                _prepare_in_place(client, size)
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
            deadline = time.monotonic() + rnd.uniform(0.1, 0.5)
            while time.monotonic() < deadline:
                length = 512 * rnd.choice((1, 8, 64))
                at = 512 * rnd.randrange((size - length) // 512)
                data = rnd.randbytes(length)
                device.write(at, data)
                content[at : at + length] = data
                at = 512 * rnd.randrange((size - 4096) // 512)
                assert device.read(at, 4096) == content[at : at + 4096]
            at, data = 512 * rnd.randrange((size - 4096) // 512), rnd.randbytes(4096)
            doubtful = at, data
            device.submit(Type.OUT, at // 512, data)
            backend.process.kill()
            assert backend.wait() == -signal.SIGKILL
        kills += 1
    assert kills > 2
    with Device(str(short_dir / "e.sock")) as device:
        for at in range(0, size, MIB):
            found = device.read(at, MIB)
            if doubtful is not None and at <= doubtful[0] < at + MIB:
                continue  # its last write may be there or not
            assert found == content[at : at + MIB], at
    assert backend.stop() == 0
    assert opens(path, ONE, "--header", header)
    assert path.read_bytes()[: 64 * KIB] != content[: 64 * KIB]


def _prepare_in_place(client: ControlClient, size: int) -> None:
    """What docs/luks.md says, up to the job."""
    options = {"driver": "luks", "version": "luks2", "in-place": True, "file": "plain",
               "header": "h", "size": size, "key-secret": "one", **CHEAP}  # fmt: skip
    client.execute("blockdev-create", {"job-id": "j", "options": options})
    deadline = time.monotonic() + 30
    while client.execute("query-jobs")[0]["status"] != "concluded":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "error" not in client.execute("query-jobs")[0]
    client.execute("job-dismiss", {"id": "j"})
    filter = {"driver": "luks", "node-name": "disk", "header": "h", "key-secret": "one"}
    client.execute("block-filter-insert", {"export-id": "e", "filter": filter})
    client.execute("luks-reencrypt", {"node-name": "disk", "speed": 8 * MIB, **CHEAP})
