# SPDX-License-Identifier: GPL-2.0-or-later
"""Internal snapshots of qcow2 and power cuts: created, deleted and gone back to, or not, but whole.

See tests/crash.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash import Drive, Stage, newest_tools
from thoroughness import tries

KIB = 1 << 10
MIB = 1 << 20


@dataclass
class Taken:
    """A snapshot, and between which moments a cut must leave it there."""

    name: str
    content: bytes
    since: int
    until: int | None = None


@dataclass
class Snapshots:
    """Those of one image."""

    taken: list[Taken] = field(default_factory=list)

    def expected(self, time: int) -> dict[str, bytes]:
        """What must be there after a cut right after tick `time`."""
        return {
            one.name: one.content
            for one in self.taken
            if one.since <= time and (one.until is None or time < one.until)
        }

    async def create(self, drive: Drive, name: str) -> None:
        content = bytes(drive.history.content)
        await drive.host.backend.internal_snapshot("disk", "create", name)
        # Whatever the guest had written, flushed or not, is durable now.
        with drive.history.during("flush"):
            pass
        self.taken.append(Taken(name, content, drive.history.clock.now))

    async def delete(self, drive: Drive, name: str) -> None:
        one = next(one for one in self.taken if one.name == name and one.until is None)
        one.until = drive.history.clock.tick()
        await drive.host.backend.internal_snapshot("disk", "delete", name)

    async def apply(self, drive: Drive, name: str) -> None:
        one = next(one for one in self.taken if one.name == name and one.until is None)
        with drive.history.during("write", 0, len(one.content), one.content, fua=True):
            await drive.host.backend.internal_snapshot("disk", "apply", name)


CREATE: dict[str, dict[str, Any]] = {
    "4k": {"cluster_size": 4 * KIB},
    "512": {"cluster_size": 512},
    "refcount-2": {"cluster_size": 1 * KIB, "refcount_bits": 2},
    "v2": {"cluster_size": 4 * KIB, "compat": "0.10"},
    "extended": {"cluster_size": 16 * KIB, "extended_l2": "on"},
    "lazy": {"cluster_size": 4 * KIB, "lazy_refcounts": "on"},
}


@pytest.mark.parametrize("kind", CREATE)
def test_power_cuts(tmp_path: Path, kind: str) -> None:
    create = CREATE[kind]
    snapshots = Snapshots()

    async def scenario(drive: Drive) -> None:
        async def work(rounds: int = 2) -> None:
            for _ in range(rounds):
                await drive.batch(10)

        await work()
        await snapshots.create(drive, "a")
        await work()
        await snapshots.create(drive, "b")
        await drive.check()
        await work()
        await snapshots.delete(drive, "a")
        await work()
        await snapshots.apply(drive, "b")
        await drive.check()
        await work()
        await snapshots.create(drive, "c")
        await snapshots.delete(drive, "b")
        await work()

    image = newest_tools().create(tmp_path / "disk.qcow2", MIB, **create)
    made = Stage(image, create["cluster_size"], options={"discard": "unmap"})
    made.snapshots = snapshots.expected
    made.cuts = tries(32)
    made.play(scenario, seed=1)
    listed = newest_tools().img("snapshot", "-l", image)
    assert " c " in listed and " a " not in listed and " b " not in listed
    # And all that was shared is given back in the end.
    newest_tools().img("snapshot", "-d", "c", image)
    found = newest_tools().check(image)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
