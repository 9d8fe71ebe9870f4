# SPDX-License-Identifier: GPL-2.0-or-later
"""What key slots are made of: ciphers as in the engine, the splitter, key derivation."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from typing import Any

import pytest
from luks_headers import CHEAP1, CHEAP2, QUICK, Memory, run

from vhostblk import luks
from vhostblk.engine import Engine
from vhostblk.engine.crypt import CipherSpec as EngineSpec
from vhostblk.engine.crypt import new_cipher
from vhostblk.luks import af, hashes, kdf
from vhostblk.luks.ciphers import CipherSpec, SectorCipher
from vhostblk.schema import VhostblkError
from vhostblk.secret import SecretBytes

SPECS = [
    ("aes-xts-plain64", 64), ("aes-xts-plain64", 48), ("aes-xts-plain", 32),
    ("aes-xts-plain64be", 64), ("aes-xts-essiv:sha256", 64), ("aes-xts-null", 64),
    ("aes-cbc-plain64", 32), ("aes-cbc-essiv:sha256", 16), ("aes-cbc-eboiv", 24),
    ("aes-cbc-benbi", 32), ("cast5-cbc-benbi", 16),
    ("aes-ctr-plain64be", 32), ("aes-ctr-plain64", 16), ("aes-ecb", 32),
    ("camellia-xts-plain64", 64), ("camellia-cbc-essiv:sha256", 32),
    ("sm4-xts-plain64", 32), ("sm4-cbc-plain", 16), ("cast5-cbc-plain64", 16),
    ("cast5-cbc-plain", 16), ("des3_ede-cbc-plain64", 24), ("capi:xts(aes)-plain64", 64),
    ("capi:cbc(aes)-essiv:sha256", 32),
]  # fmt: skip


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize(("text", "size"), SPECS)
def test_the_same_as_the_engine(text: str, size: int, sector_size: int) -> None:
    """Two implementations, of which the engine's is tested against dm-crypt's documentation."""
    key, data = os.urandom(size), os.urandom(2 * 4096)
    first = (1 << 32) - 8  # where plain and plain64 begin to differ
    ours = SectorCipher(CipherSpec.parse(text), key, sector_size)
    encrypted = bytes(ours.encrypt(first, data))
    assert bytes(ours.decrypt(first, encrypted)) == data
    engine = Engine(asyncio.new_event_loop())
    try:
        cipher = new_cipher(engine, EngineSpec.parse(text), key, sector_size=sector_size,
                            iv_offset=first)  # fmt: skip
        buffer = bytearray(data)
        cipher.apply(True, 0, buffer)
        cipher.free()
    finally:
        engine.close()
    assert bytes(buffer) == encrypted


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
@pytest.mark.parametrize(
    "cipher",
    [
        {"cipher_alg": "aes-192"},
        {"cipher_alg": "camellia-256"},
        {"cipher_alg": "sm4"},
        {"cipher_alg": "cast5-128", "cipher_mode": "cbc"},
        {"cipher_alg": "3des", "cipher_mode": "cbc"},
        {"cipher_mode": "ctr", "ivgen_alg": "plain64be"},
        {"cipher_mode": "cbc", "ivgen_alg": "benbi"},
        {"cipher_mode": "cbc", "ivgen_alg": "eboiv"},
        {"cipher_mode": "ecb", "ivgen_alg": "null"},
    ],
    ids=lambda cipher: "-".join(cipher.values()),
)
def test_slots_with_any_cipher(options: dict[str, Any], cipher: dict[str, str]) -> None:
    """Those that this machine's cryptsetup has no kernel for: created, opened again, changed."""

    async def work() -> None:
        storage = Memory()
        await luks.create(storage, b"one", luks.CreateOptions.model_validate(options | cipher))
        volume = await luks.open_volume(storage)
        _, key = await volume.unlock(b"one")
        with key:
            await volume.add_slot(key, b"two", None, QUICK)
            _, same = await (await luks.open_volume(storage)).unlock(b"two")
            with same:
                assert same == key

    run(work())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cipher-alg": "aes-512"}, "not of 1024"),
        ({"cipher-alg": "aes"}, "'aes' is not a cipher; known: aes-128"),
        ({"cipher-alg": "twofish-256"}, "cipher 'twofish' is not supported"),
        ({"cipher-alg": "cast5-128"}, "XTS needs a cipher with blocks of 16 bytes"),
        ({"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha512"},
         "a hash of 512 bits is not a key for aes"),
        ({"ivgen-hash-alg": "sha256"}, "the IV generator plain64 has no hash"),
        ({"hash-alg": "sha3"}, "'sha3' is not a hash"),
        ({"version": "luks2", "sector-size": 1000}, "512, 1024, 2048 or 4096"),
        ({"version": "luks2", "label": "x" * 48}, "at most 47 bytes"),
        ({"label": "x"}, "version=luks2"),
        ({"pbkdf": "argon2id"}, "LUKS1 has pbkdf2 only"),
        ({"pbkdf-memory": 1 << 20}, "pbkdf2 takes no memory"),
        ({"version": "luks2", "pbkdf-memory": 1 << 10}, "at least"),
        ({"version": "luks2", "pbkdf-parallel": 5}, "no more than 4"),
        ({"pbkdf-force-iterations": 10}, "at least 1000"),
        ({"uuid": "x"}, "'x' is not a UUID"),
        ({"data-offset": 512}, "the header needs"),
        ({"data-offset": 5000001}, "not a multiple"),
        ({"version": "luks2", "metadata-size": 5}, "it is one of 16384"),
        ({"version": "luks2", "keyslots-size": 4096}, "is not a multiple of 4096 from"),
        ({"version": "luks2", "data-offset": 65536}, "is not a multiple of 4096 from"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    storage = Memory()
    with pytest.raises(VhostblkError) as caught:
        run(luks.create(storage, b"one", luks.CreateOptions.model_validate(options)))
    assert said in caught.value.desc
    assert not storage.steps, "nothing is written before everything has been checked"


def test_sizes_are_as_asked_for() -> None:
    async def work() -> None:
        storage = Memory()
        given = luks.CreateOptions.model_validate(
            CHEAP2
            | {"metadata_size": 65536, "keyslots_size": 1 << 20, "data_offset": 4 << 20,
               "label": "Größe", "subsystem": "test", "sector_size": 2048,
               "uuid": "12345678-1234-1234-1234-123456789abc"}
        )  # fmt: skip
        await luks.create(storage, b"one", given)
        volume = await luks.open_volume(storage)
        assert isinstance(volume, luks.Luks2)
        assert volume.header_size == 65536
        assert volume.keyslots_area == (131072, 1 << 20)
        assert volume.segment == luks.Segment(4 << 20, None, 2048, "aes-xts-plain64", 0)
        assert volume.label == "Größe"
        assert volume.uuid == "12345678-1234-1234-1234-123456789abc"

    run(work())


def test_slots_until_there_is_no_room() -> None:
    """LUKS2 with place for four keys; those removed make room again, in the middle, too."""

    async def work() -> None:
        storage = Memory()
        options = CHEAP2 | {"keyslots_size": 4 * 258048}
        volume = await luks.create(storage, b"0", luks.CreateOptions.model_validate(options))
        for number in range(1, 4):
            assert await volume.add_passphrase(b"0", b"%d" % number, None, QUICK) == number
        with pytest.raises(VhostblkError, match="no room for another key slot; remove one first"):
            await volume.add_passphrase(b"0", b"4", None, QUICK)
        with pytest.raises(VhostblkError, match="no room"):
            await volume.rotate(b"2", b"4", kdf_options=QUICK)
        assert await volume.test(b"2") == 2
        await volume.remove_slot(1)
        assert await volume.rotate(b"2", b"4", kdf_options=QUICK) == 1
        for words, number in ((b"0", 0), (b"4", 1), (b"3", 3)):
            assert await volume.test(words) == number

    run(work())


def test_all_eight_slots_of_luks1() -> None:
    async def work() -> None:
        volume = await luks.create(Memory(), b"0", luks.CreateOptions(**CHEAP1))
        for number in range(1, 8):
            assert await volume.add_passphrase(b"0", b"%d" % number, None, QUICK) == number
        with pytest.raises(VhostblkError, match="all eight key slots are in use"):
            await volume.add_passphrase(b"0", b"8", None, QUICK)

    run(work())


def test_priorities() -> None:
    """LUKS2: 2 is tried first, 0 only if it is asked for."""

    async def work() -> None:
        volume = await luks.create(Memory(), b"same", luks.CreateOptions(**CHEAP2))
        assert isinstance(volume, luks.Luks2)
        for _ in range(2):
            await volume.add_passphrase(b"same", b"same", None, QUICK)
        metadata = volume.metadata
        metadata["keyslots"]["2"]["priority"] = 2
        metadata["keyslots"]["0"]["priority"] = 0
        async with volume.changing:
            await volume.write_metadata(metadata)
        assert await volume.test(b"same") == 2
        await volume.remove_slot(2)
        assert await volume.test(b"same") == 1
        assert await volume.test(b"same", 0) == 0

    run(work())


def test_two_keys_in_one_header() -> None:
    """As re-encryption needs it: a second digest, and slots that know the new key."""

    async def work() -> None:
        volume = await luks.create(Memory(), b"old", luks.CreateOptions(**CHEAP2))
        assert isinstance(volume, luks.Luks2)
        with luks.random_key(64) as key:
            metadata = volume.metadata
            metadata["digests"]["1"] = luks.new_digest(key, milliseconds=1)
            async with volume.changing:
                await volume.write_metadata(metadata)
            with pytest.raises(VhostblkError, match="this is not the volume key"):
                await volume.add_slot(key, b"new", None, QUICK)
            number = await volume.add_slot(key, b"new", None, QUICK, digest="1")
            with pytest.raises(VhostblkError, match="Invalid password"):
                await volume.unlock(b"new")
            slot, found = await volume.unlock(b"new", digest="1")
            with found:
                assert (slot, found == key) == (number, True)
        # Slots of another key do not count as a way to the disk.
        with pytest.raises(VhostblkError, match="last key slot"):
            await volume.remove_slot(0)

    run(work())


def test_the_splitter_spreads_the_key() -> None:
    key = os.urandom(64)
    for hash in ("sha256", "sha1", "sha512"):
        pieces = af.split(key, hash)
        assert len(pieces) == 64 * af.STRIPES
        with af.merge(pieces, 64, hash) as merged:
            assert merged == key
        for at in (0, 100_000, len(pieces) - 1):
            broken = bytearray(pieces)
            broken[at] ^= 1
            with af.merge(broken, 64, hash) as merged:
                assert merged != key


def test_hashes_have_their_names() -> None:
    for name in hashes.NAMES:
        try:
            size = hashes.digest_size(name)
        except VhostblkError as error:
            assert "not to be had from this system's OpenSSL" in error.desc
            continue
        assert size == len(hashes.digest(name, b"x", b"y"))
    assert hashes.digest("sha256", b"x", b"y") == hashlib.sha256(b"xy").digest()
    # RFC 6070, second vector.
    assert hashes.pbkdf2("sha1", b"password", b"salt", 2, 20).hex() == (
        "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"
    )


def test_derivations_take_turns_and_the_loop_goes_on() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    async def all_at_once() -> int:
        beats = 0
        tasks = [asyncio.create_task(kdf.in_thread(work)) for _ in range(5)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
            beats += 1
        return beats

    assert run(all_at_once()) > 5
    assert most == 1


def test_a_key_that_nobody_waits_for_any_more_is_wiped() -> None:
    made: list[SecretBytes] = []
    go = threading.Event()

    def work() -> tuple[int, SecretBytes]:
        go.wait(10)
        made.append(SecretBytes(b"key"))
        return 1, made[0]

    async def give_up() -> None:
        task = asyncio.create_task(kdf.in_thread(work))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        async with asyncio.timeout(10):
            while not made or not made[0]._closed:
                await asyncio.sleep(0.005)

    run(give_up())
