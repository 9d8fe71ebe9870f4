# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest makes available at once costs one submission, one push and one notification.

Seen from outside: the system calls of the I/O thread, and the used index after each of its
instructions. The requests become available while that thread stands still, with one kick, so that
it finds all of them; it never spins, so that they are all it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from frontend import Daemon, Device, Feature, Qmp, Request, Status, Type, vhostblk
from frontend.device import WANTED
from frontend.protocol import DISCARD_SEGMENT, DISCARD_UNMAP
from test_file_node_aio import io_uring_works
from traced_thread import IO_URING_ENTER, TracedThread, traced

MIB = 1 << 20
BLOCK = 4096
FSTAT = {"x86_64": {5, 262}, "aarch64": {80, 79}}  # fstat, newfstatat
SWEEP = 8  # requests that a queue starts at least before anybody else has a turn
# Each push of used entries is told then, whatever the driver has seen.
NO_EVENT_IDX = WANTED & ~(1 << Feature.RING_EVENT_IDX)
READ_OR_WRITE = pytest.mark.parametrize("type_", [Type.IN, Type.OUT], ids=["read", "write"])


def takes_direct(path: Path) -> bool:
    """Whether files there can be opened with O_DIRECT; a tmpfs may not know it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Exports of a file with O_DIRECT, whose requests io_uring must do, and of a null node."""
    disk = tmp_path_factory.mktemp("batches") / "disk"
    disk.write_bytes(bytes(4 * MIB))
    nodes = [f"driver=null-co,node-name=null,size={MIB},read-zeroes=on"]
    if takes_direct(disk):
        nodes.append(f"driver=file,node-name=disk,filename={disk},cache.direct=on,discard=unmap")
    arguments = ["--object", "iothread,id=io,poll-max-ns=0", "--control", "{dir}/qmp.sock"]
    for node in nodes:
        name = node.split("node-name=")[1].split(",")[0]
        arguments += ["--blockdev", node, "--export"]
        arguments += [
            f"vhost-user-blk,id={name},node-name={name},addr.type=unix,addr.path={{dir}}/{name}.sock,"
            "writable=on,num-queues=2,iothread=io"
        ]
    with vhostblk(*arguments) as daemon:
        yield daemon


@pytest.fixture
def direct(backend: Daemon) -> Daemon:
    if not os.path.exists(backend.socket("disk")):
        pytest.skip("no O_DIRECT in the directory of temporary files")
    if not io_uring_works():
        pytest.skip("no io_uring here")
    return backend


def io_thread(daemon: Daemon) -> int:
    with Qmp(daemon.socket("qmp")) as qmp:
        threads = {thread["id"]: thread["thread-id"] for thread in qmp.command("query-iothreads")}
    return int(threads["io"])


def prepare(device: Device, type_: Type, count: int, queues: int = 1) -> list[Request]:
    """Requests for blocks that are not next to each other, dealt to the queues in turn."""
    data = os.urandom(BLOCK) if type_ == Type.OUT else b""
    length = BLOCK if type_ == Type.IN else 0
    sectors = [2 * number * BLOCK // 512 for number in range(count)]
    return [
        device.prepare(type_, sector, data, length=length, queue=number % queues)
        for number, sector in enumerate(sectors)
    ]


def publish(device: Device, requests: list[Request]) -> None:
    """Everything at once, and one kick for all queues."""
    for queue in device.queues:
        queue.publish(*(request.head for request in requests if request.queue is queue))
    device.queues[0].kick()


def completed(device: Device) -> int:
    return sum(queue.used_idx for queue in device.queues)


def submissions(thread: TracedThread, device: Device, until: int) -> list[int]:
    """How much each io_uring_enter() handed to the kernel, until all is done and told.

    Not those that wait: they hand over nothing but the wish to be woken.
    """
    found = []
    for call in thread.syscalls():
        if call.number != IO_URING_ENTER:
            continue
        _, to_submit, min_complete = call.arguments[:3]
        if to_submit and not min_complete:
            found.append(to_submit)
        if min_complete and completed(device) == until:
            return found
    raise AssertionError("not reached")


@READ_OR_WRITE
@pytest.mark.parametrize("queues", [1, 2])
def test_the_file_io_of_a_sweep_is_one_system_call(
    direct: Daemon, type_: Type, queues: int
) -> None:
    with Device(direct.socket("disk"), queues=queues) as device:
        requests = prepare(device, type_, SWEEP, queues)
        with traced(io_thread(direct)) as thread:
            publish(device, requests)
            assert submissions(thread, device, SWEEP) == [SWEEP]
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}


@pytest.mark.skipif(os.uname().machine not in FSTAT, reason="numbers of system calls are others")
def test_a_hole_does_not_cost_a_question_for_the_size(direct: Daemon) -> None:
    """Nor does the thread stand still where a server answers that."""
    with Device(direct.socket("disk")) as device:
        data = DISCARD_SEGMENT.pack(0, 128, DISCARD_UNMAP)
        request = device.prepare(Type.WRITE_ZEROES, 0, data)
        numbers = set()
        with traced(io_thread(direct)) as thread:
            publish(device, [request])
            for call in thread.syscalls():
                numbers.add(call.number)
                if call.number == IO_URING_ENTER and completed(device) == 1:
                    break
        assert not numbers & FSTAT[os.uname().machine]
        device.wait(request)
        assert request.status == Status.OK


@READ_OR_WRITE
def test_many_sweeps_are_not_more_system_calls_than_sweeps(direct: Daemon, type_: Type) -> None:
    count = 8 * SWEEP
    with Device(direct.socket("disk"), queue_size=256) as device:
        requests = prepare(device, type_, count)
        with traced(io_thread(direct)) as thread:
            publish(device, requests)
            calls = submissions(thread, device, count)
        assert sum(calls) == count
        assert len(calls) <= count // SWEEP
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}


@READ_OR_WRITE
def test_what_is_done_at_once_is_pushed_once_and_told_once(backend: Daemon, type_: Type) -> None:
    with Device(backend.socket("null"), features=NO_EVENT_IDX) as device:
        queue = device.queues[0]
        requests = prepare(device, type_, SWEEP)
        seen = set()

        def all_done() -> bool:
            seen.add(queue.used_idx)
            return queue.used_idx == SWEEP

        with traced(io_thread(backend)) as thread:
            queue.interrupts()
            publish(device, requests)
            thread.step_until(all_done)
        assert seen == {0, SWEEP}
        device.stop_queue(queue)  # answered after the notification
        assert queue.interrupts() == 1
        device.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
