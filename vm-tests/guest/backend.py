# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend under test: one `vhostblk serve` process with its control socket."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .process import Process, wait_until
from .qmp import QmpClient
from .workspace import Workspace

READY = re.compile(r"^vhostblk: ready", re.MULTILINE)
START_SECONDS = 20
STOP_SECONDS = 20


class BackendError(Exception):
    """The backend did not do what an operator may expect of it."""


def vhostblk_command() -> list[str]:
    """The command beside this interpreter; $VHOSTBLK replaces it (a wrapper, another build)."""
    if "VHOSTBLK" in os.environ:
        return shlex.split(os.environ["VHOSTBLK"])
    beside = Path(sys.executable).with_name("vhostblk")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "vhostblk"]


class Backend:
    """`vhostblk serve` with options that stay the same over any number of starts."""

    def __init__(self, workspace: Workspace, options: Sequence[str], *, name: str = "backend"):
        self.name = name
        self.options = list(options)
        self.control_path = workspace.path / f"{name}.qmp"
        self._log = workspace.path / f"{name}.log"
        self._process: Process | None = None
        self._qmp: QmpClient | None = None

    @property
    def process(self) -> Process:
        if self._process is None:
            raise BackendError(f"{self.name} is not running")
        return self._process

    @property
    def qmp(self) -> QmpClient:
        """A client of the running backend's control socket."""
        if self._qmp is None:
            self._qmp = QmpClient(self.control_path)
        return self._qmp

    def start(self, *, fault: str | None = None) -> None:
        """Start, and wait until every export listens.

        It dies at `fault` (vhostblk/fault.py), as if killed.
        """
        argv = [*vhostblk_command(), "serve", "--control", str(self.control_path), *self.options]
        if fault is not None:
            argv = ["env", f"VHOSTBLK_FAULT={fault}", *argv]
        process = Process(argv, self._log, name=self.name)
        self._process = process

        def ready() -> bool:
            process.check_alive()
            return READY.search(process.output()) is not None

        wait_until(ready, f"{self.name} to be ready", START_SECONDS)

    def _forget_client(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def kill(self) -> None:
        """kill -9, as a crash or the kernel's out-of-memory killer would."""
        self.process.check_alive()
        self.process.kill()
        self._forget_client()

    def wait_killed(self) -> None:
        """Wait until it has died at the fault that start() was told."""
        status = self.process.wait(STOP_SECONDS)
        self._forget_client()
        if status != -signal.SIGKILL:
            raise BackendError(f"{self.name} ended with status {status} instead of a signal")

    def terminate(self) -> None:
        """SIGTERM; the backend must end cleanly and in time."""
        self.process.check_alive()
        self.process.send_signal(signal.SIGTERM)
        self._expect_clean_end("SIGTERM")

    def quit(self) -> None:
        """The control socket's `quit`."""
        self.qmp.command("quit")
        self._expect_clean_end("quit")

    def _expect_clean_end(self, cause: str) -> None:
        status = self.process.wait(STOP_SECONDS)
        self._forget_client()
        if status != 0:
            raise BackendError(
                f"{self.name} ended with status {status} after {cause}:"
                f"\n{self.process.output()[-2000:]}"
            )

    def close(self) -> None:
        """End it whatever its state; for clean-up only."""
        self._forget_client()
        if self._process is not None:
            self._process.kill()
            self._process = None

    def export(self, id: str) -> dict[str, Any]:
        """One entry of query-block-exports."""
        for entry in self.qmp.command("query-block-exports"):
            if entry["id"] == id:
                found: dict[str, Any] = entry
                return found
        raise BackendError(f"query-block-exports knows no export {id}")

    def blockstats(self, node_name: str) -> dict[str, Any]:
        """The `stats` member of query-blockstats for one node."""
        for entry in self.qmp.command("query-blockstats", {"query-nodes": True}):
            if entry.get("node-name") == node_name:
                stats: dict[str, Any] = entry["stats"]
                return stats
        raise BackendError(f"query-blockstats knows no node {node_name}")
