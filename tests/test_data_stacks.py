# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest writes is what it reads, through every stack: random requests against a model.

libblkio is the guest; at the end qemu-img and qemu-io look at the image.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from blkio import Disk, Model, Op, Request, Workload
from blkio.library import plain_environment
from blkio.model import pattern
from blkio.stacks import MIB, Stack, usable
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from thoroughness import tries

# Bytes of the disk that hypothesis plays with: small, so that its requests meet one another.
ARENA = 64 << 10
SECTORS = ARENA // 512


def judge_image(stack: Stack, directory: Path, model: Model) -> None:
    """The backend has ended: QEMU's tools find in the image what the model says."""
    if stack.reads_zero:
        return
    image, reference = stack.image(directory), directory / "reference.raw"
    data = bytes(model.data)
    reference.write_bytes(bytes(255 - b for b in data) if stack.inverted else data)
    part = {
        "driver": "raw",
        "offset": stack.offset,
        "size": stack.size,
        "file": {"driver": "file", "filename": str(image)},
    }
    compare = ["qemu-img", "compare", f"json:{json.dumps(part)}", str(reference)]
    done = subprocess.run(
        compare,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with image.open("rb") as file:
        file.seek(stack.offset)
        assert file.read(stack.size) == reference.read_bytes()
        rest = file.read()
        file.seek(0)
        assert not any(file.read(stack.offset)) and not any(rest), "written outside of the disk"


@pytest.mark.parametrize("stack", usable(), ids=str)
def test_random_requests(stack: Stack, tmp_path: Path) -> None:
    model = Model(stack.size, discards=stack.expected_discards, reads_zero=stack.reads_zero)
    ops = [Op.READ, Op.READ, Op.WRITE, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.FLUSH, Op.DISCARD]
    if stack.expected_discards == "any":
        ops.remove(Op.DISCARD)
    with stack.server(tmp_path) as server:
        with Disk(server.path) as disk:
            assert disk.capacity == stack.size
            queue = disk.queues[0]
            Workload(queue, model, seed=1, ops=ops).run(600)
            # Crowded, so that requests touch one another's pages and file-system blocks.
            Workload(queue, model, 2, end=256 << 10, biggest=8 << 10, ops=ops).run(600)
            # The end of the disk, where the file ends as well.
            Workload(queue, model, 3, begin=stack.size - 128 * 1024, ops=ops, depth=30).run(300)
            model.check_all(disk)
            disk.flush()
        with Disk(server.path) as disk:  # a guest that comes back
            model.check_all(disk)
    judge_image(stack, tmp_path, model)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[Op, int, int, int, tuple[int, ...], bool]]:
    """Requests that are in flight together: none touches another, but for reads of reads."""
    taken: list[tuple[bool, int, int]] = []
    batch = []
    for _ in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(list(Op)))
        first = draw(st.integers(0, SECTORS - 1))
        count = draw(st.integers(1, min(SECTORS - first, 64)))
        write = op is not Op.READ
        if op is not Op.FLUSH:
            if any(
                (write or wrote) and first < end and begin < first + count
                for wrote, begin, end in taken
            ):
                continue
            taken.append((write, first, first + count))
        cuts = draw(st.lists(st.integers(1, count), max_size=4, unique=True).map(sorted))
        seed = draw(st.integers(0, 3))
        batch.append((op, first, count, seed, tuple(cuts), draw(st.booleans())))
    return batch


@pytest.mark.parametrize("stack", usable(), ids=str)
def test_any_sequence_of_batches(stack: Stack, tmp_path: Path) -> None:
    with stack.server(tmp_path) as server, Disk(server.path) as disk:

        @settings(
            max_examples=tries(25),
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(batches(), min_size=1, max_size=6))
        def sequence(todo: list[list[tuple[Op, int, int, int, tuple[int, ...], bool]]]) -> None:
            model = Model(ARENA, discards=stack.expected_discards, reads_zero=stack.reads_zero)
            model.data[:] = pattern(ARENA, 99)
            disk.write(0, bytes(model.data))
            queue = disk.queues[0]
            for batch in todo:
                requests = []
                for op, first, count, seed, cuts, flag in batch:
                    offset, length = first * 512, count * 512
                    points = [0, *(512 * cut for cut in cuts if cut < count), length]
                    split = [b - a for a, b in itertools.pairwise(points)]
                    if op is Op.READ:
                        requests.append(queue.read(offset, length, split=split))
                    elif op is Op.WRITE:
                        data = pattern(length, seed) if seed else bytes(length)
                        requests.append(queue.write(offset, data, split=split, fua=flag))
                    elif op is Op.FLUSH:
                        requests.append(queue.flush())
                    elif op is Op.DISCARD:
                        requests.append(queue.discard(offset, length))
                    else:
                        requests.append(queue.write_zeroes(offset, length, unmap=flag))
                queue.drain()
                for request in requests:
                    model.completed(request)
                for request in requests:
                    model.settle(disk, request)
            model.check_all(disk)

        sequence()


@pytest.mark.parametrize("stack", usable(), ids=str)
def test_qemu_io_writes_and_the_guest_reads(stack: Stack, tmp_path: Path) -> None:
    if stack.reads_zero or stack.inverted:
        pytest.skip("the image does not hold what the guest sees")
    server = stack.server(tmp_path)  # makes the image
    done = subprocess.run(
        [
            *("qemu-io", "-f", "raw"),
            *("-c", f"write -P 0x5a {stack.offset + 512} 70000"),
            *("-c", f"write -P 0x3c {stack.offset + stack.size - MIB} 1M"),
            *("-c", f"write -z {stack.offset + stack.size - 4096} 2048"),
            str(stack.image(tmp_path)),
        ],
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with server, Disk(server.path) as disk:
        # qemu-io rounds to sectors with what was there: zeroes.
        assert disk.read(0, 71168) == (bytes(512) + b"\x5a" * 70000).ljust(71168, b"\0")
        end = disk.read(stack.size - MIB, MIB)
        assert end == b"\x3c" * (MIB - 4096) + bytes(2048) + b"\x3c" * 2048
        disk.write(4096, pattern(8192, 5))
        disk.flush()
    with stack.image(tmp_path).open("rb") as image:
        image.seek(stack.offset + 4096)
        assert image.read(8192) == pattern(8192, 5)


@pytest.mark.parametrize("stack", usable(), ids=str)
def test_beyond_the_end(stack: Stack, tmp_path: Path) -> None:
    with stack.server(tmp_path) as server, Disk(server.path) as disk:
        queue = disk.queues[0]
        for offset in (stack.size - 512, stack.size, 1 << 40):
            starts: list[Callable[[int], Request]] = [
                lambda at: queue.read(at, 1024),
                lambda at: queue.write(at, bytes(1024)),
                lambda at: queue.discard(at, 1024),
                lambda at: queue.write_zeroes(at, 1024),
            ]
            for start in starts:
                with pytest.raises(OSError):
                    queue.run(start(offset))
        disk.write(stack.size - 512, b"\x11" * 512)
        expected = bytes(512) if stack.reads_zero else b"\x11" * 512
        assert disk.read(stack.size - 512, 512) == expected
        server.check_alive()
