# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum and kill -9: a leg that has missed a write is known to have missed it, whenever."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from frontend import Daemon, Device, Qmp, Request

from vhostblk.nodes.quorum.metadata import _parse

MIB = 1 << 20
LEGS = "abc"


def start(directory: Path, *options: str, slow: str = "delay", ready: bool = True) -> Daemon:
    """Three files, each below a filter that makes it slow and one that makes it fail."""
    words = ["--state", str(directory / "state"), "--control", str(directory / "q.sock")]
    for leg in LEGS:
        words += ["--blockdev", f"file,node-name=file-{leg},filename={directory}/{leg}"]
        words += ["--blockdev", f"{slow},node-name=slow-{leg},file=file-{leg}"]
        words += ["--blockdev", f"error-inject,node-name={leg},file=slow-{leg},count=0"]
    children = ",".join(f"children.{index}={leg}" for index, leg in enumerate(LEGS))
    quorum = f"quorum,node-name=q,{children},vote-threshold=2,region-size=4096"
    words += ["--blockdev", ",".join((quorum, *options))]
    words += ["--export", f"vhost-user-blk,id=e,node-name=q,addr.type=unix,"
              f"addr.path={directory}/e.sock,writable=on"]  # fmt: skip
    daemon = Daemon([sys.executable, "-m", "vhostblk", "serve", *words], directory)
    return daemon.when_ready() if ready else daemon


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """With three equal legs. Not under a long name, which sockets do not have."""
    short = Path("/tmp") / f"vbq-{tmp_path.name[-12:]}-{random.randrange(1 << 30):x}"
    short.mkdir()
    for leg in LEGS:
        with open(short / leg, "wb") as file:
            file.truncate(MIB)
    yield short
    shutil.rmtree(short)


def inject(qmp: Qmp, leg: str, *operations: str) -> None:
    """From now on these fail."""
    count: dict[str, Any] = {} if operations else {"count": 0}
    given = {"operations": list(operations)} if operations else {}
    options = {"driver": "error-inject", "node-name": leg, "file": f"slow-{leg}"}
    qmp.command("blockdev-reopen", options=[{**options, **count, **given}])


def delay(qmp: Qmp, leg: str, nanoseconds: int) -> None:
    options = {"driver": "delay", "node-name": f"slow-{leg}", "file": f"file-{leg}"}
    qmp.command("blockdev-reopen", options=[{**options, "write-ns": nanoseconds}])


def states(qmp: Qmp) -> dict[str, str]:
    [quorum] = qmp.command("query-quorum", **{"node-name": "q"})
    return {leg["node-name"]: leg["state"] for leg in quorum["legs"]}


def until_in_sync(qmp: Qmp) -> None:
    end = time.monotonic() + 30
    while set(states(qmp).values()) != {"in-sync"}:
        assert time.monotonic() < end, states(qmp)
        time.sleep(0.02)


def legs_equal(directory: Path) -> bytes:
    [content] = {(directory / leg).read_bytes() for leg in LEGS}
    return content


def test_killed_right_after_the_write_that_was_missed(directory: Path) -> None:
    with (
        start(directory, "auto-rebuild=off") as daemon,
        Device(daemon.socket("e")) as device,
        Qmp(daemon.socket("q")) as qmp,
    ):
        device.write(0, b"1" * 8192)
        inject(qmp, "b", "write")
        device.write(4096, b"2" * 4096)
        daemon.kill()
        # The file now has what c would like to win with.
        (directory / "c").write_bytes(b"1" * 8192 + bytes(MIB - 8192))
        with start(directory, "auto-rebuild=off") as again, Qmp(again.socket("q")) as qmp:
            assert states(qmp) == {"a": "in-sync", "b": "stale", "c": "in-sync"}
            device.reconnect()
            # a and c do not agree, and b, which would be with c, is not asked.
            assert device.read(4096, 4096) == b"2" * 4096
            device.write(4096, b"3" * 4096)
            inject(qmp, "b")
            qmp.command("quorum-rebuild", **{"node-name": "q", "leg": "b"})
            until_in_sync(qmp)
            assert device.read(0, 8192) == b"1" * 4096 + b"3" * 4096
        again.terminate()
    assert legs_equal(directory)[4096:8192] == b"3" * 4096


def test_killed_while_a_leg_is_rebuilt(directory: Path) -> None:
    with (
        start(directory) as daemon,
        Device(daemon.socket("e")) as device,
        Qmp(daemon.socket("q")) as qmp,
    ):
        inject(qmp, "c", "write")
        content = random.Random(1).randbytes(MIB)
        device.write(0, content)
        inject(qmp, "c")
        job = {"node-name": "q", "leg": "c", "job-id": "j", "speed": 2 * MIB}
        qmp.command("quorum-rebuild", **job)
        end = time.monotonic() + 20
        while not any(entry["offset"] for entry in qmp.command("query-block-jobs")):
            assert time.monotonic() < end
            time.sleep(0.01)
        daemon.kill()
        with start(directory) as again, Qmp(again.socket("q")) as qmp:
            device.reconnect()
            assert device.read(0, MIB) == content
            until_in_sync(qmp)
        again.terminate()
    assert legs_equal(directory) == content


def test_killed_during_a_scrub(directory: Path) -> None:
    """The next process begins it again, and nothing is missed by it."""
    content = random.Random(1).randbytes(MIB)
    with (
        start(directory) as daemon,
        Device(daemon.socket("e")) as device,
        Qmp(daemon.socket("q")) as qmp,
    ):
        device.write(0, content)
        device.flush()
        for leg, offset in (("a", 4096), ("b", MIB // 2), ("c", MIB - 4096)):
            with open(directory / leg, "r+b") as file:
                file.seek(offset)
                file.write(b"rotten")
        job = {"node-name": "q", "repair": True, "job-id": "j", "speed": 2 * MIB}
        qmp.command("quorum-scrub", **job)
        end = time.monotonic() + 20
        while not any(entry["offset"] for entry in qmp.command("query-block-jobs")):
            assert time.monotonic() < end
            time.sleep(0.01)
        daemon.kill()
        with start(directory) as again, Qmp(again.socket("q")) as qmp:
            device.reconnect()
            end = time.monotonic() + 30
            while qmp.command("query-block-jobs"):
                assert time.monotonic() < end
                time.sleep(0.02)
            assert set(states(qmp).values()) == {"in-sync"}
            assert device.read(0, MIB) == content
        again.terminate()
    assert legs_equal(directory) == content


def test_killed_with_late_writes(directory: Path) -> None:
    options = ("write-threshold=2", "auto-rebuild=off")
    with (
        start(directory, *options) as daemon,
        Device(daemon.socket("e")) as device,
        Qmp(daemon.socket("q")) as qmp,
    ):
        delay(qmp, "a", 60_000_000_000)
        for block in range(8):
            device.write(block * 65536, b"%d" % block * 4096)  # without a
        for block in range(8):
            assert device.read(block * 65536, 4096) == b"%d" % block * 4096
        assert states(qmp)["a"] == "in-sync"  # it is only slow
        daemon.kill()
        # The next one delivers them, where a is as slow, and is killed before it has.
        before = metadata(directory).stat().st_ino
        with start(directory, ready=False) as again:
            end = time.monotonic() + 30
            while metadata(directory).stat().st_ino == before:
                assert time.monotonic() < end
                time.sleep(0.01)
            again.kill()
        assert not any((directory / "a").read_bytes())
        (directory / "state").unlink()  # a is not slow any more
        with start(directory, *options) as again, Qmp(again.socket("q")) as qmp:
            assert set(states(qmp).values()) == {"in-sync"}
        again.terminate()
    content = legs_equal(directory)
    assert all(content[b * 65536 :].startswith(b"%d" % b * 4096) for b in range(8))


def metadata(directory: Path) -> Path:
    return directory / "state.quorum-q"


def test_killed_with_writes_late_on_every_leg(directory: Path) -> None:
    """Each leg lacks something that a guest relies on; no rebuild would have a source."""
    options = ("write-threshold=2", "auto-rebuild=off")
    daemon = start(directory, *options, slow="delay,write-ns=1,jitter-ns=50000000")
    try:
        with Device(daemon.socket("e"), timeout=30) as device:
            lacking, end = 0, time.monotonic() + 60
            while lacking.bit_count() < 2:
                assert time.monotonic() < end
                contents = {block: random.randbytes(4096) for block in range(40)}
                requests = {b: device.submit(1, b * 8, contents[b]) for b in contents}
                device.wait(*random.sample(list(requests.values()), 3))
                daemon.kill()
                device.reap()
                written = [block for block, request in requests.items() if request.done]
                late = _parse(metadata(directory).read_bytes()).late
                lacking = functools.reduce(operator.or_, (legs for _, _, legs in late), 0)
                daemon = start(directory, *options)
                # Nobody has sent anything again yet.
                for block in written:
                    place = slice(block * 4096, (block + 1) * 4096)
                    assert {(directory / leg).read_bytes()[place] for leg in LEGS} == {
                        contents[block]
                    }
                with Qmp(daemon.socket("q")) as qmp:
                    assert set(states(qmp).values()) == {"in-sync"}
                device.reconnect()
                device.wait(*requests.values())
                assert {request.status for request in requests.values()} == {0}
            assert device.read(0, 40 * 4096) == b"".join(contents.values())
        daemon.terminate()
    finally:
        daemon.close()
    legs_equal(directory)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_time(directory: Path, seed: int, early: bool) -> None:
    """A guest writes while legs fail, are slow and are rebuilt; killed at random, several times.

    What a block may be afterwards: what was written last, or was being written.
    """
    rng = random.Random(seed)
    options = ("write-threshold=2",) if early else ()
    model: dict[int, list[bytes]] = {}
    daemon = start(directory, *options)
    device = Device(daemon.socket("e"), timeout=30)
    try:
        with device:
            for _ in range(3):
                stop = threading.Event()
                troubles = threading.Thread(
                    target=_trouble,
                    args=(daemon.socket("q"), rng.randrange(1 << 30), stop),
                )
                troubles.start()
                end = time.monotonic() + rng.uniform(0.1, 0.8)
                while True:
                    requests: list[Request] = []
                    for block in rng.sample(range(MIB // 512), 16):
                        model.setdefault(block, [bytes(512)]).append(rng.randbytes(512))
                        requests.append(device.submit(1, block, model[block][-1]))
                    if time.monotonic() > end:
                        break  # killed with these in flight
                    device.wait(*requests)
                    assert {request.status for request in requests} == {0}
                    if rng.random() < 0.2:
                        device.flush()
                    model = {block: values[-1:] for block, values in model.items()}
                daemon.kill()
                stop.set()
                troubles.join()
                daemon = start(directory, *options)
                device.reconnect()
                device.wait(*requests)
                for block, values in model.items():
                    found = device.read(block * 512, 512)
                    assert found in values
                    model[block] = [found]
            with Qmp(daemon.socket("q")) as qmp:
                for leg in LEGS:
                    inject(qmp, leg)
                    delay(qmp, leg, 0)
                for leg, state in states(qmp).items():
                    if state == "failed":
                        qmp.command("quorum-rebuild", **{"node-name": "q", "leg": leg})
                until_in_sync(qmp)
            device.flush()
        assert daemon.terminate() == 0
    finally:
        daemon.close()
    content = legs_equal(directory)
    for block, [data] in model.items():
        assert content[block * 512 : (block + 1) * 512] == data


def _trouble(socket: str, seed: int, stop: threading.Event) -> None:
    """One leg after the other fails or is slow, and is rebuilt, until the backend is gone."""
    rng = random.Random(seed)
    with contextlib.suppress(AssertionError, OSError), Qmp(socket) as qmp:
        for leg in LEGS:
            inject(qmp, leg)
        while not stop.is_set():
            leg = rng.choice(LEGS)
            if rng.random() < 0.3:
                delay(qmp, leg, rng.choice((0, 20_000_000)))
            if set(states(qmp).values()) == {"in-sync"}:
                inject(qmp, leg, *rng.sample(("write", "flush", "read"), 2))
                time.sleep(rng.uniform(0, 0.1))
                inject(qmp, leg)
            for name, state in states(qmp).items():
                if state == "failed":
                    speed = rng.choice((0, MIB))
                    arguments = {"node-name": "q", "leg": name, "speed": speed}
                    qmp.command("quorum-rebuild", **arguments)
            time.sleep(rng.uniform(0, 0.05))
