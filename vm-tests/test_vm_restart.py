# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend dies or is restarted under a running guest, which must only notice a pause.

QEMU's chardev reconnects by itself; the requests that were in flight are found again in the area
of memory that QEMU keeps for its backend (INFLIGHT_SHMFD).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from guest import DiskServer, Guest, ServedDisk, wait_until
from guest.disks import check_ext4
from guest.fio import fio
from guest.vm import qemu_version

# Random writes that come back to the same blocks again and again, so that a write which is lost,
# or repeated after a newer one, leaves a block with an old sequence number for fio to find.
OVERWRITES = (
    "--rw=randwrite --bs=4k --iodepth=32 --size=2M --io_size=12M"
    " --norandommap --serialize_overlap=1"
)
KILLS = 5
WRITES = 500  # between them: each place in the rings has come round several times
# It takes its handlers off the connection and forgets to put them back, if the backend goes away
# while the device is not started: in the middle of the handshake, or with the guest stopped.
needs_reliable_reconnect = pytest.mark.skipif(
    qemu_version() < (9, 1), reason="QEMU before 9.1 does not reconnect in every case"
)
RECONNECT_SECONDS = 30


def wait_writes(disk: ServedDisk, count: int) -> None:
    """Wait until the guest has seen that many more writes complete."""
    goal = disk.writes() + count
    wait_until(partial(disk.has_written, goal), f"{count} more writes", RECONNECT_SECONDS)


def kill_and_restart(disks: Sequence[ServedDisk], times: int, writes: int = WRITES) -> None:
    """Every time after some progress, so that requests are in flight when it happens."""
    for _ in range(times):
        for disk in disks:
            wait_writes(disk, writes)
            disk.backend.kill()
            disk.backend.start()
    for disk in disks:
        wait_writes(disk, writes)


class TestKill:
    @pytest.mark.parametrize("file", ["", "cache.direct=on"], ids=["page-cache", "direct"])
    def test_under_load(self, guest: Guest, disks: DiskServer, file: str) -> None:
        disk = disks.add(file=file)
        load = guest.load(fio(disk.dev, OVERWRITES))
        kill_and_restart([disk], KILLS)
        load.finish()

    def test_with_requests_held_back(self, guest: Guest, disks: DiskServer) -> None:
        """All that the guest has in flight is really in flight, and ends in any order."""
        delay = "driver=delay,write-ns=20000000,read-ns=1000000,jitter-ns=20000000"
        disk = disks.add(filters=[delay])
        load = guest.load(fio(disk.dev, f"{OVERWRITES} --io_size=4M"))
        resubmitted = 0
        for _ in range(3):
            kill_and_restart([disk], 1, writes=200)
            resubmitted += disk.backend.export(disk.disk.id)["resubmitted"]
        load.finish()
        assert resubmitted > 0, "nothing was in flight: the test proves nothing"

    def test_two_disks_with_many_queues(self, guest: Guest, disks: DiskServer) -> None:
        pair = [disks.add(num_queues=8) for _ in range(2)]
        job = f"{OVERWRITES} --numjobs=2 --offset_increment=16M"
        loads = [guest.load(fio(disk.dev, job)) for disk in pair]
        kill_and_restart(pair, 2)
        for load in loads:
            load.finish(90)

    def test_while_reading(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(fio(disk.dev, "--rw=write --bs=4k --iodepth=32 --size=8M"))
        load = guest.load(fio(disk.dev, "--rw=randread --bs=4k --iodepth=32 --size=8M"))
        for _ in range(3):
            goal = disk.reads() + 1000
            wait_until(partial(disk.has_read, goal), "1000 more reads", RECONNECT_SECONDS)
            disk.backend.kill()
            disk.backend.start()
        load.finish()

    def test_as_soon_as_qemu_is_back(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        load = guest.load(fio(disk.dev, OVERWRITES))
        wait_writes(disk, WRITES)
        for _ in range(4):
            disk.backend.kill()
            disk.backend.start()
            wait_until(disk.connected, "QEMU to be back", RECONNECT_SECONDS)
        wait_writes(disk, WRITES)
        load.finish()

    @needs_reliable_reconnect
    def test_while_qemu_is_connecting(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        load = guest.load(fio(disk.dev, OVERWRITES))
        wait_writes(disk, WRITES)
        disk.backend.kill()
        for _ in range(6):
            disk.backend.start()
            disk.backend.kill()
        disk.backend.start()
        wait_writes(disk, WRITES)
        load.finish()

    def test_with_a_mounted_file_system(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(f"mkfs.ext4 -q {disk.dev} && mount -t ext4 {disk.dev} /mnt")
        load = guest.load(
            "n=$((n + 1)) && dd if=/dev/urandom of=/mnt/$n bs=64k count=4 2>/dev/null"
            " && sha256sum /mnt/$n >>/tmp/sums && sync"
        )
        kill_and_restart([disk], 3, writes=50)
        load.finish()
        guest.check(f"umount /mnt && mount -t ext4 {disk.dev} /mnt && sha256sum -c -s /tmp/sums")
        guest.check("umount /mnt")
        check_ext4(disk.image)

    def test_of_an_idle_disk(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=8 --size=2M"))
        disk.backend.kill()
        disk.backend.start()
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=8 --size=2M"))

    def test_write_through_is_remembered(self, guest: Guest, disks: DiskServer) -> None:
        """The guest has switched the write cache off and will not say so again."""
        disk = disks.add()
        guest.check(f"echo write through >/sys/block/{disk.name}/cache_type")
        assert not disk.backend.export(disk.disk.id)["writeback"]
        disk.backend.kill()
        disk.backend.start()
        wait_until(disk.connected, "QEMU to be back", RECONNECT_SECONDS)
        assert not disk.backend.export(disk.disk.id)["writeback"]
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=8 --size=2M"))

    @needs_reliable_reconnect
    def test_while_the_guest_is_stopped(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        load = guest.load(fio(disk.dev, OVERWRITES))
        wait_writes(disk, WRITES)
        guest.stop()
        disk.backend.kill()
        wait_until(lambda: not guest.connected(disk.disk), "QEMU to notice", RECONNECT_SECONDS)
        disk.backend.start()
        wait_until(lambda: guest.connected(disk.disk), "QEMU to be back", RECONNECT_SECONDS)
        guest.cont()
        wait_writes(disk, WRITES)
        load.finish()


class TestCleanRestart:
    @pytest.mark.parametrize("end", ["quit", "terminate"])
    def test_under_load(self, guest: Guest, disks: DiskServer, end: str) -> None:
        disk = disks.add()
        load = guest.load(fio(disk.dev, OVERWRITES))
        for _ in range(3):
            wait_writes(disk, WRITES)
            getattr(disk.backend, end)()
            disk.backend.start()
        wait_writes(disk, WRITES)
        load.finish()

    def test_with_requests_held_back(self, guest: Guest, disks: DiskServer) -> None:
        """A backend that ends in order lets the artificial delays go, and waits for the rest."""
        delay = "driver=delay,write-ns=50000000,jitter-ns=20000000"
        disk = disks.add(filters=[delay])
        load = guest.load(fio(disk.dev, f"{OVERWRITES} --io_size=4M"))
        for _ in range(2):
            wait_writes(disk, 100)
            disk.backend.terminate()
            disk.backend.start()
        wait_writes(disk, 100)
        load.finish()
