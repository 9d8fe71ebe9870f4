# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for work that must not be left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


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


def new_future() -> asyncio.Future[None]:
    """Of this loop."""
    return asyncio.get_running_loop().create_future()


def done() -> asyncio.Future[None]:
    """One that nobody has to wait for."""
    future = new_future()
    future.set_result(None)
    return future
