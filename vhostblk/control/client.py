# SPDX-License-Identifier: GPL-2.0-or-later
"""A small blocking client of the control socket, for the command line."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from types import TracebackType
from typing import Any, Self

from vhostblk.schema import VhostblkError

# A backend greets as soon as it accepts.
_GREETING_SECONDS = 5.0


class NotRunning(VhostblkError):
    """Nobody answers at this socket."""


class Refused(VhostblkError):
    """The backend answered a command with an error."""


class ControlClient:
    """A connection to a control socket; `timeout` seconds for every answer."""

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self._timeout = timeout
        self._deadline = 0.0
        self._lines = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(os.fsencode(path))
        except (ConnectionRefusedError, FileNotFoundError):
            self._socket.close()
            raise NotRunning(f"No backend answers at '{path}'; is it running?") from None
        except PermissionError:
            self._socket.close()
            raise NotRunning(
                f"Cannot connect to '{path}': Permission denied; ask as its user, or start the "
                "backend with --control-group"
            ) from None
        except OSError as error:
            self._socket.close()
            raise NotRunning(f"Cannot connect to '{path}': {error.strerror}") from None
        greeting = self._greeting()
        if not isinstance(greeting.get("QMP"), dict):
            raise NotRunning(f"'{path}' is not a control socket")
        self.greeting: dict[str, Any] = greeting["QMP"]
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _greeting(self) -> dict[str, Any]:
        """A control socket speaks first, and at once; elsewhere that is the caller's turn."""
        wait = min(self._timeout, _GREETING_SECONDS)
        self._deadline = time.monotonic() + wait
        try:
            return self._receive()
        except TimeoutError:
            self._socket.close()
            raise TimeoutError(
                f"'{self.path}' said nothing within {wait:g} s: the backend is stuck, or this is "
                "not its control socket but an export's, which is QEMU's"
            ) from None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    @property
    def peer_pid(self) -> int:
        """Process at the other end."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(raw[:4], sys.byteorder)

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command; its result, or `Refused`."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self._deadline = time.monotonic() + self._timeout
        try:
            self._socket.sendall(json.dumps(request).encode())
        except OSError as error:
            raise NotRunning(f"The backend at '{self.path}' has gone: {error.strerror}") from None
        while True:
            answer = self._receive()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                refusal = answer["error"]
                raise Refused(
                    str(refusal.get("desc")),
                    error_class=str(refusal.get("class", "GenericError")),
                    data=refusal.get("data"),
                )
            elif "return" in answer:
                return answer["return"]

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._lines:
            try:
                self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise TimeoutError(
                    f"The backend at '{self.path}' did not answer within {self._timeout:g} s"
                ) from None
            except OSError as error:
                raise NotRunning(
                    f"The backend at '{self.path}' has gone: {error.strerror}"
                ) from None
            if not data:
                raise NotRunning(f"The backend at '{self.path}' closed the connection")
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise NotRunning(f"'{self.path}' is not a control socket")
        return message
