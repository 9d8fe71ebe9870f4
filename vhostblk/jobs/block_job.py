# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs that move data: they can be paused, slowed down, and say how far they are.

A subclass calls `pace()` after each portion of its work. That is where it waits when it is
paused or faster than its `speed`; both can be changed at any time, and count at once. It is also
where a cancelled job ends: what moves data is never torn out of the middle of a portion. What
becomes of errors is QEMU's `on-error`. While a portion is moved, `graph.working()` keeps
changes of the graph away.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from typing import Any, Literal

from vhostblk.jobs.job import Job, JobStatus
from vhostblk.schema import VhostblkError

OnError = Literal["report", "ignore", "enospc", "stop"]
_BURST = 0.1  # seconds by which a job may be ahead of its speed


class BlockJob(Job):
    """A job with a speed, in bytes per second; 0 means no limit."""

    def __init__(
        self,
        id: str,
        *,
        speed: int = 0,
        on_error: OnError = "report",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        super().__init__(id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.speed = _checked_speed(speed)
        self.on_error: OnError = on_error
        self.io_status = "ok"
        self.paused = False
        self.busy = False
        self._changed = asyncio.Event()
        self._debt = 0.0  # bytes moved that the speed has not paid for yet
        self._paid = time.monotonic()

    # ---- for kinds of jobs

    async def pace(self, moved: int = 0) -> None:
        """After `moved` bytes: wait until the next portion may begin."""
        self._settle_debt()
        self._debt += moved
        await asyncio.sleep(0)  # where nothing else waits: others get their turn
        while True:
            if self._cancelled:
                raise asyncio.CancelledError
            self._settle_debt()
            ahead = self._debt - self.speed * _BURST if self.speed else 0.0
            if self.paused:
                await self._stand_still()
            elif ahead > 0:
                await self._wait(ahead / self.speed)
            else:
                return

    def portion(self, most: int) -> int:
        """How much to move at once: a slow job does not do it all in one go."""
        return most if self.speed == 0 else max(1, min(most, int(self.speed * _BURST)))

    def failed(self, error: OSError, operation: Literal["read", "write"]) -> bool:
        """Whether to go on after an error; `stop` pauses the job, which then tries again."""
        action = self.on_error
        code = error.errno or errno.EIO
        if action == "enospc":
            action = "stop" if code == errno.ENOSPC else "report"
        self._events.emit(
            "BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": action}
        )
        if action == "stop":
            self.paused = True
            self.io_status = "nospace" if code == errno.ENOSPC else "failed"
        return action != "report"

    # ---- what it is

    def describe_block(self) -> dict[str, Any]:
        """Its entry in `query-block-jobs`."""
        entry: dict[str, Any] = {
            "type": self.job_type,
            "device": self.id,
            "len": self.total_progress,
            "offset": self.current_progress,
            "busy": self.busy and self.status is JobStatus.RUNNING,
            "paused": self.paused,
            "speed": self.speed,
            "io-status": self.io_status,
            "ready": False,
            "status": self.status.value,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }
        if self.error is not None:
            entry["error"] = self.error
        return entry

    # ---- what may be asked of it

    def pause(self) -> None:
        self._check("pause")
        if self.paused:
            raise VhostblkError(
                f"Job '{self.id}' is already paused", data={"code": "job-state", "job": self.id}
            )
        self.paused = True
        self._changed.set()

    def resume(self) -> None:
        self._check("resume")
        if not self.paused:
            raise VhostblkError(
                f"Can't resume a job that was not paused: '{self.id}'",
                data={"code": "job-state", "job": self.id},
            )
        self.paused = False
        self.io_status = "ok"
        self._changed.set()

    def set_speed(self, speed: int) -> None:
        """`block-job-set-speed`: counts at once, also for a job that waits."""
        self._check("set-speed")
        self._settle_debt()
        self.speed = _checked_speed(speed)
        self._changed.set()

    def block_options(self) -> dict[str, Any]:
        """What the state file says of all jobs like this."""
        return {
            "speed": self.speed,
            "on-error": self.on_error,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
            "paused": self.paused,
        }

    # ---- life

    def _cancel(self) -> None:
        self._cancelled = True
        self._changed.set()
        if self._work is not None and self.status in (JobStatus.WAITING, JobStatus.PENDING):
            self._work.cancel()

    def pending(self) -> None:
        if not self.auto_finalize:
            self._events.emit("BLOCK_JOB_PENDING", {"type": self.job_type, "id": self.id})

    def ended(self) -> None:
        data: dict[str, Any] = {
            "type": self.job_type,
            "device": self.id,
            "len": self.total_progress,
            "offset": self.current_progress,
            "speed": self.speed,
        }
        if self.error is not None and not self.cancelled:
            data["error"] = self.error
        if self.cancelled:
            self._events.emit("BLOCK_JOB_CANCELLED", data)
        else:
            self._events.emit("BLOCK_JOB_COMPLETED", data)

    # ---- waiting

    def _settle_debt(self) -> None:
        now = time.monotonic()
        if self.speed == 0:
            self._debt = 0.0
        else:
            self._debt = max(0.0, self._debt - (now - self._paid) * self.speed)
        self._paid = now

    async def _stand_still(self) -> None:
        self._enter(JobStatus.PAUSED)
        try:
            while self.paused and not self.cancelled:
                await self._wait(None)
        finally:
            if not self.cancelled:
                self._enter(JobStatus.RUNNING)

    async def _wait(self, seconds: float | None) -> None:
        """Until the time is over or somebody wants something else."""
        self._changed.clear()
        busy, self.busy = self.busy, False
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        finally:
            self.busy = busy


def _checked_speed(speed: int) -> int:
    if speed < 0:
        raise VhostblkError(
            f"Speed ({speed}) must not be negative; 0 means no limit",
            data={"code": "bad-value", "parameter": "speed"},
        )
    return speed


def reason(error: OSError) -> str:
    """What an error of I/O says, for the job's own."""
    return error.strerror or os.strerror(error.errno or errno.EIO)
