# SPDX-License-Identifier: GPL-2.0-or-later
"""file and host_device: a regular file, or a block device.

Opening decides everything slow (permissions, alignment, size); after that the
engine half (cffi_build/engine/nodes/file.c) works on the descriptor alone. A
duplicate of it stays here for the image locks and for resizing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vhostblk.engine.file import FileHandle, can_punch, new_file
from vhostblk.image import Extent
from vhostblk.nodes._create_file import FileCreateOptions, create_file
from vhostblk.nodes.driver import DETECT_ZEROES, CreateHost, NodeDriver, NodeOptions, Perm
from vhostblk.nodes.locks import ImageLocks, LockConflict, ofd_locks_work
from vhostblk.schema import Model, OnOff, UInt32, VhostblkError

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_ALIGNMENTS = (1, 512, 1024, 2048, 4096)
SECTOR = 512


class FileOptions(NodeOptions):
    """Options of file and host_device."""

    filename: str
    """Path of the file or block device."""
    aio: Literal["threads", "native", "io_uring"] = "threads"
    """Accepted for QEMU's sake: I/O threads decide how I/O is done; query-iothreads says how."""
    aio_max_batch: UInt32 = 0
    """Accepted for QEMU's sake."""
    locking: Literal["auto", "on", "off"] = "auto"
    """Whether to take QEMU's image locks."""
    drop_cache: OnOff = True
    """Accepted for QEMU's sake."""


@dataclass(frozen=True)
class _Opened:
    """What opening found out."""

    fd: int
    read_only: bool
    size: int
    memory_align: int
    request_align: int
    discard_granularity: int | None


class File(NodeDriver):
    """A regular file."""

    driver = "file"
    Options = FileOptions
    CreateOptions: ClassVar[type[Model] | None] = FileCreateOptions
    reopenable = NodeDriver.reopenable - {"force-share"} | {"aio", "aio-max-batch", "drop-cache"}
    options: FileOptions
    detects_zeroes = True
    _wants_block_device = False

    @classmethod
    async def create(cls, host: CreateHost, options: FileCreateOptions) -> None:
        await asyncio.to_thread(create_file, options)

    async def open(self) -> None:
        self._check_options(self.options)
        opened = await asyncio.to_thread(self._open_file, self.options, self.options.filename)
        self._read_only = opened.read_only
        self._discard_granularity = opened.discard_granularity
        self._size = opened.size
        self._fd = _duplicate(opened.fd)
        self._lock_fd = _duplicate(opened.fd)
        try:
            self._locks = self._make_locks()
            self.handle = self._make_half(self.options, opened)
        except BaseException:
            for fd in (opened.fd, self._fd, self._lock_fd):
                os.close(fd)
            raise

    def _make_half(self, options: FileOptions, opened: _Opened) -> FileHandle:
        return new_file(
            self.engine,
            opened.fd,
            read_only=opened.read_only,
            direct=options.cache.direct,
            no_flush=options.cache.no_flush,
            discard_unmap=options.discard == "unmap",
            detect_zeroes=DETECT_ZEROES[options.detect_zeroes],
            memory_align=opened.memory_align,
            request_align=opened.request_align,
        )

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        end = offset + length
        while offset < end:
            stop, data = await asyncio.to_thread(self._next_extent, offset, end)
            yield Extent(
                offset,
                stop - offset,
                zero=not data,
                data=data,
                offset=offset,
                filename=self.options.filename,
            )
            offset = stop

    def _next_extent(self, offset: int, end: int) -> tuple[int, bool]:
        """How far the data, or the hole, at `offset` go (lseek(2), SEEK_DATA and SEEK_HOLE)."""
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            if start > offset:
                return min(start, end), False
            return min(os.lseek(self._fd, offset, os.SEEK_HOLE), end), True
        except OSError as error:
            # ENXIO: a hole up to the end. Else the file system cannot tell: data.
            return end, error.errno != errno.ENXIO

    async def close(self) -> None:
        await super().close()
        for fd in (self._fd, self._lock_fd):  # the locks go with the second one
            # It is closed whatever this says, and what was lost a flush has told (close(2), NOTES).
            with contextlib.suppress(OSError):
                os.close(fd)

    async def reopen_prepare(self, options: FileOptions) -> None:
        await super().reopen_prepare(options)
        self._check_options(options)
        # The same file, whatever has become of its name. The locks stay on the first descriptor.
        same = f"/proc/self/fd/{self._lock_fd}"
        opened = await asyncio.to_thread(self._open_file, options, same)
        try:
            fd = _duplicate(opened.fd)
            try:
                handle = self._make_half(options, opened)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            os.close(opened.fd)
            raise
        self.prepared.update(
            handle=handle,
            _fd=fd,
            _read_only=opened.read_only,
            _discard_granularity=opened.discard_granularity,
        )

    async def reopen_dispose(self, attributes: dict[str, Any]) -> None:
        await super().reopen_dispose(attributes)
        os.close(attributes["_fd"])

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def discard_granularity(self) -> int | None:
        return self._discard_granularity

    def filename(self) -> str:
        return self.options.filename

    def state_options(self) -> dict[str, Any]:
        options = super().state_options()
        return {**options, "filename": os.path.abspath(self.options.filename)}

    def allocated(self) -> int | None:
        return os.fstat(self._fd).st_blocks * 512

    # ---- opening

    def _check_options(self, options: FileOptions) -> None:
        if options.aio == "native" and not options.cache.direct:
            raise VhostblkError(
                "Parameter 'aio': aio=native was specified, but it requires cache.direct=on, "
                "which was not specified",
                data={"code": "bad-value", "parameter": "aio"},
            )
        if options.force_share and not options.read_only:
            raise VhostblkError(
                "Parameter 'force-share': force-share=on can only be used with read-only images",
                data={"code": "bad-value", "parameter": "force-share"},
            )

    def _open_file(self, options: FileOptions, path: str) -> _Opened:
        """Everything that may wait for a disk; runs in a thread."""
        read_only = options.read_only
        direct = options.cache.direct
        try:
            fd = self._open_fd(path, read_only, direct)
        except OSError as error:
            if not (options.auto_read_only and not read_only) or error.errno not in (
                errno.EACCES,
                errno.EPERM,
                errno.EROFS,
            ):
                raise self._open_error(error, options) from None
            read_only = True
            try:
                fd = self._open_fd(path, True, direct)
            except OSError as second:
                raise self._open_error(second, options) from None
        try:
            size = self._probe_size(fd)
            memory_align, request_align = self._probe_alignment(fd, direct)
            granularity = None
            if options.discard == "unmap" and not read_only:
                granularity = self._probe_granularity(fd, request_align)
        except BaseException:
            os.close(fd)
            raise
        return _Opened(fd, read_only, size, memory_align, request_align, granularity)

    def _open_fd(self, path: str, read_only: bool, direct: bool) -> int:
        # Never wait for a FIFO's other end; has no effect on files and disks.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
        if direct:
            flags |= os.O_DIRECT
        fd = os.open(path, flags)
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        return fd

    def _probe_size(self, fd: int) -> int:
        mode = os.fstat(fd).st_mode
        path = self.options.filename
        if stat.S_ISBLK(mode):
            if not self._wants_block_device:
                raise self._error(
                    f"'file' driver requires '{path}' to be a regular file",
                    "it is a block device: use driver 'host_device'",
                )
            answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
            return int(struct.unpack("=Q", answer)[0])
        if self._wants_block_device:
            raise self._error(
                f"'host_device' driver requires '{path}' to be a block device",
                "for a regular file use driver 'file'" if stat.S_ISREG(mode) else None,
            )
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
            raise self._error(f"'file' driver requires '{path}' to be a regular file, not {kind}")
        # A guest's disk consists of whole sectors; a read beyond the end gives zeroes.
        return -(-os.fstat(fd).st_size // SECTOR) * SECTOR

    def _probe_alignment(self, fd: int, direct: bool) -> tuple[int, int]:
        """What O_DIRECT asks of memory, and of offset and length."""
        if not direct:
            return 1, 1
        request = 1
        if self._wants_block_device:
            answer = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
            request = int(struct.unpack("=i", answer)[0])
        page = mmap.mmap(-1, 2 * _ALIGNMENTS[-1])
        try:
            with memoryview(page) as view:
                if request == 1:
                    request = _first_that_works(
                        _ALIGNMENTS, lambda align: os.preadv(fd, [view[:align]], 0)
                    )
                memory = _first_that_works(
                    _ALIGNMENTS,
                    lambda align: os.preadv(fd, [view[align : align + max(request, 512)]], 0),
                )
        finally:
            page.close()
        # Where even 1 works (tmpfs, a hole) nothing has been learnt.
        request = _block_of_disk_below(fd) if request == 1 else request
        return request if memory == 1 else max(memory, SECTOR), request

    def _probe_granularity(self, fd: int, request_align: int) -> int | None:
        """Of holes that can be made; None where zeroes would have to be written instead."""
        if not self._wants_block_device:
            return request_align if can_punch(fd) else None
        device = os.fstat(fd).st_rdev
        for limit in ("discard_max_bytes", "write_zeroes_max_bytes"):  # 0: it cannot
            if not _queue_value(device, limit):
                return None
        answer = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
        return int(struct.unpack("=i", answer)[0])

    def _make_locks(self) -> ImageLocks | None:
        mode = self.options.locking
        if mode == "off" or self.options.force_share:
            return None
        if not ofd_locks_work(self._lock_fd):
            if mode == "auto":
                return None
            raise self._error(
                f"Image locks cannot be taken on '{self.options.filename}' (locking=on)",
                "its file system does not support them; locking=off does without",
            )
        return ImageLocks(self._lock_fd)

    # ---- permissions

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        if self._locks is None:
            return
        try:
            self._locks.prepare(perm, shared)
        except LockConflict as error:
            raise VhostblkError(
                f"{error.strerror}: is another process using the image [{self.options.filename}]?",
                data={
                    "code": "image-locked",
                    "node": self.name,
                    "filename": self.options.filename,
                    "hint": "stop the other process, or use read-only=on,force-share=on to look "
                    "at an image that may be changing",
                },
            ) from None
        except OSError as error:
            raise self._error(
                f"Failed to lock '{self.options.filename}': {error.strerror}",
                "locking=off does without locks",
            ) from None

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        if self._locks is not None:
            self._locks.commit(perm, shared)

    def abort_permissions(self) -> None:
        if self._locks is not None:
            self._locks.abort()

    # ---- changes

    grows_in_use = True

    async def truncate(self, size: int) -> None:
        if self.read_only:
            raise VhostblkError(
                f"Block node '{self.name}' is read-only",
                data={"code": "read-only", "node": self.name},
            )
        if self._wants_block_device:
            actual = await asyncio.to_thread(self._probe_size, self._fd)
            if size > actual:
                raise self._error(
                    f"Cannot grow device files: '{self.options.filename}' has {actual} bytes"
                )
            # As QEMU does: whoever enlarged the device tells us to look again.
            self._size = actual
            return
        if isinstance(self.handle, FileHandle):
            self.handle.resize(size)
        try:
            await asyncio.to_thread(os.ftruncate, self._fd, size)
        except OSError as error:
            raise self._error(
                f"Failed to resize '{self.options.filename}' to {size} bytes: {error.strerror}"
            ) from None
        if isinstance(self.handle, FileHandle):
            self.handle.grown(size)
        self._size = -(-size // SECTOR) * SECTOR

    # ---- errors

    def _open_error(self, error: OSError, options: FileOptions) -> VhostblkError:
        path = options.filename
        hint: str | None = None
        if error.errno == errno.ENOENT:
            directory = os.path.dirname(path) or "."
            if not os.path.isdir(directory):
                hint = f"the directory '{directory}' does not exist"
            else:
                hint = "is its file system mounted? 'vhostblk create' makes a new image"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "check its mode and owner, or use read-only=on or auto-read-only=on"
            if options.read_only:
                hint = "check the mode and owner of the file and of the directories above it"
        elif error.errno == errno.EINVAL and options.cache.direct:
            hint = "its file system does not support O_DIRECT: use cache.direct=off"
        elif error.errno in (errno.ENXIO, errno.ENODEV):
            hint = "it is not a file or a disk"
        elif error.errno == errno.EBUSY:
            hint = "it is in use, perhaps mounted"
        return self._error(f"Could not open '{path}': {error.strerror}", hint)

    def _error(self, text: str, hint: str | None = None) -> VhostblkError:
        data: dict[str, Any] = {
            "code": "file-error",
            "node": self.name,
            "filename": self.options.filename,
        }
        if hint is not None:
            data["hint"] = hint
            text = f"{text}; {hint}"
        return VhostblkError(text, data=data)


class HostDevice(File):
    """A block device of the host."""

    driver = "host_device"
    CreateOptions = None
    _wants_block_device = True


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _block_of_disk_below(fd: int) -> int:
    """Its logical block, if the kernel knows; a sector, of which nothing is ever smaller."""
    return _queue_value(os.fstat(fd).st_dev, "logical_block_size") or SECTOR


def _queue_value(device: int, name: str) -> int | None:
    """What the kernel says of a disk, or of the disk that a partition is on."""
    disk = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{disk}/queue", f"{disk}/../queue"):
        with contextlib.suppress(OSError), open(f"{queue}/{name}") as file:
            return int(file.read())
    return None


def _first_that_works(alignments: tuple[int, ...], attempt: Any) -> int:
    """The smallest alignment that the kernel accepts."""
    for alignment in alignments:
        try:
            attempt(alignment)
        except OSError as error:
            if error.errno != errno.EINVAL:
                return alignment  # it is not the alignment that is wrong
            continue
        return alignment
    return alignments[-1]
