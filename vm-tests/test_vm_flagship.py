# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest whose root disk is throttle → luks → quorum → three qcow2 images.

Everything happens to it while it runs: snapshots, new keys, limits, a leg that rots, a backend
that is killed. Two programs check all the time what they read: fio, and programs/stamp.c, which
knows what belongs on each snapshot. In the end QEMU opens what is left with a tree of its own.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from guest import DiskServer, Guest, GuestImages, ServedDisk, Workspace, wait_until
from guest.backend import vhostblk_command
from guest.disks import MIB, check_ext4, read_ext4
from guest.fio import fio
from guest.legs import Legs, Progress, qemu_img, report
from guest.programs import install
from guest.stamps import BLOCK, Stamper, Timeline

LEGS = 3
SIZE = 192 * MIB
BLOCKS = 1024  # of the file that stamp.c writes to: 4 MiB
RECONNECT_SECONDS = 30
HEAL_SECONDS = 60
FIRST_KEY, SECOND_KEY = "of the first day", "of a later day"
ROTTEN_EXTENTS = 64


def secret(name: str, key: str) -> str:
    return f"secret,id={name},data={key}"


@dataclass
class Moment:
    """What was known when a snapshot was taken."""

    images: list[Path]
    """Those that it covered, one of each leg."""
    key: str
    """A passphrase of that time."""
    before: list[int]
    after: list[int]


class QemuTree:
    """The same tree, as QEMU opens it from files that nobody else uses."""

    def __init__(self, images: Sequence[Path], key: str) -> None:
        legs = [
            {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
            for image in images
        ]
        quorum = {"driver": "quorum", "vote-threshold": 2, "children": legs}
        luks = {"driver": "luks", "key-secret": "key", "file": quorum}
        self._tree = "json:" + json.dumps(
            {"driver": "throttle", "throttle-group": "g", "file": luks}
        )
        self._objects = ["--object", secret("key", key), "--object", "throttle-group,id=g"]

    def convert(self, output: Path) -> Path:
        """What is in it, decrypted."""
        qemu_img("convert", *self._objects, "-O", "raw", self._tree, output)
        return output


class RootDisk:
    """The flagship tree, a guest that runs from it, and the programs in that guest."""

    def __init__(
        self,
        workspace: Workspace,
        disks: DiskServer,
        installer: Guest,
        images: GuestImages,
        accel: str,
    ) -> None:
        self._workspace = workspace
        container = workspace.path / "container.luks"
        passphrase = workspace.path / "passphrase"
        passphrase.write_text(FIRST_KEY)
        # Of the kind that QEMU can read.
        create = ["create", "-f", "luks", "-o", "version=luks1,iter-time=100"]
        subprocess.run(
            [*vhostblk_command(), *create, "--key-file", passphrase, container, str(SIZE)],
            check=True,
            timeout=60,
        )
        self.tree = Legs(workspace, LEGS, content=container)
        container.unlink()
        self.disk = self.tree.serve(
            disks,
            # Secrets are not in the state file: each start has to be given them.
            objects=(
                "iothread,id=io0",
                "iothread,id=io1",
                "throttle-group,id=limits",
                secret("key0", FIRST_KEY),
                secret("key1", SECOND_KEY),
            ),
            filters=("luks,key-secret=key0", "throttle,throttle-group=limits"),
            state=workspace.path / "state.json",
            # Each does what the other has no time for.
            export="writable=on,iothread.0=io0,iothread.1=io1",
        )
        install_root(installer, self.disk, install("stamp", installer, disks, workspace))
        self.disk.unplug()
        self.guest = Guest(
            workspace,
            images,
            accel,
            disks=[self.disk.disk],
            initrd=images.root_initrd,
            append="root=/dev/vda vmtest.shell",
            name="flagship",
        )
        self.key = FIRST_KEY
        self.moments: list[Moment] = []

    def start(self) -> None:
        self.guest.start()
        self.disk = replace(self.disk, guest=self.guest, name="vda", plugged=True)
        assert "/dev/vda / ext4" in self.guest.check("cat /proc/mounts")
        self.guest.check("dmesg -c >/dev/null")
        self._verifier = self.guest.load(
            fio("/verified", "--rw=randwrite --bs=4k --iodepth=8 --size=2M")
        )
        self.stamper = Stamper(self.guest, "/bin/stamp", "/stamps", BLOCKS)
        self.progress = Progress(self.disk, self.stamper)

    # ---- what happens to it

    def command(self, name: str, **arguments: Any) -> Any:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.disk.backend.qmp.command(name, given)

    def snapshot(self) -> None:
        before = self.stamper.counts()
        self.tree.snapshot(self.disk)
        images = [chain[-2] for chain in self.tree.chains]
        self.moments.append(Moment(images, self.key, before, self.stamper.counts()))

    def limit(self, **limits: int) -> None:
        given = {key.replace("_", "-"): value for key, value in limits.items()}
        self.command("qom-set", path="limits", property="limits", value=given)

    def waited(self) -> int:
        """Requests that have had to wait for the limit."""
        (group,) = self.command("query-throttle-groups")
        return sum(direction["waited"] for direction in group["statistics"].values())

    def add_key(self) -> None:
        """From now on another passphrase opens the disk, too."""
        keys = {"key-secret": "key0", "new-secret": "key1"}
        self.disk.backend.qmp.command("luks-key-slot-add", {"node-name": "filter0", **keys})
        self.key = SECOND_KEY

    def restart(self) -> None:
        self.disk.backend.kill()
        self.disk.backend.start()
        wait_until(self.disk.connected, "QEMU to be back", RECONNECT_SECONDS)

    def rot(self, leg: int) -> None:
        """Bytes on disk change: clusters of a leg's newest image, LUKS's header among them."""
        self.guest.check("echo >/flushed && sync")  # what has been written stands in the image, too
        image = self.tree.chains[leg][-1]
        extents = json.loads(qemu_img("map", "-U", "-f", "qcow2", "--output=json", image))
        own = [extent for extent in extents if extent["depth"] == 0 and extent["data"]]
        assert own, f"nothing has been written to {image}"
        with image.open("r+b") as file:
            for extent in own[:ROTTEN_EXTENTS]:
                file.seek(extent["offset"])
                file.write(b"rotten" * (extent["length"] // 6))

    def is_found_out(self, leg: int) -> None:
        """The guest reads everything, and gets what the others have."""
        node = self.tree.top(self.disk, leg)
        self.guest.check("dd if=/dev/vda of=/dev/null bs=1M iflag=direct", 120)
        self.disk.backend.qmp.wait_event(
            "QUORUM_REPORT_BAD", HEAL_SECONDS, where=lambda data: data["node-name"] == node
        )

    def rebuild(self, leg: int) -> None:
        """It goes and comes back as a new leg, which is not believed before all of it is right.

        The backend dies meanwhile, and its successor goes on.
        """
        node = self.tree.top(self.disk, leg)
        (quorum,) = self.command("query-quorum")
        (child,) = (entry["child"] for entry in quorum["legs"] if entry["node-name"] == node)
        self.command("x-blockdev-change", parent="quorum", child=child)
        self.command("x-blockdev-change", parent="quorum", node=node)
        self.restart()
        wait_until(self.in_sync, "the leg to be rebuilt", HEAL_SECONDS, every=0.2)

    def in_sync(self) -> bool:
        (quorum,) = self.command("query-quorum")
        return all(leg["state"] == "in-sync" for leg in quorum["legs"])

    def scrub(self) -> tuple[int, int]:
        """All legs are compared and repaired: bytes that were wrong, bytes that were written."""
        self.command("quorum-scrub", node_name="quorum", job_id="scrub", auto_dismiss=False)
        (job,) = wait_until(self._scrubbed, "the end of the scrub", HEAL_SECONDS, every=0.2)
        assert "error" not in job, job
        self.command("job-dismiss", id="scrub")
        return job["found"], job["repaired"]

    def _scrubbed(self) -> list[dict[str, Any]]:
        jobs = self.command("query-block-jobs")
        return [job for job in jobs if job["device"] == "scrub" and job["status"] == "concluded"]

    # ---- the end

    def finish(self, record_property: object) -> str:
        """The programs verify everything a last time; the disk's contents as the guest sees it."""
        summary = self.stamper.finish(90)
        self._verifier.finish(90)
        report(record_property, "the flagship tree", summary.longest_us, self.tree.pauses)
        assert self.guest.kernel_errors() == []
        self.guest.check("sync && mount -o remount,ro /")
        self.writes = summary.writes
        return self.guest.check("sha256sum /dev/vda", 120).split()[0]

    def judge(self, digest: str) -> None:
        """Everything again with nothing but QEMU's programs."""
        self.tree.check(leaks=True)
        self.tree.compare()
        raw = self._workspace.path / "as-qemu-reads.raw"
        timeline = Timeline(BLOCKS)
        with pytest.raises(AssertionError, match="Invalid password"):
            QemuTree(self.moments[0].images, self.key).convert(raw)
        for moment in self.moments:
            QemuTree(moment.images, moment.key).convert(raw)
            counts = timeline.judge(read_ext4(raw, "/stamps"), moment.images[0].name)
            for count, least, most in zip(counts, moment.before, moment.after, strict=True):
                assert least <= count <= most + 1, f"{moment}: {counts}"
        QemuTree([chain[-1] for chain in self.tree.chains], self.key).convert(raw)
        with raw.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest
        check_ext4(raw)
        assert timeline.judge(read_ext4(raw, "/stamps"), "the end") == self.writes


def install_root(guest: Guest, disk: ServedDisk, program: str) -> None:
    """The tiny guest itself becomes the system on the disk."""
    guest.check(f"mkfs.ext4 -q -E nodiscard {disk.dev} && mount -t ext4 {disk.dev} /mnt")
    guest.check("tar -C / -cf - bin etc lib lib64 | tar -C /mnt -xf -", 120)
    guest.check("cd /mnt && mkdir proc sys dev run tmp mnt root")
    # Where the blocks of this file are is to be found on each snapshot without replaying a journal.
    guest.check(f"dd if=/dev/zero of=/mnt/stamps bs={BLOCK} count={BLOCKS}")
    guest.check(f"cp {program} /mnt/bin/stamp && umount /mnt", 120)


@pytest.mark.timeout(300)
def test_everything_happens_to_a_root_disk(
    guest: Guest,
    disks: DiskServer,
    workspace: Workspace,
    images: GuestImages,
    accel: str,
    record_property: object,
) -> None:
    root = RootDisk(workspace, disks, guest, images, accel)
    try:
        root.start()
        root.progress.wait(200)
        root.snapshot()

        root.limit(iops_total=200)
        waited = root.waited()
        root.progress.wait(200)
        root.snapshot()  # with requests that wait for the limit
        assert root.waited() > waited
        root.limit(iops_total=0)

        root.add_key()
        root.progress.wait(200)
        root.rot(1)
        root.is_found_out(1)
        root.rebuild(1)
        root.progress.wait(200)
        root.snapshot()

        root.progress.wait(200)
        root.rot(2)
        found, repaired = root.scrub()
        assert found and repaired
        assert root.scrub() == (0, 0)
        root.restart()
        root.progress.wait(200)
        digest = root.finish(record_property)
    finally:
        root.guest.close()
    root.disk.backend.terminate()
    root.judge(digest)
    root.disk.backend.start()  # its end is judged with those of the others
