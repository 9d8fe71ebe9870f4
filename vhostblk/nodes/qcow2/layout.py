# SPDX-License-Identifier: GPL-2.0-or-later
"""What the format modules ask of the file that holds an image, and such a file without an engine.

The same code works on a live image, through its `file` child (storage.py), and on an image at
rest, through `FileStorage`: tests and the command line use that. Reads beyond the end give
zeroes; writes beyond it make the file longer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Any, Protocol

from vhostblk.nodes.qcow2.header import BadImage, Header

SECTOR = 512
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_CHUNK = 1 << 20

# Offsets in the header ("Header"). Everything that an operation commits with lies between 24
# and 104, in one sector: one write exchanges all of it or nothing.
_FIELDS = {
    "size": (24, ">Q"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
}


class Storage(Protocol):
    """The file that holds an image."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes; zeroes beyond the end."""

    async def write(self, offset: int, data: bytes) -> None:
        """Write, enlarging the file if need be."""

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length of the file."""

    async def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeroes afterwards, and need not take any space."""


class FileStorage:
    """A file by its name. The coroutines never wait for anything but the disk."""

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False) -> None:
        self.path = os.fspath(path)
        self.writable = writable
        flags = os.O_RDWR if writable else os.O_RDONLY
        # Not to wait for the other end of a named pipe, which is refused below.
        self._fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        kind = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            os.close(self._fd)
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", self.path)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> FileStorage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The open file, for locks."""
        return self._fd

    @property
    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    async def read(self, offset: int, length: int) -> bytes:
        there = max(0, min(length, self.size - offset))
        if offset + there > 1 << 63:
            raise OSError(errno.EINVAL, f"offset {offset:#x} is too large")
        parts = []
        left = there
        while left:
            part = os.pread(self._fd, min(left, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data if len(data) == length else data + bytes(length - len(data))

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view = view[done:]
            offset += done

    async def flush(self) -> None:
        os.fdatasync(self._fd)

    async def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    async def write_zeroes(self, offset: int, length: int) -> None:
        with contextlib.suppress(OSError):
            await self.discard(offset, length)
            if self.size < offset + length:
                await self.truncate(offset + length)
            return
        for at in range(offset, offset + length, _CHUNK):
            await self.write(at, bytes(min(_CHUNK, offset + length - at)))

    async def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back; it reads as zeroes."""
        _fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)

    async def allocate(self, offset: int, length: int) -> None:
        """Take the space of a range, whose contents stay."""
        if length:
            os.posix_fallocate(self._fd, offset, length)

    def lock_probe(self, start: int, length: int = 1) -> bool:
        """Whether somebody else holds a lock on these bytes (QEMU's are 100… and 200…)."""
        probe = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        with contextlib.suppress(OSError):
            answer = fcntl.fcntl(self._fd, _F_OFD_GETLK, probe)
            return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
        return False


_F_OFD_GETLK = 36


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def words_of(data: bytes | bytearray | memoryview) -> array[int]:
    """Big-endian 64-bit numbers."""
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def bytes_of(words: array[int]) -> bytes:
    """The same back."""
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()


async def read_header(storage: Storage) -> Header:
    """Header of the image in `storage`."""
    # The extensions may take a whole cluster; its size is at byte 20.
    start = await storage.read(0, min(SECTOR, storage.size))
    bits = int.from_bytes(start[20:24], "big")
    length = 1 << bits if SECTOR <= 1 << min(bits, 30) <= 1 << 21 else SECTOR
    header = Header.parse(await storage.read(0, min(max(length, SECTOR), storage.size)))
    end = storage.size
    for what, offset in (
        ("Reference count table", header.refcount_table_offset),
        ("Active L1 table", header.l1_table_offset if header.l1_size else 0),
        ("Snapshot table", header.snapshots_offset if header.nb_snapshots else 0),
    ):
        if offset >= end:
            raise BadImage(f"{what} ({offset:#x}) is outside the image file ({end} bytes)")
    return header


async def patch_header(storage: Storage, header: Header, **changes: int) -> Header:
    """Change numbers in the header with a single write, which is atomic; sets no barrier."""
    end = 104 if header.version >= 3 else 72
    raw = bytearray(await storage.read(0, end))
    for name, value in changes.items():
        at, form = _FIELDS[name]
        if at >= end:
            raise BadImage(f"version {header.version} of the format has no field {name}")
        struct.pack_into(form, raw, at, value)
    await storage.write(24, bytes(raw[24:]))
    given: dict[str, Any] = dict(changes)
    return header.replace(**given)


def clusters_of(header: Header, offset: int, length: int) -> range:
    """The clusters that a range of the file touches."""
    if length <= 0:
        return range(0)
    return range(offset >> header.cluster_bits, (offset + length - 1 >> header.cluster_bits) + 1)


def compressed_range(cluster_bits: int, word: int) -> tuple[int, int]:
    """Where a compressed cluster is: offset, bytes ("Compressed Clusters Descriptor")."""
    shift = 62 - (cluster_bits - 8)
    offset = word & ((1 << shift) - 1)
    sectors = ((word & ((1 << 62) - 1)) >> shift) + 1
    return offset, sectors * SECTOR - (offset & (SECTOR - 1))


def entry_words(header: Header) -> int:
    """64-bit words of an L2 entry."""
    return 2 if header.extended_l2 else 1


def nonzero(words: array[int]) -> Iterator[tuple[int, int]]:
    """Index and value of words that are not zero."""
    return ((index, word) for index, word in enumerate(words) if word)
