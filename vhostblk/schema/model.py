# SPDX-License-Identifier: GPL-2.0-or-later
"""The base model and the types that QAPI has and Python has not.

Values written as key=value are all strings, those from JSON have a type. Each
type here accepts both, and nothing that would surprise: `"4"` is an integer,
`true` is not, and `"on"` is a boolean. Inside `json_types()`, where the control
socket checks arguments, strings are strings, as with QEMU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
_SIZE = re.compile(r"([0-9]+)(?:\.([0-9]+))?([bBkKmMgGtTpPeE]?)\Z")
_INTEGER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+)\Z")
_SHIFTS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_BOOLEANS = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}
NODE_NAME_MAX = 31


_json_types: ContextVar[bool] = ContextVar("json_types", default=False)


@contextlib.contextmanager
def json_types(strict: bool = True) -> Iterator[None]:
    """Inside, numbers and booleans must be JSON's."""
    token = _json_types.set(strict)
    try:
        yield
    finally:
        _json_types.reset(token)


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Model(BaseModel):
    """An object of options. Members are called as in QAPI: `node-name` for `node_name`."""

    model_config = ConfigDict(
        alias_generator=_kebab,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        defer_build=True,  # most models are never used in one run
    )

    def to_options(self) -> dict[str, Any]:
        """What was given, as plain data with QAPI's names."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def wrong_type(expected: str, hint: str = "") -> PydanticCustomError:
    """The error for a value of the wrong type; validation.py writes the sentence."""
    return PydanticCustomError("qapi_type", "{expected}", {"expected": expected, "hint": hint})


def wrong_value(expected: str) -> PydanticCustomError:
    """The error for a value that is not acceptable; `expected` completes "expects …"."""
    return PydanticCustomError("qapi_value", "{expected}", {"expected": expected})


def parse_size(text: str) -> int:
    """Bytes from `64k`, `1.5G`, …, in QEMU's way: suffixes are powers of 1024."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size")
    whole, fraction, suffix = match.groups()
    shift = _SHIFTS[suffix.lower()]
    size = int(whole) << shift
    if fraction and not shift:
        raise ValueError(f"'{text}' is not a number of bytes")
    if fraction:
        size += (int(fraction) << shift) // 10 ** len(fraction)
    return size


def in_range(low: int, high: int) -> BeforeValidator:
    """What makes an integer of a value, and refuses those outside."""
    return BeforeValidator(lambda value: _integer(value, low, high))


def _to_size(value: Any) -> Any:
    if isinstance(value, str):
        try:
            size = parse_size(value)
        except ValueError:
            if _json_types.get():
                raise wrong_type("integer") from None
            if _INTEGER.match(value) is None:
                raise wrong_value(
                    "a size: a number of bytes, or one with a suffix k, M, G, T, P or E"
                ) from None
            size = int(value, 0)
        if _json_types.get():
            raise wrong_type("integer", f"for '{value}' write {size}")
        value = size
    return _integer(value, 0, (1 << 63) - 1)


def _integer(value: Any, low: int, high: int) -> int:
    if isinstance(value, str) and _INTEGER.match(value) and not _json_types.get():
        value = int(value, 16 if "x" in value.lower() else 10)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("integer")
    if not low <= value <= high:
        raise wrong_value(f"a value from {low} to {high}")
    return value


def _to_bool(value: Any) -> Any:
    if isinstance(value, str) and value in _BOOLEANS and not _json_types.get():
        return _BOOLEANS[value]
    if not isinstance(value, bool):
        if isinstance(value, str) and not _json_types.get():
            raise wrong_value("'on' or 'off'")
        boolean = _BOOLEANS.get(value) if isinstance(value, str) else None
        hint = "" if boolean is None else f"for '{value}' write {str(boolean).lower()}"
        raise wrong_type("boolean", hint)
    return value


def id_wellformed(name: str) -> bool:
    """Whether QEMU accepts `name` as an id: a letter, then letters, digits, '-', '.' and '_'."""
    return _ID.match(name) is not None


def _to_identifier(value: Any) -> Any:
    if not isinstance(value, str):
        raise wrong_type("string")
    if not id_wellformed(value):
        raise wrong_value("an identifier: a letter, then letters, digits, '-', '.' and '_'")
    return value


def _to_node_name(value: Any) -> Any:
    if not isinstance(value, str):
        raise wrong_type("string")
    if not id_wellformed(value):
        raise wrong_value("a name of letters, digits, '-', '.' and '_' that starts with a letter")
    if len(value) > NODE_NAME_MAX:
        raise wrong_value(f"a name of at most {NODE_NAME_MAX} characters")
    return value


def _to_reference(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise wrong_type("a node name or an object")
    return value


def _to_str_or_list(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if isinstance(value, tuple):
        return value
    raise wrong_type("string or array of strings")


Size = Annotated[int, BeforeValidator(_to_size)]
"""Bytes; strings may have a suffix."""

OnOff = Annotated[bool, BeforeValidator(_to_bool)]
"""A boolean; `on` and `off` when written as key=value."""

Int = Annotated[int, in_range(-(1 << 63), (1 << 63) - 1)]
UInt16 = Annotated[int, in_range(0, (1 << 16) - 1)]
UInt32 = Annotated[int, in_range(0, (1 << 32) - 1)]
UInt63 = Annotated[int, in_range(0, (1 << 63) - 1)]
"""QAPI's `int` where it may not be negative."""
UInt64 = Annotated[int, in_range(0, (1 << 64) - 1)]

NodeName = Annotated[str, BeforeValidator(_to_node_name)]
"""A name for a new node, by QEMU's rules."""

Identifier = Annotated[str, BeforeValidator(_to_identifier)]
"""A name for a new object or export, by QEMU's rules."""

BlockdevRef = Annotated[str | dict[str, Any], BeforeValidator(_to_reference)]
"""A child: the name of a node that exists, or the options of one to make."""

StrOrList = Annotated[str | tuple[str, ...], BeforeValidator(_to_str_or_list)]
"""One name or several."""
