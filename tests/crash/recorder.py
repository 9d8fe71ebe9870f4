# SPDX-License-Identifier: GPL-2.0-or-later
"""recorder: a filter, for tests, that records everything that changes its child."""

from __future__ import annotations

import itertools
from typing import ClassVar

from crash.recording import Recording
from vhostblk.filter import Filter, FilterOptions, Request


class RecorderOptions(FilterOptions):
    """Options of recorder."""

    record: str
    """What Recorder.register() has given."""


class Recorder(Filter):
    """Put it between a format and its file; register with the host's drivers."""

    driver = "recorder"
    Options = RecorderOptions
    options: RecorderOptions

    _numbers: ClassVar = itertools.count()
    _registered: ClassVar[dict[str, tuple[Recording, str]]] = {}

    @classmethod
    def register(cls, recording: Recording, file: str) -> str:
        """The value of option `record` for one file of a recording."""
        key = str(next(cls._numbers))
        cls._registered[key] = (recording, file)
        return key

    async def open(self) -> None:
        self._recording, self._name = self._registered[self.options.record]

    def filename(self) -> str:
        """Names inside an image are relative to its file, whatever is in between."""
        return self.file.node.filename()

    async def write(self, request: Request) -> None:
        data = request.data()
        with self._recording.during(
            self._name, "write", request.offset, request.length, data, fua=request.fua
        ):
            await self.file.write(request.offset, data, fua=request.fua)

    async def write_zeroes(self, request: Request) -> None:
        with self._recording.during(
            self._name, "write-zeroes", request.offset, request.length, fua=request.fua
        ):
            await self.file.forward(request)

    async def discard(self, request: Request) -> None:
        # Not carried out: what was discarded may go on to read as before, and who has discarded
        # it must not count on zeroes.
        with self._recording.during(self._name, "discard", request.offset, request.length):
            pass

    async def flush(self, request: Request) -> None:
        with self._recording.during(self._name, "flush"):
            await self.file.forward(request)

    async def truncate(self, size: int) -> None:
        with self._recording.during(self._name, "truncate", length=size):
            await self.file.node.truncate(size)
        self.file.refresh()
