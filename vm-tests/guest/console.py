# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's serial port: a shell that runs one line at a time.

The other end is scripts/guest/vmtest-shell, which also describes the protocol.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from .unix_socket import connected

# Not only at the beginning of a line: others write to this port too while the guest boots.
READY = re.compile(rb"VMTEST-READY\r?\n")
EXIT = re.compile(rb"\r?\nVMTEST-EXIT (\d+)\r?\n")


class ConsoleError(Exception):
    """The guest said something unexpected, nothing at all, or a command failed."""


@dataclass(frozen=True)
class Result:
    """What a command printed (both streams) and its exit status."""

    command: str
    output: str
    status: int


class Console:
    """A connection to the serial port of one guest."""

    def __init__(self, path: Path, timeout: float = 20) -> None:
        self._buffer = b""
        self._socket = connected(path, "the serial port", timeout)

    def close(self) -> None:
        self._socket.close()

    def wait_for(self, pattern: re.Pattern[bytes], timeout: float) -> tuple[re.Match[bytes], bytes]:
        """Read up to the pattern: the match, and what came before it."""
        deadline = time.monotonic() + timeout
        while True:
            match = pattern.search(self._buffer)
            if match:
                before = self._buffer[: match.start()]
                self._buffer = self._buffer[match.end() :]
                return match, before
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConsoleError(
                    f"the guest's serial port did not show {pattern.pattern!r} within"
                    f" {timeout:g} s; it showed {self._buffer[-800:]!r}"
                )
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise ConsoleError(
                    f"the guest is gone; its serial port ended with {self._buffer[-800:]!r}"
                )
            self._buffer += data

    def wait_ready(self, timeout: float) -> None:
        """Wait for the shell's greeting."""
        self.wait_for(READY, timeout)

    def send(self, command: str, timeout: float = 20) -> None:
        """Type one line; for a command that has no answer, such as a reboot."""
        if "\n" in command:
            raise ValueError(f"a command is one line: {command!r}")
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(command.encode() + b"\n")
        except OSError as error:
            raise ConsoleError(f"cannot write to the guest's serial port: {error}") from error

    def run(self, command: str, timeout: float) -> Result:
        """Run one line in the guest's shell and wait for its end."""
        self.send(command, timeout)
        try:
            match, before = self.wait_for(EXIT, timeout)
        except ConsoleError as error:
            raise ConsoleError(f"{command}: {error}") from error
        text = before.decode(errors="replace").replace("\r\n", "\n")
        return Result(command, text, int(match.group(1)))
