# SPDX-License-Identifier: GPL-2.0-or-later
"""Headers made by an enemy, or by accident: a clear error, in bounded time and memory.

Whoever gets a disk from somebody else opens a header that may say anything.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from luks_headers import CHEAP1, CHEAP2, QUICK, Memory, run
from thoroughness import tries

from vhostblk import luks
from vhostblk.luks import binary2, reencryption
from vhostblk.schema import VhostblkError

ONE = b"one"
FUZZ = int(os.environ.get("VHOSTBLK_TEST_FUZZ", 150))
HEAD1 = 208  # where the key slots of LUKS1 start
PERMITTED = {
    "bad-luks-header", "not-luks", "luks-requirements", "luks-unsupported", "luks-cost",
    "bad-passphrase", "luks-slots",
}  # fmt: skip


def made(options: dict[str, Any]) -> Memory:
    storage = Memory()
    run(luks.create(storage, ONE, luks.CreateOptions(**options)))
    return storage


def problem(storage: Memory, **limits: int) -> VhostblkError:
    """The error of opening and unlocking; nothing is written meanwhile."""

    async def work() -> None:
        volume = await luks.open_volume(storage, luks.Limits(**limits))
        key = (await volume.unlock(ONE))[1]
        key.close()

    before = bytes(storage.content)
    with pytest.raises(VhostblkError) as caught:
        run(work())
    assert bytes(storage.content) == before
    assert (caught.value.data or {})["code"] in PERMITTED
    assert "\n" not in caught.value.desc
    assert len(caught.value.desc) < 300
    return caught.value


# ---- LUKS1


@pytest.mark.parametrize(
    ("at", "form", "value", "said"),
    [
        (6, ">H", 3, "version 3"),
        (8, "32s", b"rot13", "cipher 'rot13' is not supported"),
        (8, "32s", b"serpent", "cipher 'serpent' is not supported; known: aes"),
        (8, "32s", b"\xff\xfe", "not text"),
        (40, "32s", b"lrw-benbi", "mode 'lrw' is not supported"),
        (40, "32s", b"cbc-essiv", "a hash is missing"),
        (40, "32s", b"cbc-essiv:nohash", "hash 'nohash'"),
        (72, "32s", b"sha257", "hash 'sha257' is not supported"),
        (104, ">I", 9, "overlaps the data"),
        (108, ">I", 17, "keys of 256, 384, 512 bits, not of 136"),
        (108, ">I", 0, "a volume key of 0 bytes"),
        (108, ">I", 0xFFFFFFFF, "a volume key of 4294967295 bytes"),
        (164, ">I", 0, "0 iterations"),
        (164, ">I", 0xFFFFFFFF, "4294967295 iterations of PBKDF2; 100000000 are allowed"),
        (HEAD1, ">I", 0x12345678, "neither active nor inactive"),
        (HEAD1 + 4, ">I", 0xFFFFFFFF, "key slot 0 asks for 4294967295 iterations"),
        (HEAD1 + 4, ">I", 0, "0 iterations"),
        (HEAD1 + 40, ">I", 0, "inside the header"),
        (HEAD1 + 40, ">I", 505, "overlaps"),
        (HEAD1 + 40, ">I", 0xFFFFFFF0, "overlaps the data"),
        (HEAD1 + 44, ">I", 0xFFFFFFFF, "4294967295 stripes, not 4000"),
        (HEAD1 + 44, ">I", 0, "0 stripes"),
    ],
)
def test_luks1_fields(at: int, form: str, value: Any, said: str) -> None:
    storage = made(CHEAP1)
    struct.pack_into(form, storage.content, at, value)
    assert said in problem(storage).desc


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
def test_cut_off_anywhere(options: dict[str, Any]) -> None:
    whole = made(options)
    for length in (0, 5, 6, 7, 100, 591, 592, 4095, 4096, 5000, 16384, 20000, 40000, 100_000):
        assert problem(Memory(bytes(whole.content[:length])))


@pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
def test_random_damage(options: dict[str, Any]) -> None:
    """Whatever bytes change: the key that was there, or an error of ours."""
    whole = made(options)

    async def attempt(storage: Memory) -> bytes:
        volume = await luks.open_volume(storage, luks.Limits(iterations=10_000))
        luks.describe(volume)
        key = (await volume.unlock(ONE))[1]
        with key:
            return bytes(key.view())

    right = run(attempt(whole))
    rnd = random.Random(4)
    end = 592 if options is CHEAP1 else 4096 + 1500
    for _ in range(tries(60)):
        storage = Memory(bytes(whole.content))
        for _ in range(rnd.choice((1, 1, 2, 10))):
            # Both copies alike, so that it is not simply the other one that is used.
            at = rnd.randrange(end)
            storage.content[at] = rnd.randrange(256)
        try:
            assert run(attempt(storage)) == right
        except VhostblkError as error:
            assert (error.data or {})["code"] in PERMITTED, error


# ---- LUKS2

Json = dict[str, Any]


def forged(change: Callable[[Json], Any]) -> Memory:
    """A LUKS2 header with other metadata, and right checksums, in both copies."""
    storage = made(CHEAP2)
    found = run(binary2.find(storage))
    metadata = copy.deepcopy(found.copy.metadata)
    changed = change(metadata)
    text = json.dumps(metadata).encode() if changed is None else changed
    _put_json(storage, found.copy.binary, text)
    return storage


def _put_json(storage: Memory, binary: binary2.Binary, text: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary2.json2, "dump", lambda metadata: text)
        for at in (0, binary.size):
            storage.content[at : at + binary.size] = binary2.pack(binary, {}, at)


def put(*path: Any) -> Callable[[Json], None]:
    """Set a member, by path, to the last argument."""

    def change(metadata: Json) -> None:
        *way, last, value = path
        for step in way:
            metadata = metadata[step]
        metadata[last] = value

    return change


def remove(*path: str) -> Callable[[Json], None]:
    def change(metadata: Json) -> None:
        for step in path[:-1]:
            metadata = metadata[step]
        del metadata[path[-1]]

    return change


def without_data(metadata: Json) -> None:
    metadata["segments"] = {}
    metadata["digests"]["0"]["segments"] = []


SLOT, AREA, KDF = ("keyslots", "0"), ("keyslots", "0", "area"), ("keyslots", "0", "kdf")
SEGMENT, DIGEST = ("segments", "0"), ("digests", "0")
ARGON = {"type": "argon2id", "time": 4, "memory": 1024, "cpus": 1, "salt": "c2FsdHNhbHRzYWx0"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove("keyslots"), "keyslots is not an object"),
        (remove("config"), "config is not an object"),
        (put("keyslots", []), "keyslots is not an object"),
        (put("keyslots", "x", {}), "'x' is not a number below 32"),
        (put("keyslots", "99999999999999999999", {}), "is not a number below 32"),
        (put("keyslots", "00", {}), "'00' is not a number below 32"),
        (put(*SLOT, 7), "keyslots 0 is not an object"),
        (remove(*SLOT, "type"), "keyslots 0: type is not a string"),
        (remove(*AREA), "keyslots 0: area is not an object"),
        (put(*AREA, "offset", "0"), "outside of the place for areas"),
        (put(*AREA, "offset", "16384"), "outside of the place for areas"),
        (put(*AREA, "offset", str(1 << 62)), "outside of the place for areas"),
        (put(*AREA, "offset", "-4096"), "offset is not a number"),
        (put(*AREA, "offset", "1e5"), "offset is not a number"),
        (put(*AREA, "offset", 32768), "offset is not a string"),
        (put(*AREA, "size", "18446744073709551616"), "size is not a number"),
        (put(*AREA, "size", "512"), "its area is too small"),
        (put(*AREA, "size", "0"), "outside of the place for areas"),
        (put(*AREA, "type", "journal"), "an area of type 'journal'"),
        (put(*AREA, "encryption", "serpent-xts-plain64"), "cipher 'serpent' is not supported"),
        (put(*AREA, "encryption", "x" * 5000), "encryption is not text"),
        (put(*AREA, "key_size", 1 << 40), "key_size is not between"),
        (put(*AREA, "key_size", 63), "not of 504"),
        (put(*SLOT, "key_size", 1 << 40), "key_size is not between"),
        (put(*SLOT, "key_size", True), "key_size is not an integer"),
        (put(*SLOT, "af", "stripes", 10**9), "stripes is not between 4000 and 4000"),
        (put(*SLOT, "af", "hash", "sha257"), "hash 'sha257'"),
        (put(*SLOT, "priority", 9), "priority"),
        (put(*KDF, "type", "scrypt"), "time is not an integer"),
        (put(*KDF, ARGON | {"type": "argon2x"}), "key derivation 'argon2x' is not supported"),
        (put(*KDF, ARGON | {"memory": 1 << 30}), "1048576 MiB of memory; 1024 MiB are allowed"),
        (put(*KDF, ARGON | {"time": 1 << 30}), "passes over 1024 KiB"),
        (put(*KDF, ARGON | {"cpus": 1 << 20}), "4 passes, 1024 KiB and 1048576 lanes"),
        (put(*KDF, ARGON | {"cpus": 100}), "in 100 lanes"),
        (put(*KDF, ARGON | {"time": -1}), "time is not between"),
        (put(*KDF, ARGON | {"salt": "%%%"}), "salt is not base64"),
        (put(*KDF, ARGON | {"salt": "YQ=="}), "a salt of less than 8 bytes"),
        (put(*KDF, "iterations", 0xFFFFFFFF), "asks for 4294967295 iterations"),
        (put(*KDF, "iterations", 0), "iterations is not between"),
        (put(*KDF, "hash", "../../x"), "hash '../../x' is not supported"),
        (without_data, "it describes no data"),
        (put(*SEGMENT, "type", "verity"), "type 'verity' is not supported"),
        (put(*SEGMENT, "integrity", {"type": "hmac(sha256)"}), "integrity protection"),
        (put(*SEGMENT, "sector_size", 513), "sectors of 513 bytes"),
        (put(*SEGMENT, "offset", "17"), "not multiples of a sector"),
        (put(*SEGMENT, "size", "0"), "a size of 0"),
        (put(*SEGMENT, "size", "1000"), "a size of 1000"),
        (put(*SEGMENT, "flags", "x"), "flags are not a list"),
        (put(*SEGMENT, "iv_tweak", str(1 << 63)), "iv_tweak is not a number"),
        (put(*DIGEST, "keyslots", ["7"]), "refers to keyslots that do not exist"),
        (put(*DIGEST, "keyslots", "0"), "refers to keyslots that do not exist"),
        (put(*DIGEST, "segments", [0]), "refers to segments that do not exist"),
        (put(*DIGEST, "iterations", 0xFFFFFFFF), "the digest of the volume key asks for"),
        (put(*DIGEST, "digest", "YQ=="), "a digest of 1 bytes"),
        (put("digests", {}), "Invalid password"),
        (put("config", "json_size", "4096"), "json_size"),
        (put("config", "keyslots_size", str(1 << 40)), "keyslots_size"),
        (put("config", "requirements", {"mandatory": ["future"]}), "it requires future"),
        (put("config", "requirements", {"mandatory": ["online-reencrypt-v2"]}),
         "finish the re-encryption"),
        (put("config", "requirements", {"mandatory": "x"}), "not a list of names"),
        (put("tokens", "0", {"type": "x", "keyslots": ["9"]}), "tokens 0"),
        (lambda metadata: b"[]", "not an object"),
        (lambda metadata: b"", "not JSON"),
        (lambda metadata: b"{", "not JSON"),
        (lambda metadata: b"[" * 12000, "not JSON"),
        (lambda metadata: b'{"a":' * 2400, "not JSON"),
        (lambda metadata: b'{"keyslots": NaN}', "not JSON"),
        (lambda metadata: b"1" * 12000, "not JSON"),
        (lambda metadata: b'{"\xff": 1}', "not JSON"),
    ],
)  # fmt: skip
def test_luks2_metadata(change: Callable[[Json], Any], said: str) -> None:
    assert said in problem(forged(change)).desc


def test_areas_that_overlap() -> None:
    async def work() -> Memory:
        storage = Memory()
        volume = await luks.create(storage, ONE, luks.CreateOptions(**CHEAP2))
        assert isinstance(volume, luks.Luks2)
        await volume.add_passphrase(ONE, b"two", None, QUICK)
        metadata = volume.metadata
        metadata["keyslots"]["1"]["area"]["offset"] = str(32768 + 4096)
        with pytest.raises(VhostblkError, match="areas of keyslots 0 and keyslots 1 overlap"):
            async with volume.changing:
                await volume.write_metadata(metadata)
        found = await binary2.find(storage)
        _put_json(storage, found.copy.binary, json.dumps(metadata).encode())
        return storage

    assert "overlap" in problem(run(work())).desc


@pytest.mark.parametrize(
    ("at", "form", "value", "said"),
    [
        (6, ">H", 3, "version 3 is not supported"),
        (8, ">Q", 0, "a size of 0 bytes"),
        (8, ">Q", 0x4001, "a size of 16385 bytes"),
        (8, ">Q", 1 << 63, "a size of 9223372036854775808 bytes"),
        (256, ">Q", 512, "it says that it is at 512"),
        (72, "32s", b"crc32", "checksum 'crc32' is not supported"),
        (104, "64s", b"other", "the checksum does not match"),
        (448, "64s", b"", "the checksum does not match"),
        (4096, "4s", b"none", "the checksum does not match"),
    ],
)
def test_luks2_binary(at: int, form: str, value: Any, said: str) -> None:
    """One copy so: the other counts. Both: the error is about the first."""
    storage = made(CHEAP2)
    struct.pack_into(form, storage.content, at, value)
    volume = run(luks.open_volume(storage))
    [damage] = volume.damage
    assert damage.startswith("first copy of the header: ")
    assert said in damage
    storage.content[16384 + 4096] ^= 1
    assert said in problem(storage).desc


@pytest.mark.parametrize("where", ["slots", "digest"])
def test_many_costly_slots_are_bounded_together(where: str) -> None:
    """Each within the limits, all of them together for hours: it is said at once."""
    storage = made(CHEAP2 | {"metadata_size": 65536})

    def change(metadata: Json) -> None:
        slot = metadata["keyslots"].pop("0")
        if where == "slots":
            slot["kdf"] = ARGON | {"time": 16, "memory": 1 << 20}
        else:
            metadata["digests"]["0"]["iterations"] = 90_000_000
        for number in range(32):
            mine = copy.deepcopy(slot)
            mine["area"]["offset"] = str(131072 + 258048 * number)
            metadata["keyslots"][str(number)] = mine
        metadata["digests"]["0"]["keyslots"] = [str(number) for number in range(32)]

    found = run(binary2.find(storage))
    metadata = copy.deepcopy(found.copy.metadata)
    change(metadata)
    _put_json(storage, found.copy.binary, json.dumps(metadata).encode())
    assert "on 32 key slots would take minutes; name the slot" in problem(storage).desc

    async def remove() -> None:
        await (await luks.open_volume(storage)).remove_passphrase(ONE)

    with pytest.raises(VhostblkError, match="would take minutes; name the slot"):
        run(remove())


JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 31, 32, 512, 4096, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**300,
    1.5, 1e300, "", "0", "1", "32", "-1", "512", "9" * 19, "9" * 30, "9" * 3000, "0x10", "luks2",
    "pbkdf2", "raw", "crypt", "linear", "dynamic", "aes-xts-plain64", "aes-ecb", "sha1", "argon2id",
    "whirlpool", "AAAA", "\0", "\ud800", "\u0663", [], {}, [[]], ["0"], ["0", "0"], [0], {"0": {}},
    {"type": "luks2"}, {"0": {"type": "luks2"}}, ["backup-final"], {"mandatory": ["x"]},
    {"mandatory": ["vhostblk-reencrypt"]}, json.loads("[" * 100 + "]" * 100),
]  # fmt: skip


def mutate(metadata: Json, rnd: random.Random) -> None:
    """Something somewhere is another thing, or gone, or there twice."""
    at: Any = metadata
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            at["x" if isinstance(at, dict) else slice(0)] = [rnd.choice(JUNK)]
            return
        key = rnd.choice(keys)
        below = at[key]
        if isinstance(below, dict | list) and rnd.random() < 0.8:
            at = below
            continue
        what = rnd.random()
        if what < 0.2:
            del at[key]
        elif what < 0.4 and isinstance(at, dict):
            at[rnd.choice([str(rnd.randrange(40)), "x" * 100, "type"])] = copy.deepcopy(below)
        else:
            at[key] = copy.deepcopy(rnd.choice(JUNK))
        return


@pytest.mark.parametrize("begun", [False, True], ids=["ordinary", "reencrypting"])
def test_metadata_with_anything_in_it(begun: bool) -> None:
    """With good checksums. No error but ours, little time and memory, and nothing written."""
    storage = Memory()
    options = luks.CreateOptions(**CHEAP2, keyslots_size=1 << 20)
    volume = run(luks.create(storage, ONE, options, detached=True, pending=begun))
    run(volume.add_passphrase(ONE, b"two", None, QUICK)) if not begun else None
    found = run(binary2.find(storage))
    limits = luks.Limits(iterations=10_000, memory=1 << 20, passes=1 << 22)

    async def attempt(left: Memory) -> None:
        volume = await luks.open_volume(left, limits, None)
        luks.describe(volume)
        assert isinstance(volume, luks.Luks2)
        reencryption.find(volume)
        (await volume.unlock(ONE))[1].close()

    rnd = random.Random(9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for round in range(FUZZ):
        metadata = copy.deepcopy(found.copy.metadata)
        for _ in range(rnd.choice((1, 1, 2, 4))):
            mutate(metadata, rnd)
        left = Memory(bytes(storage.content))
        text = json.dumps(metadata).encode()
        if len(text) >= found.copy.binary.size - 4096:
            continue
        _put_json(left, found.copy.binary, text)
        content = bytes(left.content)
        started = time.process_time()
        try:
            run(attempt(left))
        except VhostblkError as error:
            assert (error.data or {})["code"] in PERMITTED, (round, metadata)
            assert error.desc.isprintable()
        assert time.process_time() - started < 5, (round, metadata)
        assert bytes(left.content) == content
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_limits_can_be_raised() -> None:
    storage = forged(put(*KDF, ARGON | {"memory": 2048}))
    assert "allowed" in problem(storage, memory=1 << 20).desc
    assert "Invalid password" in problem(storage).desc


def test_a_costly_slot_does_not_hide_the_others() -> None:
    async def work() -> None:
        storage = Memory()
        volume = await luks.create(storage, b"other", luks.CreateOptions(**CHEAP2))
        assert isinstance(volume, luks.Luks2)
        await volume.add_passphrase(b"other", ONE, None, QUICK)
        metadata = volume.metadata
        metadata["keyslots"]["0"]["kdf"] = ARGON | {"memory": 1 << 22}
        async with volume.changing:
            await volume.write_metadata(metadata)
        assert await volume.test(ONE) == 1
        told = luks.describe(volume)["slots"]
        assert [slot["state"] for slot in told] == ["unusable", "active"]
        assert "allowed" in told[0]["problem"]
        with pytest.raises(VhostblkError, match="allowed"):
            await volume.test(b"wrong")

    run(work())


ESCAPES = "\x1b[2J" + "x" * 1000


@pytest.mark.parametrize(
    "change",
    [
        put("config", "requirements", {"mandatory": [ESCAPES]}),
        put(*SEGMENT, "type", ESCAPES),
        put(*SEGMENT, "encryption", ESCAPES),
        put(*SLOT, "type", ESCAPES),
        put(*KDF, "hash", ESCAPES),
        put(*AREA, "encryption", ESCAPES),
        put(*AREA, "type", ESCAPES),
    ],
)
def test_no_terminal_is_confused(change: Callable[[Json], None]) -> None:
    """Names from a header are shown to operators: nothing but text, and not too much of it."""
    assert problem(forged(change)).desc.isprintable()
