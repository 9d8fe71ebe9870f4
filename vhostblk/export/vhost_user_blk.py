# SPDX-License-Identifier: GPL-2.0-or-later
"""vhost-user-blk: a virtio disk for a guest of QEMU, or of any other vhost-user front-end.

The device itself is in the engine (cffi_build/engine/device.c). Here is what
happens seldom: listening, accepting one front-end at a time, and accepting the
next one when it has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from typing import Annotated, Any, Literal

from vhostblk.engine import SERIAL_SIZE, EngineError, ExportHandle, IOThread, NodeHandle, Stats
from vhostblk.export import Export
from vhostblk.export.limits import ExportLimits
from vhostblk.export.listener import Listener, SocketAddress, listen
from vhostblk.graph import BlockBackend
from vhostblk.nodes.driver import NodeDriver, Perm
from vhostblk.objects.iothread import IOThreadObject
from vhostblk.objects.throttle_group import ThrottleGroup
from vhostblk.ratelimit import RateLimitedLog
from vhostblk.schema import Identifier, Model, OnOff, StrOrList, UInt32, VhostblkError, in_range

logger = logging.getLogger(__name__)

SECTOR = 512
MAX_QUEUES = 256
# QEMU asks for one queue per vCPU, and fails to start if fewer are offered. One that is offered
# and not used costs 4 KiB while somebody is connected.
DEFAULT_QUEUES = MAX_QUEUES
_ACCEPT_RETRY = 0.5


class VhostUserBlkOptions(Model):
    """Options of a vhost-user-blk export."""

    type: Literal["vhost-user-blk"]
    id: Identifier
    """Name of the export."""
    node_name: str
    """The node to export."""
    addr: SocketAddress
    """Where front-ends connect."""
    writable: OnOff = False
    """Whether the guest may write."""
    writethrough: OnOff = False
    """Make every write durable, until the guest turns its write cache on."""
    logical_block_size: UInt32 = 512
    """The guest's sector size: a power of two from 512 to 32768."""
    num_queues: Annotated[int, in_range(1, MAX_QUEUES)] = DEFAULT_QUEUES
    """Virtqueues offered; a front-end uses as many of them as it likes."""
    serial: str = ""
    """Serial number that the guest sees; at most 20 bytes."""
    iothread: StrOrList | None = None
    """I/O thread, or several that share the virtqueues; the default one if absent."""
    fixed_iothread: OnOff = False
    """Accepted for QEMU's sake: an export always stays on its I/O threads."""
    share_rw: OnOff = False
    """Let others write to the node too; the guest must be prepared for that."""
    throttle_group: str | None = None
    """Id of a throttle-group object whose limits hold for this export."""


class VhostUserBlkExport(Export):
    """One vhost-user-blk device: a socket, and whoever is connected to it."""

    export_type = "vhost-user-blk"
    Options = VhostUserBlkOptions
    options: VhostUserBlkOptions

    @property
    def _user(self) -> str:
        """Who uses an object, for messages."""
        return f"export '{self.id}'"

    # ---- life

    async def open(self) -> None:
        self._log = RateLimitedLog(logger)
        self._connected = False
        self._releasing = contextlib.ExitStack()
        self._gone: asyncio.Future[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._listener: Listener | None = None
        self._limits: ExportLimits | None = None
        self._draining = False
        self._check_options()
        root = self.graph.node(self.options.node_name)
        if self.options.writable and root.read_only:
            raise VhostblkError(
                f"Cannot export read-only node '{root.name}' as writable",
                data={"code": "read-only", "node": root.name, "hint": "use writable=off"},
            )
        self._thread_objects = self._find_iothreads()
        group = self._find_group(self.options.throttle_group)
        threads = [entry.thread for entry in self._thread_objects]
        backend = BlockBackend(
            self.graph, self.id, root, perm=self._perm(), shared=self._shared(), what="export"
        )
        self.graph.attach(backend)
        try:
            self._handle = self._new_device(backend, threads)
            try:
                self._limits = self._new_limits(group)
                backend.attach(self)
                self._listener = listen(self.options.addr)
            except BaseException:
                self._free()
                raise
        except BaseException:
            self.graph.detach(backend)
            raise
        self.backend = backend
        if not _capacity(root.size):
            logger.warning(
                "export '%s': node '%s' is empty: the guest sees a disk of 0 bytes",
                self.id,
                root.name,
            )
        for entry in self._thread_objects:
            entry.users.append(self._user)
        self._start_accepting()

    async def close(self) -> None:
        self.shutting_down = True
        assert self._listener is not None and self.backend is not None
        self._stop_accepting()
        self._listener.close()
        with self.graph.releasing([self.backend]):
            if self._connected:
                self._gone = self.engine.loop.create_future()
                self._handle.disconnect()
                await asyncio.shield(self._gone)
        self.graph.detach(self.backend)
        self._free()
        for entry in self._thread_objects:
            entry.users.remove(self._user)

    def _free(self) -> None:
        self._handle.free()
        if self._limits is not None:
            self._limits.close()
            self._limits = None

    def _check_options(self) -> None:
        size = self.options.logical_block_size
        if not SECTOR <= size <= 32768 or size & (size - 1):
            raise _bad("logical-block-size", f"a power of two from {SECTOR} to 32768", size)
        serial = self.options.serial
        if not serial.isascii() or not serial.isprintable() or len(serial) > SERIAL_SIZE:
            raise _bad("serial", f"at most {SERIAL_SIZE} printable ASCII characters", serial)

    def _find_iothreads(self) -> list[IOThreadObject]:
        wanted = self.options.iothread
        names = [] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
        found: list[IOThreadObject] = []
        for name in names:
            entry = self.objects.find(name, IOThreadObject)
            if entry in found:
                raise _bad("iothread", "each I/O thread once", name)
            found.append(entry)
        return found

    def _new_device(self, backend: BlockBackend, threads: list[IOThread]) -> ExportHandle:
        try:
            handle = self.engine.new_export(
                self.id,
                capacity=_capacity(backend.root.size),
                iothreads=threads or [self.engine.default_iothread],
                logical_block_size=self.options.logical_block_size,
                num_queues=self.options.num_queues,
                writable=self.options.writable,
                writethrough=self.options.writethrough,
                serial=self.options.serial,
            )
        except EngineError as error:
            raise VhostblkError(
                f"Export '{self.id}' cannot be made: {error.strerror}",
                data={"code": "export-failed", "export": self.id},
            ) from None
        handle.on_connected = self._on_connected
        handle.on_disconnected = self._on_disconnected
        handle.on_writeback = self._on_writeback
        handle.on_draining = self._on_draining
        handle.on_unrecorded = self._on_unrecorded
        return handle

    def _perm(self) -> Perm:
        return Perm.CONSISTENT_READ | (Perm.WRITE if self.options.writable else Perm.NONE)

    def _shared(self) -> Perm:
        """As a disk of QEMU's own: others may look at it and resize it, but not write to it."""
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED | Perm.RESIZE
        return shared | Perm.WRITE if self.options.share_rw else shared

    # ---- connections

    def _start_accepting(self) -> None:
        assert self._listener is not None
        if not self._listener.exhausted:
            self.engine.loop.add_reader(self._listener.socket.fileno(), self._accept)

    def _stop_accepting(self) -> None:
        assert self._listener is not None
        if self._listener.socket.fileno() >= 0:
            self.engine.loop.remove_reader(self._listener.socket.fileno())
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _accept(self) -> None:
        """Take one front-end; the next one waits in the backlog until that has gone."""
        assert self._listener is not None
        try:
            sock = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors, mostly: others will be closed.
            self._log.log(logging.ERROR, "export '%s': cannot accept: %s", self.id, error.strerror)
            self._stop_accepting()
            self._retry = self.engine.loop.call_later(_ACCEPT_RETRY, self._start_accepting)
            return
        sock.setblocking(True)
        self._stop_accepting()
        self._connected = True
        try:
            self._handle.connect(sock.detach())
        except EngineError as error:
            self._connected = False
            self._log.log(logging.ERROR, "export '%s': %s", self.id, error.strerror)
            delay = _ACCEPT_RETRY if error.errno != errno.EBUSY else 0.05
            self._retry = self.engine.loop.call_later(delay, self._start_accepting)

    def _on_connected(self) -> None:
        logger.debug("export '%s': front-end has started", self.id)
        self.events.emit("VHOSTBLK_EXPORT_CONNECTED", {"id": self.id})

    def _on_disconnected(self, ret: int, reason: str) -> None:
        self._connected = False
        self._releasing.close()
        assert self._listener is not None
        if self._listener.exhausted:
            self._listener.close()
        data: dict[str, Any] = {"id": self.id}
        if ret < 0:
            data["reason"] = reason
            self._log.log(logging.WARNING, "export '%s': connection dropped: %s", self.id, reason)
        else:
            logger.debug("export '%s': front-end has gone", self.id)
        self.events.emit("VHOSTBLK_EXPORT_DISCONNECTED", data)
        if self._gone is not None:
            self._gone.set_result(None)
        elif not self.shutting_down:
            self._start_accepting()

    def _on_writeback(self, writeback: bool) -> None:
        logger.debug("export '%s': write cache %s", self.id, "on" if writeback else "off")

    def _on_draining(self, draining: bool) -> None:
        """A VM is being stopped, and QEMU hangs until the requests in flight are done."""
        self._releasing.close()
        if draining and self.backend is not None:
            self._releasing.enter_context(self.graph.releasing([self.backend]))

    def _on_unrecorded(self, queue: int) -> None:
        self._log.log(
            logging.WARNING,
            "export '%s': the front-end's record of requests in flight is too small for queue %d: "
            "if this process is killed, requests in flight may be lost; restart the VM to get a "
            "larger one",
            self.id,
            queue,
        )

    # ---- what the graph asks (graph.Device)

    def pause(self) -> asyncio.Future[None]:
        """Done when nothing is in flight."""
        return self._handle.pause()

    def resume(self) -> None:
        """Undo one pause()."""
        self._handle.resume()

    def set_root(self, node: NodeHandle) -> None:
        """Where requests enter."""
        self._root = node
        self._handle.set_root(node if self._limits is None else self._limits.above(node))

    def set_capacity(self, size: int) -> None:
        """The drive has another size now."""
        self._handle.set_capacity(_capacity(size))

    def drain_begin(self) -> None:
        """Nothing waits for the limits of the export's group."""
        self._draining = True
        if self._limits is not None:
            self._limits.drain(True)

    def drain_end(self) -> None:
        """The end of that."""
        self._draining = False
        if self._limits is not None:
            self._limits.drain(False)

    # ---- limits

    def _find_group(self, id: str | None) -> ThrottleGroup | None:
        return None if id is None else self.objects.find(id, ThrottleGroup)

    def _new_limits(self, group: ThrottleGroup | None) -> ExportLimits | None:
        if group is None:
            return None
        limits = ExportLimits(self.engine, group, self._user)
        limits.drain(self._draining)
        return limits

    async def set_throttle_group(self, id: str | None) -> None:
        group = self._find_group(id)
        assert self.backend is not None
        async with self.graph.drained([], [self.backend]):
            old, self._limits = self._limits, self._new_limits(group)
            self.set_root(self._root)
            if old is not None:
                old.close()
        self.options = self.options.model_copy(update={"throttle_group": id})

    # ---- what clients ask

    @property
    def finished(self) -> bool:
        return self._listener is not None and self._listener.exhausted and not self._connected

    @property
    def in_use(self) -> bool:
        return self._connected

    def stats(self) -> Stats:
        return self._handle.stats()

    def state_options(self, root: NodeDriver) -> dict[str, Any]:
        options = super().state_options(root)
        return {**options, "addr": _absolute(options["addr"])}

    def describe(self) -> dict[str, Any]:
        info = self._handle.info()
        assert self.backend is not None
        limits = {} if self._limits is None else {"throttle-group": self._limits.group.id}
        return {
            "id": self.id,
            "type": self.export_type,
            "node-name": self.backend.root.name,
            "shutting-down": self.shutting_down,
            "addr": _absolute(self.options.addr.model_dump(by_alias=True, exclude_none=True)),
            "writable": self.options.writable,
            "size": _capacity(self.backend.root.size),
            "logical-block-size": self.options.logical_block_size,
            "num-queues": self.options.num_queues,
            "serial": self.options.serial,
            **limits,
            "iothreads": [entry.id for entry in self._thread_objects] or ["default"],
            "connected": self._connected,
            "writeback": info.writeback,
            "features": info.features,
            "protocol-features": info.protocol_features,
            "queues-started": info.queues_started,
            "memory-regions": info.memory_regions,
            "inflight": info.inflight,
            "resubmitted": info.resubmitted,
            "connections": info.connections,
            "broken-connections": info.broken,
            "unsupported-requests": info.unsupported,
        }


def _absolute(addr: dict[str, Any]) -> dict[str, Any]:
    """The address as it is understood in any directory."""
    return {**addr, "path": os.path.abspath(addr["path"])} if "path" in addr else addr


def _capacity(size: int) -> int:
    """A guest's disk consists of whole sectors."""
    return size // SECTOR * SECTOR


def _bad(parameter: str, expected: str, value: object) -> VhostblkError:
    return VhostblkError(
        f"Parameter '{parameter}' expects {expected}, not '{value}'",
        data={"code": "bad-value", "parameter": parameter},
    )
