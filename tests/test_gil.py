# SPDX-License-Identifier: GPL-2.0-or-later
"""I/O threads and device threads never take the GIL: guests are served while Python holds it.

The control thread takes the GIL, lets a front-end in another process begin, and keeps the GIL until
that front-end has its answers. A thread that wanted the GIL would wait for the answer, and the
answer for that thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from in_process import MIB, Host, with_host
from test_luks_driver import DISK as LUKS_DISK
from test_luks_driver import formatted, secret

from crash import newest_tools  # isort: skip

from vhostblk.filter import Filter, Request

HERE = Path(__file__).resolve().parent
SECONDS = 30

# Says "ready", waits to be told to begin, and says "answered" when all that it asked for is done.
FRONT_END = f"""
import sys
from frontend import Device

def use(device, byte):
    for queue in 0, 1:
        for offset in range(0, 1 << 20, 1 << 16):
            device.write(offset, bytes([byte]) * 8192, queue=queue)
            assert device.read(offset, 8192, queue=queue) == bytes([byte]) * 8192
        device.flush(queue)
    assert device.get_id() == b"gil"

def work(device):
    use(device, 2)

def messages(device):
    for byte in range(3, 6):
        device.stop()
        device.config()
        device.start()
        use(device, byte)

with Device(sys.argv[1], queues=2, timeout=2 * {SECONDS}) as device:
    use(device, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    globals()[sys.argv[2]](device)
    print("answered", flush=True)
    sys.stdin.readline()
"""


class FrontEnd:
    """A guest in a process of its own, which begins when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        self._go = process.stdin.fileno()
        self._said = process.stdout

    async def line(self) -> str:
        return await asyncio.to_thread(self._said.readline)

    def answered_under_the_gil(self, seconds: float = SECONDS) -> bool:
        """Hold the GIL from before it begins until it has all answers, or for so long."""
        libc = ctypes.PyDLL(None)  # its functions are called with the GIL held
        answer = ctypes.create_string_buffer(
            struct.pack("=ihh", self._said.fileno(), select.POLLIN, 0)
        )
        # Nor is it let go of between the two calls if another thread asks for it.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10 * SECONDS)
        try:
            libc.write(self._go, b"\n", ctypes.c_size_t(1))
            return bool(libc.poll(answer, ctypes.c_ulong(1), int(seconds * 1000)) == 1)
        finally:
            sys.setswitchinterval(interval)


@asynccontextmanager
async def front_end(host: Host, what: str) -> AsyncIterator[FrontEnd]:
    command = [sys.executable, "-c", FRONT_END, host.path("e.sock"), what]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            guest = FrontEnd(process)
            assert await guest.line() == "ready\n"
            yield guest
        finally:
            process.kill()


async def file(host: Host) -> None:
    await host.add("file", "disk", filename=host.file("a"))


async def direct(host: Host) -> None:
    await host.add("file", "disk", filename=host.file("a"), cache={"direct": True})


async def flagship(host: Host) -> None:
    """throttle → luks → quorum → three qcow2, with its clusters where they are to stay."""
    raw = formatted(Path(host.path("raw")))
    await secret(host)
    for leg in "abc":
        newest_tools().img("convert", "-f", "raw", "-O", "qcow2", raw, host.path(leg))
        await host.add("qcow2", leg, file={"driver": "file", "filename": host.path(leg)})
    await host.add("quorum", "q", children=list("abc"), vote_threshold=2)
    await host.add("luks", "l", key_secret="s", file="q")
    await host.write("l", 0, bytes(LUKS_DISK))
    limits = {"bps-total": 4 * MIB}  # so that some requests wait
    await host.backend.object_add({"qom-type": "throttle-group", "id": "g", "limits": limits})
    await host.add("throttle", "disk", throttle_group="g", file="l")


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
@pytest.mark.parametrize("tree", [file, direct, flagship], ids=lambda tree: tree.__name__)
@pytest.mark.parametrize("what", ["work", "messages"])
def test_guests_are_served_while_python_holds_the_gil(
    what: str, tree: Callable[[Host], Coroutine[Any, Any, None]], aio: str
) -> None:
    async def test(host: Host) -> None:
        for name in "one", "two":
            await host.backend.object_add({"qom-type": "iothread", "id": name, "aio": aio})
        await tree(host)
        await host.export("disk", num_queues=2, iothread=["one", "two"], serial="gil")
        async with front_end(host, what) as guest:
            assert guest.answered_under_the_gil()
            assert await guest.line() == "answered\n"

    with_host(test)


class InPython(Filter):
    """Passes reads on from Python."""

    driver = "test-in-python"

    async def read(self, request: Request) -> None:
        request.forward()


def test_what_needs_python_waits_for_it() -> None:
    """What the tests above would see if a thread wanted the GIL."""

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        await host.add("test-in-python", "disk", file="f")
        await host.export("disk", num_queues=2, serial="gil")
        async with front_end(host, "work") as guest:
            assert not guest.answered_under_the_gil(0.5)
            assert await guest.line() == "answered\n"

    with_host(test, InPython)
