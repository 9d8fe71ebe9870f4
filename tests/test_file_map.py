# SPDX-License-Identifier: GPL-2.0-or-later
"""Small reads of cached pages come from a mapping of the file and are right whatever befalls it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_engine import AIO, DISCARD, MAY_UNMAP, WRITE, WRITE_ZEROES, BareEngine

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
