# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory: tables, slots, changes under I/O, and the dirty log."""

from __future__ import annotations

import os
import random

from frontend import Device, Feature, GuestMemory, Message, ProtocolFeature, Status, Type
from frontend.device import WANTED_PROTOCOL
from frontend.lab import Lab
from frontend.memory import PAGE

pytest_plugins = ["frontend.fixtures"]

TABLE = WANTED_PROTOCOL & ~(1 << ProtocolFeature.CONFIGURE_MEM_SLOTS)
HOTPLUGGED = 1 << 32


def test_memory_as_a_table(lab: Lab) -> None:
    with lab.device(protocol_features=TABLE) as device:
        device.write(0, b"t" * 65536)
        assert device.read(0, 65536) == b"t" * 65536


def test_a_new_table_under_io(lab: Lab) -> None:
    """Requests in flight point into the old one."""
    with lab.device("slow", protocol_features=TABLE) as device:
        requests = []
        for number in range(6):
            request = device.prepare(Type.IN, number, length=4096)
            device.memory.write(request.in_, b"\xff" * 4096)
            device.publish(request)
            requests.append(request)
            device.set_mem_table()
        device.wait(*requests)
        for request in requests:
            assert request.status == Status.OK
            assert request.data == bytes(4096)


def test_many_new_tables_under_load(lab: Lab) -> None:
    with lab.device(queues=4, protocol_features=TABLE) as device:
        rng = random.Random(12)
        data = rng.randbytes(4096)
        device.write(0, data)
        for _ in range(200):
            requests = [device.submit(Type.IN, 0, length=4096, queue=n % 4) for n in range(8)]
            device.set_mem_table()
            device.wait(*requests)
            assert {request.data for request in requests} == {data}


def test_a_region_comes_and_goes(lab: Lab) -> None:
    with lab.device() as device:
        device.write(0, b"h" * 4096)
        for _ in range(20):
            region = device.memory.add(HOTPLUGGED, 1 << 20)
            device.add_region(region)
            request = device.submit(Type.IN, length=4096, in_at=HOTPLUGGED + 100)
            assert device.checked(request).data == b"h" * 4096
            device.remove_region(region)
            device.memory.remove(region)
            assert device.read(0, 4096) == b"h" * 4096


def test_many_regions(lab: Lab) -> None:
    with lab.device() as device:
        device.write(0, b"m" * 4096)
        slots = device.channel.ask_u64(Message.GET_MAX_MEM_SLOTS)
        added = []
        for number in range(min(slots, 32) - len(device.memory.regions)):
            region = device.memory.add(HOTPLUGGED + number * (1 << 20), 64 * 1024)
            device.add_region(region)
            added.append(region)
        for region in added:
            request = device.submit(Type.IN, length=4096, in_at=region.gpa + 4096)
            assert device.checked(request).data == b"m" * 4096
        random.Random(13).shuffle(added)
        for region in added:
            device.remove_region(region)
            device.memory.remove(region)
            device.read(0, 512)


def test_removing_a_region_waits_for_requests_into_it(lab: Lab) -> None:
    with lab.device("slow") as device:
        region = device.memory.add(HOTPLUGGED, 1 << 20)
        device.add_region(region)
        request = device.submit(Type.IN, length=4096, in_at=HOTPLUGGED)
        device.settle(seconds=0.02)
        device.remove_region(region)
        region.bytes[:8192] = b"\xa5" * 8192
        device.settle(seconds=0.4)
        assert bytes(region.bytes[:8192]) == b"\xa5" * 8192, "written to after it was removed"
        # Not yet popped when the region went: then it is an error now, not a lost request.
        if request.queue.used_idx:
            device.reap()
            assert request.done


def test_the_region_with_the_rings_goes_and_comes_back(lab: Lab) -> None:
    """QEMU does that when memory next to it is plugged or unplugged."""
    with lab.device() as device:
        rings = device.memory.regions[0]
        for _ in range(20):
            device.read(0, 4096)
            device.remove_region(rings)
            device.add_region(rings)
            device.read(0, 4096)


def test_a_kick_while_the_rings_are_away(lab: Lab) -> None:
    with lab.device() as device:
        rings = device.memory.regions[0]
        device.read(0, 4096)
        device.remove_region(rings)
        request = device.submit(Type.IN, length=512)
        request.queue.kick()
        device.settle(seconds=0.05)
        device.add_region(rings)
        request.queue.kick()
        device.wait(request)
        assert request.status == Status.OK


def test_overlapping_regions_are_refused(lab: Lab) -> None:
    with lab.attack() as device:
        device.start()
        region = device.memory.add(4096, 1 << 20)
        device.channel.send(Message.ADD_MEM_REG, bytes(8) + region.payload(), [region.fd])


def test_removing_what_was_never_there(lab: Lab) -> None:
    with lab.attack() as device:
        device.start()
        region = device.memory.add(HOTPLUGGED, 1 << 20)
        device.channel.send(Message.REM_MEM_REG, bytes(8) + region.payload())


def test_memory_with_holes(lab: Lab) -> None:
    memory = GuestMemory([(0, 1 << 20), (1 << 30, 1 << 20), (1 << 40, 1 << 20)])
    with lab.device(memory=memory) as device:
        device.write(0, b"o" * 4096)
        for at in (1 << 30, 1 << 40, (1 << 40) + (1 << 20) - 4097):
            request = device.submit(Type.IN, length=4096, in_at=at)
            assert device.checked(request).data == b"o" * 4096


# ---- the dirty log


def logged(device: Device, type_: int, *, data: bytes = b"", length: int = 0) -> set[int]:
    """Pages that one request with its answer at page 64 makes dirty."""
    device.dirty_pages()
    device.wait(device.submit(type_, 0, data, length=length, in_at=64 * PAGE))
    return device.dirty_pages()


def test_dirty_log(lab: Lab) -> None:
    with lab.device() as device:
        device.write(0, b"x" * 65536)
        device.start_log()
        used = device.queues[0].used // PAGE
        assert logged(device, Type.IN, length=8192) == {used, 64, 65, 66}
        assert logged(device, Type.IN, length=512) == {used, 64}
        assert logged(device, Type.OUT, data=bytes(65536)) == {used, 64}
        assert logged(device, Type.FLUSH) == {used, 64}
        assert logged(device, Type.GET_ID, length=20) == {used, 64}
        assert logged(device, 99) == {used, 64}


def test_dirty_log_of_indirect_and_crossing_requests(lab: Lab) -> None:
    with lab.device() as device:
        device.start_log()
        used = device.queues[0].used // PAGE
        border = device.memory.regions[1].gpa
        device.dirty_pages()
        request = device.submit(
            Type.IN, length=8192, in_split=[100, 5000], in_at=border - PAGE - 1, indirect_from=0
        )
        device.checked(request)
        first = border // PAGE - 2
        assert device.dirty_pages() == {used, first, first + 1, first + 2}


def test_logging_is_switched_off_again(lab: Lab) -> None:
    with lab.device() as device:
        device.start_log()
        assert logged(device, Type.FLUSH)
        device.set_features(device.features & ~(1 << Feature.LOG_ALL))
        for queue in device.queues:
            device.set_address(queue)
        assert logged(device, Type.IN, length=512) == set()


def test_without_the_ring_s_flag_only_buffers_are_logged(lab: Lab) -> None:
    with lab.device() as device:
        device.start_log()
        device.set_features(device.features & ~(1 << Feature.LOG_ALL))
        device.set_address(device.queues[0])
        device.set_features(device.features | 1 << Feature.LOG_ALL)
        assert logged(device, Type.IN, length=512) == {64}


def test_logging_starts_with_requests_in_flight(lab: Lab) -> None:
    with lab.device("slow") as device:
        requests = [device.submit(Type.IN, n, length=4096) for n in range(4)]
        device.start_log()
        device.reap()
        late = [request for request in requests if not request.done]
        late.append(device.submit(Type.IN, 9, length=4096))
        device.wait(*late)
        assert {request.in_ // PAGE for request in late} <= device.dirty_pages()


def test_a_descriptor_to_signal_the_log(lab: Lab) -> None:
    """A back-end may use it. It takes it, and keeps it no longer than the connection."""
    before = lab.open_files()
    with lab.device() as device:
        device.start_log()
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        device.tell(Message.SET_LOG_FD, fds=[fd])
        device.tell(Message.SET_LOG_FD, fds=[fd])
        os.close(fd)
        assert logged(device, Type.IN, length=512)
    lab.until_files_are(before)
