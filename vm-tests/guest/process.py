# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that cannot outlive the test run, and waiting for conditions."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02


class ProcessError(Exception):
    """A process did not start, ended too early, or did not end."""


def wait_until(
    condition: Callable[[], T | None], what: str, timeout: float, *, every: float = POLL_SECONDS
) -> T:
    """Call `condition` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        # The clock is read first: a pause of this process must not become the condition's fault.
        late = time.monotonic() >= deadline
        result = condition()
        if result:
            return result
        if late:
            raise TimeoutError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(every)


class Process:
    """One child process whose output goes to a log file."""

    def __init__(self, argv: Sequence[str], log: Path, *, name: str) -> None:
        self.argv = list(argv)
        self.log = log
        self.name = name
        # What an earlier process of the same name wrote is none of ours.
        self.log_start = log.stat().st_size if log.exists() else 0
        # If the test run is killed, the kernel kills its children too.
        guard = [shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL", "--"]
        with log.open("ab") as output:
            try:
                self._popen = subprocess.Popen(
                    [*guard, *self.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                raise ProcessError(f"cannot start {name}: {error}") from error

    @property
    def pid(self) -> int:
        return self._popen.pid

    def alive(self) -> bool:
        return self._popen.poll() is None

    def output(self) -> str:
        """What this process has written so far."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")

    def check_alive(self) -> None:
        if not self.alive():
            raise ProcessError(
                f"{self.name} ended with status {self._popen.returncode}:\n{self.output()[-2000:]}"
            )

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Wait for the end; the exit status as subprocess gives it."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"{self.name} has not ended within {timeout:g} s") from None

    def kill(self) -> None:
        """End it now; ended already is fine."""
        if self.alive():
            self._popen.kill()
        self._popen.wait(30)
