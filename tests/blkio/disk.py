# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk behind a vhost-user socket, as libblkio sees it.

`Disk` connects and maps memory; each `Queue` may be used by one thread, with several requests in
flight. Nothing here waits for ever: a request that does not complete is an error.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blkio.library import FUA, NO_UNMAP, ffi, libc, library

DRIVER = b"virtio-blk-vhost-user"
PATIENCE = 20.0  # seconds, on a machine that does many other things


class DiskError(OSError):
    """libblkio or the backend refused something."""


class Op(enum.Enum):
    """What a request does."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    DISCARD = "discard"
    WRITE_ZEROES = "write-zeroes"


@dataclass(eq=False)
class Request:
    """One request. `ret` is None until it has completed, then 0 or a negative errno."""

    op: Op
    offset: int = 0
    length: int = 0
    data: bytes = b""
    """What was to be written; after a completed read, what was read."""
    ret: int | None = None
    _slot: int | None = field(default=None, repr=False)
    _iovec: Any = field(default=None, repr=False)

    @property
    def end(self) -> int:
        return self.offset + self.length

    def overlaps(self, other: Request) -> bool:
        return self.offset < other.end and other.offset < self.end

    def checked(self) -> Request:
        """Itself, if it succeeded."""
        assert self.ret is not None, f"{self.op.value} at {self.offset} has not completed"
        if self.ret != 0:
            raise DiskError(-self.ret, f"{self.op.value}: {os.strerror(-self.ret)}")
        return self


class Queue:
    """A virtqueue with memory of its own, for one thread."""

    def __init__(self, pointer: Any, memory: int, slots: int, slot_size: int) -> None:
        self._queue = pointer
        self._memory = memory
        self._free = list(range(slots))
        self.slot_size = slot_size
        self.flying: dict[int, Request] = {}
        self._next = 1
        self._done = ffi.new("struct blkio_completion[]", 64)

    @property
    def room(self) -> int:
        """How many more reads or writes may be in flight."""
        return len(self._free)

    def read(self, offset: int, length: int, *, split: Sequence[int] = ()) -> Request:
        """Start a read; `split` cuts its memory into an iovec with these lengths."""
        return self._start(Request(Op.READ, offset, length), split=split)

    def write(
        self, offset: int, data: bytes, *, split: Sequence[int] = (), fua: bool = False
    ) -> Request:
        """Start a write."""
        request = Request(Op.WRITE, offset, len(data), data)
        return self._start(request, split=split, flags=FUA if fua else 0)

    def flush(self) -> Request:
        """Start a flush."""
        return self._start(Request(Op.FLUSH))

    def discard(self, offset: int, length: int) -> Request:
        """Start a discard."""
        return self._start(Request(Op.DISCARD, offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> Request:
        """Start a write of zeroes, which may deallocate unless told otherwise."""
        return self._start(Request(Op.WRITE_ZEROES, offset, length), flags=0 if unmap else NO_UNMAP)

    def _start(self, request: Request, *, split: Sequence[int] = (), flags: int = 0) -> Request:
        lib, key = library(), self._next
        self._next += 1
        user = ffi.cast("void *", key)
        if request.op in (Op.READ, Op.WRITE):
            assert request.length <= self.slot_size, "more than a slot of memory"
            request._slot = self._free.pop()
            base = self._memory + request._slot * self.slot_size
            buffer = ffi.buffer(ffi.cast("void *", base), request.length)
            buffer[:] = request.data if request.op is Op.WRITE else b"\xa5" * request.length
            lengths = list(split) or [request.length]
            assert sum(lengths) == request.length
            iovec = request._iovec = ffi.new("struct iovec[]", len(lengths))
            for entry, length in zip(iovec, lengths, strict=True):
                entry.iov_base, entry.iov_len = ffi.cast("void *", base), length
                base += length
            start = lib.blkioq_readv if request.op is Op.READ else lib.blkioq_writev
            start(self._queue, request.offset, iovec, len(lengths), user, flags)
        elif request.op is Op.FLUSH:
            lib.blkioq_flush(self._queue, user, flags)
        elif request.op is Op.DISCARD:
            lib.blkioq_discard(self._queue, request.offset, request.length, user, flags)
        else:
            lib.blkioq_write_zeroes(self._queue, request.offset, request.length, user, flags)
        self.flying[key] = request
        return request

    def wait(self, count: int = 1, *, seconds: float = PATIENCE) -> list[Request]:
        """Submit what is waiting, wait for at least `count` completions."""
        limit = ffi.new("struct timespec *", (int(seconds), int(seconds % 1 * 1e9)))
        at_most = max(min(len(self._done), len(self.flying)), count)
        got = library().blkioq_do_io(self._queue, self._done, count, at_most, limit)
        if got < 0:
            what = [f"{r.op.value} at {r.offset:#x}+{r.length:#x}" for r in self.flying.values()]
            text = f"{os.strerror(-got)} with {len(what)} in flight: {', '.join(what[:4])}"
            raise (TimeoutError if got == -errno.ETIME else DiskError)(-got, text)
        finished = []
        for completion in self._done[0:got]:
            request = self.flying.pop(int(ffi.cast("uintptr_t", completion.user_data)))
            request.ret = completion.ret
            if request._slot is not None:
                if request.op is Op.READ:
                    base = ffi.cast("void *", self._memory + request._slot * self.slot_size)
                    request.data = bytes(ffi.buffer(base, request.length))
                self._free.append(request._slot)
                request._slot = request._iovec = None
            finished.append(request)
        return finished

    def submit(self) -> None:
        """Make the backend see what was started; completions stay for `wait()`."""
        got = library().blkioq_do_io(self._queue, ffi.NULL, 0, 0, ffi.NULL)
        if got < 0:
            raise DiskError(-got, os.strerror(-got))

    def drain(self, *, seconds: float = PATIENCE) -> list[Request]:
        """Wait for everything in flight."""
        finished = []
        while self.flying:
            finished += self.wait(1, seconds=seconds)
        return finished

    def run(self, request: Request) -> Request:
        """Wait until `request` has completed; OSError if it failed."""
        while request.ret is None:
            self.wait(1)
        return request.checked()


class Disk:
    """A connection. Use as a context manager."""

    def __init__(
        self,
        path: Path | str,
        *,
        queues: int = 1,
        slots: int = 32,
        slot_size: int = 256 << 10,
        queue_size: int | None = None,
        poll: bool = False,
        read_only: bool = False,
    ) -> None:
        self._lib = library()
        pointer = ffi.new("struct blkio **")
        self._check(self._lib.blkio_create(DRIVER, pointer), "create")
        self._pointer, self._disk = pointer, pointer[0]
        self._region: Any = None
        try:
            self.set("path", str(path))
            self.set("read-only", str(read_only).lower())
            self._check(self._lib.blkio_connect(self._disk), f"connect to {path}")
            self.set("num-queues", "0" if poll else str(queues))
            self.set("num-poll-queues", str(queues) if poll else "0")
            if queue_size is not None:
                self.set("queue-size", str(queue_size))
            self._check(self._lib.blkio_start(self._disk), "start")
            per_queue = -(-slots * slot_size // 0x200000) * 0x200000
            region = ffi.new("struct blkio_mem_region *")
            self._check(
                self._lib.blkio_alloc_mem_region(self._disk, region, per_queue * queues), "memory"
            )
            self._region = region
            self._check(self._lib.blkio_map_mem_region(self._disk, region), "memory")
            get = self._lib.blkio_get_poll_queue if poll else self._lib.blkio_get_queue
            memory = int(ffi.cast("uintptr_t", region.addr))
            self.queues = [
                Queue(get(self._disk, index), memory + index * per_queue, slots, slot_size)
                for index in range(queues)
            ]
        except BaseException:
            self.close()
            raise

    def _check(self, ret: int, what: str) -> None:
        if ret < 0:
            text = bytes(ffi.string(self._lib.blkio_get_error_msg())).decode(errors="replace")
            raise DiskError(-ret, f"{what}: {text}")

    def get(self, name: str) -> str:
        """A property of libblkio."""
        value = ffi.new("char **")
        self._check(self._lib.blkio_get_str(self._disk, name.encode(), value), name)
        try:
            return bytes(ffi.string(value[0])).decode()
        finally:
            libc().free(value[0])

    def set(self, name: str, value: str) -> None:
        """Set a property of libblkio."""
        self._check(self._lib.blkio_set_str(self._disk, name.encode(), value.encode()), name)

    @property
    def capacity(self) -> int:
        """Size in bytes, as the backend says."""
        return int(self.get("capacity"))

    def close(self) -> None:
        """Disconnect, whatever is in flight."""
        if self._pointer is not None:
            self._lib.blkio_destroy(self._pointer)
            self._pointer = self._disk = None
            self.queues = []

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # One request at a time, of any length.

    def read(self, offset: int, length: int, *, queue: int = 0) -> bytes:
        """Read, in as many requests as it takes."""
        q, parts = self.queues[queue], []
        for at in range(offset, offset + length, q.slot_size):
            part = min(q.slot_size, offset + length - at)
            parts.append(q.run(q.read(at, part)).data)
        return b"".join(parts)

    def write(self, offset: int, data: bytes, *, queue: int = 0) -> None:
        """Write, in as many requests as it takes."""
        q = self.queues[queue]
        for at in range(0, len(data), q.slot_size):
            q.run(q.write(offset + at, data[at : at + q.slot_size]))

    def flush(self) -> None:
        self.queues[0].run(self.queues[0].flush())

    def discard(self, offset: int, length: int) -> None:
        self.queues[0].run(self.queues[0].discard(offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.queues[0].run(self.queues[0].write_zeroes(offset, length, unmap=unmap))
