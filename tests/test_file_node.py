# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's file node on real files: data, ends of files, holes, zeroes, limits, alignment."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
)
from loop_devices import attached

KIB, MIB = 1024, 1 << 20


@pytest.fixture(params=sorted(AIO))
def engine(request: pytest.FixtureRequest) -> Iterator[BareEngine]:
    try:
        made = BareEngine(AIO[request.param])
    except OSError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """1 MiB of noise."""
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


def blocks(path: Path) -> int:
    """Bytes that the file really has on disk."""
    os.sync()
    return os.stat(path).st_blocks * 512


def needs_direct(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT on this file system")


# ---- plain reads and writes --------------------------------------------------------------


def test_reads_what_is_there(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    data = image.read_bytes()
    for offset, length in [(0, 512), (1, 1), (4095, 2), (0, MIB), (MIB - 7, 7), (12345, 54321)]:
        assert engine.read(node, offset, length) == data[offset : offset + length]


def test_writes_what_it_is_given(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    expected = bytearray(image.read_bytes())
    for number, (offset, length) in enumerate([(0, 512), (4095, 2), (77777, 200000), (MIB - 1, 1)]):
        data = os.urandom(length)
        expected[offset : offset + length] = data
        assert engine.run(node, WRITE, offset, data, flags=FUA * (number % 2)) == 0
    assert engine.run(node, FLUSH) == 0
    assert image.read_bytes() == expected


def test_requests_larger_than_what_is_done_inline(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    data = os.urandom(9 * MIB + 13)
    before = engine.info.queued_ios
    assert engine.run(node, WRITE, 0, data) == 0
    assert engine.read(node, 0, len(data)) == data
    assert engine.info.queued_ios > before
    assert image.read_bytes() == data


def test_many_at_once(engine: BareEngine, image: Path) -> None:
    needs_direct(image)
    direct = engine.file(image, direct=True)
    writes = {n: os.urandom(512) for n in range(600)}
    for n, data in writes.items():
        engine.start(direct, WRITE, n * 1024, data)
    engine.wait_all()
    reads = {n: engine.start(direct, READ, n * 1024, 512) for n in writes}
    engine.wait_all()
    assert all(reads[n].ret == 0 and reads[n].data == data for n, data in writes.items())


def test_page_cache_pays_for_no_thread(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    image.read_bytes()
    before = engine.info
    for n in range(200):
        assert engine.run(node, READ, n * 4096, 4096) == 0
    for n in range(200):
        assert engine.run(node, WRITE, n * 4096, b"x" * 4096) == 0
    after = engine.info
    # A busy machine may look like a slow disk now and then, never for long.
    assert after.inline_ios - before.inline_ios > 300
    assert after.queued_ios - before.queued_ios < 100


def test_cold_file(engine: BareEngine, image: Path) -> None:
    """What is not in the page cache is read all the same, by the backend."""
    data = image.read_bytes()
    fd = os.open(image, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    node = engine.file(image)
    assert engine.read(node, 512 * KIB, 64 * KIB) == data[512 * KIB : 576 * KIB]
    assert engine.read(node, 0, MIB) == data


# ---- the end of the file -------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_reads_past_the_end_are_zeroes(engine: BareEngine, image: Path, direct: bool) -> None:
    needs_direct(image)
    os.truncate(image, 10_001)
    data = image.read_bytes()
    node = engine.file(image, direct=direct)
    assert engine.read(node, 8192, 4096) == data[8192:] + bytes(4096 - 1809)
    assert engine.read(node, 0, 64 * KIB) == data + bytes(64 * KIB - 10_001)
    assert engine.read(node, 1 * MIB, 4096) == bytes(4096)
    assert engine.read(node, 9728, 273) == data[9728:10_001]
    assert engine.read(node, 9728, 1024, skip=3) == data[9728:] + bytes(1024 - 273)


@pytest.mark.parametrize("flags", [0, FUA])
def test_odd_end_of_a_direct_file_is_writable(engine: BareEngine, image: Path, flags: int) -> None:
    """As under QEMU, the file grows to whole blocks, by zeroes."""
    needs_direct(image)
    os.truncate(image, 10_001)
    expected = bytearray(image.read_bytes())
    node = engine.file(image, direct=True)
    tail = os.urandom(10_001 - 9728)
    expected[9728:] = tail
    assert engine.run(node, WRITE, 9728, tail, flags=flags) == 0
    assert engine.run(node, FLUSH) == 0
    expected += bytes(10_240 - 10_001)
    assert image.read_bytes() == expected
    assert engine.read(node, 9728, 512) == tail + bytes(512 - len(tail))
    assert engine.run(node, WRITE_ZEROES, 9728, 10_001 - 9728, flags=flags) == 0
    assert image.read_bytes() == expected[:9728] + bytes(512)


def test_write_past_the_end_extends(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    assert engine.run(node, WRITE, 2 * MIB, b"end") == 0
    assert image.stat().st_size == 2 * MIB + 3
    assert engine.read(node, MIB, MIB) == bytes(MIB)


# ---- O_DIRECT --------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1, 8, 511, 512])
@pytest.mark.parametrize("length", [512, 4096, 3 * MIB])
def test_direct_with_any_memory(engine: BareEngine, image: Path, skip: int, length: int) -> None:
    needs_direct(image)
    node = engine.file(image, direct=True)
    data = os.urandom(length)
    assert engine.run(node, WRITE, 512, data, skip=skip) == 0
    assert engine.read(node, 512, length, skip=skip) == data
    assert image.read_bytes()[512 : 512 + length] == data


def test_direct_fua_and_flush(engine: BareEngine, image: Path) -> None:
    needs_direct(image)
    node = engine.file(image, direct=True)
    assert engine.run(node, WRITE, 0, b"d" * 4096, flags=FUA) == 0
    assert engine.run(node, FLUSH) == 0
    assert engine.run(node, WRITE_ZEROES, 512, 1024, flags=FUA) == 0
    assert image.read_bytes()[:4096] == b"d" * 512 + bytes(1024) + b"d" * 2560
    assert engine.info.inline_ios == 0


# ---- discard, zeroes ----------------------------------------------------------------------------


def test_discard_makes_holes(engine: BareEngine, image: Path) -> None:
    node = engine.file(image, discard_unmap=True)
    before = blocks(image)
    assert engine.run(node, DISCARD, 256 * KIB, 512 * KIB) == 0
    assert blocks(image) == before - 512 * KIB
    with image.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 256 * KIB
        assert os.lseek(file.fileno(), 256 * KIB, os.SEEK_DATA) == 768 * KIB
    assert image.stat().st_size == MIB


def test_discard_is_ignored_unless_asked_for(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    data = image.read_bytes()
    assert engine.run(node, DISCARD, 0, MIB) == 0
    assert image.read_bytes() == data


@pytest.mark.parametrize("unmap", [False, True], ids=["allocated", "hole"])
@pytest.mark.parametrize("flags", [0, FUA, MAY_UNMAP, FUA | MAY_UNMAP])
def test_write_zeroes(engine: BareEngine, image: Path, flags: int, unmap: bool) -> None:
    node = engine.file(image, discard_unmap=unmap)
    data = image.read_bytes()
    before = blocks(image)
    assert engine.run(node, WRITE_ZEROES, 100 * KIB + 1, 300 * KIB, flags=flags) == 0
    end = 400 * KIB + 1
    assert image.read_bytes() == data[: 100 * KIB + 1] + bytes(300 * KIB) + data[end:]
    holes = before - blocks(image)
    if unmap and flags & MAY_UNMAP:
        assert holes >= 296 * KIB
    else:
        assert holes <= 0


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("flags", [0, MAY_UNMAP])
def test_zeroes_past_the_end_extend(
    engine: BareEngine, image: Path, flags: int, direct: bool
) -> None:
    needs_direct(image)
    node = engine.file(image, discard_unmap=True, direct=direct)
    assert engine.run(node, WRITE_ZEROES, MIB - 4096, 8 * MIB + 512, flags=flags) == 0
    assert image.stat().st_size == 9 * MIB + 512 - 4096
    assert not any(image.read_bytes()[MIB - 4096 :])


@pytest.mark.parametrize("flags", [0, FUA])
def test_zeroes_where_the_file_system_cannot(engine: BareEngine, flags: int) -> None:
    """tmpfs has no FALLOC_FL_ZERO_RANGE: zeroes are written, also the second time."""
    fd = os.memfd_create("image")
    os.write(fd, b"\xff" * (4 * MIB))
    node = engine.file_of_fd(fd, discard_unmap=True)
    for offset, length in [(1, 3 * MIB + 77), (100, 5), (64 * KIB, 64 * KIB)]:
        os.pwrite(fd, b"\xff" * (4 * MIB), 0)
        assert engine.run(node, WRITE_ZEROES, offset, length, flags=flags) == 0
        expected = bytearray(b"\xff" * (4 * MIB))
        expected[offset : offset + length] = bytes(length)
        assert os.pread(fd, 4 * MIB, 0) == expected
    assert engine.run(node, WRITE_ZEROES, 0, 4 * MIB, flags=flags | MAY_UNMAP) == 0
    assert os.fstat(fd).st_blocks == 0


@pytest.mark.parametrize(("detect", "unmap"), [(0, True), (1, True), (2, False), (2, True)])
def test_detect_zeroes(engine: BareEngine, image: Path, detect: int, unmap: bool) -> None:
    node = engine.file(image, detect_zeroes=detect, discard_unmap=unmap)
    before = blocks(image)
    assert engine.run(node, WRITE, 0, bytes(64 * KIB)) == 0
    holes = before - blocks(image)
    assert holes == (64 * KIB if detect == 2 and unmap else 0)
    assert image.read_bytes()[: 64 * KIB] == bytes(64 * KIB)


@pytest.mark.parametrize("where", [0, 1, 63, 64, 4095, 5000, 65534, 65535])
def test_detect_zeroes_sees_every_byte(engine: BareEngine, image: Path, where: int) -> None:
    node = engine.file(image, detect_zeroes=2, discard_unmap=True)
    data = bytearray(65536)
    data[where] = 1
    assert engine.run(node, WRITE, 4096, bytes(data), skip=where % 3) == 0
    assert image.read_bytes()[4096 : 4096 + 65536] == data


# ---- refusals and limits -----------------------------------------------------------------------


def test_read_only(engine: BareEngine, image: Path) -> None:
    node = engine.file(image, read_only=True, discard_unmap=True)
    data = image.read_bytes()
    for op in (WRITE, DISCARD, WRITE_ZEROES):
        assert engine.run(node, op, 0, b"x" * 512 if op == WRITE else 512) == -errno.EPERM
    assert engine.run(node, FLUSH) == 0
    assert engine.read(node, 0, MIB) == data == image.read_bytes()


def test_no_flush(engine: BareEngine, image: Path) -> None:
    node = engine.file(image, no_flush=True)
    before = engine.info.queued_ios
    assert engine.run(node, FLUSH) == 0
    assert engine.info.queued_ios == before
    assert engine.run(node, WRITE, 0, b"x" * 512) == 0
    written = engine.info.queued_ios
    assert engine.run(node, WRITE, 0, b"x" * 512, flags=FUA) == 0
    # The write itself may have to wait for a page; no flush comes after it.
    assert engine.info.queued_ios <= written + 1


def test_empty_requests(engine: BareEngine, image: Path) -> None:
    node = engine.file(image, discard_unmap=True, detect_zeroes=2)
    for op in (READ, WRITE, DISCARD, WRITE_ZEROES):
        assert engine.run(node, op, 512, 0) == 0


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("skip", [0, 5])
def test_short_write_goes_on_to_the_real_error(
    engine: BareEngine, image: Path, direct: bool, skip: int
) -> None:
    """A write across the limit is short; the rest must be tried, and fails for what it is."""
    needs_direct(image)
    node = engine.file(image, direct=direct)
    data = os.urandom(8192)
    with file_size_limit(2 * MIB):
        ret = engine.run(node, WRITE, 2 * MIB - 4096, data, skip=skip)
    assert ret == -errno.EFBIG
    assert image.read_bytes()[2 * MIB - 4096 :] == data[:4096]
    assert engine.run(node, WRITE, 2 * MIB - 4096, data, skip=skip) == 0
    assert image.read_bytes()[2 * MIB - 4096 :] == data


def test_disk_full(engine: BareEngine, small_disk: Path) -> None:
    image = small_disk / "image"
    image.touch()
    os.truncate(image, 4 * MIB)
    node = engine.file(image, discard_unmap=True)
    assert engine.run(node, WRITE, 0, b"x" * (2 * MIB)) == -errno.ENOSPC
    assert engine.run(node, WRITE, 3 * MIB, b"y" * 4096) == -errno.ENOSPC
    assert engine.run(node, FLUSH) == 0
    # Nothing is lost for good: the operator makes room, the guest tries again.
    assert engine.run(node, DISCARD, 0, MIB) == 0
    assert engine.run(node, WRITE, 3 * MIB, b"y" * 4096) == 0
    assert engine.read(node, 3 * MIB, 4096) == b"y" * 4096


def test_refuses_what_is_not_a_disk(engine: BareEngine, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="neither a regular file nor a block device"):
        engine.file("/dev/null")
    (tmp_path / "image").touch()
    with pytest.raises(OSError, match="alignments 3"):
        engine.file(tmp_path / "image", memory_align=3)


# ---- a block device ----------------------------------------------------------------------------


@pytest.fixture
def loop_device(image: Path) -> Iterator[str]:
    with attached(image) as device:
        yield device


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_block_device(engine: BareEngine, image: Path, loop_device: str, direct: bool) -> None:
    expected = bytearray(image.read_bytes())
    node = engine.file(loop_device, direct=direct, discard_unmap=True)
    assert engine.read(node, 0, MIB) == expected
    data = os.urandom(8192)
    expected[4096:12288] = data
    assert engine.run(node, WRITE, 4096, data, skip=1, flags=FUA) == 0
    for flags, offset in [(0, 64 * KIB), (MAY_UNMAP, 128 * KIB)]:
        expected[offset : offset + 64 * KIB] = bytes(64 * KIB)
        assert engine.run(node, WRITE_ZEROES, offset, 64 * KIB, flags=flags) == 0
    assert engine.run(node, DISCARD, 512 * KIB, 512) == 0
    assert engine.run(node, FLUSH) == 0
    assert engine.read(node, 0, 512 * KIB) == expected[: 512 * KIB]
    os.sync()
    assert image.read_bytes()[: 512 * KIB] == expected[: 512 * KIB]
