# SPDX-License-Identifier: GPL-2.0-or-later
"""One queue, two I/O threads: the one that has nothing to do carries out half of the other's work.

Only what is work is shared, so the tree is a quorum here, whose votes are. Requests come in bursts,
since of a few at a time there is nothing to give away.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blkio import Disk, Server, needs_vhostblk
from blkio.model import pattern
from frontend import Qmp

pytestmark = needs_vhostblk

MIB = 1 << 20
SIZE = 16 * MIB
BURST = 32
PIECE = SIZE // BURST
LEGS = "abc"


class Shared:
    """A disk of one queue and two I/O threads, what should be on it, and its control socket."""

    def __init__(self, server: Server, control: Qmp, disk: Disk) -> None:
        self.server = server
        self.control = control
        self.queue = disk.queues[0]
        self.content = bytearray(SIZE)
        self.random = random.Random(1)

    def burst(self) -> None:
        """Many requests at once, each in a piece of the disk of its own."""
        rnd, reads, writes = self.random, [], []
        for number in range(BURST):
            length = 512 * rnd.choice((1, 8, 8, 128))
            offset = number * PIECE + 512 * rnd.randrange((PIECE - length) // 512)
            if rnd.random() < 0.6:
                reads.append((self.queue.read(offset, length), offset, length))
            else:
                data = pattern(length, rnd.randrange(1 << 30))
                writes.append((self.queue.write(offset, data), offset, data))
        if rnd.random() < 0.2:
            self.queue.flush()
        self.queue.drain()
        for request, offset, length in reads:
            assert request.checked().data == self.content[offset : offset + length]
        for request, offset, data in writes:
            request.checked()
            self.content[offset : offset + len(data)] = data

    def shares(self) -> dict[str, int]:
        """How many requests each thread has carried out for the other."""
        threads: list[dict[str, Any]] = self.control.command("query-iothreads")
        return {thread["id"]: thread["shared-requests"] for thread in threads}

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, self.shares()
            for _ in range(20):
                self.burst()


@contextmanager
def shared(directory: Path, **limits: int) -> Iterator[Shared]:
    for leg in LEGS:
        (directory / leg).write_bytes(bytes(SIZE))
    nodes = [f"driver=file,node-name={leg},filename={directory / leg}" for leg in LEGS]
    children = ",".join(f"children.{number}={leg}" for number, leg in enumerate(LEGS))
    nodes.append(f"driver=quorum,node-name=disk,vote-threshold=2,{children}")
    settings = "".join(f",{name.replace('_', '-')}={value}" for name, value in limits.items())
    server = Server(
        directory,
        nodes,
        objects=["iothread,id=io0" + settings, "iothread,id=io1" + settings],
        iothread=["io0", "io1"],
    )
    server.command[server.command.index("none")] = str(directory / "qmp")
    with (
        server,
        Qmp(str(directory / "qmp")) as control,
        Disk(server.path, slots=BURST, slot_size=65536) as disk,
    ):
        yield Shared(server, control, disk)
    for leg in LEGS:
        content = (directory / leg).read_bytes()
        assert content == (directory / LEGS[0]).read_bytes()


def test_both_threads_work_and_everybody_sees_the_same(tmp_path: Path) -> None:
    with shared(tmp_path) as disk:
        disk.until(lambda: disk.shares()["io1"] > 200)
        assert disk.shares()["io0"] == 0  # the other one has no queue of its own
        content = bytes(disk.content)
    assert (tmp_path / "a").read_bytes() == content


def test_what_the_other_thread_has_is_waited_for(tmp_path: Path) -> None:
    """The tree is changed in pauses: nothing of the guest's may be under way then, anywhere."""
    with shared(tmp_path) as disk:
        disk.until(lambda: disk.shares()["io1"] > 0)
        before = disk.shares()["io1"]
        with ThreadPoolExecutor(1) as pool, Qmp(str(tmp_path / "qmp")) as control:

            def change() -> None:
                control.command("object-add", **{"qom-type": "throttle-group", "id": "g"})
                for _ in range(40):
                    control.command(
                        "block-filter-insert",
                        **{
                            "export-id": "e",
                            "filter": {
                                "driver": "throttle",
                                "node-name": "t",
                                "throttle-group": "g",
                            },
                        },
                    )
                    control.command("block-filter-remove", **{"node-name": "t"})

            changes = pool.submit(change)
            disk.until(lambda: changes.done() and disk.shares()["io1"] > before)
            changes.result()
        content = bytes(disk.content)
    assert (tmp_path / "b").read_bytes() == content


def test_a_thread_that_may_not_spin_is_left_alone(tmp_path: Path) -> None:
    with shared(tmp_path, poll_max_ns=0) as disk:
        for _ in range(200):
            disk.burst()
        assert set(disk.shares().values()) == {0}


@pytest.mark.parametrize("order", [("io0", "io1"), ("io1", "io0")], ids="-".join)
def test_the_threads_end_in_any_order(tmp_path: Path, order: tuple[str, str]) -> None:
    """The export and both of its threads go while the process lives on."""
    with shared(tmp_path) as disk:
        disk.until(lambda: disk.shares()["io1"] > 0)
        disk.control.command("block-export-del", id="e", mode="hard")
        while disk.control.command("query-block-exports"):
            time.sleep(0.01)
        for thread in order:
            disk.control.command("object-del", id=thread)
        assert not {"io0", "io1"} & disk.shares().keys()
        disk.server.check_alive()
