# SPDX-License-Identifier: GPL-2.0-or-later
"""A hostile guest: rings and descriptors that break the virtio specification.

Nothing sensible can be answered to these: the connection is dropped, so that a
reset or a reconnect can recover, and only this device suffers.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from frontend import Device, Feature, InflightArea, Status, Type
from frontend.device import WANTED
from frontend.inflight import Entry, QueueRegion
from frontend.lab import Lab
from frontend.protocol import REQUEST_HEADER
from frontend.virtqueue import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

pytest_plugins = ["frontend.fixtures"]

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
TOP = 1 << 64

Table = list[tuple[int, int, int, int]]
"""Descriptors: address, length, flags, next."""


class Buffers:
    """Good places to point at: a read's header, data and status."""

    def __init__(self, device: Device) -> None:
        memory = device.memory
        self.header = memory.alloc(16)
        self.data = memory.alloc(4096)
        self.status = memory.alloc(1)
        self.end = memory.regions[1].gpa + memory.regions[1].size
        memory.write(self.header, REQUEST_HEADER.pack(Type.IN, 0, 0))

    def read(self) -> Table:
        return [
            (self.header, 16, NEXT, 1),
            (self.data, 4096, NEXT | WRITE, 2),
            (self.status, 1, WRITE, 0),
        ]


def replaced(table: Table, index: int, entry: tuple[int, int, int, int]) -> Table:
    return [*table[:index], entry, *table[index + 1 :]]


# What is wrong in the main table and in an indirect one alike.
BROKEN: dict[str, Callable[[Buffers], Table]] = {
    "a loop of one": lambda b: [(b.header, 16, NEXT, 0)],
    "a loop of two": lambda b: [(b.header, 16, NEXT, 1), (b.header, 16, NEXT, 0)],
    "a loop at the end": lambda b: replaced(b.read(), 2, (b.status, 1, WRITE | NEXT, 2)),
    "next out of range": lambda b: replaced(b.read(), 0, (b.header, 16, NEXT, 128)),
    "next far out of range": lambda b: replaced(b.read(), 1, (b.data, 4096, NEXT | WRITE, 65535)),
    "no header": lambda b: [(b.status, 1, WRITE, 0)],
    "half a header": lambda b: replaced(b.read(), 0, (b.header, 8, NEXT, 1)),
    "no status": lambda b: [(b.header, 16, 0, 0)],
    "no status after data": lambda b: [(b.header, 16, NEXT, 1), (b.data, 4096, 0, 0)],
    "nothing": lambda b: [(0, 0, 0, 0)],
    "writable before readable": lambda b: [
        (b.status, 1, NEXT | WRITE, 1),
        (b.header, 16, 0, 0),
    ],
    "writable between readable": lambda b: [
        (b.header, 8, NEXT, 1),
        (b.status, 1, NEXT | WRITE, 2),
        (b.header + 8, 8, 0, 0),
    ],
    "header outside memory": lambda b: replaced(b.read(), 0, (b.end, 16, NEXT, 1)),
    "header half outside": lambda b: replaced(b.read(), 0, (b.end - 8, 16, NEXT, 1)),
    "data outside memory": lambda b: replaced(b.read(), 1, (1 << 40, 4096, NEXT | WRITE, 2)),
    "data half outside": lambda b: replaced(b.read(), 1, (b.end - 2048, 4096, NEXT | WRITE, 2)),
    "data round the top": lambda b: replaced(b.read(), 1, (TOP - 512, 4096, NEXT | WRITE, 2)),
    "data longer than memory": lambda b: replaced(b.read(), 1, (0, 0xFFFF_FFFF, NEXT | WRITE, 2)),
    "status outside memory": lambda b: replaced(b.read(), 2, (b.end, 1, WRITE, 0)),
    "status at the top": lambda b: replaced(b.read(), 2, (TOP - 1, 1, WRITE, 0)),
}


def put(device: Device, table: Table, head: int = 0) -> None:
    queue = device.queues[0]
    for index, (gpa, length, flags, next_) in enumerate(table):
        queue.set_descriptor(index, gpa, length, flags, next_)
    queue.publish(head)
    queue.kick()


def put_indirect(device: Device, table: Table, *, at: int | None = None, extra: int = 0) -> None:
    content = b"".join(DESC.pack(*entry) for entry in table)
    gpa = device.memory.alloc(len(content)) if at is None else at
    device.memory.write(gpa, content)
    put(device, [(gpa, len(content) + extra, INDIRECT, 0)])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_chain(lab: Lab, name: str) -> None:
    with lab.attack() as device:
        device.start()
        put(device, BROKEN[name](Buffers(device)))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_indirect_chain(lab: Lab, name: str) -> None:
    with lab.attack() as device:
        device.start()
        put_indirect(device, BROKEN[name](Buffers(device)))


@pytest.mark.parametrize("name", ["data outside memory", "no status", "a loop of two"])
def test_a_broken_chain_among_good_ones(lab: Lab, name: str) -> None:
    """With requests in flight that must be finished before the memory goes."""
    with lab.attack("slow") as device:
        device.start()
        for _ in range(5):
            device.submit(Type.IN, length=4096)
        queue = device.queues[0]
        for index, entry in enumerate(BROKEN[name](Buffers(device))):
            queue.set_descriptor(100 + index, entry[0], entry[1], entry[2], 100 + entry[3])
        queue.publish(100)
        queue.kick()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_descriptor_of_no_length(lab: Lab, place: int) -> None:
    """virtio 1.2 does not forbid it; QEMU does. Either is fine, half a request is not."""
    with lab.attack(dropped=False) as device:
        device.start()
        buffers = Buffers(device)
        table = buffers.read()
        gpa, _, flags, next_ = table[place]
        put(device, replaced(table, place, (gpa, 0, flags, next_)))
        device.settle(seconds=0.05)


@pytest.mark.parametrize("head", [128, 129, 255, 0x7FFF, 0xFFFF])
def test_head_out_of_range(lab: Lab, head: int) -> None:
    with lab.attack() as device:
        device.start()
        put(device, [], head)


@pytest.mark.parametrize("jump", [129, 1000, 0x7FFF, 0x8000, 0xFFFF])
def test_available_index_jumps(lab: Lab, jump: int) -> None:
    with lab.attack() as device:
        device.start()
        device.read(0, 512)
        queue = device.queues[0]
        device.memory.set16(queue.avail + 2, queue.avail_idx + jump)
        queue.kick()


def test_the_same_head_twice(lab: Lab) -> None:
    with lab.attack("slow") as device:
        device.start()
        put(device, Buffers(device).read())
        device.queues[0].publish(0)
        device.queues[0].kick()


def test_a_ring_full_of_the_same_head(lab: Lab) -> None:
    """One after the other that may even be legal."""
    with lab.attack("null", dropped=False) as device:
        device.start()
        queue = device.queues[0]
        for index, entry in enumerate(Buffers(device).read()):
            queue.set_descriptor(index, *entry)
        queue.publish(*[0] * 128)
        queue.kick()
        device.settle(seconds=0.02)


@pytest.mark.parametrize("length", [0, 1, 8, 15, 17, 47])
def test_indirect_table_of_odd_length(lab: Lab, length: int) -> None:
    with lab.attack() as device:
        device.start()
        table = device.memory.alloc(64)
        put(device, [(table, length, INDIRECT, 0)])


@pytest.mark.parametrize("length", [16 * 1025, 16 * 65536, 0xFFFF_FFF0])
def test_indirect_table_too_long(lab: Lab, length: int) -> None:
    """May be taken as far as it is used; a read then is a read."""
    with lab.attack(dropped=False) as device:
        device.start()
        content = b"".join(DESC.pack(*entry) for entry in Buffers(device).read())
        gpa = device.memory.alloc(len(content))
        device.memory.write(gpa, content)
        put(device, [(gpa, length, INDIRECT, 0)])
        device.settle(seconds=0.02)


@pytest.mark.parametrize("gpa", [1 << 40, TOP - 16, TOP - 48, 8 << 20, (8 << 20) - 16])
def test_indirect_table_outside_memory(lab: Lab, gpa: int) -> None:
    with lab.attack() as device:
        device.start()
        put(device, [(gpa, 48, INDIRECT, 0)])


def test_an_indirect_table_inside_another(lab: Lab) -> None:
    with lab.attack() as device:
        device.start()
        content = b"".join(DESC.pack(*entry) for entry in Buffers(device).read())
        inner = device.memory.alloc(len(content))
        device.memory.write(inner, content)
        put_indirect(device, [(inner, len(content), INDIRECT, 0)])


def test_an_indirect_descriptor_with_a_next_one(lab: Lab) -> None:
    with lab.attack() as device:
        device.start()
        buffers = Buffers(device)
        content = b"".join(DESC.pack(*entry) for entry in buffers.read())
        inner = device.memory.alloc(len(content))
        device.memory.write(inner, content)
        put(device, [(inner, len(content), INDIRECT | NEXT, 1), (buffers.status, 1, WRITE, 0)])


def test_an_indirect_table_that_contains_itself(lab: Lab) -> None:
    with lab.attack() as device:
        device.start()
        gpa = device.memory.alloc(48)
        put_indirect(device, [(gpa, 48, INDIRECT, 0)], at=gpa)


def test_an_indirect_table_across_regions_into_nothing(lab: Lab) -> None:
    """CVE-2026-6425's shape: the table begins in memory and ends outside."""
    with lab.attack() as device:
        device.start()
        buffers = Buffers(device)
        gpa = buffers.end - 24
        device.memory.write(gpa, DESC.pack(buffers.header, 16, NEXT, 1) + bytes(8))
        put(device, [(gpa, 48, INDIRECT, 0)])


def test_indirect_without_having_negotiated_it(lab: Lab) -> None:
    with lab.attack(features=WANTED & ~(1 << Feature.RING_INDIRECT_DESC)) as device:
        device.start()
        put_indirect(device, Buffers(device).read())


def test_a_request_of_gigabytes(lab: Lab) -> None:
    """The same memory a thousand times: more than fits 32 bits, and than is ever carried out."""
    for export in ("null", "disk"):
        with lab.attack(export, dropped=False, queue_size=1024) as device:
            device.start()
            buffers = Buffers(device)
            memory = device.memory
            memory.write(buffers.header, REQUEST_HEADER.pack(Type.OUT, 0, 0))
            memory.write(buffers.status, b"\xee")
            data = memory.regions[1]
            table: Table = [(buffers.header, 16, NEXT, 1)]
            table += [(data.gpa, data.size, NEXT, number + 2) for number in range(1022)]
            table.append((buffers.status, 1, WRITE, 0))
            put(device, table)
            while device.queues[0].used_idx == 0:
                device.settle(seconds=0.01)
            assert memory.read(buffers.status, 1)[0] == Status.IOERR


def test_a_read_into_the_rings(lab: Lab) -> None:
    """The guest's own foot."""
    for part in ("desc", "avail", "used"):
        with lab.attack("null", dropped=False) as device:
            device.start()
            device.read(0, 512)
            buffers = Buffers(device)
            at = getattr(device.queues[0], part)
            put(device, replaced(buffers.read(), 1, (at, 2048, NEXT | WRITE, 2)))
            device.settle(seconds=0.02)
            for number in range(50):
                device.memory.set16(device.queues[0].avail + 2, number)
                device.queues[0].kick()


def test_the_guest_changes_its_mind_all_the_time(lab: Lab) -> None:
    """Descriptors, header and indices change while the device reads them."""
    with lab.attack("null", dropped=False) as device:
        device.start()
        queue = device.queues[0]
        buffers = Buffers(device)
        good = b"".join(DESC.pack(*entry) for entry in buffers.read())
        bad = b"".join(DESC.pack(*entry) for entry in BROKEN["data half outside"](buffers))
        longer = b"".join(
            DESC.pack(*e) for e in replaced(buffers.read(), 0, (buffers.header, 0x800000, NEXT, 1))
        )
        device.memory.write(queue.desc, good)
        for number in range(3000):
            queue.publish(0)
            queue.kick()
            device.memory.write(queue.desc, longer if number % 2 else good)
            device.memory.write(buffers.header, os.urandom(16))
            device.memory.write(queue.desc, good)
            while queue.used_idx != queue.avail_idx and not number % 64:
                if device.channel.wait_closed(0):
                    return
        device.memory.write(queue.desc, bad)
        queue.publish(0)
        queue.kick()


def test_a_broken_queue_breaks_its_device_only(lab: Lab) -> None:
    """The other queues of the device stop too, other devices of the thread do not."""
    with lab.attack("many", queues=8) as device:
        device.start()
        put(device, [(0, 0, 0, 0)])
        assert device.channel.wait_closed()
        lab.bystander.read(0, 4096)


def test_a_broken_request_is_not_resubmitted_for_ever(lab: Lab) -> None:
    """It goes back through the used ring, or the next back-end would die of it again."""
    lab.noise("null")
    device = lab.device("null")
    try:
        device.connect()
        device.start()
        good = device.submit(Type.IN, length=512)
        device.wait(good)
        queue = device.queues[0]
        queue.set_descriptor(100, 1 << 40, 16)
        queue.publish(100)
        queue.kick()
        assert device.channel.wait_closed()
        queue.chains[100] = []
        device.reconnect()
        device.reap()
        device.read(0, 4096)
    finally:
        device.close()


# ---- an in-flight area that was tampered with


def mark(area: InflightArea, count: int, inflight: int, next_: int) -> None:
    for head in range(count):
        area.set_entry(head, Entry(inflight, next_, head))


TAMPERED: dict[str, Callable[[InflightArea], None]] = {
    "batch head out of range": lambda a: a.set_region(QueueRegion(0, 1, 128, 128, 3)),
    "batch head far out of range": lambda a: a.set_region(QueueRegion(0, 1, 128, 65535, 3)),
    "a batch longer than the ring": lambda a: a.set_region(QueueRegion(0, 1, 128, 0, 0x8000)),
    "another size": lambda a: a.set_region(QueueRegion(0, 1, 0xFFFF, 0, 0)),
    "size zero": lambda a: a.set_region(QueueRegion(0, 1, 0, 0, 0)),
    "another version": lambda a: a.set_region(QueueRegion(0, 99, 128, 0, 0)),
    "features": lambda a: a.set_region(QueueRegion((1 << 64) - 1, 1, 128, 0, 0)),
    "all marked": lambda a: mark(a, 128, 1, 0),
    "marked with 255": lambda a: mark(a, 128, 255, 0),
    "next out of range": lambda a: mark(a, 9, 1, 65535),
    "noise": lambda a: a.map.__setitem__(slice(0, a.mmap_size), os.urandom(a.mmap_size)),
}


@pytest.mark.parametrize("name", TAMPERED)
@pytest.mark.parametrize("base", [0, 5])
def test_tampered_inflight_area(lab: Lab, name: str, base: int) -> None:
    """Heads that were never made available are resubmitted; whatever they say."""
    with lab.attack("null", dropped=False, base=base) as device:
        area = device.get_inflight()
        area.set_region(QueueRegion(0, 1, 128, 0, base))
        TAMPERED[name](area)
        device.start()
        device.settle(seconds=0.02)
        device.queues[0].kick()
        device.settle(seconds=0.02)


def test_inflight_area_changes_under_way(lab: Lab) -> None:
    with lab.attack("null", dropped=False) as device:
        device.start()
        area = device.inflight
        assert area is not None
        for number in range(200):
            area.map[:] = os.urandom(area.mmap_size)
            if len(device.queues[0].free) > 3:
                device.submit(Type.IN, number, length=512)
            device.reap()
        area.map[:] = struct.pack("<B", 255) * area.mmap_size
        device.stop()
