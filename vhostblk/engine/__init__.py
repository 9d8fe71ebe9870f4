# SPDX-License-Identifier: GPL-2.0-or-later
"""The compiled engine as Python sees it: the only package that imports `vhostblk._engine`.

Thin, typed handles on the C objects, and the bridge between the engine's
messages and asyncio; the modules next to this one each know one kind of node.
Everything here runs on the control thread, the one that runs the event loop;
nothing here waits.

Events come in batches: one call fetches up to `EVENT_BATCH` of them and one
`struct` object unpacks them all. Commands leave in batches too: what is asked
for during one callback of the event loop goes to the engine in one call.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import logging
import os
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from vhostblk._engine import ffi, lib

logger = logging.getLogger(__name__)

OP_READ: int = lib.VB_OP_READ
OP_WRITE: int = lib.VB_OP_WRITE
OP_FLUSH: int = lib.VB_OP_FLUSH
OP_DISCARD: int = lib.VB_OP_DISCARD
OP_WRITE_ZEROES: int = lib.VB_OP_WRITE_ZEROES
OP_NAMES = ("read", "write", "flush", "discard", "write-zeroes")

REQ_FUA: int = lib.VB_REQ_FUA
REQ_GUEST: int = lib.VB_REQ_GUEST
REQ_MAY_UNMAP: int = lib.VB_REQ_MAY_UNMAP
REQ_LITERAL: int = lib.VB_REQ_LITERAL

MAX_CHILDREN: int = lib.VB_MAX_CHILDREN
SERIAL_SIZE: int = lib.VB_SERIAL_SIZE

EVENT_BATCH = 256
COMMAND_BATCH = 512
DRAIN_TURNS = 16

_EVENT = struct.Struct("=IiQQQQQIHHQ")
_COMMAND = struct.Struct("=IiQQQQQQQQHHI")
_COMPLETE = struct.Struct("=IiQ")  # the members that VB_COMMAND_COMPLETE looks at
_FORWARD_CHILD = struct.Struct("=I")
_EVENT_SIZE = _EVENT.size
_COMMAND_SIZE = _COMMAND.size
_FORWARD_CHILD_AT = _COMMAND_SIZE - _FORWARD_CHILD.size

# A layout that has changed in C and not here would corrupt memory.
if _EVENT.size != ffi.sizeof("struct vb_event") or _COMMAND.size != ffi.sizeof("struct vb_command"):
    raise ImportError("vhostblk._engine does not belong to this vhostblk; build it again")

_EVENT_UPCALL: int = lib.VB_EVENT_UPCALL
_EVENT_DONE: int = lib.VB_EVENT_DONE
_EVENT_PAUSED: int = lib.VB_EVENT_PAUSED
_EVENT_CONNECTED: int = lib.VB_EVENT_CONNECTED
_EVENT_DISCONNECTED: int = lib.VB_EVENT_DISCONNECTED
_EVENT_WRITEBACK: int = lib.VB_EVENT_WRITEBACK
_EVENT_DRAINING: int = lib.VB_EVENT_DRAINING
_EVENT_UNRECORDED: int = lib.VB_EVENT_UNRECORDED
_EVENT_NODE: int = lib.VB_EVENT_NODE
_COMMAND_COMPLETE: int = lib.VB_COMMAND_COMPLETE
_COMMAND_FORWARD: int = lib.VB_COMMAND_FORWARD
_COMMAND_SUBMIT: int = lib.VB_COMMAND_SUBMIT
_COMMAND_RETRY: int = lib.VB_COMMAND_RETRY

Buffer = bytes | bytearray | memoryview

NodeSink = Callable[[int, int, int, int, int], None]
"""Takes what an engine node tells (VB_EVENT_NODE): request, ret, op, offset, bytes of the event."""

UpcallSink = Callable[[int, int, int, int, int, int, int], None]
"""Takes an upcall: request handle, operation, flags, offset, bytes, iovec address, iovec count."""


class EngineError(OSError):
    """The engine could not make something; the text says what and why."""


class Aio(IntEnum):
    """How an I/O thread does file I/O."""

    AUTO = lib.VB_AIO_AUTO
    IO_URING = lib.VB_AIO_IO_URING
    THREADS = lib.VB_AIO_THREADS


AIO_NAMES = {Aio.AUTO: "auto", Aio.IO_URING: "io_uring", Aio.THREADS: "threads"}


def build_libvhost_user() -> str:
    """Version and checksum of the libvhost-user sources compiled in."""
    return _text(lib.vb_build_libvhost_user())


def _text(pointer: Any) -> str:
    return bytes(ffi.string(pointer)).decode(errors="replace")


def _pointer(address: int) -> Any:
    return ffi.cast("void *", address)


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def guest_buffers(iov: int, niov: int) -> list[Any]:
    """The parts of guest memory in an iovec array, as buffer objects (no copy)."""
    words = struct.unpack(f"={2 * niov}Q", ffi.buffer(_pointer(iov), 16 * niov))
    return [
        ffi.buffer(_pointer(base), length)
        for base, length in zip(words[::2], words[1::2], strict=True)
    ]


# ---- statistics -------------------------------------------------------------------


@functools.cache
def histogram_floors() -> tuple[int, ...]:
    """Where each bucket of a latency histogram starts, in nanoseconds."""
    return tuple(lib.vb_histogram_floor(i) for i in range(lib.VB_HISTOGRAM_BUCKETS))


@dataclass(frozen=True)
class OpStats:
    """What one kind of operation amounts to so far; `invalid` are those refused unstarted."""

    ops: int
    errors: int
    bytes: int
    total_ns: int
    invalid: int
    histogram: tuple[int, ...]

    @property
    def mean_ns(self) -> int:
        """Average latency; 0 if nothing was done."""
        return self.total_ns // self.ops if self.ops else 0

    def percentile(self, percent: float) -> int:
        """The latency that `percent` of the operations stayed below (within 13 %)."""
        total = sum(self.histogram)
        if total == 0:
            return 0
        wanted = total * percent / 100
        seen = 0
        floors = histogram_floors()
        for bucket, count in enumerate(self.histogram):
            if count and seen + count >= wanted:
                low = floors[bucket]
                high = floors[bucket + 1] if bucket + 1 < len(floors) else low + low // 8
                return low + int((high - low) * (wanted - seen) / count)
            seen += count
        return floors[-1]

    def buckets(self) -> list[tuple[int, int]]:
        """The buckets that are not empty: start in nanoseconds, count."""
        floors = histogram_floors()
        return [(floors[i], count) for i, count in enumerate(self.histogram) if count]


@dataclass(frozen=True)
class Stats:
    """Counters of a node or an export, one entry for each operation."""

    read: OpStats
    write: OpStats
    flush: OpStats
    discard: OpStats
    write_zeroes: OpStats


def _stats(raw: Any) -> Stats:
    # Five operations, each five counters and the histogram: all are uint64.
    size = 5 + int(lib.VB_HISTOGRAM_BUCKETS)
    values = struct.unpack(f"={5 * size}Q", ffi.buffer(raw))
    rows = [values[i * size : (i + 1) * size] for i in range(5)]
    return Stats(*(OpStats(r[0], r[1], r[2], r[3], r[4], r[5:]) for r in rows))


@dataclass(frozen=True)
class IOThreadInfo:
    """An I/O thread as it is now."""

    thread_id: int
    aio: Aio
    poll_ns: int
    loops: int
    sleeps: int
    requests: int
    notifies: int
    inline_ios: int
    mapped_ios: int
    queued_ios: int
    shared_requests: int


@dataclass(frozen=True)
class ExportInfo:
    """An export as it is now."""

    connected: bool
    writeback: bool
    features: int
    protocol_features: int
    queues_started: int
    memory_regions: int
    inflight: int
    resubmitted: int
    connections: int
    broken: int
    unsupported: int


# ---- requests of Python's own -------------------------------------------------------


class IOOwner(Protocol):
    """Who keeps count of its requests."""

    def io_done(self) -> None:
        """One has completed."""


class IO:
    """An I/O request that Python started: await it for the result.

    Behaves as an asyncio future, so that it can be awaited in a task and given
    to `asyncio.gather()`; but it also works in a coroutine that is driven by
    hand, without any task. It cannot be cancelled: the engine may be writing to
    its memory.
    """

    __slots__ = (
        "__weakref__",
        "_asyncio_future_blocking",
        "_callbacks",
        "_keep",
        "_loop",
        "_ret",
        "_value",
        "finished",
        "node",
        "owner",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, node: int, value: Any, keep: Any) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._ret: int | None = None
        self._value = value
        self._keep = keep
        self._callbacks: list[tuple[Callable[[Any], object], Context | None]] | None = None
        # Called at once, before anything else is; set by who drives a coroutine by hand.
        self.finished: Callable[[], None] | None = None
        # Who must not be let go before this has completed.
        self.owner: IOOwner | None = None
        self.node = node

    def complete(self, ret: int) -> None:
        """Called by the engine."""
        self._ret = ret
        self._keep = None
        if self.owner is not None:
            self.owner.io_done()
        callbacks, self._callbacks = self._callbacks, None
        if callbacks:
            for callback, context in callbacks:
                self._loop.call_soon(callback, self, context=context)
        if self.finished is not None:
            self.finished()

    # An iterator, as await wants it; cheaper than a generator.

    def __await__(self) -> Generator[Any, None, Any]:
        return self  # type: ignore[return-value]

    def __iter__(self) -> IO:
        return self

    def __next__(self) -> IO:
        ret = self._ret
        if ret is None:
            self._asyncio_future_blocking = True
            return self
        if ret < 0:
            raise OSError(-ret, os.strerror(-ret))
        raise StopIteration(self._value)

    # What asyncio expects of a future.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def done(self) -> bool:
        return self._ret is not None

    def cancel(self, msg: object = None) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def exception(self) -> OSError | None:
        if self._ret is None:
            raise asyncio.InvalidStateError("the request has not completed")
        return OSError(-self._ret, os.strerror(-self._ret)) if self._ret < 0 else None

    def result(self) -> Any:
        error = self.exception()
        if error is not None:
            raise error
        return self._value

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        if self._ret is not None:
            self._loop.call_soon(callback, self, context=context)
        elif self._callbacks is None:
            self._callbacks = [(callback, context)]
        else:
            self._callbacks.append((callback, context))

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        before = self._callbacks or []
        kept = [entry for entry in before if entry[0] != callback]
        self._callbacks = kept
        return len(before) - len(kept)


async def finish(io: Awaitable[Any], patience: float | None) -> None:
    """Wait for a request, but not for ever: TimeoutError, and it goes on without us.

    `patience` is in seconds; None: for ever.
    """
    waiting = asyncio.ensure_future(_wait_for(io))
    done, _ = await asyncio.wait({waiting}, timeout=patience)
    if not done:
        waiting.add_done_callback(asyncio.Task.exception)  # nobody is there to be told
        raise TimeoutError
    waiting.result()


async def _wait_for(io: Awaitable[Any]) -> None:
    await io


# ---- handles ---------------------------------------------------------------------------


class NodeHandle:
    """A node of the engine."""

    def __init__(self, engine: Engine, pointer: Any) -> None:
        self._engine = engine
        self.pointer = pointer
        self.address = _address(pointer)
        self._children: dict[int, NodeHandle] = {}

    def set_child(self, index: int, child: NodeHandle) -> None:
        """Only while every export that reaches this node is paused."""
        if self._children.get(index) is not child:
            lib.vb_node_set_child(self.pointer, index, child.pointer)
            self._children[index] = child

    def stats(self) -> Stats:
        """Its counters."""
        raw = ffi.new("struct vb_stats *")
        lib.vb_node_stats(self.pointer, raw)
        return _stats(raw)

    def free(self) -> None:
        """Nothing reaches it any more."""
        lib.vb_node_free(self.pointer)
        self.pointer = ffi.NULL
        self.address = 0
        self._children.clear()


class UpcallHandle(NodeHandle):
    """A node whose requests, those in its mask, come to Python."""

    def __init__(
        self, engine: Engine, pointer: Any, cookie: int, operations: Sequence[str]
    ) -> None:
        super().__init__(engine, pointer)
        self._cookie = cookie
        self.operations = operations
        """Names of those in the mask."""

    def free(self) -> None:
        """No request is on its way up or down."""
        self._engine.forget(self._cookie)
        super().free()


class IOThread:
    """A thread of the engine that serves virtqueues and does I/O."""

    def __init__(self, engine: Engine, pointer: Any, name: str) -> None:
        self._engine = engine
        self.pointer = pointer
        self.address = _address(pointer)
        self.name = name

    def info(self) -> IOThreadInfo:
        """Its counters."""
        raw = ffi.new("struct vb_iothread_info *")
        lib.vb_iothread_query(self.pointer, raw)
        return IOThreadInfo(
            raw.thread_id,
            Aio(raw.aio),
            raw.poll_ns,
            raw.loops,
            raw.sleeps,
            raw.requests,
            raw.notifies,
            raw.inline_ios,
            raw.mapped_ios,
            raw.queued_ios,
            raw.shared_requests,
        )

    @property
    def fallback_reason(self) -> str:
        """Why io_uring is not used although it was preferred; "" if it is."""
        return _text(lib.vb_iothread_fallback_reason(self.pointer))

    def set_poll(self, max_ns: int, grow: int, shrink: int) -> None:
        """Change the bounds of busy waiting, at once."""
        lib.vb_iothread_set_poll(self.pointer, max_ns, grow, shrink)

    def free(self) -> None:
        """No export uses it; waits for the thread to end."""
        self._engine.forget_iothread(self)
        lib.vb_iothread_free(self.pointer)
        self.pointer = ffi.NULL


class ExportHandle:
    """A vhost-user-blk device of the engine, connected or not."""

    def __init__(self, engine: Engine, pointer: Any, cookie: int) -> None:
        self._engine = engine
        self._cookie = cookie
        self._pausing: deque[asyncio.Future[None]] = deque()
        self.pointer = pointer
        self.on_connected: Callable[[], None] | None = None
        self.on_disconnected: Callable[[int, str], None] | None = None
        self.on_writeback: Callable[[bool], None] | None = None
        # The front-end waits for requests in flight (True), and no longer (False).
        self.on_draining: Callable[[bool], None] | None = None
        # A queue's requests in flight cannot be recorded for a successor.
        self.on_unrecorded: Callable[[int], None] | None = None

    def set_root(self, node: NodeHandle) -> None:
        """The tree below; only before the first connection, or paused."""
        lib.vb_export_set_root(self.pointer, node.pointer)

    def connect(self, sock: int) -> None:
        """Hand over the socket of a front-end; the engine closes it."""
        error = self._engine.error
        result = lib.vb_export_connect(self.pointer, sock, error)
        if result < 0:
            raise EngineError(-result, _text(error))

    def disconnect(self) -> None:
        """Ask for the connection to end; `on_disconnected` is called when it has."""
        lib.vb_export_disconnect(self.pointer)

    def pause(self) -> asyncio.Future[None]:
        """Stop popping requests; the future is done when none is in flight."""
        future = self._engine.loop.create_future()
        self._pausing.append(future)
        lib.vb_export_pause(self.pointer)
        return future

    def resume(self) -> None:
        """Undo one pause() that has taken effect."""
        lib.vb_export_resume(self.pointer)

    def set_capacity(self, capacity: int) -> None:
        """New size; a connected guest is told."""
        lib.vb_export_set_capacity(self.pointer, capacity)

    def info(self) -> ExportInfo:
        """Its state."""
        raw = ffi.new("struct vb_export_info *")
        lib.vb_export_query(self.pointer, raw)
        return ExportInfo(
            raw.connected,
            raw.writeback,
            raw.features,
            raw.protocol_features,
            raw.queues_started,
            raw.memory_regions,
            raw.inflight,
            raw.resubmitted,
            raw.connections,
            raw.broken,
            raw.unsupported,
        )

    def stats(self) -> Stats:
        """Its counters."""
        raw = ffi.new("struct vb_stats *")
        lib.vb_export_stats(self.pointer, raw)
        return _stats(raw)

    def free(self) -> None:
        """Disconnected and not paused."""
        self._engine.forget_export(self._cookie)
        lib.vb_export_free(self.pointer)
        self.pointer = ffi.NULL

    def event(self, kind: int, ret: int) -> None:
        """Called by the engine."""
        if kind == _EVENT_PAUSED:
            future = self._pausing.popleft()
            if not future.done():
                future.set_result(None)
        elif kind == _EVENT_CONNECTED:
            if self.on_connected is not None:
                self.on_connected()
        elif kind == _EVENT_DISCONNECTED:
            if self.on_disconnected is not None:
                self.on_disconnected(ret, self._reason() if ret < 0 else "")
        elif kind == _EVENT_WRITEBACK and self.on_writeback is not None:
            self.on_writeback(bool(ret))
        elif kind == _EVENT_DRAINING and self.on_draining is not None:
            self.on_draining(bool(ret))
        elif kind == _EVENT_UNRECORDED and self.on_unrecorded is not None:
            self.on_unrecorded(ret)

    def _reason(self) -> str:
        text = ffi.new("char[]", lib.VB_EVENT_TEXT)
        lib.vb_export_reason(self.pointer, text)
        return _text(text)


# ---- the engine ----------------------------------------------------------------------------


class Engine:
    """The engine and its event loop. Make one, from inside a running event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop or asyncio.get_running_loop()
        self.error: Any = ffi.new("char[]", lib.VB_ERROR_SIZE)
        self.pointer = self.made(lib.vb_engine_new(self.error))
        self._events = ffi.new("struct vb_event[]", EVENT_BATCH)
        self._event_bytes = memoryview(ffi.buffer(self._events))
        self._commands = ffi.new("struct vb_command[]", COMMAND_BATCH)
        self._command_bytes = ffi.buffer(self._commands)
        self._command_count = 0
        self._flush_is_due = False
        self._closed = False
        self._cookies = itertools.count(1)
        self._ios: dict[int, IO] = {}
        self._upcalls: dict[int, UpcallSink] = {}
        self._sinks: dict[int, NodeSink] = {}
        self._exports: dict[int, ExportHandle] = {}
        self._iothreads: list[IOThread] = []
        self._default_iothread: IOThread | None = None
        self._fd: int = lib.vb_engine_event_fd(self.pointer)
        self._ready: Collection[Any] = getattr(self.loop, "_ready", (None,))
        """What the event loop is about to run; a loop of another kind may always have something."""
        self.loop.add_reader(self._fd, self._drain)

    def close(self) -> None:
        """Free it; everything made from it has been freed, except the default I/O thread."""
        self.flush()
        self._closed = True
        if self._default_iothread is not None:
            self._default_iothread.free()
        self.loop.remove_reader(self._fd)
        lib.vb_engine_free(self.pointer)
        self.pointer = ffi.NULL

    def keep_unmapped_memory(self) -> None:
        """A view of guest memory has outlived its request: see api.h."""
        lib.vb_engine_keep_unmapped_memory(self.pointer)

    def made(self, pointer: Any) -> Any:
        """What a vb_…_new() returned, or the error that it left."""
        if pointer == ffi.NULL:
            raise EngineError(errno.EINVAL, _text(self.error))
        return pointer

    # ---- making things

    def new_iothread(
        self,
        name: str,
        *,
        poll_max_ns: int = 100_000,
        poll_grow: int = 0,
        poll_shrink: int = 0,
        aio: Aio = Aio.AUTO,
        threads_max: int = 0,
    ) -> IOThread:
        """Start an I/O thread."""
        if self._closed:
            raise EngineError(errno.ESHUTDOWN, "the engine has been closed")
        options = ffi.new("struct vb_iothread_options *")
        options.poll_max_ns = poll_max_ns
        options.poll_grow = poll_grow
        options.poll_shrink = poll_shrink
        options.aio = int(aio)
        options.threads_max = threads_max
        pointer = lib.vb_iothread_new(self.pointer, name.encode(), options, self.error)
        thread = IOThread(self, self.made(pointer), name)
        self._iothreads.append(thread)
        if thread.fallback_reason:
            logger.warning("I/O thread '%s' uses threads: %s", name, thread.fallback_reason)
        return thread

    @property
    def default_iothread(self) -> IOThread:
        """The thread of whatever has not been given one; started when first needed."""
        if self._default_iothread is None:
            self._default_iothread = self.new_iothread("default")
        return self._default_iothread

    @property
    def iothreads(self) -> Sequence[IOThread]:
        """All I/O threads."""
        return self._iothreads

    def forget_iothread(self, thread: IOThread) -> None:
        """Called by IOThread.free()."""
        self._iothreads.remove(thread)
        if thread is self._default_iothread:
            self._default_iothread = None

    # For the modules next to this one, each of which makes one kind of node.

    def new_cookie(self) -> int:
        """What a node is called in its events."""
        return next(self._cookies)

    def listen(
        self, cookie: int, *, told: NodeSink | None = None, upcalls: UpcallSink | None = None
    ) -> None:
        """Who takes what the node with this cookie tells, and the requests it hands up."""
        if told is not None:
            self._sinks[cookie] = told
        if upcalls is not None:
            self._upcalls[cookie] = upcalls

    def forget(self, cookie: int) -> None:
        """The node with this cookie is gone."""
        self._sinks.pop(cookie, None)
        self._upcalls.pop(cookie, None)

    def new_upcall(self, ops: Iterable[int], sink: UpcallSink) -> UpcallHandle:
        """A node that hands requests of the kinds `ops` to `sink`, the rest to child 0."""
        cookie = next(self._cookies)
        mask = sum(1 << op for op in set(ops))
        pointer = lib.vb_node_upcall_new(self.pointer, mask, cookie, self.error)
        handle = UpcallHandle(
            self,
            self.made(pointer),
            cookie,
            [n for op, n in enumerate(OP_NAMES) if mask >> op & 1],
        )
        self.listen(cookie, upcalls=sink)
        return handle

    def new_export(
        self,
        id: str,
        *,
        capacity: int,
        iothreads: Sequence[IOThread],
        logical_block_size: int,
        num_queues: int,
        writable: bool,
        writethrough: bool,
        serial: str,
    ) -> ExportHandle:
        """A vhost-user-blk device without a tree and without a connection."""
        cookie = next(self._cookies)
        threads = ffi.new("vb_iothread *[]", [thread.pointer for thread in iothreads])
        name = ffi.new("char[]", id.encode())
        options = ffi.new("struct vb_export_options *")
        options.id = name
        options.cookie = cookie
        options.capacity = capacity
        options.logical_block_size = logical_block_size
        options.num_queues = num_queues
        options.writable = writable
        options.writethrough = writethrough
        options.serial = serial.encode()
        options.num_iothreads = len(iothreads)
        options.iothreads = threads
        pointer = lib.vb_export_new(self.pointer, options, self.error)
        handle = ExportHandle(self, self.made(pointer), cookie)
        self._exports[cookie] = handle
        return handle

    def forget_export(self, cookie: int) -> None:
        """Called by ExportHandle.free()."""
        del self._exports[cookie]

    # ---- requests

    def submit(
        self,
        node: NodeHandle,
        op: int,
        offset: int = 0,
        buffer: Buffer | None = None,
        length: int | None = None,
        *,
        flags: int = 0,
        request: int = 0,
        buffer_offset: int = 0,
        thread: IOThread | None = None,
    ) -> IO:
        """Start a request on `node`; await the result.

        The data of a read or a write are in `buffer`, or, without one, in the guest
        memory of the upcall `request`. The thread is the upcall's, else `thread`,
        else the default one. Awaiting gives `buffer` back.
        """
        keep: Any = None
        address = 0
        if buffer is not None:
            keep = ffi.from_buffer(buffer, require_writable=op == OP_READ)
            address = _address(keep)
            if length is None:
                length = len(keep) - buffer_offset
            if not 0 <= length <= len(keep) - buffer_offset:
                raise ValueError(f"{length} bytes do not fit into a buffer of {len(keep)}")
        elif op <= OP_WRITE and not request:
            raise ValueError("a read or write needs a buffer")
        elif length is None:
            length = 0
        io = IO(self.loop, node.address, buffer, keep)
        cookie = next(self._cookies)
        self._ios[cookie] = io
        count = self._command_count
        if count == COMMAND_BATCH:
            self.flush()
            count = 0
        thread_address = 0 if request else (thread or self.default_iothread).address
        _COMMAND.pack_into(
            self._command_bytes,
            count * _COMMAND_SIZE,
            _COMMAND_SUBMIT,
            0,
            request,
            cookie,
            node.address,
            thread_address,
            offset,
            length,
            address,
            buffer_offset,
            op,
            flags,
            0,
        )
        self._command_count = count + 1
        if not self._flush_is_due:
            self._flush_is_due = True
            self.loop.call_soon(self._flush_later)
        return io

    def submit_upcall(
        self, node: int, op: int, offset: int, length: int, flags: int, request: int, owner: IOOwner
    ) -> IO:
        """The same for all of the upcall `request`'s memory, on the node at address `node`.

        What submit() does without its choices: filters live on it.
        """
        io = IO(self.loop, node, None, None)
        io.owner = owner
        cookie = next(self._cookies)
        self._ios[cookie] = io
        count = self._command_count
        if count == COMMAND_BATCH:
            self.flush()
            count = 0
        _COMMAND.pack_into(
            self._command_bytes,
            count * _COMMAND_SIZE,
            _COMMAND_SUBMIT,
            0,
            request,
            cookie,
            node,
            0,
            offset,
            length,
            0,
            0,
            op,
            flags,
            0,
        )
        self._command_count = count + 1
        if not self._flush_is_due:
            self._flush_is_due = True
            self.loop.call_soon(self._flush_later)
        return io

    def complete(self, request: int, ret: int) -> None:
        """Finish an upcall with 0 or a negative errno."""
        count = self._command_count
        if count == COMMAND_BATCH:
            self.flush()
            count = 0
        _COMPLETE.pack_into(
            self._command_bytes, count * _COMMAND_SIZE, _COMMAND_COMPLETE, ret, request
        )
        self._command_count = count + 1
        if not self._flush_is_due:
            self._flush_is_due = True
            self.loop.call_soon(self._flush_later)

    def forward(self, request: int, child: int = 0) -> None:
        """Hand an upcall to a child of its node, for good."""
        count = self._command_count
        if count == COMMAND_BATCH:
            self.flush()
            count = 0
        at = count * _COMMAND_SIZE
        _COMPLETE.pack_into(self._command_bytes, at, _COMMAND_FORWARD, 0, request)
        _FORWARD_CHILD.pack_into(self._command_bytes, at + _FORWARD_CHILD_AT, child)
        self._command_count = count + 1
        if not self._flush_is_due:
            self._flush_is_due = True
            self.loop.call_soon(self._flush_later)

    def retry(self, request: int) -> None:
        """Hand an upcall to its own node once more."""
        self.flush()  # what was asked for before comes first
        command = ffi.new("struct vb_command *", {"kind": _COMMAND_RETRY, "request": request})
        lib.vb_engine_submit(self.pointer, command, 1)

    def expect_done(self, node: int) -> tuple[int, IO]:
        """A cookie for the engine to give back when something is done, and who waits for it."""
        cookie = next(self._cookies)
        io = self._ios[cookie] = IO(self.loop, node, None, None)
        return cookie, io

    def forget_done(self, cookie: int) -> None:
        """What expect_done() waits for has happened, or will not: without the engine's saying."""
        self._ios.pop(cookie).complete(0)

    def flush(self) -> None:
        """Send the commands gathered so far."""
        count, self._command_count = self._command_count, 0
        if count and not self._closed:
            lib.vb_engine_submit(self.pointer, self._commands, count)

    def _flush_later(self) -> None:
        self._flush_is_due = False
        self.flush()

    def pending(self, nodes: set[int] | None = None) -> list[IO]:
        """Requests of Python's own that are in flight, all or those on `nodes` (addresses)."""
        return [io for io in self._ios.values() if nodes is None or io.node in nodes]

    async def settle(self, nodes: set[int]) -> None:
        """Wait until no request of Python's own is in flight on these nodes (addresses)."""
        while pending := self.pending(nodes):
            await asyncio.gather(*pending, return_exceptions=True)

    # ---- events

    def _drain(self) -> None:
        """Handle what the engine has to say; called when its event fd is readable."""
        # Under load the I/O threads have more by the time the answers are sent: asking again
        # costs a tenth of a turn of the event loop, which others get after DRAIN_TURNS.
        for turn in range(DRAIN_TURNS):
            # Not while others on this loop could do something instead.
            wait = turn > 0 and not self._ready
            count = lib.vb_engine_poll(self.pointer, self._events, EVENT_BATCH, wait)
            if count == 0:
                break
            self._handle(count)
            if self._closed:
                break

    def _handle(self, count: int) -> None:
        due, self._flush_is_due = self._flush_is_due, True  # flushed below
        events = _EVENT.iter_unpack(self._event_bytes[: count * _EVENT_SIZE])
        while True:
            try:
                self._dispatch(events)
                break
            except Exception as error:
                # A mistake in one handler must not lose the other events.
                logger.error(
                    "an event of the engine was not handled: %s: %s",
                    type(error).__name__,
                    error,
                    exc_info=logger.isEnabledFor(logging.DEBUG),
                )
        self._flush_is_due = due
        self.flush()

    def _dispatch(self, events: Iterable[tuple[int, ...]]) -> None:
        upcalls = self._upcalls
        ios = self._ios
        for kind, ret, cookie, request, offset, size, iov, niov, op, flags, _ in events:
            if kind == _EVENT_UPCALL:
                upcalls[cookie](request, op, flags, offset, size, iov, niov)
            elif kind == _EVENT_DONE:
                ios.pop(cookie).complete(ret)
            elif kind == _EVENT_NODE:
                sink = self._sinks.get(cookie)
                if sink is not None:  # else its node has gone meanwhile
                    sink(request, ret, op, offset, size)
            else:
                export = self._exports.get(cookie)
                if export is not None:
                    export.event(kind, ret)
