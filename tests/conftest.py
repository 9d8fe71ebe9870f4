# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that need a running backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend_process import BackendProcess
from thoroughness import seconds

from vhostblk.luks import kdf, luks2


def pytest_configure(config: pytest.Config) -> None:
    """Who wants more to be tried gives tests more time."""
    if config.option.timeout is None:
        config.option.timeout = seconds(float(config.getini("timeout")))


@pytest.fixture(scope="session", autouse=True)
def cheap_digests() -> Iterator[None]:
    """What a digest of a random volume key costs, tests have no time for: each opening pays it.

    Commands in processes of their own make digests as everywhere.
    """
    measured = kdf.pbkdf2_for

    def pbkdf2_for(hash: str, milliseconds: int, length: int) -> int:
        if milliseconds == luks2.DIGEST_MILLISECONDS:
            return kdf.LEAST_ITERATIONS
        return measured(hash, milliseconds, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdf, "pbkdf2_for", pbkdf2_for)
        yield


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for the name of a socket."""
    directory = Path(tempfile.mkdtemp(prefix="vb-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def start_backend(short_dir: Path) -> Iterator[Callable[..., BackendProcess]]:
    """Starts backends that are ready, and sees to it that none is left."""
    started: list[BackendProcess] = []

    def start(*arguments: str, wait: bool = True, command: str = "serve") -> BackendProcess:
        process = BackendProcess(short_dir, *arguments, command=command)
        started.append(process)
        if wait:
            process.wait_ready()
        return process

    yield start
    for process in started:
        process.close()
