# SPDX-License-Identifier: GPL-2.0-or-later
"""block-stream: a disk becomes independent of its backing files."""

from __future__ import annotations

from typing import Any

from vhostblk.control.registry import Context, Registry
from vhostblk.jobs.block_job import OnError
from vhostblk.jobs.stream import start_stream
from vhostblk.schema import Model, OnOff, UInt64

registry = Registry()


class BlockStream(Model):
    """Arguments of block-stream."""

    device: str
    """An export, whose legs are all streamed, or a node."""
    job_id: str | None = None
    """The job's id; that of the device if absent."""
    filter_node_name: str | None = None
    """Name of the copy-on-read node that is there while the job runs."""
    speed: UInt64 = 0
    """Most bytes per second; 0: no limit."""
    on_error: OnError = "report"
    """What becomes of the job when something cannot be read or written."""
    auto_finalize: OnOff = True
    """Whether the backing files are let go of at once when everything has been copied."""
    auto_dismiss: OnOff = True
    """Whether the job goes away when it has ended."""


@registry.command("block-stream")
async def block_stream(context: Context, arguments: BlockStream) -> Any:
    """Copy what a disk's overlays do not have into them, and drop their backing files."""
    async with context.backend.changing():
        job = await start_stream(
            context.backend,
            arguments.device,
            arguments.job_id,
            arguments.filter_node_name,
            speed=arguments.speed,
            on_error=arguments.on_error,
            auto_finalize=arguments.auto_finalize,
            auto_dismiss=arguments.auto_dismiss,
        )
    return {"job-id": job.id}
