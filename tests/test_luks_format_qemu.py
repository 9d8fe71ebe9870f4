# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS1 is interchangeable with QEMU's: headers, key slots, and the data that they are about."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from crash import Tools, all_tools, newest_tools
from luks_headers import QUICK, run
from qemu_clock import quick_kdf

from vhostblk import luks
from vhostblk.luks.ciphers import CipherSpec, SectorCipher
from vhostblk.luks.file import open_storage
from vhostblk.schema import VhostblkError

ONE, TWO = b"first passphrase", b"second"
SIZE = 4 << 20
TOOLS = pytest.mark.parametrize("tools", all_tools(), ids=lambda tools: tools.name)

VARIANTS: list[dict[str, str]] = [
    {},
    {"cipher-alg": "aes-128"},
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv",
     "ivgen-hash-alg": "sha256"},
    {"cipher-alg": "aes-256", "cipher-mode": "cbc", "ivgen-alg": "essiv",
     "ivgen-hash-alg": "sha256", "hash-alg": "sha512"},
    # No aes-192: its split key is not a number of whole sectors, at which QEMU aborts.
    {"cipher-alg": "aes-256", "cipher-mode": "ctr", "ivgen-alg": "plain64"},
    {"cipher-alg": "aes-256", "cipher-mode": "cbc", "ivgen-alg": "plain64",
     "hash-alg": "ripemd160"},
    {"cipher-alg": "cast5-128", "cipher-mode": "cbc", "ivgen-alg": "plain64"},
]  # fmt: skip


class Qemu:
    """QEMU's tools on one encrypted image."""

    def __init__(self, tools: Tools, path: Path) -> None:
        self.tools, self.path = tools, path

    def secret(self, words: bytes, id: str = "s") -> list[str]:
        file = self.path.parent / f"secret-{id}-{words.hex()[:16]}"
        file.write_bytes(words)
        return ["--object", f"secret,id={id},file={file}"]

    def image(self) -> str:
        return f"driver=luks,key-secret=s,file.filename={self.path}"

    def create(self, **options: str) -> None:
        given = "".join(f",{key}={value}" for key, value in options.items())
        self.tools.run(
            self.tools.qemu_img, "create", "-q", *self.secret(ONE), "-f", "luks",
            "-o", f"key-secret=s,iter-time=10{given}", self.path, str(SIZE), env=quick_kdf(),
        )  # fmt: skip

    def info(self) -> dict[str, Any]:
        said = self.tools.run(self.tools.qemu_img, "info", "--output=json", self.path)
        told: dict[str, Any] = json.loads(said)["format-specific"]["data"]
        return told

    def io(self, *commands: str, words: bytes = ONE, ok: tuple[int, ...] = (0,)) -> str:
        steps = [word for command in commands for word in ("-c", command)]
        return self.tools.run(self.tools.qemu_io, *self.secret(words), "--image-opts", *steps,
                              self.image(), ok=ok)  # fmt: skip

    def amend(self, options: str, *more: bytes) -> None:
        extra = [word for number, words in enumerate(more)
                 for word in self.secret(words, f"s{number}")]  # fmt: skip
        self.tools.run(self.tools.qemu_img, "amend", *self.secret(ONE), *extra, "--image-opts",
                       self.image(), "-o", options, env=quick_kdf())  # fmt: skip


def plain(path: Path, passphrase: bytes) -> bytes:
    """What the disk says, decrypted in Python."""

    async def work() -> bytes:
        with open_storage(str(path), write=False) as storage:
            volume = await luks.open_volume(storage)
            _, key = await volume.unlock(passphrase)
            with key:
                segment = volume.segment
                cipher = SectorCipher(CipherSpec.parse(segment.cipher), key.view())
            data = await storage.read(segment.offset, storage.size - segment.offset)
            return bytes(cipher.decrypt(0, data))

    content: bytes = run(work())
    return content


async def slot_of(path: Path, passphrase: bytes) -> int:
    with open_storage(str(path), write=False) as storage:
        return await (await luks.open_volume(storage)).test(passphrase)


@TOOLS
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options.values()))
def test_qemu_creates_and_we_read(tmp_path: Path, tools: Tools, options: dict[str, str]) -> None:
    qemu = Qemu(tools, tmp_path / "image")
    try:
        qemu.create(**options)
    except AssertionError as error:
        if "not supported" in str(error) or "Algorithm" in str(error):
            pytest.skip("this QEMU has no such cipher or hash")
        raise
    qemu.io("write -P 0x5a 0 64k", "write -P 0xa5 1M 4k", "write -P 0x11 4190208 4k")
    content = plain(qemu.path, ONE)
    assert len(content) == SIZE
    assert content[: 64 << 10] == b"\x5a" * (64 << 10)
    assert content[1 << 20 : (1 << 20) + 4096] == b"\xa5" * 4096
    assert content[-4096:] == b"\x11" * 4096


@TOOLS
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options.values()))
def test_we_create_and_qemu_reads(tmp_path: Path, tools: Tools, options: dict[str, str]) -> None:
    qemu = Qemu(tools, tmp_path / "image")
    path = qemu.path
    path.touch()
    data = os.urandom(SIZE)

    async def work() -> None:
        given = luks.CreateOptions.model_validate({"pbkdf-force-iterations": 1000, **options})
        with open_storage(str(path), write=True) as storage:
            volume = await luks.create(storage, ONE, given)
            _, key = await volume.unlock(ONE)
            with key:
                segment = volume.segment
                cipher = SectorCipher(CipherSpec.parse(segment.cipher), key.view())
            await storage.write(segment.offset, bytes(cipher.encrypt(0, data)))

    run(work())
    reference = tmp_path / "reference"
    reference.write_bytes(data)
    said = tools.run(tools.qemu_img, "compare", *qemu.secret(ONE), "--image-opts", qemu.image(),
                     f"driver=raw,file.filename={reference}", ok=(0, 1))  # fmt: skip
    assert "identical" in said
    assert qemu.info()["slots"][0]["active"]


def test_slots_in_turns(tmp_path: Path) -> None:
    qemu = Qemu(newest_tools(), tmp_path / "image")
    qemu.create()
    qemu.amend("state=active,new-secret=s0,iter-time=10", TWO)
    assert run(slot_of(qemu.path, TWO)) == 1

    async def change() -> None:
        with open_storage(str(qemu.path), write=True) as storage:
            volume = await luks.open_volume(storage)
            await volume.add_passphrase(TWO, b"three", 5, QUICK)
            await volume.remove_slot(1)

    run(change())
    assert [slot["active"] for slot in qemu.info()["slots"]] == [
        number in (0, 5) for number in range(8)
    ]
    qemu.io("read 0 4k", words=b"three")
    assert "Invalid password" in qemu.io("read 0 4k", words=TWO, ok=(1,))
    qemu.amend("state=inactive,old-secret=s0", b"three")
    with pytest.raises(VhostblkError, match="Invalid password"):
        run(slot_of(qemu.path, b"three"))


def test_detached_headers(tmp_path: Path) -> None:
    tools = newest_tools()
    if tools.version < (9, 0):
        pytest.skip("QEMU before 9.0 has no detached headers")
    qemu = Qemu(tools, tmp_path / "header")
    tools.run(tools.qemu_img, "create", "-q", *qemu.secret(ONE), "-f", "luks", "-o",
              "key-secret=s,iter-time=10,detached-header=on", qemu.path,
              env=quick_kdf())  # fmt: skip

    async def look() -> luks.Segment:
        with open_storage(str(qemu.path), write=False) as storage:
            volume = await luks.open_volume(storage)
            await volume.test(ONE)
            return volume.segment

    assert run(look()).offset == 0
    mine, data = tmp_path / "mine", tmp_path / "data"
    mine.touch()
    data.write_bytes(bytes(SIZE))

    async def create() -> None:
        with open_storage(str(mine), write=True) as storage:
            given = luks.CreateOptions(pbkdf_force_iterations=1000)
            await luks.create(storage, ONE, given, detached=True)

    run(create())
    image = {
        "driver": "luks",
        "key-secret": "s",
        "file": {"driver": "file", "filename": str(data)},
        "header": {"driver": "file", "filename": str(mine)},
    }
    tools.run(tools.qemu_io, *qemu.secret(ONE), "-c", "write -P 7 0 64k",
              "-c", "read -P 7 0 64k", "json:" + json.dumps(image))  # fmt: skip


def test_secrets_are_written_as_for_qemu(tmp_path: Path) -> None:
    """The same options of a secret object mean the same bytes."""
    import base64

    from in_process import Host, with_host

    from vhostblk.objects.secret import Secret

    tools = newest_tools()
    file = tmp_path / "base64"
    file.write_bytes(base64.encodebytes(TWO * 20))
    words: list[bytes] = []

    async def ours(host: Host) -> None:
        given = {"qom-type": "secret", "id": "s", "file": str(file), "format": "base64"}
        await host.backend.object_add(given)
        words.append(bytes(host.backend.objects.find("s", Secret).data.view()))

    with_host(ours)
    image = tmp_path / "image"
    tools.run(tools.qemu_img, "create", "-q", "--object", f"secret,id=s,file={file},format=base64",
              "-f", "luks", "-o", "key-secret=s,iter-time=10", image, "1M",
              env=quick_kdf())  # fmt: skip
    assert run(slot_of(image, words[0])) == 0
