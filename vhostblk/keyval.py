# SPDX-License-Identifier: GPL-2.0-or-later
"""The option syntax of QEMU's command line: ``driver=raw,file.driver=file,…``.

An option value is a comma-separated list of ``key=value``. Dots in a key make
nested objects; where the parts of a level are the numbers 0, 1, 2, … it is a
list. A comma inside a value is written twice. The first item may leave out the
key (``null-co,node-name=n``) where the option has an implied one. A value that
starts with ``{`` is JSON, and then has JSON's types; here every leaf is a
string, which the schema turns into what it needs.

``help`` (or ``?``) as an item asks for a description instead of an action.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vhostblk import jsontext
from vhostblk.schema import VhostblkError

_FRAGMENT = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_-]*|[0-9]+)\Z")
_INDEX = re.compile(r"(?:0|[1-9][0-9]*)\Z")
_ITEM = re.compile(r"(?:[^,]|,,)*")
# A list is written by hand: more than this is a slip, and would cost memory.
_MAX_INDEX = 1 << 16


@dataclass(frozen=True)
class ParsedOption:
    """What was written, and whether help was asked for."""

    options: dict[str, Any]
    help: bool = False
    from_json: bool = False


@dataclass
class _Value:
    """A string and where it stood, until the tree is complete."""

    text: str
    position: int


_Tree = dict[str, Any]


def _fail(message: str, text: str, position: int, hint: str | None = None) -> VhostblkError:
    """An error that points at its place: people count characters badly."""
    shown = text[position : position + 24]
    where = f"at character {position + 1} ('{shown}')" if shown else "at the end"
    data: dict[str, Any] = {"code": "bad-option", "position": position + 1}
    if hint:
        data["hint"] = hint
        message = f"{message}; {hint}"
    return VhostblkError(f"{message}, {where}", data=data)


def parse(text: str, *, implied_key: str | None = None) -> ParsedOption:
    """Parse one option value. Raises VhostblkError that names the place."""
    if text.lstrip().startswith("{"):
        return ParsedOption(_parse_json(text), from_json=True)
    tree: _Tree = {}
    wants_help = False
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        assert match is not None  # the pattern matches the empty string
        item, start = match.group(), position
        position = match.end() + 1  # and the comma
        key, equals, value = item.partition("=")
        if not equals:
            if item in ("help", "?"):
                wants_help = True
                continue
            if start == 0 and implied_key is not None and item:
                key, value = implied_key, item
            elif not item:
                raise _fail("Expected a parameter", text, start, "write ',,' for a comma")
            else:
                raise _fail(
                    f"Expected '=' after parameter '{item}'",
                    text,
                    match.end(),
                    f"write '{item.replace(',,', ',')}=VALUE', or ',,' for a comma inside a value",
                )
        _insert(tree, key, _Value(value.replace(",,", ","), start), text, start)
    options = _finish(tree, "", text)
    assert isinstance(options, dict)
    return ParsedOption(options, help=wants_help)


def _insert(tree: _Tree, key: str, value: _Value, text: str, position: int) -> None:
    parts = key.split(".")
    for index, part in enumerate(parts):
        if not _FRAGMENT.match(part) or (index == 0 and part[0].isdigit()):
            what = f"Invalid parameter '{key}'" if key else "Expected a parameter name before '='"
            raise _fail(what, text, position)
    level = tree
    for index, part in enumerate(parts[:-1]):
        below = level.setdefault(part, {})
        if isinstance(below, _Value):
            raise _mixed(".".join(parts[: index + 1]), text, position)
        level = below
    if isinstance(level.get(parts[-1]), dict):
        raise _mixed(key, text, position)
    level[parts[-1]] = value  # written twice: the last one counts, as in QEMU


def _mixed(name: str, text: str, position: int) -> VhostblkError:
    return _fail(f"Parameter '{name}' is used both as a value and as '{name}.…'", text, position)


def _finish(level: _Tree, prefix: str, text: str) -> Any:
    """Turn a level of the tree into a dict, or a list where all its keys are numbers."""
    first = min((_position(entry) for entry in level.values()), default=0)
    numbers = [key for key in level if key[0].isdigit()]
    if prefix and numbers:
        where = prefix.rstrip(".")
        if len(numbers) != len(level):
            raise _fail(f"Parameters '{prefix}*' mix names and numbers", text, first)
        for key in numbers:
            if not _INDEX.match(key) or int(key) > _MAX_INDEX:
                raise _fail(f"Invalid list index '{prefix}{key}'", text, first)
        for index in range(len(level)):
            if str(index) not in level:
                raise _fail(
                    f"Parameter '{prefix}{index}' is missing",
                    text,
                    first,
                    f"the list '{where}' is numbered from 0 without gaps",
                )
        return [_leaf(level[str(i)], f"{prefix}{i}.", text) for i in range(len(level))]
    return {key: _leaf(entry, f"{prefix}{key}.", text) for key, entry in level.items()}


def _leaf(entry: Any, prefix: str, text: str) -> Any:
    return entry.text if isinstance(entry, _Value) else _finish(entry, prefix, text)


def _position(entry: Any) -> int:
    if isinstance(entry, _Value):
        return entry.position
    return min((_position(below) for below in entry.values()), default=0)


def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = jsontext.loads(text)
    except jsontext.JsonError as error:
        raise _fail(f"JSON parse error, {error}", text, error.position or 0) from None
    assert isinstance(value, dict)  # it starts with a brace
    return value
