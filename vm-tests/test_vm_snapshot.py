# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree changes under a guest that writes and verifies: filters, snapshots, restarts.

The guest runs programs/stamp.c, whose stamps tell of any content of the disk whether it is that of
one moment. Snapshots are judged through QEMU's own tools.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from guest import DiskServer, Guest, ServedDisk, Workspace, wait_until
from guest.disks import MIB
from guest.programs import install
from guest.stamps import BLOCK, THREADS, Stamper, Timeline

BLOCKS = 4096  # 16 MiB
SIZE = 64 * MIB
SNAPSHOTS = 20
LEAKS = 3  # of `qemu-img check`: clusters that nobody uses, and nothing worse


def qemu_img(*arguments: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in ok, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def as_qemu_reads(image: Path, format: str) -> bytes:
    """The part of an image (and of what is below it) that the program uses."""
    raw = image.with_name("as-qemu-reads.raw")
    qemu_img("convert", "-f", format, "-O", "raw", image, raw)
    with raw.open("rb") as file:
        content = file.read(BLOCKS * BLOCK)
    raw.unlink()
    return content


def report(record_property: object, what: str, stamper_longest_us: int, pauses: list[int]) -> None:
    """What an operator wants to know; shown with -s, and kept in the report of the run."""
    text = f"{what}: longest stall of the guest {stamper_longest_us / 1000:.1f} ms"
    if pauses:
        text += f", longest pause {max(pauses) / 1000:.1f} ms of {len(pauses)}"
    print(text)
    assert callable(record_property)
    record_property("stall", text)


class Progress:
    """Waits until the guest has written more: things must happen between its writes."""

    def __init__(self, disk: ServedDisk, stamper: Stamper) -> None:
        self._disk = disk
        self._stamper = stamper

    def wait(self, writes: int) -> None:
        goal = self._disk.writes() + writes

        def more() -> bool:
            self._stamper.check_running()
            return self._disk.writes() >= goal

        wait_until(more, f"{writes} more writes", 40, every=0.1)


class Legs:
    """The chains of images under a drive: one, or one for each leg of a quorum."""

    def __init__(self, workspace: Workspace, count: int) -> None:
        self.chains = [[workspace.path / f"base{number}.qcow2"] for number in range(count)]
        for (image,) in self.chains:
            qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
        self.pauses: list[int] = []

    def serve(
        self, disks: DiskServer, *, filters: tuple[str, ...] = (), state: Path | None = None
    ) -> ServedDisk:
        """All of them under filters."""
        arguments: list[str] = []
        top = "leg0"
        for number, (image,) in enumerate(self.chains):
            file = f"driver=file,node-name=storage{number},filename={image}"
            arguments += ["--blockdev", file]
            format = f"driver=qcow2,node-name=leg{number},file=storage{number}"
            arguments += ["--blockdev", format]
        if len(self.chains) > 1:
            legs = "".join(f",children.{n}=leg{n}" for n in range(len(self.chains)))
            arguments += ["--blockdev", f"driver=quorum,node-name=quorum,vote-threshold=2{legs}"]
            top = "quorum"
        for number, text in enumerate(filters):
            arguments += ["--blockdev", f"{text},node-name=filter{number},file={top}"]
            top = f"filter{number}"
        if state is not None:
            arguments += ["--state", str(state)]
        return disks.serve("drive", self.chains[0][0], "leg0", top, arguments)

    def snapshot(self, disk: ServedDisk) -> None:
        """Of the drive: all legs at once, below the filters."""
        number = len(self.chains[0])
        template = "{directory}/" + f"overlay{number}" + ".{node}.{format}"
        result = disk.backend.qmp.command(
            "blockdev-snapshot-sync",
            {"device": disk.disk.id, "snapshot-file-template": template},
        )
        self.pauses.append(result["pause-us"])
        assert len(result["snapshots"]) == len(self.chains)
        for chain, taken in zip(self.chains, result["snapshots"], strict=True):
            chain.append(Path(taken["filename"]))

    def judge(self, writes: list[int], *, leaks: bool) -> None:
        """Every image is as it was when the next one covered it, and the last as it is now.

        A killed backend may have left clusters that nobody uses.
        """
        timelines = [Timeline(BLOCKS) for _ in self.chains]
        for images in zip(*self.chains, strict=True):
            moments = []
            for image, timeline in zip(images, timelines, strict=True):
                qemu_img("check", "-f", "qcow2", image, ok=(0, LEAKS) if leaks else (0,))
                moments.append(timeline.judge(as_qemu_reads(image, "qcow2"), image.name))
            assert all(moment == moments[0] for moment in moments), (
                f"the legs of one snapshot are of different moments: {images[0].name} {moments}"
            )
        assert moments[0] == writes, "the last image is not what the guest has written"


class TestFilters:
    @pytest.mark.timeout(180)
    def test_a_hundred_insertions_and_removals(
        self, guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
    ) -> None:
        disk = disks.add(SIZE)
        program = install("stamp", guest, disks, workspace)
        stamper = Stamper(guest, program, disk.dev, BLOCKS)
        progress = Progress(disk, stamper)
        qmp = disk.backend.qmp
        pauses = []
        for number in range(100):
            name = f"inserted{number}"
            options = {"driver": "delay", "node-name": name, "write-ns": 100000}
            place = {"above": disk.node} if number % 2 else {"export-id": disk.disk.id}
            result = qmp.command("block-filter-insert", {"filter": options, **place})
            pauses.append(result["pause-us"])
            if number % 10 == 0:
                progress.wait(200)
            result = qmp.command("block-filter-remove", {"node-name": name})
            pauses.append(result["pause-us"])
            if number % 10 == 5:
                progress.wait(200)
        summary = stamper.finish()
        report(record_property, "100 filters", summary.longest_us, pauses)
        disk.unplug()
        content = disk.image.read_bytes()[: BLOCKS * BLOCK]
        assert Timeline(BLOCKS).judge(content, "the disk") == summary.writes

    @pytest.mark.timeout(180)
    def test_killed_between_insertions(
        self, guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
    ) -> None:
        """A state file brings the tree back as it was last changed."""
        disk = disks.add(SIZE, options=["--state", str(workspace.path / "state.json")])
        stamper = Stamper(guest, install("stamp", guest, disks, workspace), disk.dev, BLOCKS)
        progress = Progress(disk, stamper)
        names = [f"delay{number}" for number in range(8)]
        for turn, name in enumerate(names):
            options = {"driver": "delay", "node-name": name, "write-ns": 100000}
            disk.backend.qmp.command(
                "block-filter-insert", {"filter": options, "export-id": disk.disk.id}
            )
            progress.wait(100)
            disk.backend.kill()
            disk.backend.start()
            assert disk.backend.export(disk.disk.id)["node-name"] == name
            progress.wait(100)
            if turn % 2:
                for gone in names[turn - 1 : turn + 1]:
                    disk.backend.qmp.command("block-filter-remove", {"node-name": gone})
        summary = stamper.finish(90)
        report(record_property, "filters and kills", summary.longest_us, [])
        disk.unplug()
        content = disk.image.read_bytes()[: BLOCKS * BLOCK]
        assert Timeline(BLOCKS).judge(content, "the disk") == summary.writes


class TestSnapshots:
    @pytest.mark.timeout(240)
    @pytest.mark.parametrize("legs", [1, 3])
    @pytest.mark.parametrize("kills", [False, True], ids=["running", "killed-between"])
    def test_twenty_snapshots(
        self,
        guest: Guest,
        disks: DiskServer,
        workspace: Workspace,
        record_property: object,
        kills: bool,
        legs: int,
    ) -> None:
        """A filter on top, and snapshots below it; killed, the backend comes back the same."""
        tree = Legs(workspace, legs)
        delay = "driver=delay,write-ns=50000"
        disk = tree.serve(disks, filters=(delay,), state=workspace.path / "state.json")
        stamper = Stamper(guest, install("stamp", guest, disks, workspace), disk.dev, BLOCKS)
        progress = Progress(disk, stamper)
        for number in range(SNAPSHOTS):
            progress.wait(200)
            tree.snapshot(disk)
            if kills and number % 4 == 3:
                progress.wait(100)
                disk.backend.kill()
                disk.backend.start()
        progress.wait(300)
        summary = stamper.finish(90)
        report(record_property, "20 snapshots", summary.longest_us, tree.pauses)
        export = disk.backend.export(disk.disk.id)
        assert export["node-name"] == "filter0", "the filter is not on top any more"
        disk.unplug()
        disk.backend.terminate()
        tree.judge(summary.writes, leaks=kills)
        disk.backend.start()

    @pytest.mark.timeout(240)
    def test_filters_and_snapshots_and_kills_together(
        self, guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
    ) -> None:
        tree = Legs(workspace, 1)
        disk = tree.serve(disks, state=workspace.path / "state.json")
        stamper = Stamper(guest, install("stamp", guest, disks, workspace), disk.dev, BLOCKS)
        progress = Progress(disk, stamper)
        for number in range(6):
            options = {"driver": "delay", "node-name": f"delay{number}", "write-ns": 100000}
            disk.backend.qmp.command(
                "block-filter-insert", {"filter": options, "export-id": disk.disk.id}
            )
            progress.wait(200)
            disk.backend.kill()
            disk.backend.start()
            progress.wait(200)
            tree.snapshot(disk)
            if number % 2:
                disk.backend.kill()
                disk.backend.start()
            disk.backend.qmp.command("block-filter-remove", {"node-name": f"delay{number}"})
        progress.wait(300)
        summary = stamper.finish(90)
        report(record_property, "filters, snapshots, kills", summary.longest_us, tree.pauses)
        disk.unplug()
        disk.backend.terminate()
        tree.judge(summary.writes, leaks=True)
        disk.backend.start()

    @pytest.mark.timeout(180)
    def test_read_only_through_qemu_nbd(
        self, guest: Guest, disks: DiskServer, workspace: Workspace
    ) -> None:
        """Snapshots are read by QEMU's server while the guest goes on writing above them."""
        tree = Legs(workspace, 1)
        disk = tree.serve(disks)
        stamper = Stamper(guest, install("stamp", guest, disks, workspace), disk.dev, BLOCKS)
        progress = Progress(disk, stamper)
        timeline = Timeline(BLOCKS)
        for _ in range(3):
            progress.wait(400)
            tree.snapshot(disk)
            covered = tree.chains[0][-2]
            timeline.judge(self._through_nbd(covered, workspace), covered.name)
        stamper.finish()

    def _through_nbd(self, image: Path, workspace: Workspace) -> bytes:
        socket = workspace.path / "nbd.sock"
        socket.unlink(missing_ok=True)
        with (workspace.path / "nbd.log").open("ab") as log:
            server = subprocess.Popen(
                ["qemu-nbd", "--read-only", "--socket", str(socket), "-f", "qcow2", str(image)],
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(socket.exists, "qemu-nbd", 20)
            raw = workspace.path / "nbd.raw"
            qemu_img("convert", "-f", "raw", "-O", "raw", f"nbd+unix:///?socket={socket}", raw)
            with raw.open("rb") as file:
                return file.read(BLOCKS * BLOCK)
        finally:
            server.terminate()
            server.wait(20)


def test_the_judge_notices(tmp_path: Path) -> None:
    """Stamps by hand: one moment passes, a lost, an old and a foreign write do not."""
    from guest.stamps import MAGIC, UNIT, NotOneMomentError, place

    each = 64

    def disk(counts: list[int], skip: tuple[int, int] | None = None) -> bytes:
        content = bytearray(THREADS * each * BLOCK)
        for thread, sequence in itertools.product(range(THREADS), range(1, max(counts) + 1)):
            if sequence > counts[thread] or (thread, sequence) == skip:
                continue
            block = place(thread, sequence, each) * THREADS + thread
            seen = [sequence - 1] * THREADS  # as if all wrote at one pace
            unit = UNIT.pack(MAGIC, thread, sequence, block, *seen, 0, 0, 0, 0)
            content[block * BLOCK : (block + 1) * BLOCK] = unit * (BLOCK // UNIT.size)
        return bytes(content)

    def judge(content: bytes) -> list[int]:
        return Timeline(THREADS * each).judge(content, "disk")

    assert judge(disk([50] * THREADS)) == [50] * THREADS
    with pytest.raises(NotOneMomentError, match="thread 3"):
        judge(disk([50] * THREADS, skip=(3, 49)))
    with pytest.raises(NotOneMomentError, match="others saw 49"):
        judge(disk([50] * 7 + [40]))
    torn = bytearray(disk([50] * THREADS))
    block = place(0, 50, each) * THREADS
    torn[block * BLOCK + 512 : block * BLOCK + 1024] = bytes(512)
    with pytest.raises(NotOneMomentError, match=f"block {block} is torn"):
        judge(bytes(torn))
    timeline = Timeline(THREADS * each)
    timeline.judge(disk([50] * THREADS), "later")
    with pytest.raises(NotOneMomentError, match="were there before"):
        timeline.judge(disk([49] * THREADS), "earlier")
