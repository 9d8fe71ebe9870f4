# SPDX-License-Identifier: GPL-2.0-or-later
"""Two guests whose disks are copies of one image, in one dedup store."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from frontend import Device
from guest import Backend, Disk, Guest, GuestImages, Workspace, wait_until
from guest.disks import MIB
from guest.fio import fio

SIZE = 256 * MIB
FILES = 40
DISKS = ("web", "db")
DEVICE = "/dev/vda"


def make_image(directory: Path) -> tuple[Path, dict[str, str]]:
    """A file system full of files, and their checksums."""
    rnd = random.Random(1)
    tree = directory / "tree"
    tree.mkdir()
    sums = {}
    for number in range(FILES):
        data = rnd.randbytes(rnd.randint(1, 3 * MIB))
        (tree / f"file{number}").write_bytes(data)
        sums[f"file{number}"] = hashlib.sha256(data).hexdigest()
    image = directory / "image.raw"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    subprocess.run(
        ["/sbin/mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)], check=True, timeout=60
    )
    return image, sums


class Store:
    """A backend with one store and two disks."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        data = workspace.image("store.raw", 3 * SIZE)
        self.sockets = {name: workspace.path / f"{name}.sock" for name in DISKS}
        metadata = workspace.path / "metadata"
        arguments = ["--blockdev", f"driver=file,node-name=data,filename={data},discard=unmap"]
        self.create = {
            "driver": "dedup",
            "file": "data",
            "metadata": str(metadata),
            "block-size": 4096,
            "segment-size": MIB,
        }
        self.maker = Backend(workspace, arguments, name="maker")
        arguments = list(arguments)
        for name in DISKS:
            arguments += [
                "--blockdev",
                f"driver=dedup,node-name={name},disk={name},file=data,metadata={metadata},"
                f"size={SIZE},discard=unmap",
                "--export",
                f"type=vhost-user-blk,id={name},node-name={name},writable=on,"
                f"addr.type=unix,addr.path={self.sockets[name]}",
            ]
        self.backend = Backend(workspace, arguments, name="store")

    def make(self) -> None:
        """The empty store."""
        self.maker.start()
        qmp = self.maker.qmp
        qmp.command("blockdev-create", {"job-id": "make", "options": self.create})

        def concluded() -> bool:
            [job] = qmp.command("query-jobs")
            assert "error" not in job, job
            return bool(job["status"] == "concluded")

        wait_until(concluded, "the store to be made", 20)
        qmp.command("job-dismiss", {"id": "make"})
        self.maker.terminate()

    def query(self) -> Any:
        return self.backend.qmp.command("query-dedup", {"node-name": DISKS[0]})

    def cost(self) -> int:
        """Bytes on both devices, with the records for a rebuild."""
        found = self.query()
        return int(found["compressed"] + found["metadata-size"] + found["ledger-size"])

    def fill(self, name: str, image: Path) -> None:
        """Copy an image to a disk, as a guest would write it."""
        with Device(self.sockets[name], timeout=60) as device, open(image, "rb") as file:
            at = 0
            while data := file.read(MIB):
                if any(data):
                    device.write(at, data)
                at += len(data)
            device.flush()

    def check(self) -> None:
        """Of everything, down to the content of each block."""
        found = self.backend.qmp.command("dedup-check", {"node-name": DISKS[0], "content": True})
        assert not found["corruptions"] and not found["wrong"] and not found["leaks"], found


@pytest.fixture
def store(own_workspace: Workspace) -> Iterator[Store]:
    store = Store(own_workspace)
    try:
        store.make()
        store.backend.start()
        yield store
        store.backend.terminate()
    finally:
        store.maker.close()
        store.backend.close()


@pytest.fixture
def guests(
    own_workspace: Workspace, store: Store, images: GuestImages, accel: str
) -> Iterator[list[Guest]]:
    guests = [
        Guest(own_workspace, images, accel, disks=[Disk(name, store.sockets[name])], name=name)
        for name in DISKS
    ]
    try:
        yield guests
    finally:
        for guest in guests:
            guest.close()


def verify(guest: Guest, sums: dict[str, str]) -> None:
    """All files, read from the disk."""
    guest.check("echo 3 >/proc/sys/vm/drop_caches")
    found = guest.check("cd /mnt && sha256sum file*")
    assert dict(reversed(line.split()) for line in found.splitlines()) == sums


@pytest.mark.timeout(300)
def test_two_guests_from_one_image(store: Store, guests: list[Guest], tmp_path: Path) -> None:
    image, sums = make_image(tmp_path)
    store.fill(DISKS[0], image)
    first = store.cost()
    store.fill(DISKS[1], image)
    for guest in guests:
        guest.start()
        guest.check(f"mount -t ext4 {DEVICE} /mnt")
        verify(guest, sums)
    second = store.cost() - first
    assert second < 0.05 * first, (first, second)

    # Both write, each checks what it has written, and the backend is killed meanwhile.
    job = "--rw=randwrite --bs=4k --iodepth=16 --size=8M --fsync=64 --time_based --runtime=15"
    loads = [guest.spawn(fio("/mnt/load", job)) for guest in guests]
    for _ in range(3):
        written = [int(guest.check("cat /sys/block/vda/stat").split()[4]) for guest in guests]
        for guest, before in zip(guests, written, strict=True):

            def has_written(guest: Guest = guest, before: int = before) -> bool:
                return int(guest.check("cat /sys/block/vda/stat").split()[4]) > before + 200

            wait_until(has_written, "200 more writes", 60)
        store.backend.kill()
        store.backend.start()
    for load in loads:
        load.check(120)
    for guest in guests:
        guest.check("rm -f /mnt/load; sync")
        verify(guest, sums)
        guest.check("umount /mnt")
        assert guest.kernel_errors() == []
    store.check()
