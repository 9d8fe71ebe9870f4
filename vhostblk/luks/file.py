# SPDX-License-Identifier: GPL-2.0-or-later
"""A LUKS header in a file or block device at rest.

It is locked against QEMU and vhostblk (the bytes that QEMU uses, vhostblk/nodes/locks.py), and
against cryptsetup, which takes flock() on files before it touches a LUKS2 header.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from vhostblk.fault import fault_point
from vhostblk.nodes.driver import Perm
from vhostblk.nodes.locks import ImageLocks, LockConflict, ofd_locks_work
from vhostblk.schema import VhostblkError


class FileStorage:
    """An open file (a `Storage`)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    async def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            part = os.pread(self._fd, length, offset)
            if not part:
                raise OSError(errno.EIO, "the file has become shorter")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    async def write(self, offset: int, data: bytes) -> None:
        fault_point("luks-write")
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            offset += done
            view = view[done:]

    async def flush(self) -> None:
        fault_point("luks-flush")
        os.fdatasync(self._fd)


@contextmanager
def open_storage(path: str, *, write: bool) -> Iterator[FileStorage]:
    """A file that nobody else writes to meanwhile, nor uses at all if we write."""
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise VhostblkError(
                f"'{path}' is neither a file nor a block device", data={"code": "bad-file"}
            )
        try:
            _lock(fd, write)
        except (LockConflict, BlockingIOError):
            raise VhostblkError(
                f"'{path}' is in use by another process; if that is a running backend, give "
                "the name of its node instead of the file",
                data={"code": "image-locked", "filename": path},
            ) from None
        yield FileStorage(fd)
    finally:
        os.close(fd)


def _lock(fd: int, write: bool) -> None:
    if ofd_locks_work(fd):
        perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if write else Perm.NONE)
        shared = Perm.CONSISTENT_READ  # what is being written does not make sense
        ImageLocks(fd).prepare(perm, shared)
    fcntl.flock(fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
