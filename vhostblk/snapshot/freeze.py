# SPDX-License-Identifier: GPL-2.0-or-later
"""Holding a guest's file systems still, through its agent (guest_agent.py), and letting go of them.

A freeze that was not answered in time may still happen, and a guest that is frozen stays
so whatever becomes of us. So each freeze that may have happened is followed by a thaw,
tried until it succeeds, by this process or by the next one: the state file mentions the
agent's socket *before* the agent is asked to freeze, and until it has thawed. A guest that
was not frozen does not mind being thawed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any

from vhostblk.fault import fault_point
from vhostblk.schema import VhostblkError
from vhostblk.snapshot.guest_agent import AgentError, GuestAgent

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 10
THAW_ATTEMPT = 5.0
"""Seconds for one attempt to thaw, and how long one is waited for before the answer to the
command is given; attempts go on in the background."""
THAW_INTERVAL = 0.5
PATIENT_AFTER = 60
"""So many attempts in vain, and they become rarer."""
PATIENT_INTERVAL = 10.0

Record = Callable[[], Awaitable[None]]


class FrozenGuests:
    """Guests (their agents' sockets) that this process, or the one before it, may have frozen."""

    def __init__(self, record: Record, settle: Record) -> None:
        """`record` writes them down at once, also in the middle of a change of the graph.

        `settle` does so when there is none. Neither does anything if there is no state file.
        """
        self._record = record
        self._settle = settle
        self._sockets: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._sockets))

    async def add(self, path: str) -> None:
        """About to be frozen: when this returns, the next process knows of it."""
        self._sockets[path] += 1
        try:
            await self._record()
        except BaseException:
            self.discard(path)
            raise

    def discard(self, path: str) -> None:
        """Thawed, or not frozen after all."""
        self._sockets[path] -= 1
        self._sockets += Counter()  # drops what is zero

    def thaw(self, path: str, agent: GuestAgent | None = None) -> asyncio.Task[None]:
        """Thaw a guest that was added, trying until it works, over this connection or new ones."""
        return self._begin(self._thaw(path, agent))

    def take_over(self, paths: Iterable[str]) -> None:
        """Thaw what a process that was killed may have left frozen."""
        for path in paths:
            logger.warning(
                "guest agent '%s': its file systems may be frozen since the last process ended; "
                "thawing them",
                path,
            )
            self._sockets[path] += 1
            self.thaw(path)

    def close(self) -> None:
        """Stop trying. What is not thawed is up to the next process."""
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _thaw(self, path: str, agent: GuestAgent | None) -> None:
        failures = 0
        expected = agent is not None
        while True:
            try:
                async with asyncio.timeout(THAW_ATTEMPT):
                    if agent is None:
                        agent = await GuestAgent.connect(path)
                    count = await agent.execute("guest-fsfreeze-thaw")
                break
            except (OSError, TimeoutError, AgentError) as error:
                failures += 1
                logger.debug("guest agent '%s': thaw: %s", path, error)
            finally:
                if agent is not None:
                    agent.close()
                agent = None
            await asyncio.sleep(THAW_INTERVAL if failures < PATIENT_AFTER else PATIENT_INTERVAL)
        if failures or not expected:
            logger.info("guest agent '%s': %s file systems thawed", path, count)
        self.discard(path)
        self._begin(self._settled())

    async def _settled(self) -> None:
        await self._settle()


class Freeze:
    """File systems frozen on the way in, thawed on the way out (asynchronous context)."""

    def __init__(self, path: str, timeout: float, frozen: FrozenGuests) -> None:
        self._path = path
        self._timeout = timeout
        self._frozen = frozen
        self._agent: GuestAgent | None = None
        self._begun = 0
        self.report: dict[str, Any] = {"guest-agent": path}
        """For the result: how many file systems, for how long, what went wrong with thawing."""

    async def __aenter__(self) -> None:
        asked = False
        try:
            limit = asyncio.get_running_loop().time() + self._timeout
            async with asyncio.timeout_at(limit):
                self._agent = await GuestAgent.connect(self._path)
            await self._frozen.add(self._path)  # in full: a file is being written
            asked = True
            async with asyncio.timeout_at(limit):
                self._begun = time.perf_counter_ns()
                count = await self._agent.execute("guest-fsfreeze-freeze")
            fault_point("snapshot-frozen")
        except AgentError as error:
            # Not ours to thaw, if it is frozen because somebody else wanted that.
            self._hang_up()
            if asked:
                self._frozen.discard(self._path)
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
        """Thaw; if that does not work at once, it is tried on when the caller has gone on."""
        task = self._frozen.thaw(self._path, self._agent)
        self._agent = None
        await asyncio.wait({task}, timeout=THAW_ATTEMPT + THAW_INTERVAL)
        if not task.done():
            self.report["error"] = "the guest's file systems are not thawed yet"
            logger.error(
                "guest agent '%s' does not thaw its file systems; trying on. In the guest: "
                "fsfreeze -u MOUNTPOINT",
                self._path,
            )

    def _hang_up(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _error(self, text: str, hint: str | None = None) -> VhostblkError:
        data = {"code": "guest-agent", "path": self._path}
        text = f"Guest agent '{self._path}': {text}; no snapshot was made"
        if hint is not None:
            data["hint"] = hint
            text = f"{text}; {hint}"
        return VhostblkError(text, data=data)
