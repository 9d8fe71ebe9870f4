# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's ciphers against another implementation, mode by mode, IV by IV."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.decrepit.ciphers import algorithms as old_algorithms
from cryptography.hazmat.primitives.ciphers import Cipher as Reference
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from vhostblk.engine import Engine
from vhostblk.engine.crypt import Cipher, CipherSpec, new_cipher
from vhostblk.schema import VhostblkError

SECTOR = 512


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(asyncio.new_event_loop())
    yield engine
    engine.close()


def algorithm(name: str, key: bytes) -> object:
    kinds = {
        "aes": algorithms.AES,
        "camellia": getattr(old_algorithms, "Camellia", None) or algorithms.Camellia,
        "sm4": algorithms.SM4,
        "cast5": old_algorithms.CAST5,
        "des3_ede": old_algorithms.TripleDES,
    }
    return kinds[name](key)


def block_encrypt(name: str, key: bytes, data: bytes) -> bytes:
    encryptor = Reference(algorithm(name, key), modes.ECB()).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def reference_iv(spec: CipherSpec, key: bytes, number: int, size: int, sector_size: int) -> bytes:
    """dm-crypt's documentation, word by word."""
    if spec.iv == "null":
        return bytes(size)
    if spec.iv == "plain":
        return (number & 0xFFFF_FFFF).to_bytes(4, "little").ljust(size, b"\0")
    if spec.iv == "plain64be":
        return number.to_bytes(8, "big").rjust(size, b"\0")
    if spec.iv == "benbi":
        return (number * (512 // size) + 1).to_bytes(8, "big").rjust(size, b"\0")
    if spec.iv == "eboiv":
        value = (number * sector_size).to_bytes(8, "little").ljust(size, b"\0")
        return block_encrypt(spec.name, key, value)
    value = number.to_bytes(8, "little").ljust(size, b"\0")
    if spec.iv == "essiv":
        return block_encrypt(spec.name, hashlib.new(spec.iv_hash, key).digest(), value)
    return value


def reference_xts(spec: CipherSpec, key: bytes, iv: bytes, data: bytes) -> bytes:
    """IEEE 1619, block by block."""
    half = len(key) // 2
    tweak = int.from_bytes(block_encrypt(spec.name, key[half:], iv), "little")
    masks = bytearray()
    for _ in range(len(data) // 16):
        masks += tweak.to_bytes(16, "little")
        tweak = (tweak << 1) & (1 << 128) - 1 ^ (0x87 if tweak >> 127 else 0)
    mask = int.from_bytes(masks, "little")
    masked = (int.from_bytes(data, "little") ^ mask).to_bytes(len(data), "little")
    out = int.from_bytes(block_encrypt(spec.name, key[:half], masked), "little") ^ mask
    return out.to_bytes(len(data), "little")


def reference(
    spec: CipherSpec, key: bytes, data: bytes, first: int, sector_size: int, unit: int
) -> bytes:
    out = b""
    block = 8 if spec.name in ("cast5", "des3_ede") else 16
    for at in range(0, len(data), sector_size):
        sector = data[at : at + sector_size]
        iv = reference_iv(spec, key, first + at // unit, block, sector_size)
        if spec.mode == "xts":
            out += reference_xts(spec, key, iv, sector)
            continue
        mode = {
            "cbc": lambda iv=iv: modes.CBC(iv),
            "ctr": lambda iv=iv: modes.CTR(iv),
            "ecb": lambda iv=iv: modes.ECB(),
        }[spec.mode]()
        encryptor = Reference(algorithm(spec.name, key), mode).encryptor()
        out += encryptor.update(sector) + encryptor.finalize()
    return out


def both_ways(cipher: Cipher, expected: Callable[[bytes], bytes], length: int, offset: int) -> None:
    data = os.urandom(length)
    memory = bytearray(data)
    cipher.apply(True, offset, memory)
    assert bytes(memory) == expected(data)
    cipher.apply(False, offset, memory)
    assert bytes(memory) == data


@pytest.mark.parametrize("sector_size", [512, 1024, 2048, 4096])
@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("aes-xts-plain64", 512),
        ("aes-xts-plain64", 256),
        ("aes-xts-plain", 512),
        ("aes-xts-plain64be", 512),
        ("aes-xts-essiv:sha256", 512),
        ("aes-cbc-essiv:sha256", 256),
        ("aes-cbc-essiv:md5", 128),
        ("aes-cbc-plain64", 192),
        ("aes-cbc-plain", 128),
        ("aes-cbc-eboiv", 256),
        ("aes-cbc-null", 256),
        ("aes-cbc-benbi", 256),
        ("aes-xts-benbi", 512),
        ("cast5-cbc-benbi", 128),
        ("aes-ctr-plain64", 256),
        ("aes-ecb", 256),
        ("aes", 256),
        ("capi:xts(aes)-plain64", 512),
        ("camellia-xts-plain64", 512),
        ("camellia-xts-plain64", 384),
        ("aes-xts-plain64", 384),
        ("camellia-cbc-essiv:sha256", 256),
        ("sm4-xts-plain64", 256),
        ("cast5-cbc-plain64", 128),
        ("des3_ede-cbc-plain64", 192),
    ],
)
def test_as_another_implementation(engine: Engine, text: str, bits: int, sector_size: int) -> None:
    spec = CipherSpec.parse(text)
    key = os.urandom(bits // 8)
    iv_offset = 7
    cipher = new_cipher(engine, spec, key, sector_size=sector_size, iv_offset=iv_offset)
    # Beyond what the IV generator `plain` counts to, and across a batch of sectors.
    for offset in (0, (1 << 41) - 4 * sector_size):
        both_ways(
            cipher,
            lambda data, offset=offset: reference(
                spec, key, data, offset // SECTOR + iv_offset, sector_size, SECTOR
            ),
            70 * sector_size,
            offset,
        )
    cipher.free()


def kind_of_xts(engine: Engine, spec: CipherSpec, key: bytes, sector_size: int, xts: int) -> Cipher:
    if xts == 3 and not {"vaes", "avx512bw", "vpclmulqdq"} <= set(
        Path("/proc/cpuinfo").read_text().split()
    ):
        with pytest.raises(VhostblkError, match="this CPU has no VAES"):
            new_cipher(engine, spec, key, sector_size=sector_size, xts=xts).free()
        pytest.skip("this CPU has no VAES")
    return new_cipher(engine, spec, key, sector_size=sector_size, xts=xts)


@pytest.mark.parametrize("xts", [0, 1, 2, 3])
@pytest.mark.parametrize("bits", [256, 512])
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_every_kind_of_xts(engine: Engine, xts: int, bits: int, sector_size: int) -> None:
    spec, key = CipherSpec.parse("aes-xts-plain64"), os.urandom(bits // 8)
    cipher = kind_of_xts(engine, spec, key, sector_size, xts)
    both_ways(
        cipher, lambda data: reference(spec, key, data, 8, sector_size, SECTOR), 3 << 16, 4096
    )
    cipher.free()


@pytest.mark.parametrize("xts", [2, 3])
@pytest.mark.parametrize("bits", [256, 384, 512])
@pytest.mark.parametrize("sector_size", [512, 1024, 2048, 4096])
def test_xts_of_ours_anywhere_in_memory(
    engine: Engine, xts: int, bits: int, sector_size: int
) -> None:
    """A guest's buffers lie where it wants, and nothing around them is touched."""
    spec, key = CipherSpec.parse("aes-xts-plain64"), os.urandom(bits // 8)
    cipher = kind_of_xts(engine, spec, key, sector_size, xts)
    for shift, sectors in ((0, 1), (1, 3), (17, 64), (63, 65)):
        size = sectors * sector_size
        before = os.urandom(shift + size + 64)
        memory = bytearray(before)
        cipher.apply(True, sector_size, memoryview(memory)[shift : shift + size])
        data = before[shift : shift + size]
        expected = reference(spec, key, data, sector_size // SECTOR, sector_size, SECTOR)
        assert bytes(memory) == before[:shift] + expected + before[shift + size :]
        cipher.apply(False, sector_size, memoryview(memory)[shift : shift + size])
        assert bytes(memory) == before
    cipher.free()


@pytest.mark.parametrize("xts", [2, 3])
def test_xts_of_ours_with_any_mask(engine: Engine, xts: int) -> None:
    """What comes out at the top of a mask is something else for each of these sectors."""
    spec, key = CipherSpec.parse("aes-xts-plain64"), bytes(range(64))
    cipher = kind_of_xts(engine, spec, key, 4096, xts)
    both_ways(cipher, lambda data: reference(spec, key, data, 0, 4096, SECTOR), 256 * 4096, 0)
    cipher.free()


def test_large_sectors_may_be_counted_as_such(engine: Engine) -> None:
    spec, key = CipherSpec.parse("aes-xts-plain64"), os.urandom(64)
    cipher = new_cipher(engine, spec, key, sector_size=4096, large_iv=True)
    both_ways(cipher, lambda data: reference(spec, key, data, 5, 4096, 4096), 1 << 16, 5 * 4096)
    cipher.free()


@pytest.mark.parametrize(
    ("text", "bits", "says"),
    [
        ("serpent-xts-plain64", 512, "cipher 'serpent' is not supported"),
        ("twofish-cbc-essiv:sha256", 256, "cipher 'twofish' is not supported"),
        ("cipher_null-ecb", 0, "cipher 'cipher_null' is not supported"),
        ("aes-lrw-benbi", 256, "mode 'lrw' is not supported"),
        ("aes-cbc-tcw", 256, "IV generator 'tcw' is not supported"),
        ("aes-cbc-essiv", 256, "a hash belongs to the IV generator essiv"),
        ("aes-cbc-essiv:nonsense", 256, "hash 'nonsense' is not supported"),
        ("aes-cbc-essiv:sha512", 256, "512 bits for its IVs"),
        ("aes-xts-plain64", 128, "a key of 128 bits does not fit; allowed: 256, 384, 512"),
    ],
)
def test_what_there_is_not_is_refused_by_name(
    engine: Engine, text: str, bits: int, says: str
) -> None:
    with pytest.raises(VhostblkError) as caught:
        new_cipher(engine, CipherSpec.parse(text), bytes(bits // 8)).free()
    assert says in caught.value.desc
    assert text in caught.value.desc
