# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests' front-end against QEMU's back-end: is it right where both agree?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from frontend import BlockError, Daemon, Device, Feature, Status, Type, qemu_storage_daemon

SIZE = 64 << 20


@pytest.fixture(scope="module")
def qsd() -> Iterator[Daemon]:
    with qemu_storage_daemon(queues=4, size=SIZE, **{"read-zeroes": "on"}) as daemon:
        yield daemon


def test_reads_and_writes_on_each_queue(qsd: Daemon) -> None:
    with Device(qsd.socket("e"), queues=4) as device:
        assert device.queue_num() == 4
        assert device.config().capacity == SIZE // 512
        for queue in range(4):
            for number in range(300):  # more than the ring is long
                device.write(number * 512, b"x" * 1024, queue=queue)
            assert device.read(0, 4096, queue=queue) == bytes(4096)
        device.flush()
        device.discard((0, 4096))
        device.write_zeroes(4096, 4096, unmap=True)
        assert device.get_id() == b"vhost_user_blk"


def test_descriptor_layouts(qsd: Daemon) -> None:
    with Device(qsd.socket("e")) as device:
        for indirect_from in (None, 0):
            request = device.submit(
                Type.IN,
                3,
                length=1024,
                out_split=[1, 7],
                in_split=[3, 100, 500],
                indirect_from=indirect_from,
            )
            assert device.checked(request).used_length == 1025


def test_errors_come_back_as_status(qsd: Daemon) -> None:
    with Device(qsd.socket("e")) as device:
        assert device.run(99).status == Status.UNSUPP
        with pytest.raises(BlockError):
            device.read(SIZE, 512)


def test_many_at_once(qsd: Daemon) -> None:
    with Device(qsd.socket("e"), queues=4) as device:
        requests = [device.submit(Type.IN, n, length=512, queue=n % 4) for n in range(120)]
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}


def test_stop_and_start(qsd: Daemon) -> None:
    with Device(qsd.socket("e")) as device:
        for _ in range(10):
            device.read(0, 512)
        assert device.stop_queue(device.queues[0]) == 10
        device.start_queue(device.queues[0])
        device.enable_queue(device.queues[0])
        device.read(0, 512)


def test_dirty_log(qsd: Daemon) -> None:
    without_event_idx = ~(1 << Feature.LOG_ALL | 1 << Feature.RING_EVENT_IDX)
    with Device(qsd.socket("e"), features=without_event_idx) as device:
        device.start_log()
        device.write(0, bytes(512))
        device.dirty_pages()
        request = device.submit(Type.IN, 0, length=8192, in_at=64 * 4096)
        device.checked(request)
        assert device.dirty_pages() == {device.queues[0].used // 4096, 64, 65, 66}
