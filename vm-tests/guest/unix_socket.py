# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection to a Unix socket that somebody is about to listen on."""

from __future__ import annotations

import socket
from pathlib import Path

from .process import wait_until


def connected(path: Path, what: str, timeout: float) -> socket.socket:
    """Wait for a listener; `what` it is, for the message if there never is one."""

    def connect() -> socket.socket | None:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            return None
        return client

    return wait_until(connect, f"{what} on {path}", timeout)
