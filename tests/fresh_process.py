# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes of `python -m vhostblk` without the quarter of a second in which Python imports.

The tests start more than a thousand of them. `Popen` and `run` are subprocess', except that such a
command is run in a fork of a process that has imported everything and done nothing. It is the
caller's own child, has only the files and the environment that it was given, and dies with the
caller. What this cannot do, such as another user or another Python, starts an interpreter as ever.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "vhostblk"]
DUMPED = Path("/proc/self/coredump_filter")
"""Which memory is part of a core dump: children are to have what the caller has at that moment."""
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MOST_FDS = 64
# What an interpreter, or a library, reads when it begins.
_EARLY = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "OPENSSL_", "TZ", "VHOSTBLK_SAN")


def die_with_parent() -> None:
    """For `preexec_fn`; forks do so anyway."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _early(environment: Any) -> dict[str, str]:
    return {name: environment[name] for name in environment if name.startswith(_EARLY)}


# ---- where it is wanted


class _Zygote:
    """The process that is forked, one for each of pytest's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.early = _early(os.environ)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # (Its standard files are those of the tests, for whoever inherits them.)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ.copy(),
                cwd="/",
            )
        atexit.register(self.close)

    def close(self) -> None:
        self._channel.close()
        self._process.wait()

    def fork(self, request: dict[str, Any], fds: list[int]) -> int:
        """The number of the new process, which is a child of ours."""
        with self.lock, open(os.memfd_create("request"), "w+") as file:
            json.dump(request, file)
            file.flush()
            # Children of children that end become ours while this holds: this one is to.
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._channel, [b"fork"], [file.fileno(), *fds])
                return int(self._channel.recv(64))
            finally:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


_zygote: _Zygote | None = None
_starting = threading.Lock()


def _the_zygote() -> _Zygote:
    global _zygote
    with _starting:
        if _zygote is None or _zygote.early != _early(os.environ):
            _zygote = _Zygote()
        return _zygote


def _can_be_forked(given: dict[str, Any]) -> bool:
    """Whether subprocess was asked for nothing but what a fork can be given."""
    environment = os.environ if given["env"] is None else given["env"]
    return (
        list(given["args"][: len(COMMAND)]) == COMMAND
        and "VHOSTBLK_SANITIZED" not in os.environ  # which would rather not be forked
        and _early(environment) == _early(os.environ)
        and given["preexec_fn"] in (None, die_with_parent)
        and given["close_fds"]
        and not given["shell"]
        and given["executable"] is None
        and given["restore_signals"]
        and given["uid"] is given["gid"] is given["gids"] is None
        and given["umask"] == given["process_group"] == -1
        and len(given["pass_fds"]) + 4 < _MOST_FDS
    )


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """One of subprocess', or a fork that looks like it."""

    def _execute_child(self, *words: Any) -> None:
        parent = subprocess.Popen._execute_child  # type: ignore[attr-defined]
        given = inspect.signature(parent).bind(self, *words).arguments
        if isinstance(given["args"], (str, bytes)) or not _can_be_forked(given):
            parent(self, *words)
            return
        files = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        standard = [at if fd == -1 else fd for at, fd in enumerate(files)]
        passed = [int(fd) for fd in given["pass_fds"]]
        request = {
            "arguments": [os.fsdecode(word) for word in given["args"][len(COMMAND) :]],
            "directory": os.fsdecode(given["cwd"] or os.getcwd()),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "passed": passed,
            "session": bool(given["start_new_session"]),
            "dumped": DUMPED.read_text(),
        }
        self.pid = _the_zygote().fork(request, [*standard, *passed])
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite")),
            *(given[name] for name in ("errread", "errwrite")),
        )


def run(
    command: list[str],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """subprocess.run()."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            said, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, said, errors)
    if check:
        done.check_returncode()
    return done


# ---- the process that is forked


def _import_all() -> None:
    import vhostblk

    for module in pkgutil.walk_packages(vhostblk.__path__, "vhostblk."):
        package, _, name = module.name.rpartition(".")
        # (Imported, it would take the place of what the package calls by that name.)
        if name != "__main__" and not hasattr(sys.modules[package], name):
            importlib.import_module(module.name)
    gc.freeze()  # nobody has to look at it again


def _wait_for_requests(channel: socket.socket) -> None:
    """Comes back in each new process."""
    while True:
        _, fds, _, _ = socket.recv_fds(channel, 16, _MOST_FDS)
        if not fds:
            os._exit(0)  # the tests have ended
        reading, writing = os.pipe()
        first = os.fork()
        if first == 0:
            between = os.getpid()
            second = os.fork()
            if second:
                os.write(writing, str(second).encode())
                os._exit(0)
            os.close(reading)
            os.close(writing)
            channel.close()
            while os.getppid() == between:  # until the tests are our parent
                time.sleep(0.0002)
            _become(fds)
            return
        os.waitpid(first, 0)
        channel.send(os.read(reading, 64))
        for fd in (reading, writing, *fds):
            os.close(fd)


def _become(fds: list[int]) -> None:
    """A process as subprocess would have made it."""
    with open(fds[0]) as file:
        file.seek(0)
        request = json.load(file)
    die_with_parent()
    # First out of the way of the numbers that they are to have.
    beyond = max([2, *request["passed"], *fds]) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for fd in fds[1:]]
    for fd in fds[1:]:
        os.close(fd)
    for fd, number in zip(moved, [0, 1, 2, *request["passed"]], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    if request["session"]:
        os.setsid()
    DUMPED.write_text("0x" + request["dumped"])
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = os.getcwd()
    sys.argv = ["-m", *request["arguments"]]
    _open_standard_files()
    importlib.reload(sys.modules["vhostblk.fault"])  # it has read the environment


def _open_standard_files() -> None:
    """As Python does when it begins: what is a terminal decides how they are buffered."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        size = 0 if unbuffered and number else -1
        mode = "rb" if number == 0 else "wb"
        binary: Any = open(number, mode, size, closefd=False)  # noqa: SIM115
        file = io.TextIOWrapper(
            binary,
            encoding=old.encoding,
            errors=old.errors,
            line_buffering=number == 2 or binary.isatty(),
            write_through=unbuffered and number > 0,
        )
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def _main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    _import_all()
    _wait_for_requests(channel)
    runpy.run_module("vhostblk", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
