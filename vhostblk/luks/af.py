# SPDX-License-Identifier: GPL-2.0-or-later
"""The anti-forensic splitter: a key inflated so that all of it is lost with any part.

LUKS1 On-Disk Format Specification 1.2.3, section 2.4. A key is split into `STRIPES` pieces of its
own size. All but the last are random; each step adds (exclusive or) a piece and diffuses the sum
with a hash, and the last piece makes the end of it the key. Wiping a single sector wipes the key.
"""

from __future__ import annotations

import os

from vhostblk.luks.hashes import begun, digest_size
from vhostblk.secret import SecretBytes
from vhostblk.secret.memory import Buffer, wipe

STRIPES = 4000  # the specification has no other


def split(key: Buffer, hash: str) -> bytearray:
    """The key, inflated; the caller wipes it."""
    size = len(key)
    pieces = bytearray(os.urandom(size * (STRIPES - 1)))
    sum = _sum(pieces, size, STRIPES - 1, hash)
    # Byte by byte: of the key itself nothing must be left behind in numbers of Python's.
    pieces += bytes(size)
    last = memoryview(pieces)[-size:]
    for at in range(size):
        last[at] = sum[at] ^ key[at]
    wipe(sum)
    return pieces


def merge(pieces: bytearray, size: int, hash: str) -> SecretBytes:
    """The key again."""
    sum = _sum(pieces, size, STRIPES - 1, hash)
    last = memoryview(pieces)[(STRIPES - 1) * size : STRIPES * size]
    key = SecretBytes(size)
    view = key.view()
    for at in range(size):
        view[at] = sum[at] ^ last[at]
    wipe(sum)
    return key


def _sum(pieces: bytearray, size: int, count: int, hash: str) -> bytearray:
    width = digest_size(hash)
    view = memoryview(pieces)
    sum, mixed = bytearray(size), bytearray(size)
    # Diffuse: the hash of its number and itself replaces each block; the last may be short.
    blocks = [
        (begun(hash, number.to_bytes(4, "big")).copy, slice(at, min(at + width, size)))
        for number, at in enumerate(range(0, size, width))
    ]
    # Thousands of times for each key slot that is tried: what a loop can do without counts.
    for at in range(0, count * size, size):
        mixed[:] = _xor(sum, view[at : at + size])
        for copy, block in blocks:
            state = copy()
            state.update(mixed[block])
            sum[block] = state.digest()[: block.stop - block.start]
    wipe(mixed)
    return sum


def _xor(left: Buffer, right: Buffer) -> bytes:
    number = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return number.to_bytes(len(left), "little")
