# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS1 becomes LUKS2 where it is: for cryptsetup too, with the same data, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from in_process import Host, refused, with_host
from luks_headers import (
    CHEAP1,
    MIB,
    QUICK,
    Memory,
    cryptsetup,
    opens,
    run,
    volume_key,
    write_image,
)
from test_luks_format_crash import works
from test_luks_format_qemu import Qemu
from test_luks_reencrypt import (
    CHEAP,
    ONE,
    TWO,
    Writer,
    command,
    content_of,
    disk,
    ended_well,
    until_done,
)
from thoroughness import tries

from crash import newest_tools  # isort: skip
from vhostblk import luks
from vhostblk.cli import main
from vhostblk.luks.file import open_storage
from vhostblk.schema import VhostblkError

DISK = 4 * MIB


def formatted1(path: Path, *words: str, size: int = DISK) -> Path:
    with open(path, "wb") as file:
        file.truncate(2 * MIB + size)
    cryptsetup("luksFormat", "--type", "luks1", "--pbkdf-force-iterations", "1000", *words, path,
               key=ONE)  # fmt: skip
    return path


def add(path: Path, passphrase: bytes, slot: int, *words: str) -> None:
    new = path.parent / "new-key"
    new.write_bytes(passphrase)
    cryptsetup("luksAddKey", "--key-slot", slot, "--pbkdf-force-iterations", "1000", *words, path,
               new, key=ONE)  # fmt: skip


def with_data(path: Path, **options: Any) -> bytes:
    content = os.urandom(DISK)

    async def fill(host: Host) -> None:
        await disk(host, path, **options)
        await host.write("disk", 0, content)

    with_host(fill)
    return content


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--cipher", "aes-xts-plain64", "--key-size", "256", "--hash", "sha1"),
        ("--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--hash", "sha512"),
        ("--cipher", "aes-cbc-plain64", "--key-size", "192"),
    ],
    ids=lambda words: "-".join(words[1::2]) or "default",
)
def test_a_volume_of_cryptsetups(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = formatted1(tmp_path / "image", *words)
    add(path, TWO, 7)
    key = volume_key(path, ONE, tmp_path / "key")
    content = with_data(path)
    (tmp_path / "before").write_bytes(path.read_bytes())
    assert main(["luks", "convert", str(path)]) == 0
    assert "Version:       \t2" in cryptsetup("luksDump", path)
    assert opens(path, ONE)
    assert opens(path, TWO, "--key-slot", "7")
    assert not opens(path, b"something else")
    assert volume_key(path, TWO, tmp_path / "key") == key
    assert content_of(path, DISK) == content
    # It is one like others for cryptsetup.
    add(path, b"three", 3, "--pbkdf", "pbkdf2")
    cryptsetup("luksKillSlot", path, 3, key=ONE)
    assert opens(path, ONE)
    assert content_of(path, DISK) == content


def test_as_cryptsetup_does(tmp_path: Path) -> None:
    """The metadata are those that its own conversion makes, but for where slot 0 went."""
    ours = formatted1(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    theirs.write_bytes(ours.read_bytes())
    cryptsetup("convert", "--type", "luks2", theirs)
    assert main(["luks", "convert", str(ours)]) == 0

    async def look(path: Path) -> tuple[Any, str]:
        with open_storage(str(path), write=False) as storage:
            volume = await luks.open_volume(storage)
            assert isinstance(volume, luks.Luks2)
            assert not volume.damage
            metadata = volume.metadata
            for slot in metadata["keyslots"].values():
                del slot["area"]["offset"]
                slot.pop("priority", None)
            return metadata, volume.uuid

    assert run(look(ours)) == run(look(theirs))


def test_a_volume_of_qemus(tmp_path: Path) -> None:
    path = tmp_path / "image"
    Qemu(newest_tools(), path).create()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + DISK)
    # QEMU's passphrase is test_luks_format_qemu's.
    from test_luks_format_qemu import ONE as THEIRS

    assert THEIRS == ONE
    content = with_data(path)
    assert main(["luks", "convert", str(path)]) == 0
    assert opens(path, ONE)
    assert content_of(path, DISK) == content


def test_a_detached_header(tmp_path: Path) -> None:
    header, data = tmp_path / "header", tmp_path / "data"
    with open(data, "wb") as file:
        file.truncate(DISK)
    cryptsetup("luksFormat", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--header",
               header, data, key=ONE)  # fmt: skip
    file = {"driver": "file", "filename": str(data)}
    given = {"file": file, "header": {"driver": "file", "filename": str(header)}}
    content = with_data(header, **given)
    assert main(["luks", "convert", str(header)]) == 0
    assert opens(data, ONE, "--header", header)
    assert content_of(header, DISK, **given) == content


def test_no_room(tmp_path: Path) -> None:
    """Nothing is written if slot 0 has nowhere to go."""
    path = formatted1(tmp_path / "image")
    for slot in range(1, 6):
        add(path, b"%d" % slot, slot)
    before = path.read_bytes()
    assert main(["luks", "convert", str(path)]) != 0
    assert path.read_bytes() == before
    cryptsetup("luksKillSlot", path, 4, key=ONE)
    assert main(["luks", "convert", str(path)]) == 0
    for words in (ONE, b"1", b"2", b"3", b"5"):
        assert opens(path, words)
    assert not opens(path, b"4")
    before = path.read_bytes()
    assert main(["luks", "convert", str(path)]) != 0, "it is LUKS2 already"
    assert path.read_bytes() == before


def test_headers_made_by_an_enemy() -> None:
    """Either it is refused and nothing is written, or nothing behind the header is."""

    async def test() -> None:
        storage = Memory()
        await luks.create(storage, ONE, luks.CreateOptions(**CHEAP1))
        whole = bytes(storage.content).ljust(3 * MIB, b"\x5a")
        rnd = random.Random(31)
        outcomes = set()
        for _ in range(400):
            left = Memory(whole)
            for _ in range(rnd.choice((1, 1, 2, 3))):
                at = rnd.choice((104, *(208 + 48 * slot + field for slot in range(8)
                                        for field in (0, 40))))  # fmt: skip
                value = rnd.choice((0, 1, 8, 9, 31, 32, 63, 64, 504, 505, 2560, 4039, 4040, 4096,
                                    0x00AC71F3, 0xDEAD, 1 << 31))  # fmt: skip
                left.content[at : at + 4] = value.to_bytes(4, "big")
            before = bytes(left.content)
            try:
                volume = await luks.open_volume(left)
                after = await luks.convert(volume)
            except VhostblkError:
                assert bytes(left.content) == before
                outcomes.add("refused")
                continue
            data = after.segment.offset or len(before)
            assert bytes(left.content[data:]) == before[data:]
            assert (await luks.open_volume(left)).version == 2
            outcomes.add("done")
        assert outcomes == {"refused", "done"}

    run(test())


@pytest.mark.parametrize("slots", [(0,), (0, 7), (3, 6)])
def test_a_power_cut_at_any_moment(tmp_path: Path, slots: tuple[int, ...]) -> None:
    """Each passphrase opens what is left, for us and for cryptsetup; and it can be done again."""
    words = [ONE, TWO]

    async def test() -> None:
        storage = Memory()
        volume = await luks.create(storage, ONE, luks.CreateOptions(**CHEAP1))
        for passphrase, slot in zip(words, slots, strict=False):
            if slot:
                await volume.add_passphrase(ONE, passphrase, slot, QUICK)
        if 0 not in slots:
            await volume.remove_slot(0)
        known = words[: len(slots)]
        storage.mark()
        await luks.convert(volume)
        versions = set()
        for after in range(len(storage.steps) + 1):
            for seed in range(tries(3)):
                left = Memory(storage.cut(after, random.Random(1000 * after + seed)))
                found = await luks.open_volume(left)
                versions.add(found.version)
                for passphrase in known:
                    assert await works(found, passphrase), (after, seed)
                if seed == 0:
                    path = tmp_path / "image"
                    write_image(path, left.content, 4 * MIB)
                    for passphrase in known:
                        assert opens(path, passphrase), after
                if found.version == 1:
                    found = await luks.convert(found)
                else:
                    await found.repair()
                for passphrase in known:
                    assert await works(found, passphrase), (after, seed)
                again = await luks.open_volume(left)
                assert again.version == 2
                assert not again.damage
        assert versions == {1, 2}

    run(test())


def test_a_disk_in_use_and_then_a_new_key(tmp_path: Path) -> None:
    """What a LUKS1 volume needs to be re-encrypted under its guest."""
    path = formatted1(tmp_path / "image", size=DISK)
    old = volume_key(path, ONE, tmp_path / "key")
    after: list[bytes] = []

    async def test(host: Host) -> None:
        node = await disk(host, path)
        await host.write("disk", 0, os.urandom(DISK))
        await host.export("disk", "e")
        async with host.device("e") as guest:
            writer = Writer(guest, await host.read("disk", 0, DISK), 1)
            working = asyncio.create_task(writer.work())
            with refused("has a LUKS1 header", "vhostblk luks convert"):
                await command(host, "luks-reencrypt")
            # One that is under way must not write LUKS1's slots into the new header.
            slow = {"pbkdf-force-iterations": 2_000_000}
            late = asyncio.create_task(
                command(host, "luks-key-slot-add", key_secret="one", new_secret="two", **slow)
            )
            told = await command(host, "luks-convert")
            assert told["version"] == 2
            with pytest.raises(VhostblkError, match="has just been converted"):
                await late
            with refused("LUKS2 already"):
                await command(host, "luks-convert")
            assert node.volume.version == 2
            await command(host, "luks-key-slot-add", key_secret="one", new_secret="two", **CHEAP)
            await command(host, "luks-reencrypt", secrets=["two"], **CHEAP)
            await until_done(host)
            assert ended_well(host)
            writer.done = True
            await working
        after.append(bytes(writer.content))

    with_host(test)
    assert content_of(path, DISK) == after[0]
    assert opens(path, ONE)
    assert opens(path, TWO)
    assert volume_key(path, ONE, tmp_path / "key") != old
