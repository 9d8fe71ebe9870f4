# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's tools respect a live image, and we respect theirs."""

from __future__ import annotations

import asyncio
import shutil
import subprocess

import pytest
from in_process import Host, refused, with_host

from vhostblk.nodes.locks import PERM_BASE, _is_locked_by_others

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-io") is None, reason="qemu-utils is not installed"
)


async def qemu_io(path: str, *commands: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
    arguments = ["qemu-io", "-f", "raw", *options, path]
    for command in commands:
        arguments += ["-c", command]
    done = await asyncio.to_thread(
        subprocess.run, arguments, capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout + done.stderr


async def start_writer(path: str) -> asyncio.subprocess.Process:
    """A QEMU that has the image open for writing, as for a guest."""
    process = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", path,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    with open(path, "rb") as image:
        async with asyncio.timeout(20):
            while not _is_locked_by_others(image.fileno(), PERM_BASE + 1):
                await asyncio.sleep(0.02)
    return process


async def end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


def test_qemu_refuses_an_image_that_a_guest_writes_to() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("raw", "r", file={"driver": "file", "filename": path})
        assert (await qemu_io(path, "write 0 1k"))[0] == 0  # nobody uses it yet
        await host.export("r")
        status, text = await qemu_io(path, "write 0 1k")
        assert status == 1 and 'Failed to get "write" lock' in text
        done = await asyncio.to_thread(
            subprocess.run,
            ["qemu-img", "resize", "-f", "raw", path, "2M"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "lock" in done.stderr
        await host.backend.block_export_del("e")
        assert (await qemu_io(path, "write 0 1k"))[0] == 0

    with_host(test)


def test_we_refuse_an_image_that_qemu_writes_to() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path)
        process = await start_writer(path)
        try:
            with refused('Failed to get shared "write" lock', f"[{path}]"):
                await host.export("f")
            await host.add("file", "nolock", filename=path, locking="off")
            await host.export("nolock", "e2")
            await host.add("file", "look", filename=path, read_only=True, force_share=True)
            await host.export("look", "e3", writable=False)
        finally:
            await end(process)
        await host.export("f")

    with_host(test)


def test_two_nodes_on_one_file_exclude_each_other_too() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "one", filename=path)
        await host.add("file", "two", filename=path)
        await host.export("one", "e1")
        with refused('Failed to get "write" lock'):
            await host.export("two", "e2")
        await host.backend.block_export_del("e1")
        await host.export("two", "e2")

    with_host(test)


def test_a_failed_export_gives_its_locks_back() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path)
        with refused("does not exist"):
            await host.export("f", addr={"type": "unix", "path": "/nonexistent/dir/s"})
        assert (await qemu_io(path, "write 0 1k"))[0] == 0

    with_host(test)


def test_readers_agree_with_qemus_readers() -> None:
    async def test(host: Host) -> None:
        path = host.file("a")
        await host.add("file", "f", filename=path, read_only=True)
        await host.export("f", writable=False)
        assert (await qemu_io(path, "read 0 1k", options=("-r",)))[0] == 0
        status, text = await qemu_io(path, "write 0 1k")
        assert status == 1 and 'Failed to get "write" lock' in text

    with_host(test)
