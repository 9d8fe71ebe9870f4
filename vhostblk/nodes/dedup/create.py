# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-create for dedup: an empty store, with a first disk if wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vhostblk.dedup.format import BLOCK_BITS, SEGMENT_BITS, Superblock
from vhostblk.dedup.interface import Data, Tuning
from vhostblk.dedup.store import Store
from vhostblk.schema import BlockdevRef, Model, Size, VhostblkError


class DedupCreateOptions(Model):
    """Options of blockdev-create for driver dedup."""

    driver: Literal["dedup"]
    file: BlockdevRef
    """The node that will hold the blocks; what is there is lost."""
    metadata: str
    """The directory for the metadata, on a fast device; made if it is not there."""
    block_size: Size = 16 << 10
    """Bytes that are compared and stored as one: a power of two from 4 KiB to 64 KiB."""
    segment_size: Size = 4 << 20
    """Bytes that are given back as one: a power of two from 256 KiB to 256 MiB."""
    hash: Literal["blake3", "sha256"] = "blake3"
    """What tells content apart."""
    disk: str = "disk"
    """Name of the first disk."""
    size: Size | None = None
    """Its size; without one the store has no disk yet."""


async def create(options: DedupCreateOptions, data: Data) -> None:
    """Create what the options describe."""
    _check("block-size", options.block_size, BLOCK_BITS)
    _check("segment-size", options.segment_size, SEGMENT_BITS)
    super = Superblock(
        options.block_size.bit_length() - 1,
        options.segment_size.bit_length() - 1,
        options.hash,
        os.urandom(16),
    )
    directory = Path(options.metadata)
    await Store.create(directory, data, super)
    if options.size is not None:
        store = Store(directory, Tuning())
        await store.open(data)
        try:
            store.set_disk(options.disk, -(-options.size // 512) * 512)
        finally:
            await store.close(data)


def _check(name: str, value: int, bits: range) -> None:
    if value not in (1 << number for number in bits):
        raise VhostblkError(
            f"Parameter '{name}': {value} is not a power of two from {1 << bits[0]} to "
            f"{1 << bits[-1]}",
            data={"code": "bad-value", "parameter": name},
        )
