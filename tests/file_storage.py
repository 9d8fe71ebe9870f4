# SPDX-License-Identifier: GPL-2.0-or-later
"""An image at rest, for the format's modules: a file by its name, without an engine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_CHUNK = 1 << 20


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


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
