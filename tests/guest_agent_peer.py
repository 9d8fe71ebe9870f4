# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest agent for tests: speaks qemu-ga's protocol, and misbehaves when told to.

As qemu-ga: a byte 0xFF throws away half a message; the answer to
guest-sync-delimited begins with 0xFF; while file systems are frozen only thawing, their
status and synchronizing are possible; one client at a time, one command at a time.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

_WHILE_FROZEN = ("guest-fsfreeze-thaw", "guest-fsfreeze-status", "guest-sync-delimited")


class GuestAgentPeer:
    """An agent on a Unix socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.frozen = False
        self.commands: list[str] = []
        self.freeze_seconds = 0.0
        self.hang_up_after: list[str] = []
        """Commands after which the connection is closed without an answer, each once."""
        self.refuse: str | None = None
        """What to answer to a freeze instead of doing it."""
        self.noise = b""
        """Sent to each client before anything else."""
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> GuestAgentPeer:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._turn:
                writer.write(self.noise)
                while line := await reader.readline():
                    message = json.loads(line.rpartition(b"\xff")[2])
                    answer = await self._execute(message)
                    if message["execute"] in self.hang_up_after:
                        self.hang_up_after.remove(message["execute"])
                        return
                    prefix = b"\xff" if message["execute"] == "guest-sync-delimited" else b""
                    writer.write(prefix + json.dumps(answer).encode() + b"\n")
        except OSError:
            pass  # the client has hung up
        finally:
            writer.close()

    async def _execute(self, message: dict[str, Any]) -> dict[str, Any]:
        name = message["execute"]
        self.commands.append(name)
        if self.frozen and name not in _WHILE_FROZEN:
            return _error(f"Command {name} has been disabled: the agent is in frozen state")
        if name == "guest-sync-delimited":
            return {"return": message["arguments"]["id"]}
        if name == "guest-fsfreeze-freeze":
            await asyncio.sleep(self.freeze_seconds)
            if self.refuse is not None:
                return _error(self.refuse)
            self.frozen = True
            return {"return": 2}
        if name == "guest-fsfreeze-thaw":
            count, self.frozen = 2 * self.frozen, False
            return {"return": count}
        return _error(f"The command {name} has not been found")

    def count(self, name: str) -> int:
        return self.commands.count(f"guest-fsfreeze-{name}")


def _error(text: str) -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": text}}
