# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that are there when the guest boots, reboots, and the root disk of a real system."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator

import pytest
from guest import Backend, Disk, Guest, GuestImages, Workspace
from guest.disks import MIB, check_ext4, read_ext4
from guest.fio import fio

DISKS = ["vda", "vdb"]
QUEUES = 8
# On two busy CPUs, eight that are emulated need minutes.
WIDE_BOOT_SECONDS = 240


@pytest.fixture(scope="class")
def backends(own_workspace: Workspace) -> Iterator[list[Backend]]:
    backends = []
    for name in DISKS:
        image = own_workspace.image(f"{name}.raw", 256 * MIB)
        address = f"addr.type=unix,addr.path={own_workspace.path}/{name}.sock"
        arguments = [
            *("--object", "iothread,id=io0", "--object", "iothread,id=io1"),
            *("--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"),
            *("--blockdev", "driver=raw,node-name=raw,file=file"),
            "--export",
            f"type=vhost-user-blk,id={name},node-name=raw,writable=on,serial=disk-{name}"
            f",iothread.0=io0,iothread.1=io1,{address}",
        ]
        backends.append(Backend(own_workspace, arguments, name=name))
    try:
        for backend in backends:
            backend.start()
        yield backends
        for backend in backends:
            backend.terminate()
    finally:
        for backend in backends:
            backend.close()


@pytest.fixture(scope="class")
def wide_guest(
    own_workspace: Workspace,
    backends: list[Backend],
    images: GuestImages,
    accel: str,
) -> Iterator[Guest]:
    disks = [Disk(name, own_workspace.path / f"{name}.sock", QUEUES) for name in DISKS]
    guest = Guest(
        own_workspace,
        images,
        accel,
        disks=disks,
        smp=str(QUEUES),
        boot_timeout=WIDE_BOOT_SECONDS,
    )
    try:
        guest.start()
        yield guest
    finally:
        guest.close()


@pytest.mark.timeout(420)
class TestTwoDisksEightQueues:
    """One guest with eight CPUs; each disk has a queue for every one of them."""

    @pytest.fixture(autouse=True)
    def no_kernel_errors(self, wide_guest: Guest) -> Iterator[None]:
        wide_guest.check("dmesg -c >/dev/null")
        yield
        assert wide_guest.kernel_errors() == []

    def load(self, name: str) -> str:
        return fio(
            f"/dev/{name}",
            f"--rw=randwrite --bs=4k --iodepth=8 --size=1M --numjobs={QUEUES}"
            f" --offset_increment=16M --cpus_allowed=0-{QUEUES - 1} --cpus_allowed_policy=split",
        )

    def test_every_queue_carries_requests(self, wide_guest: Guest) -> None:
        for name in DISKS:
            assert wide_guest.check(f"cat /sys/block/{name}/serial") == f"disk-{name}"
            queues = wide_guest.check(f"ls /sys/block/{name}/mq").split()
            assert len(queues) == QUEUES
        for job in [wide_guest.spawn(self.load(name)) for name in DISKS]:
            job.check(90)
        interrupts = re.findall(
            r"^ *\d+:((?: +\d+)+) .*virtio\d+-req\.\d+",
            wide_guest.check("cat /proc/interrupts"),
            re.M,
        )
        assert len(interrupts) == QUEUES * len(DISKS)
        for counts in interrupts:
            assert sum(int(count) for count in counts.split()) > 0

    @pytest.mark.parametrize("by", ["host", "guest"])
    def test_reboot_under_load(self, wide_guest: Guest, by: str) -> None:
        for name in DISKS:
            wide_guest.check(f"echo kept-{by} | dd of=/dev/{name} seek=200 bs=1M conv=fsync")
            wide_guest.spawn(f"while {self.load(name)}; do :; done")
        resets = {
            "host": lambda: wide_guest.qmp.command("system_reset"),
            "guest": lambda: wide_guest.console.send("busybox reboot -f"),
        }
        wide_guest.reboot(resets[by])
        for name in DISKS:
            text = wide_guest.check(f"dd if=/dev/{name} skip=200 bs=1M count=1 | head -n 1")
            assert text.splitlines()[0] == f"kept-{by}"
        for job in [wide_guest.spawn(self.load(name)) for name in DISKS]:
            job.check(90)


USER_DATA = """#cloud-config
runcmd:
  - - sh
    - -c
    - |
      {
          echo "VMTEST root=$(findmnt -no SOURCE /)"
          echo "VMTEST driver=$(basename $(readlink -f /sys/block/vda/device/driver))"
          echo "VMTEST serial=$(cat /sys/block/vda/serial)"
          dd if=/dev/urandom of=/root/data bs=1M count=32 conv=fsync
          sha256sum /root/data | sed 's/^/VMTEST sum=/'
          echo VMTEST-CLOUD-INIT-DONE
      } >/dev/ttyS0
      poweroff
"""


class TestRootDisk:
    @pytest.mark.timeout(420)
    def test_debian_boots_and_cloud_init_runs(
        self, workspace: Workspace, debian_images: GuestImages, accel: str
    ) -> None:
        images = debian_images
        image = workspace.path / "root.raw"
        subprocess.run(
            ["cp", "--sparse=always", "--reflink=auto", images.debian_disk, image],
            check=True,
            timeout=120,
        )
        seed = workspace.path / "seed"
        seed.mkdir()
        (seed / "meta-data").write_text("instance-id: vm-test\nlocal-hostname: vm-test\n")
        (seed / "user-data").write_text(USER_DATA)
        socket = workspace.path / "root.sock"
        address = f"addr.type=unix,addr.path={socket}"
        backend = Backend(
            workspace,
            [
                *("--blockdev", f"driver=file,node-name=root,filename={image},discard=unmap"),
                "--export",
                f"type=vhost-user-blk,id=root,node-name=root,writable=on,serial=root-disk,{address}",
            ],
        )
        guest = Guest(
            workspace,
            images,
            accel,
            disks=[Disk("root", socket)],
            memory="1G",
            initrd=images.root_initrd,
            append="root=/dev/vda",
            # Behind a port of its own, the seed cannot come before the root disk in PCI's order.
            qemu_options=[
                *("-blockdev", f"driver=vvfat,node-name=seed,dir={seed},label=cidata,read-only=on"),
                *("-device", "virtio-blk-pci,drive=seed,bus=port1"),
            ],
        )
        try:
            backend.start()
            guest.start(wait_shell=False)
            _, text = guest.console.wait_for(re.compile(rb"VMTEST-CLOUD-INIT-DONE"), 240)
            # Not only at the beginning of a line: getty's prompt may stand there.
            facts = dict(re.findall(r"VMTEST (\w+)=(\S+)", text.decode(errors="replace")))
            assert facts["root"] == "/dev/vda"
            assert facts["driver"] == "virtio_blk"
            assert facts["serial"] == "root-disk"
            # The guest powers itself off, as an administrator would.
            assert guest.process.wait(90) == 0
            backend.terminate()
        finally:
            guest.close()
            backend.close()
        check_ext4(image)
        assert hashlib.sha256(read_ext4(image, "/root/data")).hexdigest() == facts["sum"]
