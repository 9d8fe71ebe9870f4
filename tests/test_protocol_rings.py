# SPDX-License-Identifier: GPL-2.0-or-later
"""Rings: start, stop, enable, notifications both ways, many queues."""

from __future__ import annotations

import os
import random
from contextlib import suppress

import pytest
from frontend import Device, Feature, Message, Status, Type
from frontend.device import WANTED
from frontend.lab import DISK_SIZE, Lab
from frontend.protocol import VRING_NOFD, u64, vring_state

pytest_plugins = ["frontend.fixtures"]

NO_EVENT_IDX = WANTED & ~(1 << Feature.RING_EVENT_IDX)
EVENT_IDX_OR_NOT = pytest.mark.parametrize(
    "features", [WANTED, NO_EVENT_IDX], ids=["event", "flag"]
)


def restart(device: Device) -> None:
    for queue in device.queues:
        device.start_queue(queue)
        device.enable_queue(queue)


# ---- stop


def test_stop_says_how_far_it_came(lab: Lab) -> None:
    with lab.device() as device:
        for _ in range(5):
            device.read(0, 512)
        assert device.stop_queue(device.queues[0]) == 5
        restart(device)
        device.read(0, 512)
        assert device.stop_queue(device.queues[0]) == 6


def test_stop_waits_for_requests_in_flight(lab: Lab) -> None:
    """And afterwards the used ring does not move, nor does anybody interrupt."""
    with lab.device("slow") as device:
        queue = device.queues[0]
        requests = [device.submit(Type.IN, n, length=512) for n in range(8)]
        device.settle(seconds=0.02)  # some of them at least are on their way
        base = device.stop_queue(queue)
        used = queue.used_idx
        assert used == base, "a request was taken and not given back"
        device.reap()
        assert all(request.done for request in requests[:base])
        queue.interrupts()
        device.settle(seconds=0.5)
        assert queue.used_idx == used
        assert queue.interrupts() == 0
        restart(device)
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}


def test_stop_one_queue_and_the_other_goes_on(lab: Lab) -> None:
    with lab.device("null", queues=4) as device:
        device.stop_queue(device.queues[1])
        for queue in (0, 2, 3):
            device.read(0, 512, queue=queue)
        request = device.submit(Type.IN, length=512, queue=1)
        device.settle(seconds=0.1)
        assert device.queues[1].used_idx == 0
        device.start_queue(device.queues[1])
        device.wait(request)


def test_stop_twice(lab: Lab) -> None:
    with lab.device() as device:
        device.read(0, 512)
        assert device.stop_queue(device.queues[0]) == 1
        assert device.stop_queue(device.queues[0]) == 1
        restart(device)
        device.read(0, 512)


def test_a_ring_that_never_ran_can_be_stopped(lab: Lab) -> None:
    with lab.device() as device:
        reply = device.channel.ask(Message.GET_VRING_BASE, vring_state(3, 0))
        assert reply == vring_state(3, 0)


def test_the_guest_resets_and_starts_again(lab: Lab) -> None:
    with lab.device(queues=2) as device:
        for round_ in range(20):
            device.write(4096 * round_, bytes([round_]) * 4096)
            device.read(0, 512, queue=1)
            device.reset()
            device.start()
            assert device.read(4096 * round_, 4096) == bytes([round_]) * 4096


def test_other_ring_sizes_after_a_reset(lab: Lab) -> None:
    with lab.device() as device:
        for size in (2, 4, 1024, 256, 1, 128):
            device.reset()
            device.queue_size = size
            device.start()
            for number in range(3 * size if size < 128 else 300):
                request = device.submit(Type.IN, number, length=512, indirect_from=0)
                assert device.checked(request)


@pytest.mark.parametrize("base", [1, 127, 128, 32767, 65535])
def test_a_ring_goes_on_where_it_was(lab: Lab, base: int) -> None:
    with lab.device(base=base) as device:
        for _ in range(300):
            device.read(0, 512)
        assert device.stop_queue(device.queues[0]) == (base + 300) & 0xFFFF


def test_all_the_way_round_the_index(lab: Lab) -> None:
    with lab.device("null", base=65536 - 700) as device:
        for _ in range(12):
            requests = [device.prepare(Type.IN, n, length=512) for n in range(40)]
            device.publish(*requests)
            device.wait(*requests)
            for _ in range(20):
                device.read(0, 512)
        assert device.stop_queue(device.queues[0]) == 20


# ---- kick and enable


def test_a_ring_is_not_processed_before_it_is_enabled(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        device.stop_queue(queue)
        device.enable_queue(queue, False)
        device.start_queue(queue)
        request = device.submit(Type.IN, length=512)
        queue.kick()
        device.settle(seconds=0.2)
        assert queue.used_idx == 0
        device.enable_queue(queue)
        device.wait(request)


def test_nor_without_the_features_that_libvhost_user_mistakes_for_that_bit(lab: Lab) -> None:
    """It takes 30, the number of VHOST_USER_F_PROTOCOL_FEATURES, for a mask: SEG_MAX is in it."""
    with lab.device(features=WANTED & ~(1 << Feature.SEG_MAX)) as device:
        device.disconnect()
        device.connect()  # nothing has been enabled on this connection yet
        queue = device.queues[0]
        device.start_device()
        device.start_queue(queue)
        request = device.submit(Type.IN, length=512)
        queue.kick()
        device.settle(seconds=0.2)
        assert queue.used_idx == 0
        device.enable_queue(queue)
        device.wait(request)


def test_disable_and_enable_while_running(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        for _ in range(50):
            device.enable_queue(queue, False)
            request = device.submit(Type.IN, length=512)
            queue.kick()
            device.enable_queue(queue)
            device.checked(request)


@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_kick_before_enable_is_never_lost(lab: Lab, acknowledged: bool) -> None:
    """The guest kicks as soon as it can; QEMU enables when it gets round to it."""
    with lab.device("null") as device:
        queue = device.queues[0]
        if not acknowledged:
            device.protocol_features &= ~(1 << 3)  # this side only: send and do not wait
        for round_ in range(500):
            device.stop_queue(queue)
            device.enable_queue(queue, False)
            request = device.prepare(Type.IN, length=512)
            if round_ % 2:
                queue.publish(request.head)
                queue.kick()
                device.start_queue(queue)
            else:
                device.start_queue(queue)
                queue.publish(request.head)
                queue.kick()
            device.enable_queue(queue)
            device.checked(request)


def test_a_kick_that_came_before_the_start(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        device.stop_queue(queue)
        request = device.prepare(Type.IN, length=512)
        queue.publish(request.head)
        queue.kick()
        restart(device)
        device.checked(request)


@EVENT_IDX_OR_NOT
def test_kicks_only_where_asked_for(lab: Lab, features: int) -> None:
    """submit() kicks only if the device asks. A kick too few and this hangs."""
    with lab.device("null", features=features) as device:
        rng = random.Random(9)
        for _ in range(1500):
            requests = [device.submit(Type.IN, n, length=512) for n in range(rng.randrange(1, 4))]
            device.wait(*requests)


def test_spurious_kicks(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        for _ in range(1000):
            queue.kick()
        for _ in range(1000):
            queue.kick()
            with suppress(BlockingIOError):  # take it away before the device reads it
                os.eventfd_read(queue.kick_fd)
        for _ in range(100):
            device.read(0, 512)


def test_a_blocking_kick_descriptor(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        device.stop_queue(queue)
        os.close(queue.kick_fd)
        queue.kick_fd = os.eventfd(0, os.EFD_CLOEXEC)
        restart(device)
        for _ in range(200):
            queue.kick()
            device.read(0, 512)
        lab.bystander.read(0, 512)


def test_without_a_kick_descriptor_the_ring_is_polled_or_refused(lab: Lab) -> None:
    with lab.attack(dropped=False) as device:
        device.start()
        device.stop()
        queue = device.queues[0]
        device.start_queue(queue)
        device.channel.send(Message.SET_VRING_KICK, u64(VRING_NOFD))
        request = device.submit(Type.IN, length=512)
        device.wait(request)


def test_a_new_kick_descriptor_while_running(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        for _ in range(20):
            device.read(0, 512)
            old = queue.kick_fd
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            os.close(old)
            device.set_kick(queue)
        device.read(0, 512)


# ---- interrupts


def test_set_vring_call_signals_once(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        queue.interrupts()
        device.set_call(queue)
        device.queue_num()
        assert queue.interrupts() == 1


def test_a_new_call_descriptor_while_running(lab: Lab) -> None:
    """QEMU masks and unmasks interrupts this way, in the middle of anything."""
    with lab.device("slow") as device:
        queue = device.queues[0]
        request = device.submit(Type.IN, length=512)
        old = queue.call_fd
        queue.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        device.set_call(queue)
        os.close(old)
        device.wait(request)


def test_without_a_call_descriptor(lab: Lab) -> None:
    with lab.device() as device:
        queue = device.queues[0]
        device.tell(Message.SET_VRING_CALL, u64(VRING_NOFD))
        queue.interrupts()
        request = device.submit(Type.IN, length=512)
        while not request.done:
            device.reap()
        assert queue.interrupts() == 0
        device.set_call(queue)
        device.read(0, 512)


def alone(device: Device) -> int:
    """Interrupts of one request, waited for without them."""
    queue = device.queues[0]
    request = device.submit(Type.IN, length=512)
    while not request.done:
        device.reap()
    # The used index comes before the interrupt. A message that halts the queue
    # for a moment is answered after both.
    device.enable_queue(queue)
    return queue.interrupts()


@EVENT_IDX_OR_NOT
def test_interrupts_can_be_forbidden(lab: Lab, features: int) -> None:
    with lab.device("null", features=features) as device:
        device.read(0, 512)  # the first interrupt of a ring always comes
        device.queues[0].interrupts()
        device.queues[0].forbid_interrupts()
        assert [alone(device) for _ in range(100)] == [0] * 100
        device.queues[0].allow_interrupts()
        device.read(0, 512)


def test_the_interrupt_comes_where_the_driver_wants_it(lab: Lab) -> None:
    with lab.device("null") as device:
        queue = device.queues[0]
        device.read(0, 512)
        queue.interrupts()
        for _ in range(20):
            queue.set_used_event(queue.last_used + 3)
            assert [alone(device) for _ in range(6)] == [0, 0, 0, 1, 0, 0]


def test_a_batch_is_one_interrupt_or_few(lab: Lab) -> None:
    with lab.device("slow", queue_size=256) as device:
        queue = device.queues[0]
        requests = [device.prepare(Type.IN, n, length=512) for n in range(64)]
        queue.interrupts()
        device.publish(*requests)
        device.wait(*requests)
        device.stop_queue(queue)
        assert queue.interrupts() <= 8


def test_a_call_descriptor_that_is_full_blocks_nobody(lab: Lab) -> None:
    """A blocking eventfd at its maximum: a naive write would sleep for ever."""
    with lab.device("null") as device:
        queue = device.queues[0]
        os.close(queue.call_fd)
        queue.call_fd = os.eventfd(0, os.EFD_CLOEXEC)
        device.set_call(queue)
        os.eventfd_read(queue.call_fd)  # SET_VRING_CALL's own
        os.eventfd_write(queue.call_fd, 0xFFFF_FFFF_FFFF_FFFE)
        requests = [device.submit(Type.IN, n, length=512) for n in range(5)]
        while queue.used_idx != 5:  # no interrupt can tell
            lab.bystander.read(0, 512)
        device.stop()
        device.reap()
        assert all(request.done for request in requests)


# ---- several queues


def test_all_queues_at_once(lab: Lab) -> None:
    rng = random.Random(11)
    size = DISK_SIZE // 8
    with lab.device("many", queues=8) as device:
        assert device.queue_num() == 8
        for _ in range(10):
            writes = []
            for queue in range(8):
                for number in range(8):
                    data = rng.randbytes(4096)
                    offset = queue * size + number * 4096
                    request = device.submit(Type.OUT, offset // 512, data, queue=queue)
                    writes.append((request, offset, data))
            device.wait(*(request for request, _, _ in writes))
            for number, (request, offset, data) in enumerate(writes):
                assert request.status == Status.OK
                assert device.read(offset, 4096, queue=number % 8) == data


def test_fewer_queues_than_offered(lab: Lab) -> None:
    for queues in (1, 3, 8):
        with lab.device("many", queues=queues) as device:
            for queue in range(queues):
                device.read(0, 512, queue=queue)


def test_queues_are_spread_over_the_iothreads(lab: Lab) -> None:
    """Each of the two threads takes the queues it was given, and both are used."""
    with lab.device("many", queues=8) as device:
        before = threads_by_time(lab.daemon.pid)
        for _ in range(30):
            requests = [device.submit(Type.OUT, 8 * n, bytes(4096), queue=n) for n in range(8)]
            device.wait(*requests)
        after = threads_by_time(lab.daemon.pid)
    moved = {name for name, switches in after.items() if switches > before.get(name, 0)}
    assert len([name for name in moved if "io1" in name or "io2" in name]) == 2, moved


def threads_by_time(pid: int) -> dict[str, int]:
    """Context switches of each thread, by name."""
    found = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/comm") as file:
                name = file.read().strip()
            with open(f"/proc/{pid}/task/{task}/status") as file:
                lines = [line for line in file if "voluntary_ctxt_switches" in line]
        except FileNotFoundError:
            continue
        found[name] = sum(int(line.split()[1]) for line in lines)
    return found
