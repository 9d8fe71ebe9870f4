# SPDX-License-Identifier: GPL-2.0-or-later
"""Holding a guest's file systems still, through the socket of its guest agent.

The protocol is that of qemu-ga (QEMU, docs/interop/qemu-ga-ref: guest-sync-delimited,
guest-fsfreeze-freeze, guest-fsfreeze-thaw). What is asked of the agent may come late: a
freeze that was not answered in time may still happen. Whatever becomes of the snapshot,
a freeze that may have happened is followed by a thaw, tried until it succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from typing import Any

from vhostblk.schema import VhostblkError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 10
THAW_ATTEMPT = 5.0
"""Seconds for one attempt to thaw, and how long one is waited for before the answer to the
command is given; attempts go on in the background."""
THAW_INTERVAL = 0.5
_MAX_LINE = 1 << 20
_DELIMITER = b"\xff"

_thawing: set[asyncio.Task[None]] = set()


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


class Freeze:
    """File systems frozen on the way in, thawed on the way out (asynchronous context)."""

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._agent: GuestAgent | None = None
        self._begun = 0
        self.report: dict[str, Any] = {"guest-agent": path}
        """For the result: how many file systems, for how long, what went wrong with thawing."""

    async def __aenter__(self) -> None:
        asked = False
        try:
            async with asyncio.timeout(self._timeout):
                self._agent = await GuestAgent.connect(self._path)
                asked = True
                self._begun = time.perf_counter_ns()
                count = await self._agent.execute("guest-fsfreeze-freeze")
        except AgentError as error:
            # Not ours to thaw, if it is frozen because somebody else wanted that.
            self._hang_up()
            raise self._error(f"the agent refuses to freeze: {error}") from None
        except TimeoutError:
            await self._thaw_if(asked)
            raise self._error(
                f"no answer within {self._timeout:g} seconds",
                "see whether the agent runs in the guest and nobody else is connected to its "
                "socket, or allow more time with freeze-timeout",
            ) from None
        except OSError as error:
            await self._thaw_if(asked)
            raise self._error(error.strerror or str(error)) from None
        except BaseException:
            await self._thaw_if(asked)
            raise
        self.report["filesystems"] = count

    async def __aexit__(self, *_: object) -> None:
        await self._thaw()
        self.report["frozen-us"] = (time.perf_counter_ns() - self._begun) // 1000

    async def _thaw_if(self, asked: bool) -> None:
        if asked:
            await self._thaw()
        else:
            self._hang_up()

    async def _thaw(self) -> None:
        """Thaw; if that does not work at once, go on trying when the caller has gone on."""
        task = asyncio.create_task(self._thaw_until_it_works())
        _thawing.add(task)
        task.add_done_callback(_thawing.discard)
        await asyncio.wait({task}, timeout=THAW_ATTEMPT + THAW_INTERVAL)
        if not task.done():
            self.report["error"] = "the guest's file systems are not thawed yet"
            logger.error(
                "guest agent '%s' does not thaw its file systems; trying on. In the guest: "
                "fsfreeze -u MOUNTPOINT",
                self._path,
            )

    async def _thaw_until_it_works(self) -> None:
        failures = 0
        while True:
            try:
                async with asyncio.timeout(THAW_ATTEMPT):
                    if self._agent is None or failures:
                        self._hang_up()
                        self._agent = await GuestAgent.connect(self._path)
                    await self._agent.execute("guest-fsfreeze-thaw")
                break
            except (OSError, TimeoutError, AgentError) as error:
                failures += 1
                logger.debug("guest agent '%s': thaw: %s", self._path, error)
            await asyncio.sleep(THAW_INTERVAL)
        self._hang_up()
        if failures:
            logger.info("guest agent '%s': file systems thawed", self._path)

    def _hang_up(self) -> None:
        if self._agent is not None:
            with contextlib.suppress(OSError):
                self._agent.close()
            self._agent = None

    def _error(self, text: str, hint: str | None = None) -> VhostblkError:
        data = {"code": "guest-agent", "path": self._path}
        text = f"Guest agent '{self._path}': {text}; no snapshot was made"
        if hint is not None:
            data["hint"] = hint
            text = f"{text}; {hint}"
        return VhostblkError(text, data=data)
