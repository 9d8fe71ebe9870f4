# SPDX-License-Identifier: GPL-2.0-or-later
"""A split virtqueue, seen by the driver."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Sequence
from typing import NamedTuple

from .memory import PAGE, GuestMemory, barrier

DESC = struct.Struct("<QIHH")
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


class Segment(NamedTuple):
    """A piece of guest memory in a chain."""

    gpa: int
    length: int
    writable: bool = False


class Used(NamedTuple):
    """An entry of the used ring."""

    head: int
    length: int


class Virtqueue:
    """Rings in guest memory, a kick and a call eventfd.

    `base` is where the ring's indices start: a device that has been in use before.
    """

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        *,
        event_idx: bool = True,
        base: int = 0,
    ) -> None:
        self.memory = memory
        self.index = index
        self.size = size
        self.event_idx = event_idx
        self.base = base  # for SET_VRING_BASE
        self.desc = memory.alloc(16 * size, PAGE)
        self.avail = memory.alloc(6 + 2 * size, PAGE)
        self.used = memory.alloc(6 + 8 * size, PAGE)
        self.avail_idx = base
        self.last_used = base
        self.free = list(range(size - 1, -1, -1))
        self.chains: dict[int, list[int]] = {}
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicks = 0
        memory.write(self.desc, bytes(16 * size))
        memory.write(self.avail, bytes(6 + 2 * size))
        memory.write(self.used, bytes(6 + 8 * size))
        memory.set16(self.avail + 2, base)
        memory.set16(self.used + 2, base)
        self.allow_interrupts()

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)
        os.close(self.err_fd)

    # ---- descriptors

    def set_descriptor(
        self, index: int, gpa: int, length: int, flags: int = 0, next_: int = 0
    ) -> None:
        """Write one descriptor as it is, right or wrong."""
        self.memory.write(self.desc + 16 * index, DESC.pack(gpa, length, flags, next_))

    def table(self, segments: Sequence[Segment], *, first: int = 0) -> bytes:
        """A table that chains the segments, for an indirect descriptor."""
        entries = []
        for number, segment in enumerate(segments):
            last = number == len(segments) - 1
            flags = (DESC_F_WRITE if segment.writable else 0) | (0 if last else DESC_F_NEXT)
            following = 0 if last else first + number + 1
            entries.append(DESC.pack(segment.gpa, segment.length, flags, following))
        return b"".join(entries)

    def add(self, segments: Sequence[Segment], *, indirect_from: int | None = None) -> int:
        """Chain the segments without publishing them; the head descriptor.

        From segment `indirect_from` on they go into an indirect table.
        """
        direct = list(segments if indirect_from is None else segments[:indirect_from])
        table = None
        if indirect_from is not None:
            content = self.table(segments[indirect_from:])
            table = Segment(self.memory.alloc(len(content)), len(content))
            self.memory.write(table.gpa, content)
        count = len(direct) + (table is not None)
        if len(self.free) < count:
            raise BlockingIOError("no free descriptors")
        chain = [self.free.pop() for _ in range(count)]
        for position, segment in enumerate(direct):
            last = position == count - 1
            flags = (DESC_F_WRITE if segment.writable else 0) | (0 if last else DESC_F_NEXT)
            following = 0 if last else chain[position + 1]
            self.set_descriptor(chain[position], segment.gpa, segment.length, flags, following)
        if table is not None:
            self.set_descriptor(chain[-1], table.gpa, table.length, DESC_F_INDIRECT)
        self.chains[chain[0]] = chain
        return chain[0]

    # ---- the available ring

    def publish(self, *heads: int) -> None:
        """Make the chains available, all at once."""
        for head in heads:
            self.memory.set16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        barrier()
        self.memory.set16(self.avail + 2, self.avail_idx)

    def kick_wanted(self, before: int) -> bool:
        """Whether the device asks for a kick, now that avail idx went on from `before`."""
        barrier()
        if not self.event_idx:
            return not self.memory.get16(self.used) & USED_F_NO_NOTIFY
        event = self.memory.get16(self.used + 4 + 8 * self.size)
        return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - before) & 0xFFFF

    def kick(self) -> None:
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)

    def submit(self, *heads: int) -> None:
        """Publish, and kick if the device wants it."""
        before = self.avail_idx
        self.publish(*heads)
        if self.kick_wanted(before):
            self.kick()

    # ---- the used ring

    @property
    def used_idx(self) -> int:
        return self.memory.get16(self.used + 2)

    def reap(self) -> list[Used]:
        """Take what the device has finished; its descriptors are free again."""
        done = []
        end = self.used_idx
        barrier()
        while self.last_used != end:
            slot = self.used + 4 + 8 * (self.last_used % self.size)
            head, length = struct.unpack("<II", self.memory.read(slot, 8))
            assert head in self.chains, f"used ring names descriptor {head}, not available"
            self.free.extend(self.chains.pop(head))
            done.append(Used(head, length))
            self.last_used = (self.last_used + 1) & 0xFFFF
        return done

    # ---- interrupts

    def set_used_event(self, value: int) -> None:
        """EVENT_IDX: interrupt when the used index passes this value."""
        self.memory.set16(self.avail + 4 + 2 * self.size, value)

    def allow_interrupts(self) -> None:
        self.memory.set16(self.avail, 0)
        self.set_used_event(self.last_used)
        barrier()

    def forbid_interrupts(self) -> None:
        """With EVENT_IDX by an index that is half a ring of numbers away."""
        self.memory.set16(self.avail, 0 if self.event_idx else AVAIL_F_NO_INTERRUPT)
        self.set_used_event(self.last_used - 0x8000)
        barrier()

    def interrupts(self) -> int:
        """How often the call eventfd was signalled since last asked."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def wait(self, timeout: float = 30, alive: int | None = None) -> list[Used]:
        """Sleep until an interrupt brings used entries; a lost one is a TimeoutError.

        `alive` is the connection's socket: none the wiser after it hung up.
        """
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        if alive is not None:
            poll.register(alive, select.POLLRDHUP)
        while True:
            done = self.reap()
            if done:
                return done
            self.allow_interrupts()
            if self.used_idx != self.last_used:
                continue
            ready = poll.poll(timeout * 1000)
            if not ready:
                missed = "" if self.used_idx == self.last_used else ", but the used ring moved"
                raise TimeoutError(f"queue {self.index}: no interrupt{missed}")
            if not self.interrupts():
                raise ConnectionResetError(f"queue {self.index}: the back-end hung up")
