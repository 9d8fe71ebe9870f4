# SPDX-License-Identifier: GPL-2.0-or-later
"""A key slot and a digest, as both versions have them, and the computations they stand for.

The volume key (which encrypts the disk) is inflated by the anti-forensic splitter, encrypted with
a key derived from a passphrase, and stored in the slot's area. Whether what comes out of a slot
is the volume key is told by a digest: PBKDF2 of the key.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from typing import Any

from vhostblk.luks import af, hashes
from vhostblk.luks.ciphers import SECTOR, CipherSpec, SectorCipher
from vhostblk.luks.errors import bad_header
from vhostblk.luks.kdf import Kdf, Limits
from vhostblk.secret import SecretBytes
from vhostblk.secret.memory import Buffer, wipe

LARGEST_KEY = 512  # bytes; no cipher's is that long


def material_size(key_size: int) -> int:
    """Bytes of a split key, in whole sectors."""
    return -(-key_size * af.STRIPES // SECTOR) * SECTOR


@dataclass(frozen=True)
class Slot:
    """A key slot in use."""

    number: int
    kdf: Kdf
    key_size: int
    """Bytes of the key that is stored."""
    area_offset: int
    cipher: str
    """What its area is encrypted with."""
    area_key_size: int
    af_hash: str
    digest: str
    """The digest that knows the key; "" if none does."""
    priority: int = 1
    """0: only if it is asked for by number; 2: before others."""

    def check(self, limits: Limits) -> None:
        """Refuse what is not to be had here or costs too much."""
        self.kdf.check(limits, f"key slot {self.number}")
        CipherSpec.parse(self.cipher).check_key_size(self.area_key_size)
        hashes.digest_size(self.af_hash)

    def open(self, passphrase: Buffer, material: bytes) -> SecretBytes:
        """What the slot says the key is. A long computation."""
        with self.kdf.derive(passphrase, self.area_key_size) as key, self._cipher(key) as cipher:
            pieces = cipher.decrypt(0, material)
        try:
            return af.merge(pieces, self.key_size, self.af_hash)
        finally:
            wipe(pieces)

    def seal(self, passphrase: Buffer, key: SecretBytes) -> bytes:
        """What is to be written to the area. A long computation."""
        pieces = af.split(key.view(), self.af_hash)
        try:
            pieces += bytes(material_size(self.key_size) - len(pieces))
            with (
                self.kdf.derive(passphrase, self.area_key_size) as wrapping,
                self._cipher(wrapping) as cipher,
            ):
                return bytes(cipher.encrypt(0, pieces))
        finally:
            wipe(pieces)

    def _cipher(self, key: SecretBytes) -> SectorCipher:
        return SectorCipher(CipherSpec.parse(self.cipher), key.view())


@dataclass(frozen=True)
class Digest:
    """PBKDF2 of a volume key."""

    kdf: Kdf
    value: bytes

    @classmethod
    def of(cls, key: SecretBytes, kdf: Kdf, length: int) -> Digest:
        """That of this key. A computation of some length."""
        with kdf.derive(key.view(), length) as value:
            return cls(kdf, bytes(value.view()))

    def check(self, limits: Limits) -> None:
        """Refuse what is not to be had here or costs too much."""
        if self.kdf.type != "pbkdf2":
            raise bad_header(f"a digest of type '{self.kdf.type}'")
        self.kdf.check(limits, "the digest of the volume key")
        if not 16 <= len(self.value) <= 64:
            raise bad_header(f"a digest of {len(self.value)} bytes")

    def matches(self, key: SecretBytes) -> bool:
        """Whether this is the volume key."""
        with self.kdf.derive(key.view(), len(self.value)) as value:
            return hmac.compare_digest(value.view(), self.value)


def random_key(size: int) -> SecretBytes:
    """A new volume key."""
    os.getrandom(1)  # waits until the kernel has gathered entropy, which the file does not
    key = SecretBytes(size)
    with open("/dev/urandom", "rb", buffering=0) as source:
        view, done = key.view(), 0
        while done < size:  # straight into the locked memory
            done += source.readinto(view[done:])
    return key


@dataclass(frozen=True)
class SlotInfo:
    """What can be said about a key slot without a passphrase."""

    number: int
    active: bool
    kdf: Kdf | None = None
    key_offset: int = 0
    key_size: int = 0
    cipher: str = ""
    priority: int = 1
    digest: str = ""
    type: str = "luks"
    problem: str | None = None
    """Why it cannot be used here."""

    @property
    def state(self) -> str:
        """One word."""
        if not self.active:
            return "inactive"
        return "active" if self.problem is None else "unusable"

    def describe(self) -> dict[str, Any]:
        """For the control socket (LuksKeySlot in docs/luks.md)."""
        told: dict[str, Any] = {"slot": self.number, "state": self.state}
        if not self.active:
            return told
        told |= {"type": self.type, "key-offset": self.key_offset, "key-size": self.key_size}
        if self.kdf is not None:
            told |= self.kdf.describe()
            told |= {"cipher": self.cipher, "stripes": af.STRIPES, "priority": self.priority}
        if self.problem is not None:
            told["problem"] = self.problem
        return told
