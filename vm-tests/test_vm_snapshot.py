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
from guest import DiskServer, Guest, Workspace, wait_until
from guest.legs import Legs, Progress, qemu_img, report
from guest.programs import install
from guest.stamps import BLOCK, THREADS, Stamper, Timeline

BLOCKS = 4096  # 16 MiB
SNAPSHOTS = 20


class TestFilters:
    @pytest.mark.timeout(180)
    def test_a_hundred_insertions_and_removals(
        self, guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
    ) -> None:
        disk = disks.add()
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
        disk = disks.add(options=["--state", str(workspace.path / "state.json")])
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
    @pytest.mark.parametrize(
        ("legs", "kills"), [(3, False), (1, True)], ids=["three-legs", "one-leg-killed-between"]
    )
    def test_twenty_snapshots(
        self,
        guest: Guest,
        disks: DiskServer,
        workspace: Workspace,
        record_property: object,
        legs: int,
        kills: bool,
    ) -> None:
        """A filter on top, and snapshots below it; killed, the backend comes back the same."""
        tree = Legs(workspace, legs, BLOCKS)
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
        tree = Legs(workspace, 1, BLOCKS)
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
        tree = Legs(workspace, 1, BLOCKS)
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
