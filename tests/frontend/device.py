# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtio-blk device used through vhost-user: connection, queues, requests."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self, TypedDict, Unpack

from .inflight import InflightArea
from .memory import PAGE, GuestMemory, Region
from .protocol import (
    DISCARD_SEGMENT,
    DISCARD_UNMAP,
    NO_STATUS,
    REQUEST_HEADER,
    VRING_F_LOG,
    Channel,
    Disconnected,
    Feature,
    Flag,
    Message,
    ProtocolFeature,
    Status,
    Type,
    bits,
    config_space,
    inflight_description,
    u64,
    vring_address,
    vring_state,
)
from .virtqueue import Segment, Used, Virtqueue

SECTOR = 512

WANTED = ~bits(Feature.LOG_ALL, Feature.NOTIFY_ON_EMPTY, Feature.IOMMU_PLATFORM)
WANTED_PROTOCOL = bits(
    ProtocolFeature.MQ,
    ProtocolFeature.LOG_SHMFD,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.INFLIGHT_SHMFD,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
)


class BlockError(Exception):
    """A request came back with another status than OK."""

    def __init__(self, status: int) -> None:
        super().__init__(f"virtio-blk status {status}")
        self.status = status


class Config(NamedTuple):
    """struct virtio_blk_config up to write_zeroes_may_unmap."""

    capacity: int
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    wce: int
    unused0: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int


CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
CONFIG_WCE_OFFSET = 32


@dataclass(eq=False)
class Request:
    """A request in the ring; `out` and `in_` are guest addresses of its two halves."""

    memory: GuestMemory
    queue: Virtqueue
    head: int
    out: int
    out_length: int
    in_: int
    in_length: int
    done: bool = False
    used_length: int = 0
    result: bytes = field(default=b"", repr=False)

    @property
    def status(self) -> int:
        """The last byte the device may write. Still NO_STATUS: it did not."""
        if self.done:
            return self.result[-1]
        return self.memory.read(self.in_ + self.in_length - 1, 1)[0]

    @property
    def data(self) -> bytes:
        """What the device wrote before the status."""
        return self.result[:-1]


class Layout(TypedDict, total=False):
    """How prepare() lays out a request."""

    length: int
    queue: int
    out_split: Sequence[int] | None
    in_split: Sequence[int] | None
    indirect_from: int | None
    out_at: int | None
    in_at: int | None
    ioprio: int


def split(total: int, sizes: Sequence[int] | None, gpa: int, *, writable: bool) -> list[Segment]:
    """Cut `total` bytes at `gpa` into segments of `sizes`, the last takes what is left."""
    segments = []
    for size in sizes or ():
        assert 0 < size <= total, "the cuts do not fit"
        segments.append(Segment(gpa, size, writable))
        gpa += size
        total -= size
    if total:
        segments.append(Segment(gpa, total, writable))
    return segments


class Device:
    """See the package's docstring; `with` starts the queues and hangs up at the end."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queues: int = 1,
        queue_size: int = 128,
        features: int = WANTED,
        protocol_features: int = WANTED_PROTOCOL,
        memory: GuestMemory | None = None,
        base: int = 0,
        inflight_size: int | None = None,
        timeout: float = 30,
    ) -> None:
        self.path = path
        self.num_queues = queues
        self.queue_size = queue_size
        self.wanted = features
        self.wanted_protocol = protocol_features
        self.memory = memory or GuestMemory()
        self.base = base
        self.inflight_size = inflight_size  # ring size in messages about the area, if another
        self.timeout = timeout
        self.offered = 0
        self.offered_protocol = 0
        self.features = 0
        self.protocol_features = 0
        self.queues: list[Virtqueue] = []
        self.pending: list[Request] = []
        self.inflight: InflightArea | None = None
        self.log: Region | None = None
        self.shared: list[Region] = []  # by slots, on this connection
        self.backend_channel: Channel | None = None
        self._channel: Channel | None = None

    # ---- life

    def __enter__(self) -> Self:
        try:
            self.connect()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def channel(self) -> Channel:
        assert self._channel is not None, "not connected"
        return self._channel

    def disconnect(self) -> None:
        """Hang up; memory, rings and the in-flight area stay."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.backend_channel is not None:
            self.backend_channel.close()
            self.backend_channel = None

    def close(self) -> None:
        self.disconnect()
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None
        if self.log is not None:
            self.log.close()
            self.log = None
        self.memory.close()

    # ---- negotiation

    def has(self, feature: int) -> bool:
        return bool(self.features >> feature & 1)

    def has_protocol(self, feature: int) -> bool:
        return bool(self.protocol_features >> feature & 1)

    def connect(self, sock: socket.socket | None = None) -> None:
        """Connect, unless `sock` already is, and negotiate, in the order QEMU does it."""
        self.shared = []
        if sock is not None:
            self._channel = Channel(sock, self.timeout)
        else:
            self._channel = Channel.connect(self.path, self.timeout)
        self.negotiate()

    def negotiate(self) -> None:
        channel = self.channel
        self.offered = channel.ask_u64(Message.GET_FEATURES)
        if self.offered >> Feature.PROTOCOL_FEATURES & 1:
            self.offered_protocol = channel.ask_u64(Message.GET_PROTOCOL_FEATURES)
            self.protocol_features = self.offered_protocol & self.wanted_protocol
            channel.send(Message.SET_PROTOCOL_FEATURES, u64(self.protocol_features))
        channel.send(Message.SET_OWNER)
        self.features = self.offered & self.wanted
        if self.has_protocol(ProtocolFeature.BACKEND_REQ):
            ours, theirs = socket.socketpair()
            with theirs:
                self.tell(Message.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            self.backend_channel = Channel(ours, self.timeout)

    def tell(self, message: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message without a reply of its own; with REPLY_ACK it must succeed."""
        if self.has_protocol(ProtocolFeature.REPLY_ACK):
            verdict = self.channel.acknowledged(message, payload, fds)
            assert verdict == 0, f"message {message} was refused with {verdict}"
        else:
            self.channel.send(message, payload, fds)

    def queue_num(self) -> int:
        return self.channel.ask_u64(Message.GET_QUEUE_NUM)

    def config(self) -> Config:
        return Config(*CONFIG.unpack(self.config_bytes(0, CONFIG.size)))

    def config_bytes(self, offset: int, size: int) -> bytes:
        reply = self.channel.ask(Message.GET_CONFIG, config_space(offset, size))
        assert len(reply) == 12 + size, "GET_CONFIG was refused"
        return reply[12:]

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.tell(Message.SET_CONFIG, config_space(offset, len(data), flags, data))

    @property
    def writeback(self) -> bool:
        return bool(self.config().wce)

    # ---- start and stop

    def start(self) -> None:
        """From negotiated to serving; also after a reconnect, with the rings as they are."""
        self.start_device()
        if not self.queues:
            self.make_queues()
        for queue in self.queues:
            self.start_queue(queue)
        for queue in self.queues:
            self.enable_queue(queue)

    def start_device(self) -> None:
        """Everything that comes before the queues."""
        if self.has_protocol(ProtocolFeature.INFLIGHT_SHMFD):
            if self.inflight is None:
                self.get_inflight()
            self.set_inflight()
        self.set_features(self.features)
        self.share_memory()

    def set_features(self, features: int) -> None:
        self.features = features
        self.tell(Message.SET_FEATURES, u64(features))

    def make_queues(self) -> None:
        for index in range(self.num_queues):
            self.queues.append(
                Virtqueue(
                    self.memory,
                    index,
                    self.queue_size,
                    event_idx=self.has(Feature.RING_EVENT_IDX),
                    base=self.base,
                )
            )
        self.memory.keep()

    def share_memory(self) -> None:
        if self.has_protocol(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            for region in self.memory.regions:
                if region not in self.shared:
                    self.add_region(region)
        else:
            self.set_mem_table()

    def set_mem_table(self) -> None:
        payload, fds = self.memory.table()
        self.tell(Message.SET_MEM_TABLE, payload, fds)

    def add_region(self, region: Region) -> None:
        self.tell(Message.ADD_MEM_REG, bytes(8) + region.payload(), [region.fd])
        self.shared.append(region)

    def remove_region(self, region: Region) -> None:
        self.tell(Message.REM_MEM_REG, bytes(8) + region.payload())
        self.shared.remove(region)

    def get_inflight(self) -> InflightArea:
        told = self.inflight_size or self.queue_size
        self.channel.send(
            Message.GET_INFLIGHT_FD, inflight_description(0, 0, self.num_queues, told)
        )
        reply, fds = self.channel.receive_reply(Message.GET_INFLIGHT_FD)
        size, offset, queues, _ = struct.unpack_from("<QQHH", reply)
        assert len(fds) == 1 and queues == self.num_queues
        # Like QEMU: size and file are the back-end's, the rest is said as before.
        self.inflight = InflightArea(fds[0], size, queues, told, offset)
        return self.inflight

    def set_inflight(self) -> None:
        assert self.inflight is not None
        self.tell(Message.SET_INFLIGHT_FD, self.inflight.description(), [self.inflight.fd])

    def ring_address(self, queue: Virtqueue) -> bytes:
        uva = self.memory.uva
        logged = VRING_F_LOG if self.log is not None and self.has(Feature.LOG_ALL) else 0
        return vring_address(
            queue.index,
            uva(queue.desc),
            uva(queue.used),
            uva(queue.avail),
            flags=logged,
            log=queue.used,
        )

    def set_address(self, queue: Virtqueue) -> None:
        self.tell(Message.SET_VRING_ADDR, self.ring_address(queue))

    def set_kick(self, queue: Virtqueue) -> None:
        self.tell(Message.SET_VRING_KICK, u64(queue.index), [queue.kick_fd])

    def set_call(self, queue: Virtqueue) -> None:
        self.tell(Message.SET_VRING_CALL, u64(queue.index), [queue.call_fd])

    def start_queue(self, queue: Virtqueue) -> None:
        self.tell(Message.SET_VRING_NUM, vring_state(queue.index, queue.size))
        self.tell(Message.SET_VRING_BASE, vring_state(queue.index, queue.base))
        self.set_address(queue)
        self.tell(Message.SET_VRING_ERR, u64(queue.index), [queue.err_fd])
        self.set_kick(queue)
        self.set_call(queue)

    def enable_queue(self, queue: Virtqueue, enable: bool = True) -> None:
        self.tell(Message.SET_VRING_ENABLE, vring_state(queue.index, int(enable)))

    def stop_queue(self, queue: Virtqueue) -> int:
        """GET_VRING_BASE; the queue starts again from there."""
        reply = self.channel.ask(Message.GET_VRING_BASE, vring_state(queue.index, 0))
        index, base = struct.unpack("<II", reply)
        assert index == queue.index
        queue.base = base
        return int(base)

    def stop(self) -> None:
        for queue in self.queues:
            self.stop_queue(queue)

    def reset(self) -> None:
        """What a guest's reboot does: queues stop, and start empty."""
        self.stop()
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        self.pending.clear()
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None
        self.memory.reset()

    def reconnect(self) -> None:
        """Come back as QEMU does after the back-end went away without a word.

        Without a base from GET_VRING_BASE the rings go on at the used index; with
        an in-flight area the back-end knows better.
        """
        self.disconnect()
        self.connect()
        for queue in self.queues:
            queue.base = queue.used_idx
        self.start()

    # ---- migration

    def start_log(self, size: int = PAGE) -> None:
        """Give out a dirty log of `size` bytes and ask for logging."""
        self.log = Region(0, size, 0)
        payload = struct.pack("<QQ", size, 0)
        self.channel.send(Message.SET_LOG_BASE, payload, [self.log.fd])
        self.channel.receive_reply(Message.SET_LOG_BASE)
        self.set_features(self.features | bits(Feature.LOG_ALL))
        for queue in self.queues:
            self.set_address(queue)

    def dirty_pages(self) -> set[int]:
        """Take the numbers of the dirty pages out of the log."""
        assert self.log is not None
        content = bytes(self.log.bytes)
        self.log.bytes[:] = bytes(self.log.size)
        return {
            byte * 8 + bit
            for byte, value in enumerate(content)
            for bit in range(8)
            if value >> bit & 1
        }

    # ---- requests

    def prepare(
        self,
        type_: int,
        sector: int = 0,
        data: bytes = b"",
        *,
        length: int = 0,
        queue: int = 0,
        out_split: Sequence[int] | None = None,
        in_split: Sequence[int] | None = None,
        indirect_from: int | None = None,
        out_at: int | None = None,
        in_at: int | None = None,
        ioprio: int = 0,
    ) -> Request:
        """Chain a request without publishing it.

        `data` follows the header; the device may write `length` bytes and a
        status. Both halves lie contiguous in guest memory and are cut into
        descriptors at will: by default header | data and data | status.
        """
        ring = self.queues[queue]
        out = REQUEST_HEADER.pack(type_, ioprio, sector) + data
        if out_at is None:
            out_at = self.memory.alloc(len(out))
        if in_at is None:
            in_at = self.memory.alloc(length + 1)
        self.memory.write(out_at, out)
        self.memory.write(in_at + length, bytes([NO_STATUS]))
        if out_split is None:
            out_split = [REQUEST_HEADER.size]
        if in_split is None:
            in_split = [length] if length else []
        segments = split(len(out), out_split, out_at, writable=False)
        segments += split(length + 1, in_split, in_at, writable=True)
        head = ring.add(segments, indirect_from=indirect_from)
        request = Request(self.memory, ring, head, out_at, len(out), in_at, length + 1)
        self.pending.append(request)
        return request

    def publish(self, *requests: Request) -> None:
        """Make them available and kick, queue by queue."""
        for ring in self.queues:
            heads = [request.head for request in requests if request.queue is ring]
            if heads:
                ring.submit(*heads)

    def submit(
        self, type_: int, sector: int = 0, data: bytes = b"", **layout: Unpack[Layout]
    ) -> Request:
        """prepare() and publish()."""
        request = self.prepare(type_, sector, data, **layout)
        self.publish(request)
        return request

    def _finish(self, ring: Virtqueue, done: Sequence[Used]) -> None:
        for used in done:
            for request in self.pending:
                if request.queue is ring and request.head == used.head:
                    break
            else:
                continue  # a chain that a test made by hand
            request.result = self.memory.read(request.in_, request.in_length)
            request.used_length = used.length
            request.done = True
            self.pending.remove(request)
        if not self.pending:
            self.memory.release()

    def reap(self) -> None:
        """Take what is finished, without waiting for an interrupt."""
        for ring in self.queues:
            self._finish(ring, ring.reap())

    def wait(self, *requests: Request, timeout: float | None = None) -> None:
        """Until they are done, woken by interrupts alone."""
        for request in requests:
            while not request.done:
                ring = request.queue
                try:
                    done = ring.wait(timeout or self.timeout, self.channel.sock.fileno())
                except ConnectionResetError as error:
                    self._finish(ring, ring.reap())
                    if request.done:
                        break
                    raise Disconnected(str(error)) from error
                self._finish(ring, done)

    def settle(self, *, seconds: float) -> None:
        """Give the back-end time to do what it should not do."""
        select.select([], [], [], seconds)

    def run(self, type_: int, sector: int = 0, data: bytes = b"", *, length: int = 0) -> Request:
        """One request from beginning to end, whatever its status."""
        request = self.submit(type_, sector, data, length=length)
        self.wait(request)
        return request

    def checked(self, request: Request) -> Request:
        self.wait(request)
        if request.status != Status.OK:
            raise BlockError(request.status)
        return request

    # Offsets and lengths in bytes.

    def read(self, offset: int, length: int, queue: int = 0) -> bytes:
        request = self.submit(Type.IN, offset // SECTOR, length=length, queue=queue)
        return self.checked(request).data

    def write(self, offset: int, data: bytes, queue: int = 0) -> None:
        self.checked(self.submit(Type.OUT, offset // SECTOR, data, queue=queue))

    def flush(self, queue: int = 0) -> None:
        self.checked(self.submit(Type.FLUSH, queue=queue))

    def discard(self, *ranges: tuple[int, int], queue: int = 0) -> None:
        data = b"".join(DISCARD_SEGMENT.pack(at // SECTOR, n // SECTOR, 0) for at, n in ranges)
        self.checked(self.submit(Type.DISCARD, data=data, queue=queue))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        flags = DISCARD_UNMAP if unmap else 0
        data = DISCARD_SEGMENT.pack(offset // SECTOR, length // SECTOR, flags)
        self.checked(self.submit(Type.WRITE_ZEROES, data=data))

    def get_id(self) -> bytes:
        return self.checked(self.submit(Type.GET_ID, length=20)).data.rstrip(b"\0")

    # ---- the back-end's own messages

    def backend_message(self, timeout: float = 30) -> int:
        """The next request of the back-end, acknowledged if it asks for that."""
        assert self.backend_channel is not None
        self.backend_channel.sock.settimeout(timeout)
        request, flags, _, fds = self.backend_channel.receive()
        for fd in fds:
            os.close(fd)
        if flags & Flag.NEED_REPLY:
            self.backend_channel.send(request, u64(0), flags=Flag.VERSION | Flag.REPLY)
        return request
