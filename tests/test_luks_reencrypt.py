# SPDX-License-Identifier: GPL-2.0-or-later
"""Another key, or the first one, for a disk in use: nothing is lost, whatever happens meanwhile."""

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
from crash import newest_tools
from in_process import Guest, Host, refused, with_host
from luks_headers import MIB, cryptsetup, opens, run, volume_key

from vhostblk import luks
from vhostblk.control.client import ControlClient
from vhostblk.luks.file import open_storage
from vhostblk.nodes._reencrypt import ReencryptingNode

ONE, TWO = b"first passphrase", b"second"
CHEAP = {"pbkdf": "pbkdf2", "pbkdf-force-iterations": 1000}
DISK = 6 * MIB + 3 * 512


def formatted(path: Path, *words: str, size: int = DISK) -> Path:
    """A volume of cryptsetup's, as a file of its own."""
    with open(path, "wb") as file:
        file.truncate(16 * MIB + size)
    cryptsetup("luksFormat", "--type", "luks2", "--sector-size", "512", "--pbkdf", "pbkdf2",
               "--pbkdf-force-iterations", "1000", *words, path, key=ONE)  # fmt: skip
    return path


async def command(host: Host, name: str, **arguments: Any) -> Any:
    return await host.command(name, **{"node_name": "disk", **arguments})


async def disk(host: Host, path: Path, **options: Any) -> ReencryptingNode:
    for id, words in (("one", ONE), ("two", TWO)):
        if not host.backend.objects.has(id, "secret"):
            await host.backend.object_add({"qom-type": "secret", "id": id, "data": words.decode()})
    file = options.pop("file", {"driver": "file", "filename": str(path)})
    node: ReencryptingNode = await host.add("luks", "disk", key_secret="one", file=file, **options)
    return node


async def until_done(host: Host, seconds: float = 50) -> None:
    await host.until(lambda: not list(host.backend.jobs), seconds)


def ended_well(host: Host) -> bool:
    [data] = host.named("BLOCK_JOB_COMPLETED")
    return "error" not in data


def content_of(path: Path, size: int = DISK, **options: Any) -> bytes:
    """What the disk says when it is opened anew."""
    found: list[bytes] = []

    async def look(host: Host) -> None:
        await disk(host, path, read_only=True, **options)
        found.append(await host.read("disk", 0, size))

    with_host(look)
    return found[0]


class Writer:
    """A guest that goes on writing, and knows what it has written."""

    def __init__(self, guest: Guest, content: bytes, seed: int) -> None:
        self.guest, self.content = guest, bytearray(content)
        self.random = random.Random(seed)
        self.done = False
        self.rounds = 0

    async def work(self) -> None:
        while not self.done:
            length = 512 * self.random.choice((1, 3, 8, 64))
            at = 512 * self.random.randrange((len(self.content) - length) // 512)
            data = self.random.randbytes(length)
            await self.guest.write(at, data)
            self.content[at : at + length] = data
            at = 512 * self.random.randrange((len(self.content) - length) // 512)
            assert await self.guest.read(at, length) == self.content[at : at + length]
            self.rounds += 1


def test_a_new_key_under_a_guest(tmp_path: Path) -> None:
    path = formatted(tmp_path / "image")
    old = volume_key(path, ONE, tmp_path / "key")
    after: list[bytes] = []

    async def test(host: Host) -> None:
        node = await disk(host, path)
        await host.write("disk", 0, os.urandom(DISK))
        await host.export("disk", "e")
        async with host.device("e") as guest:
            writer = Writer(guest, await host.read("disk", 0, DISK), 1)
            working = asyncio.create_task(writer.work())
            told = await command(host, "luks-reencrypt", secrets=["two"], speed=40 * MIB, **CHEAP)
            assert told == {"job-id": "reencrypt-disk"}
            with refused("is being re-encrypted by job 'reencrypt-disk'"):
                await command(host, "luks-reencrypt")
            await until_done(host)
            assert ended_well(host)
            assert node.log is None
            writer.done = True
            await working
            assert writer.rounds > 0
        assert await host.read("disk", 0, DISK) == writer.content
        after.append(bytes(writer.content))

    with_host(test)
    assert content_of(path) == after[0]
    # An ordinary volume, of which cryptsetup knows nothing special; the old key is gone.
    assert opens(path, ONE)
    assert opens(path, TWO)
    new = volume_key(path, ONE, tmp_path / "key")
    assert new != old
    assert new == volume_key(path, TWO, tmp_path / "key")
    said = cryptsetup("luksDump", path)
    assert "equirement" not in said
    assert old not in path.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ("--sector-size", "4096"),
        ("--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"),
        ("--cipher", "aes-xts-plain64", "--key-size", "256"),
    ],
    ids=lambda words: "-".join(words[1::2]),
)
def test_other_sectors_and_ciphers(tmp_path: Path, words: tuple[str, ...]) -> None:
    """The new key is for the same cipher and sectors; a guest writes parts of sectors, too."""
    size = 6 * MIB
    path = formatted(tmp_path / "image", *words, size=size)
    old = volume_key(path, ONE, tmp_path / "key")
    after: list[bytes] = []

    async def test(host: Host) -> None:
        await disk(host, path)
        await host.write("disk", 0, os.urandom(size))
        await host.export("disk", "e")
        async with host.device("e") as guest:
            writer = Writer(guest, await host.read("disk", 0, size), 4)
            working = asyncio.create_task(writer.work())
            await command(host, "luks-reencrypt", speed=20 * MIB, **CHEAP)
            await until_done(host)
            assert ended_well(host)
            writer.done = True
            await working
        after.append(bytes(writer.content))

    with_host(test)
    assert content_of(path, size) == after[0]
    assert opens(path, ONE)
    new = volume_key(path, ONE, tmp_path / "key")
    assert new != old
    assert len(new) == len(old)


def test_the_first_key_of_a_disk_in_use(tmp_path: Path) -> None:
    """A raw disk under a guest gets a filter, whose header is elsewhere, and then a key."""
    path, header = tmp_path / "raw", tmp_path / "header"
    content = os.urandom(DISK)
    path.write_bytes(content)
    header.touch()
    after: list[bytes] = []

    async def test(host: Host) -> None:
        for id, words in (("one", ONE), ("two", TWO)):
            await host.backend.object_add({"qom-type": "secret", "id": id, "data": words.decode()})
        await host.add("file", "f", filename=str(path))
        await host.add("raw", "plain", file="f")
        await host.export("plain", "e")
        await host.add("file", "h", filename=str(header))
        await host.backend.blockdev_create("make", {
            "driver": "luks", "version": "luks2", "file": "plain", "header": "h", "in-place": True,
            "size": DISK, "key-secret": "one", **CHEAP,
        })  # fmt: skip
        await host.until(lambda: host.backend.jobs.get("make").status.value == "concluded")
        assert host.backend.jobs.get("make").error is None
        host.backend.jobs.get("make").dismiss()
        assert path.read_bytes() == content, "it has only been prepared"
        luks_options = {"driver": "luks", "node-name": "disk", "key-secret": "one", "header": "h"}
        given = {"export-id": "e", "filter": luks_options}
        await host.backend.transaction([("block-filter-insert", given)])
        assert await host.read("disk", 0, DISK) == content
        async with host.device("e") as guest:
            written = os.urandom(4096)
            await guest.write(MIB, written)
            writer = Writer(guest, content[:MIB] + written + content[MIB + 4096 :], 2)
            working = asyncio.create_task(writer.work())
            await command(host, "luks-reencrypt", speed=40 * MIB)
            await until_done(host)
            writer.done = True
            await working
            assert await guest.read(DISK - 512, 512) == await host.read("disk", DISK - 512, 512)
        after.append(bytes(writer.content))

    with_host(test)
    encrypted = path.read_bytes()
    for at in range(0, DISK, 512):
        assert encrypted[at : at + 512] != after[0][at : at + 512]
    assert opens(path, ONE, "--header", header)
    from vhostblk.luks.ciphers import CipherSpec, SectorCipher

    key = _key_in(header)
    plain = SectorCipher(CipherSpec.parse("aes-xts-plain64"), key).decrypt(0, encrypted)
    assert bytes(plain) == after[0]


def _key_in(header: Path) -> bytes:
    async def work() -> bytes:
        with open_storage(str(header), write=False) as storage:
            _, key = await (await luks.open_volume(storage)).unlock(ONE)
            with key:
                return bytes(key.view())

    key: bytes = run(work())
    return key


def test_half_way(tmp_path: Path) -> None:
    """Stopped in the middle: usable, not mistaken for anything else, and it goes on."""
    path = formatted(tmp_path / "image")
    content = os.urandom(DISK)

    async def begin(host: Host) -> None:
        await disk(host, path)
        await host.write("disk", 0, content)
        await command(host, "luks-reencrypt", speed=2 * MIB, **CHEAP)
        job = host.backend.block_job("reencrypt-disk")
        await host.until(lambda: job.current_progress > MIB)
        with refused("the disk is being re-encrypted; wait until that is done"):
            await command(host, "luks-key-slot-add", key_secret="one", new_secret="two")
        with refused("being re-encrypted"):
            await command(host, "luks-key-slot-remove", keyslot=0, force=True)
        assert (await command(host, "luks-key-slot-test", key_secret="one"))["keyslot"] == 1
        assert (await command(host, "luks-key-slot-list"))["reencrypting"] is True
        job.cancel()
        await until_done(host)
        assert await host.read("disk", 0, DISK) == content

    async def go_on(host: Host) -> None:
        node = await disk(host, path)
        assert 0 < node.boundary < DISK
        assert await host.read("disk", 0, DISK) == content
        await command(host, "luks-reencrypt")
        await until_done(host)
        assert ended_well(host)

    with_host(begin)
    # cryptsetup, and those who do not know, leave it alone.
    (tmp_path / "new").write_bytes(TWO)
    said = cryptsetup("luksAddKey", path, tmp_path / "new", key=ONE, ok=False)
    assert "requirements" in said
    with pytest.raises(Exception, match="requires vhostblk-reencrypt; finish the re-encryption"):
        _key_in(path)
    assert content_of(path) == content
    with_host(go_on)
    assert content_of(path) == content
    assert opens(path, ONE)


def test_the_disk_grows_meanwhile(tmp_path: Path) -> None:
    path = formatted(tmp_path / "image")
    content = os.urandom(DISK)
    more = DISK + 2 * MIB

    async def test(host: Host) -> None:
        await disk(host, path)
        await host.write("disk", 0, content)
        await command(host, "luks-reencrypt", speed=8 * MIB, **CHEAP)
        job = host.backend.block_job("reencrypt-disk")
        await host.until(lambda: job.current_progress > 0)
        await host.backend.block_resize("disk", more)
        await host.write("disk", DISK, b"\x77" * (2 * MIB))
        job.set_speed(0)
        await until_done(host)
        assert ended_well(host)

    with_host(test)
    assert content_of(path, more) == content + b"\x77" * (2 * MIB)


@pytest.mark.parametrize("skip", [0, 3, 6, 9, 12])
def test_storage_that_fails(tmp_path: Path, skip: int) -> None:
    """Any write or flush of it: an error, a disk that reads as before, and it can go on."""
    path = formatted(tmp_path / "image")
    content = os.urandom(DISK)

    async def test(host: Host) -> None:
        await disk(host, path)
        await host.write("disk", 0, content)
        await host.backend.blockdev_del("disk")
        failing = {
            "driver": "error-inject", "operations": ["write", "flush"], "skip": skip, "count": 1,
            "file": {"driver": "file", "filename": str(path)},
        }  # fmt: skip
        await disk(host, path, file=failing)
        await command(host, "luks-reencrypt", **CHEAP)
        await until_done(host)
        [data] = host.named("BLOCK_JOB_COMPLETED")
        assert "error" in data
        await command(host, "luks-reencrypt", **CHEAP)
        await until_done(host)
        assert "error" not in host.named("BLOCK_JOB_COMPLETED")[-1]
        assert await host.read("disk", 0, DISK) == content

    with_host(test)
    assert content_of(path) == content
    assert opens(path, ONE)


def test_what_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.touch()

    async def make() -> None:
        with open_storage(str(one), write=True) as storage:
            given = luks.CreateOptions(version="luks1", pbkdf_force_iterations=1000)
            await luks.create(storage, ONE, given)
            await storage.write(8 * MIB - 512, bytes(512))

    run(make())
    formatted(two)

    async def test(host: Host) -> None:
        await disk(host, one)
        with refused("LUKS1", "vhostblk luks convert"):
            await command(host, "luks-reencrypt")
        with refused('secret "three" not found'):
            await command(host, "luks-reencrypt", secrets=["three"])
        await host.null("null")
        with refused("'null' is a 'null-co'"):
            await command(host, "luks-reencrypt", node_name="null")
        await host.backend.blockdev_del("disk")
        await disk(host, two, read_only=True)
        with refused("read-only"):
            await command(host, "luks-reencrypt")

    with_host(test)


def test_kill_9_until_it_is_done(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    """Killed again and again; each start goes on by itself, from the state file."""
    path = formatted(short_dir / "image", size=16 * MIB)
    old = volume_key(path, ONE, short_dir / "k")
    content = random.Random(5).randbytes(16 * MIB)

    async def fill(host: Host) -> None:
        await disk(host, path)
        await host.write("disk", 0, content)

    with_host(fill)
    (short_dir / "key").write_bytes(ONE)
    rnd = random.Random(6)
    kills, began = 0, False
    while True:
        backend = start_backend(
            "--state", "{dir}/state.json", "--control", "{dir}/qmp.sock",
            "--object", "secret,id=one,file={dir}/key",
            "--blockdev", "luks,node-name=disk,key-secret=one,file.driver=file,"
            "file.filename={dir}/image",
        )  # fmt: skip
        with ControlClient(str(short_dir / "qmp.sock")) as client:
            if not began:
                client.execute("luks-reencrypt", {"node-name": "disk", "speed": 8 * MIB, **CHEAP})
                deadline = time.monotonic() + 30
                while "luks-reencrypt" not in (short_dir / "state.json").read_text():
                    assert time.monotonic() < deadline
                began = True
            if not client.execute("query-block-jobs"):
                break
        time.sleep(rnd.uniform(0.05, 0.5))
        backend.process.kill()
        assert backend.wait() == -signal.SIGKILL
        kills += 1
    assert kills > 2
    assert backend.stop() == 0
    assert content_of(path, 16 * MIB) == content
    assert opens(path, ONE)
    assert volume_key(path, ONE, short_dir / "k") != old


def test_snapshots_meanwhile(tmp_path: Path) -> None:
    """Header, log and data lie in one chain: each image of it is a moment, and can be read."""
    tools = newest_tools()
    raw = formatted(tmp_path / "raw")
    tools.img("convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "0.qcow2")
    content = os.urandom(DISK)
    count = 5

    async def test(host: Host) -> None:
        file = {"driver": "file", "filename": str(tmp_path / "0.qcow2")}
        await host.add("qcow2", "q", file=file)
        await disk(host, raw, file="q")
        await host.write("disk", 0, content)
        await host.export("disk", "e")
        await command(host, "luks-reencrypt", speed=MIB // 2, **CHEAP)
        job = host.backend.block_job("reencrypt-disk")
        await host.until(lambda: job.current_progress > 0, 30)
        for number in range(1, count + 1):
            overlay = str(tmp_path / f"{number}.qcow2")
            given = {"device": "e", "snapshot-file": overlay, "format": "qcow2"}
            await host.backend.transaction([("blockdev-snapshot-sync", given)])
            await asyncio.sleep(0.03 * number)
        job.set_speed(0)
        await until_done(host)
        assert ended_well(host)
        assert await host.read("disk", 0, DISK) == content

    with_host(test)
    for number in range(count + 1):
        image = tmp_path / f"{number}.qcow2"
        assert tools.check(image).corruptions == 0
        plain = tmp_path / "plain"
        plain.write_bytes(tools.content(image))

        async def look(host: Host) -> None:
            # Writable: what a snapshot has caught in the middle of a zone is finished first.
            await disk(host, plain)  # noqa: B023
            assert await host.read("disk", 0, DISK) == content

        with_host(look)


def test_a_header_made_in_place_needs_luks2_and_a_place_of_its_own(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        await host.backend.object_add({"qom-type": "secret", "id": "one", "data": "x"})
        await host.add("file", "f", filename=host.file("f"))
        for more in ({"version": "luks2"}, {"header": "f"}):
            id = f"make-{len(more['version']) if 'version' in more else 0}"
            options = {"driver": "luks", "file": "f", "size": MIB, "key-secret": "one",
                       "in-place": True, **more}  # fmt: skip
            await host.backend.blockdev_create(id, options)
            await host.until(lambda id=id: host.backend.jobs.get(id).status.value == "concluded")
            assert host.backend.jobs.get(id).error is not None
            host.backend.jobs.get(id).dismiss()

    with_host(test)
