# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters written in Python, between a guest and its disk."""

from __future__ import annotations

import time

from guest import DiskServer, Guest, Workspace
from guest.disks import MIB
from guest.fio import fio

# A plug-in: the guest's bytes are stored inverted.
INVERT = """
from vhostblk.filter import Filter, Request

INVERTED = bytes(255 - value for value in range(256))


class Invert(Filter):
    driver = "invert"

    async def read(self, request: Request) -> None:
        await self.file.forward(request)
        for view in request.buffers:
            view[:] = bytes(view).translate(INVERTED)

    async def write(self, request: Request) -> None:
        await self.file.write(request.offset, request.data().translate(INVERTED))
"""


class TestDelay:
    def test_the_guest_runs_on_it(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add(filters=["driver=delay,read-ns=2000000,write-ns=5000000"])
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=32 --size=4M"))
        guest.check(f"mkfs.ext4 -q {disk.dev} && mount -t ext4 {disk.dev} /mnt")
        guest.check("dd if=/dev/urandom of=/mnt/data bs=1M count=8 && sync && umount /mnt")

    def test_one_request_takes_that_long(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add(filters=["driver=delay,read-ns=400000000"])
        start = time.monotonic()
        guest.check(f"dd if={disk.dev} of=/dev/null bs=4k count=1 skip=1000 iflag=direct")
        assert time.monotonic() - start >= 0.4

    def test_stop_does_not_wait_for_it(self, guest: Guest, disks: DiskServer) -> None:
        """QEMU waits for every request before it is stopped; a delay must not hold it up."""
        disk = disks.add(filters=["driver=delay,write-ns=20000000000"])
        job = guest.spawn(f"dd if=/dev/urandom of={disk.dev} bs=4k count=4 conv=fsync")
        time.sleep(0.5)  # the guest does not count a request that is in flight
        start = time.monotonic()
        guest.stop()
        assert time.monotonic() - start < 5
        guest.cont()
        job.check(10)


class TestErrorInject:
    def test_the_guest_sees_errors_and_then_none(self, guest: Guest, disks: DiskServer) -> None:
        disks.expected_kernel_errors = True
        disk = disks.add(
            filters=["driver=error-inject,operations=write,offset=1M,length=4096,count=1"]
        )
        qmp = disk.backend.qmp  # connected now, so that it hears of what follows
        write = f"dd if=/dev/zero of={disk.dev} bs=4k seek=256 count=1 conv=fsync"
        assert guest.run(write).status != 0
        assert any("I/O error" in line for line in guest.kernel_errors())
        event = qmp.wait_event("VHOSTBLK_FILTER_ERROR", 10)
        assert event["data"]["offset"] == MIB
        guest.check(write)
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=8 --size=4M"))


class TestPlugin:
    def test_it_transforms_what_is_stored(
        self, guest: Guest, disks: DiskServer, workspace: Workspace
    ) -> None:
        plugin = workspace.path / "invert.py"
        plugin.write_text(INVERT)
        disk = disks.add(filters=["driver=invert"], options=["--plugin", str(plugin)])
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=16 --size=4M"))
        guest.check(
            f"printf ABCD >/tmp/text; dd if=/tmp/text of={disk.dev} seek=8 bs=1M conv=fsync"
        )
        with disk.image.open("rb") as file:
            file.seek(8 * MIB)
            assert bytes(255 - value for value in file.read(4)) == b"ABCD"
        guest.check("echo 3 >/proc/sys/vm/drop_caches")
        assert guest.check(f"dd if={disk.dev} skip=8 bs=1M count=1 | head -c 4") == "ABCD"
