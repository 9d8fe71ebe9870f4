# SPDX-License-Identifier: GPL-2.0-or-later
"""A backend as its users start it: a process, with its sockets in a directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import fresh_process

START_SECONDS = 30
STOP_SECONDS = 15


class BackendProcess:
    """`vhostblk serve` with these arguments; `{dir}` in one stands for the directory."""

    def __init__(self, directory: Path, *arguments: str, command: str = "serve") -> None:
        self.directory = directory
        self.log: list[str] = []
        self._ready = threading.Event()
        self.process = fresh_process.Popen(
            [
                *fresh_process.COMMAND,
                command,
                *(argument.replace("{dir}", str(directory)) for argument in arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"VHOSTBLK_RUNTIME_DIR": str(directory)},
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if line.startswith("vhostblk: ready"):
                self._ready.set()
        self._ready.set()

    def wait_ready(self) -> None:
        """Until every export listens."""
        assert self._ready.wait(START_SECONDS), self.log
        assert any(line.startswith("vhostblk: ready") for line in self.log), self.log

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(STOP_SECONDS)
        self._reader.join()
        return status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.wait()

    def close(self) -> None:
        """End it whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
