# SPDX-License-Identifier: GPL-2.0-or-later
"""What every block driver is: options, an engine half, children by role.

A driver knows its children and never its parents. It says which roles it has;
the graph finds or makes the nodes, ties them together, and gives them to the
driver when it asks. A driver's engine half is one node of the C engine; a
driver that has nothing to do right now has none, is *passive*, and requests go
straight to its child.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum, IntFlag
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from vhostblk.engine import (
    IO,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    REQ_FUA,
    REQ_MAY_UNMAP,
    Buffer,
    Engine,
    NodeHandle,
    Stats,
)
from vhostblk.image import Extent
from vhostblk.objects import BackendObject
from vhostblk.schema import Model, NodeName, OnOff, VhostblkError

ObjectT = TypeVar("ObjectT", bound=BackendObject)


class Perm(IntFlag):
    """What a parent does to a node, or allows others to do. Values are QEMU's lock bytes."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


_PERM_NAMES = {
    Perm.CONSISTENT_READ: "consistent read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write unchanged",
    Perm.RESIZE: "resize",
}


def perm_names(perm: Perm) -> str:
    """For messages."""
    return ", ".join(name for bit, name in _PERM_NAMES.items() if perm & bit)


class CacheOptions(Model):
    """How the host's page cache is used."""

    direct: OnOff = False
    """Bypass the host's page cache (O_DIRECT)."""
    no_flush: OnOff = False
    """Ignore flushes: fast, and the data are lost if the host crashes."""


class NodeOptions(Model):
    """Options of every node."""

    driver: str
    """The driver's name."""
    node_name: NodeName | None = None
    """The node's name; made up if absent."""
    discard: Literal["ignore", "unmap"] = "ignore"
    """Whether discarded ranges are given back; what the node that stores the data says counts."""
    cache: CacheOptions = CacheOptions()
    read_only: OnOff = False
    """Refuse all writes."""
    auto_read_only: OnOff = False
    """Open read-only where read-write is not possible."""
    force_share: OnOff = False
    """Do not mind other users of the image; only with read-only=on."""
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    """Turn writes of zeroes into zero writes (on), or deallocate them (unmap)."""


INHERITED = ("read-only", "auto-read-only", "force-share", "cache", "discard", "detect-zeroes")
"""Options that a child defined inside its parent takes from the parent unless it has its own.

QEMU inherits the first four. Its discard and detect-zeroes work at every node. Here a filter
leaves them to what is below, and inheriting them has the same effect; a node that detects zeroes
itself (`NodeDriver.detects_zeroes`) does not hand that option on.
"""

DETECT_ZEROES = {"off": 0, "on": 1, "unmap": 2}
"""The option's values as the engine knows them."""


class RoleKind(Enum):
    """What a child is to its parent; decides the permissions."""

    FILTERED = "filtered"  # the parent's data is the child's
    STORAGE = "storage"  # a format's file
    BACKING = "backing"  # what an overlay does not have
    METADATA = "metadata"  # what is to be known of the data, which are elsewhere


@dataclass(frozen=True)
class ChildRole:
    """A role that a driver has a child, or several, for. Its option bears the same name."""

    kind: RoleKind = RoleKind.FILTERED
    optional: bool = False
    many: bool = False  # a list: the children are called role.0, role.1, …


class HasChildren(Protocol):
    """Who has children: a node, or a drive (one, its `root`)."""

    @property
    def children(self) -> Mapping[str, Child]:
        """By role and index, in order."""


ParentT = TypeVar("ParentT", bound=HasChildren)
Relations = Callable[[ParentT], Mapping[str, "NodeDriver"]]
"""The children of each parent by role: as they are (present()), or as they will be."""


def present(parent: HasChildren) -> dict[str, NodeDriver]:
    """The children of one parent by role, as they are."""
    return {role: child.node for role, child in parent.children.items()}


class NodeHost(Protocol):
    """What a driver may ask of the graph it lives in."""

    @property
    def engine(self) -> Engine:
        """The engine."""

    def children_of(self, node: NodeDriver) -> Mapping[str, Child]:
        """The children of a node, by role and index, in order."""

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the control clients."""

    def passive_changed(self, node: NodeDriver) -> None:
        """`node.handle` has appeared or gone; only inside a drained section."""

    def use_object(self, node: NodeDriver, id: str, kind: type[ObjectT]) -> ObjectT:
        """An object, which cannot be deleted until it is released, or the node closed."""

    def release_object(self, node: NodeDriver, object: BackendObject) -> None:
        """The node does not need the object any more."""

    def update_permissions(self, *changed: NodeDriver) -> None:
        """`child_permissions()` of these nodes says other things now. Raises if they conflict."""

    def reconsider(self, nodes: Iterable[NodeDriver]) -> None:
        """These nodes want less of their children than before: noted when that is convenient."""

    def side_file(self, node: NodeDriver, what: str) -> str | None:
        """A file for what a node must know after a restart; None: nothing outlives the process."""

    def is_drained(self, node: NodeDriver) -> bool:
        """Whether `drain_begin()` has been called for it and `drain_end()` not yet."""

    @property
    def closing(self) -> bool:
        """The process ends: what has not been done the next one finds in front-ends' records."""

    def working(self, node: NodeDriver) -> AbstractAsyncContextManager[None]:
        """A step of background work on a node: `async with host.working(self): …`.

        The graph does not change during a step, and guests are not paused for a change: that
        waits for the step to end, and the next step for the change. So a step should be
        short, and must not wait for the graph's lock.
        """


class CreateHost(Protocol):
    """What a driver may ask of whoever has it create an image."""

    def image(self, reference: str | dict[str, Any]) -> AbstractAsyncContextManager[Child]:
        """A node to write the image to, by name or from options, as long as that takes."""

    def using(self, id: str, kind: type[ObjectT]) -> AbstractContextManager[ObjectT]:
        """An object, which cannot be deleted meanwhile."""


class Child:
    """A node as its parent sees it: a role, a size, and I/O."""

    def __init__(self, host: NodeHost, role: str, node: NodeDriver) -> None:
        self._host = host
        self.role = role
        self.node = node
        self._target: NodeHandle | None = None
        self.size = 0
        """Bytes."""

    def refresh(self) -> None:
        """Called by the graph when something below has changed."""
        self._target = self.node.effective
        self.size = self.node.size

    def refresh_all(self) -> None:
        """The same from the bottom up: the node has been truncated in use."""
        for below in self.node.children.values():
            below.refresh_all()
        self.refresh()

    def detach(self) -> None:
        """Called by the graph when the parent has been closed: no I/O from here on."""
        self._target = None
        self.size = 0

    def read(self, offset: int, into: int | bytearray | memoryview) -> IO:
        """Read into a buffer, or that many bytes into a new one; awaiting gives the buffer."""
        buffer = bytearray(into) if isinstance(into, int) else into
        return self._submit(OP_READ, offset, buffer)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> IO:
        """Write; with `fua` to stable storage. `data` may not change until it is done."""
        return self._submit(OP_WRITE, offset, data, flags=REQ_FUA if fua else 0)

    def flush(self) -> IO:
        """What was written before is on stable storage afterwards."""
        return self._submit(OP_FLUSH, 0, None)

    def discard(self, offset: int, length: int) -> IO:
        """The range is not needed any more; what it reads as afterwards is undefined."""
        return self._submit(OP_DISCARD, offset, None, length)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fua: bool = False
    ) -> IO:
        """The range reads as zeroes afterwards."""
        flags = (REQ_MAY_UNMAP if unmap else 0) | (REQ_FUA if fua else 0)
        return self._submit(OP_WRITE_ZEROES, offset, None, length, flags=flags)

    def _submit(
        self,
        op: int,
        offset: int,
        buffer: Buffer | None,
        length: int | None = None,
        *,
        flags: int = 0,
    ) -> IO:
        if length is None:
            length = 0 if buffer is None else memoryview(buffer).nbytes
        self.check_range(offset, length)
        return self._start(op, offset, buffer, length, flags)

    def _start(
        self, op: int, offset: int, buffer: Buffer | None, length: int, flags: int, request: int = 0
    ) -> IO:
        """What has been checked goes to the engine, on the thread of the upcall `request`."""
        assert self._target is not None
        return self._host.engine.submit(
            self._target, op, offset, buffer, length, flags=flags, request=request
        )

    def check_range(self, offset: int, length: int) -> None:
        """The engine's nodes trust their callers to stay inside."""
        if self._target is None:
            raise OSError(errno.ESHUTDOWN, f"the parent of node '{self.node.name}' is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(
                errno.EIO,
                f"{length} bytes at offset {offset} are not inside node "
                f"'{self.node.name}' of {self.size} bytes",
            )


def changed_options(old: NodeOptions, new: NodeOptions) -> list[str]:
    """Names, as in QAPI, of the options in which two sets for one driver differ."""
    return [
        field.alias or name
        for name, field in type(old).model_fields.items()
        if name not in ("driver", "node_name") and getattr(old, name) != getattr(new, name)
    ]


@functools.cache  # few combinations, asked for every node at every change
def _child_permissions(
    kind: RoleKind, read_only: bool, perm: Perm, shared: Perm
) -> tuple[Perm, Perm]:
    if kind is RoleKind.FILTERED:
        return perm, shared
    if kind is RoleKind.BACKING:
        return Perm.CONSISTENT_READ, shared | Perm.WRITE_UNCHANGED
    perm |= Perm.CONSISTENT_READ
    if not read_only:
        perm |= Perm.WRITE | Perm.RESIZE
    return perm, shared & ~(Perm.WRITE | Perm.RESIZE)


class NodeDriver:
    """One node of the graph. Subclass it to write a driver.

    The graph calls `open()` when the children are there, and `close()` when
    nothing reaches the node any more.
    """

    driver: ClassVar[str]
    Options: ClassVar[type[NodeOptions]] = NodeOptions
    child_roles: ClassVar[Mapping[str, ChildRole]] = {}
    CreateOptions: ClassVar[type[Model] | None] = None
    """What `blockdev-create` takes for this driver, `driver` included; None: it creates nothing."""
    is_filter: ClassVar[bool] = False  # stays on top of a snapshot of the drive
    keeps_data: ClassVar[bool] = False
    """A filter with the very data of its child `file`: an image may name that in its place."""
    detects_zeroes: ClassVar[bool] = False
    """Whether `detect-zeroes` works at this node itself."""
    child_class: ClassVar[type[Child]] = Child
    grows_in_use: ClassVar[bool] = False
    """truncate() to a larger size may run while requests are in flight."""
    takes_growth: ClassVar[bool] = False
    """A child may become larger, whatever else is shared of it; grown() is told."""
    reopenable: ClassVar[frozenset[str]] = frozenset(INHERITED)
    """Options that `blockdev-reopen` may change, with QAPI's names; children always may."""

    def __init__(self, host: NodeHost, name: str, options: Any) -> None:
        self.host = host
        self.name = name
        self.options = options
        self.handle: NodeHandle | None = None
        """The engine half; None while the node is passive."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # ---- creating images

    @classmethod
    def check_create(cls, options: Any) -> None:
        """Refuse an instance of `CreateOptions` that cannot be an image, before there is a file."""

    @classmethod
    async def create(cls, host: CreateHost, options: Any) -> None:
        """Create an image as `options`, an instance of `CreateOptions`, describe it."""
        raise NotImplementedError

    # ---- life

    async def activate(self) -> None:
        """Called by the graph: open the node."""
        await self.open()

    async def deactivate(self) -> None:
        """Called by the graph: close the node."""
        await self.close()

    async def implied_children(self) -> Mapping[str, str | dict[str, Any]]:
        """Further children, by role, that what is stored in the first ones asks for.

        Called by the graph before open(): a format reads here which backing file
        its image names.
        """
        return {}

    async def open(self) -> None:
        """Acquire what the node needs and make its engine half."""

    async def close(self) -> None:
        """Give it all back. Must not fail."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            handle.free()

    # ---- what it is

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.host.engine

    @property
    def children(self) -> Mapping[str, Child]:
        """Children by role (`file`) or role and index (`children.0`), in order."""
        return self.host.children_of(self)

    def child(self, role: str) -> Child:
        """The child in one role."""
        return self.children[role]

    @property
    def size(self) -> int:
        """Bytes that can be read and written."""
        return self._only_child().size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return bool(self.options.read_only)

    @property
    def effective(self) -> NodeHandle:
        """The engine node that a request for this node enters at."""
        node = self
        while node.handle is None:
            node = node._only_child().node
        return node.handle

    def _only_child(self) -> Child:
        return next(iter(self.children.values()))

    @property
    def is_format(self) -> bool:
        """Whether a child stores something else than this node's data as they are."""
        return any(role.kind is RoleKind.STORAGE for role in self.child_roles.values())

    def data_shift(self) -> int | None:
        """Where in the child this node's data begin; None: they are not simply there."""
        roles = self.child_roles.values()
        return 0 if roles and all(r.kind is RoleKind.FILTERED for r in roles) else None

    @property
    def allocation_unit(self) -> int | None:
        """For an overlay: what it takes from its backing node at once, in bytes, if known."""
        return None

    @property
    def discard_granularity(self) -> int | None:
        """Zero writes that may unmap return as much space as discards do: in whole units of so many
        bytes, a power of two. What is not a whole unit may be written as zeroes.

        None: they return none (`discard=ignore`), or may cost as much as writes of data.
        """
        return self._only_child().node.discard_granularity if self.keeps_data else None

    @property
    def keeps_zeroes(self) -> bool:
        """Whether what is zeroes in the child is zeroes here: decrypted, it is noise."""
        return self.keeps_data

    def describe(self) -> dict[str, Any]:
        """Facts for `query-named-block-nodes`; may add members of the driver's own."""
        return {}

    def allocated(self) -> int | None:
        """Bytes that its file takes on the host, if it has one. May block: called in a thread."""
        return None

    def filename(self) -> str:
        """What `file` of `query-named-block-nodes` says: a path, or json: as QEMU writes it."""
        return ""

    def state_options(self) -> dict[str, Any]:
        """Options that make the node again after a restart, for the state file (docs/state.md).

        File names in them should be absolute. The graph adds the children. Must depend on
        `options` alone: the result is kept.
        """
        options: dict[str, Any] = self.options.to_options()
        return options

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Where the data of a range are; by default where the first child has them."""
        async for extent in self._only_child().node.extents(offset, length):
            yield extent if self.keeps_zeroes else replace(extent, zero=False)

    async def check_image(self, patience: float | None) -> dict[str, Any]:
        """Check the image without changing it: QAPI's ImageCheck. Nothing is in flight.

        TimeoutError if that takes more than `patience` seconds and can be given up.
        """
        raise VhostblkError(
            f"Block format '{self.driver}' used by node '{self.name}' does not support checks",
            data={"code": "no-check", "node": self.name},
        )

    def stats(self) -> Stats:
        """Counters of the engine half."""
        return self.effective.stats()

    def relink(self) -> None:
        """Tie the engine half to those of the children. Called by the graph."""
        for index, child in enumerate(self.children.values()):
            child.refresh()
            if self.handle is not None:
                self.handle.set_child(index, child.node.effective)

    # ---- permissions

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What this node does to a child in `role`, and lets others do, given its own parents."""
        return _child_permissions(role.kind, self.read_only, perm, shared)

    def shared_with(self, other: NodeDriver) -> Perm:
        """What it lets another parent of its child do, besides what it lets everybody do."""
        return Perm.NONE

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        """Make sure that the new permissions can be had, from other processes too."""

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        """The prepared permissions are in force. Must not fail."""

    def abort_permissions(self) -> None:
        """The prepared permissions are not wanted after all. Must not fail."""

    # ---- changes
    #
    # A change of options goes: reopen_prepare(), then a pause, in it reopen_commit() and
    # begin_writing(), and after it reopen_clean(); where any part of the whole change fails,
    # stop_writing() and reopen_abort() take the place of the rest. Most drivers only extend
    # reopen_prepare().

    async def reopen_prepare(self, options: Any) -> None:
        """The node is to have these options soon. Guests still use it: do what is slow here.

        Raise to refuse. Otherwise leave in `self.prepared` the attributes that are to be
        exchanged in the pause, `handle` among them if a new engine half is needed.
        """
        for name in changed_options(self.options, options):
            if name not in self.reopenable and name not in self.child_roles:
                raise VhostblkError(
                    f"Cannot change the option '{name}' of node '{self.name}' ({self.driver})",
                    data={"code": "cannot-change", "node": self.name, "parameter": name},
                )
        self.prepared: dict[str, Any] = {"options": options}
        self._exchanged = False

    async def reopen_commit(self) -> None:
        """Nothing is in flight: put the new options in force. May still refuse by raising."""
        self._exchange()

    async def begin_writing(self) -> None:
        """All nodes have their new options, and permissions and locks can be had.

        For what a node that is read-only no more has to write before it is used. May refuse.
        """

    async def stop_writing(self) -> None:
        """Undo begin_writing(), before any node has its old options again. Must not fail."""

    async def reopen_abort(self) -> None:
        """Back to what was before reopen_prepare(). Must not fail."""
        if self._exchanged:
            self._exchange()
        await self.reopen_dispose(self.prepared)

    async def reopen_clean(self) -> None:
        """The change is complete, guests run: free what is not needed any more."""
        await self.reopen_dispose(self.prepared)

    async def reopen_dispose(self, attributes: dict[str, Any]) -> None:
        """Free attributes that are not in force, or not any more. Must not fail."""
        handle = attributes.get("handle")
        if handle is not None:
            await self.engine.settle({handle.address})
            handle.free()

    def _exchange(self) -> None:
        ours = vars(self)
        for name, value in self.prepared.items():
            self.prepared[name], ours[name] = ours[name], value
        self._exchanged = not self._exchanged

    def check_snapshot(self, covered: Collection[NodeDriver]) -> None:
        """This moment of nodes below is about to be kept. Raise if nobody could read it later.

        Called inside a drained section. `covered` are all nodes of which it is.
        """

    async def expect_writes(self, below: NodeDriver) -> None:
        """A guest that writes to `below` is about to write to this overlay instead.

        Called while it still writes there: what the first writes would have to wait for can be
        made ready. Nobody uses the overlay, and `below` is about to become its backing node.
        """

    def forget_expected(self) -> None:
        """It does not come to that: no node is about to become its backing node."""

    def owe_flush(self) -> bool:
        """What is below may have data that were written and not flushed. Called in a pause.

        From here on a flush of this node (or a write with FUA) is one of its backing node as well,
        until one of that has succeeded. False if the driver cannot do that.
        """
        return False

    def flush_paid(self) -> None:
        """The backing node has been flushed since owe_flush() was called."""

    async def become_read_only(self) -> bool:
        """Nobody writes to this node any more: an overlay has taken its place.

        A format that can be read-only from now on without holding up its readers does so, and
        has written all that it had to write. Whether that is the case.
        """
        return False

    async def forget_backing(self) -> None:
        """The image is not to name a backing file any more: it has everything.

        Nothing is in flight. All data must be durable before the name goes; whatever moment a crash
        comes at, the image is good with the name or without it.
        """
        raise VhostblkError(
            f"Node '{self.name}' ({self.driver}) cannot let go of its backing file",
            data={"code": "cannot-change", "node": self.name},
        )

    async def remember_backing(self) -> None:
        """Undo the last forget_backing(). Nothing is in flight."""

    # What a format stores (RoleKind.STORAGE) is moved to other nodes; filters that keep the data do
    # not count. In the pause: before_move(), then relations change, then move(). If that, or
    # anything after it, fails, move_back() when the old relations are there again; else moved().

    async def before_move(self) -> None:
        """Write to where it is now what is in memory only."""

    async def move(self, before: Mapping[str, NodeDriver]) -> None:
        """It is to be elsewhere; `before` says where it was, by role. Raise to refuse.

        Permissions can be had for the old place and the new one.
        """

    async def move_back(self) -> None:
        """Undo a move(), which may have failed half-way. Must not fail."""

    async def moved(self) -> None:
        """The change is complete, guests run: free what is not needed any more."""

    async def expect_children(self, children_of: Relations[NodeDriver]) -> None:
        """Children, here or below, are about to be others: `children_of` says which. Guests run.

        What takes time is found out and prepared here, if it was not before: children_changed()
        holds guests up. That may not be called after all; drain_end() always is if a pause began.
        """

    def children_changed(self) -> None:
        """Children have been added, removed or replaced, here or below, or have another size.

        Called inside a drained section; raise to refuse, and it is called again when
        the old ones are back.
        """

    def resized(self) -> None:
        """Something below has another size now. Called inside a drained section."""

    def grown(self) -> None:
        """A child is larger now (see takes_growth). Requests may be in flight."""

    async def truncate(self, size: int) -> None:
        """Change the size. Called inside a drained section."""
        raise VhostblkError(
            f"Node '{self.name}' cannot be resized: driver '{self.driver}' does not support it",
            data={"code": "cannot-resize", "node": self.name},
        )

    def drain_begin(self) -> None:
        """A pause is beginning: let go of requests that are held back."""

    def drain_end(self) -> None:
        """The pause is over."""
