# SPDX-License-Identifier: GPL-2.0-or-later
"""A plain file or block device as the data device of a store, without the engine."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any


class FileData:
    """What the tools for a store that no backend uses work on."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        """Nothing is under way."""
        os.close(self._fd)

    async def read(self, offset: int, into: int | bytearray | memoryview) -> Any:
        buffer = bytearray(into) if isinstance(into, int) else into
        if await asyncio.to_thread(os.preadv, self._fd, [buffer], offset) != len(buffer):
            raise OSError(errno.EIO, f"the data device ends before byte {offset + len(buffer)}")
        return buffer

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if await asyncio.to_thread(os.pwrite, self._fd, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def flush(self) -> None:
        await asyncio.to_thread(os.fdatasync, self._fd)

    async def discard(self, offset: int, length: int) -> None:
        """Space is given back by backends only."""
