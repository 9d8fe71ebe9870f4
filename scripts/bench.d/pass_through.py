# SPDX-License-Identifier: GPL-2.0-or-later
"""pass-through: every request comes to Python and goes on to the child. What Python costs."""

from __future__ import annotations

from vhostblk.filter import Filter, Request


class PassThrough(Filter):
    """Does nothing, by hand."""

    driver = "pass-through"

    async def read(self, request: Request) -> None:
        request.forward()

    async def write(self, request: Request) -> None:
        request.forward()

    async def flush(self, request: Request) -> None:
        request.forward()

    async def discard(self, request: Request) -> None:
        request.forward()

    async def write_zeroes(self, request: Request) -> None:
        request.forward()
