# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON messages out of a byte stream."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.control.jsonstream import BadMessage, JsonStream


def feed(*pieces: bytes, max_message: int = 1 << 20) -> list[Any]:
    stream = JsonStream(max_message)
    return [message for piece in pieces for message in stream.feed(piece)]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"a":1}', [{"a": 1}]),
        (b'{"a":1}{"b":[2]}\r\n {}', [{"a": 1}, {"b": [2]}, {}]),
        (b"{'a': 'it\\'s \"x\"'}", [{"a": 'it\'s "x"'}]),
        (b'{"a": "it\'s \\\'"}', [{"a": "it's '"}]),
        (b'{"a": "}{]["}', [{"a": "}{]["}]),
        (b'{"a": "\\"}"}', [{"a": '"}'}]),
        (b'{"a": "\\u00e4\\ud83d\\ude00"}', [{"a": "ä😀"}]),
        (b"[1]", [[1]]),
        (b"12 'x' true\n", [12, "x", True]),
        (b'{"a":\xff{"b":1}', [BadMessage, {"b": 1}]),
        (b'"\\\xff{"b":1}', [BadMessage, {"b": 1}]),
        (b"\xff{}", [BadMessage, {}]),
        (b"}{}", [BadMessage, {}]),
        (b"{]{}", [BadMessage, {}]),
        (b"foo {}", [BadMessage, {}]),
        (b'{"a":1,"a":2}{}', [BadMessage, {}]),
        (b'{"a": NaN}{}', [BadMessage, {}]),
        (b'{"a": "\x80"}{}', [BadMessage, {}]),
        (b'{"a": "\\ud800"}{}', [BadMessage, {}]),
        (b'{"a": "\\u0000"}{}', [BadMessage, {}]),
        (b'{"a": ' + b"9" * 5000 + b"}{}", [BadMessage, {}]),
        (b"[" * 300 + b"\xff{}", [BadMessage] * 2 + [{}]),
    ],
)
def test_messages(raw: bytes, expected: list[Any]) -> None:
    got = feed(raw)
    assert [BadMessage if isinstance(message, BadMessage) else message for message in got] == (
        expected
    )


@pytest.mark.parametrize("raw", [b'{"a":1', b'"abc', b"12", b'{"a":"\\'])
def test_incomplete(raw: bytes) -> None:
    assert feed(raw) == []


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(alphabet=st.characters(min_codepoint=1, max_codepoint=0xD7FF), max_size=8),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.text(alphabet="ab{}[]\"'\\", max_size=4), below, max_size=3)
    ),
    max_leaves=6,
)
objects = st.dictionaries(st.text(alphabet="abc\"'{", max_size=4), values, max_size=3)


@given(st.lists(objects, max_size=4), st.sampled_from([b"", b"\n", b" \r\n"]), st.data())
def test_split_anywhere(messages: list[Any], separator: bytes, data: st.DataObject) -> None:
    ascii_only = data.draw(st.booleans())
    raw = separator.join(json.dumps(m, ensure_ascii=ascii_only).encode() for m in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    ends = [0, *cuts, len(raw)]
    pieces = [raw[start:end] for start, end in itertools.pairwise(ends)]
    assert feed(*pieces) == messages
    assert feed(*(raw[i : i + 1] for i in range(len(raw)))) == messages


@given(st.binary(max_size=60) | st.text(alphabet="{}[]\"'\\:,a1 \n", max_size=60).map(str.encode))
def test_recovers_after_anything(noise: bytes) -> None:
    """Whatever came before, a 0xFF byte makes the next message heard."""
    assert feed(noise, b'\xff{"x": 1}')[-1] == {"x": 1}


@given(st.text(alphabet="{}[]\"'\\:,a1 \n\x01", max_size=60).map(str.encode))
def test_pieces_do_not_matter(noise: bytes) -> None:
    assert feed(noise) == feed(*(noise[i : i + 1] for i in range(len(noise))))


def test_too_large_is_said_once_and_skipped() -> None:
    big = b'{"a": "' + b"x" * 5000 + b'"}'
    pieces = [big[i : i + 100] for i in range(0, len(big), 100)]
    got = feed(*pieces, b'{"b": 1}', max_message=1000)
    assert [type(message) for message in got] == [BadMessage, dict]
    assert "larger than 1000 bytes" in got[0].text


def test_a_slow_sender_costs_no_more() -> None:
    raw = b'{"a": "' + b"x" * 1_000_000 + b'"}'
    stream = JsonStream()
    start = time.process_time()
    got = [m for i in range(0, len(raw), 50) for m in stream.feed(raw[i : i + 50])]
    assert len(got) == 1 and time.process_time() - start < 2
