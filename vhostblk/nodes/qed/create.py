# SPDX-License-Identifier: GPL-2.0-or-later
"""Creating QED images, with the options of QAPI's BlockdevCreateOptionsQed."""

from __future__ import annotations

from typing import Literal, Protocol

from vhostblk.nodes.qed.header import BACKING, LENGTH, MAX_NAME, NO_PROBE, BadImage, Header
from vhostblk.nodes.qed.header import check_sizes as check_header_sizes
from vhostblk.schema import BlockdevRef, Model, Size, UInt32, VhostblkError


class Storage(Protocol):
    """The file that becomes an image."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write, enlarging the file if need be."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length of the file."""


class QedCreateOptions(Model):
    """Options of blockdev-create for driver qed."""

    driver: Literal["qed"]
    file: BlockdevRef
    """The node to write the image to."""
    size: Size
    """Bytes of the virtual disk; rounded up to a multiple of 512."""
    backing_file: str | None = None
    """Name of the file below, as it is to stand in the header."""
    backing_fmt: str | None = None
    """Its driver. The header can only say raw; others are given again when it is opened."""
    cluster_size: Size = 65536
    """Bytes: a power of two from 4096 to 67108864."""
    table_size: UInt32 = 4
    """Clusters of an L1 or L2 table: 2, 4, 8 or 16."""


def plan(options: QedCreateOptions) -> tuple[Header, bytes]:
    """The header and the backing file's name; an error for what cannot be."""
    try:
        check_header_sizes(options.cluster_size, options.table_size)
    except BadImage as error:
        raise _error(error.desc) from None
    if options.table_size == 1:
        # The specification allows it, but qed_check_table_offset() in QEMU's block/qed.h takes
        # it for an overflow: QEMU 10 cannot open such an image, not even its own.
        raise _error("QED tables of one cluster cannot be opened by QEMU; use table-size=2")
    size = -(-options.size // 512) * 512
    name = (options.backing_file or "").encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME:
        raise _error(f"the name of the backing file is longer than {MAX_NAME} bytes")
    if options.backing_fmt is not None and not name:
        raise _error("'backing-fmt' is of no use without 'backing-file'")
    features = BACKING if name else 0
    if options.backing_fmt == "raw":
        features |= NO_PROBE
    header = Header(
        cluster_size=options.cluster_size,
        table_size=options.table_size,
        header_size=1,
        features=features,
        compat=0,
        autoclear=0,
        l1_table_offset=options.cluster_size,
        size=size,
        backing_offset=LENGTH if name else 0,
        backing_size=len(name),
    )
    if header.entries * header.entries * header.cluster_size >= 1 << 64:
        # What qed_max_image_size() in QEMU's block/qed.c computes wraps round: 0 bytes at most.
        raise _error(
            f"QEMU cannot open images with clusters of {options.cluster_size} bytes and tables of "
            f"{options.table_size}; use smaller ones"
        )
    if size > header.max_size:
        raise _error(
            f"a disk of {size} bytes is larger than {header.max_size}, which clusters of "
            f"{options.cluster_size} bytes and tables of {options.table_size} can describe"
        )
    return header, name


async def create(options: QedCreateOptions, file: Storage) -> None:
    """Write an empty image."""
    header, name = plan(options)
    await file.truncate(0)
    await file.truncate(header.l1_table_offset + header.table_bytes)
    # Tables first: a file becomes an image by its header.
    await file.flush()
    start = header.pack() + name
    await file.write(0, start + bytes(-len(start) % 512))
    await file.flush()


def _error(text: str) -> VhostblkError:
    return VhostblkError(text, data={"code": "bad-value"})
