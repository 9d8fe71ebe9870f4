# SPDX-License-Identifier: GPL-2.0-or-later
"""Entries of QED's tables, and what they become in memory.

Facts: QEMU's docs/interop/qed_spec, section "Tables". An entry is 0 (unallocated), 1 (reads as
zeroes; only for data) or the offset of a cluster, little-endian.

In memory the L2 entries are the words of a qcow2 image that shares nothing (geometry.py there),
so that the caches and the data path of that driver serve both formats.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from vhostblk.nodes.qcow2.geometry import COPIED, OFFSET_MASK, ZERO, Geometry

SLICE_BYTES = 4096


@dataclass(frozen=True)
class QedGeometry(Geometry):
    """Sizes of a QED image, whose tables may take many clusters."""

    table_bytes: int = 0

    @property
    def table_entries(self) -> int:
        return self.table_bytes // 8

    @property
    def slices_per_table(self) -> int:
        return self.table_bytes // self.slice_bytes


def geometry(cluster_bits: int, table_bytes: int) -> QedGeometry:
    """The geometry of an image."""
    return QedGeometry(
        cluster_bits=cluster_bits,
        extended=False,
        version=3,
        slice_bytes=SLICE_BYTES,
        external=False,
        table_bytes=table_bytes,
    )


def entries_from(data: bytes) -> array[int]:
    """Little-endian numbers."""
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder != "little":
        words.byteswap()
    return words


def word_of(entry: int) -> int:
    """An entry in memory."""
    if entry <= 1:
        return ZERO if entry else 0
    return entry | COPIED


def entry_of(word: int) -> int:
    """An entry on disk."""
    return word & OFFSET_MASK or (1 if word & ZERO else 0)


def words_of(entries: array[int]) -> array[int]:
    """A slice in memory."""
    if not any(entries):
        return entries
    return array("Q", map(word_of, entries))
