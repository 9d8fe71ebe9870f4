# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads all that a store has, and compares it with its fingerprints."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from vhostblk.dedup.check import Result
from vhostblk.dedup.compression import decompress
from vhostblk.dedup.format import Block
from vhostblk.dedup.futures import in_thread
from vhostblk.dedup.interface import Data
from vhostblk.dedup.runs import neighbours
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.dedup.store import Store

_PORTION = 128 << 10
"""Bytes to have in memory at a time."""


async def check_content(store: Store, data: Data, result: Result) -> None:
    """Compare all that is stored. Guests write meanwhile, and garbage is collected."""
    super = store.super
    numbers = array("Q")
    for segment in range(super.segments(data.size)):
        found = store.tables.places(super.segment_at(segment), super.segment_at(segment + 1))
        numbers.extend(number for _, number in found)
    most = _PORTION >> super.block_bits
    for at in range(0, len(numbers), most):
        with store.reading():
            # What is not there any more has been overwritten meanwhile.
            here = ((number, store.tables.block(number)) for number in numbers[at : at + most])
            for run in neighbours((number, block) for number, block in here if block):
                for number, block in await _wrong_blocks(store, data, run):
                    result.corruptions += 1
                    result.bad.append(number)
                    result.say(f"stored block {number} at {block.offset} has another content")


async def _wrong_blocks(
    store: Store, data: Data, run: list[tuple[int, Block]]
) -> list[tuple[int, Block]]:
    """Those of blocks that follow each other on the data device that are not what they were."""
    start, (_, last) = run[0][1].offset, run[-1]
    try:
        content = memoryview(await data.read(start, last.offset + last.space - start))
    except OSError:
        if len(run) == 1:
            return run
        return [wrong for one in run for wrong in await _wrong_blocks(store, data, [one])]
    return await in_thread(
        lambda: [
            (number, block)
            for number, block in run
            if not _has(store, content[block.offset - start :][: block.length], block)
        ]
    )


def _has(store: Store, content: memoryview, block: Block) -> bool:
    """Whether a stored block has the content that its fingerprint says."""
    if block.length < store.super.block_size:
        try:
            content = memoryview(decompress(bytes(content), store.super.block_size))
        except VhostblkError:
            return False
    return store.hash(content) == block.fingerprint
