# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that are there when the guest boots, and reboots."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from guest import Backend, Disk, Guest, GuestImages, Workspace
from guest.disks import MIB
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
