# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's image locks, so that its tools respect a live image and we respect theirs.

Each permission has two bytes in the image file: 100 + i is locked (shared) by
whoever uses permission i, 200 + i by whoever does not let others use it. Who
wants a permission takes its locks first and then tests for others' locks, so
that of two who start at once at least one sees the other. They are open file
description locks: they belong to the open file, not to the process, and vanish
with it however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct

from vhostblk.nodes.driver import Perm, perm_names

PERM_BASE = 100
SHARED_BASE = 200
_BITS = (Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE)

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class LockConflict(OSError):
    """Somebody else uses the image in a way that excludes ours."""


def _flock(kind: int, start: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0)


def _set(fd: int, kind: int, start: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, start))


def _is_locked_by_others(fd: int, start: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def ofd_locks_work(fd: int) -> bool:
    """Whether the file system and the kernel have them."""
    try:
        _is_locked_by_others(fd, PERM_BASE)
    except OSError:
        return False
    return True


@functools.cache
def _bytes_for(perm: Perm, shared: Perm) -> frozenset[int]:
    wanted = set()
    for i, bit in enumerate(_BITS):
        if perm & bit:
            wanted.add(PERM_BASE + i)
        if not shared & bit:
            wanted.add(SHARED_BASE + i)
    return frozenset(wanted)


class ImageLocks:
    """The locks held on one open file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.perm = Perm.NONE
        self.shared = Perm.ALL
        self._locked: set[int] = set()

    def prepare(self, perm: Perm, shared: Perm) -> None:
        """Take what is needed in addition; raises LockConflict, then nothing has changed."""
        if not (perm & ~self.perm) and not (self.shared & ~shared):
            return  # only unlocking, which commit() does
        try:
            self._apply(self.perm | perm, self.shared & shared, unlock=False)
            self._check(perm, shared)
        except OSError as error:
            self.abort()
            if isinstance(error, LockConflict):
                raise
            if error.errno in (errno.EAGAIN, errno.EACCES):
                # Only somebody with exclusive locks of his own, never QEMU, makes this fail.
                raise LockConflict(error.errno, "The image is locked by another program") from None
            raise

    def commit(self, perm: Perm, shared: Perm) -> None:
        """Hold exactly what `perm` and `shared` need."""
        self.perm, self.shared = perm, shared
        self._apply(perm, shared, unlock=True)

    def abort(self) -> None:
        """Back to what was committed last."""
        self._apply(self.perm, self.shared, unlock=True)

    def _apply(self, perm: Perm, shared: Perm, *, unlock: bool) -> None:
        wanted = _bytes_for(perm, shared)
        if wanted == self._locked:
            return
        for byte in sorted(wanted - self._locked):
            _set(self._fd, fcntl.F_RDLCK, byte)
            self._locked.add(byte)
        if unlock:
            for byte in sorted(self._locked - wanted):
                _set(self._fd, fcntl.F_UNLCK, byte)
                self._locked.discard(byte)

    def _check(self, perm: Perm, shared: Perm) -> None:
        for i, bit in enumerate(_BITS):
            if perm & bit and _is_locked_by_others(self._fd, SHARED_BASE + i):
                raise LockConflict(errno.EAGAIN, f'Failed to get "{perm_names(bit)}" lock')
        for i, bit in enumerate(_BITS):
            if not shared & bit and _is_locked_by_others(self._fd, PERM_BASE + i):
                raise LockConflict(errno.EAGAIN, f'Failed to get shared "{perm_names(bit)}" lock')
