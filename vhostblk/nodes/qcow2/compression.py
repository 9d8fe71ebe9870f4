# SPDX-License-Identifier: GPL-2.0-or-later
"""Compressed clusters: deflate without a zlib header, or zstd.

Source: docs/interop/qcow2.txt, "Additional fields" (compression_type) and
"Compressed Clusters Descriptor". The descriptor counts whole sectors, so what is
read ends in garbage after the compressed data.
"""

from __future__ import annotations

import errno
import zlib

# QEMU's: window of 4 KiB, which its reader relies on.
_WINDOW_BITS = -12


def decompress(kind: str, data: bytes, size: int) -> bytes:
    """A cluster of `size` bytes; OSError (EIO) if `data` is not one."""
    try:
        if kind == "zstd":
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                result = reader.read(size)
        else:
            result = zlib.decompressobj(-15).decompress(data, size)
    except Exception as error:
        raise OSError(errno.EIO, f"a compressed cluster cannot be decompressed: {error}") from None
    if len(result) != size:
        raise OSError(errno.EIO, f"a compressed cluster has {len(result)} bytes instead of {size}")
    return result


def compress(kind: str, data: bytes) -> bytes | None:
    """Compressed data, or None if that saves nothing."""
    if kind == "zstd":
        import zstandard

        result = zstandard.ZstdCompressor().compress(data)
    else:
        compressor = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS)
        result = compressor.compress(data) + compressor.flush()
    return result if len(result) < len(data) else None
