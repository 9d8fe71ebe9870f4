# SPDX-License-Identifier: GPL-2.0-or-later
"""One job: its states, which are QEMU's, and what may be asked of it in which.

    created ─► running ─► waiting ─► pending ─► concluded ─► null
                │ ▲  │                  │           ▲
                ▼ │  └──────────────────┴► aborting ┘
               paused

A kind of job is a subclass that overrides `run()`. With `auto_finalize` a job
does not stay in `pending`, and with `auto_dismiss` not in `concluded`. Jobs that move
data, which can be paused and slowed down, are `BlockJob`s (block_job.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, ClassVar

from vhostblk.events import EventBus
from vhostblk.origin import origin
from vhostblk.schema import VhostblkError

logger = logging.getLogger(__name__)


class JobStatus(Enum):
    """Where a job is in its life."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


_ACTIVE = frozenset(
    {
        JobStatus.CREATED,
        JobStatus.RUNNING,
        JobStatus.PAUSED,
        JobStatus.READY,
        JobStatus.STANDBY,
    }
)
_VERBS: dict[str, frozenset[JobStatus]] = {
    "pause": _ACTIVE,
    "resume": _ACTIVE,
    "set-speed": _ACTIVE,
    "cancel": _ACTIVE | {JobStatus.WAITING, JobStatus.PENDING},
    "finalize": frozenset({JobStatus.PENDING}),
    "dismiss": frozenset({JobStatus.CONCLUDED}),
}


class Job:
    """Work in the background. Everything here runs on the event loop's thread."""

    job_type: ClassVar[str]

    def __init__(self, id: str, *, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        self.id = id
        self.status = JobStatus.UNDEFINED
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.current_progress = 0
        self.total_progress = 0
        self.error: str | None = None
        self._finalized = asyncio.Event()
        self._cancelled = False
        self.stopping = False
        """The backend is ending, and nobody has given the job up."""
        self._work: asyncio.Future[None] | None = None
        self._events: EventBus
        self._task: asyncio.Task[None]
        self._gone: Callable[[], None]

    # ---- for kinds of jobs

    async def run(self) -> None:
        """Do the work. Raise to fail; cancelled when nobody wants it any more."""
        raise NotImplementedError

    async def commit(self) -> None:
        """The work is done and wanted: make it count. Must not fail."""

    async def clean(self) -> None:
        """After the work, whatever became of it. Must not fail."""

    def pending(self) -> None:
        """The work is done; finalizing is next."""

    def ended(self) -> None:
        """All of that has happened; the job is about to be `concluded`."""

    def state_options(self) -> dict[str, Any] | None:
        """What the state file says of it, so that it goes on after a restart (restart.py).

        None: it ends with the process.
        """
        return None

    # ---- life

    def start(self, events: EventBus, gone: Callable[[], None]) -> None:
        """Begin; `gone` is called when nothing is left of it. For the store."""
        self._events = events
        self._gone = gone
        self._enter(JobStatus.CREATED)
        self._task = asyncio.create_task(self._live())

    def describe(self) -> dict[str, Any]:
        """Its entry in `query-jobs`."""
        entry: dict[str, Any] = {
            "id": self.id,
            "type": self.job_type,
            "status": self.status.value,
            "current-progress": self.current_progress,
            "total-progress": self.total_progress,
        }
        if self.error is not None:
            entry["error"] = self.error
        return entry

    def cancel(self) -> None:
        """`job-cancel`."""
        self._check("cancel")
        self._cancel()

    def pause(self) -> None:
        """`job-pause`."""
        raise self._cannot("pause")

    def resume(self) -> None:
        """`job-resume`."""
        raise self._cannot("resume")

    def finalize(self) -> None:
        """`job-finalize`."""
        self._check("finalize")
        self._finalized.set()

    def dismiss(self) -> None:
        """`job-dismiss`."""
        self._check("dismiss")
        self._leave()

    async def stop(self) -> None:
        """The backend is ending."""
        self.stopping = not self._cancelled
        self._cancel()
        await self._task

    def _cancel(self) -> None:
        self._cancelled = True
        if self._work is not None:
            self._work.cancel()

    @property
    def cancelled(self) -> bool:
        """It ends early because somebody wants it to."""
        return self._cancelled

    def _cannot(self, verb: str) -> VhostblkError:
        return VhostblkError(
            f"Job '{self.id}' of type '{self.job_type}' cannot accept command verb '{verb}'",
            data={"code": "job-verb", "job": self.id},
        )

    def _check(self, verb: str) -> None:
        if self.status in _VERBS[verb]:
            return
        allowed = ", ".join(sorted(status.value for status in _VERBS[verb]))
        raise VhostblkError(
            f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb "
            f"'{verb}'; it can in: {allowed}",
            data={"code": "job-state", "job": self.id, "status": self.status.value},
        )

    def _enter(self, status: JobStatus) -> None:
        self.status = status
        self._events.emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status.value})

    def _leave(self) -> None:
        self._enter(JobStatus.NULL)
        self._gone()

    async def _live(self) -> None:
        # Never cancelled itself: only the work is.
        self._enter(JobStatus.RUNNING)
        self._work = asyncio.ensure_future(self._until_pending())
        if self._cancelled:
            self._work.cancel()
        try:
            await self._work
        except asyncio.CancelledError:
            self._fail(os.strerror(errno.ECANCELED))
        except VhostblkError as error:
            self._fail(error.desc)
        except Exception as error:
            logger.debug("job '%s' failed", self.id, exc_info=True)
            text = str(error)
            if not isinstance(error, OSError):
                text = f"{type(error).__name__}: {error}{origin(error)}"
            elif error.strerror:
                text = error.strerror
            self._fail(text)
        else:
            await self._quietly(self.commit)
        await self._quietly(self.clean)
        self.ended()
        self._enter(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._leave()

    async def _until_pending(self) -> None:
        await self.run()
        self._enter(JobStatus.WAITING)
        self._enter(JobStatus.PENDING)
        self.pending()
        if not self.auto_finalize:
            await self._finalized.wait()

    def _fail(self, text: str) -> None:
        self.error = text
        self._enter(JobStatus.ABORTING)

    async def _quietly(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except Exception as error:
            logger.error("job '%s': %s: %s", self.id, type(error).__name__, error)
