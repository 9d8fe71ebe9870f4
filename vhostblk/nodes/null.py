# SPDX-License-Identifier: GPL-2.0-or-later
"""null-co and null-aio: nothing is stored. For benchmarks and tests.

A write is forgotten; a read gives zeroes (`read-zeroes=on`) or leaves the
guest's memory alone. Both names mean the same here: everything is asynchronous.
Engine half: cffi_build/engine/nodes/null.c.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from vhostblk.engine import NodeHandle
from vhostblk.engine.null import new_null
from vhostblk.image import Extent
from vhostblk.nodes.driver import NodeDriver, NodeOptions
from vhostblk.schema import OnOff, Size, UInt64, VhostblkError


class NullOptions(NodeOptions):
    """Options of null-co and null-aio."""

    size: Size = 1 << 30
    """Size of the disk."""
    latency_ns: UInt64 = 0
    """How long each request takes, in nanoseconds."""
    read_zeroes: OnOff = False
    """Whether reads give zeroes; if off, the buffer is left unchanged."""


class NullCo(NodeDriver):
    """A disk that stores nothing."""

    driver = "null-co"
    Options = NullOptions
    reopenable = NodeDriver.reopenable | {"size", "latency-ns", "read-zeroes"}
    options: NullOptions

    async def open(self) -> None:
        self._size = self.options.size
        self.handle = self._make_half(self.options)

    def _make_half(self, options: NullOptions) -> NodeHandle:
        return new_null(self.engine, latency_ns=options.latency_ns, read_zeroes=options.read_zeroes)

    async def reopen_prepare(self, options: NullOptions) -> None:
        await super().reopen_prepare(options)
        if options.size != self.options.size:
            self.prepared["_size"] = options.size
        self.prepared["handle"] = self._make_half(options)

    @property
    def size(self) -> int:
        return self._size

    @property
    def discard_granularity(self) -> int:
        return 1

    def state_options(self) -> dict[str, Any]:
        options = super().state_options()
        if self._size != self.options.size:
            options["size"] = self._size
        return options

    def filename(self) -> str:
        return f"{self.driver}://"

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        yield Extent(offset, length, present=False, zero=self.options.read_zeroes, data=False)

    async def truncate(self, size: int) -> None:
        if self.read_only:
            raise VhostblkError(f"Block node '{self.name}' is read-only")
        self._size = size
        # What has been made of them for the state file is out of date.
        self.options = self.options.model_copy()


class NullAio(NullCo):
    """A disk that stores nothing."""

    driver = "null-aio"
