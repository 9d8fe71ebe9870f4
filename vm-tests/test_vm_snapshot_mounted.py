# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots of a mounted file system, which QEMU's own block layer gives back to the guest.

Two programs write all the time: one changes blocks of a file in place, the other replaces files
by renaming (programs/stamp.c). When all is over the guest gets every snapshot as a disk of
QEMU's own, mounts it read-only and packs what it finds into an archive, which is judged here.
"""

from __future__ import annotations

import itertools
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guest import DiskServer, Guest, QmpError, ServedDisk, Workspace, wait_until
from guest.disks import MIB
from guest.legs import Legs, Progress, qemu_img, report
from guest.programs import install
from guest.stamps import BLOCK, Stamper, Summary, Timeline

BLOCKS = 1024  # of the file that is changed in place: 4 MiB
FILES = 512
SNAPSHOTS = 20
FILTERS = 100
FREEZE_SECONDS = 30
RECONNECT_SECONDS = 30
THAW_SECONDS = 60


@dataclass
class Moment:
    """What was known when a snapshot was taken."""

    image: Path
    """The covered one, of one of the legs."""
    frozen: bool
    copy: Path
    """What QEMU read from it at once."""
    before: list[list[int]]
    """Of each program, how many writes of each thread had completed before the snapshot began."""
    after: list[list[int]]
    """The same when it had been taken."""


class Files:
    """A file system on a drive, and the programs that write to it."""

    def __init__(
        self, guest: Guest, disks: DiskServer, workspace: Workspace, disk: ServedDisk
    ) -> None:
        self._guest = guest
        self._disk = disk
        program = install("stamp", guest, disks, workspace)
        guest.check(f"mkfs.ext4 -q {disk.dev} && mount -t ext4 {disk.dev} /mnt")
        guest.check(
            f"mkdir /mnt/files && dd if=/dev/zero of=/mnt/data bs={BLOCK} count={BLOCKS} && sync"
        )
        self.stampers = [
            Stamper(guest, program, "/mnt/data", BLOCKS),
            Stamper(guest, program, "/mnt/files", FILES),
        ]
        self.progress = Progress(disk, *self.stampers)

    def counts(self) -> list[list[int]]:
        return [stamper.counts() for stamper in self.stampers]

    def finish(self) -> list[Summary]:
        """End the programs, which verify all they have written, and unmount."""
        summaries = [stamper.finish(90) for stamper in self.stampers]
        self._guest.check("umount /mnt")
        return summaries


class Judge:
    """Compares what is on snapshots with what the programs say they wrote."""

    def __init__(self, guest: Guest, workspace: Workspace) -> None:
        self._guest = guest
        self._workspace = workspace
        self._timelines = [Timeline(BLOCKS), Timeline(FILES)]
        self._archive = workspace.image("archive", 32 * MIB)

    def judge(self, moments: list[Moment]) -> None:
        """One after the other, in the order in which they were taken."""
        archive = {"driver": "raw", "file": {"driver": "file", "filename": str(self._archive)}}
        with self._guest.qemu_drive(archive) as target:
            for moment in moments:
                with self._guest.qemu_drive(self._options(moment)) as source:
                    self._pack(source, target, moment)
                self._judge(moment)
                qemu_img("compare", "-f", "qcow2", "-F", "raw", moment.image, moment.copy)

    def _options(self, moment: Moment) -> dict[str, Any]:
        """The snapshot itself, read-only, if the guest was frozen.

        Else its journal is to be replayed, which cannot be done on a read-only disk; so on top of
        it there is an overlay that qemu-img makes.
        """
        image = moment.image
        if not moment.frozen:
            image = self._workspace.path / f"replay-{moment.image.name}"
            qemu_img("create", "-q", "-f", "qcow2", "-b", moment.image, "-F", "qcow2", image)
        file = {"driver": "file", "filename": str(image)}
        return {"driver": "qcow2", "read-only": moment.frozen, "file": file}

    def _pack(self, source: str, target: str, moment: Moment) -> None:
        state = self._guest.check(f"dumpe2fs -h {source} 2>/dev/null")
        assert ("needs_recovery" in state) != moment.frozen, f"{moment}: {state}"
        if moment.frozen:
            assert self._guest.check(f"cat /sys/block/{source[5:]}/ro") == "1"
            self._guest.check(f"e2fsck -fn {source}")
        self._guest.check(f"mount -t ext4 -o ro {source} /mnt")
        self._guest.check(f"tar -C /mnt -cf - data files | dd of={target} bs=1M conv=fsync")
        self._guest.check("umount /mnt")
        if not moment.frozen:  # its journal has been replayed
            self._guest.check(f"e2fsck -fn {source}")

    def _judge(self, moment: Moment) -> None:
        contents = [bytearray(BLOCKS * BLOCK), bytearray(FILES * BLOCK)]
        with tarfile.open(self._archive, "r:") as archive:
            for member in archive:
                if not member.isfile() or member.name.startswith("files/new"):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                if member.name == "data":
                    contents[0][:] = file.read()
                else:
                    start = int(member.name.removeprefix("files/")) * BLOCK
                    contents[1][start : start + BLOCK] = file.read()
        for timeline, content, before, after in zip(
            self._timelines, contents, moment.before, moment.after, strict=True
        ):
            counts = timeline.judge(bytes(content), moment.image.name)
            for count, least, most in zip(counts, before, after, strict=True):
                assert least <= count <= most + 1, (
                    f"{moment.image.name} has {counts} writes; {before} had completed before it"
                    f" was taken, and {after} afterwards"
                )


class Story:
    """Filters, snapshots and kills while the programs write."""

    def __init__(self, guest: Guest, disks: DiskServer, workspace: Workspace, legs: int) -> None:
        self._guest = guest
        self._workspace = workspace
        self.tree = Legs(workspace, legs)
        self.disk = self.tree.serve(disks, state=workspace.path / "state.json")
        self.files = Files(guest, disks, workspace, self.disk)
        self.moments: list[Moment] = []
        self.frozen_us: list[int] = []
        self._filters = itertools.count()
        guest.start_agent()

    def filters(self, count: int) -> None:
        """Put a filter above the drive's tree, or directly above one leg, and take it out again."""
        qmp = self.disk.backend.qmp
        for _ in range(count):
            number = next(self._filters)
            name = f"filter{number}"
            leg = number % len(self.tree.chains)
            top = self.tree.top(self.disk, leg)
            place = {"above": top} if number % 2 else {"export-id": self.disk.disk.id}
            options = {"driver": "delay", "node-name": name, "write-ns": 100000}
            qmp.command("block-filter-insert", {"filter": options, **place})
            qmp.command("block-filter-remove", {"node-name": name})

    def snapshot(self, *, frozen: bool) -> None:
        options = {}
        if frozen:
            options = {"guest-agent": str(self._guest.agent), "freeze-timeout": FREEZE_SECONDS}
        before = self.files.counts()
        result = self.tree.snapshot(self.disk, **options)
        if frozen:
            self.frozen_us.append(result["freeze"]["frozen-us"])
        self.note(before, self.files.counts(), frozen=frozen)

    def killed_in_a_snapshot(self, fault: str) -> None:
        """A process dies with the guest frozen; the next one has to thaw it."""
        backend = self.disk.backend
        backend.kill()
        backend.start(fault=fault)
        wait_until(self.disk.connected, "QEMU to be back", RECONNECT_SECONDS)
        before = self.files.counts()
        with pytest.raises(QmpError, match="hung up"):
            self.snapshot(frozen=True)
        backend.wait_killed()
        after = self.files.counts()
        thawed = self._guest.spawn("echo thawed >/mnt/thawed && sync")
        backend.start()
        thawed.check(THAW_SECONDS)
        if self.tree.adopt(self.disk):
            self.note(before, after, frozen=True)

    def note(self, before: list[list[int]], after: list[list[int]], *, frozen: bool) -> None:
        """The images that have just been covered are of this moment."""
        number = len(self.moments)
        image = self.tree.chains[number % len(self.tree.chains)][-2]
        copy = self._workspace.path / f"moment{number}.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", image, copy)
        self.moments.append(Moment(image, frozen, copy, before, after))

    def restart(self) -> None:
        """kill -9 and a new process."""
        self.disk.backend.kill()
        self.disk.backend.start()

    def end(self, record_property: object, what: str, *, leaks: bool) -> None:
        """Everything is verified: by the programs, by QEMU's tools, by mounting."""
        summaries = self.files.finish()
        longest = max(summary.longest_us for summary in summaries)
        freeze = f" ({max(self.frozen_us) / 1000:.1f} ms frozen)" if self.frozen_us else ""
        report(record_property, f"{what}{freeze}", longest, self.tree.pauses)
        self.disk.unplug()
        self.disk.backend.terminate()
        self.tree.check(leaks=leaks)
        self.tree.compare()
        Judge(self._guest, self._workspace).judge(self.moments)
        self.disk.backend.start()


@pytest.mark.timeout(300)
def test_every_snapshot_is_of_its_moment(
    guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
) -> None:
    """A quorum of three legs; filters above it and under it, kills in between."""
    story = Story(guest, disks, workspace, 3)
    for number in range(SNAPSHOTS):
        story.files.progress.wait(100)
        story.filters(FILTERS // SNAPSHOTS)
        story.snapshot(frozen=number % 2 == 0)
        if number % 4 == 3:
            story.files.progress.wait(50)
            story.restart()
    story.files.progress.wait(100)
    story.end(record_property, "mounted snapshots, filters and kills", leaks=True)


@pytest.mark.timeout(180)
def test_killed_while_the_guest_is_frozen(
    guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
) -> None:
    """The next process finds in the state file that it has to thaw it, and the guest goes on."""
    story = Story(guest, disks, workspace, 1)
    for fault in ("snapshot-frozen", "snapshot-paused", "state-renamed:2"):
        story.files.progress.wait(100)
        story.killed_in_a_snapshot(fault)
    assert len(story.moments) == 2, "what is in the pause was recorded before, and the last one"
    story.files.progress.wait(100)
    story.snapshot(frozen=True)
    story.files.progress.wait(100)
    story.end(record_property, "killed while the guest was frozen", leaks=True)
