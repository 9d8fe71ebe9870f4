# SPDX-License-Identifier: GPL-2.0-or-later
"""Random hostile sessions: what a front-end and a guest might say, and worse.

A session is a sensible script (negotiate, share memory, start rings, do I/O, stop)
that is then damaged: messages lose bytes, change numbers, come twice, in another
order, with other descriptors; rings and tables are written with numbers that have
broken programs before. Everything comes from one `random.Random`, so a seed is a
session, and hypothesis can shrink one.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from frontend import Channel, Device, Disconnected, Message
from frontend.protocol import (
    HEADER,
    REQUEST_HEADER,
    Flag,
    config_space,
    inflight_description,
    u64,
    vring_state,
)
from frontend.virtqueue import DESC

QUEUE_SIZES = (1, 2, 4, 16, 128, 1024)


def interesting(rng: Random, bits: int) -> int:
    """A number at which something might go wrong."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randrange(5)
    if kind == 1:
        return (1 << bits) - 1 - rng.randrange(20)
    if kind == 2:
        return ((1 << rng.randrange(bits)) + rng.randrange(-2, 3)) % (1 << bits)
    if kind == 3:
        return (rng.randrange(16) * 4096 + rng.randrange(-17, 18)) % (1 << bits)
    if kind == 4:
        return rng.choice((15, 16, 17, 127, 128, 129, 255, 256, 511, 512, 1024, 65535)) % (
            1 << bits
        )
    return rng.randrange(1 << bits)


# ---- messages


@dataclass
class Step:
    """A message, or something the guest does."""

    message: int = 0
    payload: bytes = b""
    fds: Sequence[int] = ()
    act: Callable[[], None] | None = None


def damage(rng: Random, payload: bytes) -> bytes:
    """The payload with one thing wrong."""
    data = bytearray(payload)
    kind = rng.randrange(5)
    if kind == 0 and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1 and len(data) >= 4:
        at = rng.randrange(0, len(data) - 3, 4)
        struct.pack_into("<I", data, at, interesting(rng, 32))
    elif kind == 2 and len(data) >= 8:
        at = rng.randrange(0, len(data) - 7, 8)
        struct.pack_into("<Q", data, at, interesting(rng, 64))
    elif kind == 3:
        del data[rng.randrange(len(data) + 1) :]
    else:
        data += rng.randbytes(rng.choice((1, 4, 8, 32, 300)))
    return bytes(data)


class Session:
    """One connection from beginning to end."""

    def __init__(self, rng: Random, path: str) -> None:
        self.rng = rng
        self.rate = rng.choice((0, 0, 0.01, 0.05, 0.2))  # of messages that are damaged
        self.device = Device(path, queues=rng.randrange(1, 3), queue_size=rng.choice(QUEUE_SIZES))
        self.spare = os.memfd_create("spare")
        os.ftruncate(self.spare, rng.choice((0, 4096, 1 << 20, 1 << 20)))
        self.others: list[socket.socket] = []
        self.channel: Channel | None = None

    def run(self) -> None:
        """Until the script ends or the back-end hangs up."""
        device = self.device
        try:
            self.channel = device._channel = Channel.connect(device.path)
            device.make_queues()
            device.inflight = None
            with suppress(Disconnected, BlockingIOError, MemoryError):
                for step in self._shuffled():
                    self._take(step)
                self._drain(wait=0.002)
        finally:
            os.close(self.spare)
            for sock in self.others:
                sock.close()
            device.close()

    # ---- the sensible script

    def _script(self) -> Iterator[Step]:
        rng, device = self.rng, self.device
        features = 0x1_7000_7E40 & ~(1 << 26) | rng.getrandbits(64) & 1 << 26
        yield Step(Message.GET_FEATURES)
        yield Step(Message.GET_PROTOCOL_FEATURES)
        yield Step(Message.SET_PROTOCOL_FEATURES, u64(0x922B))
        yield Step(Message.GET_QUEUE_NUM)
        yield Step(Message.GET_MAX_MEM_SLOTS)
        yield Step(Message.SET_OWNER)
        ours, theirs = socket.socketpair()
        self.others += [ours, theirs]
        yield Step(Message.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        yield Step(Message.GET_CONFIG, config_space(0, 60))
        yield Step(Message.SET_CONFIG, config_space(32, 1, 0, b"\1"))
        if rng.randrange(2):
            yield from self._inflight()
        yield Step(Message.SET_FEATURES, u64(features))
        if rng.randrange(2):
            payload, fds = device.memory.table()
            yield Step(Message.SET_MEM_TABLE, payload, fds)
        else:
            for region in device.memory.regions:
                yield Step(Message.ADD_MEM_REG, bytes(8) + region.payload(), [region.fd])
        if rng.randrange(3) == 0:
            os.ftruncate(self.spare, 1 << 20)
            yield Step(Message.SET_LOG_BASE, struct.pack("<QQ", 4096, 0), [self.spare])
        yield from self._start()
        for _ in range(rng.randrange(1, 6)):
            yield from self._life()
        if rng.randrange(2):
            yield from self._stop()
            yield from self._start()
            yield from self._life()

    def _inflight(self) -> Iterator[Step]:
        device = self.device
        counts = (device.num_queues, device.queue_size)
        yield Step(Message.GET_INFLIGHT_FD, inflight_description(0, 0, *counts))
        size = counts[0] * (-(-(16 + 16 * counts[1]) // 64) * 64)
        os.ftruncate(self.spare, 1 << 20)
        if self.rng.randrange(2):
            os.pwrite(self.spare, self.rng.randbytes(size), 0)
        elif self.rng.randrange(2):
            os.pwrite(self.spare, struct.pack("<QHHHH", 0, 1, counts[1], 0, 0), 0)
        description = inflight_description(size, 0, *counts)
        yield Step(Message.SET_INFLIGHT_FD, description, [self.spare])

    def _start(self) -> Iterator[Step]:
        device = self.device
        for queue in device.queues:
            yield Step(Message.SET_VRING_NUM, vring_state(queue.index, queue.size))
            yield Step(Message.SET_VRING_BASE, vring_state(queue.index, queue.base))
            yield Step(Message.SET_VRING_ADDR, device.ring_address(queue))
            yield Step(Message.SET_VRING_ERR, u64(queue.index), [queue.err_fd])
            yield Step(Message.SET_VRING_KICK, u64(queue.index), [queue.kick_fd])
            yield Step(Message.SET_VRING_CALL, u64(queue.index), [queue.call_fd])
            yield Step(Message.SET_VRING_ENABLE, vring_state(queue.index, 1))

    def _stop(self) -> Iterator[Step]:
        for queue in self.device.queues:
            yield Step(Message.GET_VRING_BASE, vring_state(queue.index, 0))

    def _life(self) -> Iterator[Step]:
        """Something that happens while the rings run."""
        rng, device = self.rng, self.device
        kind = rng.randrange(12)
        if kind < 4:
            yield Step(act=self._requests)
        elif kind < 7:
            yield Step(act=self._broken_chain)
        elif kind == 7:
            yield Step(act=self._scribble)
        elif kind == 8:
            region = rng.choice(device.memory.regions)
            yield Step(Message.REM_MEM_REG, bytes(8) + region.payload())
            yield Step(act=self._requests)
            yield Step(Message.ADD_MEM_REG, bytes(8) + region.payload(), [region.fd])
        elif kind == 9:
            yield Step(Message.GET_CONFIG, config_space(0, 60))
            yield Step(Message.SET_VRING_ENABLE, vring_state(0, rng.randrange(2)))
        elif kind == 10:
            yield Step(rng.randrange(50), rng.randbytes(rng.randrange(64)))
        else:
            payload, fds = device.memory.table()
            yield Step(Message.SET_MEM_TABLE, payload, fds)

    # ---- the damage

    def _shuffled(self) -> Iterator[Step]:
        rng = self.rng
        held: Step | None = None
        for step in self._script():
            if rng.random() < self.rate / 4:
                kind = rng.randrange(3)
                if kind == 0:  # lost
                    continue
                if kind == 1:  # twice
                    yield step
                elif held is None:  # late
                    held = step
                    continue
            yield step
            if held is not None and rng.randrange(2):
                yield held
                held = None

    def _take(self, step: Step) -> None:
        rng = self.rng
        if step.act is not None:
            step.act()
            return
        message, payload, fds = step.message, step.payload, list(step.fds)
        flags = Flag.VERSION | (Flag.NEED_REPLY if rng.randrange(4) == 0 else 0)
        size: int | None = None
        if rng.random() < self.rate:
            kind = rng.randrange(8)
            if kind == 0:
                fds = [self.spare] * rng.choice((0, 1, 2, 8))
            elif kind == 1:
                size = interesting(rng, 32) if rng.randrange(2) else len(payload) + rng.randrange(9)
            elif kind == 2:
                message = interesting(rng, 32) if rng.randrange(2) else rng.randrange(50)
            elif kind == 3:
                flags = Flag(interesting(rng, 4))
            else:
                payload = damage(rng, payload)
        self._send(message, payload, fds, int(flags), size)
        self._drain()

    def _send(
        self, message: int, payload: bytes, fds: list[int], flags: int, size: int | None
    ) -> None:
        assert self.channel is not None
        length = len(payload) if size is None else size
        data = HEADER.pack(message, flags, length) + payload
        if self.rng.randrange(10):
            self.channel.send_bytes(data, fds)
            return
        cut = self.rng.randrange(1, len(data))  # in two pieces
        self.channel.send_bytes(data[:cut], fds)
        self.channel.send_bytes(data[cut:])

    def _drain(self, wait: float = 0.0) -> None:
        """Throw the answers away."""
        assert self.channel is not None
        sock = self.channel.sock
        while select.select([sock], [], [], wait)[0]:
            try:
                data, fds, _, _ = socket.recv_fds(sock, 65536, 16)
            except ConnectionResetError as error:
                raise Disconnected from error
            for fd in fds:
                os.close(fd)
            if not data:
                raise Disconnected

    # ---- the guest

    def _gpa(self) -> int:
        """Often inside memory, often near an end of it."""
        rng = self.rng
        if rng.randrange(4) == 0:
            return interesting(rng, 64)
        region = rng.choice(self.device.memory.regions)
        if rng.randrange(2):
            return (region.gpa + region.size - rng.randrange(1, 5000)) % (1 << 64)
        return region.gpa + rng.randrange(region.size)

    def _requests(self) -> None:
        """Good requests, as many as fit."""
        rng, device = self.rng, self.device
        for _ in range(rng.randrange(1, 8)):
            queue = rng.randrange(len(device.queues))
            ring = device.queues[queue]
            if len(ring.free) < 4:  # the used ring is not looked at: it may be nonsense
                ring.free = list(range(ring.size))
            type_ = rng.choice((0, 0, 1, 1, 4, 8, 11, 13, 99))
            data = rng.randbytes(rng.choice((0, 16, 32, 512, 4096)))
            length = rng.choice((0, 20, 512, 4096, 8192))
            indirect = rng.choice((None, 0, 1))
            device.submit(
                type_,
                rng.choice((0, 8, interesting(rng, 64))),
                data,
                length=length,
                queue=queue,
                indirect_from=indirect,
            )

    def _entry(self, index: int, last: bool) -> bytes:
        rng, device = self.rng, self.device
        kind = rng.randrange(8)
        writable = 2 if last else 0
        if index == 0 and kind:
            gpa = device.memory.alloc(16)
            header = REQUEST_HEADER.pack(rng.choice((0, 1, 4, 8, 11, 13)), 0, interesting(rng, 64))
            device.memory.write(gpa, header)
            length, flags = 16, 1
        else:
            gpa = self._gpa()
            length = rng.choice((1, 16, 512, 4096, interesting(rng, 32)))
            flags = writable | (0 if last else 1)
        if kind == 1:
            flags = rng.randrange(8)
        following = index + 1 if kind != 2 else interesting(rng, 16)
        return DESC.pack(gpa, length, flags, following & 0xFFFF)

    def _broken_chain(self) -> None:
        """A table of descriptors, some of them wrong, in the ring or behind an indirect one."""
        rng, device = self.rng, self.device
        queue = rng.choice(device.queues)
        count = rng.randrange(1, 6)
        table = b"".join(self._entry(n, n == count - 1) for n in range(count))
        memory = device.memory
        with suppress(ValueError, MemoryError):
            if rng.randrange(2):
                at = self._gpa() if rng.randrange(3) == 0 else memory.alloc(len(table))
                memory.write(at, table)
                length = interesting(rng, 32) if rng.randrange(5) == 0 else len(table)
                table = DESC.pack(at, length, rng.choice((4, 4, 4, 5, 6)), rng.randrange(4))
            memory.write(queue.desc, table[: 16 * queue.size])
        queue.publish(interesting(rng, 16) if rng.randrange(8) == 0 else 0)
        if rng.randrange(8) == 0:
            memory.set16(queue.avail + 2, interesting(rng, 16))
        queue.kick()

    def _scribble(self) -> None:
        """Over rings, in-flight area and log, while the device works; or cut memory off."""
        rng, device = self.rng, self.device
        queue = rng.choice(device.queues)
        device.submit(0, length=512, queue=queue.index)
        kind = rng.randrange(4)
        if kind == 0:
            device.memory.write(queue.desc, rng.randbytes(64))
        elif kind == 1:
            device.memory.write(queue.avail, rng.randbytes(8))
        elif kind == 2:
            os.pwrite(self.spare, rng.randbytes(4096), 0)
        else:
            os.ftruncate(self.spare, rng.choice((0, 1, 100)))
        queue.kick()
