# SPDX-License-Identifier: GPL-2.0-or-later
"""A pytest plugin: the fixture `lab`.

A module asks for it with `pytest_plugins = ["frontend.fixtures"]`. The process is
started again if a test has broken it, so that one failure stays one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .lab import Lab


@pytest.fixture(scope="session")
def _labs() -> Iterator[list[Lab]]:
    labs: list[Lab] = []
    yield labs
    for lab in labs:
        lab.close()


@pytest.fixture
def lab(_labs: list[Lab]) -> Iterator[Lab]:
    if _labs and not _labs[-1].daemon.alive:
        _labs.pop().close()
    if not _labs:
        _labs.append(Lab())
    yield _labs[-1]
    if not _labs[-1].daemon.alive:
        print("\n".join(_labs[-1].daemon.lines()[-200:]))
        pytest.fail(f"the back-end has died with status {_labs[-1].daemon.process.returncode}")
