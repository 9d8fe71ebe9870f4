# SPDX-License-Identifier: GPL-2.0-or-later
"""Drives on one leg or on several, snapshots of them, and QEMU's tools to judge these."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

from .disks import MIB, DiskServer, ServedDisk
from .process import wait_until
from .stamps import BLOCK, Stamper, Timeline
from .workspace import Workspace

SIZE = 64 * MIB
LEAKS = 3  # of `qemu-img check`: clusters that nobody uses, and nothing worse


def qemu_img(*arguments: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in ok, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def as_qemu_reads(image: Path, format: str, length: int) -> bytes:
    """The first bytes of an image, and of what is below it."""
    raw = image.with_name("as-qemu-reads.raw")
    qemu_img("convert", "-f", format, "-O", "raw", image, raw)
    with raw.open("rb") as file:
        content = file.read(length)
    raw.unlink()
    return content


def report(record_property: object, what: str, stamper_longest_us: int, pauses: list[int]) -> None:
    """What an operator wants to know; the run shows it at its end."""
    text = f"{what}: longest stall of the guest {stamper_longest_us / 1000:.1f} ms"
    if pauses:
        text += f", longest pause {max(pauses) / 1000:.1f} ms of {len(pauses)}"
    assert callable(record_property)
    record_property("stall", text)


class Progress:
    """Waits until the guest has written more: things must happen between its writes."""

    def __init__(self, disk: ServedDisk, *stampers: Stamper) -> None:
        self._disk = disk
        self._stampers = stampers

    def wait(self, writes: int) -> None:
        goal = self._disk.writes() + writes

        def more() -> bool:
            if self._disk.writes() >= goal:
                return True
            for stamper in self._stampers:
                stamper.check_running()
            return False

        wait_until(more, f"{writes} more writes", 40, every=0.1)


class Legs:
    """The chains of images under a drive: one, or one for each leg of a quorum.

    Their first `blocks` blocks are what programs/stamp.c writes to.
    """

    def __init__(
        self, workspace: Workspace, count: int, blocks: int = 0, content: Path | None = None
    ) -> None:
        """Empty images, or all with the same `content`, a raw image."""
        self._blocks = blocks
        self._numbers = itertools.count(1)
        self._name = ""
        self.chains = [[workspace.path / f"base{number}.qcow2"] for number in range(count)]
        for (image,) in self.chains:
            if content is None:
                qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
            else:
                qemu_img("convert", "-f", "raw", "-O", "qcow2", content, image)
        self.pauses: list[int] = []

    def serve(
        self,
        disks: DiskServer,
        *,
        objects: tuple[str, ...] = (),
        quorum: str = "vote-threshold=2",
        filters: tuple[str, ...] = (),
        state: Path | None = None,
        export: str = "writable=on",
    ) -> ServedDisk:
        """All of them under a quorum, if they are several, and filters, the lowest first."""
        arguments: list[str] = []
        for text in objects:
            arguments += ["--object", text]
        top = "leg0"
        for number, (image,) in enumerate(self.chains):
            file = f"driver=file,node-name=storage{number},filename={image}"
            arguments += ["--blockdev", file]
            format = f"driver=qcow2,node-name=leg{number},file=storage{number}"
            arguments += ["--blockdev", format]
        if len(self.chains) > 1:
            legs = "".join(f",children.{n}=leg{n}" for n in range(len(self.chains)))
            arguments += ["--blockdev", f"driver=quorum,node-name=quorum,{quorum}{legs}"]
            top = "quorum"
        for number, text in enumerate(filters):
            arguments += ["--blockdev", f"{text},node-name=filter{number},file={top}"]
            top = f"filter{number}"
        if state is not None:
            arguments += ["--state", str(state)]
        return disks.serve("drive", self.chains[0][0], "leg0", top, arguments, export)

    def snapshot(self, disk: ServedDisk, **options: Any) -> dict[str, Any]:
        """Of the drive: all legs at once, below the filters; the command's result."""
        name = self._name = f"overlay{next(self._numbers)}"
        result: dict[str, Any] = disk.backend.qmp.command(
            "blockdev-snapshot-sync",
            {
                "device": disk.disk.id,
                "snapshot-file-template": f"{{directory}}/{name}.{{node}}.{{format}}",
                **options,
            },
        )
        self.pauses.append(result["pause-us"])
        assert len(result["snapshots"]) == len(self.chains)
        # In whatever order: a leg that was taken out and put back is the last one.
        taken = {image.name: image for image in (Path(t["filename"]) for t in result["snapshots"])}
        for number, chain in enumerate(self.chains):
            chain.append(taken[f"{name}.leg{number}.qcow2"])
        return result

    def top(self, disk: ServedDisk, leg: int) -> str:
        """The node of a leg's newest image."""
        image = str(self.chains[leg][-1])
        nodes = disk.backend.qmp.command("query-named-block-nodes")
        (name,) = (n["node-name"] for n in nodes if n["drv"] == "qcow2" and n["file"] == image)
        return str(name)

    def adopt(self, disk: ServedDisk) -> bool:
        """The last snapshot had no answer: whether it has taken place, on all legs."""
        images = [c[0].with_name(f"{self._name}.leg{n}.qcow2") for n, c in enumerate(self.chains)]
        nodes = disk.backend.qmp.command("query-named-block-nodes")
        present = {str(image) for image in images} & {node["file"] for node in nodes}
        assert len(present) in (0, len(images)), f"some legs only: {present}"
        if present:
            for chain, image in zip(self.chains, images, strict=True):
                chain.append(image)
        return bool(present)

    def check(self, *, leaks: bool) -> None:
        """Nothing in any image is corrupt; a killed backend may leave clusters nobody uses."""
        for chain in self.chains:
            for image in chain:
                qemu_img("check", "-f", "qcow2", image, ok=(0, LEAKS) if leaks else (0,))

    def compare(self) -> None:
        """At each moment all legs are the same."""
        for first, *others in zip(*self.chains, strict=True):
            for other in others:
                qemu_img("compare", "-f", "qcow2", "-F", "qcow2", first, other)

    def judge(self, writes: list[int], *, leaks: bool) -> None:
        """Every image is as it was when the next one covered it, and the last as it is now."""
        self.check(leaks=leaks)
        timelines = [Timeline(self._blocks) for _ in self.chains]
        for images in zip(*self.chains, strict=True):
            moments = []
            for image, timeline in zip(images, timelines, strict=True):
                moments.append(
                    timeline.judge(as_qemu_reads(image, "qcow2", self._blocks * BLOCK), image.name)
                )
            assert all(moment == moments[0] for moment in moments), (
                f"the legs of one snapshot are of different moments: {images[0].name} {moments}"
            )
        assert moments[0] == writes, "the last image is not what the guest has written"
