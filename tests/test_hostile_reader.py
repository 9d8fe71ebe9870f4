# SPDX-License-Identifier: GPL-2.0-or-later
"""A front-end that asks for answers and reads none: the back-end's thread waits in a reply."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import time

import pytest
from frontend import Channel, Device, Flag, GuestMemory, Message, Qmp, Type, vhostblk
from frontend.memory import Region
from frontend.protocol import HEADER, vring_state

MIB = 1 << 20
ANSWER = HEADER.size + 8
ASKING = Flag.VERSION | Flag.NEED_REPLY
QUESTION = HEADER.pack(Message.SET_VRING_ENABLE, ASKING, 8) + vring_state(0, 1)


def unread(channel: Channel) -> int:
    """Bytes that the back-end has sent and nobody has read."""
    (size,) = struct.unpack("i", fcntl.ioctl(channel.sock, termios.FIONREAD, bytes(4)))
    return int(size)


def stop_reading(device: Device) -> int:
    """Until there is no room for one more answer; returns for how many there is."""
    sock = device.channel.sock
    sock.setblocking(False)
    while True:
        try:
            sock.send(QUESTION)
        except BlockingIOError:
            if not select.select([], [sock], [], 1)[1]:
                return unread(device.channel) // ANSWER


def test_a_change_does_not_wait_for_it() -> None:
    """A change of the tree waits for requests, and they are done; only nobody can be told."""
    with (
        vhostblk(
            "--control", "{dir}/qmp.sock",
            "--blockdev", "driver=null-co,node-name=n,size=1M",
            "--blockdev", f"driver=delay,node-name=d,file=n,read-ns={10**15}",
            "--export", "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={dir}/e.sock",
        ) as daemon,
        Device(daemon.socket("e")) as device,
    ):  # fmt: skip
        device.submit(Type.IN, 0, length=512)
        assert device.inflight is not None
        while not device.inflight.heads():
            time.sleep(0.001)
        stop_reading(device)
        with Qmp(daemon.socket("qmp")) as qmp:
            filter = {"driver": "delay", "node-name": "x"}
            qmp.command("block-filter-insert", **{"export-id": "e", "filter": filter})


def mappings(pid: int, region: Region) -> list[tuple[int, int]]:
    """Where the process has a front-end's memory."""
    inode = str(os.fstat(region.fd).st_ino)
    found = []
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            fields = line.split()
            if fields[4] == inode:
                start, _, end = fields[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def test_what_it_does_not_share_any_more_is_not_its_own() -> None:
    """Another front-end's memory, at the address that its own had, is taken away."""
    sockets = [f"vhost-user-blk,id={id},node-name=n,addr.type=unix,addr.path={{dir}}/{id}.sock"
               for id in ("first", "second")]  # fmt: skip
    memory = GuestMemory([(0, 64 * MIB)])
    with (
        vhostblk(
            "--blockdev", "driver=null-co,node-name=n,size=1M,read-zeroes=on",
            *(word for socket in sockets for word in ("--export", socket)),
        ) as daemon,
        Device(daemon.socket("second")) as second,
    ):  # fmt: skip
        with Device(daemon.socket("first")) as first:
            room = stop_reading(first)
        with Device(daemon.socket("first"), memory=memory) as first:
            ((begin, end),) = mappings(daemon.pid, memory.regions[0])
            for _ in range(room):
                first.channel.send_bytes(QUESTION)
            while unread(first.channel) < room * ANSWER:
                time.sleep(0.001)
            small = Region(0, MIB, memory.regions[0].uva)  # the rings are in there
            table = struct.pack("<II", 1, 0) + small.payload()
            first.channel.send(Message.SET_MEM_TABLE, table, [small.fd], flags=ASKING)
            while mappings(daemon.pid, memory.regions[0]):
                time.sleep(0.001)

            taken = GuestMemory.add(second.memory, 1 << 40, 60 * MIB)
            second.add_region(taken)
            ((start, _),) = mappings(daemon.pid, taken)
            if not begin <= start < end:
                pytest.skip("the kernel has put it somewhere else")
            request = second.prepare(Type.IN, length=4096, in_at=taken.gpa)
            os.ftruncate(taken.fd, 0)
            second.publish(request)
            assert second.channel.wait_closed(10)
            assert "second" in daemon.wait_line("taken away")
            small.close()
        with Device(daemon.socket("second")) as again:
            again.read(0, 512)
