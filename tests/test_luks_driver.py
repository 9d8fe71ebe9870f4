# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver `luks`, with volumes of cryptsetup and QEMU, and ours read by them."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from in_process import MIB, Host, refused, with_host
from luks_headers import cryptsetup, opens, qemu, sparse, volume_key

from vhostblk.luks import KdfOptions
from vhostblk.luks.ciphers import CipherSpec, SectorCipher

PASSPHRASE, OTHER = b"the passphrase", b"another one"
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
DISK = 4 * MIB


async def secret(host: Host, id: str = "s", data: bytes = PASSPHRASE) -> None:
    await host.backend.objects.add({"qom-type": "secret", "id": id, "data": data.decode()})


async def luks(host: Host, path: Path, name: str = "disk", **options: Any) -> Any:
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return await host.add("luks", name, **{"key_secret": "s", "file": file, **options})


def formatted(path: Path, *words: str, kind: str = "luks2", size: int = DISK) -> Path:
    """A volume that cryptsetup has made, for a disk of `size` bytes."""
    header = 16 * MIB if kind == "luks2" else 2 * MIB
    sparse(path, header + size)
    cryptsetup("luksFormat", "--type", kind, *CHEAP, *words, path, key=PASSPHRASE)
    return path


def qemu_content(directory: Path, path: Path) -> bytes:
    """The disk as QEMU sees it."""
    raw = directory / "plain.raw"
    image = f"driver=luks,key-secret=s,file.filename={path}"
    qemu(PASSPHRASE.decode(), "qemu-img", "convert", "--image-opts", image, "-O", "raw", str(raw))
    return raw.read_bytes()


async def scribble(host: Host, node: str, size: int, seed: int = 1) -> bytes:
    """Random writes, some of them to parts of sectors; what the disk contains then."""
    random_ = random.Random(seed)
    content = bytearray(await host.read(node, 0, size))
    for _ in range(40):
        length = random_.choice([512, 1024, 4096, 7 * 512, 65536, MIB])
        offset = random_.randrange(0, size - length + 1, 512)
        data = random_.randbytes(length)
        await host.write(node, offset, data)
        content[offset : offset + length] = data
    assert await host.read(node, 0, size) == content
    return bytes(content)


# ---- what can be created


@pytest.mark.parametrize("version", ["luks1", "luks2"])
@pytest.mark.parametrize(
    "cipher",
    [
        "aes-128 xts plain64", "aes-192 xts plain64", "aes-256 xts plain", "aes-256 xts essiv",
        "aes-256 xts benbi", "aes-256 cbc plain64be", "aes-256 cbc essiv", "aes-128 cbc benbi",
        "aes-192 cbc eboiv", "aes-256 cbc null", "aes-256 ctr plain64be", "aes-256 ecb null",
        "camellia-256 xts plain64", "camellia-128 cbc plain64", "sm4 xts plain64",
        "sm4 cbc plain", "cast5-128 cbc plain64", "3des cbc plain64",
    ],
)  # fmt: skip
def test_any_cipher(tmp_path: Path, version: str, cipher: str) -> None:
    """What the engine has written, Python's implementation reads, and the other way round."""
    path = tmp_path / "disk"
    path.touch()
    alg, mode, iv = cipher.split()
    sector_size = 4096 if version == "luks2" else 512
    keys: list[bytes] = []
    content: list[bytes] = []

    async def test(host: Host) -> None:
        await secret(host)
        await host.add("file", "f", filename=str(path))
        more = {"sector-size": sector_size, "pbkdf": "pbkdf2"} if version == "luks2" else {}
        await host.backend.blockdev_create("make", {
            "driver": "luks", "version": version, "file": "f", "size": DISK, "key-secret": "s",
            "cipher-alg": alg, "cipher-mode": mode, "ivgen-alg": iv,
            "pbkdf-force-iterations": 1000, **more,
        })  # fmt: skip
        await host.until(lambda: host.backend.jobs.get("make").status.value == "concluded", 30)
        assert host.backend.jobs.get("make").error is None
        node = await host.add("luks", "disk", key_secret="s", file="f")
        content.append(await scribble(host, "disk", DISK))
        segment = node.volume.segment
        _, key = await node.volume.unlock(PASSPHRASE)
        with key:
            keys.append(bytes(key.view()))
        theirs = SectorCipher(CipherSpec.parse(segment.cipher), keys[0], sector_size)
        raw = path.read_bytes()[segment.offset :]
        assert theirs.decrypt(0, raw) == content[0]
        data = os.urandom(4096)
        with open(path, "r+b") as file:
            file.seek(segment.offset + DISK - 4096)
            file.write(theirs.encrypt((DISK - 4096) // 512, data))
        assert await host.read("disk", DISK - 4096, 4096) == data

    with_host(test)


# ---- other programs' volumes


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("luks1", []),
        ("luks1", ["--cipher", "aes-xts-plain64", "--key-size", "256"]),
        ("luks1", ["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"]),
        ("luks2", []),
        ("luks2", ["--sector-size", "4096"]),
        ("luks2", ["--cipher", "aes-cbc-plain64", "--key-size", "128"]),
        ("luks1", ["--cipher", "aes-cbc-plain", "--key-size", "256"]),
        ("luks1", ["--cipher", "aes-cbc-benbi", "--key-size", "256"]),
        ("luks2", ["--cipher", "aes-cbc-eboiv", "--key-size", "256"]),
        ("luks2", ["--cipher", "aes-xts-plain64be", "--key-size", "512", "--sector-size", "4096"]),
        ("luks2", ["--cipher", "aes-cbc-null", "--key-size", "256"]),
        ("luks2", ["--cipher", "aes-ecb", "--key-size", "256"]),
        ("luks2", ["--offset", "65536"]),
    ],
)
def test_volumes_of_cryptsetup(tmp_path: Path, kind: str, words: list[str]) -> None:
    """Read and written; the sectors are encrypted as another implementation does it."""
    path = formatted(tmp_path / "disk", *words, kind=kind, size=32 * MIB)
    written: list[bytes] = []
    sectors: list[int] = []

    async def test(host: Host) -> None:
        await secret(host)
        node = await luks(host, path)
        assert node.size == path.stat().st_size - node.data_shift()
        sectors.append(node.volume.segment.sector_size)
        written.append(await scribble(host, "disk", DISK))

    with_host(test)
    assert opens(path, PASSPHRASE)
    key = volume_key(path, PASSPHRASE, tmp_path / "key")
    told = cryptsetup("luksDump", path)
    assert "4096" not in words or sectors == [4096]
    offset = 65536 * 512 if "65536" in words else (16 if kind == "luks2" else 2) * MIB
    name = words[words.index("--cipher") + 1] if "--cipher" in words else "aes-xts-plain64"
    assert name.split("-")[0] in told
    cipher = SectorCipher(CipherSpec.parse(name), key, sectors[0])
    raw = path.read_bytes()[offset : offset + DISK]
    assert cipher.decrypt(0, raw) == written[0]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha512",
        "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain",
        "cipher-alg=aes-256,cipher-mode=ctr,ivgen-alg=plain64",
        "cipher-alg=aes-256,cipher-mode=ecb,ivgen-alg=plain64",
        "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=plain64",
    ],
)
def test_volumes_of_qemu(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk"
    more = f"key-secret=s,iter-time=10{',' if options else ''}{options}"
    qemu(
        PASSPHRASE.decode(),
        "qemu-img",
        "create",
        "-q",
        "-f",
        "luks",
        "-o",
        more,
        str(path),
        str(DISK),
    )
    image = f"driver=luks,key-secret=s,file.filename={path}"
    qemu(PASSPHRASE.decode(), "qemu-io", "--image-opts", "-c", "write -P 0x5a 1M 64k", image)
    written: list[bytes] = []

    async def test(host: Host) -> None:
        await secret(host)
        node = await luks(host, path)
        assert node.size == DISK
        assert await host.read("disk", MIB, 65536) == b"\x5a" * 65536
        written.append(await scribble(host, "disk", DISK))

    with_host(test)
    assert qemu_content(tmp_path, path) == written[0]


# ---- ours


def create(host: Host, path: Path, **options: Any) -> dict[str, Any]:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    path.touch()
    return {
        "driver": "luks",
        "file": {"driver": "file", "filename": str(path)},
        "size": DISK,
        "key-secret": "s",
        "pbkdf-force-iterations": 1000,
        **given,
    }


async def created(host: Host, options: dict[str, Any]) -> None:
    await host.backend.blockdev_create("job", options)
    job = host.backend.jobs.get("job")
    await host.until(lambda: job.status.value == "concluded")
    assert not job.error
    job.dismiss()


def test_ours_for_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    written: list[bytes] = []

    async def test(host: Host) -> None:
        await secret(host)
        await created(host, create(host, path))
        await luks(host, path)
        written.append(await scribble(host, "disk", DISK))

    with_host(test)
    assert qemu_content(tmp_path, path) == written[0]
    assert opens(path, PASSPHRASE)


def test_ours_for_cryptsetup(tmp_path: Path) -> None:
    path, header = tmp_path / "disk", tmp_path / "header"

    async def test(host: Host) -> None:
        await secret(host)
        header.touch()
        options = create(
            host,
            path,
            version="luks2",
            pbkdf="pbkdf2",
            sector_size=4096,
            header={"driver": "file", "filename": str(header)},
        )
        await created(host, options)
        assert path.stat().st_size == DISK
        separate = {"driver": "file", "filename": str(header)}
        node = await luks(host, path, header=separate)
        assert (node.size, node.data_shift()) == (DISK, 0)
        await scribble(host, "disk", DISK)
        # The header is no place for a guest's data.
        await host.export("disk", "e")
        [drive] = host.backend.query_block_graph()["drives"]
        assert drive["filters"] == ["disk"]
        assert drive["siblings"] == []

    with_host(test)
    assert opens(header, PASSPHRASE)
    assert b"LUKS" not in path.read_bytes()


# ---- what an operator does


def test_what_is_refused(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk")
    plain = sparse(tmp_path / "plain")
    short = formatted(tmp_path / "short")
    os.truncate(short, 8 * MIB)

    async def test(host: Host) -> None:
        await secret(host)
        await secret(host, "wrong", OTHER)
        with refused("no-such"):
            await luks(host, path, key_secret="no-such")
        with refused("Invalid password, cannot unlock any keyslot", str(path)):
            await luks(host, path, key_secret="wrong")
        with refused("LUKS", str(plain)):
            await luks(host, plain)
        with refused(str(short)):
            await luks(host, short)
        await luks(host, path)  # nothing of the failures is left
        with refused("in use"):
            await host.backend.objects.delete("s")
        await host.backend.blockdev_del("disk")
        await host.backend.objects.delete("s")

    with_host(test)


ARGON2 = ("--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4",
          "--pbkdf-parallel", "1")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "below", "enough", "said"),
    [
        (ARGON2, {"max_memory": "32M"}, {"max_memory": "64M"},
         "asks for 64 MiB of memory; 32 MiB are allowed"),
        (("--pbkdf-force-iterations", "20000"), {"max_iterations": 19999},
         {"max_iterations": 20000}, "asks for 20000 iterations of PBKDF2; 19999 are allowed"),
    ],
)  # fmt: skip
def test_what_a_header_may_ask_for(
    tmp_path: Path,
    words: tuple[str, ...],
    below: dict[str, Any],
    enough: dict[str, Any],
    said: str,
) -> None:
    """The operator's limits, for opening and for what is done with key slots afterwards."""
    path = formatted(tmp_path / "disk", *words)

    async def test(host: Host) -> None:
        await secret(host)
        with refused(f"Cannot open node 'disk' ({path}): ", said, "raise the limit (max-memory"):
            await luks(host, path, **below)
        await luks(host, path, **enough)
        assert await host.read("disk", 0, 512) != bytes(512)
        node = await host.command("luks-key-slot-test", node_name="disk", key_secret="s")
        assert node == {"keyslot": 0}
        with refused("Cannot change the option 'max-"):
            name = next(iter(below))
            file = {"driver": "file", "filename": str(path), "discard": "unmap"}
            given = {"driver": "luks", "node-name": "disk", "key-secret": "s", "file": file}
            value = {name.replace("_", "-"): below[name]}
            await host.backend.blockdev_reopen([{**given, **value}])
        await host.backend.blockdev_del("disk")
        await luks(host, path)  # both are less than the defaults

    with_host(test)


def test_a_wrong_passphrase_says_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = formatted(tmp_path / "disk")

    async def test(host: Host) -> None:
        await secret(host, "s", OTHER)
        with refused("Invalid password, cannot unlock any keyslot"):
            await luks(host, path)

    with_host(test)
    for text in (PASSPHRASE, OTHER):
        assert text.decode() not in caplog.text


def test_discards_as_the_operator_allows(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk")

    def blocks() -> int:
        return path.stat().st_blocks

    async def test(host: Host) -> None:
        await secret(host)
        await luks(host, path)
        await host.export("disk", "e")
        async with host.device("e") as guest:
            await guest.write(0, os.urandom(2 * MIB))
            await guest.flush()
            full = blocks()
            await guest.discard((0, 2 * MIB))
            await guest.flush()
            assert blocks() == full
            await guest.write_zeroes(0, MIB, unmap=True)
            await guest.flush()
            assert blocks() == full
            assert await guest.read(0, MIB) == bytes(MIB)
            [options] = [
                {
                    "driver": "luks",
                    "node-name": "disk",
                    "key-secret": "s",
                    "discard": "unmap",
                    "file": host.backend.graph.node("disk").child("file").node.name,
                }
            ]
            await host.backend.blockdev_reopen([options])
            await guest.discard((0, 2 * MIB))
            await guest.flush()
            assert blocks() < full
            await guest.write(0, b"\x11" * 4096)
            assert await guest.read(0, 4096) == b"\x11" * 4096

    with_host(test)


def test_key_slots_change_under_a_guest(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk")

    async def test(host: Host) -> None:
        await secret(host)
        node = await luks(host, path)
        await host.export("disk", "e")
        async with host.device("e") as guest:
            working = True

            async def work() -> int:
                rounds = 0
                while working:
                    data = os.urandom(4096)
                    await guest.write(rounds % 64 * 4096, data)
                    assert await guest.read(rounds % 64 * 4096, 4096) == data
                    rounds += 1
                return rounds

            worker = asyncio.create_task(work())
            kdf = KdfOptions(iter_time=100)
            added = await node.volume.add_passphrase(PASSPHRASE, OTHER, kdf_options=kdf)
            assert await node.volume.test(OTHER) == added
            await node.volume.remove_passphrase(PASSPHRASE)
            working = False
            assert await worker > 0
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("disk")
        with refused("Invalid password, cannot unlock any keyslot"):
            await luks(host, path)
        await secret(host, "new", OTHER)
        await luks(host, path, key_secret="new")

    with_host(test)
    assert opens(path, OTHER)
    assert not opens(path, PASSPHRASE)


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_a_detached_header_is_no_disk(tmp_path: Path, kind: str) -> None:
    """A guest would write its data to the header's place, and nobody could read the disk again."""
    data, header = sparse(tmp_path / "data", DISK), tmp_path / "header"
    words = ("luksFormat", "--type", kind, *CHEAP, "--header", header)
    cryptsetup(*words, data, key=PASSPHRASE)
    before = header.read_bytes()

    async def test(host: Host) -> None:
        await secret(host)
        with refused("it is a detached header"):
            await luks(host, header)
        await host.add("file", "h", filename=str(header))
        await host.add("luks", "both", key_secret="s", file="h", header="h")
        with refused("Permission conflict on node 'h'"):
            await host.export("both", "e")
        await host.backend.blockdev_del("both")
        node = await luks(host, data, header="h")
        assert node.size == DISK

    with_host(test)
    assert header.read_bytes() == before
    assert opens(data, PASSPHRASE, "--header", header)


def test_it_grows(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk")

    async def test(host: Host) -> None:
        await secret(host)
        node = await luks(host, path)
        await host.backend.block_resize("disk", 2 * DISK)
        assert node.size == 2 * DISK
        await host.write("disk", 2 * DISK - 4096, b"\x22" * 4096)
        assert await host.read("disk", 2 * DISK - 4096, 4096) == b"\x22" * 4096

    with_host(test)
    assert path.stat().st_size == 16 * MIB + 2 * DISK


def test_a_snapshot_goes_below(tmp_path: Path) -> None:
    """The overlay has encrypted clusters, and the disk one key."""
    tools = newest_tools()
    raw = formatted(tmp_path / "raw")
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    tools.img("convert", "-f", "raw", "-O", "qcow2", raw, base)
    before: list[bytes] = []

    async def test(host: Host) -> None:
        await secret(host)
        await host.add("qcow2", "q", file={"driver": "file", "filename": str(base)})
        await host.add("luks", "disk", key_secret="s", file="q")
        await host.export("disk", "e")
        before.append(await scribble(host, "disk", DISK, 1))
        await host.backend.transaction(
            [
                (
                    "blockdev-snapshot-sync",
                    {"device": "e", "snapshot-file": str(overlay), "format": "qcow2"},
                )
            ]
        )
        [drive] = host.backend.query_block_graph()["drives"]
        assert drive["filters"] == ["disk"]
        assert await host.read("disk", 0, DISK) == before[0]
        await scribble(host, "disk", DISK, 2)

    with_host(test)
    assert tools.check(base).errors == 0
    assert tools.check(overlay).errors == 0

    async def look(host: Host) -> None:
        await secret(host)
        file = {"driver": "file", "filename": str(base)}
        await host.add("qcow2", "q", file=file, read_only=True)
        await host.add("luks", "disk", key_secret="s", file="q", read_only=True)
        assert await host.read("disk", 0, DISK) == before[0]

    with_host(look)


def test_the_state_file_has_no_secret(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk")

    async def test(host: Host) -> None:
        await secret(host)
        node = await luks(host, path)
        remembered = str(node.state_options())
        assert "'s'" in remembered
        assert PASSPHRASE.decode() not in remembered
        assert PASSPHRASE.decode() not in str(host.backend.query_block_graph())
        assert PASSPHRASE.decode() not in str(node.describe())

    with_host(test)
