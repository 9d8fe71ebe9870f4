# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of qcow2, with QAPI's names, and what they amount to for one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vhostblk.nodes.driver import NodeOptions
from vhostblk.schema import BlockdevRef, Model, OnOff, Size, StrOrList, UInt64, VhostblkError

SLICE_BYTES = 4096
"""L2 entries are read and written in pieces of this size, unless a table is smaller."""

DEFAULT_L2_CACHE = 32 << 20
MIN_L2_CACHE = 64 << 10
OVERLAP_CHECKS = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)


class Qcow2Encryption(Model):
    """How an image is encrypted."""

    format: Literal["luks"]
    """The method; QEMU's old 'aes' is not supported."""
    key_secret: str
    """Id of the secret object with the passphrase."""


class Qcow2Options(NodeOptions):
    """Options of qcow2."""

    file: BlockdevRef
    """The node that holds the image."""
    backing: BlockdevRef | None = None
    """What the image does not have; null: nothing. What the image itself names if absent."""
    data_file: BlockdevRef | None = None
    """The node that holds the data of an image with an external data file."""
    allow_backing_from: StrOrList | None = None
    """Directories whose files an image may name as its backing or data file; its own if absent."""
    lazy_refcounts: OnOff | None = None
    """Accepted for QEMU's sake: reference counts are always exact after a flush."""
    pass_discard_request: OnOff | None = None
    """Give what the guest discards back to the storage; by default if `discard` is unmap."""
    pass_discard_snapshot: OnOff = True
    """Accepted for QEMU's sake: what a deleted snapshot used is free in the image, and stays."""
    pass_discard_other: OnOff = False
    """Give clusters that became free in another way back to the storage."""
    discard_no_unref: OnOff = False
    """Keep the place in the image of what the guest discards."""
    overlap_check: Literal["none", "constant", "cached", "all"] | dict[str, Any] = "cached"
    """Which structures are protected from writes that a broken image leads there."""
    cache_size: Size | None = None
    """Bytes of L2 tables and reference counts kept in memory, together."""
    l2_cache_size: Size | None = None
    """Bytes of L2 tables kept in memory."""
    l2_cache_entry_size: Size | None = None
    """Bytes of an L2 table that are read at once: a power of two from 512 to the cluster size."""
    refcount_cache_size: Size | None = None
    """Bytes of reference counts kept in memory."""
    cache_clean_interval: UInt64 | None = None
    """Seconds after which L2 tables that nobody used are dropped; 0 for never."""
    encrypt: Qcow2Encryption | None = None
    """The key of an encrypted image."""


@dataclass(frozen=True)
class CacheLimits:
    """How much of the L2 tables is kept."""

    slice_bytes: int
    slices: int


def check(options: Qcow2Options) -> None:
    """Refuse what cannot be meant, before anything is opened."""
    if options.discard_no_unref and options.pass_discard_request is False:
        # QEMU's rule is the same one for lazy readers: nothing would happen at all.
        raise _error(
            "discard-no-unref",
            "discard-no-unref without pass-discard-request would leave discards without effect",
        )
    sizes = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if None not in sizes:
        raise _error(
            "cache-size",
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        )
    total, l2, refcounts = sizes
    if total is not None and l2 is not None and l2 > total:
        raise _error("l2-cache-size", "l2-cache-size may not exceed cache-size")
    if total is not None and refcounts is not None and refcounts > total:
        raise _error("refcount-cache-size", "refcount-cache-size may not exceed cache-size")
    if isinstance(options.overlap_check, dict):
        for name in options.overlap_check:
            if name not in (*OVERLAP_CHECKS, "template"):
                raise _error("overlap-check", f"there is no structure called '{name}'")


def cache_limits(
    options: Qcow2Options, cluster_size: int, refcount_cache: int, *, extended: bool
) -> CacheLimits:
    """The bound on L2 slices; `refcount_cache` bytes of `cache-size` are for others.

    The engine's tables take as much again. With extended L2 entries they take 16 times that, 32
    words for each entry of two, and there are as many slices less.
    """
    entry = options.l2_cache_entry_size
    if entry is None:
        entry = min(SLICE_BYTES, cluster_size)
    elif not 512 <= entry <= cluster_size or entry & (entry - 1):
        raise _error(
            "l2-cache-entry-size",
            f"L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({cluster_size})",
        )
    size = options.l2_cache_size
    if size is None and options.cache_size is not None:
        size = max(0, options.cache_size - refcount_cache)
    if size is None:
        size = DEFAULT_L2_CACHE
    slices = size * 2 // 17 // entry if extended else size // entry
    return CacheLimits(entry, max(slices, MIN_L2_CACHE // entry))


def _error(parameter: str, text: str) -> VhostblkError:
    return VhostblkError(
        f"Parameter '{parameter}': {text}", data={"code": "bad-value", "parameter": parameter}
    )
