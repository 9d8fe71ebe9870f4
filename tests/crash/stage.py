# SPDX-License-Identifier: GPL-2.0-or-later
"""A format driver on recorded files, a guest at work on it, and the judgement afterwards."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from in_process import Host, with_host
from thoroughness import tries

from crash.drive import Drive, read_all
from crash.history import History
from crash.judge import PowerCut, Report, Snapshots
from crash.recorder import Recorder
from crash.recording import Recording
from crash.tools import Tools, newest_tools

SEED_VARIABLE = "VHOSTBLK_CRASH_SEED"
"""Another seed than a test's own: to look for more, or to see a failure again."""
CUTS = 20


@dataclass
class Stage:
    """An image that a test has made, and how it is going to be served."""

    image: Path
    cluster: int = 4096
    driver: str = "qcow2"
    options: dict[str, Any] = field(default_factory=dict)
    """Options of our driver, with underscores for hyphens."""
    data_file: Path | None = None
    companions: tuple[Path, ...] = ()
    discards_show: bytes | None = None
    cuts: int | None = field(default_factory=lambda: tries(CUTS))
    """None: the process is killed, at each change of a file."""
    snapshots: Snapshots | None = None
    tools: Tools = field(default_factory=newest_tools)
    # Set while the scenario runs.
    recording: Recording = field(default_factory=Recording)
    host: Host | None = None

    def play(self, scenario: Callable[[Drive], Awaitable[None]], seed: int) -> Report:
        """Run a scenario, close the image, and judge the end and many cuts on the way to it."""
        seed = int(os.environ.get(SEED_VARIABLE, seed))
        print(f"{SEED_VARIABLE}={seed}")
        reports: list[Report] = []

        async def run(host: Host) -> None:
            reports.append(await self._play(host, scenario, seed))

        with_host(run, Recorder)
        return reports[0]

    async def _play(
        self, host: Host, scenario: Callable[[Drive], Awaitable[None]], seed: int
    ) -> Report:
        self.host = host
        content = self.tools.content(self.image, self.driver)
        options = {**self.options, "file": await self._recorded(host, "file", self.image)}
        if self.data_file is not None:
            options["data_file"] = await self._recorded(host, "data", self.data_file)
        history = History(self.recording.clock, content)
        drive = Drive(host, "disk", history, random.Random(seed), self.cluster)
        drive.discards_show = self.discards_show
        await host.add(self.driver, "disk", **options)
        await scenario(drive)
        await drive.check()
        await host.backend.blockdev_del("disk")
        found = self.tools.check(self.image, format=self.driver)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
        assert self.tools.content(self.image, self.driver) == history.content
        open_options = {
            key: value for key, value in self.options.items() if key not in ("backing", "data_file")
        }
        return await PowerCut(
            self.recording,
            history,
            self.image.parent / "cut",
            self.image.name,
            self.driver,
            companions=self.companions,
            open_ours=partial(read_all, host, self.driver, **open_options),
            snapshots=self.snapshots,
            tools=self.tools,
        ).judge(seed=seed, cuts=self.cuts)

    async def _recorded(self, host: Host, name: str, path: Path) -> str:
        """A node over one file that records what reaches it."""
        self.recording.add_file(path.name, path.read_bytes())
        record = Recorder.register(self.recording, path.name)
        discard = self.options.get("discard", "ignore")
        await host.add("file", f"{name}-storage", filename=str(path), discard=discard)
        await host.add("recorder", f"{name}-recorder", file=f"{name}-storage", record=record)
        return f"{name}-recorder"
