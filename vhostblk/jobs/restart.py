# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs that go on after a restart.

What `Job.state_options()` gives is in the state file; after a restart, when nodes and
exports are there again, the function registered for the job's type makes the job anew,
under its old id. How far it had come it must find out by itself: from the images,
not from a number that might be older than they are.

    @restartable("block-stream")
    async def restart(backend, id, options): …
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from vhostblk import jobs
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.backend import Backend

Restart = Callable[["Backend", str, dict[str, Any]], Awaitable[None]]
_RESTARTS: dict[str, Restart] = {}


def restartable(job_type: str) -> Callable[[Restart], Restart]:
    """Decorator: how jobs of a type begin anew. In a module of this package."""

    def register(restart: Restart) -> Restart:
        _RESTARTS[job_type] = restart
        return restart

    return register


async def restart(backend: Backend, entry: dict[str, Any]) -> None:
    """Begin the job that an entry of the state file describes."""
    options = dict(entry)
    job_type, id = options.pop("type", None), options.pop("id", None)
    if job_type not in _RESTARTS:
        for info in pkgutil.iter_modules(jobs.__path__):
            importlib.import_module(f"{jobs.__name__}.{info.name}")
    if job_type not in _RESTARTS or not isinstance(id, str):
        raise VhostblkError(
            f"A job of type '{job_type}' cannot be restarted", data={"code": "bad-job"}
        )
    await _RESTARTS[job_type](backend, id, options)
