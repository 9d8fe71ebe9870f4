# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the content of a disk is that of one moment of programs/stamp.c.

Each thread makes one write after the other, in an order known here, too. So a disk of one moment
holds, for each thread, exactly its first so many writes; and what a write's stamp says had been
completed when it began must be there, whichever thread it is of.
"""

from __future__ import annotations

import itertools
import re
import struct
from dataclasses import dataclass, field

from .vm import Guest

THREADS = 8
BLOCK = 4096
MAGIC = 0x3153504D41545356
UNIT = struct.Struct(f"<4Q{THREADS}Q4Q")
MASK = (1 << 64) - 1

_numbers = itertools.count(1)


class NotOneMomentError(AssertionError):
    """A disk that never was like this."""


def place(thread: int, sequence: int, blocks_each: int) -> int:
    """Which of its blocks a thread writes with its write number `sequence`."""
    x = (sequence * THREADS + thread) * 0x9E3779B97F4A7C15 & MASK
    x ^= x >> 29
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 32
    return x % blocks_each


@dataclass
class Timeline:
    """Judges the disk of one moment after the other."""

    blocks: int
    counts: list[int] = field(default_factory=lambda: [0] * THREADS)
    """Of each thread, how many writes the last moment had."""

    def __post_init__(self) -> None:
        self._last = [[0] * (self.blocks // THREADS) for _ in range(THREADS)]

    def judge(self, content: bytes, what: str) -> list[int]:
        """The writes of each thread that are in it, which are no fewer than the last time."""
        found = [[0] * (self.blocks // THREADS) for _ in range(THREADS)]
        known = [0] * THREADS  # had completed, as stamps say
        for block in range(self.blocks):
            data = content[block * BLOCK : (block + 1) * BLOCK]
            unit = data[: UNIT.size]
            if data != unit * (BLOCK // UNIT.size):
                raise NotOneMomentError(f"{what}: block {block} is torn")
            magic, thread, sequence, number, *rest = UNIT.unpack(unit)
            if unit == bytes(UNIT.size):
                continue
            if (magic, thread, number) != (MAGIC, block % THREADS, block):
                raise NotOneMomentError(
                    f"{what}: block {block} holds thread {thread}'s block {number} ({magic:#x})"
                )
            found[thread][block // THREADS] = sequence
            known = [max(pair) for pair in zip(known, rest[:THREADS], strict=True)]
        for thread in range(THREADS):
            self._judge_thread(thread, found[thread], known[thread], what)
        return list(self.counts)

    def _judge_thread(self, thread: int, found: list[int], known: int, what: str) -> None:
        count = max(found)
        if count < self.counts[thread] or count < known:
            raise NotOneMomentError(
                f"{what}: thread {thread} has {count} writes; {self.counts[thread]} were there"
                f" before, and others saw {known} complete"
            )
        last = self._last[thread]
        for sequence in range(self.counts[thread] + 1, count + 1):
            last[place(thread, sequence, len(last))] = sequence
        self.counts[thread] = count
        if last != found:
            index = next(i for i in range(len(last)) if last[i] != found[i])
            raise NotOneMomentError(
                f"{what}: thread {thread}, {count} writes: block {index * THREADS + thread} holds"
                f" write {found[index]} instead of {last[index]}"
            )


@dataclass(frozen=True)
class Summary:
    """What the program has printed at its end."""

    requests: int
    longest_us: int
    writes: list[int]


class Stamper:
    """The program at work in a guest, on a device, a file or a directory."""

    def __init__(self, guest: Guest, program: str, target: str, blocks: int) -> None:
        self._guest = guest
        number = next(_numbers)
        self._stop, self._output, self._counts = (
            f"/tmp/stamp{number}.{what}" for what in ("stop", "out", "counts")
        )
        command = f"{program} {target} {self._stop} {blocks} {self._counts} >{self._output} 2>&1"
        self._job = guest.spawn(f"{command} || {{ cat {self._output}; exit 1; }}")

    def check_running(self) -> None:
        """It ends on its own only when it has found something wrong."""
        status = self._job.status()
        if status is not None:
            raise AssertionError(self._guest.check(f"cat {self._output}"))

    def counts(self) -> list[int]:
        """How many writes of each thread have completed by now. Each has one more under way."""
        text = self._guest.check(f"od -A n -v -t u8 {self._counts}")
        return [int(word) for word in text.split()]

    def finish(self, timeout: float = 60) -> Summary:
        """Stop and verify everything."""
        self._guest.check(f"touch {self._stop}")
        self._job.check(timeout)
        text = self._guest.check(f"cat {self._output}")
        match = re.search(r"(\d+) requests, longest (\d+) us; writes((?: \d+)+)", text)
        if match is None:
            raise AssertionError(f"stamp has printed {text!r}")
        return Summary(int(match[1]), int(match[2]), [int(word) for word in match[3].split()])
