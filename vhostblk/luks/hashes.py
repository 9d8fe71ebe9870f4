# SPDX-License-Identifier: GPL-2.0-or-later
"""Hash functions by the names that LUKS headers have for them."""

from __future__ import annotations

import ctypes
import functools
import hashlib

from vhostblk.luks.errors import unsupported
from vhostblk.secret.memory import Buffer

# What Python calls them, where that is different. Those of cryptsetup (crypto backends of
# cryptsetup 2.x) and of QEMU (QCryptoHashAlgo).
_PYTHON = {
    "sha3-224": "sha3_224",
    "sha3-256": "sha3_256",
    "sha3-384": "sha3_384",
    "sha3-512": "sha3_512",
    "blake2b-512": "blake2b",
    "blake2s-256": "blake2s",
    "rmd160": "ripemd160",
}
NAMES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "whirlpool", "md5", "sm3",
         *_PYTHON)  # fmt: skip
_LEGACY = ("ripemd160", "whirlpool", "md5")


def begun(name: str, part: Buffer) -> hashlib._Hash:
    """A hash with its first part; copies of it are cheaper than others that begin."""
    return hashlib.new(_python_name(name), part)


def digest(name: str, *parts: Buffer) -> bytes:
    """The hash of `parts`, one after the other."""
    state = begun(name, b"")
    for part in parts:
        state.update(part)
    return state.digest()


@functools.cache
def digest_size(name: str) -> int:
    """Bytes of a hash."""
    return hashlib.new(_python_name(name)).digest_size


def pbkdf2(name: str, passphrase: Buffer, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2 with HMAC (RFC 8018, section 5.2). Other threads go on while it works."""
    return hashlib.pbkdf2_hmac(_python_name(name), passphrase, salt, iterations, length)


@functools.cache
def _python_name(name: str) -> str:
    if name not in NAMES:
        raise unsupported(f"hash '{name}' is not supported; known: {', '.join(sorted(NAMES))}")
    python = _PYTHON.get(name, name)
    for attempt in range(2):
        try:
            hashlib.pbkdf2_hmac(python, b"", b"", 1)
        except ValueError:
            if attempt or python not in _LEGACY:
                break
            _load_legacy_provider()
        else:
            return python
    raise unsupported(f"hash '{name}' is not to be had from this system's OpenSSL")


def _load_legacy_provider() -> None:
    """Let OpenSSL 3 have what it keeps for old data only, as cryptsetup does."""
    try:
        libcrypto = ctypes.CDLL("libcrypto.so.3")  # the one that hashlib has loaded
    except OSError:
        return
    for provider in (b"legacy", b"default"):  # naming one would leave the other out
        libcrypto.OSSL_PROVIDER_load(None, provider)
