# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be chosen when a header or a key slot is made.

Names and defaults are QAPI's (QCryptoBlockCreateOptionsLUKS) where QEMU has them; the rest is what
cryptsetup has options for.
"""

from __future__ import annotations

import os
from typing import Literal

from vhostblk.luks import kdf
from vhostblk.luks.ciphers import SECTOR_SIZES, CipherSpec
from vhostblk.luks.errors import bad_option
from vhostblk.luks.hashes import NAMES as HASHES
from vhostblk.schema import Model, Size, UInt32

Version = Literal["luks1", "luks2"]


class KdfOptions(Model):
    """What it is to cost to try a passphrase."""

    iter_time: UInt32 = 2000
    """Milliseconds to spend on a passphrase, on this machine."""
    pbkdf: Literal["pbkdf2", "argon2i", "argon2id"] | None = None
    """How keys are derived: argon2id with LUKS2; LUKS1 has pbkdf2 only."""
    pbkdf_memory: Size | None = None
    """Memory for Argon2; 1 GiB if not given, or half of the machine's."""
    pbkdf_parallel: UInt32 | None = None
    """Threads for Argon2; 4 if not given, or as many as there are processors."""
    pbkdf_force_iterations: UInt32 | None = None
    """Iterations (pbkdf2) or passes (Argon2) instead of what iter-time would give."""


class CreateOptions(KdfOptions):
    """A new header."""

    version: Version = "luks1"
    """luks1, which QEMU reads too, or luks2."""
    cipher_alg: str = "aes-256"
    """Cipher and bits of its key: aes-128, aes-192, aes-256, camellia-…, sm4, cast5-128, 3des."""
    cipher_mode: Literal["xts", "cbc", "ctr", "ecb"] = "xts"
    """How the cipher is used. With xts the key is twice as long."""
    ivgen_alg: (
        Literal["plain", "plain64", "plain64be", "essiv", "benbi", "eboiv", "null"] | None
    ) = None
    """From the number of a sector to its IV; plain64 if not given."""
    ivgen_hash_alg: str | None = None
    """The hash of essiv; sha256 if not given."""
    hash_alg: str = "sha256"
    """The hash for key slots and digests."""
    sector_size: UInt32 = 512
    """What is encrypted at once; more than 512 with luks2 only."""
    label: str | None = None
    """A name in the header (luks2)."""
    subsystem: str | None = None
    """A second one (luks2)."""
    uuid: str | None = None
    """Its UUID; a random one if not given."""
    data_offset: Size | None = None
    """Where the encrypted data start; behind the header if not given, at 0 if that is detached."""
    metadata_size: Size = 16384
    """Size of one of the two copies of luks2's metadata."""
    keyslots_size: Size | None = None
    """Space for key slots (luks2); 16 MiB with the metadata if not given."""


def cipher_of(options: CreateOptions) -> tuple[CipherSpec, int]:
    """The cipher, and bytes of its key."""
    name, _, bits = options.cipher_alg.rpartition("-")
    if not bits.isdecimal():
        name, bits = options.cipher_alg, {"sm4": "128", "3des": "192"}.get(options.cipher_alg, "")
    cipher = {"3des": "des3_ede"}.get(name, name)
    if not bits.isdecimal() or not cipher:
        hint = ", ".join(("aes-128", "aes-192", "aes-256", "camellia-128", "camellia-192",
                          "camellia-256", "sm4", "cast5-128", "3des"))  # fmt: skip
        raise bad_option("cipher-alg", f"'{options.cipher_alg}' is not a cipher; known: {hint}")
    iv: str = options.ivgen_alg or "plain64"
    if iv == "essiv":
        iv += f":{options.ivgen_hash_alg or 'sha256'}"
    elif options.ivgen_hash_alg is not None:
        raise bad_option("ivgen-hash-alg", f"the IV generator {iv} has no hash; essiv has")
    spec = CipherSpec.parse(f"{cipher}-{options.cipher_mode}-{iv}")
    size = int(bits) // 8 * (2 if options.cipher_mode == "xts" else 1)
    spec.check_key_size(size)
    return spec, size


def check(options: CreateOptions) -> None:
    """Refuse what cannot be, before anything is written."""
    cipher_of(options)
    if options.hash_alg not in HASHES:
        raise bad_option("hash-alg", f"'{options.hash_alg}' is not a hash; known: "
                   f"{', '.join(sorted(HASHES))}")  # fmt: skip
    if options.sector_size not in SECTOR_SIZES:
        raise bad_option("sector-size", "sectors have 512, 1024, 2048 or 4096 bytes")
    for parameter, given in (("label", options.label), ("subsystem", options.subsystem)):
        if given is not None and len(given.encode()) > 47:
            raise bad_option(parameter, "at most 47 bytes")
    if options.version == "luks1":
        for parameter, wanted in (
            ("sector-size", options.sector_size != 512),
            ("label", options.label is not None),
            ("subsystem", options.subsystem is not None),
            ("keyslots-size", options.keyslots_size is not None),
            ("metadata-size", options.metadata_size != 16384),
        ):
            if wanted:
                raise bad_option(parameter, "LUKS1 does not have this; version=luks2 does")


def kdf_of(options: KdfOptions, version: int, hash: str, length: int) -> kdf.Kdf:
    """A key derivation with a new salt. Measures this machine if need be, in the calling thread."""
    salt = os.urandom(32)
    type = options.pbkdf or ("argon2id" if version == 2 else "pbkdf2")
    if version == 1 and type != "pbkdf2":
        raise bad_option("pbkdf", f"LUKS1 has pbkdf2 only, not {type}; version=luks2 has")
    forced = options.pbkdf_force_iterations
    if type == "pbkdf2":
        for parameter, value in (
            ("pbkdf-memory", options.pbkdf_memory),
            ("pbkdf-parallel", options.pbkdf_parallel),
        ):
            if value is not None:
                raise bad_option(parameter, "pbkdf2 takes no memory and one thread; argon2id does")
        if forced is not None and forced < kdf.LEAST_ITERATIONS:
            raise bad_option(
                "pbkdf-force-iterations", f"at least {kdf.LEAST_ITERATIONS} for pbkdf2"
            )
        count = forced or kdf.pbkdf2_for(hash, options.iter_time, length)
        return kdf.Kdf(type, salt, hash=hash, iterations=min(count, 0xFFFF_FFFF))
    cpus = options.pbkdf_parallel or kdf.default_cpus()
    memory = (options.pbkdf_memory or kdf.default_memory() * kdf.KIB) // kdf.KIB
    if memory < max(8 * cpus, 32):
        raise bad_option("pbkdf-memory", f"at least {max(8 * cpus, 32)} KiB for {cpus} threads")
    if memory > 4 << 20:
        raise bad_option("pbkdf-memory", "cryptsetup reads no more than 4 GiB")
    if not 1 <= cpus <= 4:
        raise bad_option("pbkdf-parallel", "cryptsetup reads no more than 4")
    if forced is not None:
        if forced < 4:
            raise bad_option("pbkdf-force-iterations", f"at least 4 for {type}")
        return kdf.Kdf(type, salt, time=forced, memory=memory, cpus=cpus)
    time, memory = kdf.argon2_for(type, options.iter_time, memory, cpus)
    return kdf.Kdf(type, salt, time=time, memory=memory, cpus=cpus)
