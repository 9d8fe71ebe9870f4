# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS headers are interchangeable with cryptsetup's, both ways: key slots, keys, all variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from luks_headers import (
    CHEAP1,
    CHEAP2,
    MIB,
    QUICK,
    Memory,
    cryptsetup,
    metadata,
    opens,
    run,
    sparse,
    volume_key,
)

from vhostblk import luks
from vhostblk.luks.file import open_storage
from vhostblk.schema import VhostblkError

ONE, TWO, THREE = b"first passphrase", b"second\nwith \x00 bytes \xff", b"third"
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", 1000)

# What cryptsetup can create without the kernel's help and OpenSSL has.
VARIANTS: list[tuple[str, str, int, str]] = [
    ("1", "aes-xts-plain64", 512, "sha256"),
    ("1", "aes-xts-plain64", 256, "sha1"),
    ("1", "aes-xts-plain", 512, "sha512"),
    ("1", "aes-cbc-essiv:sha256", 256, "sha256"),
    ("1", "aes-cbc-plain64", 128, "ripemd160"),
    ("1", "aes-cbc-plain", 192, "sha384"),
    ("2", "aes-xts-plain64", 512, "sha256"),
    ("2", "aes-xts-plain64", 256, "sha512"),
    ("2", "aes-cbc-essiv:sha256", 256, "sha256"),
    ("2", "aes-cbc-plain64", 256, "whirlpool"),
    ("2", "camellia-cbc-plain64", 192, "blake2b-512"),
    ("2", "aes-ecb", 256, "sha224"),
    ("2", "aes-xts-plain64", 512, "sha3-256"),
    ("2", "aes-xts-plain64", 512, "sm3"),
]


async def opened(path: Path, write: bool = False) -> luks.Volume:
    with open_storage(str(path), write=write) as storage:
        return await luks.open_volume(storage)


def key_of(path: Path, passphrase: bytes) -> bytes:
    async def work() -> bytes:
        with open_storage(str(path), write=False) as storage:
            volume = await luks.open_volume(storage)
            _, key = await volume.unlock(passphrase)
            with key:
                return bytes(key.view())

    result: bytes = run(work())
    return result


def create(path: Path, passphrase: bytes = ONE, **options: Any) -> luks.Segment:
    async def work() -> luks.Segment:
        with open_storage(str(path), write=True) as storage:
            volume = await luks.create(storage, passphrase, luks.CreateOptions(**options))
            return volume.segment

    result: luks.Segment = run(work())
    return result


def change(path: Path, work: Any) -> Any:
    async def all_of_it() -> Any:
        with open_storage(str(path), write=True) as storage:
            return await work(await luks.open_volume(storage))

    return run(all_of_it())


@pytest.mark.parametrize(("version", "cipher", "bits", "hash"), VARIANTS)
def test_cryptsetup_formats_and_we_unlock(
    tmp_path: Path, version: str, cipher: str, bits: int, hash: str
) -> None:
    path = sparse(tmp_path / "image")
    # Without dm-crypt cryptsetup has few ciphers for key slots, which may differ from the disk's.
    slots = ("--keyslot-cipher", "aes-xts-plain64", "--keyslot-key-size", 512)
    cryptsetup("luksFormat", "--type", f"luks{version}", "--cipher", cipher, "--key-size", bits,
               "--hash", hash, *CHEAP, *(() if cipher.startswith("aes") else slots), path,
               key=ONE)  # fmt: skip
    assert key_of(path, ONE) == volume_key(path, ONE, tmp_path / "key")
    segment = run(opened(path)).segment
    assert segment.cipher == cipher
    if version == "1":
        assert f"Payload offset:\t{segment.offset // 512}\n" in cryptsetup("luksDump", path)
    else:
        assert int(metadata(path)["segments"]["0"]["offset"]) == segment.offset


@pytest.mark.parametrize(
    ("options", "cipher"),
    [
        (CHEAP1, "aes-xts-plain64"),
        (CHEAP1 | {"cipher_alg": "aes-128", "hash_alg": "sha1"}, "aes-xts-plain64"),
        (CHEAP1 | {"cipher_mode": "cbc", "ivgen_alg": "essiv"}, "aes-cbc-essiv:sha256"),
        (CHEAP1 | {"cipher_mode": "cbc", "ivgen_alg": "plain"}, "aes-cbc-plain"),
        (CHEAP1 | {"cipher_alg": "aes-192", "cipher_mode": "cbc", "hash_alg": "sha512"},
         "aes-cbc-plain64"),
        (CHEAP2, "aes-xts-plain64"),
        (CHEAP2 | {"sector_size": 4096, "hash_alg": "sha512"}, "aes-xts-plain64"),
        (CHEAP2 | {"cipher_mode": "cbc", "ivgen_alg": "essiv"}, "aes-cbc-essiv:sha256"),
    ],
)  # fmt: skip
def test_we_format_and_cryptsetup_unlocks(
    tmp_path: Path, options: dict[str, Any], cipher: str
) -> None:
    path = sparse(tmp_path / "image")
    segment = create(path, **options)
    assert segment.cipher == cipher
    assert opens(path, ONE)
    assert not opens(path, TWO)
    assert volume_key(path, ONE, tmp_path / "key") == key_of(path, ONE)
    said = cryptsetup("luksDump", path)
    assert cipher.split("-", 1)[1] in said
    if options["version"] == "luks2":
        told = metadata(path)
        assert told["segments"]["0"]["sector_size"] == options.get("sector_size", 512)
        assert int(told["segments"]["0"]["offset"]) == segment.offset == 16 * MIB


@pytest.mark.parametrize("pbkdf", ["argon2i", "argon2id"])
def test_argon2_both_ways(tmp_path: Path, pbkdf: str) -> None:
    path = sparse(tmp_path / "image")
    costs = ("--pbkdf", pbkdf, "--pbkdf-memory", 1024, "--pbkdf-parallel", 2)
    cryptsetup("luksFormat", "--type", "luks2", *costs, "--pbkdf-force-iterations", 4, path,
               key=ONE)  # fmt: skip
    assert key_of(path, ONE) == volume_key(path, ONE, tmp_path / "key")
    mine = sparse(tmp_path / "mine")
    create(mine, version="luks2", pbkdf=pbkdf, pbkdf_memory=2 * MIB, pbkdf_parallel=2,
           pbkdf_force_iterations=4)  # fmt: skip
    assert opens(mine, ONE)
    assert metadata(mine)["keyslots"]["0"]["kdf"] | {"salt": ""} == {
        "type": pbkdf,
        "time": 4,
        "memory": 2048,
        "cpus": 2,
        "salt": "",
    }


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_each_changes_the_slots_of_the_other(tmp_path: Path, version: str) -> None:
    """A slot from us, one from cryptsetup, in turns; all passphrases always unlock for both."""
    path = sparse(tmp_path / "image")
    cryptsetup("luksFormat", "--type", version, *CHEAP, path, key=ONE)
    passphrases = [ONE]
    for number in range(1, 8):
        new = b"passphrase %d" % number
        if number % 2:

            async def add(volume: luks.Volume, new: bytes = new) -> int:
                _, key = await volume.unlock(ONE)
                with key:
                    return await volume.add_slot(key, new, kdf_options=QUICK)

            assert change(path, add) == number
        else:
            file = tmp_path / "new"
            file.write_bytes(new)
            cryptsetup("luksAddKey", *CHEAP, path, file, key=ONE)
        passphrases.append(new)
        assert all(opens(path, passphrase) for passphrase in passphrases)

    async def tested(volume: luks.Volume) -> list[int]:
        return [await volume.test(passphrase) for passphrase in passphrases]

    assert change(path, tested) == list(range(8))
    change(path, lambda volume: volume.remove_slot(3))
    cryptsetup("luksKillSlot", path, 4, key=ONE)
    with pytest.raises(VhostblkError, match="Invalid password"):
        change(path, lambda volume: volume.test(passphrases[3]))
    with pytest.raises(VhostblkError, match="Invalid password"):
        change(path, lambda volume: volume.test(passphrases[4]))
    assert [opens(path, passphrase) for passphrase in passphrases] == [
        number not in (3, 4) for number in range(8)
    ]


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
def test_rotating_a_passphrase(tmp_path: Path, options: dict[str, Any]) -> None:
    path = sparse(tmp_path / "image")
    create(path, **options)
    before = key_of(path, ONE)
    assert change(path, lambda volume: volume.rotate(ONE, TWO, kdf_options=QUICK)) == 1
    assert not opens(path, ONE)
    assert opens(path, TWO)
    assert key_of(path, TWO) == before


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
def test_the_last_slot_stays_unless_forced(options: dict[str, Any]) -> None:
    async def work() -> None:
        storage = Memory()
        volume = await luks.create(storage, ONE, luks.CreateOptions(**options))
        with pytest.raises(VhostblkError, match="last key slot"):
            await volume.remove_slot(0)
        with pytest.raises(VhostblkError, match="last key slot"):
            await volume.remove_passphrase(ONE)
        assert await volume.test(ONE) == 0
        await volume.remove_slot(0, force=True)
        with pytest.raises(VhostblkError, match="Invalid password"):
            await volume.test(ONE)

    run(work())


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
def test_removed_key_material_is_destroyed(options: dict[str, Any]) -> None:
    async def work() -> None:
        storage = Memory()
        volume = await luks.create(storage, ONE, luks.CreateOptions(**options))
        _, key = await volume.unlock(ONE)
        with key:
            number = await volume.add_slot(key, TWO, kdf_options=QUICK)
        [slot] = [slot for slot in volume.active() if slot.number == number]
        place = range(slot.area_offset, slot.area_offset + slot.key_size * 4000)
        before = storage.content[place.start : place.stop]
        assert await volume.remove_passphrase(TWO) == [number]
        after = storage.content[place.start : place.stop]
        # Sector by sector: of the splitter's pieces not one may survive.
        same = [
            at for at in range(0, len(before), 512) if before[at : at + 512] == after[at : at + 512]
        ]
        assert not same

    run(work())


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_a_detached_header_from_cryptsetup(tmp_path: Path, version: str) -> None:
    path, header = sparse(tmp_path / "data"), tmp_path / "header"
    cryptsetup("luksFormat", "--type", version, *CHEAP, "--header", header, path, key=ONE)
    assert run(opened(header)).segment.offset == 0
    assert key_of(header, ONE) == volume_key(header, ONE, tmp_path / "key")


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
def test_a_detached_header_from_us(tmp_path: Path, options: dict[str, Any]) -> None:
    path, header = sparse(tmp_path / "data"), sparse(tmp_path / "header", 0)

    async def work() -> None:
        with open_storage(str(header), write=True) as storage:
            given = luks.CreateOptions(**options)
            volume = await luks.create(storage, ONE, given, detached=True)
            assert volume.segment.offset == 0

    run(work())
    assert opens(path, ONE, "--header", header)
    assert path.read_bytes() == bytes(32 * MIB)
