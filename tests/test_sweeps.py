# SPDX-License-Identifier: GPL-2.0-or-later
"""One queue's share of an I/O thread's turn is bounded: nobody waits for all that another has.

What a queue has is started a sweep at a time, and then the thread's other queues have their turn.
Everything here is made available while the queues are held, so that each finds its ring full at
the first look; then a node at the end of the tree writes down in which order requests come.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import ClassVar

import pytest
from bare_engine import IO_URING, BareEngine
from frontend import Type
from in_process import MIB, Host, with_host
from test_file_node_aio import io_uring_works

from vhostblk.filter import Filter, Request

SECTOR = 512
DISK = 1 << 30
# Each queue reads its own half: the offset says whose request it was.
HALF = DISK // 2


class Recorder(Filter):
    """Writes down the offsets of reads."""

    driver = "recorder"
    seen: ClassVar[list[int]] = []

    async def read(self, request: Request) -> None:
        self.seen.append(request.offset)
        request.forward()


def order(length: int, count: int) -> list[int]:
    """Two queues with `count` reads each, ready at the same time: whose came when."""
    Recorder.seen.clear()

    async def scenario(host: Host) -> None:
        await host.null(size=DISK)
        await host.add("recorder", "f", file="null")
        await host.export("f", num_queues=2)
        async with host.device(queues=2) as guest:
            device = guest.device
            buffer = device.memory.alloc(length + 1)
            async with host.backend.graph.drained([host.backend.graph.node("f")]):
                requests = [
                    device.submit(
                        Type.IN,
                        (queue * HALF + number * SECTOR) // SECTOR,
                        length=length,
                        queue=queue,
                        in_at=buffer,
                    )
                    for queue in range(2)
                    for number in range(count)
                ]
            await guest.wait(*requests)

    with_host(scenario, Recorder)
    return [offset // HALF for offset in Recorder.seen]


def turns(owners: list[int]) -> list[int]:
    """How many requests in a row each turn had."""
    return [len(list(group)) for _, group in itertools.groupby(owners)]


def test_many_requests_of_one_queue_do_not_go_before_those_of_another() -> None:
    seen = turns(order(512, 40))
    assert sum(seen) == 80
    assert max(seen) <= 16, seen


def test_large_requests_count_by_their_bytes() -> None:
    """Fewer of them than requests in a sweep, but many more bytes than a sweep moves."""
    seen = turns(order(2 * MIB, 7))
    assert sum(seen) == 14
    assert max(seen) * 2 * MIB <= 8 * MIB, seen


def workers() -> set[str]:
    """The kernel's own threads for what an io_uring of this process could not do at once."""

    def name(task: str) -> str:
        try:
            return Path("/proc/self/task", task, "comm").read_text().strip()
        except FileNotFoundError:
            return ""

    return {task for task in os.listdir("/proc/self/task") if name(task).startswith("iou-wrk")}


@pytest.mark.skipif(not io_uring_works(), reason="no io_uring here")
def test_large_requests_are_copied_by_another_thread(tmp_path: Path) -> None:
    """Even from the page cache: in the I/O thread's own call its other queues would wait."""
    path = tmp_path / "cached"
    path.write_bytes(bytes(8 * MIB))
    before = workers()
    with BareEngine(IO_URING) as engine:
        node = engine.file(path)
        small = [engine.start(node, 0, n * 4096, 4096) for n in range(16)]
        engine.wait_all()
        assert {request.ret for request in small} == {0}
        assert not workers() - before
        engine.read(node, 0, 8 * MIB)
        assert workers() - before
