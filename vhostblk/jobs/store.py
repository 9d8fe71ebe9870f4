# SPDX-License-Identifier: GPL-2.0-or-later
"""All jobs of one backend."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from vhostblk.events import EventBus
from vhostblk.jobs.job import Job
from vhostblk.schema import VhostblkError, id_wellformed

MAX_JOBS = 1000
"""Concluded ones count until they are dismissed."""


class JobStore:
    """Jobs by name."""

    def __init__(self, events: EventBus) -> None:
        self._events = events
        self._jobs: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def check_id(self, id: str) -> None:
        """Refuse a name that a new job cannot have."""
        if not id_wellformed(id):
            raise VhostblkError(
                f"Invalid job ID '{id}'; expected a letter followed by letters, digits, '-', '.' "
                "and '_'",
                data={"code": "bad-value", "parameter": "job-id"},
            )
        if id in self._jobs:
            raise VhostblkError(
                f"Job ID '{id}' already in use; a concluded job goes with job-dismiss",
                data={"code": "duplicate-job", "job": id, "status": self._jobs[id].status.value},
            )
        if len(self._jobs) >= MAX_JOBS:
            raise VhostblkError(
                f"There are {len(self._jobs)} jobs, which is the most there can be; concluded "
                "ones go with job-dismiss",
                data={"code": "too-many-jobs"},
            )

    def start(self, job: Job) -> None:
        """Begin a new job."""
        self.check_id(job.id)
        self._jobs[job.id] = job
        job.start(self._events, lambda: self._forget(job.id))

    def get(self, id: str) -> Job:
        """The job called `id`."""
        job = self._jobs.get(id)
        if job is not None:
            return job
        error = VhostblkError(f"Job '{id}' not found", data={"code": "no-such-job", "job": id})
        raise error.suggest(id, self._jobs)

    async def close(self) -> None:
        """Cancel them all."""
        await asyncio.gather(*(job.stop() for job in list(self._jobs.values())))
        self._jobs.clear()

    def _forget(self, id: str) -> None:
        self._jobs.pop(id, None)
