# SPDX-License-Identifier: GPL-2.0-or-later
"""The back-end process under test, and a few lines of QMP to talk to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fresh_process


def listens(path: str) -> bool:
    """Without a connection, which some accept once only. (A file is there from bind() on.)"""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name == [path] and int(flags, 16) & 1 << 16:  # __SO_ACCEPTCON
            return True
    return False


class Daemon:
    """A process with a directory of its own; what it says on stderr is kept."""

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        *,
        env: Mapping[str, str] | None = None,
        owns_directory: bool = False,
    ) -> None:
        self.command = list(command)
        self.directory = directory
        self.env = None if env is None else {**os.environ, **env}
        self.owns_directory = owns_directory
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[str]:
        process = fresh_process.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.env,
            preexec_fn=fresh_process.die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        process.wait()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def socket(self, name: str) -> str:
        return str(self.directory / f"{name}.sock")

    # ---- what it says

    def lines(self, since: int = 0) -> list[str]:
        with self._changed:
            return self._lines[since:]

    def mark(self) -> int:
        """To be given to lines() and wait_line() later."""
        with self._changed:
            return len(self._lines)

    def wait_line(self, text: str, *, since: int = 0, timeout: float = 30) -> str:
        """The first line with `text` in it."""
        end = time.monotonic() + timeout
        with self._changed:
            while True:
                for line in self._lines[since:]:
                    if text in line:
                        return line
                if self.process.poll() is not None and not self._reader.is_alive():
                    raise self._failed(f"ended before it said {text!r}")
                if time.monotonic() > end:
                    raise self._failed(f"never said {text!r}")
                self._changed.wait(0.1)

    def when_ready(self) -> Self:
        """Itself, once a backend serves what it was told to; closed if that does not come about."""
        try:
            self.wait_line("vhostblk: ready")
        except BaseException:
            self.close()
            raise
        return self

    def _failed(self, what: str) -> AssertionError:
        said = "\n".join(self._lines)
        return AssertionError(f"{' '.join(self.command)}\n{what}; it said:\n{said}")

    def wait_socket(self, path: str, timeout: float = 30) -> None:
        end = time.monotonic() + timeout
        while not listens(path):
            if not self.alive or time.monotonic() > end:
                raise self._failed(f"does not listen on {path}")
            time.sleep(0.01)

    # ---- its end

    def kill(self) -> None:
        """kill -9, and nothing of it is left."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def terminate(self, timeout: float = 30) -> int:
        self.process.terminate()
        status = self.process.wait(timeout)
        self._reader.join()
        return status

    def restart(self, ready: str | None = "vhostblk: ready") -> None:
        """The same command again, after kill() or terminate()."""
        assert not self.alive
        since = self.mark()
        self.process = self._spawn()
        if ready is not None:
            self.wait_line(ready, since=since)

    def close(self) -> None:
        if self.alive:
            self.kill()
        if self.process.stderr is not None:
            self._reader.join()
            self.process.stderr.close()
        if self.owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def _directory() -> Path:
    # Not pytest's tmp_path: a socket's path has at most 107 characters.
    return Path(tempfile.mkdtemp(prefix="vb"))


def qemu_storage_daemon(queues: int = 4, size: int = 64 << 20, **node: str) -> Daemon:
    """QEMU's own back-end with one export, on socket `e`: a check on this front-end."""
    directory = _directory()
    options = {"driver": "null-co", "node-name": "n", "size": str(size), **node}
    path = directory / "e.sock"
    command = [
        "qemu-storage-daemon",
        "--blockdev",
        ",".join(f"{key}={value}" for key, value in options.items()),
        "--export",
        f"vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={path},"
        f"writable=on,num-queues={queues}",
    ]
    # A sanitizer that is preloaded into our own processes is not for QEMU's.
    daemon = Daemon(command, directory, env={"LD_PRELOAD": ""}, owns_directory=True)
    daemon.wait_socket(str(path))
    return daemon


def vhostblk(
    *arguments: str,
    files: Mapping[str, int] | None = None,
    env: Mapping[str, str] | None = None,
) -> Daemon:
    """`vhostblk serve` with these arguments, ready. `{dir}` stands for its directory.

    `files` are made there first, sparse, of so many bytes.
    """
    directory = _directory()
    for name, size in (files or {}).items():
        with open(directory / name, "wb") as file:
            file.truncate(size)
    command = [sys.executable, "-m", "vhostblk", "serve"]
    command += [argument.replace("{dir}", str(directory)) for argument in arguments]
    return Daemon(command, directory, env=env, owns_directory=True).when_ready()


class Qmp:
    """Just enough of a QMP client: one command at a time, events skipped."""

    def __init__(self, path: str, timeout: float = 30) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self.sock.connect(path)
        self.file = self.sock.makefile("rwb")
        self._receive()
        self.command("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        self.sock.close()

    def _receive(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the control socket was closed"
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str, **arguments: Any) -> Any:
        message: dict[str, Any] = {"execute": name}
        if arguments:
            message["arguments"] = arguments
        self.file.write(json.dumps(message).encode() + b"\n")
        self.file.flush()
        while True:
            reply = self._receive()
            if "error" in reply:
                raise AssertionError(f"{name}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]
