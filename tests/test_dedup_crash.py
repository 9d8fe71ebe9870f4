# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup and power cuts: any part of what was not flushed may be lost, on either device.

As in tests/crash, the data device is a recorded file, cut at many moments. Here the metadata are
recorded against the same clock: the journal's files, of whose unsynced frames any sectors may be
lost, and their names until the directory has been synced; and the database, which after a cut is as
its last durable transaction left it (one that is being committed may be there or not;
tests/test_tree.py cuts those). Whatever is left must open, show what the guest's history allows,
and be sound down to the content of each stored block. And the power may go once more while that is
being repaired.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash import Drive, History, Recording
from crash.recorder import Recorder
from crash.recording import MODES, Change, Mode, Survival
from crash.stage import SEED_VARIABLE
from dedup_lab import BLOCK, SEGMENT, contents, create, rebuilt
from in_process import MIB, Host, with_host
from thoroughness import tries

from vhostblk.dedup import journal as journal_module
from vhostblk.dedup import store as store_module
from vhostblk.dedup.journal import Journal, sync_directory
from vhostblk.dedup.space import NoSpace
from vhostblk.dedup.tables import FILE, PAGE, Tables

SIZE = MIB
PIECE = MIB


@dataclass
class Metadata:
    """What happens to the files of a metadata directory."""

    recording: Recording
    databases: list[tuple[int, int, bytes]] = field(default_factory=list)
    """Begin and end of a commit, and the database after it."""
    removed: dict[str, int] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    synced: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of a sync of the directory: names from before are on stable storage."""

    def begin_file(self, name: str) -> None:
        if name not in self.recording.files:
            self.recording.add_file(name, b"")
        self.removed.pop(name, None)
        self.created[name] = self.recording.clock.tick()

    def has_name(self, name: str, time: int) -> bool:
        """Whether it is sure that the directory names a file."""
        created = self.created.get(name, -1)  # else it was there before
        return created < 0 or any(created < begin and end <= time for begin, end in self.synced)

    def leave(self, directory: Path, time: int, survival: Survival) -> None:
        """The directory as a cut right after `time` may leave it."""
        for old in directory.iterdir():
            if old.name != "superblock":
                old.unlink()
        possible = [data for begin, end, data in self.databases if end <= time][-1:]
        possible += [data for begin, end, data in self.databases if begin <= time < end]
        database = possible[-1] if survival.toss() else possible[0]
        (directory / FILE).write_bytes(database)
        for name in self.recording.files:
            if not name.startswith("journal."):
                continue
            begun = any(c.file == name and c.begin <= time for c in self.recording.changes)
            if not begun or (self.removed.get(name, time + 1) <= time and survival.toss()):
                continue
            if not self.has_name(name, time) and not survival.toss():
                continue
            (directory / name).write_bytes(self.recording.image(name, time, survival))


watched: dict[Path, Metadata] = {}


class RecordedJournal(Journal):
    def __init__(self, directory: Path, uuid: bytes) -> None:
        super().__init__(directory, uuid)
        self._metadata = watched.get(directory)

    def begin(self, number: int, frame: int) -> None:
        if self._metadata is not None:
            self._metadata.begin_file(f"journal.{number}")
        super().begin(number, frame)

    def _write(self, frame: bytes) -> None:
        if self._metadata is None:
            super()._write(frame)
            return
        name = f"journal.{self.number}"
        with self._metadata.recording.during(name, "write", self._length, len(frame), frame):
            super()._write(frame)

    def syncing(self) -> Callable[[], None]:
        sync, metadata = super().syncing(), self._metadata
        if metadata is None:
            return sync
        recording = metadata.recording
        last = self.number
        names = [f"journal.{number}" for number in range(last - self.older, last + 1)]

        def recorded() -> None:
            changes = [recording.begin(name, "flush") for name in names]
            sync()
            for change in changes:
                recording.end(change)

        return recorded

    def remove_before(self, number: int) -> None:
        super().remove_before(number)
        if self._metadata is not None:
            tick = self._metadata.recording.clock.tick()
            for name in self._metadata.recording.files:
                if name.startswith("journal.") and int(name[8:]) < number:
                    self._metadata.removed.setdefault(name, tick)


class RecordedTables(Tables):
    def write(self) -> None:
        with self._commit():
            super().write()

    def put_ledger(self, value: bytes) -> None:
        with self._commit():
            super().put_ledger(value)

    @contextlib.contextmanager
    def _commit(self) -> Iterator[None]:
        metadata = watched.get(self.path.parent)
        begin = metadata.recording.clock.tick() if metadata is not None else 0
        yield
        if metadata is not None:
            end = metadata.recording.clock.tick()
            metadata.databases.append((begin, end, self.path.read_bytes()))


def recorded_sync(directory: Path) -> None:
    metadata = watched.get(directory)
    begin = metadata.recording.clock.tick() if metadata is not None else 0
    sync_directory(directory)
    if metadata is not None:
        metadata.synced.append((begin, metadata.recording.clock.tick()))


@pytest.fixture(autouse=True)
def recorded_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "sync_directory", recorded_sync)
    monkeypatch.setattr(store_module, "Journal", RecordedJournal)
    monkeypatch.setattr(store_module, "Tables", RecordedTables)
    watched.clear()
    ledgers.clear()


@dataclass
class Life:
    """A store between two cuts."""

    host: Host
    data: Path
    directory: Path
    recording: Recording
    metadata: Metadata
    opened: int = 0

    @classmethod
    async def begin(cls, host: Host, data: Path, directory: Path, **options: Any) -> Life:
        recording = Recording()
        recording.add_file("data", data.read_bytes())
        metadata = Metadata(recording)
        metadata.databases.append((0, 0, (directory / FILE).read_bytes()))
        for path in directory.glob("journal.*"):
            recording.add_file(path.name, path.read_bytes())
            # It was there before: a change that happened to nothing.
            recording.changes.append(Change(path.name, "write", 0, 0, b"", True, 0, 0))
        watched[Path(os.path.realpath(directory))] = metadata
        record = Recorder.register(recording, "data")
        await host.add("file", "storage", filename=str(data), discard="unmap")
        await host.add("recorder", "recorded", file="storage", record=record)
        await host.add(
            "dedup", "disk", file="recorded", metadata=str(directory), discard="unmap", **options
        )
        return cls(host, data, directory, recording, metadata, recording.clock.now)

    async def end(self) -> None:
        for name in ("disk", "recorded", "storage"):
            await self.host.backend.blockdev_del(name)
        del watched[Path(os.path.realpath(self.directory))]

    def leave(self, where: Path, time: int, survival: Survival) -> None:
        """What a cut leaves, in another place."""
        where.mkdir(exist_ok=True)
        (where / "data.raw").write_bytes(self.recording.image("data", time, survival))
        meta = where / "meta"
        meta.mkdir(exist_ok=True)
        (meta / "superblock").write_bytes((self.directory / "superblock").read_bytes())
        self.metadata.leave(meta, time, survival)


ledgers: Counter[bool] = Counter()
"""Of how many stores it was sound after a cut."""


async def content_of(host: Host, where: Path) -> bytes:
    """Opens what is left and reads it; it is sound, or can be repaired by giving leaks back."""
    await host.add("file", "left", filename=str(where / "data.raw"))
    try:
        node = await host.add("dedup", "judged", file="left", metadata=str(where / "meta"))
        try:
            size = node.size
            content = b"".join(
                [
                    await host.read("judged", at, min(PIECE, size - at))
                    for at in range(0, size, PIECE)
                ]
            )
            found = await node.store.check(node.data, repair=True, content=True)
            assert not found.corruptions and not found.wrong, found.messages
            again = await node.store.check(node.data, repair=False)
            assert again.sound, again.messages
            sound = node.store.ledger.sound
        finally:
            await host.backend.blockdev_del("judged")
    finally:
        await host.backend.blockdev_del("left")
    if sound:
        # What the repair has written is enough to come to the same without the metadata.
        alone = where / "alone"
        shutil.rmtree(alone, ignore_errors=True)
        report = await rebuilt(where / "data.raw", alone)
        assert not report.messages and not report.lost and not report.dropped, report
        assert contents(alone) == contents(where / "meta")
    ledgers[sound] += 1
    return content


async def content_of_data_alone(host: Host, where: Path) -> bytes:
    """The metadata are lost with the power, and are rebuilt."""
    alone = where.parent / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir()
    shutil.copy(where / "data.raw", alone)
    report = await rebuilt(alone / "data.raw", alone / "meta")
    assert not report.messages and not report.lost, report
    return await content_of(host, alone)


async def judge(host: Host, life: Life, history: History, seed: int, cuts: int) -> None:
    modes: Counter[str] = Counter()
    times = life.recording.times(random.Random(seed), cuts, life.opened + 1)
    commits = [begin for begin, _, _ in life.metadata.databases if begin > life.opened]
    for number, time in enumerate(times):
        # Of its own: how much cut_again() draws depends on how things happen to go there.
        rnd = random.Random(f"{seed} {number}")
        if commits and number % 4 == 3:
            time = rnd.choice(commits) + rnd.randint(-1, 2)  # around a checkpoint
        mode: Mode = rnd.choice(MODES)
        modes[mode] += 1
        where = life.directory.parent / "cut"
        life.leave(where, time, Survival(mode, rnd))
        try:
            if number % 3 == 1:
                history.judge(await content_of_data_alone(host, where), time)
            if number % 3 == 0:
                await cut_again(host, where, history, time, rnd)
            history.judge(await content_of(host, where), time)
        except Exception as error:
            raise AssertionError(
                f"cut {number} after tick {time} of {life.recording.clock.now}, {mode}: {error}"
            ) from error
    print(dict(modes))


async def cut_again(
    host: Host, where: Path, history: History, time: int, rnd: random.Random
) -> None:
    """The power goes a second time while the store is being repaired."""
    life = await Life.begin(host, where / "data.raw", where / "meta")
    await life.end()
    again = where.parent / "again"
    for _ in range(2):
        second = rnd.randint(1, life.recording.clock.now)
        life.leave(again, second, Survival(rnd.choice(MODES), rnd))
        if rnd.random() < 0.5:
            history.judge(await content_of_data_alone(host, again), time)
        history.judge(await content_of(host, again), time)
    # For who comes next: as it was cut the second time.
    (where / "data.raw").write_bytes((again / "data.raw").read_bytes())


Scenario = Callable[[Drive], Awaitable[None]]


async def unique(drive: Drive) -> None:
    for _ in range(8):
        await drive.batch(8, ("write",))
        await drive.flush()


async def mixed(drive: Drive) -> None:
    for _ in range(14):
        await drive.batch(12)


async def duplicates(drive: Drive) -> None:
    """The same few blocks all over the place."""
    blocks = [drive.rnd.randbytes(BLOCK) for _ in range(6)]
    for _ in range(60):
        count = drive.rnd.randint(1, 6)
        data = b"".join(drive.rnd.choice(blocks) for _ in range(count))
        at = drive.rnd.randrange(0, drive.size // BLOCK - count) * BLOCK
        await drive.write(at, data, fua=drive.rnd.random() < 0.1)
        if drive.rnd.random() < 0.15:
            await drive.flush()
        if drive.rnd.random() < 0.1:
            await drive.discard(0, drive.size // 2)


async def overwrites(drive: Drive) -> None:
    """More than the store has room for, so that segments are emptied and used again."""
    for _ in range(40):
        await drive.batch(10, ("write", "write", "discard"), biggest=16 * BLOCK)
        if drive.rnd.random() < 0.3:
            await drive.flush()


async def checkpoints(drive: Drive) -> None:
    store = drive.host.backend.graph.node("disk").store
    store.tuning.changes = 20
    await mixed(drive)


async def generations(drive: Drive) -> None:
    """The ledger begins anew all the time."""
    store = drive.host.backend.graph.node("disk").store
    store.tuning.changes = 20
    store.ledger.least_log = 16 << 10
    begun = 0
    completed = store.ledger.completed

    def counted(length: int) -> None:
        nonlocal begun
        begun += 1
        completed(length)

    store.ledger.completed = counted
    await mixed(drive)
    assert begun > 1


async def moves(drive: Drive) -> None:
    """Blocks are moved, by collection and in the disk's order, while guests overwrite them."""
    node = drive.host.backend.graph.node("disk")
    store = node.store

    async def move() -> None:
        for page in range(drive.size // store.super.block_size // PAGE + 1):
            async with node.working():
                if numbers := store.collector.scattered(node.number, page):
                    with contextlib.suppress(NoSpace):
                        await store.collector.gather(node.data, numbers)
        await store.collector.collect()

    for _ in range(6):
        await drive.batch(8, ("write", "write", "discard"), biggest=4 * BLOCK)
        moving = asyncio.create_task(move())
        await drive.batch(8, ("write", "write", "discard"), biggest=4 * BLOCK)
        await moving
        await drive.flush()
    assert store.counters.moved > 50


async def compressed(drive: Drive) -> None:
    drive.host.backend.graph.node("disk").store.tuning.compress = True
    await mixed(drive)
    await duplicates(drive)


SCENARIOS = [unique, mixed, duplicates, overwrites, checkpoints, generations, moves, compressed]


@pytest.mark.parametrize("block", [4096, 16384])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_power_cuts(tmp_path: Path, scenario: Scenario, block: int) -> None:
    seed = int(os.environ.get(SEED_VARIABLE, 1))
    print(f"{SEED_VARIABLE}={seed}")

    async def test(host: Host) -> None:
        await create(host, size=SIZE, data=4 * MIB, segment_size=SEGMENT, block_size=block)
        await host.backend.blockdev_del("data")
        life = await Life.begin(host, Path(host.path("data.raw")), Path(host.path("meta")))
        history = History(life.recording.clock, bytes(SIZE))
        drive = Drive(host, "disk", history, random.Random(seed), block)
        await scenario(drive)
        await drive.check()
        await life.end()
        await judge(host, life, history, seed, cuts=tries(14))
        history.judge(await content_of(host, host.directory), life.recording.clock.now)
        # When a store is full to the brim, the ledger stands back.
        assert ledgers[True] > ledgers[False], ledgers

    # Sanitizers take their time; pytest has a limit, too.
    with_host(test, Recorder, seconds=600)
