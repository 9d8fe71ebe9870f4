# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs that move data: speed, pausing, errors, and taking turns with changes of the graph."""

from __future__ import annotations

import asyncio
import errno
import time
from typing import Any

import pytest
from in_process import Host, refused, with_host

from vhostblk.jobs.block_job import BlockJob
from vhostblk.schema import DeviceNotActive


class Mover(BlockJob):
    """Moves nothing, in portions."""

    job_type = "test-move"

    def __init__(self, portions: int = 1000, size: int = 1 << 16, **options: Any) -> None:
        super().__init__("j", **options)
        self.portions, self.portion_size = portions, size
        self.total_progress = portions * size
        self.errors: list[OSError] = []

    async def run(self) -> None:
        self.busy = True
        while self.current_progress < self.total_progress:
            if self.errors:
                error = self.errors.pop()
                if not self.failed(error, "read"):
                    raise error
                await self.pace()
                continue
            self.current_progress += self.portion_size
            await self.pace(self.portion_size)


def states(host: Host) -> list[str]:
    return [data["status"] for data in host.named("JOB_STATUS_CHANGE")]


def test_speed() -> None:
    async def test(host: Host) -> None:
        # 100 ms ahead is allowed: 1 MiB at 2 MiB/s takes at least 0.4 s.
        job = Mover(16, speed=2 << 20)
        begun = time.monotonic()
        host.backend.jobs.start(job)
        await host.until(lambda: states(host)[-1:] == ["null"])
        assert time.monotonic() - begun > 0.35
        [done] = host.named("BLOCK_JOB_COMPLETED")
        assert done == {
            "type": "test-move",
            "device": "j",
            "len": 1 << 20,
            "offset": 1 << 20,
            "speed": 2 << 20,
        }

    with_host(test)


def test_another_speed_counts_at_once() -> None:
    async def test(host: Host) -> None:
        job = Mover(16, speed=1)
        host.backend.jobs.start(job)
        await host.until(lambda: job.current_progress > 0)
        await asyncio.sleep(0.05)
        [entry] = host.backend.query_block_jobs()
        assert entry["offset"] == 1 << 16 and entry["speed"] == 1 and not entry["busy"]
        with refused("Speed (-1) must not be negative"):
            job.set_speed(-1)
        job.set_speed(0)
        await host.until(lambda: states(host)[-1:] == ["null"])

    with_host(test)


def test_a_pause() -> None:
    async def test(host: Host) -> None:
        job = Mover(1 << 40)
        host.backend.jobs.start(job)
        await host.until(lambda: job.current_progress > 0)
        with refused("Can't resume a job that was not paused"):
            job.resume()
        job.pause()
        with refused("already paused"):
            job.pause()
        await host.until(lambda: states(host)[-1:] == ["paused"])
        position = job.current_progress
        await asyncio.sleep(0.05)
        assert job.current_progress == position
        job.resume()
        await host.until(lambda: job.current_progress > position)
        assert states(host) == ["created", "running", "paused", "running"]
        job.pause()
        job.cancel()
        await host.until(lambda: states(host)[-1:] == ["null"])
        assert [data["device"] for data in host.named("BLOCK_JOB_CANCELLED")] == ["j"]
        assert host.named("BLOCK_JOB_COMPLETED") == []

    with_host(test)


def test_the_end_of_a_job_that_is_paused() -> None:
    """Somebody has given it up, or the backend ends: neither waits for job-resume."""

    async def test(host: Host) -> None:
        for end in (Mover.cancel, Mover.stop):
            job = Mover(1 << 40)
            host.backend.jobs.start(job)
            job.pause()
            await host.until(lambda: states(host)[-1:] == ["paused"])
            if (ending := end(job)) is not None:
                await ending
            await host.until(lambda: states(host)[-1:] == ["null"])
        assert len(host.named("BLOCK_JOB_CANCELLED")) == 2

    with_host(test)


def test_a_job_is_busy_while_it_works() -> None:
    async def test(host: Host) -> None:
        job = Mover(4, auto_finalize=False, auto_dismiss=False)
        host.backend.jobs.start(job)
        for status in ("pending", "concluded"):
            await host.until(lambda status=status: states(host)[-1:] == [status])
            [entry] = host.backend.query_block_jobs()
            assert (entry["status"], entry["busy"]) == (status, False)
            if status == "pending":
                job.finalize()

    with_host(test)


def test_a_job_that_is_not_there() -> None:
    """The class of the error is QEMU's: management programs look at it."""

    async def test(host: Host) -> None:
        path = host.path("a")
        await host.backend.blockdev_create("c", {"driver": "file", "filename": path, "size": 512})
        for id in ("nope", "c"):
            with pytest.raises(DeviceNotActive, match=f"Block job '{id}' not found"):
                host.backend.block_job(id)
        with refused("Job 'nope' not found"):
            host.backend.jobs.get("nope")

    with_host(test)


def test_jobs_that_cannot_be_paused() -> None:
    async def test(host: Host) -> None:
        path = host.path("a")
        await host.backend.blockdev_create("c", {"driver": "file", "filename": path, "size": 512})
        job = host.backend.jobs.get("c")
        with refused("Job 'c' of type 'create' cannot accept command verb 'pause'"):
            job.pause()
        with refused("Block job 'c' not found"):
            host.backend.block_job("c")
        await host.until(lambda: states(host)[-1] == "concluded")

    with_host(test)


def test_errors() -> None:
    async def run(host: Host, on_error: Any, code: int) -> tuple[Any, ...]:
        del host.events[:]
        job = Mover(4, on_error=on_error)
        job.errors = [OSError(code, "no luck")]
        host.backend.jobs.start(job)
        await host.until(lambda: states(host)[-1:] in (["null"], ["paused"]))
        [event] = host.named("BLOCK_JOB_ERROR")
        [status] = [entry["io-status"] for entry in host.backend.query_block_jobs()] or [None]
        if job.paused:
            job.resume()
            await host.until(lambda: states(host)[-1:] == ["null"])
        [done] = host.named("BLOCK_JOB_COMPLETED")
        return event["action"], status, done.get("error")

    async def test(host: Host) -> None:
        assert await run(host, "report", errno.EIO) == ("report", None, "no luck")
        assert await run(host, "ignore", errno.EIO) == ("ignore", None, None)
        assert await run(host, "stop", errno.EIO) == ("stop", "failed", None)
        assert await run(host, "enospc", errno.EIO) == ("report", None, "no luck")
        assert await run(host, "enospc", errno.ENOSPC) == ("stop", "nospace", None)

    with_host(test)


def test_steps_and_changes_take_turns() -> None:
    async def test(host: Host) -> None:
        graph = host.backend.graph
        node = await host.null("a")
        other = await host.null("b")
        log: list[str] = []

        async def step(name: str, on: Any, goes_on: asyncio.Event) -> None:
            async with graph.working(on):
                log.append(f"{name} begins")
                await goes_on.wait()
                log.append(f"{name} ends")

        async def change() -> None:
            async with graph.drained([node]):
                log.append("change")
                await asyncio.sleep(0.02)
                log.append("changed")

        first, second, apart = asyncio.Event(), asyncio.Event(), asyncio.Event()
        second.set()
        apart.set()
        tasks = [asyncio.create_task(step("one", node, first))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(change()))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(step("two", node, second)))
        await step("apart", other, apart)
        assert log == ["one begins", "apart begins", "apart ends"]
        first.set()
        await asyncio.gather(*tasks)
        assert log[3:] == ["one ends", "change", "changed", "two begins", "two ends"]

    with_host(test)


def test_a_step_that_hangs(monkeypatch: Any) -> None:
    monkeypatch.setattr("vhostblk.graph.graph.PAUSE_PATIENCE", 0.05)

    async def test(host: Host) -> None:
        graph = host.backend.graph
        node = await host.null("a")
        async with graph.working(node):
            with refused("Nothing was changed: background work on node 'a'", "storage hang"):
                async with graph.drained([node]):
                    raise AssertionError
        async with graph.drained([node]):
            pass

    with_host(test)
