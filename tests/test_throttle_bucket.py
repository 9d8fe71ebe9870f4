# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's leaky buckets, with a clock of our own, against QEMU's arithmetic."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from compiled import loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from thoroughness import tries

ENGINE = Path(__file__).resolve().parent.parent / "cffi_build" / "engine"
TICKS = 64 * 10**9  # a second


class Limit(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("avg", "max", "burst_length")]


class Model:
    """util/throttle.c of QEMU, in seconds: levels that leak."""

    def __init__(self) -> None:
        self.limit = (0, 0, 1)
        self.level = self.burst = 0.0

    def set(self, limit: tuple[int, int, int]) -> None:
        """Not QEMU's, which forgets its levels: they stay, but what was permitted is no debt."""
        old, new = _sizes(self.limit), _sizes(limit)
        self.level, self.burst = (
            min(level, before, after) + max(0.0, level - before)
            for level, before, after in zip((self.level, self.burst), old, new, strict=True)
        )
        if self.limit[2] == 1 or limit[2] == 1:
            self.burst = 0.0
        self.limit = limit

    def leak(self, seconds: float) -> None:
        avg, most, _ = self.limit
        self.level = max(0.0, self.level - avg * seconds)
        self.burst = max(0.0, self.burst - most * seconds)

    def wait(self) -> float:
        avg, most, length = self.limit
        if not avg:
            return 0.0
        size = most * length if most else avg / 10
        if self.level > size:
            return (self.level - size) / avg
        if length > 1 and self.burst > most / 10:
            return (self.burst - most / 10) / most
        return 0.0

    def account(self, units: float) -> None:
        avg, _, length = self.limit
        if avg:
            self.level += units
            self.burst += units if length > 1 else 0


def _sizes(limit: tuple[int, int, int]) -> tuple[float, float]:
    avg, most, length = limit
    return (most * length if most else avg / 10), most / 10


class Bucket:
    """The engine's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._memory = (ctypes.c_uint64 * 6)()
        self.now = 0

    def set(self, limit: tuple[int, int, int]) -> None:
        self._library.vb_bucket_set(self._memory, ctypes.c_uint64(self.now), Limit(*limit))

    def wait(self) -> float:
        return int(self._library.vb_bucket_wait(self._memory, ctypes.c_uint64(self.now))) / TICKS

    def account(self, units: float) -> None:
        self._library.vb_bucket_account(
            self._memory, ctypes.c_uint64(self.now), ctypes.c_double(units)
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    nodes = ENGINE / "nodes"
    sources = [nodes / "throttle_bucket.c", Path(__file__).with_name("c") / "throttle_race.c"]
    directory = tmp_path_factory.mktemp("bucket")
    library = loaded(directory, sources, "-pthread", f"-I{nodes}")
    library.vb_bucket_wait.restype = ctypes.c_uint64
    library.vb_bucket_account.restype = library.vb_bucket_set.restype = None
    return library


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, int, int]:
    avg = draw(st.sampled_from([10, 100, 5000, 100_000, 10**6, 10**8]))
    if draw(st.booleans()):
        return avg, 0, 1
    return avg, avg * draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 60]))


@settings(max_examples=tries(300), deadline=None)
@given(
    first=limits(),
    second=limits(),
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300)), max_size=40),
    keep=st.booleans(),
)
def test_against_a_model(
    library: ctypes.CDLL,
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    steps: list[tuple[float, int]],
    keep: bool,
) -> None:
    """The same waits as QEMU's; and where limits change, levels stay, unlike QEMU's."""
    bucket, model = Bucket(library), Model()
    bucket.set(first)
    model.limit = first
    tick = 1 / TICKS  # what a request's rounding is worth, in seconds
    for number, (pause, percent) in enumerate(steps):
        if number == len(steps) // 2 and not keep:
            bucket.set(second)
            model.set(second)
            tick = max(tick, max(first[:2]) / second[0] / TICKS)
        tolerance = 1e-6 + (number + 1) * tick
        ticks = int(pause * TICKS)
        bucket.now += ticks
        model.leak(ticks / TICKS)
        # Whoever has to wait does: for the bucket, and then for the burst.
        while (wanted := model.wait()) > tolerance:
            assert bucket.wait() == pytest.approx(wanted, rel=1e-6, abs=tolerance)
            ticks = round(wanted * TICKS) + 100
            bucket.now += ticks
            model.leak(ticks / TICKS)
        assert bucket.wait() == pytest.approx(0, abs=2 * tolerance)
        units = model.limit[0] * percent / 100
        bucket.account(units)
        model.account(units)


def test_a_lower_limit_does_not_punish_what_was_permitted(library: ctypes.CDLL) -> None:
    bucket = Bucket(library)
    bucket.set((1000, 20_000, 1))
    bucket.account(20_000)  # its burst
    bucket.set((10, 0, 1))
    assert bucket.wait() == 0
    bucket.account(1)  # and no second burst: the bucket is full
    assert bucket.wait() == pytest.approx(0.1)


def test_a_debt_survives_a_change(library: ctypes.CDLL) -> None:
    bucket = Bucket(library)
    bucket.set((1000, 0, 1))
    bucket.account(150)  # 50 too much
    for limit, wait in (((10, 0, 1), 5), ((10, 0, 1), 5), ((100, 0, 1), 0.41), ((10, 20, 60), 0)):
        bucket.set(limit)
        assert bucket.wait() == pytest.approx(wait)  # a larger bucket has more room


def test_no_limit(library: ctypes.CDLL) -> None:
    bucket = Bucket(library)
    bucket.account(1e15)
    assert bucket.wait() == 0
    bucket.set((1, 0, 1))
    assert bucket.wait() == 0  # what passed without a limit was not counted
    bucket.account(1000)
    assert bucket.wait() == pytest.approx(999.9)
    bucket.set((0, 0, 1))
    assert bucket.wait() == 0


def test_debts_do_not_come_round(library: ctypes.CDLL) -> None:
    """A terabyte at a byte a second, again and again, is never in the past."""
    bucket = Bucket(library)
    bucket.set((1, 0, 1))
    for _ in range(100):
        bucket.account(1e12)
        assert bucket.wait() > 10**7


@pytest.mark.parametrize("years", [1, 3, 4])
def test_limits_hold_for_years(library: ctypes.CDLL, years: int) -> None:
    """Which a backend may run on end; changed ones, too."""
    bucket = Bucket(library)
    bucket.set((1000, 0, 1))
    bucket.now += years * 366 * 86400 * TICKS
    bucket.account(150)
    assert bucket.wait() == pytest.approx(0.05)
    bucket.set((100, 0, 1))
    bucket.account(5)
    assert bucket.wait() == pytest.approx(0.55)


def test_nothing_is_counted_at_the_price_of_another_limit(library: ctypes.CDLL) -> None:
    """While threads fill a bucket, its limit changes a few million times."""
    assert library.throttle_race(3_000_000) == 0
