# SPDX-License-Identifier: GPL-2.0-or-later
"""The compiled engine without the graph above it: I/O threads, a node, requests by hand.

For tests of engine nodes. A test says which node it wants and gets back the errno (or 0) of each
request, with no option parsing, event loop or driver in between.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vhostblk._engine import ffi, lib

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)
FUA, MAY_UNMAP, GUEST = 1, 2, 4
IO_URING, THREADS = 1, 2
AIO = {"io_uring": IO_URING, "threads": THREADS}


class Memory:
    """Page-aligned memory for requests; `view[skip:]` is as unaligned as a test wants it."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1))
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


@dataclass
class Pending:
    """A request under way; `ret` is None until it has completed."""

    memory: Memory
    skip: int
    length: int
    ret: int | None = None

    @property
    def data(self) -> bytes:
        return bytes(self.memory.view[self.skip : self.skip + self.length])


@dataclass
class BareEngine:
    """An engine with one I/O thread or more. Use as a context manager."""

    aio: int = 0
    threads: int = 1
    threads_max: int = 0
    poll_max_ns: int = 0
    _nodes: list[Any] = field(default_factory=list)
    _pending: dict[int, Pending] = field(default_factory=dict)
    _next: int = 1

    def __post_init__(self) -> None:
        self._error = ffi.new("char[]", lib.VB_ERROR_SIZE)
        self._engine = self._made(lib.vb_engine_new(self._error))
        options = {"aio": self.aio, "threads_max": self.threads_max}
        options["poll_max_ns"] = self.poll_max_ns
        self._threads: list[Any] = []
        try:
            for _ in range(self.threads):
                self._threads.append(self._new_thread(options))
        except OSError:
            self._free_engine()
            raise
        self._events = ffi.new("struct vb_event[64]")

    def _new_thread(self, options: dict[str, int]) -> Any:
        struct = ffi.new("struct vb_iothread_options *", options)
        return self._made(lib.vb_iothread_new(self._engine, b"test", struct, self._error))

    def _free_engine(self) -> None:
        for thread in self._threads:
            lib.vb_iothread_free(thread)
        lib.vb_engine_free(self._engine)

    def _made(self, thing: Any) -> Any:
        if thing == ffi.NULL:
            raise OSError(ffi.string(self._error).decode())
        return thing

    def __enter__(self) -> BareEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wait_all()
        for node in self._nodes:
            lib.vb_node_free(node)
        self._free_engine()

    @property
    def thread(self) -> Any:
        return self._threads[0]

    @property
    def fallback(self) -> str:
        return ffi.string(lib.vb_iothread_fallback_reason(self.thread)).decode()

    @property
    def info(self) -> Any:
        info = ffi.new("struct vb_iothread_info *")
        lib.vb_iothread_query(self.thread, info)
        return info

    def file(self, path: Any, *, flags: int = 0, **options: Any) -> Any:
        """A file node over `path`; options as in struct vb_file_options."""
        options.setdefault("memory_align", 512 if options.get("direct") else 1)
        options.setdefault("request_align", 512 if options.get("direct") else 1)
        flags |= os.O_RDONLY if options.get("read_only") else os.O_RDWR
        flags |= os.O_DIRECT if options.get("direct") else 0
        fd = os.open(path, flags | os.O_CLOEXEC)
        return self.file_of_fd(fd, **options)

    def file_of_fd(self, fd: int, **options: Any) -> Any:
        options = {"fd": fd, "memory_align": 1, "request_align": 1} | options
        struct = ffi.new("struct vb_file_options *", options)
        try:
            node = self._made(lib.vb_node_file_new(self._engine, struct, self._error))
        except OSError:
            os.close(fd)
            raise
        self._nodes.append(node)
        return node

    def start(
        self,
        node: Any,
        op: int,
        offset: int = 0,
        what: bytes | int = 0,
        *,
        flags: int = 0,
        skip: int = 0,
        thread: int = 0,
    ) -> Pending:
        """Start a request: `what` is the data to write, or a length; `skip` unaligns the memory."""
        length = what if isinstance(what, int) else len(what)
        memory = Memory(skip + (length if op <= WRITE else 0))
        pending = Pending(memory, skip, length if op <= WRITE else 0)
        if isinstance(what, bytes):
            memory.view[skip : skip + length] = what
        elif op == READ:
            memory.view[skip : skip + length] = b"\xa5" * length
        command = {
            "kind": lib.VB_COMMAND_SUBMIT,
            "cookie": self._next,
            "node": int(ffi.cast("uintptr_t", node)),
            "thread": int(ffi.cast("uintptr_t", self._threads[thread])),
            "offset": offset,
            "bytes": length,
            "buffer": memory.address,
            "buffer_offset": skip,
            "op": op,
            "flags": flags,
        }
        self._pending[self._next] = pending
        self._next += 1
        lib.vb_engine_submit(self._engine, ffi.new("struct vb_command *", command), 1)
        return pending

    def _collect(self) -> None:
        count = lib.vb_engine_poll(self._engine, self._events, 64, False)
        for event in self._events[0:count]:
            assert event.kind == lib.VB_EVENT_DONE
            self._pending.pop(event.cookie).ret = event.ret

    def wait_for(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._collect()
            if condition():
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._pending)} requests did not complete")
            select.select([lib.vb_engine_event_fd(self._engine)], [], [], 0.1)

    def wait_all(self) -> None:
        self.wait_for(lambda: not self._pending)

    def file_resize(self, node: Any, size: int) -> None:
        """The caller is about to give the file this size."""
        lib.vb_node_file_resize(node, size)

    def run(self, *args: Any, **kwargs: Any) -> int:
        """Start a request and wait for it; 0 or a negative errno."""
        pending = self.start(*args, **kwargs)
        self.wait_for(lambda: pending.ret is not None)
        assert pending.ret is not None
        return pending.ret

    def read(self, node: Any, offset: int, length: int, *, skip: int = 0) -> bytes:
        pending = self.start(node, READ, offset, length, skip=skip)
        self.wait_for(lambda: pending.ret is not None)
        assert pending.ret == 0, os.strerror(-(pending.ret or 0))
        return pending.data
