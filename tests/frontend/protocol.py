# SPDX-License-Identifier: GPL-2.0-or-later
"""vhost-user messages and the numbers of virtio-blk."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag


class Message(IntEnum):
    """Requests of the front-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


BACKEND_CONFIG_CHANGE = 2


class Flag(IntFlag):
    """Header flags of a message."""

    VERSION = 1
    REPLY = 4
    NEED_REPLY = 8


class ProtocolFeature(IntEnum):
    """Bit numbers."""

    MQ = 0
    LOG_SHMFD = 1
    REPLY_ACK = 3
    BACKEND_REQ = 5
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15


class Feature(IntEnum):
    """Bit numbers: virtio-blk, the ring, and vhost."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    SECURE_ERASE = 16
    NOTIFY_ON_EMPTY = 24
    LOG_ALL = 26
    RING_INDIRECT_DESC = 28
    RING_EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32
    IOMMU_PLATFORM = 33
    RING_PACKED = 34


class Type(IntEnum):
    """Request types of virtio-blk."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class Status(IntEnum):
    OK = 0
    IOERR = 1
    UNSUPP = 2


NO_STATUS = 0xEE
"""What the front-end puts where the status goes, to see whether it was written."""

HEADER = struct.Struct("<III")
REQUEST_HEADER = struct.Struct("<IIQ")
DISCARD_SEGMENT = struct.Struct("<QII")
DISCARD_UNMAP = 1
MAX_FDS = 8

VRING_F_LOG = 1
VRING_NOFD = 0x100


def bits(*numbers: int) -> int:
    """The mask with these bit numbers set."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


class Disconnected(Exception):
    """The back-end has closed the connection."""


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def vring_state(index: int, num: int) -> bytes:
    return struct.pack("<II", index, num)


def vring_address(
    index: int, desc: int, used: int, avail: int, *, flags: int = 0, log: int = 0
) -> bytes:
    return struct.pack("<IIQQQQ", index, flags, desc, used, avail, log)


def config_space(offset: int, size: int, flags: int = 0, data: bytes = b"") -> bytes:
    return struct.pack("<III", offset, size, flags) + data.ljust(size, b"\0")


def inflight_description(mmap_size: int, offset: int, queues: int, queue_size: int) -> bytes:
    # A C structure on the wire, padding included, as QEMU and libvhost-user send it.
    return struct.pack("<QQHH4x", mmap_size, offset, queues, queue_size)


class Channel:
    """A vhost-user socket, seen by the front-end."""

    def __init__(self, sock: socket.socket, timeout: float = 30) -> None:
        self.sock = sock
        self.sock.settimeout(timeout)

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float = 30) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Python's own timeout makes connect() fail where the listener's queue is full.
        limit = struct.pack("ll", int(timeout) or 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout)

    def close(self) -> None:
        self.sock.close()

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Any bytes, any descriptors: the way to break the protocol."""
        try:
            sent = self._sendmsg(data, fds)
            if sent < len(data):
                self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Disconnected(str(error)) from error

    def _sendmsg(self, data: bytes, fds: Sequence[int]) -> int:
        ancillary = []
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return self.sock.sendmsg([data], ancillary)

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = Flag.VERSION,
        size: int | None = None,
    ) -> None:
        length = len(payload) if size is None else size
        self.send_bytes(HEADER.pack(request, flags, length) + payload, fds)

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        """The next message: request, flags, payload, file descriptors."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, HEADER.size, MAX_FDS)
            while 0 < len(data) < HEADER.size:
                more = self.sock.recv(HEADER.size - len(data))
                if not more:
                    break
                data += more
            if len(data) < HEADER.size:
                raise Disconnected("the back-end closed the connection")
            request, flags, size = HEADER.unpack(data)
            payload = b""
            while len(payload) < size:
                more = self.sock.recv(size - len(payload))
                if not more:
                    raise Disconnected("the back-end closed the connection inside a message")
                payload += more
        except ConnectionResetError as error:
            raise Disconnected(str(error)) from error
        return request, flags, payload, fds

    def receive_reply(self, request: int) -> tuple[bytes, list[int]]:
        got, flags, payload, fds = self.receive()
        assert got == request, f"reply to message {got}, not {request}"
        assert flags & Flag.REPLY and flags & 3 == 1, f"flags of a reply: {flags:#x}"
        return payload, fds

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message that has a reply of its own."""
        self.send(request, payload, fds)
        return self.receive_reply(request)[0]

    def ask_u64(self, request: int) -> int:
        payload = self.ask(request)
        assert len(payload) == 8
        return int.from_bytes(payload, "little")

    def acknowledged(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with NEED_REPLY; the back-end's verdict, 0 for success."""
        self.send(request, payload, fds, flags=Flag.VERSION | Flag.NEED_REPLY)
        reply, _ = self.receive_reply(request)
        assert len(reply) == 8
        return int.from_bytes(reply, "little")

    def wait_closed(self, timeout: float = 30) -> bool:
        """True once the back-end has hung up; whatever it still says is thrown away."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while poll.poll(timeout * 1000):
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 65536, MAX_FDS)
            except ConnectionResetError:
                return True
            for fd in fds:
                os.close(fd)
            if not data:
                return True
        return False
