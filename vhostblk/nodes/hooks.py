# SPDX-License-Identifier: GPL-2.0-or-later
"""How requests that come up from the engine are run: by hooks, coroutines without a task each.

What a filter in Python (vhostblk/filter.py) and a format that plans in Python
(qcow2) have in common: the request as a hook sees it, children whose I/O runs on
the request's own I/O thread, and the loop that drives a hook by hand, from one
thing it awaits to the next. A hook that returns has carried the request out,
unless it said where the request goes next; one that raises fails it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import sys
import time
import traceback
from collections.abc import Awaitable, Coroutine, Generator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

from vhostblk.engine import (
    IO,
    OP_NAMES,
    OP_WRITE,
    REQ_FUA,
    REQ_MAY_UNMAP,
    Buffer,
    NodeHandle,
    guest_buffers,
)
from vhostblk.nodes.driver import Child, NodeDriver
from vhostblk.origin import origin
from vhostblk.ratelimit import RateLimitedLog

logger = logging.getLogger(__name__)

# The request whose hook is running now. Tasks that a hook starts inherit it.
_current: ContextVar[Request | None] = ContextVar("vhostblk_request", default=None)


# Where a request goes when its hook has returned, if not to a child of that number.
HERE, AGAIN = -1, -2


class _Nothing:
    """What `request.forward()` gives back: awaiting it does not wait."""

    def __await__(self) -> Generator[Any, Any, None]:
        return iter(())  # type: ignore[return-value]  # cheaper than a generator


_NOTHING = _Nothing()


class Request:
    """One request of a guest (or of a node above), for as long as the hook runs."""

    __slots__ = (
        "_forward_to",
        "_inflight",
        "_iov",
        "_memory",
        "_niov",
        "_owner",
        "_ret",
        "_views",
        "finished",
        "flags",
        "handle",
        "length",
        "offset",
        "op",
    )
    _ret: int  # of a hook that has ended before its I/O

    def __init__(
        self,
        owner: HookedNode,
        handle: int,
        op: int,
        flags: int,
        offset: int,
        length: int,
        iov: int,
        niov: int,
    ) -> None:
        self._owner = owner
        self.handle = handle  # the engine's
        self.op = op
        self.flags = flags
        self.offset = offset
        self.length = length
        self._iov = iov
        self._niov = niov
        self._views: list[memoryview] | None = None
        self._forward_to = HERE
        self._inflight = 0
        self.finished = False

    def __repr__(self) -> str:
        return f"<{OP_NAMES[self.op]} {self.length} bytes at {self.offset}>"

    @property
    def operation(self) -> str:
        """`read`, `write`, `flush`, `discard` or `write-zeroes`."""
        return OP_NAMES[self.op]

    @property
    def fua(self) -> bool:
        """Must be on stable storage before it completes (writes)."""
        return bool(self.flags & REQ_FUA)

    @property
    def may_unmap(self) -> bool:
        """The range may be deallocated (zero writes)."""
        return bool(self.flags & REQ_MAY_UNMAP)

    @property
    def buffers(self) -> list[memoryview]:
        """The guest's memory: to be filled by a read, the data of a write.

        It is the memory itself, not a copy. A read's may be written to, a
        write's must not be. The views (and slices of them) are of use until the
        hook returns; copy what is needed longer.
        """
        if self._views is None:
            if self.finished:
                raise ValueError("the request has completed: its memory is the guest's again")
            self._memory = guest_buffers(self._iov, self._niov) if self.op <= OP_WRITE else []
            self._views = [memoryview(part) for part in self._memory]
            if self.op == OP_WRITE:
                self._views = [view.toreadonly() for view in self._views]
        return self._views

    def data(self) -> bytes:
        """A copy of all buffers in one piece."""
        return b"".join(self.buffers)

    def fill(self, data: Buffer) -> None:
        """Answer a read: copy `data`, as many bytes as were asked for, to the guest."""
        source = memoryview(data).cast("B")
        if len(source) != self.length:
            raise ValueError(f"{len(source)} bytes for a request of {self.length}")
        position = 0
        for view in self.buffers:
            view[:] = source[position : position + len(view)]
            position += len(view)

    def forward(self, role: str = "file") -> Awaitable[None]:
        """Let the child in `role` carry the request out, once the hook returns.

        The request is then out of the hook's hands, and how it ends is not to be
        learnt; `await self.file.forward(request)` waits for the result instead.
        May be awaited, which does not wait.
        """
        self._forward_to = self._owner.child_index[role]
        return _NOTHING

    def retry(self) -> None:
        """Let the node's own engine half look at the request once more, once the hook returns."""
        self._forward_to = AGAIN

    # ---- the framework's

    def submit_part(
        self, target: NodeHandle, op: int, offset: int, length: int, position: int = 0
    ) -> IO:
        """Start I/O of `target` with what is at `position` of the guest's memory."""
        self._inflight += 1
        io = self._owner.engine.submit(
            target, op, offset, None, length, request=self.handle, buffer_offset=position
        )
        io.owner = self
        return io

    def io_done(self) -> None:
        """An I/O started by the hook has completed."""
        self._inflight -= 1
        if self.finished and self._inflight == 0:
            self._owner.release(self)


class HookedChild(Child):
    """A child as a hook sees it. Its methods return at once; await the result."""

    def forward(self, request: Request, offset: int | None = None) -> IO:
        """Carry out `request` on this child, at `offset` if given, and wait for it.

        The data go straight between the guest's memory and the child.
        """
        if request.finished:
            raise ValueError("the request has completed")
        at = request.offset if offset is None else offset
        self.check_range(at, request.length)
        assert self._target is not None
        request._inflight += 1
        return self._host.engine.submit_upcall(
            self._target.address, request.op, at, request.length, request.flags,
            request.handle, request,
        )  # fmt: skip

    def forward_part(self, request: Request, offset: int, position: int, length: int) -> IO:
        """Carry out a part of a read or write: `length` bytes of its data, from `position` on."""
        self.check_range(offset, length)
        assert self._target is not None
        return request.submit_part(self._target, request.op, offset, length, position)

    def _start(
        self, op: int, offset: int, buffer: Buffer | None, length: int, flags: int, request: int = 0
    ) -> IO:
        current = _current.get()
        if current is None or current.finished:
            # Work of the node's own, that no request waits for.
            return super()._start(op, offset, buffer, length, flags)
        io = super()._start(op, offset, buffer, length, flags, current.handle)
        # The guest's memory must stay until this has finished, awaited or not.
        current._inflight += 1
        io.owner = current
        return io


class HookedNode(NodeDriver):
    """A node that carries requests out in Python. `_hooks` has one hook for each operation."""

    child_class = HookedChild
    uses_tasks: ClassVar[bool] = False
    """Run each hook as an asyncio task. Slower; needed for asyncio.timeout() and the like."""

    child_index: Mapping[str, int]
    _hooks: list[Any]

    def _prepare_hooks(self) -> None:
        """Called before the first request."""
        self.child_index = {role: index for index, role in enumerate(self.children)}
        self._log = RateLimitedLog(logger)
        self._tasks: set[asyncio.Task[None]] = set()
        self._collected = 0.0

    def _start(
        self, handle: int, op: int, flags: int, offset: int, length: int, iov: int, niov: int
    ) -> None:
        """A request has arrived (engine.UpcallSink)."""
        request = Request(self, handle, op, flags, offset, length, iov, niov)
        _current.set(request)
        try:
            coroutine = self._hooks[op](request)
            if coroutine is None:  # a plain function
                ret = 0
            else:
                waiting = coroutine.send(None)
                _current.set(None)
                self._wait(request, coroutine, waiting)
                return
        except StopIteration:
            ret = 0
        except BaseException as error:
            ret = self._failed(request, error)
        _current.set(None)
        if request._views is None and request._inflight == 0:
            # By far the most frequent way out.
            request.finished = True
            if ret == 0 and request._forward_to != HERE:
                self._send_on(request)
            else:
                self.engine.complete(handle, ret)
        else:
            self._finish(request, ret)

    def _step(self, request: Request, coroutine: Coroutine[Any, None, None]) -> None:
        """What the hook waited for is there."""
        _current.set(request)
        try:
            waiting = coroutine.send(None)
        except StopIteration:
            ret = 0
        except BaseException as error:
            ret = self._failed(request, error)
        else:
            _current.set(None)
            self._wait(request, coroutine, waiting)
            return
        _current.set(None)
        self._finish(request, ret)

    def _wait(self, request: Request, coroutine: Coroutine[Any, None, None], waiting: Any) -> None:
        """Have the hook go on when what it yielded is done."""
        step = partial(self._step, request, coroutine)
        if isinstance(waiting, IO):
            waiting._asyncio_future_blocking = False
            if waiting.finished is None:
                waiting.finished = step
                return
        elif waiting is None:  # asyncio.sleep(0)
            self.engine.loop.call_soon(step)
            return
        elif not getattr(waiting, "_asyncio_future_blocking", False):
            error = RuntimeError(f"a hook awaited {waiting!r}, which is not asyncio's")
            self._throw(request, coroutine, error)
            return
        waiting._asyncio_future_blocking = False
        waiting.add_done_callback(lambda _: step())

    def _throw(
        self, request: Request, coroutine: Coroutine[Any, None, None], error: BaseException
    ) -> None:
        try:
            coroutine.throw(error)
        except StopIteration:
            self._finish(request, 0)
        except BaseException as raised:
            ret = self._failed(request, raised)
            del raised
            self._finish(request, ret)
        else:
            coroutine.close()
            self._finish(request, -errno.EIO)

    def _start_task(
        self, handle: int, op: int, flags: int, offset: int, length: int, iov: int, niov: int
    ) -> None:
        """The same as _start() with uses_tasks."""
        request = Request(self, handle, op, flags, offset, length, iov, niov)
        task = self.engine.loop.create_task(self._run_task(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_task(self, request: Request) -> None:
        _current.set(request)
        try:
            result = self._hooks[request.op](request)
            if result is not None:
                await result
            ret = 0
        except BaseException as error:
            ret = self._failed(request, error)
        self._finish(request, ret)

    def _finish(self, request: Request, ret: int) -> None:
        """The hook has ended."""
        request.finished = True
        request._ret = ret
        if request._inflight == 0:
            self.release(request)

    def release(self, request: Request) -> None:
        """Give the request back to the engine, and the guest its memory."""
        ret = request._ret
        if request._views is not None:
            self._release_views(request)
        if ret == 0 and request._forward_to != HERE:
            self._send_on(request)
        else:
            self.engine.complete(request.handle, ret)

    def _send_on(self, request: Request) -> None:
        """The engine carries it out: a child, or the node itself once more."""
        if request._forward_to >= 0:
            self.engine.forward(request.handle, request._forward_to)
        else:
            self.engine.retry(request.handle)

    def _release_views(self, request: Request) -> None:
        views, request._views = request._views or [], None
        kept = False
        while views:
            try:
                views.pop().release()
            except BufferError:
                kept = True
        if not kept and not _is_shared(request._memory):
            request._memory.clear()
            return
        # Perhaps only a cycle of garbage holds it; but looking for that is slow.
        if time.monotonic() - self._collected > 1:
            gc.collect()
            self._collected = time.monotonic()
            kept = _is_shared(request._memory)
            if not kept:
                request._memory.clear()
                return
        self.engine.keep_unmapped_memory()
        self._report(
            logging.ERROR,
            request,
            "a view of the guest's memory was kept after its request; copy what is needed longer",
            {},
        )

    def _failed(self, request: Request, error: BaseException) -> int:
        """The hook has raised: say so; the errno for the request."""
        code = errno.EIO
        level, text, where = logging.ERROR, f"{type(error).__name__}: {error}", origin(error)
        if isinstance(error, OSError) and error.errno and 0 < error.errno < 4096:
            code = error.errno
            level, where = logging.WARNING, ""
            text = f"{errno.errorcode.get(code, code)}: {error.strerror}"
        elif isinstance(error, RuntimeError) and "task" in str(error) and not self.uses_tasks:
            text += "; what asks for the current task needs 'uses_tasks = True' in the class"
        self._report(level, request, text + where, {"errno": code}, error)
        return -code

    def _report(
        self,
        level: int,
        request: Request,
        text: str,
        data: dict[str, Any],
        error: BaseException | None = None,
    ) -> None:
        told = self._log.log(
            level,
            "%s '%s' (%s), %s of %d bytes at %d: %s",
            "filter" if self.is_filter else "node",
            self.name,
            self.driver,
            request.operation,
            request.length,
            request.offset,
            text,
        )
        if not told:
            return
        if error is not None and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", "".join(traceback.format_exception(error)).rstrip())
        if not self.is_filter:
            return
        self.host.emit(
            "VHOSTBLK_FILTER_ERROR",
            {
                "node-name": self.name,
                "driver": self.driver,
                "operation": request.operation,
                "offset": request.offset,
                "length": request.length,
                "error": text,
                **data,
            },
        )


def _is_shared(parts: list[Any]) -> bool:
    """Whether anybody but the list refers to one of its entries."""
    # The list's own reference, that of the loop variable, and that of the argument.
    return any(sys.getrefcount(part) > 3 for part in parts)
