# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests smaller than the blocks of a disk that has sectors of 4 KiB, with O_DIRECT."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_engine import (
    AIO,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    READ,
    WRITE,
    WRITE_ZEROES,
    BareEngine,
    Pending,
)
from loop_devices import attached

KIB, MIB = 1024, 1 << 20
BLOCK, SECTOR = 4096, 512
SIZE = 3 * MIB
THREADS = 3


@pytest.fixture(params=sorted(AIO))
def engine(request: pytest.FixtureRequest) -> Iterator[BareEngine]:
    try:
        made = BareEngine(AIO[request.param], threads=THREADS)
    except OSError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[str]:
    with attached(image, sector=BLOCK) as device:
        yield device


def open_disk(engine: BareEngine, disk: str, **options: Any) -> Any:
    options = {"memory_align": BLOCK, "request_align": BLOCK, "discard_unmap": True} | options
    return engine.file(disk, direct=True, **options)


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 512),
        (3584, 512),
        (512, 1024),
        (3584, 1024),
        (512, 8192),
        (4096, 512),
        (512, 7680),
        (4096, 4608),
        (512, 2 * MIB),
        (1, 1),
        (4095, 2),
    ],
)
def test_a_part_of_a_block(
    engine: BareEngine, image: Path, disk: str, offset: int, length: int, flags: int
) -> None:
    expected = bytearray(image.read_bytes())
    node = open_disk(engine, disk)
    assert engine.read(node, offset, length, skip=1) == expected[offset : offset + length]
    data = os.urandom(length)
    expected[offset : offset + length] = data
    assert engine.run(node, WRITE, offset, data, flags=flags, skip=1) == 0
    assert engine.read(node, 0, SIZE) == expected
    expected[offset : offset + length] = bytes(length)
    assert engine.run(node, WRITE_ZEROES, offset, length, flags=flags) == 0
    assert engine.read(node, 0, SIZE) == expected
    assert engine.run(node, FLUSH) == 0
    os.sync()
    assert image.read_bytes() == expected


def test_a_discard_leaves_what_else_is_in_its_blocks(
    engine: BareEngine, image: Path, disk: str
) -> None:
    expected = bytearray(image.read_bytes())
    node = open_disk(engine, disk)
    assert engine.run(node, DISCARD, BLOCK - SECTOR, 2 * SECTOR) == 0
    assert engine.read(node, 0, SIZE) == expected
    assert engine.run(node, DISCARD, BLOCK - SECTOR, 3 * BLOCK) == 0
    expected[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    assert engine.read(node, 0, SIZE) == expected


def test_what_cannot_be_read_cannot_be_changed(engine: BareEngine, tmp_path: Path) -> None:
    """A file that cannot be read: its neighbours are unknown, and nothing is written."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * BLOCK)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    node = engine.file_of_fd(fd, direct=True, memory_align=BLOCK, request_align=BLOCK)
    assert engine.run(node, WRITE, 0, b"y" * SECTOR) < 0
    assert engine.run(node, WRITE_ZEROES, SECTOR, SECTOR) < 0
    assert path.read_bytes() == b"x" * BLOCK
    assert engine.run(node, WRITE, 0, b"y" * BLOCK) == 0


@pytest.mark.parametrize("size", [SECTOR, 5 * SECTOR, BLOCK + SECTOR, BLOCK + 100])
def test_the_end_of_a_file_within_a_block(engine: BareEngine, tmp_path: Path, size: int) -> None:
    """As under QEMU: the file grows to the end of the block, by zeroes, and no further."""
    path = tmp_path / "image"
    before = os.urandom(size)
    path.write_bytes(before)
    try:
        node = engine.file(path, direct=True, memory_align=BLOCK, request_align=BLOCK)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    start = size - size % SECTOR if size % SECTOR else size - SECTOR
    assert engine.read(node, start, 2 * SECTOR) == before[start:].ljust(2 * SECTOR, b"\0")
    assert engine.run(node, WRITE, start, b"e" * SECTOR) == 0
    after = before[:start] + b"e" * SECTOR
    whole = -(-len(after) // BLOCK) * BLOCK
    assert path.read_bytes() == after.ljust(whole, b"\0")


# ---- many at a time --------------------------------------------------------------------------


class Model:
    """What the disk must hold, and requests that touch different sectors of the same blocks."""

    def __init__(self, engine: BareEngine, node: Any, data: bytes, seed: int) -> None:
        self.engine, self.node = engine, node
        self.data = bytearray(data)
        self.random = random.Random(seed)
        self.started: list[tuple[int, int, int, bytes, Pending]] = []

    def place(self) -> tuple[int, int]:
        """Mostly in the first few blocks, where requests of all threads meet."""
        near = self.random.random() < 0.8
        sectors = (16 * BLOCK if near else len(self.data)) // SECTOR
        most = self.random.choice([1, 2, 8, 24, 300])
        start = self.random.randrange(sectors)
        length = self.random.randint(1, most)
        return start * SECTOR, min(length * SECTOR, len(self.data) - start * SECTOR)

    def is_free(self, offset: int, length: int) -> bool:
        return all(offset >= o + n or o >= offset + length for _, o, n, _, _ in self.started)

    def start(self) -> None:
        offset, length = self.place()
        if not self.is_free(offset, length):
            return
        op = self.random.choice([READ, WRITE, WRITE, WRITE_ZEROES, DISCARD])
        data = self.random.randbytes(length) if op == WRITE else b""
        pending = self.engine.start(
            self.node,
            op,
            offset,
            data or length,
            flags=0 if op in (READ, DISCARD) else self.random.choice([0, 0, FUA, MAY_UNMAP]),
            skip=self.random.choice([0, 0, 512, 3]) if op <= WRITE else 0,
            thread=self.random.randrange(THREADS),
        )
        self.started.append((op, offset, length, data, pending))

    def end(self) -> None:
        self.engine.wait_all()
        for op, offset, length, data, pending in self.started:
            assert pending.ret == 0, (op, offset, length, pending.ret)
            if op == READ:
                assert pending.data == self.data[offset : offset + length], (offset, length)
            elif op == DISCARD:
                self.adopt(offset, length)
            else:
                self.data[offset : offset + length] = data or bytes(length)
        self.started.clear()

    def adopt(self, offset: int, length: int) -> None:
        """Each sector that was discarded is as before, or zeroes."""
        found = self.engine.read(self.node, offset, length)
        for at in range(0, length, SECTOR):
            sector = found[at : at + SECTOR]
            place = slice(offset + at, offset + at + SECTOR)
            assert sector in (self.data[place], bytes(SECTOR))
            self.data[place] = sector


@pytest.mark.parametrize("detect_zeroes", [0, 2])
def test_many_threads_and_a_model(
    engine: BareEngine, image: Path, disk: str, detect_zeroes: int
) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    node = open_disk(engine, disk, detect_zeroes=detect_zeroes)
    model = Model(engine, node, image.read_bytes(), seed)
    for _ in range(60):
        for _ in range(48):
            model.start()
        model.end()
    assert engine.read(node, 0, SIZE) == model.data, f"seed {seed}"
    assert engine.run(node, FLUSH) == 0
    os.sync()
    assert image.read_bytes() == model.data, f"seed {seed}"


def test_one_block_is_everybodys(engine: BareEngine, image: Path, disk: str) -> None:
    """More requests at a time than can be served: all of them end, and none is lost."""
    node = open_disk(engine, disk)
    expected = bytearray(image.read_bytes()[: 2 * BLOCK])
    for byte in range(12):
        pending = []
        for sector in range(16):
            data = bytes([byte * 16 + sector]) * SECTOR
            expected[sector * SECTOR : (sector + 1) * SECTOR] = data
            pending.append(
                engine.start(node, WRITE, sector * SECTOR, data, thread=sector % THREADS)
            )
        pending += [
            engine.start(node, WRITE, block * BLOCK, bytes(BLOCK), thread=block % THREADS)
            for block in range(2, 64)
        ]
        engine.wait_all()
        assert all(one.ret == 0 for one in pending)
        assert engine.read(node, 0, 2 * BLOCK) == expected


@pytest.mark.parametrize("op", [WRITE, WRITE_ZEROES])
def test_a_whole_block_and_a_part_of_it(
    engine: BareEngine, image: Path, disk: str, op: int
) -> None:
    """Which of the two wins in that part is the guest's business; the rest has one writer only."""
    node = open_disk(engine, disk)
    choose = random.Random(0)
    blocks = 12
    for byte in range(1, 41):
        whole = bytes([byte]) * (BLOCK * 2) if op == WRITE else bytes(BLOCK * 2)
        part = b"\xff" * SECTOR
        # Something else is there, which must not come back.
        assert engine.run(node, WRITE, 0, os.urandom(blocks * BLOCK * 2)) == 0
        places = [choose.randrange(16) * SECTOR for _ in range(blocks)]
        for block, place in enumerate(places):
            offset = block * BLOCK * 2
            requests = [
                (op, offset, whole if op == WRITE else len(whole)),
                (WRITE, offset + place, part),
            ]
            choose.shuffle(requests)
            for number, request in enumerate(requests):
                engine.start(node, *request, thread=(block + number) % THREADS)
        engine.wait_all()
        for block, place in enumerate(places):
            found = engine.read(node, block * BLOCK * 2, len(whole))
            assert found in (whole, whole[:place] + part + whole[place + SECTOR :]), (byte, place)
