# SPDX-License-Identifier: GPL-2.0-or-later
"""What the options of a new header or key slot come to: cipher, key size, key derivation."""

from __future__ import annotations

import os

from vhostblk.luks import kdf
from vhostblk.luks.ciphers import SECTOR_SIZES, CipherSpec
from vhostblk.luks.errors import bad_option
from vhostblk.luks.hashes import NAMES as HASHES
from vhostblk.luks.options import CreateOptions, KdfOptions


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
