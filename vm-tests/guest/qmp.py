# SPDX-License-Identifier: GPL-2.0-or-later
"""A small synchronous QMP client, for QEMU's monitor and for vhostblk's control socket.

The asynchronous client of the qemu.qmp package judges our server in the tests that need no VM.
Here commands and events must interleave with what happens on a serial console, which is simpler
to read without coroutines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .unix_socket import connected

Event = dict[str, Any]


class QmpError(Exception):
    """The peer answered a command with an error, or hung up."""

    def __init__(self, message: str, error_class: str = "") -> None:
        super().__init__(message)
        self.error_class = error_class


class QmpClient:
    """A connection in command mode."""

    def __init__(self, path: Path, timeout: float = 20) -> None:
        self.path = path
        self.events: list[Event] = []
        self._buffer = ""
        self._decoder = json.JSONDecoder()
        self._socket = connected(path, "a listener", timeout)
        greeting = self._message(timeout)
        if "QMP" not in greeting:
            raise QmpError(f"{path}: no QMP greeting but {greeting}")
        self.command("qmp_capabilities")

    def close(self) -> None:
        self._socket.close()

    def _message(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                try:
                    value, end = self._decoder.raw_decode(self._buffer)
                except ValueError:
                    pass  # not all of it has arrived
                else:
                    self._buffer = self._buffer[end:]
                    if not isinstance(value, dict):
                        raise QmpError(f"{self.path}: {value!r} is no QMP message")
                    return value
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.path}: no message within {timeout:g} s")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise QmpError(f"{self.path}: the peer hung up")
            self._buffer += data.decode()

    def command(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 30
    ) -> Any:
        """Execute a command and return what it returns; events that arrive meanwhile are kept."""
        request: dict[str, Any] = {"execute": name}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            raise QmpError(f"{self.path}: the peer hung up") from None
        deadline = time.monotonic() + timeout
        while True:
            message = self._message(max(0.001, deadline - time.monotonic()))
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                error = message["error"]
                raise QmpError(f"{name}: {error['desc']}", error["class"])
            else:
                return message["return"]

    def wait_event(
        self,
        name: str,
        timeout: float = 30,
        *,
        where: Callable[[Mapping[str, Any]], bool] = lambda data: True,
    ) -> Event:
        """The first event `name` whose data satisfies `where`; it and older ones are forgotten."""
        deadline = time.monotonic() + timeout
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and where(event.get("data", {})):
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.path}: no event {name} within {timeout:g} s")
            self.events.append(self._message(left))
