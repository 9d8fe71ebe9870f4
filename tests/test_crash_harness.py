# SPDX-License-Identifier: GPL-2.0-or-later
"""The power-cut harness judges itself: right orders pass, wrong ones are caught.

The images are written by hand: a qcow2 image made by qemu-img, into which one cluster after
another is allocated in a given order of steps.
"""

from __future__ import annotations

import asyncio
import random
import struct
from pathlib import Path

import pytest
from crash import (
    BrokenImageError,
    Clock,
    Drive,
    History,
    PowerCut,
    Recorder,
    Recording,
    Stage,
    Survival,
    WrongContentError,
    newest_tools,
)
from in_process import Host, with_host

from vhostblk.engine import OP_DISCARD, OP_FLUSH, OP_WRITE, OP_WRITE_ZEROES
from vhostblk.filter import Request

CLUSTER = 4096
SIZE = 64 * CLUSTER
COPIED = 1 << 63


class HandMade:
    """A minimal qcow2 writer: one L2 table, one refcount block, no mistake but the given order."""

    def __init__(self, directory: Path) -> None:
        path = newest_tools().create(directory / "disk.qcow2", SIZE, cluster_size=CLUSTER)
        image = bytearray(path.read_bytes())
        l1, reftable = struct.unpack(">Q", image[40:48])[0], struct.unpack(">Q", image[48:56])[0]
        self.refblock = struct.unpack(">Q", image[reftable : reftable + 8])[0]
        self.next = -(-len(image) // CLUSTER)
        self.l2 = self.next * CLUSTER
        self.next += 1
        image.extend(bytes(self.l2 - len(image)))
        # Garbage where clusters are going to be, as a reused cluster would have.
        image.extend(bytes(CLUSTER))
        image.extend(random.Random(1).randbytes(64 * CLUSTER))
        image[l1 : l1 + 8] = struct.pack(">Q", self.l2 | COPIED)
        count = self.refblock + 2 * (self.l2 // CLUSTER)
        image[count : count + 2] = struct.pack(">H", 1)
        self.recording = Recording()
        self.recording.add_file("disk.qcow2", bytes(image))
        self.history = History(self.recording.clock, bytes(SIZE))

    def write(self, cluster: int, data: bytes, order: str) -> None:
        """A guest's write into a fresh cluster and its flush; r, d, l are steps, f a flush."""
        host, self.next = self.next, self.next + 1
        with self.history.during("write", cluster * CLUSTER, CLUSTER, data):
            pass
        with self.history.during("flush"):
            for step in order:
                if step == "r":
                    self._put(self.refblock + 2 * host, struct.pack(">H", 1))
                elif step == "d":
                    self._put(host * CLUSTER, data)
                elif step == "l":
                    entry = struct.pack(">Q", host * CLUSTER | COPIED)
                    self._put(self.l2 + 8 * cluster, entry)
                else:
                    self.recording.flush("disk.qcow2")

    def _put(self, offset: int, data: bytes) -> None:
        self.recording.write("disk.qcow2", offset, data)


def judge(directory: Path, order: str, seed: int = 1) -> None:
    made = HandMade(directory)
    rnd = random.Random(seed)
    for cluster in rnd.sample(range(64), 12):
        made.write(cluster, rnd.randbytes(CLUSTER), order)
    cut = PowerCut(made.recording, made.history, directory / "cut", "disk.qcow2")
    asyncio.run(cut.judge(seed=seed, cuts=48))


@pytest.mark.parametrize("order", ["rdflf", "rfdflf", "rfdfflf", "drflf"])
def test_a_right_order_passes(tmp_path: Path, order: str) -> None:
    judge(tmp_path, order)


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        ("rdlf", "refcount|reads as"),  # no barrier before the entry
        ("rflfdf", "reads as"),  # the entry exposes what was in the cluster before
        ("dflfrf", "refcount"),  # the entry before the count
        ("rdl", "reads as"),  # acknowledges a flush without one
        ("rdfl", "reads as"),  # the entry is not flushed
        ("rfdlf", "reads as"),  # data and entry at once
    ],
)
def test_a_wrong_order_is_caught(tmp_path: Path, order: str, complaint: str) -> None:
    with pytest.raises(BrokenImageError, match=complaint):
        judge(tmp_path, order)


class TestRecording:
    def recording(self) -> Recording:
        recording = Recording()
        recording.add_file("f", bytes(2048))
        return recording

    def image(self, recording: Recording, mode: str, seed: int = 1) -> bytes:
        survival = Survival(mode, random.Random(seed))  # type: ignore[arg-type]
        return recording.image("f", recording.clock.now, survival)

    def test_what_was_flushed_is_there(self) -> None:
        recording = self.recording()
        recording.write("f", 0, b"a" * 512)
        recording.flush("f")
        recording.write("f", 512, b"b" * 512)
        assert self.image(recording, "none") == b"a" * 512 + bytes(1536)
        assert self.image(recording, "all") == b"a" * 512 + b"b" * 512 + bytes(1024)

    def test_a_flush_covers_only_what_had_ended(self) -> None:
        recording = self.recording()
        late = recording.begin("f", "write", 0, 512, b"a" * 512)
        recording.flush("f")
        recording.end(late)
        assert self.image(recording, "none") == bytes(2048)

    def test_fua_is_durable_alone(self) -> None:
        recording = self.recording()
        recording.write("f", 0, b"a" * 512)
        with recording.during("f", "write", 512, 512, b"b" * 512, fua=True):
            pass
        assert self.image(recording, "none") == bytes(512) + b"b" * 512 + bytes(1024)

    def test_torn_writes_are_whole_sectors(self) -> None:
        recording = self.recording()
        recording.write("f", 0, b"a" * 2048)
        seen = {self.image(recording, "torn", seed) for seed in range(200)}
        for image in seen:
            for sector in range(0, 2048, 512):
                assert image[sector : sector + 512] in (bytes(512), b"a" * 512)
        assert len(seen) == 16

    def test_sizes_are_lost_from_the_end(self) -> None:
        recording = self.recording()
        for size in (4096, 1024, 8192):
            with recording.during("f", "truncate", length=size):
                pass
        recording.write("f", 0, b"x" * 512)
        assert {len(self.image(recording, "half", seed)) for seed in range(60)} == {
            2048,
            4096,
            1024,
            8192,
        }
        assert len(self.image(recording, "all")) == 8192

    def test_discards_promise_nothing(self) -> None:
        recording = self.recording()
        recording.write("f", 0, b"x" * 512)
        with recording.during("f", "discard", 0, 512):
            pass
        recording.flush("f")
        found = {self.image(recording, "all", seed)[:512] for seed in range(20)}
        assert found == {b"x" * 512, bytes(512)}

    def test_a_write_behind_the_end_grows_the_file(self) -> None:
        recording = self.recording()
        recording.write("f", 4096, b"x" * 512)
        assert self.image(recording, "all") == bytes(4096) + b"x" * 512


class TestHistory:
    def test_old_or_new_until_flushed(self) -> None:
        history = History(Clock(), bytes(1024))
        history.write(0, b"a" * 512)
        for value in (bytes(512), b"a" * 512):
            history.judge(value + bytes(512), history.clock.now)
        with pytest.raises(WrongContentError, match="sector 0"):
            history.judge(b"b" * 512 + bytes(512), history.clock.now)
        history.flush()
        with pytest.raises(WrongContentError, match="sector 0"):
            history.judge(bytes(1024), history.clock.now)
        with pytest.raises(WrongContentError, match="sector 1 was never written"):
            history.judge(b"a" * 1024, history.clock.now)

    def test_discards_leave_old_data_or_zeroes(self) -> None:
        history = History(Clock(), b"o" * 512)
        with history.during("discard", 0, 512):
            pass
        history.flush()
        for value in (bytes(512), b"o" * 512):
            history.judge(value, history.clock.now)
        with pytest.raises(WrongContentError):
            history.judge(b"x" * 512, history.clock.now)

    def test_what_began_after_the_cut_cannot_be_there(self) -> None:
        history = History(Clock(), bytes(512))
        before = history.clock.now
        history.write(0, b"a" * 512)
        with pytest.raises(WrongContentError):
            history.judge(b"a" * 512, before)

    def test_what_was_right_once_is_judged_anew_for_another_moment(self) -> None:
        history = History(Clock(), bytes(512))
        before = history.clock.now
        history.judge(bytes(512), before)
        history.write(0, b"a" * 512)
        history.flush()
        history.judge(bytes(512), before)
        with pytest.raises(WrongContentError):
            history.judge(bytes(512), history.clock.now)

    def test_sizes(self) -> None:
        history = History(Clock(), b"o" * 1024)
        with history.during("resize", length=2048):
            pass
        history.judge(b"o" * 1024, history.clock.now)
        history.judge(b"o" * 1024 + bytes(1024), history.clock.now)
        history.flush()
        with pytest.raises(WrongContentError, match="1024 bytes"):
            history.judge(b"o" * 1024, history.clock.now)
        with pytest.raises(WrongContentError):
            history.judge(b"o" * 1536 + bytes(512), history.clock.now)


def test_the_recorder_sees_every_change() -> None:
    async def test(host: Host) -> None:
        path = host.file("f.raw", 8192)
        recording = Recording()
        recording.add_file("f.raw", bytes(8192))
        await host.add("file", "storage", filename=path, discard="unmap")
        record = Recorder.register(recording, "f.raw")
        await host.add("recorder", "disk", file="storage", record=record)
        node = host.backend.graph.node("disk")
        submit = host.backend.engine.submit
        await host.write("disk", 512, b"a" * 1024)
        await submit(node.effective, OP_WRITE_ZEROES, 1024, None, 512)
        await submit(node.effective, OP_DISCARD, 0, None, 512)
        await submit(node.effective, OP_WRITE, 2048, b"f" * 512, flags=1)
        await submit(node.effective, OP_FLUSH)
        await node.truncate(16384)
        await host.write("disk", 12288, b"z" * 512)
        assert [(c.kind, c.offset, c.length, c.fua) for c in recording.changes] == [
            ("write", 512, 1024, False),
            ("write-zeroes", 1024, 512, False),
            ("discard", 0, 512, False),
            ("write", 2048, 512, True),
            ("flush", 0, 0, False),
            ("truncate", 0, 16384, False),
            ("write", 12288, 512, False),
        ]
        assert all(change.end == change.begin + 1 for change in recording.changes)
        images = {
            recording.image("f.raw", recording.clock.now, Survival("all", random.Random(seed)))
            for seed in range(20)
        }
        assert len(images) == 1, "the discarded sector was empty: there is nothing to choose"
        assert images == {Path(path).read_bytes()}
        assert node.size == 16384

    with_host(test, Recorder)


async def work(drive: Drive) -> None:
    for _ in range(8):
        await drive.batch(12)
        await drive.flush()


class TestStage:
    """The whole of it, with raw in the place of a format."""

    def stage(self, directory: Path) -> Stage:
        image = directory / "disk.raw"
        image.write_bytes(random.Random(1).randbytes(1 << 20))
        return Stage(image, driver="raw")

    def test_raw_passes(self, tmp_path: Path) -> None:
        stage = self.stage(tmp_path)
        assert stage.play(work, seed=1).cuts == stage.cuts

    def test_a_node_that_forgets_flushes_is_caught(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def flush(self: Recorder, request: Request) -> None:
            pass

        async def write(self: Recorder, request: Request) -> None:
            data = request.data()
            with self._recording.during(self._name, "write", request.offset, len(data), data):
                await self.file.write(request.offset, data)

        monkeypatch.setattr(Recorder, "flush", flush)
        monkeypatch.setattr(Recorder, "write", write)
        with pytest.raises(BrokenImageError, match="reads as"):
            self.stage(tmp_path).play(work, seed=1)
