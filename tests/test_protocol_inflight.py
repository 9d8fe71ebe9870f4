# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the back-end with requests in flight: none lost, none done twice.

The area's contents are those of the protocol text, "Inflight I/O tracking".
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from frontend import (
    Daemon,
    Device,
    InflightArea,
    Message,
    ProtocolFeature,
    Request,
    Status,
    Type,
    vhostblk,
)
from frontend.device import CONFIG_WCE_OFFSET
from frontend.inflight import Entry, QueueRegion
from frontend.lab import DISK_SIZE, NULL_SIZE, Lab, export_options, node_options
from frontend.protocol import vring_state
from in_process import Host, with_host

pytest_plugins = ["frontend.fixtures"]

NEVER_NS = 3_600_000_000_000


def null_backend(latency_ns: int) -> list[str]:
    node = f"driver=null-co,node-name=null,size={NULL_SIZE},read-zeroes=on,latency-ns={latency_ns}"
    return ["--blockdev", node, *export_options("null")]


@pytest.fixture
def stuck() -> Iterator[Daemon]:
    """A back-end whose requests never end; restarted, they do."""
    with vhostblk(*null_backend(NEVER_NS)) as daemon:
        yield daemon


def heal(daemon: Daemon) -> None:
    daemon.kill()
    option = next(n for n, part in enumerate(daemon.command) if f"latency-ns={NEVER_NS}" in part)
    daemon.command[option] = daemon.command[option].replace(
        f"latency-ns={NEVER_NS}", "latency-ns=0"
    )
    daemon.restart()


def popped(device: Device, requests: Sequence[Request]) -> None:
    """Until the back-end has marked all in flight. (Those of a slow device may be done already.)"""
    assert device.inflight is not None
    for _ in range(3000):
        device.reap()
        marked = {
            (queue.index, head)
            for queue in device.queues
            for head in device.inflight.heads(queue.index)
        }
        waiting = [request for request in requests if not request.done]
        if {(request.queue.index, request.head) for request in waiting} <= marked:
            return
        device.settle(seconds=0.01)
    raise AssertionError("the requests were never marked as in flight")


def test_what_the_area_says_in_normal_operation(lab: Lab) -> None:
    with lab.device("slow") as device:
        area = device.inflight
        assert area is not None
        requests = [device.submit(Type.IN, n, length=512) for n in range(6)]
        popped(device, requests)
        assert area.region().version == 1
        assert area.region().desc_num >= device.queue_size
        assert area.heads() == [request.head for request in requests]  # oldest first
        counters = [area.entry(request.head).counter for request in requests]
        assert counters == sorted(set(counters))
        device.wait(*requests)
        device.stop()
        assert area.heads() == []
        assert area.region().used_idx == device.queues[0].used_idx == 6


def test_a_fresh_area_is_empty(lab: Lab) -> None:
    with lab.device(queues=4, queue_size=1024) as device:
        device.stop()  # under a running ring the area may not change
        area = device.get_inflight()
        # One region for each queue with the protocol's header and entries.
        assert area.mmap_size >= 4 * (16 + 16 * 1024)
        assert area.map[:] == bytes(area.mmap_size)
        device.set_inflight()


@pytest.mark.parametrize("base", [0, 1000, 65533])
def test_resubmission_after_kill_9(stuck: Daemon, base: int) -> None:
    """Also on first use of the area with a used ring that does not start at zero."""
    with Device(stuck.socket("null"), queues=2, base=base) as device:
        requests = [device.submit(Type.IN, n, length=512, queue=n % 2) for n in range(11)]
        popped(device, requests)
        assert device.inflight is not None
        assert device.inflight.region(0).used_idx == base
        assert device.inflight.region(1).used_idx == base
        heal(stuck)
        device.reconnect()
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
        for number in range(5):
            device.read(0, 512, queue=number % 2)
        device.stop()
        assert device.queues[0].used_idx == (base + 6 + 3) & 0xFFFF
        assert device.queues[1].used_idx == (base + 5 + 2) & 0xFFFF
        assert device.inflight.heads(0) == device.inflight.heads(1) == []


def test_an_area_asked_for_with_a_smaller_ring_size(stuck: Daemon) -> None:
    """Debian's QEMU since 10.0.13 gives each ring 1024 entries, and says queue-size here."""
    with Device(stuck.socket("null"), queues=2, queue_size=1024, inflight_size=128) as device:
        requests = [device.submit(Type.IN, n, length=512, queue=n % 2) for n in range(600)]
        popped(device, requests)
        assert max(request.head for request in requests) >= 128
        heal(stuck)
        device.reconnect()
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
        device.stop()
        assert device.queues[0].used_idx == device.queues[1].used_idx == 300


def test_new_requests_follow_the_resubmitted_ones(stuck: Daemon) -> None:
    with Device(stuck.socket("null")) as device:
        old = [device.submit(Type.IN, n, length=512) for n in range(5)]
        popped(device, old)
        heal(stuck)
        new = [device.submit(Type.IN, n, length=512) for n in range(5)]
        device.reconnect()
        device.wait(*old, *new)
        device.stop()
        assert device.queues[0].base == device.queues[0].used_idx == 10


def test_death_after_death(stuck: Daemon) -> None:
    """Killed again before anything was completed."""
    with Device(stuck.socket("null")) as device:
        requests = [device.submit(Type.IN, n, length=512) for n in range(5)]
        popped(device, requests)
        for round_ in range(3):
            stuck.kill()
            stuck.restart()
            device.reconnect()
            requests.append(device.submit(Type.IN, round_, length=512))
            popped(device, requests)
        heal(stuck)
        device.reconnect()
        device.wait(*requests)
        device.stop()
        assert device.queues[0].used_idx == 8


def test_the_longest_latency_there_is() -> None:
    """Added to the time it is now it must not be a time long ago."""
    with (
        vhostblk(*null_backend((1 << 64) - 1)) as daemon,
        Device(daemon.socket("null")) as device,
    ):
        popped(device, [device.submit(Type.IN, length=512)])
        device.settle(seconds=0.1)
        assert device.queues[0].used_idx == 0


def test_writes_across_a_kill_reach_the_file() -> None:
    rng = random.Random(21)
    arguments = [*node_options("disk"), *export_options("disk")]
    with (
        vhostblk(*arguments, files={"disk.raw": DISK_SIZE}) as daemon,
        Device(daemon.socket("disk"), queues=4) as device,
    ):
        model = {}
        for _ in range(4):
            writes = []
            for queue in range(4):
                for number in range(16):
                    block = rng.randrange(1000) * 64 + queue * 16 + number
                    model[block] = rng.randbytes(512)
                    writes.append(device.submit(Type.OUT, block, model[block], queue=queue))
            daemon.kill()
            daemon.restart()
            device.reconnect()
            device.wait(*writes)
            assert {request.status for request in writes} == {Status.OK}
        device.flush()
        with (daemon.directory / "disk.raw").open("rb") as file:
            for block, data in model.items():
                file.seek(block * 512)
                assert file.read(512) == data
        assert device.read(0, 512)


def test_a_front_end_may_come_back_without_a_crash(lab: Lab) -> None:
    """The connection breaks, the back-end lives on: the area is handed back all the same."""
    with lab.device("slow", queues=2) as device:
        for _ in range(3):
            requests = [device.submit(Type.IN, n, length=512, queue=n % 2) for n in range(10)]
            popped(device, requests)
            device.reconnect()
            device.wait(*requests)
            assert {request.status for request in requests} == {Status.OK}


# ---- states that a crash can leave, made by hand


class Crash:
    """A ring and an area as a dead back-end left them.

    Heads 0 to `available` - 1 were made available in this order.
    """

    def __init__(self, device: Device, available: int) -> None:
        self.device = device
        device.connect()
        device.make_queues()
        self.queue = device.queues[0]
        self.requests = [device.prepare(Type.IN, n, length=512) for n in range(available)]
        self.heads = [request.head for request in self.requests]
        self.queue.publish(*self.heads)
        self.area = device.get_inflight()
        self.region = QueueRegion(0, 1, device.queue_size, 0, 0)
        for counter, head in enumerate(self.heads):
            self.area.set_entry(head, Entry(1, 0, counter))

    def complete(self, *order: int) -> None:
        """These were put into the used ring, and its index was moved."""
        memory = self.device.memory
        for number in order:
            slot = self.queue.used + 4 + 8 * (self.queue.used_idx % self.queue.size)
            memory.write(slot, struct.pack("<II", self.heads[number], 513))
            memory.write(self.requests[number].in_ + 512, b"\0")
            memory.set16(self.queue.used + 2, self.queue.used_idx + 1)

    def batch(self, *order: int) -> None:
        """These were chained as the last batch."""
        for number in order:
            entry = self.area.entry(self.heads[number])
            entry.next = self.region.last_batch_head
            self.area.set_entry(self.heads[number], entry)
            self.region.last_batch_head = self.heads[number]

    def settle(self, *done: int) -> None:
        """The marks of these were taken away."""
        for number in done:
            entry = self.area.entry(self.heads[number])
            entry.inflight = 0
            self.area.set_entry(self.heads[number], entry)

    def hand_over(self) -> None:
        """Tell the back-end of it all; the ring is not enabled."""
        self.area.set_region(self.region)
        self.queue.base = self.queue.used_idx
        self.device.start_device()
        self.device.start_queue(self.queue)

    def recover(self) -> list[int]:
        """Start; numbers of the requests in the order of the used ring."""
        self.hand_over()
        self.device.enable_queue(self.queue)
        self.device.wait(*self.requests)
        order = []
        for position in range(len(self.requests)):
            slot = self.queue.used + 4 + 8 * position
            order.append(struct.unpack("<II", self.device.memory.read(slot, 8))[0])
        assert self.queue.used_idx == len(self.requests)
        assert self.area.heads() == []
        self.device.stop()
        assert self.area.region().used_idx == len(self.requests)
        return [self.heads.index(head) for head in order]


@pytest.fixture
def device(lab: Lab) -> Iterator[Device]:
    device = lab.device("null", queue_size=32)
    yield device
    device.close()


def test_nothing_was_completed(device: Device) -> None:
    assert Crash(device, 4).recover() == [0, 1, 2, 3]


def test_completed_out_of_order(device: Device) -> None:
    crash = Crash(device, 5)
    crash.batch(3)
    crash.complete(3)
    crash.settle(3)
    crash.region.used_idx = 1
    assert crash.recover()[1:] == [0, 1, 2, 4]


def test_the_order_is_that_of_the_counters(device: Device) -> None:
    crash = Crash(device, 5)
    for number, counter in enumerate((70, 50, 90, 60, 80)):
        crash.area.set_entry(crash.heads[number], Entry(1, 0, counter))
    assert crash.recover() == [1, 3, 0, 4, 2]


def test_counters_beyond_32_bits(device: Device) -> None:
    crash = Crash(device, 3)
    for number, counter in enumerate((1 << 40, (1 << 32) + 5, 1 << 63)):
        crash.area.set_entry(crash.heads[number], Entry(1, 0, counter))
    assert crash.recover() == [1, 0, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_died_between_the_used_index_and_the_marks(device: Device, size: int) -> None:
    """A batch of several: the guest has seen them done, the marks still say in flight."""
    crash = Crash(device, 6)
    crash.batch(*range(size))
    crash.complete(*range(size))
    assert crash.recover() == list(range(6))


def test_died_in_the_middle_of_taking_the_marks_away(device: Device) -> None:
    crash = Crash(device, 6)
    crash.batch(0, 1, 2)
    crash.complete(0, 1, 2)
    crash.settle(1)
    assert crash.recover() == list(range(6))


def test_died_before_storing_the_used_index(device: Device) -> None:
    crash = Crash(device, 6)
    crash.batch(0, 1, 2)
    crash.complete(0, 1, 2)
    crash.settle(0, 1, 2)
    assert crash.recover() == list(range(6))


def test_died_before_moving_the_used_index(device: Device) -> None:
    """The batch is chained, the guest has seen nothing of it."""
    crash = Crash(device, 6)
    crash.batch(4, 1)
    crash.complete(4, 1)
    crash.settle(4, 1)
    crash.region.used_idx = 2
    crash.batch(0, 2)
    assert sorted(crash.recover()[2:]) == [0, 2, 3, 5]


def test_a_batch_on_top_of_an_older_one(device: Device) -> None:
    """The list goes on into batches long done: only its first entries count."""
    crash = Crash(device, 8)
    crash.batch(0, 1)
    crash.complete(0, 1)
    crash.settle(0, 1)
    crash.region.used_idx = 2
    crash.batch(3, 2)
    crash.complete(3, 2)
    assert sorted(crash.recover()[4:]) == [4, 5, 6, 7]


def test_some_were_never_taken_from_the_available_ring(device: Device) -> None:
    crash = Crash(device, 8)
    crash.settle(5, 6, 7)
    assert crash.recover() == list(range(8))


def test_nothing_in_flight_and_new_requests(device: Device) -> None:
    crash = Crash(device, 4)
    crash.batch(0, 1, 2, 3)
    crash.complete(0, 1, 2, 3)
    crash.settle(0, 1, 2, 3)
    crash.region.used_idx = 4
    assert crash.recover() == [0, 1, 2, 3]


# ---- stopped before anything of it was started


def test_stopped_before_the_ring_was_enabled(device: Device) -> None:
    """GET_VRING_BASE promises that what came before it is done: nobody will ask again."""
    crash = Crash(device, 4)
    crash.hand_over()
    base = device.stop_queue(crash.queue)
    assert base == crash.queue.used_idx == 4
    device.reap()
    assert {request.status for request in crash.requests} == {Status.OK}


async def paused_with_owed_requests(host: Host, device: Device) -> Crash:
    """Handed over and enabled, but the drive is paused: nothing can be started."""
    crash = await asyncio.to_thread(Crash, device, 4)
    await asyncio.to_thread(crash.hand_over)
    await asyncio.to_thread(device.enable_queue, crash.queue)
    return crash


def test_stopped_while_the_drive_is_paused() -> None:
    async def scenario(host: Host) -> None:
        await host.null()
        await host.export("null")
        device = Device(host.path("e.sock"), queue_size=32)
        try:
            async with host.backend.graph.drained([host.backend.graph.node("null")]):
                crash = await paused_with_owed_requests(host, device)
                stopping = asyncio.create_task(asyncio.to_thread(device.stop_queue, crash.queue))
                await asyncio.sleep(0.2)
                assert not stopping.done()
                assert crash.queue.used_idx == 0
            base = await stopping
            assert base == crash.queue.used_idx == 4
            device.reap()
            assert {request.status for request in crash.requests} == {Status.OK}
        finally:
            device.close()

    with_host(scenario)


@pytest.mark.parametrize("end", ["hang up", "disconnect"])
def test_a_connection_that_ends_while_the_drive_is_paused(end: str) -> None:
    """What was not started stays in the record, and nobody waits for it."""

    async def scenario(host: Host) -> None:
        await host.null()
        await host.export("null")
        gone = "VHOSTBLK_EXPORT_DISCONNECTED"
        device = Device(host.path("e.sock"), queue_size=32)
        try:
            async with host.backend.graph.drained([host.backend.graph.node("null")]):
                crash = await paused_with_owed_requests(host, device)
                if end == "disconnect":
                    device.channel.send(Message.GET_VRING_BASE, vring_state(0, 0))
                    await asyncio.sleep(0.1)  # it waits
                    host.backend._exports["e"]._handle.disconnect()
                else:
                    device.disconnect()
                await host.until(lambda: len(host.named(gone)) == 1)
                assert crash.area.heads() == crash.heads
            device.disconnect()
            await asyncio.to_thread(device.reconnect)
            await asyncio.to_thread(device.wait, *crash.requests)
        finally:
            device.close()

    with_host(scenario)


def test_an_area_inside_a_larger_file(lab: Lab) -> None:
    with lab.device("null", queues=2) as device:
        device.stop()
        assert device.inflight is not None
        size = device.inflight.mmap_size
        fd = os.memfd_create("inflight")
        os.ftruncate(fd, 4096 + size)
        device.inflight.close()
        device.inflight = InflightArea(fd, size, 2, device.queue_size, offset=4096)
        device.start()
        device.read(0, 512, queue=1)
        device.stop()
        assert device.inflight.region(1).used_idx == device.queues[1].used_idx
        assert os.pread(fd, 4096, 0) == bytes(4096)


def test_without_the_feature_there_is_no_area(lab: Lab) -> None:
    wanted = ~(1 << ProtocolFeature.INFLIGHT_SHMFD)
    with lab.device("null", protocol_features=wanted & 0xFFFF) as device:
        device.read(0, 512)


def test_the_write_cache_setting_survives_a_kill() -> None:
    """The guest switched it off and flushes no more; QEMU does not tell the next back-end."""
    arguments = [*node_options("null"), *export_options("null"), "--log-level", "debug"]
    with vhostblk(*arguments) as daemon:
        with Device(daemon.socket("null")) as device:
            device.set_config(CONFIG_WCE_OFFSET, b"\0")
            device.write(0, bytes(512))
            daemon.kill()
            daemon.restart()
            mark = daemon.mark()
            device.reconnect()
            assert not device.writeback
            daemon.wait_line("write cache off", since=mark)  # as if the guest had said it now
            device.write(0, bytes(512))
            device.set_config(CONFIG_WCE_OFFSET, b"\1")
            daemon.kill()
            daemon.restart()
            device.reconnect()
            assert device.writeback
            device.set_config(CONFIG_WCE_OFFSET, b"\0")
        daemon.kill()
        daemon.restart()
        with Device(daemon.socket("null")) as device:  # another guest
            assert device.writeback
