# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for work that must not be left half done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")

_SLICE = 0.002
"""Seconds until others have their turn."""


async def all_done(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for all of them, even if one fails: they use memory, or a place."""
    everything = list(work)
    if len(everything) == 1:  # most often; without a task
        return [await everything[0]]
    results = await asyncio.gather(*everything, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def in_thread(work: Callable[[], Result]) -> Result:
    """Ends when the thread has, also when cancelled."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])


class Turns:
    """For work on the control thread that takes long: others have their turns in between."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SLICE

    async def others(self) -> None:
        """It is theirs, if ours has been long enough."""
        if time.monotonic() > self._end:
            await asyncio.sleep(0)
            self._end = time.monotonic() + _SLICE


def new_future() -> asyncio.Future[None]:
    """Of this loop."""
    return asyncio.get_running_loop().create_future()


def done() -> asyncio.Future[None]:
    """One that nobody has to wait for."""
    future = new_future()
    future.set_result(None)
    return future
