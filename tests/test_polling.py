# SPDX-License-Identifier: GPL-2.0-or-later
"""How long an I/O thread spins before it sleeps: QEMU's rules, seen in query-iothreads.
And the control thread, before it goes back to its event loop.

A machine with other things to do makes every gap between two requests longer than it was meant to
be. So the bounds here are far from it on one side, and tests wait for a state, not for a time.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from compiled import loaded
from in_process import Guest, Host, with_host

HERE = Path(__file__).parent
ENGINE = HERE.parent / "cffi_build" / "engine"
SECOND = 10**9
FIRST = 4000  # what a spin of nothing grows to
SECONDS = 30


class Polling:
    """A disk whose requests come from one guest, and the thread that serves it."""

    def __init__(self, host: Host, guest: Guest) -> None:
        self.host = host
        self.guest = guest

    @property
    def now(self) -> dict[str, Any]:
        """The thread, as an operator sees it."""
        threads = self.host.backend.query_iothreads()
        return next(thread for thread in threads if thread["id"] == "io")

    @property
    def ns(self) -> int:
        value: int = self.now["poll-ns"]
        return value

    async def set(self, name: str, value: int) -> None:
        await self.host.backend.qom_set("/objects/io", name, value)

    async def seen(self, condition: Callable[[int], bool], gap: float = 0.001) -> set[int]:
        """Sparse requests until `condition` holds for poll-ns; the values it had."""
        seen = {ns := self.ns}
        async with asyncio.timeout(SECONDS):
            while not condition(ns):
                await self.guest.read(0, 512)
                await asyncio.sleep(gap)
                seen.add(ns := self.ns)
        return seen

    async def sleeps(self, before: dict[str, Any]) -> None:
        """Wait until the thread has gone to sleep once more than `before`."""
        await self.host.until(lambda: bool(self.now["sleeps"] > before["sleeps"]), SECONDS)


@asynccontextmanager
async def polling(host: Host, **options: int) -> AsyncIterator[Polling]:
    given = {key.replace("_", "-"): value for key, value in options.items()}
    await host.backend.object_add({"qom-type": "iothread", "id": "io", **given})
    await host.null()
    await host.export("null", iothread="io")
    async with host.device() as guest:
        yield Polling(host, guest)


def test_it_grows_as_long_as_spinning_more_would_have_helped() -> None:
    async def test(host: Host) -> None:
        async with polling(host, poll_max_ns=SECOND) as thread:
            seen = await thread.seen(lambda ns: ns > 100 * FIRST)
            # None at the beginning, and again if the machine made a pause.
            assert seen <= {0, *(FIRST << doubled for doubled in range(8))}
            await thread.set("poll-grow", 10)
            seen = await thread.seen(lambda ns: ns > 1000 * FIRST, gap=0.01)
            assert max(seen) % (10 * FIRST) == 0

    with_host(test)


def test_it_is_never_longer_than_the_maximum() -> None:
    async def test(host: Host) -> None:
        async with polling(host, poll_max_ns=SECOND, poll_grow=SECOND) as thread:
            seen = await thread.seen(lambda ns: ns > FIRST)
            assert seen <= {0, FIRST, SECOND}
            # A lower one counts at once, without a request.
            await thread.set("poll-max-ns", 10 * FIRST)
            assert thread.ns == 10 * FIRST

    with_host(test)


def test_it_shrinks_when_it_was_in_vain() -> None:
    async def test(host: Host) -> None:
        async with polling(host, poll_max_ns=SECOND, poll_grow=SECOND) as thread:
            await thread.seen(lambda ns: ns == SECOND)
            await thread.set("poll-max-ns", 16 * FIRST)
            await thread.set("poll-shrink", 4)
            seen = await thread.seen(lambda ns: ns == 0, gap=0.005)
            assert seen <= {16 * FIRST // 4**times for times in range(9)}
            assert len(seen) > 2

            await thread.set("poll-max-ns", SECOND)
            await thread.seen(lambda ns: ns == SECOND)
            await thread.set("poll-max-ns", 16 * FIRST)
            await thread.set("poll-shrink", 0)
            assert await thread.seen(lambda ns: ns == 0, gap=0.005) == {16 * FIRST, 0}

    with_host(test)


def test_none_at_all_counts_at_once() -> None:
    async def test(host: Host) -> None:
        # So long that it would not end before the test does.
        async with polling(host, poll_max_ns=100 * SECOND, poll_grow=100 * SECOND) as thread:
            await thread.seen(lambda ns: ns == 100 * SECOND)
            await thread.guest.read(0, 512)
            before = thread.now
            await host.until(lambda: thread.now["loops"] > before["loops"] + 1000)
            assert thread.now["sleeps"] == before["sleeps"], "it should spin"
            await thread.set("poll-max-ns", 0)
            assert thread.ns == 0
            await thread.sleeps(before)
            for _ in range(10):
                before = thread.now
                await thread.guest.read(0, 512)
                await thread.sleeps(before)
                assert thread.ns == 0

    with_host(test)


# ---- the control thread


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ctypes.CDLL]:
    """The engine's control side with a clock of its own."""
    sources = [*(ENGINE / name for name in ("engine.c", "mailbox.c")), HERE / "c/control_poll.c"]
    library = loaded(tmp_path, sources, "-D_GNU_SOURCE", f"-I{ENGINE}")
    library.one_message.argtypes = [ctypes.c_uint64]
    library.no_message.restype = ctypes.c_uint64
    library.start()
    yield library
    library.stop()


def test_the_control_thread_spins_for_what_comes_soon(control: ctypes.CDLL) -> None:
    waited = [control.one_message(20_000) for _ in range(20)]
    assert waited == [0] * waited.index(1) + [1] * (20 - waited.index(1))
    assert control.no_message() <= 34_000


def test_the_control_thread_does_not_spin_for_what_comes_late(control: ctypes.CDLL) -> None:
    assert [control.one_message(20_000) for _ in range(20)][-1] == 1
    assert control.one_message(1_000_000) == 0
    assert control.no_message() <= 3000
    assert [control.one_message(1_000_000) for _ in range(5)] == [0] * 5
