# SPDX-License-Identifier: GPL-2.0-or-later
"""Creating qcow2 images, with the options of QAPI's BlockdevCreateOptionsQcow2.

The new image consists of, in this order, header, refcount table, refcount blocks and L1
table, and with preallocation L2 tables and data clusters. The header is written last, behind a
barrier: until then the file is no qcow2 image, and nobody mistakes it for one.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from vhostblk.luks.options import CreateOptions as LuksCreateOptions
from vhostblk.nodes.qcow2.geometry import COPIED
from vhostblk.nodes.qcow2.header import (
    COMPRESSION,
    COMPRESSION_TYPES,
    DATA_FILE,
    DATA_FILE_RAW,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_ENCRYPTION,
    EXT_FEATURE_NAMES,
    EXTENDED_L2,
    LAZY_REFCOUNTS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    Header,
    feature_name_table,
)
from vhostblk.nodes.qcow2.refcounts import pack_counts, unpack_counts
from vhostblk.schema import BlockdevRef, Model, OnOff, Size, UInt32, VhostblkError

_CHUNK = 1 << 20
SECTOR = 512


class Storage(Protocol):
    """The file that becomes an image, or its data file."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write, enlarging the file if need be."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length of the file."""

    async def allocate(self, offset: int, length: int) -> None:
        """Take the space of a range, which reads as zeroes afterwards."""


class Qcow2EncryptOptions(LuksCreateOptions):
    """How the new image is to be encrypted."""

    format: Literal["luks"]
    """The method."""
    key_secret: str
    """Id of the secret object with the passphrase."""


class Qcow2CreateOptions(Model):
    """Options of blockdev-create for driver qcow2."""

    driver: Literal["qcow2"]
    file: BlockdevRef
    """The node to write the image to."""
    size: Size
    """Bytes of the virtual disk; rounded up to a multiple of 512."""
    version: Literal["v2", "v3"] = "v3"
    """The format's version (v2 is compat=0.10, v3 is compat=1.1)."""
    cluster_size: Size = 65536
    """Bytes: a power of two from 512 to 2 MiB."""
    refcount_bits: UInt32 = 16
    """Width of a reference count: a power of two up to 64."""
    backing_file: str | None = None
    """Name of the file below, as it is to stand in the header."""
    backing_fmt: str | None = None
    """Its driver; must be given with backing-file."""
    data_file: BlockdevRef | None = None
    """The node that is to hold the data."""
    data_file_raw: OnOff = False
    """The data file is to be a raw image by itself."""
    extended_l2: OnOff = False
    """L2 entries with 32 subclusters; for clusters of 16 KiB and more."""
    lazy_refcounts: OnOff = False
    """Allow programs to mark the image dirty instead of updating reference counts."""
    compression_type: Literal["zlib", "zstd"] = "zlib"
    """How compressed clusters are compressed."""
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"
    """What is allocated now: tables, space for the data, or written zeroes.

    With data-file-raw the tables are in any case.
    """
    encrypt: Qcow2EncryptOptions | None = None
    """Encrypt the data (QEMU reads version luks1 only)."""


def check(options: Qcow2CreateOptions) -> None:
    """Refuse what cannot be an image, before anything is written."""
    cluster, bits = options.cluster_size, options.refcount_bits
    if not 512 <= cluster <= 2 << 20 or cluster & (cluster - 1):
        raise _error("Cluster size must be a power of two between 512 and 2048k", "cluster-size")
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise _error("Refcount width must be a power of two and may not exceed 64 bits",
                     "refcount-bits")  # fmt: skip
    if options.version == "v2":
        for parameter, wanted in (
            ("refcount-bits", bits != 16),
            ("lazy-refcounts", options.lazy_refcounts),
            ("extended-l2", options.extended_l2),
            ("data-file", options.data_file is not None),
            ("compression-type", options.compression_type != "zlib"),
        ):
            if wanted:
                raise _error(f"'{parameter}' is only supported with version v3", parameter)
    if options.encrypt is not None:
        if options.encrypt.sector_size != SECTOR:
            raise _error(f"sector-size must be {SECTOR} in a qcow2 image", "encrypt.sector-size")
        if options.preallocation != "off":
            raise _error("what is allocated and not written would read as noise, not as zeroes",
                         "preallocation")  # fmt: skip
    if options.extended_l2 and cluster < 16384:
        raise _error("Extended L2 entries are only supported with cluster sizes of at least "
                     "16384 bytes", "extended-l2")  # fmt: skip
    if options.data_file_raw and options.data_file is None:
        raise _error("data-file-raw requires data-file", "data-file-raw")
    if options.backing_file is None:
        if options.backing_fmt is not None:
            raise _error("Backing format cannot be used without backing file", "backing-fmt")
    elif options.backing_fmt is None:
        raise _error("Backing file specified without backing format", "backing-fmt")
    elif options.data_file_raw:
        raise _error("Backing file and data-file-raw cannot be used at the same time",
                     "backing-file")  # fmt: skip
    elif options.preallocation != "off" and not options.extended_l2:
        raise _error("Backing file and preallocation can only be used at the same time if "
                     "extended-l2 is enabled", "preallocation")  # fmt: skip


def _preallocation(options: Qcow2CreateOptions) -> str:
    """As QEMU does: a raw data file is the disk, also where somebody else has written to it."""
    if options.data_file_raw and options.encrypt is None and options.preallocation == "off":
        return "metadata"
    return options.preallocation


@dataclass(frozen=True)
class Layout:
    """Where everything goes: first cluster and count of each part."""

    table: range
    blocks: range
    l1: range
    l2: range
    data: range
    encryption: range
    end: int  # clusters in all


def plan(options: Qcow2CreateOptions, encryption_size: int = 0) -> Layout:
    """The layout, with so many bytes for an encryption header; an error if it is too large."""
    cluster = options.cluster_size
    size = _rounded(options)
    words = 2 if options.extended_l2 else 1
    guest = -(-size // cluster)
    l1_bytes = 8 * -(-guest // (cluster // (8 * words)))
    if l1_bytes > MAX_L1_BYTES:
        raise _error(f"a disk of {size} bytes needs an L1 table of more than {MAX_L1_BYTES} bytes; "
                     "use a larger cluster size", "size")  # fmt: skip
    l1 = -(-l1_bytes // cluster)
    l2 = data = 0
    encryption = -(-encryption_size // cluster)
    if _preallocation(options) != "off":
        l2 = l1_bytes // 8
        data = guest if options.data_file is None else 0
    per_block = cluster * 8 // options.refcount_bits
    table = blocks = 1
    while True:
        total = 1 + table + blocks + l1 + l2 + data + encryption
        needed = -(-total // per_block)
        entries = -(-needed * 8 // cluster)
        if (needed, entries) == (blocks, table):
            break
        blocks, table = max(needed, blocks), max(entries, table)
        if needed < blocks and entries <= table:
            break
    if table * cluster > MAX_REFCOUNT_TABLE_BYTES:
        raise _error(f"a disk of {size} bytes needs too large a refcount table; use a larger "
                     "cluster size", "size")  # fmt: skip
    parts = []
    at = 1
    for count in (table, blocks, l1, l2, data, encryption):
        parts.append(range(at, at + count))
        at += count
    return Layout(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], at)


async def create(
    options: Qcow2CreateOptions,
    file: Storage,
    data_file: Storage | None,
    data_name: str | None,
    encryption: bytes = b"",
) -> None:
    """Write a new image to `file`, whose former contents go.

    `data_name` is what the header says about the data file, `encryption` a LUKS header to put in.
    """
    check(options)
    layout = plan(options, len(encryption))
    cluster = options.cluster_size
    if file.size:
        await file.truncate(0)
    await file.truncate(layout.end * cluster)
    await _write_tables(options, layout, file)
    if encryption:
        await file.write(layout.encryption.start * cluster, encryption)
    if _preallocation(options) != "off":
        await _preallocate(options, layout, file, data_file)
    if data_file is not None:
        await data_file.truncate(_rounded(options))
        await data_file.flush()
    await file.flush()
    await file.write(0, _header(options, layout, data_name).pack())
    await file.flush()


def _header(options: Qcow2CreateOptions, layout: Layout, data_name: str | None) -> Header:
    cluster = options.cluster_size
    size = _rounded(options)
    words = 2 if options.extended_l2 else 1
    guest = -(-size // cluster)
    header = Header(
        version=3 if options.version == "v3" else 2,
        cluster_bits=cluster.bit_length() - 1,
        size=size,
        l1_size=-(-guest // (cluster // (8 * words))),
        l1_table_offset=layout.l1.start * cluster if layout.l1 else 0,
        refcount_table_offset=layout.table.start * cluster,
        refcount_table_clusters=len(layout.table),
        refcount_order=options.refcount_bits.bit_length() - 1,
        crypt_method=2 if options.encrypt is not None else 0,
        compression_type=COMPRESSION_TYPES.index(options.compression_type),
        backing_file=options.backing_file,
    )
    incompatible = 0
    if options.data_file is not None:
        incompatible |= DATA_FILE
    if options.compression_type != "zlib":
        incompatible |= COMPRESSION
    if options.extended_l2:
        incompatible |= EXTENDED_L2
    if options.encrypt is not None:
        place = layout.encryption.start * cluster, len(layout.encryption) * cluster
        header = header.with_extension(EXT_ENCRYPTION, struct.pack(">QQ", *place))
    header = header.replace(
        incompatible=incompatible,
        compatible=LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=DATA_FILE_RAW if options.data_file_raw else 0,
    )
    if options.backing_fmt is not None:
        header = header.with_extension(EXT_BACKING_FORMAT, options.backing_fmt.encode())
    if data_name is not None:
        header = header.with_extension(EXT_DATA_FILE, data_name.encode(errors="surrogateescape"))
    if header.version >= 3:
        named = header.with_extension(EXT_FEATURE_NAMES, feature_name_table())
        # Small clusters have no room for it, and it is optional.
        used = 120 + sum(8 + len(data) + 7 for _, data in named.extensions) + 8
        if used + len((options.backing_file or "").encode()) <= cluster:
            header = named
    return header


async def _write_tables(options: Qcow2CreateOptions, layout: Layout, file: Storage) -> None:
    cluster, bits = options.cluster_size, options.refcount_bits
    table = struct.pack(f">{len(layout.blocks)}Q", *(number * cluster for number in layout.blocks))
    await file.write(layout.table.start * cluster, table)
    per_block = cluster * 8 // bits
    one = unpack_counts(bytes(cluster), bits)
    for number, at in enumerate(layout.blocks):
        used = min(max(layout.end - number * per_block, 0), per_block)
        counts = array(one.typecode, [1]) * used + one[: per_block - used]
        await file.write(at * cluster, pack_counts(counts, bits))


async def _preallocate(
    options: Qcow2CreateOptions, layout: Layout, file: Storage, data_file: Storage | None
) -> None:
    cluster = options.cluster_size
    words = 2 if options.extended_l2 else 1
    guest = -(-_rounded(options) // cluster)
    per_table = cluster // (8 * words)
    l1 = [COPIED | at * cluster for at in layout.l2]
    await file.write(layout.l1.start * cluster, struct.pack(f">{len(l1)}Q", *l1))
    first = layout.data.start if data_file is None else 0
    for number, at in enumerate(layout.l2):
        mapped = range(number * per_table, min((number + 1) * per_table, guest))
        entries: Iterable[int] = (COPIED | (first + index) * cluster for index in mapped)
        if words == 2:  # a place, and no subcluster that is in use
            entries = (word for entry in entries for word in (entry, 0))
        packed = struct.pack(f">{len(mapped) * words}Q", *entries)
        await file.write(at * cluster, packed)
    storage = file if data_file is None else data_file
    start, length = first * cluster, guest * cluster
    if data_file is not None:
        length = _rounded(options)
    if options.preallocation == "falloc":
        await storage.allocate(start, length)
    elif options.preallocation == "full":
        for offset in range(0, length, _CHUNK):
            await storage.write(start + offset, bytes(min(_CHUNK, length - offset)))


def _rounded(options: Qcow2CreateOptions) -> int:
    return -(-options.size // SECTOR) * SECTOR


def _error(text: str, parameter: str) -> VhostblkError:
    return VhostblkError(
        f"Parameter 'options.{parameter}': {text}",
        data={"code": "bad-value", "parameter": parameter},
    )
