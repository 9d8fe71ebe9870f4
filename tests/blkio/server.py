# SPDX-License-Identifier: GPL-2.0-or-later
"""A backend process over a stack of block nodes: vhostblk, or the program it is compared with.

With VHOSTBLK_TEST_JUDGE=qemu-storage-daemon in the environment the data tests judge that program
instead, which shows whether a failure is the test's own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fresh_process
import pytest

from blkio.library import plain_environment

JUDGE = os.environ.get("VHOSTBLK_TEST_JUDGE", "vhostblk")
START_SECONDS = 30
STOP_SECONDS = 15

needs_vhostblk = pytest.mark.skipif(
    JUDGE != "vhostblk", reason="only vhostblk does this, or does it this way"
)


class Server:
    """Serves the node called `disk` on `path`; may be killed and started again."""

    def __init__(
        self,
        directory: Path,
        nodes: Sequence[str],
        *,
        queues: int = 1,
        objects: Sequence[str] = (),
        iothread: str | Sequence[str] = "",
        plugins: Sequence[Path] = (),
        writable: bool = True,
    ) -> None:
        self.path = directory / "disk.sock"
        self.log = directory / "backend.log"
        self.process: subprocess.Popen[bytes] | None = None
        if JUDGE == "vhostblk":
            command = [sys.executable, "-m", "vhostblk", "serve", "--control", "none"]
        else:
            command = [JUDGE]
        for plugin in plugins:
            command += ["--plugin", str(plugin)]
        for one in objects:
            command += ["--object", one]
        for node in nodes:
            command += ["--blockdev", node]
        export = f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={self.path}"
        export += f",writable={'on' if writable else 'off'},num-queues={queues}"
        if isinstance(iothread, str):
            export += f",iothread={iothread}" if iothread else ""
        else:
            export += "".join(f",iothread.{i}={name}" for i, name in enumerate(iothread))
        self.command = [*command, "--export", export]

    def start(self) -> Server:
        """Start and wait until the socket accepts."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        self.path.unlink(missing_ok=True)  # QEMU's program leaves it behind if it is killed
        with self.log.open("ab") as log:
            self.process = fresh_process.Popen(
                self.command,
                env=None if JUDGE == "vhostblk" else plain_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"{' '.join(self.command)}\n{self.said}")
            time.sleep(0.01)
        return self

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.path))
            except OSError:
                return False
        return True

    @property
    def said(self) -> str:
        """Everything on its standard output and error."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def stop(self) -> int | None:
        """SIGTERM; its exit status."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not end within {STOP_SECONDS} s\n{self.said}") from None

    def check_alive(self) -> None:
        assert self.process is not None and self.process.poll() is None, self.said

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, *rest: object) -> None:
        died = self.process is not None and self.process.poll() is not None
        if error is not None:
            end = (
                f" has ended with status {self.process.returncode}" if died and self.process else ""
            )
            error.add_note(f"The backend{end} and said:\n{self.said[-4000:]}")
        status = self.stop()
        if kind is None and not died:
            assert status == 0, f"status {status}\n{self.said}"
