# SPDX-License-Identifier: GPL-2.0-or-later
"""Blocks as they are stored: compressed with zstd, where that saves at least a sector."""

from __future__ import annotations

import zstandard

from vhostblk.dedup.format import SECTOR
from vhostblk.schema import VhostblkError

_LEVEL = 3


def compress(block: memoryview) -> tuple[bytearray, int]:
    """What to store, in whole sectors, and how many bytes of it count; all of them: as it was."""
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(block)
    space = -(-len(packed) // SECTOR) * SECTOR
    if space >= len(block):
        return bytearray(block), len(block)
    return bytearray(packed.ljust(space, b"\0")), len(packed)


def decompress(data: bytes | bytearray, size: int) -> bytes:
    """The block of `size` bytes again."""
    try:
        block = zstandard.ZstdDecompressor().decompress(bytes(data), max_output_size=size)
    except zstandard.ZstdError as error:
        raise VhostblkError(
            f"a compressed block of the dedup store is damaged: {error}", data={"code": "corrupt"}
        ) from None
    if len(block) != size:
        raise VhostblkError(
            f"a compressed block of the dedup store has {len(block)} bytes instead of {size}",
            data={"code": "corrupt"},
        )
    return block
