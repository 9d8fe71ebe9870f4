# SPDX-License-Identifier: GPL-2.0-or-later
"""Creating a regular file that is to be an image."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import stat
from typing import Literal

from vhostblk.creating import why_not
from vhostblk.nodes.driver import Perm
from vhostblk.nodes.locks import ImageLocks, LockConflict, ofd_locks_work
from vhostblk.schema import Model, OnOff, Size, VhostblkError

# linux/fs.h: flags of a file; copy-on-write can be turned off for an empty file on btrfs.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_CHUNK = 1 << 20


class FileCreateOptions(Model):
    """Options of blockdev-create for driver file."""

    driver: Literal["file"]
    filename: str
    """Path of the file. One that exists is emptied, unless somebody uses it."""
    size: Size
    """Bytes."""
    preallocation: Literal["off", "falloc", "full"] = "off"
    """Whether to reserve space now (falloc), or to write zeroes (full)."""
    nocow: OnOff = False
    """Turn copy-on-write of the file off, where the file system has that."""
    extent_size_hint: Size = 0
    """Accepted for QEMU's sake."""


def create_file(options: FileCreateOptions, *, exclusive: bool = False) -> None:
    """Create it, on disk when done; may wait. With `exclusive` it must not exist."""
    path = options.filename
    try:
        fd, is_new = _open(path, exclusive=exclusive)
        try:
            _fill(fd, options)
            os.fsync(fd)
        except OSError:
            if is_new:
                os.unlink(path)
            raise
        finally:
            os.close(fd)
        _sync_directory(os.path.dirname(os.path.abspath(path)))
    except LockConflict as error:
        raise _error(
            path, f"{error.strerror}: is another process using it?", "image-locked"
        ) from None
    except OSError as error:
        code = "file-exists" if error.errno == errno.EEXIST else "create-failed"
        raise _error(path, why_not(error, path), code) from None


def _open(path: str, *, exclusive: bool) -> tuple[int, bool]:
    """The file, and whether it has been made just now."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_EXCL, 0o644), True
    except FileExistsError:
        if exclusive:
            raise
    return os.open(path, flags, 0o644), False


def _fill(fd: int, options: FileCreateOptions) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "it exists and is not a regular file")
    if ofd_locks_work(fd):
        # Nobody may be using what is about to be emptied. The locks go with the descriptor.
        ImageLocks(fd).prepare(Perm.WRITE | Perm.RESIZE, Perm.NONE)
    os.ftruncate(fd, 0)
    if options.nocow:
        _turn_cow_off(fd)
    os.ftruncate(fd, options.size)
    if options.preallocation == "falloc" and options.size:
        os.posix_fallocate(fd, 0, options.size)
    elif options.preallocation == "full":
        zeroes = bytes(_CHUNK)
        for offset in range(0, options.size, _CHUNK):
            os.pwrite(fd, zeroes[: options.size - offset], offset)


def _turn_cow_off(fd: int) -> None:
    """An optimisation: what does not work is left."""
    flags = array.array("l", [0])
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        flags[0] |= _FS_NOCOW_FL
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _error(path: str, text: str, code: str) -> VhostblkError:
    return VhostblkError(
        f"Could not create '{path}': {text}", data={"code": code, "filename": path}
    )
