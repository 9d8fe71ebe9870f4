# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that need a running backend."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend_process import BackendProcess


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for the name of a socket."""
    directory = Path(tempfile.mkdtemp(prefix="vb-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


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
