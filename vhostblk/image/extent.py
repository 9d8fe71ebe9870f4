# SPDX-License-Identifier: GPL-2.0-or-later
"""Extents: where the data of a range are, as `qemu-img map` tells it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Extent:
    """A range of a disk that is stored in one way. Offsets and lengths are bytes."""

    start: int
    length: int
    depth: int = 0
    """How many backing files below the node asked the data are."""
    present: bool = True
    """Some image of the chain says what is there."""
    zero: bool = False
    """Reads as zeroes."""
    data: bool = True
    """Space is taken for it."""
    compressed: bool = False
    offset: int | None = None
    """Where in the file; None if not in one piece."""
    filename: str | None = None

    def moved(self, by: int, *, depth: int = 0) -> Extent:
        """The same for a parent whose data are `by` bytes further on, or `depth` images above."""
        return replace(self, start=self.start + by, depth=self.depth + depth)

    def part(self, begin: int, end: int) -> Extent:
        """What of it is between two offsets, which are inside."""
        offset = None if self.offset is None else self.offset + begin - self.start
        return replace(self, start=begin, length=end - begin, offset=offset)

    def describe(self) -> dict[str, Any]:
        """As JSON, with the members of `qemu-img map --output=json`."""
        facts: dict[str, Any] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.offset is not None:
            facts["offset"] = self.offset
        if self.filename is not None:
            facts["filename"] = self.filename
        return facts


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """Neighbours of one kind as one extent."""
    result: list[Extent] = []
    for extent in extents:
        if extent.length == 0:
            continue
        if result and _continues(result[-1], extent):
            result[-1] = replace(result[-1], length=result[-1].length + extent.length)
        else:
            result.append(extent)
    return result


def agreed(copies: Sequence[Sequence[Extent]]) -> Iterator[Extent]:
    """What several copies of a range consist of: where one of them has data, there are data."""
    cuts = {at for extents in copies for e in extents for at in (e.start, e.start + e.length)}
    places = [0] * len(copies)
    for begin, end in itertools.pairwise(sorted(cuts)):
        here = []
        for number, extents in enumerate(copies):
            while extents[places[number]].start + extents[places[number]].length <= begin:
                places[number] += 1
            here.append(extents[places[number]])
        yield next((extent for extent in here if not extent.zero), here[0]).part(begin, end)


def _continues(first: Extent, second: Extent) -> bool:
    if first.start + first.length != second.start:
        return False
    expected = None if first.offset is None else first.offset + first.length
    return replace(first, start=second.start, length=second.length, offset=expected) == second
