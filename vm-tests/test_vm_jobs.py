# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs that move all of a disk's content while a guest uses it, in backends that are killed.

The disk gets its first key and then another one; or it is copied from what is behind it until it
needs that no more. Each restart goes on by itself, from the state file. In the guest
programs/stamp.c writes and verifies; in the end the content is judged by others than vhostblk.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from guest import DiskServer, Guest, ServedDisk, Workspace, wait_until
from guest.disks import MIB
from guest.legs import SIZE, Legs, Progress, as_qemu_reads, qemu_img, report
from guest.programs import install
from guest.stamps import BLOCK, Stamper, Timeline
from luks_headers import opens, volume_key

BLOCKS = 1024  # that stamp.c writes to: 4 MiB
STAMPED = BLOCKS * BLOCK
SPEED = 4 * MIB
"""Of a job, in bytes per second: slow enough to be killed in the middle."""
KILLS = 3
RECONNECT_SECONDS = 30
JOB_SECONDS = 60
WORDS = "of the first day"
SECTOR = 512
CHEAP = {"pbkdf": "pbkdf2", "pbkdf-force-iterations": 1000}


class JobUnderKills:
    """Watches the one job of a backend, which dies in the middle of it."""

    def __init__(self, disk: ServedDisk, progress: Progress) -> None:
        self._disk = disk
        self._progress = progress

    def _job(self) -> dict[str, Any] | None:
        jobs = self._disk.backend.qmp.command("query-block-jobs")
        return jobs[0] if jobs else None

    def _offset(self) -> int:
        job = self._job()
        assert job is not None, "the job has ended before it could be killed"
        return int(job["offset"])

    def interrupted(self) -> Iterator[None]:
        """The body runs in the middle of the job, and the backend is killed after it."""
        for _ in range(KILLS):
            begin = self._offset()
            wait_until(lambda: self._offset() > begin, "the job to advance", JOB_SECONDS)  # noqa: B023
            yield
            self._progress.wait(20)
            assert self._job() is not None, "the job has ended before it could be killed"
            self._disk.backend.kill()
            self._disk.backend.start()
            wait_until(self._disk.connected, "QEMU to be back", RECONNECT_SECONDS)
            self._progress.wait(20)

    def finish(self) -> None:
        job = self._job()
        if job is not None:
            speed = {"device": job["device"], "speed": 0}
            self._disk.backend.qmp.command("block-job-set-speed", speed)
        wait_until(lambda: self._job() is None, "the end of the job", JOB_SECONDS, every=0.2)


def decrypt(image: Path, key: bytes, length: int) -> bytes:
    """The beginning of a volume without header: aes-xts-plain64, sectors of 512 bytes."""
    data = bytearray()
    with image.open("rb") as file:
        for sector in range(length // SECTOR):
            iv = sector.to_bytes(16, "little")
            cipher = Cipher(algorithms.AES(key), modes.XTS(iv)).decryptor()
            data += cipher.update(file.read(SECTOR)) + cipher.finalize()
    return bytes(data)


@pytest.mark.timeout(240)
def test_the_first_key_and_another_one(
    guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
) -> None:
    """A raw disk in use is encrypted in place, with its header elsewhere, and then once more."""
    header = workspace.path / "header"
    header.touch()
    options = ["--object", f"secret,id=key,data={WORDS}"]
    options += ["--state", str(workspace.path / "state.json")]
    disk = disks.add(32 * MIB, options=options)
    stamper = Stamper(guest, install("stamp", guest, disks, workspace), disk.dev, BLOCKS)
    progress = Progress(disk, stamper)
    progress.wait(200)

    qmp = disk.backend.qmp
    qmp.command("blockdev-add", {"driver": "file", "node-name": "header", "filename": str(header)})
    luks = {"driver": "luks", "header": "header", "key-secret": "key"}
    in_place = {**CHEAP, "version": "luks2", "in-place": True, "file": disk.node, "size": 32 * MIB}
    qmp.command("blockdev-create", {"job-id": "make", "options": {**luks, **in_place}})

    def made() -> bool:
        [job] = qmp.command("query-jobs")
        assert "error" not in job, job
        return bool(job["status"] == "concluded")

    wait_until(made, "the header", JOB_SECONDS)
    qmp.command("job-dismiss", {"id": "make"})
    filter = {**luks, "node-name": "crypt"}
    qmp.command("block-filter-insert", {"export-id": disk.disk.id, "filter": filter})
    keys = []
    again = {"node-name": "crypt", "speed": SPEED, **CHEAP}
    for _ in ("the first", "another"):
        disk.backend.qmp.command("luks-reencrypt", again)
        job = JobUnderKills(disk, progress)
        for _ in job.interrupted():
            pass
        job.finish()
        copy = Path(shutil.copy(header, workspace.path / "copy-of-header"))  # it is in use
        assert opens(copy, WORDS.encode())
        keys.append(volume_key(copy, WORDS.encode(), workspace.path / "volume-key"))
    assert keys[0] != keys[1]
    progress.wait(100)

    summary = stamper.finish(90)
    report(record_property, "two re-encryptions and six kills", summary.longest_us, [])
    disk.unplug()
    disk.backend.terminate()
    content = decrypt(disk.image, keys[1], STAMPED)
    assert Timeline(BLOCKS).judge(content, "the disk") == summary.writes
    disk.backend.start()


def forget_all_but_tops(disk: ServedDisk, tree: Legs) -> None:
    """Nodes of images that are behind nothing any more stay until they are deleted by name."""
    qmp = disk.backend.qmp
    nodes = qmp.command("query-named-block-nodes")
    names = {node["file"]: node["node-name"] for node in nodes if node["drv"] == "qcow2"}
    for number, chain in enumerate(tree.chains):
        for image in reversed(chain[:-1]):
            qmp.command("blockdev-del", {"node-name": names.pop(str(image))})
        qmp.command("blockdev-del", {"node-name": f"storage{number}"})
    assert names.keys() == {str(chain[-1]) for chain in tree.chains}


@pytest.mark.timeout(240)
def test_a_disk_gets_independent_of_what_is_behind_it(
    guest: Guest, disks: DiskServer, workspace: Workspace, record_property: object
) -> None:
    """copy-on-read, then block-stream with snapshots and kills; at the end the base may go."""
    origin = workspace.image("origin.raw", SIZE)
    with origin.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(random.Random(1).randbytes(SIZE // 4))
    tree = Legs(workspace, 2, BLOCKS, content=origin)
    disk = tree.serve(disks, state=workspace.path / "state.json")
    stamper = Stamper(guest, install("stamp", guest, disks, workspace), disk.dev, BLOCKS)
    progress = Progress(disk, stamper)
    progress.wait(400)
    tree.snapshot(disk)

    # What is read is in the overlays from then on.
    filter = {"driver": "copy-on-read", "node-name": "copying"}
    disk.backend.qmp.command("block-filter-insert", {"export-id": disk.disk.id, "filter": filter})
    begin, length = SIZE // 2, 4 * MIB
    window = {"offset": begin, "length": length}
    guest.check(f"dd if={disk.dev} of=/dev/null bs=1M iflag=direct skip={begin // MIB} count=4")
    for leg in range(len(tree.chains)):
        place = {"device": tree.top(disk, leg), **window}
        extents = disk.backend.qmp.command("block-image-map", place)["extents"]
        assert sum(e["length"] for e in extents if e["depth"] == 0) == length, extents
    progress.wait(100)
    disk.backend.qmp.command("block-filter-remove", {"node-name": "copying"})

    streaming = {"device": disk.disk.id, "job-id": "stream", "speed": SPEED}
    disk.backend.qmp.command("block-stream", streaming)
    job = JobUnderKills(disk, progress)
    for _ in job.interrupted():
        tree.snapshot(disk)
    job.finish()
    forget_all_but_tops(disk, tree)
    for chain in tree.chains:
        (*behind, last) = chain
        assert "backing-filename" not in json.loads(qemu_img("info", "-U", "--output=json", last))
        for image in behind:
            image.unlink()
        del chain[:-1]
    progress.wait(100)

    everything = (
        f"dd if={disk.dev} bs=1M iflag=direct skip={STAMPED // MIB} 2>/dev/null | sha256sum"
    )
    with origin.open("rb") as file:
        file.seek(STAMPED)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert guest.check(everything, 90).split()[0] == digest
    summary = stamper.finish(90)
    report(record_property, "a stream and three kills", summary.longest_us, tree.pauses)
    disk.unplug()
    disk.backend.terminate()
    tree.judge(summary.writes, leaks=True)
    tree.compare()
    with origin.open("rb") as file:
        for (image,) in tree.chains:
            file.seek(STAMPED)
            assert as_qemu_reads(image, "qcow2", SIZE)[STAMPED:] == file.read(), image
    disk.backend.start()
