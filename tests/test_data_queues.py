# SPDX-License-Identifier: GPL-2.0-or-later
"""Several queues at once, from several threads; deep queues; guests that come and go."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from blkio import Disk, DiskError, Model, Op, Server, Workload, needs_vhostblk
from blkio.model import pattern
from blkio.stacks import MIB, SIZE, Stack, by_name

OPS = (Op.READ, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.FLUSH)


def at_once(*functions: Callable[[], None]) -> None:
    """Each in a thread; the first exception of any."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result(timeout=100)


@pytest.mark.parametrize(
    "stack",
    by_name("null", "file-unmap", "file-direct", "aio-threads", "python-wait-direct"),
    ids=str,
)
@pytest.mark.parametrize("poll", [False, True], ids=["interrupts", "polling"])
def test_each_queue_its_own_part(stack: Stack, poll: bool, tmp_path: Path) -> None:
    count = 4
    share = stack.size // count
    model = Model(stack.size, reads_zero=stack.reads_zero)
    with (
        stack.server(tmp_path, queues=count) as server,
        Disk(server.path, queues=count, poll=poll) as disk,
    ):
        # The parts are interleaved at the bytearray only; no two threads touch one byte of it.
        work = [
            Workload(
                queue,
                model,
                seed=number,
                begin=number * share,
                end=(number + 1) * share,
                depth=8,
                ops=OPS,
            )
            for number, queue in enumerate(disk.queues)
        ]
        at_once(*(partial(one.run, 250) for one in work))
        model.check_all(disk)
        for number in range(count):  # and everybody sees everything
            data = disk.read(0, stack.size, queue=number)
            assert stack.reads_zero or data == model.data


@needs_vhostblk
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_queues_over_iothreads(threads: int, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(SIZE))
    names = [f"io{number}" for number in range(threads)]
    server = Server(
        tmp_path,
        [f"driver=file,node-name=disk,filename={image}"],
        queues=8,
        objects=[f"iothread,id={name}" for name in names],
        iothread=names,
    )
    model = Model(SIZE)
    share = SIZE // 8
    with server, Disk(server.path, queues=8, slots=8) as disk:
        work = [
            Workload(q, model, n, begin=n * share, end=(n + 1) * share, depth=8, ops=OPS)
            for n, q in enumerate(disk.queues)
        ]
        at_once(*(partial(one.run, 150) for one in work))
        model.check_all(disk)
    assert image.read_bytes() == model.data


@needs_vhostblk
def test_many_queues_without_asking(tmp_path: Path) -> None:
    """QEMU wants a queue for each vCPU, and nobody should have to say so."""
    image = tmp_path / "image.raw"
    image.write_bytes(pattern(MIB, 1))
    server = Server(tmp_path, [f"driver=file,node-name=disk,filename={image}"])
    at = server.command.index("--export") + 1
    server.command[at] = server.command[at].replace(",num-queues=1", "")
    with server:
        with Disk(server.path, slots=1, slot_size=4096) as disk:
            offered = int(disk.get("max-queues"))
        assert offered >= 16
        with Disk(server.path, queues=offered, slots=1, slot_size=4096) as disk:
            for number, queue in enumerate(disk.queues):
                offset = number * 4096
                assert (
                    queue.run(queue.read(offset, 4096)).data
                    == pattern(MIB, 1)[offset : offset + 4096]
                )


def test_more_queues_than_offered(tmp_path: Path) -> None:
    stack = by_name("file")[0]
    with stack.server(tmp_path, queues=2) as server:
        with pytest.raises(DiskError):
            Disk(server.path, queues=3)
        server.check_alive()
        with Disk(server.path, queues=2) as disk:
            disk.read(0, 4096)


@pytest.mark.parametrize("queue_size", [16, 64, 1024])
@pytest.mark.parametrize("stack", by_name("null", "file", "aio-threads"), ids=str)
def test_a_ring_full_to_the_last_descriptor(stack: Stack, queue_size: int, tmp_path: Path) -> None:
    """More requests than the ring holds: what does not fit waits, and nothing is lost."""
    many = 2 * queue_size
    with (
        stack.server(tmp_path) as server,
        Disk(server.path, slots=many, slot_size=512, queue_size=queue_size) as disk,
    ):
        queue = disk.queues[0]
        for _ in range(3):
            writes = [queue.write(n * 512, pattern(512, n)) for n in range(many)]
            queue.drain()
            reads = [queue.read(n * 512, 512) for n in range(many)]
            queue.drain()
            assert all(request.ret == 0 for request in writes)
            if not stack.reads_zero:
                assert [r.checked().data for r in reads] == [pattern(512, n) for n in range(many)]


@pytest.mark.parametrize("stack", by_name("file", "aio-threads", "python-wait-direct"), ids=str)
def test_requests_of_all_sizes(stack: Stack, tmp_path: Path) -> None:
    with stack.server(tmp_path) as server, Disk(server.path, slots=4, slot_size=4 * MIB) as disk:
        queue, data = disk.queues[0], pattern(4 * MIB, 7)
        for length in (512, 4096, 65536, 65536 + 512, MIB, 4 * MIB - 512, 4 * MIB):
            queue.run(queue.write(512, data[:length]))
            assert queue.run(queue.read(512, length)).data == data[:length]
        # As many segments as the backend takes: seg_max.
        for segments in (2, 17, 126):
            split = [512] * (segments - 1) + [MIB]
            length = sum(split)
            queue.run(queue.write(1024, data[:length], split=split))
            assert queue.run(queue.read(1024, length, split=split[::-1])).data == data[:length]


@pytest.mark.parametrize("stack", by_name("file-unmap", "never-polls", "aio-threads"), ids=str)
def test_guests_come_and_go(stack: Stack, tmp_path: Path) -> None:
    """Each leaves with requests in flight, which are done or not, but nobody else's are lost."""
    rnd = random.Random(4)
    model = Model(stack.size)
    half = stack.size // 2
    with stack.server(tmp_path, queues=2) as server:
        for turn in range(25):
            with Disk(server.path, queues=rnd.choice((1, 2)), slots=16, slot_size=65536) as disk:
                queue = disk.queues[-1]
                Workload(queue, model, turn, end=half, ops=OPS).run(rnd.randint(0, 40))
                for _ in range(rnd.randint(0, 16)):
                    queue.write(half + 4096 * rnd.randrange(half // 4096), b"\x77" * 4096)
                queue.submit()
            server.check_alive()
        with Disk(server.path) as disk:
            assert disk.read(0, half) == model.data[:half]
            rest = disk.read(half, half)
            for at in range(0, half, 4096):
                assert rest[at : at + 4096] in (bytes(4096), b"\x77" * 4096)


def test_one_guest_at_a_time(tmp_path: Path) -> None:
    """A second front-end waits until the first has gone."""
    stack = by_name("file")[0]
    got = threading.Event()

    def second() -> None:
        with Disk(server.path) as disk:
            disk.read(0, 512)
            got.set()

    with stack.server(tmp_path) as server:
        with Disk(server.path) as disk:
            thread = threading.Thread(target=second)
            thread.start()
            disk.write(0, b"\x01" * 512)
            early = got.wait(0.5)
            assert disk.read(0, 512) == b"\x01" * 512
        thread.join(20)
        assert got.is_set() and not early
