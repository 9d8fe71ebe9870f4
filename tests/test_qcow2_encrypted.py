# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 images with LUKS inside, exchanged with QEMU."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from in_process import MIB, Host, refused, with_host
from luks_headers import qemu

from vhostblk.cli import main
from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_WRITE_ZEROES, REQ_MAY_UNMAP
from vhostblk.luks import KdfOptions
from vhostblk.schema import VhostblkError

PASSPHRASE = "the passphrase"
DISK = 4 * MIB


def image_options(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"


def new_image(path: Path, size: int = DISK, **options: Any) -> Path:
    """As qemu-img makes it."""
    given = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10}
    given |= options
    words = ",".join(f"{name}={value}" for name, value in given.items())
    qemu(PASSPHRASE, "qemu-img", "create", "-q", "-f", "qcow2", "-o", words, str(path), str(size))
    return path


def content(directory: Path, path: Path) -> bytes:
    """The disk as QEMU sees it; and its check finds nothing."""
    raw = directory / "plain.raw"
    options = image_options(path)
    qemu(PASSPHRASE, "qemu-img", "check", "-q", "--image-opts", options)
    qemu(PASSPHRASE, "qemu-img", "convert", "--image-opts", options, "-O", "raw", str(raw))
    return raw.read_bytes()


async def opened(host: Host, path: Path, **options: Any) -> Any:
    if not host.backend.objects.has("s", "secret"):
        await host.backend.objects.add({"qom-type": "secret", "id": "s", "data": PASSPHRASE})
    given: dict[str, Any] = {"encrypt": {"format": "luks", "key-secret": "s"}, **options}
    file = {"driver": "file", "filename": str(path)}
    return await host.add("qcow2", "disk", file=file, discard="unmap", **given)


async def scribble(host: Host, model: bytearray, random_: random.Random, rounds: int = 60) -> None:
    """Random requests; `model` is what the disk contains."""
    engine = host.backend.engine
    handle = host.backend.graph.node("disk").effective
    for _ in range(rounds):
        length = random_.choice([512, 1024, 4096, 7 * 512, 65536, 200 * 1024])
        offset = random_.randrange(0, len(model) - length + 1, 512)
        what = random_.choice(["write"] * 5 + ["zero", "unmap", "flush", "discard"])
        if what == "write":
            data = random_.randbytes(length)
            await host.write("disk", offset, data)
            model[offset : offset + length] = data
        elif what == "flush":
            await engine.submit(handle, OP_FLUSH, 0, None)
        elif what == "discard":
            await engine.submit(handle, OP_DISCARD, offset, length=length)
            model[offset : offset + length] = await host.read("disk", offset, length)
        else:
            flags = REQ_MAY_UNMAP if what == "unmap" else 0
            await engine.submit(handle, OP_WRITE_ZEROES, offset, length=length, flags=flags)
            model[offset : offset + length] = bytes(length)
        assert await host.read("disk", 0, len(model)) == model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512},
        {"cluster_size": 2 * MIB},
        {"compat": "0.10"},
        {"extended_l2": "on", "cluster_size": 65536},
        {"encrypt.cipher-alg": "aes-128", "encrypt.cipher-mode": "cbc"},
        {"encrypt.ivgen-alg": "essiv", "encrypt.cipher-mode": "cbc",
         "encrypt.ivgen-hash-alg": "sha256"},
    ],
    ids=str,
)  # fmt: skip
def test_images_of_qemu(tmp_path: Path, options: dict[str, Any]) -> None:
    path = new_image(tmp_path / "disk", **options)
    io = ("-c", "write -P 0x11 0 100k", "-c", "write -P 0x22 1M 5k")
    qemu(PASSPHRASE, "qemu-io", "--image-opts", *io, image_options(path))
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    model = bytearray(DISK)
    model[: 100 << 10] = b"\x11" * (100 << 10)
    model[MIB : MIB + (5 << 10)] = b"\x22" * (5 << 10)

    async def test(host: Host) -> None:
        await opened(host, path)
        assert await host.read("disk", 0, DISK) == model
        await scribble(host, model, random.Random(seed))

    with_host(test)
    assert content(tmp_path, path) == model
    with_host(lambda host: _reread(host, path, model))


async def _reread(host: Host, path: Path, model: bytearray) -> None:
    await opened(host, path, read_only=True)
    assert await host.read("disk", 0, len(model)) == model


@pytest.mark.parametrize("options", [{}, {"cluster-size": 4096, "version": "v2"}], ids=str)
def test_ours_for_qemu(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "disk"
    path.touch()
    model = bytearray(DISK)

    async def test(host: Host) -> None:
        await host.backend.objects.add({"qom-type": "secret", "id": "s", "data": PASSPHRASE})
        encrypt = {"format": "luks", "key-secret": "s", "pbkdf-force-iterations": 1000}
        file = {"driver": "file", "filename": str(path)}
        new = {"driver": "qcow2", "file": file, "size": DISK, "encrypt": encrypt, **options}
        with refused("noise"):
            await host.backend.blockdev_create("job", {**new, "preallocation": "full"})
            job = host.backend.jobs.get("job")
            await host.until(lambda: job.status.value == "concluded")
            error, _ = job.error, job.dismiss()
            raise VhostblkError(str(error))
        await host.backend.blockdev_create("job", new)
        job = host.backend.jobs.get("job")
        await host.until(lambda: job.status.value == "concluded")
        assert not job.error
        job.dismiss()
        await opened(host, path)
        await scribble(host, model, random.Random(3), 30)

    with_host(test)
    assert content(tmp_path, path) == model


def test_nothing_of_the_guest_is_on_disk_in_plain(tmp_path: Path) -> None:
    path = new_image(tmp_path / "disk")
    secret = os.urandom(16)

    async def test(host: Host) -> None:
        await opened(host, path)
        await host.write("disk", 0, secret * 32)
        await host.write("disk", MIB, secret * 8192)
        await host.write("disk", 512, secret * 32)

    with_host(test)
    assert secret not in path.read_bytes()


def test_the_command_makes_one_that_qemu_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, key = tmp_path / "new.qcow2", tmp_path / "key"
    key.write_text(PASSPHRASE)
    options = "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,cluster_size=4k"
    words = ["-f", "qcow2", "-o", options, "--key-file", str(key)]
    assert main(["create", *words, str(path), str(DISK)]) == 0
    assert f"qcow2, {DISK} bytes" in capsys.readouterr().out
    command = ("qemu-io", "--image-opts", image_options(path), "-c", "write -q -P 7 0 1M")
    qemu(PASSPHRASE, *command)
    assert content(tmp_path, path) == b"\7" * MIB + bytes(DISK - MIB)
    assert PASSPHRASE.encode() not in path.read_bytes()


def test_a_backing_file_that_is_not_encrypted(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(DISK))
    path = new_image(tmp_path / "disk", backing_file=base, backing_fmt="raw")
    model = bytearray(base.read_bytes())

    async def test(host: Host) -> None:
        await opened(host, path)
        await scribble(host, model, random.Random(5))

    with_host(test)
    assert content(tmp_path, path) == model


def test_internal_snapshots(tmp_path: Path) -> None:
    path = new_image(tmp_path / "disk")
    model, before = bytearray(DISK), []

    async def test(host: Host) -> None:
        await opened(host, path)
        await scribble(host, model, random.Random(1), 20)
        before.append(bytes(model))
        await host.backend.internal_snapshot("disk", "create", "then")
        await scribble(host, model, random.Random(2), 20)

    with_host(test)
    assert content(tmp_path, path) == model
    options = image_options(path)
    raw = tmp_path / "then.raw"
    qemu(PASSPHRASE, "qemu-img", "convert", "-l", "snapshot.name=then", "--image-opts", options,
         "-O", "raw", str(raw))  # fmt: skip
    assert raw.read_bytes() == before[0]


def test_what_is_refused(tmp_path: Path) -> None:
    path = new_image(tmp_path / "disk")
    plain = newest_tools().create(tmp_path / "plain", DISK)

    async def test(host: Host) -> None:
        file = {"driver": "file", "filename": str(path)}
        with refused("is encrypted", "encrypt.key-secret"):
            await host.add("qcow2", "disk", file=file)
        await host.backend.objects.add({"qom-type": "secret", "id": "wrong", "data": "x"})
        with refused("Invalid password, cannot unlock any keyslot"):
            await opened(host, path, encrypt={"format": "luks", "key-secret": "wrong"})
        with refused("not found"):
            await opened(host, path, encrypt={"format": "luks", "key-secret": "nobody"})
        with refused("is not encrypted"):
            await opened(host, plain)
        with refused("aes"):
            await opened(host, path, encrypt={"format": "aes", "key-secret": "s"})
        node = await opened(host, path)
        assert node.volume.version == 1
        with refused("in use"):
            await host.backend.objects.delete("s")

    with_host(test)


def test_key_slots_change_in_use(tmp_path: Path) -> None:
    path = new_image(tmp_path / "disk")

    async def test(host: Host) -> None:
        node = await opened(host, path)
        await host.write("disk", 0, b"\x77" * 4096)
        kdf = KdfOptions(iter_time=100)
        added = await node.volume.add_passphrase(PASSPHRASE.encode(), b"another", kdf_options=kdf)
        await host.write("disk", 4096, b"\x77" * 4096)
        assert await node.volume.test(b"another") == added

    with_host(test)
    assert content(tmp_path, path)[:8192] == b"\x77" * 8192
    qemu("another", "qemu-img", "check", "--image-opts", image_options(path))
