# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of a backend that serves qcow2 or QED, at random moments under load.

A guest that lives on finds all that it was told had been written, flushed or not: for a running
guest a disk does not go back in time. What is on disk right after the kill is judged, too, as
somebody else would find it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_process import BackendProcess
from crash import Clock, History, newest_tools
from crash.history import Op
from crash.judge import is_dirty
from crash.stage import SEED_VARIABLE
from crash.tools import ToolError
from frontend import Device, Qmp, Request, Type
from frontend.protocol import DISCARD_SEGMENT, DISCARD_UNMAP

KIB = 1 << 10
MIB = 1 << 20
SIZE = 8 * MIB
DEPTH = 24

Start = Callable[..., BackendProcess]


class Load:
    """A front-end with many writes in flight, and the history of its disk."""

    zeroes = 0.15
    """How many of the writes are zero writes."""

    def __init__(self, socket: Path, history: History, rnd: random.Random) -> None:
        self.rnd = rnd
        self.history = history
        self.device = Device(socket, queues=2, timeout=30)
        self.flying: dict[Request, Op] = {}

    def work(self, count: int) -> None:
        """That many more requests; up to DEPTH are left in flight."""
        for _ in range(count):
            self._start_one()
            self.device.reap()
            self._collect()
            while len(self.flying) >= DEPTH:
                self.device.wait(next(iter(self.flying)))
                self._collect()

    def settle(self) -> None:
        """Wait for all that is in flight."""
        self.device.wait(*self.flying)
        self._collect()

    def _start_one(self) -> None:
        queue = self.rnd.randrange(2)
        if self.rnd.random() < 0.03:
            request = self.device.submit(Type.FLUSH, queue=queue)
            self.flying[request] = self.history.begin("flush")
            return
        length = 512 * self.rnd.choice((1, 3, 8, 8, 8, 16, 128, self.rnd.randint(1, 256)))
        offset = 512 * self.rnd.randint(0, (SIZE - length) // 512)
        for op in self.flying.values():
            if (
                op.kind != "flush"
                and offset < op.offset + op.length
                and op.offset < offset + length
            ):
                return
        if self.rnd.random() < self.zeroes:
            flags = self.rnd.choice((0, DISCARD_UNMAP))
            segment = DISCARD_SEGMENT.pack(offset // 512, length // 512, flags)
            request = self.device.submit(Type.WRITE_ZEROES, data=segment, queue=queue)
            self.flying[request] = self.history.begin("write-zeroes", offset, length)
            return
        data = self.rnd.randbytes(length)
        request = self.device.submit(Type.OUT, offset // 512, data, queue=queue)
        self.flying[request] = self.history.begin("write", offset, length, data)

    def _collect(self) -> None:
        for request in [request for request in self.flying if request.done]:
            op = self.flying.pop(request)
            assert request.status == 0, f"{op.kind} at {op.offset:#x} ended with {request.status}"
            self.history.end(op)

    def check(self) -> None:
        """Everything, through the device."""
        step = 256 * KIB
        for at in range(0, SIZE, step):
            read = self.device.read(at, step)
            expected = self.history.content[at : at + step]
            if read != expected:
                wrong = next(i for i in range(step) if read[i] != expected[i])
                raise AssertionError(f"byte {at + wrong:#x} is not what was written")


def arguments(image: Path, **options: Any) -> list[str]:
    """A backend's command line."""
    more = "".join(f",{key.replace('_', '-')}={value}" for key, value in options.items())
    export = "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2"
    return [
        *("--control", "none"),
        *("--blockdev", f"driver=file,node-name=storage,filename={image}"),
        *("--blockdev", f"driver={format_of(image)},node-name=disk,file=storage{more}"),
        *("--export", f"{export},addr.type=unix,addr.path={{dir}}/disk.sock"),
    ]


@pytest.fixture
def seed() -> Iterator[int]:
    value = int(os.environ.get(SEED_VARIABLE, 1))
    print(f"{SEED_VARIABLE}={value}")
    yield value


VARIANTS: dict[str, dict[str, Any]] = {
    "64k": {},
    "4k": {"cluster_size": 4 * KIB},
    "512": {"cluster_size": 512},
    "lazy": {"lazy_refcounts": "on", "cluster_size": 4 * KIB},
    "extended": {"extended_l2": "on", "cluster_size": 16 * KIB},
    "subclusters": {"extended_l2": "on", "cluster_size": 128 * KIB, "backing": "below.raw"},
    "backing": {"cluster_size": 16 * KIB, "backing": "below.raw"},
    "data-file": {"data_file": "disk.data", "cluster_size": 4 * KIB},
    "qed": {"format": "qed", "cluster_size": 4 * KIB, "table_size": 2},
    "qed-backing": {"format": "qed", "cluster_size": 64 * KIB, "backing": "below.raw"},
}


def image_of(directory: Path, variant: str) -> Path:
    below = directory / "below.raw"
    below.write_bytes(random.Random(3).randbytes(SIZE - 300 * KIB))
    options = dict(VARIANTS[variant])
    format = options.pop("format", "qcow2")
    return newest_tools().create(directory / f"disk.{format}", SIZE, format, **options)


def format_of(image: Path) -> str:
    return image.suffix[1:]


def content(image: Path) -> bytes:
    return newest_tools().content(image, format_of(image))


def check_sound(image: Path) -> None:
    """No corruption, unless the image says that it wants to be repaired."""
    if not is_dirty(image.read_bytes()[:512], format_of(image)):
        found = newest_tools().check(image, format=format_of(image))
        assert not found.corruptions and not found.errors, found.text


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_guest_that_lives_on(
    short_dir: Path, start_backend: Start, seed: int, variant: str
) -> None:
    image = image_of(short_dir, variant)
    history = History(Clock(), content(image))
    load = Load(short_dir / "disk.sock", history, random.Random(seed))
    backend = start_backend(*arguments(image))
    with load.device:
        for _ in range(6):
            load.work(load.rnd.randint(50, 250))
            backend.stop(signal.SIGKILL)
            # A copy: the kernel may hold the image's locks a moment longer than the process lives.
            check_sound(copy_of(image))
            backend = start_backend(*arguments(image))
            load.device.reconnect()
            load.settle()
            load.check()
        load.work(100)
        load.settle()
        load.check()
    assert backend.stop() == 0
    check_sound(image)
    assert content(image) == load.history.content


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_others_find(short_dir: Path, start_backend: Start, seed: int, variant: str) -> None:
    """Right after the kill, before any backend of ours comes back: what was flushed is there."""
    image = image_of(short_dir, variant)
    history, rnd = History(Clock(), content(image)), random.Random(seed)
    for _ in range(4):
        backend = start_backend(*arguments(image))
        load = Load(short_dir / "disk.sock", history, rnd)
        with load.device:
            load.work(rnd.randint(30, 200))
            time.sleep(rnd.random() * 0.01)
            backend.stop(signal.SIGKILL)
        judged = copy_of(image)
        if is_dirty(judged.read_bytes()[:512], format_of(judged)):
            newest_tools().check(judged, "-r", "all", format=format_of(judged))
        check_sound(judged)
        history.judge(content(judged), history.clock.now)


@pytest.mark.parametrize("variant", VARIANTS)
def test_somebody_else_writes_in_between(
    short_dir: Path, start_backend: Start, seed: int, variant: str
) -> None:
    """What a killed backend knew of the image is worth nothing once QEMU has written to it."""
    image = image_of(short_dir, variant)
    tools = newest_tools()
    history, rnd = History(Clock(), content(image)), random.Random(seed)
    backend = start_backend(*arguments(image))
    load = Load(short_dir / "disk.sock", history, rnd)
    with load.device:
        load.work(150)
        backend.stop(signal.SIGKILL)
    wait_for_locks(image)
    # Here the image may be repaired first, as any opening for writing by QEMU does.
    for at in range(0, SIZE, 512 * KIB):
        length = 512 * rnd.randint(1, 300)
        tools.io(image, f"write -q -P {rnd.randint(1, 255)} {at} {length}")
    found = content(image)
    backend = start_backend(*arguments(image))
    load = Load(short_dir / "disk.sock", History(Clock(), found), rnd)
    with load.device:
        load.check()
        load.work(100)
        load.settle()
        load.check()
    assert backend.stop() == 0
    check_sound(image)
    assert content(image) == load.history.content


def replace_by_copy(control: str, role: str, old: Path, copy: Path) -> None:
    """The image may still be preparing for the next writes, and grow after it was copied."""
    place = {"parent-type": "driver", "node-name": "disk", "child": role, "new-child": "new"}
    with Qmp(control) as qmp:
        for _ in range(100):
            shutil.copy(old, copy)
            new = {"driver": "file", "node-name": "new", "filename": str(copy)}
            qmp.command("blockdev-add", **new)
            try:
                qmp.command("blockdev-replace", **place)
                return
            except AssertionError as error:
                assert "no copy of the image as it is now" in str(error)
            qmp.command("blockdev-del", **{"node-name": "new"})
            time.sleep(0.05)
    raise AssertionError("it never stands still")


@pytest.mark.parametrize(
    ("variant", "role"), [*((name, "file") for name in VARIANTS), ("data-file", "data-file")]
)
def test_the_storage_was_replaced(
    short_dir: Path, start_backend: Start, seed: int, variant: str, role: str
) -> None:
    """By a copy that lacks what is in memory only. What is written then is found in the copy."""
    image, data = image_of(short_dir, variant), short_dir / "disk.data"
    old = image if role == "file" else data
    copy = short_dir / f"copy{old.suffix}"
    history = History(Clock(), content(image))
    load = Load(short_dir / "disk.sock", history, random.Random(seed))

    def serving(image: Path, data: Path) -> list[str]:
        options = {"data_file": "data"} if variant == "data-file" else {}
        words = arguments(image, **options)
        words[words.index("none")] = "{dir}/q.sock"
        blockdev = f"driver=file,node-name=data,filename={data}"
        return [*(("--blockdev", blockdev) if options else ()), *words]

    backend = start_backend(*serving(image, data))
    with load.device:
        load.work(150)
        load.settle()
        before = bytes(history.content)
        replace_by_copy(str(short_dir / "q.sock"), role, old, copy)
        load.work(150)
        backend.stop(signal.SIGKILL)
        if role == "file":
            if variant != "data-file":
                assert content(image) == before
            check_sound(image)
            if format_of(image) == "qcow2":
                assert image.read_bytes()[88:96] == bytes(8)  # auto-clear features: it has no log
        where = (copy, data) if role == "file" else (image, copy)
        backend = start_backend(*serving(*where))
        load.device.reconnect()
        load.settle()
        load.check()
    assert backend.stop() == 0
    check_sound(where[0])
    if role == "file":
        assert content(copy) == load.history.content


def wait_for_locks(image: Path) -> None:
    """The kernel ends the requests of a killed process first, and keeps its locks until then."""
    for _ in range(100):
        try:
            newest_tools().io(image, "length")
            return
        except ToolError as error:
            assert "lock" in str(error)
        time.sleep(0.05)
    raise AssertionError("the image is still locked")


def copy_of(image: Path) -> Path:
    """The image with its companions somewhere else, so that nothing is changed by looking."""
    directory = image.parent / "copy"
    directory.mkdir(exist_ok=True)
    for name in (image.name, "below.raw", "disk.data"):
        if (image.parent / name).exists():
            shutil.copy(image.parent / name, directory / name)
    return directory / image.name
