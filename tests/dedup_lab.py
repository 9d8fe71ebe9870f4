# SPDX-License-Identifier: GPL-2.0-or-later
"""Dedup stores for tests: made, opened, and looked at."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from in_process import MIB, Host

from vhostblk.dedup.database import TABLES, Database
from vhostblk.dedup.file import FileData
from vhostblk.dedup.rebuild import Rebuild, Report
from vhostblk.dedup.tables import FILE

BLOCK = 4096
SEGMENT = 256 << 10


async def run_job(host: Host, options: dict[str, Any]) -> None:
    """blockdev-create, to the end."""
    await host.backend.blockdev_create("create", options)
    await host.until(lambda: host.backend.query_jobs()[-1]["status"] == "concluded")
    [info] = [job for job in host.backend.query_jobs() if job["id"] == "create"]
    assert "error" not in info, info
    host.backend.jobs.get("create").dismiss()


async def new_store(host: Host, file: str, metadata: str = "meta", **options: Any) -> None:
    """A store on a node that is there."""
    given = {"block-size": BLOCK, "segment-size": SEGMENT, "size": MIB}
    given |= {key.replace("_", "-"): value for key, value in options.items()}
    await run_job(host, {"driver": "dedup", "file": file, "metadata": host.path(metadata), **given})


async def create(host: Host, *, data: int = 8 * MIB, **options: Any) -> None:
    """A store on node `data`, a file, with metadata in `meta`."""
    host.file("data.raw", data)
    await host.add("file", "data", filename=host.path("data.raw"), discard="unmap")
    await new_store(host, "data", **options)


async def open_disk(host: Host, name: str = "disk", **options: Any) -> Any:
    """A disk of the store in `meta`; the node."""
    return await host.add(
        "dedup", name, **{"file": "data", "metadata": host.path("meta"), **options}
    )


def store_of(host: Host, name: str = "disk") -> Any:
    """The Store below a node."""
    return host.backend.graph.node(name).store


async def sound(host: Host, name: str = "disk") -> Any:
    """Everything in the store is as it should be, content included; what the check has found."""
    store = store_of(host, name)
    result = await store.check(store.members[0].data, repair=False, content=True)
    assert result.sound, result.messages
    return result


def files(directory: Path) -> dict[str, bytes]:
    """What is in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def rebuild(data: Path, directory: Path) -> Report:
    """New metadata in `directory`, from a data device that is a plain file."""

    async def run() -> Report:
        source = FileData(data)
        try:
            return await Rebuild(directory, source).run()
        finally:
            source.close()

    return asyncio.run(run())


async def rebuilt(data: Path, directory: Path) -> Report:
    """The same in a test that has a loop."""
    return await asyncio.to_thread(rebuild, data, directory)


def contents(directory: Path) -> dict[str, dict[bytes, bytes]]:
    """All that the database of a store that nobody uses says, but for what may differ."""
    database = Database(directory / FILE, 1 << 40)
    try:
        found = {name: dict(database.scan(name)) for name in TABLES}
    finally:
        database.close()
    del found["state"], found["index"]
    return found


@contextlib.contextmanager
def database(host: Host, metadata: str = "meta") -> Iterator[Database]:
    """The database of a store that nobody uses."""
    opened = Database(Path(host.path(metadata)) / FILE, 1 << 40)
    try:
        yield opened
    finally:
        opened.close()
