# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the agent in a guest, through the socket of its channel.

The protocol is that of qemu-ga (QEMU, docs/interop/qemu-ga-ref: guest-sync-delimited).
What is asked of the agent may come late, and what somebody else asked may be answered to us.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

_MAX_LINE = 1 << 20
_DELIMITER = b"\xff"


class AgentError(Exception):
    """The agent has answered, with an error."""


class GuestAgent:
    """One connection to an agent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: str) -> GuestAgent:
        """Connect, and throw away whatever was said to somebody else before."""
        reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE)
        agent = cls(reader, writer)
        try:
            await agent._synchronize()
        except BaseException:
            agent.close()
            raise
        return agent

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    async def execute(self, command: str) -> Any:
        """Run a command without arguments; its result."""
        await self._send({"execute": command})
        return await self._answer()

    async def _synchronize(self) -> None:
        # The byte makes the agent forget half a message, and we skip to the one it sends.
        number = secrets.randbelow(1 << 31)
        self._writer.write(_DELIMITER)
        await self._send({"execute": "guest-sync-delimited", "arguments": {"id": number}})
        while True:
            await self._skip_to_delimiter()
            if await self._answer() == number:
                return

    async def _skip_to_delimiter(self) -> None:
        while True:
            byte = await self._reader.read(1)
            if not byte:
                raise ConnectionResetError(None, "the agent's socket was closed")
            if byte == _DELIMITER:
                return

    async def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        await self._writer.drain()

    async def _answer(self) -> Any:
        try:
            line = await self._reader.readline()
        except ValueError:
            raise ConnectionResetError(None, "the agent's answer is too long") from None
        if not line.endswith(b"\n"):
            raise ConnectionResetError(None, "the agent's socket was closed")
        try:
            answer = json.loads(line.strip(_DELIMITER))
        except ValueError:
            raise ConnectionResetError(None, "the agent's answer is not JSON") from None
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            raise AgentError(str(answer["error"].get("desc", "unknown error")))
        if not isinstance(answer, dict) or "return" not in answer:
            raise ConnectionResetError(None, "the agent's answer has no result")
        return answer["return"]
