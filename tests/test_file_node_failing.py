# SPDX-License-Identifier: GPL-2.0-or-later
"""The file node on storage that fails or is slow.

QEMU's storage daemon provides it: its FUSE export is a file whose every system call goes through
its blkdebug or throttle driver, so the errors and the waiting come from the kernel as from a disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare_engine import AIO, FLUSH, FUA, READ, WRITE, BareEngine
from crash.tools import plain_environment

MIB = 1 << 20

Storage = Callable[..., Path]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """storage(*options) starts the daemon; `top` is the node it exports."""
    program = shutil.which("qemu-storage-daemon")
    if not program or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs qemu-storage-daemon and /dev/fuse")
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> Path:
        backing, mounted, pidfile = (tmp_path / name for name in ("backing", "disk", "pid"))
        backing.write_bytes(b"b" * MIB)
        os.truncate(backing, 64 * MIB)
        mounted.touch()
        process = subprocess.Popen(
            [
                program,
                "--blockdev",
                f"file,node-name=backing,filename={backing}",
                *options,
                "--export",
                f"fuse,id=x,node-name=top,mountpoint={mounted},writable=on",
                "--pidfile",
                str(pidfile),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=plain_environment(),
        )
        processes.append(process)
        deadline = time.monotonic() + 20
        while not pidfile.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.skip(f"no FUSE export here: {process.communicate()[1].strip()}")
            time.sleep(0.02)
        return mounted

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)


@pytest.fixture(params=sorted(AIO))
def engine(request: pytest.FixtureRequest, storage: Storage) -> Iterator[BareEngine]:
    """Depends on `storage` to be gone before it is."""
    try:
        made = BareEngine(AIO[request.param])
    except OSError as error:
        pytest.skip(str(error))
    with made:
        yield made


def fails(iotype: str, once: str = "off") -> list[str]:
    inject = f"inject-error.0.event=none,inject-error.0.iotype={iotype},inject-error.0.errno=5"
    return [
        "--blockdev",
        f"blkdebug,node-name=top,image=backing,{inject},inject-error.0.once={once}",
    ]


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("skip", [0, 3])
def test_failing_reads(engine: BareEngine, storage: Storage, direct: bool, skip: int) -> None:
    node = engine.file(storage(*fails("read")), direct=direct)
    assert engine.run(node, READ, 4096, 4096, skip=skip) == -errno.EIO
    assert engine.run(node, WRITE, 4096, b"w" * 4096, skip=skip) == 0
    assert engine.run(node, READ, 0, 512, skip=skip) == -errno.EIO


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("flags", [0, FUA])
def test_failing_writes(engine: BareEngine, storage: Storage, direct: bool, flags: int) -> None:
    node = engine.file(storage(*fails("write")), direct=direct)
    assert engine.run(node, WRITE, 4096, b"w" * 4096, flags=flags) == -errno.EIO
    assert engine.read(node, 4096, 4096) == b"b" * 4096
    # A write that failed as such has lost nothing that was promised before.
    assert engine.run(node, FLUSH) == 0


def test_failed_flush_is_not_forgotten(engine: BareEngine, storage: Storage) -> None:
    """The storage recovers, the kernel forgets, but data may be lost: flushes go on failing."""
    path = storage(*fails("flush", once="on"))
    node = engine.file(path)
    assert engine.run(node, WRITE, 0, b"w" * 512) == 0
    assert engine.run(node, FLUSH) == -errno.EIO
    fd = os.open(path, os.O_RDWR)
    os.fdatasync(fd)
    os.close(fd)
    assert engine.run(node, FLUSH) == -errno.EIO
    assert engine.run(node, WRITE, 0, b"w" * 512, flags=FUA) == -errno.EIO
    assert engine.run(node, WRITE, 0, b"w" * 512) == 0
    assert engine.run(engine.file(path), FLUSH) == 0


def test_failed_fua_write_is_not_forgotten(engine: BareEngine, storage: Storage) -> None:
    node = engine.file(storage(*fails("flush", once="on")))
    assert engine.run(node, WRITE, 0, b"w" * 512, flags=FUA) == -errno.EIO
    assert engine.run(node, FLUSH) == -errno.EIO


def test_failed_flush_of_a_direct_file_may_be_repeated(
    engine: BareEngine, storage: Storage
) -> None:
    node = engine.file(storage(*fails("flush", once="on")), direct=True)
    assert engine.run(node, WRITE, 0, b"w" * 512) == 0
    assert engine.run(node, FLUSH) == -errno.EIO
    assert engine.run(node, FLUSH) == 0


@pytest.mark.parametrize("op", [READ, WRITE])
def test_slow_storage_does_not_stop_the_thread(
    engine: BareEngine, storage: Storage, tmp_path: Path, op: int
) -> None:
    """50 ms for each request (but the first few): after two slow ones the thread has learnt."""
    slow = engine.file(
        storage(
            "--object",
            "throttle-group,id=group,limits.iops-total=20",
            "--blockdev",
            "throttle,node-name=top,throttle-group=group,file=backing",
        )
    )
    (tmp_path / "quick").write_bytes(bytes(4096))
    quick = engine.file(tmp_path / "quick")
    engine.read(quick, 0, 512)
    before = engine.info
    # Far from each other, out of reach of the kernel's read-ahead.
    what = b"w" * 4096 if op else 4096
    requests = [engine.start(slow, op, n * 3 * MIB, what) for n in range(20)]
    engine.wait_for(lambda: engine.info.queued_ios - before.queued_ios >= 12)
    start = time.monotonic()
    assert engine.run(quick, READ, 0, 512) == 0
    waited = time.monotonic() - start
    assert any(request.ret is None for request in requests)
    assert waited < 0.04
    engine.wait_all()
    assert all(request.ret == 0 for request in requests)
    assert engine.info.inline_ios - before.inline_ios <= 8
