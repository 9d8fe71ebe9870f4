# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be chosen when a header or a key slot is made.

Names and defaults are QAPI's (QCryptoBlockCreateOptionsLUKS) where QEMU has them; the rest is what
cryptsetup has options for.
"""

from __future__ import annotations

from typing import Literal

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
