# SPDX-License-Identifier: GPL-2.0-or-later
"""Key slots of a disk in use: through the control socket, beside snapshots, and kill -9."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh_process
import pytest
from backend_process import BackendProcess
from crash import newest_tools
from in_process import Host, refused, with_host
from luks_headers import CHEAP1, CHEAP2, MIB, Memory, opens, run

from vhostblk import luks
from vhostblk.control.client import ControlClient, Refused
from vhostblk.schema import VhostblkError

ONE, TWO, THREE = b"first passphrase", b"second", b"third"
CHEAP = {"pbkdf-force-iterations": 1000}
VERSIONS = pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
DISK = 4 * MIB


def formatted(path: Path, options: dict[str, Any]) -> Path:
    async def work() -> bytes:
        storage = Memory()
        volume = await luks.create(storage, ONE, luks.CreateOptions(**options))
        return bytes(storage.content).ljust(volume.segment.offset + DISK, b"\0")

    path.write_bytes(run(work()))
    return path


def coded(words: bytes) -> str:
    return base64.b64encode(words).decode()


async def command(host: Host, name: str, **arguments: Any) -> Any:
    return await host.command(f"luks-key-slot-{name}", **{"node_name": "disk", **arguments})


async def disk(host: Host, file: Path | str | dict[str, Any], **options: Any) -> Any:
    """The node; on a file, on a node by name, or on one to make."""
    if not host.backend.objects.has("one", "secret"):
        for id, words in (("one", ONE), ("two", TWO)):
            await host.backend.object_add({"qom-type": "secret", "id": id, "data": words.decode()})
    if isinstance(file, Path):
        file = {"driver": "file", "filename": str(file)}
    return await host.add("luks", "disk", key_secret="one", file=file, **options)


@VERSIONS
def test_the_commands(tmp_path: Path, options: dict[str, Any]) -> None:
    path = formatted(tmp_path / "image", options)
    pbkdf = {} if options is CHEAP1 else {"pbkdf": "pbkdf2"}

    async def test(host: Host) -> None:
        await disk(host, path)
        told = await command(host, "list")
        assert told["version"] == (1 if options is CHEAP1 else 2)
        assert [slot["slot"] for slot in told["slots"] if slot["state"] == "active"] == [0]
        assert await command(host, "test", key_secret="one") == {"keyslot": 0}
        with refused("Invalid password, cannot unlock any keyslot"):
            await command(host, "test", key_secret="two")
        added = await command(host, "add", key_secret="one", new_secret="two", keyslot=3, **CHEAP,
                              **pbkdf)  # fmt: skip
        assert added == {"keyslot": 3}
        assert await command(host, "test", key_data=coded(TWO)) == {"keyslot": 3}
        with refused("key slot 3 is in use"):
            await command(host, "add", key_secret="one", new_secret="two", keyslot=3)
        rotated = await command(host, "rotate", old_secret="two", new_data=coded(THREE), **CHEAP,
                                **pbkdf)  # fmt: skip
        assert rotated == {"keyslot": 1}
        with refused("Invalid password"):
            await command(host, "test", key_secret="two")
        assert await command(host, "remove", old_secret="one") == {"keyslots": [0]}
        with refused("this is the last key slot", "force"):
            await command(host, "remove", keyslot=1)
        assert await command(host, "test", key_data=coded(THREE)) == {"keyslot": 1}
        assert await command(host, "remove", keyslot=1, force=True) == {"keyslots": [1]}
        # The disk itself goes on, with the key that it has.
        await host.write("disk", 0, b"\x5a" * 4096)
        assert await host.read("disk", 0, 4096) == b"\x5a" * 4096

    with_host(test)
    assert not opens(path, ONE)
    assert not opens(path, THREE)


def test_mistakes(tmp_path: Path) -> None:
    path = formatted(tmp_path / "image", CHEAP2)

    async def test(host: Host) -> None:
        await disk(host, path)
        await host.null("null")
        with refused("has no LUKS header"):
            await command(host, "list", node_name="null")
        with refused("Failed to find node", "did you mean 'disk'"):
            await command(host, "list", node_name="dsk")
        with refused("'key-secret' or 'key-data': it is missing"):
            await command(host, "test")
        with refused("not both"):
            await command(host, "test", key_secret="one", key_data=coded(ONE))
        with refused("'key-data' is not base64"):
            await command(host, "test", key_data="%")
        with refused('secret "thre" not found'):
            await command(host, "test", key_secret="thre")
        with refused("the new passphrase is empty"):
            await command(host, "add", key_secret="one", new_data="")
        with refused("not both"):
            await command(host, "remove", keyslot=0, old_secret="one")
        with refused("'pbkdf-memory': at least"):
            await command(host, "add", key_secret="one", new_secret="two", pbkdf_memory=1)
        with refused("key slot 9 is not in use; in use: 0"):
            await command(host, "remove", keyslot=9)
        # Nobody needs the secrets any more.
        await host.backend.object_del("two")

    with_host(test)


def test_a_node_that_is_read_only(tmp_path: Path) -> None:
    path = formatted(tmp_path / "image", CHEAP2)
    before = path.read_bytes()

    async def test(host: Host) -> None:
        await disk(host, path, read_only=True)
        assert await command(host, "test", key_secret="one") == {"keyslot": 0}
        with refused("read-only"):
            await command(host, "add", key_secret="one", new_secret="two")

    with_host(test)
    assert path.read_bytes() == before


def test_a_secret_in_use_by_a_command_stays(tmp_path: Path) -> None:
    path = formatted(tmp_path / "image", CHEAP2)

    async def test(host: Host) -> None:
        await disk(host, path)
        adding = asyncio.create_task(
            command(host, "add", key_secret="one", new_secret="two", **CHEAP, pbkdf="pbkdf2")
        )
        await asyncio.sleep(0)
        with refused("in use"):
            await host.backend.object_del("two")
        await adding
        await host.backend.object_del("two")

    with_host(test)
    assert opens(path, TWO)


def test_the_node_goes_meanwhile(tmp_path: Path) -> None:
    """While a key is derived, the node is deleted: an error, and the header is as it was."""
    path = formatted(tmp_path / "image", CHEAP2)
    before = path.read_bytes()

    async def test(host: Host) -> None:
        await disk(host, path)
        adding = asyncio.create_task(
            command(host, "add", key_secret="one", new_secret="two", pbkdf="pbkdf2",
                    pbkdf_force_iterations=1_000_000)
        )  # fmt: skip
        await asyncio.sleep(0.05)
        await host.backend.blockdev_del("disk")
        with refused("The LUKS header of node 'disk' cannot be"):
            await adding

    with_host(test)
    assert path.read_bytes() == before


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_storage_that_fails(tmp_path: Path, operation: str, skip: int) -> None:
    """An error, and the passphrases that there were; the next attempt finishes it."""
    path = formatted(tmp_path / "image", CHEAP2)

    async def test(host: Host) -> None:
        await disk(host, {
            "driver": "error-inject",
            "operations": [operation],
            "skip": skip,
            "count": 1,
            "file": {"driver": "file", "filename": str(path)},
        })  # fmt: skip
        new = {"new_secret": "two", "pbkdf": "pbkdf2", **CHEAP}
        with refused("cannot be read or written", "Input/output error"):
            await command(host, "add", key_secret="one", **new)
        assert await command(host, "test", key_secret="one") == {"keyslot": 0}
        added = await command(host, "add", key_secret="one", **new)
        assert await command(host, "test", key_secret="two") == added

    with_host(test)
    assert opens(path, ONE)
    assert opens(path, TWO)


@VERSIONS
def test_snapshots_meanwhile(tmp_path: Path, options: dict[str, Any]) -> None:
    """What belongs together of a header is never in two images of a chain by halves."""
    tools = newest_tools()
    raw = formatted(tmp_path / "raw", options)
    tools.img("convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "0.qcow2")
    pbkdf = {} if options is CHEAP1 else {"pbkdf": "pbkdf2"}
    count = 6

    async def test(host: Host) -> None:
        file = {"driver": "file", "filename": str(tmp_path / "0.qcow2")}
        await host.add("qcow2", "q", file=file)
        await disk(host, "q")
        await host.export("disk", "e")
        done = False

        async def change() -> int:
            rounds, words = 0, (ONE, TWO)
            while not done:
                old, new = words[rounds % 2], words[(rounds + 1) % 2]
                await command(host, "rotate", old_data=coded(old), new_data=coded(new), **CHEAP,
                              **pbkdf)  # fmt: skip
                rounds += 1
            return rounds

        changing = asyncio.create_task(change())
        for number in range(1, count + 1):
            await asyncio.sleep(random.Random(number).random() * 0.1)
            overlay = str(tmp_path / f"{number}.qcow2")
            given = {"device": "e", "snapshot-file": overlay, "format": "qcow2"}
            await host.backend.transaction([("blockdev-snapshot-sync", given)])
        done = True
        assert await changing > 0

    with_host(test)
    for number in range(count + 1):
        # Each image, as the snapshot has left it, is a volume that one of the two opens.
        content = tools.content(tmp_path / f"{number}.qcow2")
        (tmp_path / "plain").write_bytes(content)
        assert opens(tmp_path / "plain", ONE) or opens(tmp_path / "plain", TWO)


@VERSIONS
def test_kill_9_in_the_middle(
    start_backend: Callable[..., BackendProcess], short_dir: Path, options: dict[str, Any]
) -> None:
    path = formatted(short_dir / "image", options)
    pbkdf = {} if options is CHEAP1 else {"pbkdf": "pbkdf2"}
    rnd = random.Random(7)
    words = {ONE: "one", TWO: "two"}
    current = ONE
    interrupted = 0
    for _ in range(8):
        (short_dir / "key").write_bytes(current)
        backend = start_backend(
            "--control", "{dir}/qmp.sock", "--object", "secret,id=one,file={dir}/key",
            "--blockdev", "luks,node-name=disk,key-secret=one,file.driver=file,"
            "file.filename={dir}/image",
        )  # fmt: skip
        killer = threading.Timer(rnd.uniform(0.01, 0.4), backend.process.kill)
        killer.start()
        with (
            contextlib.suppress(VhostblkError, OSError),
            ControlClient(str(short_dir / "qmp.sock")) as client,
        ):
            while True:
                other = TWO if current == ONE else ONE
                client.execute(
                    "luks-key-slot-rotate",
                    {"node-name": "disk", "old-data": coded(current), "new-data": coded(other),
                     **CHEAP, **pbkdf},
                )  # fmt: skip
                current = other
        assert backend.wait() == -signal.SIGKILL
        killer.join()
        working = [each for each in words if opens(path, each)]
        assert working
        interrupted += working != [current]
        current = working[0]


def test_the_command_line_on_a_node(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    path = formatted(short_dir / "image", CHEAP1)
    for name, words in (("one", ONE), ("two", TWO)):
        (short_dir / name).write_bytes(words)
    start_backend(
        "--control", "{dir}/qmp.sock", "--object", "secret,id=one,file={dir}/one",
        "--blockdev", "luks,node-name=disk,key-secret=one,file.driver=file,"
        "file.filename={dir}/image",
        "--export", "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={dir}/e.sock",
    )  # fmt: skip

    def vhostblk(what: str, *more: str, status: int = 0) -> str:
        done = fresh_process.run(
            [*fresh_process.COMMAND, "luks", what, "disk", "--socket", "qmp.sock", *more],
            cwd=short_dir,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    assert "disk: LUKS1" in vhostblk("list")
    assert "vhostblk luks convert" in vhostblk("reencrypt", status=4)
    assert "disk: LUKS2" in vhostblk("convert")
    assert "disk: LUKS2" in vhostblk("list")
    assert "key slot 1" in vhostblk("add", "--key-file", "one", "--new-key-file", "two", *cheap)
    assert "opens key slot 1" in vhostblk("test", "--key-file", "two")
    assert "0 destroyed" in vhostblk("remove", "--slot", "0")
    said = vhostblk("test", "--key-file", "one", status=1)
    assert said == "vhostblk: Invalid password, cannot unlock any keyslot\n"
    assert "the old one is gone" in vhostblk(
        "rotate", "--key-file", "two", "--new-key-file", "one", *cheap
    )
    assert "last key slot" in vhostblk("remove", "--key-file", "one", status=4)
    assert "job 'reencrypt-disk' has begun" in vhostblk(
        "reencrypt", "--force", "--speed", "1G", *cheap
    )
    with ControlClient(str(short_dir / "qmp.sock")) as client:
        deadline = time.monotonic() + 30
        while client.execute("query-block-jobs"):
            assert time.monotonic() < deadline
    assert "opens key slot" in vhostblk("test", "--key-file", "one")
    assert "works on files" in vhostblk("repair", status=2)
    # The file itself is in use.
    done = subprocess.run([sys.executable, "-m", "vhostblk", "luks", "list", str(path)],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert "in use by another process" in done.stderr
    with ControlClient(str(short_dir / "qmp.sock")) as client, pytest.raises(Refused):
        client.execute("luks-key-slot-list", {"node-name": "nothing"})
