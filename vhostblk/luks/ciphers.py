# SPDX-License-Identifier: GPL-2.0-or-later
"""Sector ciphers, described as dm-crypt does: `cipher-mode-ivgen[:hash]`.

This is what key slots are encrypted with, a few hundred kilobytes each; the disk itself is the
engine's (vhostblk/engine/crypt.py), which knows the same names. What `cryptography` has no
mode for (XTS with anything but AES-128 and AES-256, CTR with old ciphers) is put together here from
the block cipher.

IV generators are those of the kernel's documentation of dm-crypt; IEEE 1619 describes XTS.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, modes

from vhostblk.luks.errors import unsupported
from vhostblk.luks.hashes import NAMES as HASHES
from vhostblk.luks.hashes import digest, digest_size
from vhostblk.secret.memory import Buffer, wipe_bytes

SECTOR = 512
SECTOR_SIZES = (512, 1024, 2048, 4096)
IVS = ("plain", "plain64", "plain64be", "essiv", "benbi", "eboiv", "null")
MODES = ("xts", "cbc", "ctr", "ecb")

# Sizes of keys in bytes. XTS takes two of them.
_KEYS = {
    "aes": (16, 24, 32),
    "camellia": (16, 24, 32),
    "sm4": (16,),
    "cast5": (16,),
    "des3_ede": (24,),
}
_CLASSES = {"aes": "AES", "camellia": "Camellia", "sm4": "SM4", "cast5": "CAST5",
            "des3_ede": "TripleDES"}  # fmt: skip
_CAPI = re.compile(r"capi:(\w+)\((\w+)\)(?:-(.+))?\Z")


@dataclass(frozen=True)
class CipherSpec:
    """The parts of a description."""

    text: str
    cipher: str
    mode: str
    iv: str
    iv_hash: str

    @classmethod
    def parse(cls, text: str) -> CipherSpec:
        """Take a description apart, refusing by name what is not to be had here."""
        if not text.isascii() or not text.isprintable() or len(text) > 64:
            raise unsupported("the name of the cipher is not text")
        kernel = _CAPI.match(text)
        if kernel:
            mode, cipher, iv = kernel.groups()
        else:
            cipher, _, rest = text.partition("-")
            mode, _, iv = rest.partition("-")
        mode, iv = mode or "cbc", iv or ("null" if mode == "ecb" else "plain")
        iv, _, iv_hash = iv.partition(":")
        for what, name, known in (
            ("cipher", cipher, tuple(_KEYS)),
            ("mode", mode, MODES),
            ("IV generator", iv, IVS),
        ):
            if name not in known:
                raise unsupported(
                    f"'{text}': {what} '{name}' is not supported; known: {', '.join(known)}"
                )
        if iv == "essiv" and iv_hash not in HASHES:
            named = f"hash '{iv_hash}' is not supported" if iv_hash else "a hash is missing"
            raise unsupported(f"'{text}': {named}; known: {', '.join(sorted(HASHES))}")
        if iv != "essiv":
            iv_hash = ""
        if mode == "xts" and cipher in ("cast5", "des3_ede"):
            raise unsupported(f"'{text}': XTS needs a cipher with blocks of 16 bytes")
        return cls(text, cipher, mode, iv, iv_hash)

    @property
    def key_sizes(self) -> tuple[int, ...]:
        """Possible sizes of the key, in bytes."""
        sizes = _KEYS[self.cipher]
        return tuple(2 * size for size in sizes) if self.mode == "xts" else sizes

    def check_key_size(self, size: int) -> None:
        """Refuse a key that does not fit."""
        if size not in self.key_sizes:
            fitting = ", ".join(str(8 * each) for each in self.key_sizes)
            raise unsupported(f"'{self.text}' has keys of {fitting} bits, not of {8 * size}")
        if self.iv == "essiv" and digest_size(self.iv_hash) not in _KEYS[self.cipher]:
            raise unsupported(
                f"'{self.text}': a hash of {8 * digest_size(self.iv_hash)} bits is not a key for "
                f"{self.cipher}"
            )
        if self.iv == "eboiv" and size not in _KEYS[self.cipher]:
            raise unsupported(f"'{self.text}': eboiv does not go with {self.mode}")


class SectorCipher:
    """A cipher and its key."""

    def __init__(self, spec: CipherSpec, key: Buffer, sector_size: int = SECTOR) -> None:
        spec.check_key_size(len(key))
        self._sector_size = sector_size
        self._mode = spec.mode
        own = bytes(memoryview(key))  # a copy in any case: it is wiped
        half = len(own) // 2
        self._whole = own
        self._key = own[:half] if spec.mode == "xts" else own
        self._algorithm = _algorithm(spec.cipher, self._key)
        self._block = self._algorithm.block_size // 8
        self._second = own[half:] if spec.mode == "xts" else b""
        self._tweak = _ecb(_algorithm(spec.cipher, self._second)) if self._second else None
        self._iv = self._generator(spec, own)

    def close(self) -> None:
        """Wipe the key."""
        for key in (self._whole, self._key, self._second):
            wipe_bytes(key)

    def __enter__(self) -> SectorCipher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encrypt(self, sector: int, data: Buffer) -> bytearray:
        """Whole sectors, of which the first has this number, counted in 512 bytes."""
        return self._apply(sector, data, True)

    def decrypt(self, sector: int, data: Buffer) -> bytearray:
        """The same back; the caller wipes it."""
        return self._apply(sector, data, False)

    def _apply(self, sector: int, data: Buffer, encrypt: bool) -> bytearray:
        size = self._sector_size
        if len(data) % size:
            raise ValueError("not whole sectors")
        view = memoryview(data)
        result = bytearray(len(data) + 32)  # update_into() wants some room
        into = memoryview(result)
        for at in range(0, len(data), size):
            iv = self._iv(sector + at // SECTOR)
            self._one(iv, view[at : at + size], into[at:], encrypt)
        into.release()
        del result[len(data) :]
        return result

    def _one(self, iv: bytes, data: memoryview, into: memoryview, encrypt: bool) -> None:
        mode: Any
        if self._mode == "xts":
            if len(self._whole) in (32, 64) and self._algorithm.name == "AES":
                algorithm, mode = _algorithm("aes", self._whole), modes.XTS(iv)
            else:
                assert self._tweak is not None
                mask = _xts_masks(self._tweak(True, iv), len(data))
                return self._masked(data, into, mask, encrypt)
        elif self._mode == "ctr":
            # The counter is the IV, counted up in big-endian.
            start = int.from_bytes(iv, "big")
            blocks = -(-len(data) // self._block)
            wrap = (1 << 8 * self._block) - 1
            counters = b"".join(
                ((start + i) & wrap).to_bytes(self._block, "big") for i in range(blocks)
            )
            stream = _ecb(self._algorithm)(True, counters)
            into[: len(data)] = _xor(data, stream[: len(data)])
            return None
        else:
            algorithm = self._algorithm
            mode = modes.CBC(iv) if self._mode == "cbc" else modes.ECB()
        cipher = Cipher(algorithm, mode)
        context = cipher.encryptor() if encrypt else cipher.decryptor()
        context.update_into(data, into)
        return None

    def _masked(self, data: memoryview, into: memoryview, mask: bytes, encrypt: bool) -> None:
        inner = _ecb(self._algorithm)(encrypt, _xor(data, mask))
        into[: len(data)] = _xor(inner, mask)

    def _generator(self, spec: CipherSpec, key: bytes) -> Callable[[int], bytes]:
        """From the number of a sector to its IV."""
        width = self._block

        def little(number: int) -> bytes:
            return number.to_bytes(16, "little")[:width]

        if spec.iv == "plain":
            return lambda sector: little(sector & 0xFFFF_FFFF)
        if spec.iv == "plain64":
            return little
        if spec.iv == "plain64be":
            return lambda sector: sector.to_bytes(width, "big")
        if spec.iv == "benbi":
            # The number of the block, from 1, in big-endian at the end of the IV.
            shift = 9 - (width.bit_length() - 1)
            return lambda sector: ((sector << shift) + 1).to_bytes(width, "big")
        if spec.iv == "eboiv":
            encrypt = _ecb(_algorithm(spec.cipher, key))
            # The kernel multiplies by the size of a sector what counts 512 bytes.
            return lambda sector: encrypt(True, little(sector * self._sector_size))
        if spec.iv == "essiv":
            salted = _ecb(_algorithm(spec.cipher, digest(spec.iv_hash, key)))
            return lambda sector: salted(True, little(sector))
        return lambda sector: bytes(width)


@functools.cache
def _class_of(cipher: str) -> Any:
    name = _CLASSES[cipher]
    # Old ciphers move from the one to the other with time (Camellia in version 49).
    for module in ("decrepit", "primitives"):
        found = importlib.import_module(f"cryptography.hazmat.{module}.ciphers.algorithms")
        if name in vars(found) or (module == "primitives" and hasattr(found, name)):
            return getattr(found, name)
    raise unsupported(f"cipher '{cipher}' is not in this version of cryptography")


def _algorithm(cipher: str, key: bytes) -> Any:
    return _class_of(cipher)(key)


def _ecb(algorithm: Any) -> Callable[[bool, bytes], bytes]:
    def apply(encrypt: bool, data: bytes) -> bytes:
        cipher = Cipher(algorithm, modes.ECB())
        context = cipher.encryptor() if encrypt else cipher.decryptor()
        return context.update(data)

    return apply


def _xor(left: Buffer, right: Buffer) -> bytes:
    number = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return number.to_bytes(len(left), "little")


def _xts_masks(tweak: bytes, length: int) -> bytes:
    """The tweak of each block: the one before times x, modulo x^128 + x^7 + x^2 + x + 1."""
    value = int.from_bytes(tweak, "little")
    masks = bytearray()
    for _ in range(length // 16):
        masks += value.to_bytes(16, "little")
        value <<= 1
        if value >> 128:
            value = (value & ((1 << 128) - 1)) ^ 0x87
    return bytes(masks)
