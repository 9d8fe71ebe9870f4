# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile in ways that only count: too much at once, a wrong moment, a descriptor with a catch."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import pytest
from frontend import Device, Message
from frontend.lab import Lab
from frontend.protocol import REQUEST_HEADER, Type, inflight_description, u64
from frontend.virtqueue import DESC_F_INDIRECT, Segment

pytest_plugins = ["frontend.fixtures"]

UNKNOWN_TYPE = 99


def fill_ring(device: Device, type_: int) -> int:
    """Every descriptor of the ring is the same one-sector request; the address of its header."""
    queue, memory = device.queues[0], device.memory
    header = memory.alloc(16)
    table = memory.alloc(64)
    memory.write(header, REQUEST_HEADER.pack(type_, 0, 0))
    chain = queue.table([Segment(header, 16, False), Segment(memory.alloc(513), 513, True)])
    memory.write(table, chain)
    for index in range(queue.size):
        queue.set_descriptor(index, table, len(chain), DESC_F_INDIRECT)
    return header


def test_a_ring_full_of_requests_made_available_twice(lab: Lab) -> None:
    """Once while they are in flight, for the moment when all have completed and none is used."""
    with lab.attack("slow", queue_size=1024) as device:
        device.start()
        header = fill_ring(device, Type.IN)
        queue = device.queues[0]
        queue.publish(*range(1024))
        queue.kick()
        assert device.inflight is not None
        while len(device.inflight.heads(0)) < 1024:
            time.sleep(0.001)
        # Answered at once, so that both halves of the sweep complete requests; and no kick.
        device.memory.write(header, REQUEST_HEADER.pack(UNKNOWN_TYPE, 0, 0))
        queue.publish(*range(1024))
        assert device.channel.wait_closed(10)


@pytest.mark.parametrize("message", [Message.SET_INFLIGHT_FD, Message.GET_INFLIGHT_FD])
def test_area_changed_under_a_running_ring(lab: Lab, message: Message) -> None:
    with lab.attack("disk", queue_size=1024) as device:
        device.start()
        device.write(0, b"x" * 512)
        fd = os.memfd_create("area")
        os.ftruncate(fd, 4096)
        fds = [fd] if message == Message.SET_INFLIGHT_FD else []
        device.channel.send(message, inflight_description(64, 0, 1, 1), fds)
        os.close(fd)


def test_area_replaced_by_one_for_fewer_queues(lab: Lab) -> None:
    """The queues it does not cover may not go on with the old one."""
    with lab.attack("disk", dropped=False, queues=2) as device:
        fd = os.memfd_create("area")
        os.ftruncate(fd, 1 << 20)
        for queues in 2, 1:
            payload = inflight_description(1 << 20, 0, queues, 128)
            device.tell(Message.SET_INFLIGHT_FD, payload, [fd])
            device.channel.ask(Message.GET_QUEUE_NUM)  # both were read
        os.close(fd)
        device.set_config(32, b"\0")
        device.set_config(32, b"\1")


def test_call_descriptor_that_blocks(lab: Lab) -> None:
    """The open file is shared: its flags and its counter are the front-end's too."""
    with lab.attack("null", dropped=False) as device:
        device.start()
        call = device.queues[0].call_fd
        os.set_blocking(call, False)
        with suppress(BlockingIOError):
            os.eventfd_read(call)
        os.eventfd_write(call, (1 << 64) - 2)
        os.set_blocking(call, True)
        device.submit(Type.IN, 0, length=512)
        time.sleep(0.1)  # the I/O thread sleeps in its write now, until this front-end has gone


def test_kick_that_is_no_eventfd(lab: Lab) -> None:
    with lab.attack("null") as device:
        device.share_memory()
        device.set_features(device.features)
        device.make_queues()
        queue = device.queues[0]
        reader, writer = os.pipe()
        device.channel.send(Message.SET_VRING_KICK, u64(queue.index), [writer])
        os.close(reader)
        os.close(writer)
