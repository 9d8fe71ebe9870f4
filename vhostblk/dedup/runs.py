# SPDX-License-Identifier: GPL-2.0-or-later
"""What is side by side on the data device goes there, and comes from there, in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vhostblk.dedup.format import Block


def neighbours(blocks: Iterable[tuple[int, Block]]) -> Iterator[list[tuple[int, Block]]]:
    """Blocks that follow each other on the data device together."""
    run: list[tuple[int, Block]] = []
    for number, block in blocks:
        if run and run[-1][1].offset + run[-1][1].space != block.offset:
            yield run
            run = []
        run.append((number, block))
    if run:
        yield run


def joined(offsets: list[int], contents: list[bytearray]) -> Iterator[tuple[int, bytearray]]:
    """Neighbours as one piece."""
    start, piece = 0, bytearray()
    for offset, content in zip(offsets, contents, strict=True):
        if piece and start + len(piece) == offset:
            piece += content
            continue
        if piece:
            yield start, piece
        start, piece = offset, bytearray(content)
    if piece:
        yield start, piece
