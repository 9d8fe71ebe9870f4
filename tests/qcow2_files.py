# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 images at rest: the format's modules on a plain file, without an engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from file_storage import FileStorage

from vhostblk.nodes.qcow2.header import Header


class ImageFile(FileStorage):
    """The file that holds an image, or is to."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.touch()
        super().__init__(path, writable=True)

    def header(self) -> Header:
        return Header.parse(os.pread(self.fileno(), 1 << 21, 0))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)
