# SPDX-License-Identifier: GPL-2.0-or-later
"""A filter that comes with another package: found by its entry point, without --plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from backend_process import BackendProcess
from frontend import Device


@pytest.fixture
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind for a package with a filter in it."""
    (tmp_path / "foreign_filters.py").write_text(
        "from vhostblk.filter import Filter\n"
        "class Sevens(Filter):\n"
        "    driver = 'sevens'\n"
        "    async def read(self, request):\n"
        "        request.fill(b'7' * request.length)\n"
    )
    metadata = tmp_path / "foreign_filters-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: foreign-filters\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[vhostblk.nodes]\nsevens = foreign_filters:Sevens\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_entry_point(
    installed_package: None, start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    start_backend(
        *["--blockdev", "null-co,node-name=n,size=1M"],
        *["--blockdev", "driver=sevens,node-name=s,file=n"],
        "--export",
        "vhost-user-blk,id=e,node-name=s,addr.type=unix,addr.path={dir}/e.sock",
    )
    with Device(str(short_dir / "e.sock")) as device:
        assert device.read(4096, 1024) == b"7" * 1024
