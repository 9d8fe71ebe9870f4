# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs: their states, what may be asked of them when, and blockdev-create."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from cow_driver import Cow
from frontend import Qmp, vhostblk
from in_process import MIB, Host, refused, with_host

from vhostblk.jobs import Job


class Work(Job):
    """Waits until it may go on, and does what a test wants."""

    job_type = "test"

    def __init__(self, id: str = "j", **options: Any) -> None:
        super().__init__(id, **options)
        self.may_go_on = asyncio.Event()
        self.error_to_raise: Exception | None = None
        self.done: list[str] = []

    async def run(self) -> None:
        await self.may_go_on.wait()
        if self.error_to_raise is not None:
            raise self.error_to_raise
        self.done.append("run")

    async def commit(self) -> None:
        self.done.append("commit")

    async def clean(self) -> None:
        self.done.append("clean")


def states(host: Host, id: str = "j") -> list[str]:
    return [data["status"] for data in host.named("JOB_STATUS_CHANGE") if data["id"] == id]


async def until(host: Host, status: str, id: str = "j") -> None:
    await host.until(lambda: states(host, id)[-1:] == [status])


# The sequences of states are those of QEMU's job.c.


def test_a_job_that_succeeds() -> None:
    async def test(host: Host) -> None:
        job = Work()
        host.backend.jobs.start(job)
        assert states(host) == ["created"]
        await until(host, "running")
        assert host.backend.query_jobs() == [
            {
                "id": "j",
                "type": "test",
                "status": "running",
                "current-progress": 0,
                "total-progress": 0,
            }
        ]
        job.may_go_on.set()
        await until(host, "null")
        wanted = ["created", "running", "waiting", "pending", "concluded", "null"]
        assert states(host) == wanted
        assert job.done == ["run", "commit", "clean"]
        assert host.backend.query_jobs() == []

    with_host(test)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("on purpose"), "ValueError: on purpose (test_jobs.py line"),
    ],
)
def test_a_job_that_fails(error: Exception, text: str) -> None:
    async def test(host: Host) -> None:
        job = Work(auto_dismiss=False)
        job.error_to_raise = error
        job.may_go_on.set()
        host.backend.jobs.start(job)
        await until(host, "concluded")
        assert states(host) == ["created", "running", "aborting", "concluded"]
        assert host.backend.query_jobs()[0]["error"].startswith(text)
        assert job.done == ["clean"]
        job.dismiss()
        assert states(host)[-1] == "null" and host.backend.query_jobs() == []

    with_host(test)


def test_finalize_by_hand() -> None:
    async def test(host: Host) -> None:
        job = Work(auto_finalize=False, auto_dismiss=False)
        job.may_go_on.set()
        host.backend.jobs.start(job)
        await until(host, "pending")
        assert job.done == ["run"]
        host.backend.jobs.get("j").finalize()
        await until(host, "concluded")
        assert job.done == ["run", "commit", "clean"]
        with refused("Job 'j' in state 'concluded' cannot accept command verb 'finalize'"):
            job.finalize()
        job.dismiss()

    with_host(test)


@pytest.mark.parametrize("when", ["created", "running", "pending"])
def test_cancel(when: str) -> None:
    async def test(host: Host) -> None:
        job = Work(auto_finalize=False, auto_dismiss=False)
        host.backend.jobs.start(job)
        if when == "pending":
            job.may_go_on.set()
        if when != "created":
            await until(host, when)
        job.cancel()
        await until(host, "concluded")
        assert states(host)[-2:] == ["aborting", "concluded"]
        assert host.backend.query_jobs()[0]["error"] == "Operation canceled"
        assert "commit" not in job.done and job.done[-1] == "clean"
        with refused("in state 'concluded' cannot accept command verb 'cancel'", "running"):
            job.cancel()

    with_host(test)


def test_what_may_not_be_asked() -> None:
    async def test(host: Host) -> None:
        jobs = host.backend.jobs
        job = Work()
        jobs.start(job)
        await until(host, "running")
        for verb in ("dismiss", "finalize"):
            with refused(f"in state 'running' cannot accept command verb '{verb}'"):
                getattr(job, verb)()
        with refused("Job 'J' not found", "did you mean 'j'"):
            jobs.get("J").cancel()
        with refused("Job ID 'j' already in use"):
            jobs.start(Work())
        for name in ("", "1x", "a b", "#x"):
            with refused(f"Invalid job ID '{name}'"):
                jobs.start(Work(name))
        # The host closes the backend with the job running: it is cancelled.

    with_host(test)


# ---- blockdev-create


async def create(host: Host, **options: Any) -> str | None:
    """Its error, if any; the job is dismissed."""
    given = {key.replace("_", "-"): value for key, value in options.items()}
    before = len(states(host))
    await host.backend.blockdev_create("j", given)
    await host.until(lambda: states(host)[-1] == "concluded")
    [entry] = host.backend.query_jobs()
    assert entry["type"] == "create" and entry["total-progress"] == 1
    host.backend.jobs.get("j").dismiss()
    error: str | None = entry.get("error")
    assert states(host)[before:] == [
        "created",
        "running",
        *(["aborting"] if error else ["waiting", "pending"]),
        "concluded",
        "null",
    ]
    return error


def test_create_a_file() -> None:
    async def test(host: Host) -> None:
        path = Path(host.path("a"))
        assert await create(host, driver="file", filename=str(path), size="1M") is None
        assert path.stat().st_size == MIB and path.stat().st_blocks == 0
        assert await create(host, driver="file", filename=str(path), size=4096) is None
        assert path.stat().st_size == 4096
        for kind in ("falloc", "full"):
            options = {"filename": str(path), "size": MIB + 512, "preallocation": kind}
            assert await create(host, driver="file", nocow=True, **options) is None
            assert path.stat().st_size == MIB + 512 and path.stat().st_blocks * 512 >= MIB
        assert path.read_bytes() == bytes(MIB + 512)

    with_host(test)


def test_a_file_in_use_is_left_alone() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        Path(path).write_bytes(b"x" * MIB)
        await host.add("file", "f", filename=path)
        await host.export("f")
        error = await create(host, driver="file", filename=path, size=0)
        assert error is not None and "is another process using it?" in error
        assert Path(path).read_bytes() == b"x" * MIB
        for wrong, words in (
            (str(host.directory), "Is a directory"),
            ("/nonexistent/x", "No such file or directory"),
            ("/dev/null", "not a regular file"),
        ):
            error = await create(host, driver="file", filename=wrong, size=0)
            assert error is not None and words in error and wrong in error

    with_host(test)


@pytest.mark.parametrize("by_name", [True, False])
def test_create_a_format(by_name: bool) -> None:
    async def test(host: Host) -> None:
        path = host.file("a", 0)
        file: Any = {"driver": "file", "filename": path}
        if by_name:
            await host.add("file", "f", filename=path)
            file = "f"
        assert await create(host, driver="cow", file=file, size=MIB) is None
        assert list(host.backend.graph.nodes) == (["f"] if by_name else [])
        node = await host.add("cow", "c", file=file)
        assert node.size == MIB
        # It has a parent that minds now.
        await host.export("c")
        error = await create(host, driver="cow", file=file, size=MIB)
        assert error is not None and (
            "Permission conflict" in error or "locked" in error or "another process" in error
        )

    with_host(test, Cow)


def test_what_is_refused_at_once() -> None:
    async def test(host: Host) -> None:
        for options, words in (
            ({}, "'options.driver' is missing"),
            ({"driver": "filee"}, "did you mean 'file'"),
            ({"driver": "raw"}, "'raw' does not support blockdev-create; those that do: "),
            ({"driver": "file", "filename": "x"}, "'options.size' is missing"),
            ({"driver": "file", "filename": "x", "size": 1, "sise": 2}, "'options.sise'"),
        ):
            with refused(words):
                await host.backend.blockdev_create("j", options)
        assert states(host) == [] and host.backend.query_jobs() == []
        assert not os.path.exists("x")

    with_host(test, Cow)


def test_over_the_control_socket() -> None:
    arguments = ["--control", "{dir}/q.sock", "--blockdev", "null-co,node-name=n"]
    with vhostblk(*arguments) as daemon, Qmp(daemon.socket("q")) as qmp:
        path = str(daemon.directory / "a.qcow2")
        for number, options in enumerate(
            (
                {"driver": "file", "filename": path, "size": 0},
                {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "size": MIB},
            )
        ):
            qmp.command("blockdev-create", **{"job-id": f"j{number}", "options": options})
            while (jobs := qmp.command("query-jobs"))[0]["status"] != "concluded":
                time.sleep(0.01)
            assert "error" not in jobs[0]
            qmp.command("job-dismiss", id=f"j{number}")
            assert qmp.command("query-jobs") == []
        node = {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": path}}
        qmp.command("blockdev-add", **node)
        for name in ("job-dismiss", "job-cancel", "job-finalize"):
            with pytest.raises(AssertionError, match="Job 'j0' not found"):
                qmp.command(name, id="j0")
        schema = {entry["name"]: entry for entry in qmp.command("query-qmp-schema")}
        assert "BlockdevCreateOptions-qcow2" in schema
        members = schema[schema["blockdev-create"]["arg-type"]]["members"]
        assert {"name": "options", "type": "BlockdevCreateOptions"} in members
