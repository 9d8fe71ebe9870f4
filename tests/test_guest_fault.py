# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGBUS: memory of a guest's that was taken away ends its connection, all else is as without us.

What becomes of requests in memory that is cut off is in test_hostile_messages.py; here it is about
whose signal it is, and how much memory is known.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from frontend import Device, Message, Segment, Type, vhostblk
from frontend.memory import PAGE

HERE = Path(__file__).resolve().parent

# A sanitizer handles SIGBUS itself, if we let it, and would be who handled it before.
PLAIN = {
    name: f"{os.environ.get(name, '')}:handle_sigbus=0"
    for name in ("ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS")
}

# Slots of one connection, in libvhost-user; the lowest two are the front-end's own regions.
SLOTS = 509


def python(*options: str, script: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: what SIGBUS does holds for all of a process."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{script}"
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | PLAIN,
    )


def test_a_signal_that_somebody_sent_ends_the_process() -> None:
    with vhostblk("--blockdev", "driver=null-co,node-name=n,size=1M", env=PLAIN) as daemon:
        os.kill(daemon.pid, signal.SIGBUS)
        assert daemon.process.wait(10) == -signal.SIGBUS


SENT = """
import asyncio, os, signal
from in_process import with_host
caught = []
signal.signal(signal.SIGBUS, lambda *_: caught.append(1))

async def scenario(host):
    await host.null()
    await host.export("null")
    async with host.device() as guest:
        for expected in (1, 2):
            os.kill(os.getpid(), signal.SIGBUS)
            await host.until(lambda: len(caught) == expected)
        for region in guest.device.memory.regions:
            os.ftruncate(region.fd, 0)
        os.eventfd_write(guest.device.queues[0].kick_fd, 1)
        await host.until(lambda: host.named("VHOSTBLK_EXPORT_DISCONNECTED"))
        print(host.named("VHOSTBLK_EXPORT_DISCONNECTED")[0]["reason"])

with_host(scenario)
"""


def test_who_handled_the_signal_before_still_does() -> None:
    """And surviving it that way does not cost the protection."""
    done = python(script=SENT)
    assert done.returncode == 0, done.stderr
    assert "taken away" in done.stdout


FAULT = """
import mmap, os
from bare_engine import BareEngine
with BareEngine():
    fd = os.memfd_create("x")
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    memory[0]
"""


def test_a_fault_in_other_memory_ends_the_process() -> None:
    done = python(script=FAULT)
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_a_fault_in_other_memory_reaches_the_fault_handler() -> None:
    done = python("-X", "faulthandler", script=FAULT)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert 'File "<string>"' in done.stderr


def test_as_much_memory_as_many_connections_can_share() -> None:
    """All slots of nine connections; the memory of the last one is taken away."""
    count = 9
    arguments = ["--blockdev", "driver=null-co,node-name=n,size=1M,read-zeroes=on"]
    for number in range(count):
        socket = f"addr.type=unix,addr.path={{dir}}/{number}.sock"
        arguments += ["--export", f"vhost-user-blk,id=e{number},node-name=n,num-queues=1,{socket}"]
    with vhostblk(*arguments) as daemon, ExitStack() as stack:
        devices = [
            stack.enter_context(Device(daemon.socket(str(number)))) for number in range(count)
        ]
        filler = os.memfd_create("filler")
        stack.callback(os.close, filler)
        os.ftruncate(filler, PAGE)
        for device in devices:
            last = device.memory.regions.pop()  # shared again behind all others
            device.remove_region(last)
            for number in range(SLOTS - 2):
                gpa = (1 << 40) + number * PAGE
                region = struct.pack("<8xQQQQ", gpa, PAGE, 1 << 46 | gpa, 0)
                device.tell(Message.ADD_MEM_REG, region, [filler])
            device.memory.regions.append(last)
            device.add_region(last)
        victim = devices[-1]
        at = victim.memory.regions[1].gpa
        victim.read(0, 512)
        request = victim.prepare(Type.IN, length=4096, in_at=at)
        os.ftruncate(victim.memory.regions[1].fd, 0)
        victim.publish(request)
        assert victim.channel.wait_closed(10)
        daemon.wait_line("taken away")
        for device in devices[:-1]:
            device.read(0, 4096)


def test_memory_of_huge_pages() -> None:
    """A region ends in the middle of one, and is given back, or taken away."""
    arguments = ["--blockdev", "driver=null-co,node-name=n,size=1M,read-zeroes=on"]
    arguments += ["--export", "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={dir}/e"]
    try:
        huge = os.memfd_create("huge-pages", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    with vhostblk(*arguments) as daemon, ExitStack() as stack:
        stack.callback(os.close, huge)
        device = stack.enter_context(Device(str(daemon.directory / "e")))
        maps = Path(f"/proc/{daemon.pid}/maps")
        os.ftruncate(huge, 1 << 30)  # it has no pages yet: as many as are asked for can be mapped
        region = struct.pack("<8xQQQQ", 1 << 40, PAGE, 1 << 46, 0)
        for _ in range(2):
            device.tell(Message.ADD_MEM_REG, region, [huge])
            assert "huge-pages" in maps.read_text()
            device.tell(Message.REM_MEM_REG, region)
            assert "huge-pages" not in maps.read_text()
        device.tell(Message.ADD_MEM_REG, region, [huge])
        header, status = device.memory.alloc(16), device.memory.alloc(1)
        device.memory.write(header, bytes(16))  # a read
        queue = device.queues[0]
        os.ftruncate(huge, 0)
        parts = [Segment(header, 16), Segment(1 << 40, PAGE, True), Segment(status, 1, True)]
        queue.submit(queue.add(parts))
        assert device.channel.wait_closed(10)
        daemon.wait_line("taken away")
        stack.enter_context(Device(str(daemon.directory / "e"))).read(0, 4096)
        assert "huge-pages" not in maps.read_text()
