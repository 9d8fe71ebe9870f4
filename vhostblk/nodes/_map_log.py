# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of a map, in memory that outlives the process but not the machine.

A format driver keeps its tables in memory and writes them when the guest flushes. A guest survives
the death of its backend, though, and does not know that it happened: a write that it has been
told is complete must be there when the next backend starts, flushed or not. With a plain file
the page cache sees to that. For a format, this log does: each change of a table is a record in a
file on tmpfs that the engine writes through a mapping (struct vb_map_log in
cffi_build/engine/nodes/map.api.h).

* kill -9: the next `open_log()` finds the records, and the driver enters them in its tables.
* power cut: tmpfs is empty, or the boot is another one, and the image is as the last flush left it.
* another program has written to the image meanwhile: the driver can tell (`token`), and the
  records are dropped.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from vhostblk.nodes import _stale_logs

logger = logging.getLogger(__name__)

RECORDS = 65536  # 4 GiB of new 64 KiB clusters between two flushes
_HEADER = struct.Struct("=6QQQ")
_TOKEN_AT = 32
_DEVICE_AT = 8
_RECORD = struct.Struct("=4Q")
_ATTEMPTS = 50
_MAGIC = 0x76626C6F67000001  # "vblog", version 1
_PYTHON = 1
_DIRECTORIES = ("/run", "/dev/shm")


@dataclass(frozen=True)
class Record:
    """A change that is not on disk."""

    guest: int
    """Guest offset, bytes."""
    entry: int
    """What the engine put into the map, or with `python` whatever the driver has put here."""
    extra: int
    python: bool


class LogFile:
    """Memory for the log of one image (engine.MapLog)."""

    def __init__(self, path: Path, fd: int, memory: mmap.mmap) -> None:
        self.path = path
        self._fd = fd
        self._memory = memory
        self._anchor = ctypes.c_char.from_buffer(memory)
        self.address = ctypes.addressof(self._anchor)
        self.records = RECORDS
        self._retired = False

    def pending(self) -> list[Record]:
        """What whoever had the log before has not put on disk, in order."""
        words = _HEADER.unpack_from(self._memory, 0)
        head, tail = words[6], words[7]
        found = []
        for number in range(tail, min(head, tail + RECORDS)):
            at = _HEADER.size + number % RECORDS * _RECORD.size
            written, guest, entry, extra = _RECORD.unpack_from(self._memory, at)
            if written == number + 1:  # else it was being written, and its request had not ended
                found.append(Record(guest & ~_PYTHON, entry, extra, bool(guest & _PYTHON)))
        return found

    def clear(self) -> None:
        """All of it is on disk."""
        head = _HEADER.unpack_from(self._memory, 0)[6]
        struct.pack_into("=Q", self._memory, _HEADER.size - 8, head)

    def belongs_to(self, token: bytes) -> None:
        """The image has another token now. Nothing is in the log."""
        struct.pack_into("=2Q", self._memory, _TOKEN_AT, *_digest(token))

    def retire(self) -> None:
        """The image needs it no more, but the engine still has it: give the memory back."""
        self.path.unlink(missing_ok=True)
        self._retired = True  # what has this name from here on is somebody else's
        self._memory.madvise(mmap.MADV_REMOVE, mmap.PAGESIZE)

    def close(self, *, remove: bool) -> None:
        """Give it back; `remove` it if the image needs it no more."""
        if remove and not self._retired:
            self.path.unlink(missing_ok=True)
        del self._anchor
        self._memory.close()
        os.close(self._fd)


def open_log(image: str, token: bytes, *, fresh: bool) -> LogFile | None:
    """The log of the image with this name. `token` tells its present state from all others.

    `fresh`: the image says that nothing is missing, whatever a log may contain. None, with a
    warning, where there is no place for a log: unflushed writes then do not survive a kill.
    """
    try:
        file = os.open(image, os.O_PATH | os.O_CLOEXEC)
        try:
            status, owner = os.fstat(file), _stale_logs.owner_of(file, image)
        finally:
            os.close(file)
        identity = struct.pack(
            "=6Q", _MAGIC, status.st_dev, status.st_ino, RECORDS, *_digest(token)
        )
        name = f"{os.major(status.st_dev)}.{os.minor(status.st_dev)}.{status.st_ino}.log"
        directory = _directory()
        path = directory / name
        fd = _locked(path)
    except OSError as error:
        logger.warning("no log for an image: %s; unflushed writes do not survive kill -9", error)
        return None
    try:
        size = _HEADER.size + RECORDS * _RECORD.size
        known = os.pread(fd, len(identity), 0) == identity
        if not known:
            os.ftruncate(fd, 0)  # of another image, or new: zeroes, without touching the pages
        # All of it now: a full tmpfs must not be SIGBUS in the middle of a guest's write.
        os.posix_fallocate(fd, 0, size + _stale_logs.SIZE)
        os.pwrite(fd, owner, size)
        if not known:
            os.pwrite(fd, identity, 0)
        memory = mmap.mmap(fd, size)
    except OSError as error:
        os.close(fd)
        logger.warning("no log for an image: %s; unflushed writes do not survive kill -9", error)
        return None
    log = LogFile(path, fd, memory)
    if fresh:
        log.clear()
    _stale_logs.remove_stale(directory, _DEVICE_AT, status.st_dev, image)
    return log


def _locked(path: Path) -> int:
    """Open a log that nobody else has; the descriptor."""
    for attempt in range(_ATTEMPTS):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # Others may have it for a moment, to remove it (_stale_logs.py).
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
        except FileNotFoundError:
            pass
        except OSError:
            if attempt == _ATTEMPTS - 1:
                os.close(fd)
                raise
        os.close(fd)
        time.sleep(0.01)
    raise OSError(errno.EBUSY, f"'{path}' is in use")


def _directory() -> Path:
    """A private directory on a tmpfs."""
    given = os.environ.get("VHOSTBLK_LOG_DIR")
    # The runtime directory of a user goes when he logs out: it comes last.
    candidates = [given] if given else [*_DIRECTORIES, os.environ.get("XDG_RUNTIME_DIR")]
    for candidate in candidates:
        if not candidate or not os.access(candidate, os.W_OK | os.X_OK):
            continue
        if not given and not _is_tmpfs(candidate):
            continue
        path = Path(candidate) / f"vhostblk-logs-{os.geteuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            return path
    raise OSError(errno.ENOENT, "there is no writable directory on a tmpfs")


def _is_tmpfs(path: str) -> bool:
    """Whether what is stored there goes with the machine (tmpfs, from /proc/self/mounts)."""
    device = os.stat(path).st_dev
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split()
            major, minor = map(int, fields[2].split(":"))
            if os.makedev(major, minor) == device:
                return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False


def _digest(token: bytes) -> tuple[int, int]:
    """Tells this state of an image, in this boot of the machine, from all others."""
    first, second = struct.unpack("=QQ", hashlib.sha256(_boot_id() + token).digest()[:16])
    return first, second


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes()
