# SPDX-License-Identifier: GPL-2.0-or-later
"""How an I/O thread does file I/O: io_uring where it is allowed, else threads, and saying so.

io_uring is really taken away, by a seccomp filter as containers have it. A filter is for good, so
that happens in a process of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bare_engine import IO_URING, READ, THREADS, WRITE, BareEngine
from frontend import Daemon, Device, Qmp

HERE = Path(__file__).resolve().parent

# Forbids one system call with this errno, then runs what follows.
FORBID = """
import ctypes, struct, sys
def forbid(number, errno):
    statements = [(0x20, 0, 0, 0),                    # load the number of the system call
                  (0x15, 0, 1, number),               # is it this one?
                  (0x06, 0, 0, 0x00050000 | errno),   # fail with errno
                  (0x06, 0, 0, 0x7FFF0000)]           # allow
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *s) for s in statements))
    program = struct.pack("H6xQ", len(statements), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    unsigned = [ctypes.c_ulong(n) for n in (1, 0, 0, 0)]
    assert libc.prctl(38, *unsigned) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, ctypes.c_ulong(2), program) == 0, "PR_SET_SECCOMP"
"""

USE = """
from bare_engine import BareEngine, FLUSH, WRITE
path = sys.argv[1]
with BareEngine() as engine:
    node = engine.file(path, direct=True)
    assert engine.run(node, WRITE, 512, b"w" * 4096) == 0
    assert engine.run(node, FLUSH) == 0
    assert engine.read(node, 512, 4096) == b"w" * 4096
    print(engine.info.aio, engine.fallback)
try:
    BareEngine(aio=1)
except OSError as error:
    print(error)
"""

COMMAND = """
import runpy
runpy.run_module("vhostblk", run_name="__main__", alter_sys=True)
"""

IO_URING_SETUP, IO_URING_ENTER = 425, 426
EPERM, ENOSYS = 1, 38


def io_uring_works() -> bool:
    try:
        with BareEngine(IO_URING):
            return True
    except OSError:
        return False


needs_io_uring = pytest.mark.skipif(not io_uring_works(), reason="no io_uring here")


@needs_io_uring
def test_io_uring_is_the_first_choice() -> None:
    with BareEngine() as engine:
        assert engine.info.aio == IO_URING
        assert engine.fallback == ""


def test_threads_can_be_asked_for() -> None:
    with BareEngine(THREADS) as engine:
        assert engine.info.aio == THREADS
        assert engine.fallback == ""


can_be_forbidden = pytest.mark.skipif(
    not io_uring_works() or platform.machine() != "x86_64",
    reason="no io_uring here, or other numbers of system calls than x86_64's",
)


@can_be_forbidden
@pytest.mark.parametrize("number", [IO_URING_SETUP, IO_URING_ENTER])
@pytest.mark.parametrize("error", [EPERM, ENOSYS])
def test_forbidden_io_uring_is_replaced_and_explained(
    tmp_path: Path, number: int, error: int
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", f"{FORBID}\nforbid({number}, {error})\n{USE}", str(image)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    auto, explicit = done.stdout.splitlines()
    assert auto.startswith(f"{THREADS} ")
    for text in (auto, explicit):
        assert "io_uring" in text
        assert "seccomp filter" in text
    assert image.read_bytes()[512:4608] == b"w" * 4096


# What does what `vhostblk` does, but may not use io_uring.
WITHOUT_IO_URING = [sys.executable, "-c", f"{FORBID}\nforbid({IO_URING_SETUP}, {EPERM})\n{COMMAND}"]


@can_be_forbidden
def test_the_operator_is_told(short_dir: Path) -> None:
    """In the log, in query-iothreads, by doctor; the disk works all the same."""
    image = short_dir / "image"
    image.write_bytes(bytes(1 << 20))
    reason = "io_uring is not permitted (Operation not permitted): allow io_uring_setup"
    control = short_dir / "control.sock"
    command = [*WITHOUT_IO_URING, "serve", "--control", str(control)]
    command += ["--object", "iothread,id=io", "--blockdev", f"file,node-name=disk,filename={image}"]
    export = f"vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={short_dir}/e.sock"
    command += ["--export", f"{export},writable=on,iothread=io"]
    with Daemon(command, short_dir) as daemon:
        daemon.wait_line("vhostblk: ready")
        assert daemon.wait_line("uses threads").startswith(
            f"vhostblk: warning: I/O thread 'io' uses threads: {reason}"
        )
        with Qmp(str(control)) as qmp:
            threads = {thread["id"]: thread for thread in qmp.command("query-iothreads")}
        assert threads["io"]["aio"] == "threads"
        assert threads["io"]["fallback-reason"].startswith(reason)
        with Device(daemon.socket("e")) as device:
            device.write(0, b"x" * 4096)
            assert device.read(0, 4096) == b"x" * 4096
        assert daemon.terminate() == 0
    found = subprocess.run([*WITHOUT_IO_URING, "doctor"], capture_output=True, text=True)
    assert f"problem  io_uring: cannot be used ({reason}" in found.stdout
    assert "-> a seccomp filter is in force: allow io_uring_setup" in found.stdout


@can_be_forbidden
def test_io_uring_and_nothing_else() -> None:
    """Who insists is told how to do without."""
    command = [*WITHOUT_IO_URING, "serve", "--object", "iothread,id=io,aio=io_uring"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "I/O thread 'io' cannot be started: io_uring is not permitted" in done.stderr
    assert done.stderr.endswith("; aio=auto or aio=threads does without io_uring\n")


def count_threads(name: str) -> int:
    tasks = Path("/proc/self/task").glob("*/comm")
    return sum(task.read_text().strip() == name for task in tasks)


def test_pool_grows_to_its_limit_and_goes_away(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(1 << 20))
    before = count_threads("vhostblk-aio")
    with BareEngine(THREADS, threads_max=3) as engine:
        node = engine.file(image)
        # Past 1 MiB nothing is done inline.
        reads = [engine.start(node, READ, 0, 2 << 20) for _ in range(40)]
        engine.wait_all()
        deadline = time.monotonic() + 5  # a thread needs a moment to have its name
        while count_threads("vhostblk-aio") - before < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 2 <= count_threads("vhostblk-aio") - before <= 3
        expected = image.read_bytes() + bytes(1 << 20)
        assert all(read.ret == 0 and read.data == expected for read in reads)
    assert count_threads("vhostblk-aio") == before


@pytest.mark.parametrize("aio", [IO_URING, THREADS])
def test_more_requests_than_the_ring_has_room_for(tmp_path: Path, aio: int) -> None:
    if aio == IO_URING and not io_uring_works():
        pytest.skip("no io_uring here")
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with BareEngine(aio) as engine:
        node = engine.file(image, direct=True)
        writes = [
            engine.start(node, WRITE, n % 2048 * 512, bytes([n % 2048 % 251 + 1]) * 512)
            for n in range(3000)
        ]
        engine.wait_all()
        assert all(write.ret == 0 for write in writes)
    assert image.read_bytes() == b"".join(bytes([n % 251 + 1]) * 512 for n in range(2048))


@pytest.mark.parametrize("aio", [IO_URING, THREADS])
def test_idle_thread_costs_no_cpu(aio: int) -> None:
    if aio == IO_URING and not io_uring_works():
        pytest.skip("no io_uring here")
    with BareEngine(aio) as engine:
        time.sleep(0.1)
        before = engine.info
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.05
        assert engine.info.loops - before.loops < 5
