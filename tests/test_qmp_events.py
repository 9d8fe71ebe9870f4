# SPDX-License-Identifier: GPL-2.0-or-later
"""Events that can be caused at will are not sent at will."""

from __future__ import annotations

import ast
import asyncio
import time
from pathlib import Path
from typing import Any

import vhostblk
from vhostblk.control.events import EVENTS, LIMITED, RateLimiter


def collect(
    script: list[tuple[float, str, dict[str, Any]]], wait: float
) -> list[tuple[float, Any]]:
    """Emit at the given times; when and what was sent."""
    sent: list[tuple[float, Any]] = []

    async def run() -> None:
        start = time.monotonic()
        limiter = RateLimiter(lambda event: sent.append((time.monotonic() - start, event["n"])))
        for number, (at, name, data) in enumerate(script):
            await asyncio.sleep(max(0.0, at - (time.monotonic() - start)))
            limiter.emit(name, data, {"n": number})
        await asyncio.sleep(max(0.0, wait - (time.monotonic() - start)))
        limiter.close()

    asyncio.run(run())
    return sent


def test_first_at_once_then_the_last() -> None:
    connected = "VHOSTBLK_EXPORT_CONNECTED"
    sent = collect([(0.0, connected, {"id": "a"})] * 500 + [(0.0, connected, {"id": "b"})], 3)
    assert [number for _, number in sent] == [0, 500, 499]
    assert sent[2][0] > 0.5


def test_the_last_one_told_is_the_last_that_happened() -> None:
    names = ["VHOSTBLK_EXPORT_DISCONNECTED", "VHOSTBLK_EXPORT_CONNECTED"]
    sent = collect([(0.02 * i, names[i % 2], {"id": "a"}) for i in range(20)], 1.6)
    assert [number for _, number in sent] == [0, 19]


def test_others_are_not_limited() -> None:
    sent = collect([(0.0, "BLOCK_EXPORT_DELETED", {"id": "a"})] * 50, 0.1)
    assert len(sent) == 50


def test_nothing_is_lost_at_the_end() -> None:
    sent = collect([(0.0, "VHOSTBLK_EXPORT_CONNECTED", {"id": "a"})] * 3, 0.0)
    assert [number for _, number in sent] == [0, 2]


def test_what_a_quorum_reports_is_limited_for_each_leg_and_kind() -> None:
    bad = "QUORUM_REPORT_BAD"
    reads = [(0.0, bad, {"node-name": "a", "type": "read"})] * 500
    others = [(0.0, bad, {"node-name": "a", "type": "write"}),
              (0.0, bad, {"node-name": "b", "type": "read"})]  # fmt: skip
    assert [number for _, number in collect(reads + others, 0.0)] == [0, 500, 501, 499]
    failures = [(0.0, "QUORUM_FAILURE", {"reference": "q"})] * 500
    others = [(0.0, "QUORUM_FAILURE", {"reference": "r"})]
    assert [number for _, number in collect(failures + others, 0.0)] == [0, 500, 499]


def test_every_event_is_described() -> None:
    """An event someone emits and nobody described would be missing from query-qmp-schema."""
    emitted = set()
    for path in Path(vhostblk.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "emit"
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                emitted.add(node.args[0].value)
    assert emitted == set(EVENTS)
    assert set(LIMITED) <= set(EVENTS)
