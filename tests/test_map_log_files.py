# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of a map's log: whose they are, and when they go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostblk.nodes._map_log import LogFile, open_log

TOKEN = b"12345678"


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "logs"
    directory.mkdir()
    monkeypatch.setenv("VHOSTBLK_LOG_DIR", str(directory))
    yield directory


def image(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


def opened(path: Path) -> LogFile:
    log = open_log(str(path), TOKEN, fresh=False)
    assert log is not None
    return log


def left_behind(path: Path) -> Path:
    """The log of a backend that was killed."""
    log = opened(path)
    log.close(remove=False)
    return log.path


needs_handles = pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_DAC_READ_SEARCH")


@needs_handles
def test_logs_of_deleted_images_go(tmp_path: Path, logs: Path) -> None:
    stale = [left_behind(image(tmp_path / f"i{number}")) for number in range(3)]
    for number in range(3):
        (tmp_path / f"i{number}").unlink()
    assert all(path.exists() for path in stale)
    other = opened(image(tmp_path / "other-one"))
    # The image may have got the number of one that is gone, and its log with that.
    assert [path for path in stale if path.exists()] in ([], [other.path])
    assert list(logs.rglob("*.log")) == [other.path]
    other.close(remove=True)
    assert not list(logs.rglob("*.log"))


def test_logs_of_images_that_are_there_stay(tmp_path: Path, logs: Path) -> None:
    """Renamed, moved, replaced under their name, or with a second name: somebody comes for it."""
    (tmp_path / "sub").mkdir()
    renamed, moved, linked = (image(tmp_path / name) for name in ("a", "b", "c"))
    stay = {left_behind(path) for path in (renamed, moved, linked)}
    renamed.rename(tmp_path / "a2")
    image(renamed)
    moved.rename(tmp_path / "sub" / "b")
    os.link(linked, tmp_path / "sub" / "c")
    linked.unlink()
    opened(image(tmp_path / "other")).close(remove=True)
    assert set(logs.rglob("*.log")) == stay


@pytest.mark.parametrize("length", [0, 12, 4096])
def test_a_log_that_is_just_being_made_stays(tmp_path: Path, logs: Path, length: int) -> None:
    there = left_behind(image(tmp_path / "there"))
    made = there.with_name("made.log")
    made.write_bytes(there.read_bytes()[:length])
    opened(image(tmp_path / "other")).close(remove=True)
    assert made.exists()


def test_a_log_in_use_stays(tmp_path: Path, logs: Path) -> None:
    """The image was deleted while a backend has it open: the log is still in its way."""
    with open(image(tmp_path / "a")):
        log = opened(tmp_path / "a")
        (tmp_path / "a").unlink()
        opened(image(tmp_path / "other")).close(remove=True)
    assert log.path.exists()
    log.close(remove=True)


def test_who_removes_a_log_does_not_take_it_from_its_image(
    tmp_path: Path, logs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has the lock for a moment: the image gets its log all the same."""
    import fcntl
    import threading

    path = left_behind(image(tmp_path / "a"))
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def remove() -> None:
        path.unlink()
        os.close(fd)

    timer = threading.Timer(0.05, remove)
    timer.start()
    log = opened(tmp_path / "a")
    timer.join()
    assert log.path.exists() and os.path.samestat(os.stat(log.path), os.fstat(log._fd))
    assert not caplog.records
    log.close(remove=True)
    assert not list(logs.rglob("*.log"))


def test_a_retired_log_leaves_its_name_to_others(tmp_path: Path, logs: Path) -> None:
    first = opened(image(tmp_path / "a"))
    first.retire()
    assert not first.path.exists()
    second = opened(tmp_path / "a")
    first.close(remove=True)
    assert second.path.exists()
    second.close(remove=True)
