# SPDX-License-Identifier: GPL-2.0-or-later
"""Write a block filter in Python. docs/filters.md teaches how; this is the reference.

A filter is a class derived from `Filter` with a `driver` name. It overrides the
hooks it is interested in: `read`, `write`, `flush`, `discard`, `write_zeroes`.
Requests of the other kinds never leave the engine. A hook decides what becomes
of a request:

* it returns: the request has succeeded (a read's data are in its buffers);
* it calls `request.forward()` and returns: the child carries the request out;
* it raises: the request fails, with the errno of an OSError, else with EIO.

Hooks are coroutines, but not tasks: they are driven by hand, which costs less.
They can await anything a task can, except what asks for the current task
(`asyncio.timeout()`, task groups); `uses_tasks = True` makes each a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vhostblk.engine import (
    OP_DISCARD,
    OP_FLUSH,
    OP_NAMES,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    REQ_FUA,
    REQ_MAY_UNMAP,
)
from vhostblk.nodes.driver import Child, ChildRole, NodeDriver, NodeOptions
from vhostblk.nodes.hooks import HookedChild as FilterChild
from vhostblk.nodes.hooks import HookedNode, Request
from vhostblk.schema import BlockdevRef

__all__ = [
    "OP_DISCARD",
    "OP_FLUSH",
    "OP_READ",
    "OP_WRITE",
    "OP_WRITE_ZEROES",
    "REQ_FUA",
    "REQ_MAY_UNMAP",
    "ChildRole",
    "Filter",
    "FilterChild",
    "FilterOptions",
    "Request",
]


class FilterOptions(NodeOptions):
    """Options of every filter."""

    file: BlockdevRef
    """The node below."""


class Filter(HookedNode):
    """Derive from this. Everything below may be overridden unless it says otherwise."""

    Options = FilterOptions
    is_filter = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole()}
    file: FilterChild
    """The child in role `file`."""

    # ---- life

    async def open(self) -> None:
        """The children are there, requests will come. Raise to refuse the options."""

    async def close(self) -> None:
        """No more requests will come."""

    # ---- hooks

    async def read(self, request: Request) -> None:
        """Fill `request.buffers`."""
        request.forward()

    async def write(self, request: Request) -> None:
        """Store `request.buffers`; with `request.fua` durably."""
        request.forward()

    async def flush(self, request: Request) -> None:
        """Make all writes that have completed durable."""
        request.forward()

    async def discard(self, request: Request) -> None:
        """The range is not needed any more."""
        request.forward()

    async def write_zeroes(self, request: Request) -> None:
        """Make the range read as zeroes."""
        request.forward()

    def hooked_operations(self) -> set[str]:
        """Operations whose hooks are called; the others stay in the engine.

        By default those that the class overrides. A filter whose options make
        some of its hooks pointless can say so here.
        """
        return {
            name
            for name, method in zip(OP_NAMES, _METHODS, strict=True)
            if getattr(type(self), method) is not getattr(Filter, method)
        }

    def filename(self) -> str:
        """The image's, for messages and queries; by default that of the child."""
        return self.file.node.filename() if "file" in self.children else ""

    async def truncate(self, size: int) -> None:
        """Change the size (`block_resize`); by default that of the child."""
        await self.file.node.truncate(size)

    # ---- the framework's: not to be overridden

    def child(self, role: str) -> FilterChild:
        """The child in one role: `file`, `children.0`, …"""
        child = self.children[role]
        assert isinstance(child, FilterChild)
        return child

    async def activate(self) -> None:
        self._prepare_hooks()
        if "file" in self.children:
            self.file = self.child("file")
        await self.open()
        try:
            self._make_half()
        except BaseException:
            await self.close()
            raise

    def _make_half(self) -> None:
        operations = self.hooked_operations()
        unknown = operations.difference(OP_NAMES)
        if unknown:
            raise ValueError(f"hooked_operations() gave {unknown}, which are not in {OP_NAMES}")
        self._hooks = [
            getattr(self, method) if name in operations else None
            for name, method in zip(OP_NAMES, _METHODS, strict=True)
        ]
        ops = [OP_NAMES.index(name) for name in operations]
        if ops:
            sink = self._start_task if self.uses_tasks else self._start
            self.handle = self.engine.new_upcall(ops, sink)

    async def deactivate(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            handle.free()
        await self.close()

    def children_changed(self) -> None:
        self.child_index = {role: index for index, role in enumerate(self.children)}
        if "file" in self.children:
            self.file = self.child("file")

    # A filter's own state is unknown here, so that with new options it starts afresh: open()
    # in the pause, and close() of what was before when the change is complete.

    async def reopen_prepare(self, options: Any) -> None:
        self._reopen_options = options
        self._reopen_twin: Filter | None = None  # the state that is not in force

    async def reopen_commit(self) -> None:
        other = self._twin()
        self.options = self._reopen_options
        self.handle = None
        try:
            await self.open()
            try:
                self._make_half()
                if self.host.is_drained(self):
                    self.drain_begin()
            except BaseException:
                await self.close()
                raise
        except BaseException:
            self._take_over(other)
            raise
        self._reopen_twin = other

    async def reopen_abort(self) -> None:
        if self._reopen_twin is not None:
            unwanted = self._twin()
            self._take_over(self._reopen_twin)
            await unwanted._retire()

    async def reopen_clean(self) -> None:
        if self._reopen_twin is not None:
            other, self._reopen_twin = self._reopen_twin, None
            await other._retire()

    def _twin(self) -> Filter:
        """An object of its own with the state of this one."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), host=_HostOf(self))
        return twin

    def _take_over(self, twin: Filter) -> None:
        host = self.host
        vars(self).clear()
        vars(self).update(vars(twin), host=host, _reopen_twin=None)

    async def _retire(self) -> None:
        if self.handle is not None:
            await self.engine.settle({self.handle.address})
        await self.deactivate()


class _HostOf:
    """What a twin asks, `node` would: it is not in the graph itself."""

    def __init__(self, node: NodeDriver) -> None:
        self._node = node

    def children_of(self, twin: NodeDriver) -> Mapping[str, Child]:
        return self._node.children

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node.host, name)


_METHODS = ("read", "write", "flush", "discard", "write_zeroes")
