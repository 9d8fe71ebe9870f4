# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's key=value syntax."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk import keyval
from vhostblk.schema import VhostblkError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=b", {"a": "b"}),
        ("a=b,", {"a": "b"}),
        ("a=", {"a": ""}),
        ("a==b", {"a": "=b"}),
        ("a=1,a=2", {"a": "2"}),
        ("null-co,size=1M", {"driver": "null-co", "size": "1M"}),
        ("a,,b,c=d", {"driver": "a,b", "c": "d"}),
        ("filename=a,,b.img,x=,,", {"filename": "a,b.img", "x": ","}),
        ("addr.type=unix,addr.path=/a", {"addr": {"type": "unix", "path": "/a"}}),
        ("c.1=y,c.0=x", {"c": ["x", "y"]}),
        ("c.0.d=x,c.1.d=y", {"c": [{"d": "x"}, {"d": "y"}]}),
        (" {'a': 1}".replace("'", '"'), {"a": 1}),
    ],
)
def test_parse(text: str, expected: dict[str, Any]) -> None:
    assert keyval.parse(text, implied_key="driver").options == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=b,c", ["Expected '=' after parameter 'c'", "'c=VALUE'", "at the end"]),
        ("a=b,c,d=e", ["Expected '=' after parameter 'c'", "character 6"]),
        ("a=b,,,c=d", []),
        ("=x", ["before '='", "character 1"]),
        ("a..b=x", ["Invalid parameter 'a..b'"]),
        ("a.=x", ["Invalid parameter 'a.'"]),
        ("0=x", ["Invalid parameter '0'"]),
        ("ä=x", ["Invalid parameter 'ä'"]),
        ("a=1,a.b=2", ["'a' is used both", "character 5"]),
        ("a.b=1,a=2", ["'a' is used both", "character 7"]),
        ("x=1,a.0=1,a.b=2", ["'a.*' mix", "character 5"]),
        ("a.0=1,a.2=2", ["'a.1' is missing", "without gaps"]),
        ("a.00=1", ["Invalid list index 'a.00'"]),
        ("a.99999999=1", ["Invalid list index"]),
        ("{", ["JSON parse error"]),
        ('{"a": 1, "a": 2}', ["duplicate key 'a'"]),
        ('{"a": 1}x', ["JSON parse error", "character 9"]),
    ],
)
def test_errors_name_the_place(text: str, words: list[str]) -> None:
    if not words:
        keyval.parse(text)
        return
    with pytest.raises(VhostblkError) as caught:
        keyval.parse(text)
    for word in words:
        assert word in caught.value.desc


def test_help() -> None:
    assert keyval.parse("help", implied_key="driver").help
    parsed = keyval.parse("null-co,help", implied_key="driver")
    assert parsed.help and parsed.options == {"driver": "null-co"}
    assert not keyval.parse("a=help").help


def test_no_implied_key() -> None:
    with pytest.raises(VhostblkError, match="Expected '='"):
        keyval.parse("null-co")


names = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
trees = st.dictionaries(
    names,
    st.recursive(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
        lambda below: (
            st.lists(below, min_size=1, max_size=3)
            | st.dictionaries(names, below, min_size=1, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=5,
)


def written(options: dict[str, Any]) -> str:
    """The inverse of parse(): one line that means `options`.

    Written as key=value where that says the same; falls back to JSON for what
    key=value cannot say (null, an empty list, a key with odd characters).
    """
    items: list[str] = []
    if _flatten(options, "", items) and items:
        return ",".join(items)
    return json.dumps(options)


def _flatten(value: Any, key: str, items: list[str]) -> bool:
    if isinstance(value, dict):
        if key and (not value or any(str(k)[:1].isdigit() for k in value)):
            return False
        return all(
            keyval._FRAGMENT.match(str(k)) is not None
            and (bool(key) or not str(k)[0].isdigit())
            and _flatten(v, f"{key}.{k}" if key else str(k), items)
            for k, v in value.items()
        )
    if isinstance(value, list):
        if not value:
            return False
        return all(_flatten(v, f"{key}.{i}", items) for i, v in enumerate(value))
    if value is None:
        return False
    if isinstance(value, bool):
        value = "on" if value else "off"
    items.append(f"{key}={str(value).replace(',', ',,')}")
    return True


@given(trees)
def test_round_trip(tree: dict[str, Any]) -> None:
    text = written(tree)
    assert keyval.parse(text).options == tree


@given(trees)
def test_json_means_the_same(tree: dict[str, Any]) -> None:
    assert keyval.parse(json.dumps(tree)).options == tree


@given(st.text(alphabet='ab01.,={}"[]-_ ', max_size=30) | st.text(max_size=30))
def test_anything_parses_or_is_an_error_with_a_sentence(text: str) -> None:
    try:
        keyval.parse(text, implied_key="driver")
    except VhostblkError as error:
        assert len(error.desc) > 10
