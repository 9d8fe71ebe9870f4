# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON from operators and programs: what Python's parser would let pass is refused here.

These are names written twice, NaN and Infinity, numbers of thousands of digits,
text that no file name and no node name can have (NUL, half of a surrogate pair),
and nesting that exhausts the stack.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

# Python refuses more than 4300 digits, in words about Python.
_MAX_DIGITS = 400


class JsonError(ValueError):
    """What is wrong with a text, and at which character (from 0) if that is known."""

    def __init__(self, text: str, position: int | None = None) -> None:
        super().__init__(text)
        self.position = position


def loads(text: str) -> Any:
    """The value that `text` means; raises `JsonError`."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        raise JsonError(error.msg[:1].lower() + error.msg[1:], error.pos) from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    if "\\u" in text and has_bad_text(value):
        raise JsonError("a \\u escape is not a valid Unicode character")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise JsonError(f"duplicate key '{key}'")
        result[key] = value
    return result


def _no_constant(word: str) -> NoReturn:
    raise JsonError(f"invalid keyword '{word}'")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonError(f"a number has {len(digits)} digits")
    return int(digits)


def has_bad_text(value: Any) -> bool:
    """Half a surrogate pair, or NUL: neither can be part of any name here."""
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, list):
        return any(has_bad_text(item) for item in value)
    if isinstance(value, dict):
        return any(has_bad_text(key) or has_bad_text(item) for key, item in value.items())
    return False
