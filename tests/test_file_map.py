# SPDX-License-Identifier: GPL-2.0-or-later
"""What is cached is read and written through a mapping of the file: right whatever befalls it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare_engine import (
    AIO,
    DISCARD,
    FLUSH,
    FUA,
    GUEST,
    MAY_UNMAP,
    WRITE,
    WRITE_ZEROES,
    BareEngine,
)

KIB, MIB = 1024, 1 << 20
PAGE = 4096


@pytest.fixture
def engine() -> Iterator[BareEngine]:
    with BareEngine(AIO["threads"]) as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    filesystem = subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True
    ).stdout.strip()
    if filesystem not in ("ext2/ext3", "xfs", "btrfs", "f2fs", "tmpfs"):
        pytest.skip(f"files on {filesystem} are not mapped")
    return path


@pytest.fixture
def overwritten(image: Path) -> Path:
    """On a file system where mappings are written to."""
    filesystem = subprocess.run(
        ["stat", "-f", "-c", "%T", image], capture_output=True, text=True, check=True
    ).stdout.strip()
    if filesystem in ("btrfs", "f2fs"):
        pytest.skip(f"files on {filesystem} are not written to through a mapping")
    return image


def mapped(engine: BareEngine) -> int:
    return int(engine.info.mapped_ios)


def resident(path: Path) -> int:
    """KiB of this process's memory that are the mapping of `path`."""
    text = Path("/proc/self/smaps").read_text()
    entries = re.findall(rf"{re.escape(str(path))}\n.*?\nRss: +(\d+) kB", text, re.DOTALL)
    return sum(map(int, entries))


def test_second_small_read_needs_no_system_call(engine: BareEngine, image: Path) -> None:
    node = engine.file(image)
    expected = image.read_bytes()
    assert engine.read(node, 8 * PAGE, PAGE) == expected[8 * PAGE : 9 * PAGE]
    assert mapped(engine) == 0  # nothing was known of that page
    assert engine.read(node, 8 * PAGE, PAGE) == expected[8 * PAGE : 9 * PAGE]
    assert mapped(engine) == 1
    assert engine.read(node, 8 * PAGE + 512, 1536) == expected[8 * PAGE + 512 : 8 * PAGE + 2048]
    assert mapped(engine) == 2
    engine.read(node, 8 * PAGE, 2 * PAGE)  # one page known, one not
    assert mapped(engine) == 2
    engine.read(node, 0, 64 * KIB)  # large reads gain nothing
    engine.read(node, 0, 64 * KIB)
    assert mapped(engine) == 2


def test_files_are_mapped_at_different_places(engine: BareEngine, image: Path) -> None:
    """Those of legs of the same size: a cache of a CPU must have room for the same byte of each."""
    paths = [image.with_name(f"{image.name}-{number}") for number in range(8)]
    for path in paths:
        path.touch()
        os.truncate(path, 4 << 30)
        engine.file(path)
    places = set()
    for path in paths:
        maps = Path("/proc/self/maps").read_text()
        begin, end = re.findall(rf"(?m)^(\w+)-(\w+) .* {re.escape(str(path))}$", maps)[0]
        places.add(int(begin, 16) % (64 * MIB))
        assert int(begin, 16) % (2 * MIB) == 0
        assert int(end, 16) - int(begin, 16) >= 4 << 30
    assert len(places) == len(paths)


def test_what_is_written_is_read(engine: BareEngine, image: Path) -> None:
    """By the guest, by another process, as zeroes, as a hole: no write is missed."""
    node = engine.file(image, discard_unmap=True)

    def read() -> bytes:
        before = mapped(engine)
        data = engine.read(node, PAGE, PAGE)
        assert mapped(engine) == before + 1
        return bytes(data)

    engine.run(node, WRITE, PAGE, b"a" * PAGE)  # a written page is known, too
    assert read() == b"a" * PAGE
    engine.run(node, WRITE, PAGE + 512, b"b" * 512)
    assert read() == b"a" * 512 + b"b" * 512 + b"a" * 3072
    with open(image, "r+b") as other:
        other.seek(PAGE)
        other.write(b"c" * PAGE)
    assert read() == b"c" * PAGE
    engine.run(node, WRITE_ZEROES, PAGE, PAGE, flags=MAY_UNMAP)
    assert read() == bytes(PAGE)
    engine.run(node, WRITE, PAGE, b"d" * PAGE)
    engine.run(node, DISCARD, 0, 4 * PAGE)
    assert read() == bytes(PAGE)


def test_file_that_is_truncated_by_somebody(engine: BareEngine, image: Path) -> None:
    """The pages are no more: SIGBUS in a copy. The answer is that of a system call."""
    node = engine.file(image)
    expected = image.read_bytes()
    for _ in range(2):
        engine.read(node, 100 * PAGE, PAGE)
        engine.read(node, 0, PAGE)
    assert mapped(engine) == 2
    os.truncate(image, 2 * PAGE)
    assert engine.read(node, 100 * PAGE, PAGE) == bytes(PAGE)
    # From here on the mapping is not used, and everything is as it would be without it.
    before = mapped(engine)
    for _ in range(2):
        assert engine.read(node, 0, PAGE) == expected[:PAGE]
    assert mapped(engine) == before
    engine.run(node, WRITE, 100 * PAGE, b"e" * PAGE)
    assert engine.read(node, 100 * PAGE, PAGE) == b"e" * PAGE


def test_end_of_a_file_in_the_middle_of_a_page(engine: BareEngine, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * (PAGE + 700))
    node = engine.file(path)
    for _ in range(3):
        assert engine.read(node, PAGE, PAGE) == b"x" * 700 + bytes(PAGE - 700)
        assert engine.read(node, 0, 2 * PAGE) == b"x" * (PAGE + 700) + bytes(PAGE - 700)


def test_direct_io_is_never_mapped(engine: BareEngine, image: Path) -> None:
    try:
        os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    node = engine.file(image, direct=True)
    for _ in range(3):
        engine.read(node, 0, PAGE)
    assert mapped(engine) == 0


def test_idle_process_does_not_hold_the_pages(engine: BareEngine, image: Path) -> None:
    """Or a backend would seem to need as much memory as its disk is large."""
    node = engine.file(image)
    for _ in range(2):
        for page in range(64):
            engine.read(node, page * PAGE, PAGE)
    assert resident(image) >= 256
    deadline = time.monotonic() + 30
    while resident(image) > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert resident(image) == 0
    assert engine.read(node, 0, PAGE) == image.read_bytes()[:PAGE]


def stored(engine: BareEngine, node: object, offset: int, data: bytes, flags: int = GUEST) -> bool:
    """Write that; was it through the mapping?"""
    before = mapped(engine)
    assert engine.run(node, WRITE, offset, data, flags=flags) == 0
    return mapped(engine) > before


def heat(engine: BareEngine, node: object, region: int = 0) -> bytes:
    """Write a whole region (1 MiB), by system calls."""
    data = os.urandom(MIB)
    for at in range(0, MIB, 128 * KIB):
        piece = data[at : at + 128 * KIB]
        assert not stored(engine, node, region * MIB + at, piece)
    return data


def test_what_is_dirty_is_written_without_system_calls(
    engine: BareEngine, overwritten: Path
) -> None:
    node = engine.file(overwritten)
    expected = bytearray(heat(engine, node))
    for offset, length, skip in [
        (0, PAGE, 0),
        (64 * KIB, 64 * KIB, 0),
        (MIB - 128 * KIB, 128 * KIB, 0),
        (512, 512, 0),  # parts of pages, from memory at odd addresses
        (12 * KIB - 512, 5 * KIB, 3),
    ]:
        data, before = os.urandom(length), mapped(engine)
        pending = engine.start(node, WRITE, offset, data, flags=GUEST, skip=skip)
        engine.wait_for(lambda p=pending: p.ret is not None)  # type: ignore[misc]
        assert pending.ret == 0
        assert mapped(engine) == before + 1
        expected[offset : offset + length] = data
        assert overwritten.read_bytes() == expected
        assert engine.read(node, offset, length) == data
    assert not stored(engine, node, 0, bytes(256 * KIB))  # too large


def test_what_is_not_written_through_the_mapping(engine: BareEngine, overwritten: Path) -> None:
    """What is not a guest's, and where something may be clean, or a hole."""
    node = engine.file(overwritten, discard_unmap=True)
    data = os.urandom(PAGE)
    engine.read(node, 0, PAGE)
    assert not stored(engine, node, 0, data)  # read, not written
    assert not stored(engine, node, 0, data)  # others of the region may be clean
    heat(engine, node)
    assert stored(engine, node, 0, data)
    assert not stored(engine, node, 0, data, flags=0)  # half of it may not be there after kill -9
    for op, flags in ((DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, MAY_UNMAP)):
        assert stored(engine, node, 0, data)
        engine.run(node, op, 0, PAGE, flags=flags)
        assert not stored(engine, node, 8 * PAGE, data)
        assert not stored(engine, node, 0, data)
    assert stored(engine, node, 0, data)
    assert engine.run(node, FLUSH) == 0  # all is clean
    assert not stored(engine, node, 0, data)
    assert overwritten.read_bytes()[:PAGE] == data


def test_a_mapped_write_reaches_the_disk(engine: BareEngine, overwritten: Path) -> None:
    """With FUA before it ends, with a flush before that ends; O_DIRECT reads the disk itself."""
    try:
        fd = os.open(overwritten, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    node = engine.file(overwritten)
    memory = mmap.mmap(-1, PAGE)
    for flush in (False, True) * 3:
        heat(engine, node)
        data = os.urandom(PAGE)
        assert stored(engine, node, 4 * PAGE, data, GUEST if flush else GUEST | FUA)
        if flush:
            assert engine.run(node, FLUSH) == 0
        assert os.preadv(fd, [memory], 4 * PAGE) == PAGE
        assert memory[:] == data
    os.close(fd)


def test_flushes_all_the_time(engine: BareEngine, overwritten: Path) -> None:
    """Right after a flush, page faults are not worth it yet; later they are."""
    node = engine.file(overwritten)
    data = os.urandom(64 * KIB)
    for _ in range(3):
        heat(engine, node)
        for at in range(0, MIB, len(data)):
            stored(engine, node, at, data)
        assert engine.run(node, FLUSH) == 0
    heat(engine, node)
    deadline = time.monotonic() + 30
    while not all(stored(engine, node, at, data) for at in range(0, MIB, len(data))):
        assert time.monotonic() < deadline
    assert overwritten.read_bytes() == data * 16


def test_file_that_grows(engine: BareEngine, overwritten: Path) -> None:
    """As an overlay does. What is written behind the middle of its last page makes it longer."""
    os.truncate(overwritten, 0)
    node = engine.file(overwritten)
    data = os.urandom(64 * KIB)
    for region in range(2):
        heat(engine, node, region)
        assert stored(engine, node, region * MIB, data)
    assert not stored(engine, node, 2 * MIB, data[: PAGE + 512])
    assert not stored(engine, node, 2 * MIB + PAGE, data[:512])
    assert not stored(engine, node, 2 * MIB + PAGE + 512, data[:512])
    assert overwritten.stat().st_size == 2 * MIB + PAGE + 1024


def test_file_that_is_cut_off_by_us(engine: BareEngine, overwritten: Path) -> None:
    """In the middle of a page, that is, and what comes there later makes the file longer."""
    node = engine.file(overwritten)
    data = os.urandom(PAGE)
    for region in range(2):
        heat(engine, node, region)
    engine.file_resize(node, MIB + 512)
    os.truncate(overwritten, MIB + 512)
    assert stored(engine, node, 0, data)
    assert not stored(engine, node, MIB + 512, data[:512])
    assert overwritten.stat().st_size == MIB + 1024
    assert overwritten.read_bytes()[MIB + 512 :] == data[:512]


def test_no_space_for_a_page_that_became_a_hole(engine: BareEngine, small_disk: Path) -> None:
    """By somebody else's hand: SIGBUS in a copy. The answer is that of a system call."""
    subprocess.run(["mount", "-o", "remount,size=2M", small_disk], check=True)
    path = small_disk / "image"
    path.touch()
    node = engine.file(path)
    expected = heat(engine, node)
    data = os.urandom(64 * KIB)
    assert stored(engine, node, 0, data)
    subprocess.run(["fallocate", "--punch-hole", "-o", "0", "-l", "64K", path], check=True)
    with open(small_disk / "full", "wb", 0) as other, contextlib.suppress(OSError):
        while True:
            other.write(bytes(PAGE))
    assert engine.run(node, WRITE, 0, data, flags=GUEST) == -errno.ENOSPC
    (small_disk / "full").unlink()
    assert not stored(engine, node, 0, data)
    assert path.read_bytes() == data + expected[len(data) :]


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An ext4 file system, and what makes it give up as after an error of its disk."""
    if os.geteuid() != 0:
        pytest.skip("cannot mount a file system")
    disk, mount = tmp_path / "disk", tmp_path / "mount"
    with open(disk, "wb") as file:
        file.truncate(16 * MIB)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    command = ["mount", "-o", "loop,errors=remount-ro", disk, mount]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    yield (
        mount,
        lambda: subprocess.run(["mount", "-o", "remount,abort", mount], check=True) and None,
    )
    subprocess.run(["umount", "-l", mount], check=True)


def test_file_system_that_gives_up(
    engine: BareEngine, failing_disk: tuple[Path, Callable[[], None]]
) -> None:
    """Pages in use take what is written, but nobody is told that it is on the disk."""
    mount, give_up = failing_disk
    path = mount / "image"
    path.touch()
    node = engine.file(path)
    heat(engine, node)
    assert stored(engine, node, 0, os.urandom(PAGE))
    give_up()
    engine.run(node, WRITE, 0, os.urandom(PAGE), flags=GUEST)
    for _ in range(3):
        assert engine.run(node, FLUSH) < 0
