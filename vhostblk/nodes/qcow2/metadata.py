# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the metadata of a live image are, so that neither reads nor new clusters get there.

A table may have millions of entries, all of them lies. They are kept as the numbers that they
are, sorted (8 bytes each), and searched.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection

from vhostblk.engine.map import sorted_numbers
from vhostblk.nodes.qcow2.geometry import OFFSET_MASK


class Metadata:
    """Clusters in which no guest data can be, by their offsets in the file."""

    def __init__(self) -> None:
        self._ranges: dict[int, int] = {}  # from, to
        self._clusters = array("Q")

    async def find(self, l1: array[int], refcount_table: array[int]) -> None:
        """L2 tables and blocks of reference counts, a cluster each."""
        entries = l1[:]
        entries.extend(refcount_table)
        self._clusters = await sorted_numbers(entries, OFFSET_MASK)

    def add(self, start: int, length: int) -> None:
        """A table in a row."""
        self._ranges[start] = max(start + length, self._ranges.get(start, 0))

    def remove(self, start: int) -> None:
        """It is not there any more."""
        self._ranges.pop(start, None)

    def __contains__(self, host: int) -> bool:
        return self.first(host, 1) is not None

    def first(self, host: int, length: int) -> int | None:
        """The first cluster with metadata that begins in a range, or has the start of it."""
        places = [max(start, host) for start, end in self._ranges.items()
                  if start < host + length and end > host]  # fmt: skip
        at = bisect_left(self._clusters, host)
        if at < len(self._clusters) and self._clusters[at] < host + length:
            places.append(self._clusters[at])
        return min(places, default=None)

    def among(self, hosts: Collection[int]) -> set[int]:
        """Those of `hosts` that are here."""
        if not hosts:
            return set()
        first, last = min(hosts), max(hosts)
        near = bisect_right(self._clusters, last) - bisect_left(self._clusters, first)
        if not near and all(end <= first or start > last for start, end in self._ranges.items()):
            return set()
        return {host for host in hosts if host in self}
