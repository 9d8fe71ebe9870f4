# SPDX-License-Identifier: GPL-2.0-or-later
"""The header of a qcow2 image: parsed, checked, and written back.

Source: QEMU's docs/interop/qcow2.txt, sections "Header", "Header extensions" and
"Feature name table"; the limits are those of QEMU's block/qcow2.h, so that
whatever is accepted here is accepted there, and memory stays bounded.
All numbers are big-endian. Unknown extensions are kept.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import Any

from vhostblk.schema import VhostblkError

MAGIC = 0x514649FB
V2_LENGTH = 72
V3_LENGTH = 104

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_NAME = 1023

# Incompatible features.
DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION = 1 << 3
EXTENDED_L2 = 1 << 4
_KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
# Compatible features.
LAZY_REFCOUNTS = 1 << 0
# Auto-clear features.
BITMAPS = 1 << 0
DATA_FILE_RAW = 1 << 1

# Header extensions.
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441

COMPRESSION_TYPES = ("zlib", "zstd")

_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


class BadImage(VhostblkError):
    """Not a (correct, known) qcow2 image."""

    def __init__(self, text: str) -> None:
        super().__init__(text, data={"code": "bad-image"})


def feature_name_table() -> bytes:
    """The feature name table that new images get."""
    return b"".join(
        struct.pack(">BB46s", kind, bit, name.encode()) for kind, bit, name in FEATURE_NAMES
    )


@dataclass(frozen=True)
class Header:
    """A header. Offsets and sizes are bytes; immutable, see `replace()`."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    crypt_method: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = 0
    backing_file: str | None = None
    extensions: tuple[tuple[int, bytes], ...] = field(default=())
    unknown_fields: bytes = b""
    """What follows the fields known here, up to header_length."""

    # ---- what it says

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Width of a reference count."""
        return 1 << self.refcount_order

    @property
    def dirty(self) -> bool:
        """Reference counts may be wrong."""
        return bool(self.incompatible & DIRTY)

    @property
    def corrupt(self) -> bool:
        """Nothing may be written but repairs."""
        return bool(self.incompatible & CORRUPT)

    @property
    def has_data_file(self) -> bool:
        """Guest clusters are in a file of their own."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """That file is a raw image by itself."""
        return bool(self.autoclear & DATA_FILE_RAW)

    @property
    def extended_l2(self) -> bool:
        """L2 entries have subclusters."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def lazy_refcounts(self) -> bool:
        """The image may be marked dirty instead of updating reference counts."""
        return bool(self.compatible & LAZY_REFCOUNTS)

    @property
    def compression(self) -> str:
        """`zlib` or `zstd`."""
        return COMPRESSION_TYPES[self.compression_type]

    @property
    def backing_format(self) -> str | None:
        """Format of the backing file, if it is said."""
        return self._text(EXT_BACKING_FORMAT)

    @property
    def data_file(self) -> str | None:
        """Name of the external data file, if it is said."""
        return self._text(EXT_DATA_FILE)

    def extension(self, kind: int) -> bytes | None:
        """The data of a header extension."""
        return next((data for other, data in self.extensions if other == kind), None)

    def _text(self, kind: int) -> str | None:
        data = self.extension(kind)
        return None if data is None else data.rstrip(b"\0").decode(errors="surrogateescape")

    def replace(self, **changes: Any) -> Header:
        """A header that differs in some fields."""
        return replace(self, **changes)

    def with_extension(self, kind: int, data: bytes | None) -> Header:
        """A header with another value of one extension; None removes it."""
        others = tuple(entry for entry in self.extensions if entry[0] != kind)
        return replace(self, extensions=others if data is None else (*others, (kind, data)))

    # ---- parsing

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """From the first bytes of an image (a whole cluster, if there is one)."""
        if len(data) < V2_LENGTH or int.from_bytes(data[:4], "big") != MAGIC:
            raise BadImage("Image is not in qcow2 format")
        (
            _, version, backing_offset, backing_length, cluster_bits, size, crypt_method, l1_size,
            l1_offset, table_offset, table_clusters, nb_snapshots, snapshots_offset,
        ) = _V2.unpack_from(data)  # fmt: skip
        if version not in (2, 3):
            raise BadImage(f"Unsupported qcow2 version {version}")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise BadImage(f"Unsupported cluster size: 2^{cluster_bits}")
        header = cls(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            l1_size=l1_size,
            l1_table_offset=l1_offset,
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            nb_snapshots=nb_snapshots,
            snapshots_offset=snapshots_offset,
            crypt_method=crypt_method,
        )
        length = V2_LENGTH
        if version == 3:
            header, length = header._parse_v3(data)
        end = backing_offset or header.cluster_size
        header = header._parse_extensions(data, length, end)
        if backing_offset:
            header = header._parse_backing(data, backing_offset, backing_length)
        header._check_names()
        header._check_features()
        header._check_limits()
        return header

    def _parse_v3(self, data: bytes) -> tuple[Header, int]:
        if len(data) < V3_LENGTH:
            raise BadImage("qcow2 header is cut off")
        incompatible, compatible, autoclear, order, length = _V3.unpack_from(data, V2_LENGTH)
        if length < V3_LENGTH or length % 8:
            raise BadImage(f"qcow2 header length {length} is not valid")
        if length > self.cluster_size or length > len(data):
            raise BadImage("qcow2 header exceeds cluster size")
        if order > 6:
            raise BadImage("Reference count entry width too large; may not exceed 64 bits")
        rest = data[V3_LENGTH:length]
        compression = rest[0] if rest else 0
        if compression >= len(COMPRESSION_TYPES):
            raise BadImage(f"unknown compression type: {compression}")
        if bool(compression) != bool(incompatible & COMPRESSION):
            raise BadImage("The compression type and its feature bit contradict each other")
        parsed = replace(
            self,
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=order,
            compression_type=compression,
            unknown_fields=rest[8:],
        )
        return parsed, length

    def _parse_extensions(self, data: bytes, offset: int, end: int) -> Header:
        found: list[tuple[int, bytes]] = []
        end = min(end, len(data), self.cluster_size)
        while offset + _EXTENSION.size <= end:
            kind, length = _EXTENSION.unpack_from(data, offset)
            offset += _EXTENSION.size
            if kind == EXT_END:
                break
            if length > end - offset:
                raise BadImage(f"Header extension {kind:#010x} too large")
            found.append((kind, bytes(data[offset : offset + length])))
            offset += -(-length // 8) * 8
        return replace(self, extensions=tuple(found))

    def _parse_backing(self, data: bytes, offset: int, length: int) -> Header:
        if length > MAX_NAME or offset > self.cluster_size or offset + length > self.cluster_size:
            raise BadImage("Backing file name too long")
        if offset + length > len(data):
            raise BadImage("Backing file name is cut off")
        name = data[offset : offset + length].decode(errors="surrogateescape")
        return replace(self, backing_file=name or None)

    def _check_names(self) -> None:
        for what, name in (
            ("Backing file name", self.backing_file),
            ("Backing file format", self.backing_format),
            ("Data file name", self.data_file),
        ):
            if name is not None and "\0" in name:
                raise BadImage(f"{what} contains a null byte")

    def _check_features(self) -> None:
        unknown = self.incompatible & ~_KNOWN_INCOMPATIBLE
        if unknown:
            names = ", ".join(self._feature_name(0, bit) for bit in range(64) if unknown >> bit & 1)
            raise BadImage(f"Unsupported qcow2 feature(s): {names}")
        if self.data_file_raw and not self.has_data_file:
            raise BadImage("data-file-raw is set for an image without an external data file")
        if self.extended_l2 and self.cluster_bits < 14:
            raise BadImage("Extended L2 entries need a cluster size of at least 16 KiB")
        if self.crypt_method > 2:
            raise BadImage(f"Unsupported encryption method {self.crypt_method}")

    def _feature_name(self, kind: int, bit: int) -> str:
        table = self.extension(EXT_FEATURE_NAMES) or b""
        for at in range(0, len(table) - 47, 48):
            if (table[at], table[at + 1]) == (kind, bit):
                return table[at + 2 : at + 48].rstrip(b"\0").decode(errors="replace")
        return f"Unknown incompatible feature: bit {bit}"

    def _check_limits(self) -> None:
        cluster = self.cluster_size
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise BadImage("Active L1 table too large")
        words = 2 if self.extended_l2 else 1
        per_table = cluster * (cluster // (8 * words))
        if self.size > (1 << 63) or -(-self.size // per_table) > self.l1_size:
            raise BadImage("L1 table is too small for the size of the disk")
        if self.refcount_table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES:
            raise BadImage("Reference count table too large")
        if self.refcount_table_clusters == 0:
            raise BadImage("Image does not contain a reference count table")
        if self.nb_snapshots > MAX_SNAPSHOTS:
            raise BadImage("Snapshot table too large")
        for what, offset in (
            ("Reference count table", self.refcount_table_offset),
            ("Active L1 table", self.l1_table_offset),
            ("Snapshot table", self.snapshots_offset if self.nb_snapshots else 0),
        ):
            if offset % cluster or offset >= 1 << 56:
                raise BadImage(f"{what} offset invalid: {offset:#x}")
        if not self.refcount_table_offset or (self.l1_size and not self.l1_table_offset):
            raise BadImage("A table lies on the header")

    # ---- writing

    def pack(self) -> bytes:
        """The first cluster: header, extensions, backing file name, zeroes."""
        name = (self.backing_file or "").encode(errors="surrogateescape")
        fields = b""
        if self.version >= 3:
            fields = bytes([self.compression_type]) + bytes(7) + self.unknown_fields
        length = V2_LENGTH if self.version < 3 else V3_LENGTH + len(fields)
        extensions = b"".join(
            _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in self.extensions
        ) + _EXTENSION.pack(EXT_END, 0)
        offset = length + len(extensions) if name else 0
        if length + len(extensions) + len(name) > self.cluster_size or len(name) > MAX_NAME:
            raise BadImage("The header does not fit into a cluster; is a file name too long?")
        start = _V2.pack(
            MAGIC, self.version, offset, len(name), self.cluster_bits, self.size,
            self.crypt_method, self.l1_size, self.l1_table_offset, self.refcount_table_offset,
            self.refcount_table_clusters, self.nb_snapshots, self.snapshots_offset,
        )  # fmt: skip
        if self.version >= 3:
            start += _V3.pack(
                self.incompatible, self.compatible, self.autoclear, self.refcount_order, length
            )
        packed = start + fields + extensions + name
        return packed + bytes(self.cluster_size - len(packed))
