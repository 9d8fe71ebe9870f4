# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs of images that are no more (nodes/_map_log.py) give their memory back.

A killed backend leaves the log of each of its images behind, for the next one. If the image is
deleted instead, nobody comes for it. A log therefore says at its end whose it is: the file's
handle (name_to_handle_at(2)), which stays the same when the file is renamed and is never given to
another one, and its name. Who opens a log removes those of images on the same file system whose
handle leads nowhere (ESTALE) and whose name leads elsewhere. In any doubt a log stays: asking for
a handle needs CAP_DAC_READ_SEARCH, and not every file system has handles.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import struct
from pathlib import Path

logger = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_HANDLE_BYTES = 128  # MAX_HANDLE_SZ
_HANDLE = struct.Struct(f"=Ii{_HANDLE_BYTES}s")  # struct file_handle
_OWNER = struct.Struct(f"={_HANDLE.size}sI4096s")
SIZE = _OWNER.size
"""Bytes at the end of a log that say whose it is."""


def owner_of(image: int, path: str) -> bytes:
    """What the log of an image (a descriptor of it, and its name) has at its end."""
    handle = ctypes.create_string_buffer(_HANDLE.pack(_HANDLE_BYTES, 0, b""), _HANDLE.size)
    mount = ctypes.c_int()
    name = os.fsencode(os.path.abspath(path))
    if len(name) > 4096 or _libc.name_to_handle_at(
        image, b"", handle, ctypes.byref(mount), _AT_EMPTY_PATH
    ):
        return bytes(SIZE)  # nobody's: it stays until it is used, or the machine goes down
    return _OWNER.pack(handle.raw, len(name), name)


def remove_stale(directory: Path, header: int, device: int, near: str) -> None:
    """Remove logs in `directory` whose images were on `device`, like the file `near`, and are gone.

    `header`: where in a log device and inode of its image are, two numbers of eight bytes.
    """
    with contextlib.suppress(OSError):
        mount = os.open(os.path.dirname(os.path.abspath(near)), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(mount).st_dev != device:
                return
            for path in directory.glob("*.log"):
                with contextlib.suppress(OSError):
                    _look_at(path, header, device, mount)
        finally:
            os.close(mount)


def _look_at(path: Path, header: int, device: int, mount: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _is_stale(fd, header, device, mount):
            # Only now: whoever needs a log must not find it locked.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_stale(fd, header, device, mount):
                path.unlink()
                logger.info("removed the log of an image that is gone: %s", path)
    finally:
        os.close(fd)


def _is_stale(fd: int, header: int, device: int, mount: int) -> bool:
    image = os.pread(fd, 16, header)
    end = os.fstat(fd).st_size - SIZE
    owner = os.pread(fd, SIZE, end) if end > header else b""
    if len(image) != 16 or len(owner) != SIZE:
        return False  # somebody is just making it
    of_device, inode = struct.unpack("=QQ", image)
    if of_device != device:
        return False
    handle, length, name = _OWNER.unpack(owner)
    if not length:
        return False
    with contextlib.suppress(OSError):
        status = os.stat(name[:length])
        if (status.st_dev, status.st_ino) == (device, inode):
            return False
    found = _libc.open_by_handle_at(mount, handle, os.O_PATH | os.O_CLOEXEC)
    if found >= 0:
        os.close(found)
        return False
    return ctypes.get_errno() == errno.ESTALE
