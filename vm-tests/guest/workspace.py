# SPDX-License-Identifier: GPL-2.0-or-later
"""One temporary directory for a guest and its backends.

Its name is short, since a unix socket's path must fit into 107 bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

LOG_TAIL = 6000


class Workspace:
    """Sockets, disk images and logs of one guest or one test."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="vb-vm-"))

    def logs(self) -> list[Path]:
        return sorted(self.path.glob("*.log"))

    def log_tails(self) -> list[tuple[str, str]]:
        """Name and last part of each log that is not empty."""
        tails = []
        for log in self.logs():
            text = log.read_text(errors="replace")[-LOG_TAIL:]
            if text.strip():
                tails.append((log.name, text))
        return tails

    def keep_logs(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for log in self.logs():
            shutil.copy(log, directory / log.name)

    def image(self, name: str, size: int) -> Path:
        """A new sparse file of `size` bytes."""
        path = self.path / name
        with path.open("xb") as file:
            file.truncate(size)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
