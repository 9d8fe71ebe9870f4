# SPDX-License-Identifier: GPL-2.0-or-later
"""Cuts the power at many moments of a recorded scenario and judges what is left.

The judges are qemu-img (no corruption; leaked clusters are allowed), the guest's history against
what QEMU reads, the same against what our own driver reads, and qemu-img once more after our
driver has opened the image for writing, repaired it if need be, and closed it.
"""

from __future__ import annotations

import random
import shutil
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from crash.history import History, WrongContentError
from crash.recording import MODES, Mode, Recording, Survival
from crash.tools import Tools, newest_tools

OpenOurs = Callable[[Path], Awaitable[bytes]]
"""Opens an image for writing with our driver, reads all of it, closes it."""

Snapshots = Callable[[int], dict[str, bytes]]
"""Content of the internal snapshots that must be there after a cut at some tick."""


class BrokenImageError(AssertionError):
    """An image that a cut has left is not what it must be."""


@dataclass
class Report:
    """What the judges have seen."""

    seed: int
    cuts: int = 0
    dirty: int = 0
    leaking: int = 0
    modes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        modes = ", ".join(f"{count} {mode}" for mode, count in self.modes.items())
        return (
            f"seed {self.seed}: {self.cuts} cuts ({modes}), {self.dirty} left a dirty image,"
            f" {self.leaking} leaked clusters"
        )


def is_dirty(image: bytes, format: str) -> bool:
    """Whether the image says that its reference counts (QED: its tables) want a check."""
    if format == "qcow2":  # incompatible feature bit 0 of version 3
        version, features = struct.unpack(">I", image[4:8])[0], image[72:80]
        return version >= 3 and bool(struct.unpack(">Q", features)[0] & 1)
    if format == "qed":  # feature bit 1, QED_F_NEED_CHECK; bit 0 is the backing file
        return bool(struct.unpack("<Q", image[16:24])[0] & 2)
    return False


@dataclass
class PowerCut:
    """One recorded scenario and its judges."""

    recording: Recording
    history: History
    directory: Path
    """For the images; companions are copied into it."""
    image: str
    """Which file of the recording is the image; the others are its data files."""
    format: str = "qcow2"
    companions: tuple[Path, ...] = ()
    """Files that do not change: backing files."""
    open_ours: OpenOurs | None = None
    snapshots: Snapshots | None = None
    tools: Tools = field(default_factory=newest_tools)
    first: int = 1
    """The first tick that may be cut after."""

    async def judge(self, *, seed: int, cuts: int | None) -> Report:
        """Cut `cuts` times; raises BrokenImageError for the first image that is not sound.

        Without a number: not the power is cut but the process killed, at each change of a file.
        """
        rnd = random.Random(seed)
        report = Report(seed)
        self.directory.mkdir(exist_ok=True)
        for companion in self.companions:
            shutil.copy(companion, self.directory / companion.name)
        plan: list[tuple[int, Mode]]
        if cuts is None:
            plan = [(change.begin, "all") for change in self.recording.changes]
        else:
            times = self.recording.times(rnd, cuts, self.first)
            plan = [(time, MODES[number % len(MODES)]) for number, time in enumerate(times)]
        for number, (time, mode) in enumerate(plan):
            report.modes[mode] += 1
            report.cuts += 1
            survival = Survival(mode, rnd)
            for file in self.recording.files:
                image = self.recording.image(file, time, survival)
                (self.directory / file).write_bytes(image)
            try:
                await self._judge_one(time, report)
            except AssertionError as error:
                raise BrokenImageError(
                    f"seed {seed}, cut {number} after tick {time} of {self.recording.clock.now},"
                    f" of what was not flushed: {mode}; the image is {self.directory / self.image}"
                    f"\n{error}\n{self._around(time)}"
                ) from error
        print(report)
        return report

    async def _judge_one(self, time: int, report: Report) -> None:
        image = self.directory / self.image
        dirty = is_dirty(image.read_bytes()[:512], self.format)
        report.dirty += dirty
        if not dirty:
            report.leaking += self._check(image, "after the cut")
        self._content(time, self._read(image), "QEMU reads")
        copy = image.with_name("copy-" + image.name)
        if dirty:
            shutil.copy(image, copy)
            self.tools.check(copy, "-r", "all", format=self.format)
            self._check(copy, "after qemu-img check -r all")
            self._content(time, self._read(copy), "after qemu-img check -r all QEMU reads")
        self._snapshots(time)
        if self.open_ours is not None:
            self._content(time, await self.open_ours(image), "our driver reads")
            if is_dirty(image.read_bytes()[:512], self.format):
                raise WrongContentError("the image is still dirty after our driver had it open")
            self._check(image, "after our driver had it open")
            self._content(time, self._read(image), "after our driver had it open QEMU reads")
            self._snapshots(time)

    def _snapshots(self, time: int) -> None:
        if self.snapshots is None:
            return
        image = self.directory / self.image
        for name, content in self.snapshots(time).items():
            found = self.tools.content(image, self.format, "-l", f"snapshot.name={name}")
            if found != content:
                raise WrongContentError(f"snapshot {name} has changed")

    def _read(self, image: Path) -> bytes:
        return self.tools.content(image, self.format)

    def _check(self, image: Path, when: str) -> bool:
        found = self.tools.check(image, format=self.format)
        if found.corruptions or found.errors:
            lines = [line for line in found.text.splitlines() if not line.startswith("Leaked")]
            raise WrongContentError(f"qemu-img check {when}:\n" + "\n".join(lines[:40]))
        return found.leaks > 0

    def _content(self, time: int, content: bytes, who: str) -> None:
        try:
            self.history.judge(content, time)
        except WrongContentError as error:
            raise WrongContentError(f"{who}: {error}") from None

    def _around(self, time: int) -> str:
        """The changes before and after the cut, for whoever looks for the bug."""
        _, volatile = self.recording.split(self.image, time)
        lines = [
            f"  {'?' if change in volatile else ' '} {change.begin:6}-{change.end or '':<6}"
            f" {change.kind} {change.offset:#x}+{change.length:#x}{' FUA' if change.fua else ''}"
            for change in self.recording.changes
            if change.file == self.image and time - 60 <= change.begin <= time + 10
        ]
        return "file changes around it (?: may be lost):\n" + "\n".join(lines)
