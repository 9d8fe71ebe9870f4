# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest sees of a disk, and what becomes of the file behind it."""

from __future__ import annotations

import hashlib
import time
from functools import partial

import psutil
import pytest
from guest import Disk, DiskServer, Guest, Workspace, wait_until
from guest.disks import MIB, check_ext4, read_ext4
from guest.fio import fio


class TestIdentity:
    def test_serial(self, disks: DiskServer) -> None:
        disk = disks.add(export="writable=on,serial=SN-0123456789abcdef0")
        assert disk.attribute("serial") == "SN-0123456789abcdef0"

    def test_size_and_default_geometry(self, disks: DiskServer) -> None:
        disk = disks.add(96 * MIB)
        assert int(disk.attribute("size")) == 96 * MIB // 512
        assert disk.attribute("queue/logical_block_size") == "512"
        assert disk.attribute("ro") == "0"
        assert disk.attribute("cache_type") == "write back"

    def test_block_size_4096(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add(export="writable=on,logical-block-size=4096")
        assert disk.attribute("queue/logical_block_size") == "4096"
        guest.check(fio(disk.dev, "--rw=randwrite --size=4M --bs=4k --iodepth=8"))
        assert guest.run(fio(disk.dev, "--rw=randwrite --size=4M --bs=512")).status != 0

    def test_read_only(self, guest: Guest, disks: DiskServer) -> None:
        content = b"constant" * (MIB // 8)
        disk = disks.add(export="writable=off", plug=False)
        disk.image.write_bytes(content)
        disk.backend.terminate()
        disk.backend.start()
        disk.plug()
        assert disk.attribute("ro") == "1"
        assert guest.check(f"dd if={disk.dev} bs=8 count=1 2>/dev/null") == "constant"
        assert guest.run(f"dd if=/dev/zero of={disk.dev} bs=4k count=1 conv=fsync").status != 0
        assert disk.image.read_bytes() == content

    def test_write_cache_can_be_switched(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        for mode in ("write through", "write back"):
            guest.check(f"echo {mode} >/sys/block/{disk.name}/cache_type")
            assert disk.attribute("cache_type") == mode
            guest.check(fio(disk.dev, "--rw=randwrite --size=1M --bs=4k --fsync=16"))


class TestData:
    @pytest.mark.parametrize(
        "job",
        [
            pytest.param("--bs=512 --iodepth=1 --size=256k", id="512-bytes-depth-1"),
            pytest.param("--bs=4k --iodepth=32 --size=16M", id="4k-depth-32"),
            pytest.param("--bs=64k --iodepth=16 --size=32M", id="64k-depth-16"),
            pytest.param("--bs=1M --iodepth=4 --size=48M", id="1m-depth-4"),
            pytest.param("--bsrange=512-256k --bs_unaligned=0 --iodepth=16 --size=32M", id="mixed"),
        ],
    )
    @pytest.mark.parametrize("file", ["", "cache.direct=on"], ids=["page-cache", "direct"])
    def test_random_writes(self, guest: Guest, disks: DiskServer, job: str, file: str) -> None:
        if file:
            # O_DIRECT needs no less than the host's own block size; guests learn it this way.
            job = job.replace("bs=512 ", "bs=4k ").replace("=512-", "=4k-")
        disk = disks.add(file=file)
        guest.check(fio(disk.dev, f"--rw=randwrite {job}"))

    def test_reads_and_writes_with_flushes(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        job = "--rw=randrw --bs=4k --iodepth=32 --size=8M --fsync=32 --numjobs=2"
        guest.check(fio(disk.dev, f"{job} --offset_increment=16M"))

    def test_file_system(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(f"mkfs.ext4 -q {disk.dev} && mount -t ext4 {disk.dev} /mnt")
        guest.check("mkdir /mnt/d && dd if=/dev/urandom of=/mnt/d/data bs=64k count=200")
        digest = guest.check("sha256sum </mnt/d/data").split()[0]
        guest.check("sync && umount /mnt")
        check_ext4(disk.image)
        assert hashlib.sha256(read_ext4(disk.image, "/d/data")).hexdigest() == digest
        guest.check(f"echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 {disk.dev} /mnt")
        assert guest.check("sha256sum </mnt/d/data; umount /mnt").split()[0] == digest

    def test_fstrim_frees_the_host_storage(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(f"mkfs.ext4 -q {disk.dev} && mount -t ext4 {disk.dev} /mnt")
        guest.check("dd if=/dev/urandom of=/mnt/data bs=1M count=64 && sync")
        full = disk.allocated()
        assert full >= 64 * MIB
        guest.check("rm /mnt/data && sync && fstrim /mnt")
        assert disk.allocated() <= full - 60 * MIB
        guest.check("umount /mnt")
        check_ext4(disk.image)

    def test_discard_and_zeroes_over_the_whole_disk(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add(64 * MIB)
        fill = f"dd if=/dev/urandom of={disk.dev} bs=1M conv=fsync"
        zero = f"[ $(tr -d '\\0' <{disk.dev} | wc -c) = 0 ]"
        guest.run(fill)
        assert disk.allocated() >= 64 * MIB
        guest.check(f"blkdiscard {disk.dev}")
        assert disk.allocated() <= MIB
        guest.check(zero)
        guest.run(fill)
        guest.check(f"/bin/blkdiscard -z {disk.dev}")
        guest.check(f"echo 3 >/proc/sys/vm/drop_caches; {zero}")
        assert not any(disk.image.read_bytes())

    def test_a_discard_is_ignored_unless_asked_for(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add(8 * MIB, file="discard=ignore")
        guest.run(f"dd if=/dev/urandom of={disk.dev} bs=1M conv=fsync")
        before = disk.image.read_bytes()
        guest.run(f"blkdiscard {disk.dev}")
        assert disk.image.read_bytes() == before


class TestQueues:
    def test_default_is_one_queue_per_cpu(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        assert guest.check(f"ls /sys/block/{disk.name}/mq").split() == ["0", "1"]
        guest.check(fio(disk.dev, PER_CPU))

    def test_two_disks_with_eight_queues_each(self, guest: Guest, disks: DiskServer) -> None:
        pair = [disks.add(num_queues=8) for _ in range(2)]
        jobs = [guest.spawn(fio(disk.dev, PER_CPU)) for disk in pair]
        for job in jobs:
            job.check(60)


PER_CPU = (
    "--rw=randwrite --bs=4k --iodepth=16 --size=4M"
    " --numjobs=2 --offset_increment=16M --cpus_allowed=0,1 --cpus_allowed_policy=split"
)


class TestChanges:
    """What an operator, QEMU or the guest's administrator does to a disk that is in use."""

    def test_unplug_under_load_and_plug_again(self, guest: Guest, disks: DiskServer) -> None:
        disks.expected_kernel_errors = True
        disk = disks.add()
        job = guest.spawn(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=32 --size=64M --loops=9"))
        wait_until(partial(disk.has_written, 500), "load on the disk", 30)
        disk.unplug()
        assert job.wait(30) != 0
        disk.plug()
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=32 --size=4M"))

    def test_plug_and_unplug_many_times(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(f"echo kept | dd of={disk.dev} conv=fsync")
        for _ in range(5):
            disk.unplug()
            disk.plug()
            assert guest.check(f"head -c 4 {disk.dev}") == "kept"

    def test_driver_unbound_and_bound(self, guest: Guest, disks: DiskServer) -> None:
        """This resets the device, as a guest's kexec or crash kernel does."""
        disk = disks.add()
        guest.check(f"echo kept | dd of={disk.dev} conv=fsync")
        virtio = guest.check(f"basename $(readlink -f /sys/block/{disk.name}/device)")
        driver = "/sys/bus/virtio/drivers/virtio_blk"
        for _ in range(3):
            guest.check(f"echo {virtio} >{driver}/unbind && [ ! -e /sys/block/{disk.name} ]")
            guest.check(f"echo {virtio} >{driver}/bind && [ -e /sys/block/{disk.name} ]")
            assert guest.check(f"head -c 4 {disk.dev}") == "kept"
            guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=8 --offset=1M --size=1M"))

    def test_stop_and_cont_under_load(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        load = guest.load(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=32 --size=8M"))
        before: list[int] = []
        for _ in range(3):
            count = disk.writes()
            wait_until(partial(disk.has_written, count + 500), "load on the disk", 30)
            guest.stop()
            rings = guest.used_indexes(disk.disk)
            assert rings != before
            modified = disk.image.stat().st_mtime_ns
            time.sleep(0.5)  # long enough for a request that was left in flight to end
            assert guest.used_indexes(disk.disk) == rings
            assert disk.image.stat().st_mtime_ns == modified
            before = rings
            guest.cont()
        load.finish()

    def test_resize(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add(64 * MIB)
        guest.check(f"mkfs.ext4 -q {disk.dev} && mount -t ext4 {disk.dev} /mnt")
        disk.backend.qmp.command("block_resize", {"node-name": disk.node, "size": 192 * MIB})
        assert disk.image.stat().st_size == 192 * MIB
        wait_until(
            lambda: int(disk.attribute("size")) == 192 * MIB // 512, "the new size in the guest", 20
        )
        guest.check(f"resize2fs {disk.dev}")
        guest.check("dd if=/dev/urandom of=/mnt/data bs=1M count=120 && sync && umount /mnt")
        check_ext4(disk.image)

    def test_a_disk_added_to_a_running_backend(
        self, guest: Guest, disks: DiskServer, workspace: Workspace
    ) -> None:
        first = disks.add()
        image = workspace.image("late.raw", 32 * MIB)
        socket = workspace.path / "late.sock"
        qmp = first.backend.qmp
        qmp.command("blockdev-add", {"driver": "file", "node-name": "late", "filename": str(image)})
        address = {"type": "unix", "path": str(socket)}
        export = {"type": "vhost-user-blk", "id": "late", "node-name": "late", "addr": address}
        qmp.command("block-export-add", {**export, "writable": True})
        disk = Disk("late", socket)
        name = guest.plug(disk)
        guest.check(fio(f"/dev/{name}", "--rw=randwrite --bs=4k --iodepth=8 --size=4M"))
        guest.unplug(disk)
        qmp.command("block-export-del", {"id": "late", "mode": "hard"})
        qmp.wait_event("BLOCK_EXPORT_DELETED", where=lambda data: data.get("id") == "late")
        qmp.command("blockdev-del", {"node-name": "late"})
        guest.check(fio(first.dev, "--rw=randwrite --bs=4k --iodepth=8 --size=4M"))


class TestIdle:
    def test_an_idle_guest_costs_no_cpu(self, guest: Guest, disks: DiskServer) -> None:
        disk = disks.add()
        guest.check(fio(disk.dev, "--rw=randwrite --bs=4k --iodepth=8 --size=2M"))
        backend = psutil.Process(disk.backend.process.pid)
        time.sleep(0.5)  # polling has its adaptive end
        before = backend.cpu_times()
        time.sleep(2)
        after = backend.cpu_times()
        assert after.user + after.system - before.user - before.system <= 0.02
