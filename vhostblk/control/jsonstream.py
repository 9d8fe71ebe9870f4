# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON messages out of a byte stream that has no separators.

QMP clients send objects back to back, without a newline, in pieces of any
size. A `JsonStream` is fed bytes and gives messages: a first pass over the
bytes only finds where each message ends (brackets and quotes, never looked at
twice), then the whole message is parsed at once. So a slow sender of a long
message costs no more than a fast one.

QEMU's extensions are understood: strings in single quotes, and a byte 0xFF
that throws away what came before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vhostblk import jsontext

MAX_MESSAGE = 4 << 20
MAX_NESTING = 256

_TOP = re.compile(rb"[{\[\"'\xfe\xff]|[\]},:]|[^\s{\[\"'\]},:\xfe\xff]+|\s+")
_INSIDE = re.compile(rb"[{}\[\]\"'\xfe\xff]")
_DOUBLE = re.compile(rb"[\"\\\x00-\x1f\xfe\xff]")
_SINGLE = re.compile(rb"['\\\x00-\x1f\xfe\xff]")
_WORD_END = re.compile(rb"[\s{\[\"'\]},:\xfe\xff]")
_STRINGS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
_ESCAPES = re.compile(r"\\.|\"", re.DOTALL)
_CLOSES = {ord("{"): ord("}"), ord("["): ord("]")}


@dataclass(frozen=True)
class BadMessage:
    """What could not be understood; the stream goes on after it."""

    text: str


def parse_message(raw: bytes) -> Any:
    """One complete message. Raises ValueError with QEMU's wording."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8 sequence in string") from None
    if "'" in text:
        text = _STRINGS.sub(_requote, text)
    try:
        return jsontext.loads(text)
    except jsontext.JsonError as error:
        where = "" if error.position is None else f" at character {error.position + 1}"
        raise ValueError(f"{error}{where}") from None


def _requote(match: re.Match[str]) -> str:
    token = match.group()
    if token[0] == '"':
        # \' is an escape in QEMU's JSON but not in JSON.
        return _ESCAPES.sub(lambda m: "'" if m.group() == "\\'" else m.group(), token)
    inner = {"\\'": "'", '"': '\\"'}
    return '"' + _ESCAPES.sub(lambda m: inner.get(m.group(), m.group()), token[1:-1]) + '"'


class JsonStream:
    """Splits a byte stream into JSON messages."""

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self.max_message = max_message
        self._buffer = bytearray()
        self._scanned = 0
        self._closers: list[int] = []  # the bracket each open level waits for
        self._quote = 0  # the quote the current string waits for
        self._too_long = False  # this message is over the limit and is being skipped

    def feed(self, data: bytes) -> Iterator[Any | BadMessage]:
        """Add bytes; yields every message they complete. Exhaust the iterator."""
        self._buffer += data
        while (found := self._next()) is not None:
            yield from found
        if len(self._buffer) > self.max_message:
            # Keep following the brackets, so that the next message is found,
            # but keep nothing of this one.
            if not self._too_long:
                yield BadMessage(f"QMP message is larger than {self.max_message} bytes")
            self._too_long = True
        if self._too_long:
            del self._buffer[: self._scanned]
            self._scanned = 0

    @property
    def idle(self) -> bool:
        """Nothing of an unfinished message has been received."""
        return not self._buffer and not self._too_long

    def _next(self) -> list[Any | BadMessage] | None:
        """What the next piece of buffer gives; None when more bytes are needed."""
        if not self._closers and not self._quote:
            return self._start()
        if self._quote:
            return self._string()
        match = _INSIDE.search(self._buffer, self._scanned)
        if match is None:
            self._scanned = len(self._buffer)
            return None
        self._scanned = match.end()
        byte = match.group()[0]
        if byte in b"\xfe\xff":
            return self._stray(byte)
        if byte in b"\"'":
            self._quote = byte
        elif byte in b"{[":
            self._closers.append(_CLOSES[byte])
            if len(self._closers) > MAX_NESTING:
                return self._bad("JSON parse error, nested too deeply")
        elif byte != self._closers.pop():
            return self._bad(f"JSON parse error, '{chr(byte)}' closes nothing")
        elif not self._closers:
            return self._complete()
        return []

    def _start(self) -> list[Any | BadMessage] | None:
        match = _TOP.match(self._buffer, self._scanned)
        if match is None:
            return None
        token = match.group()
        byte = token[0]
        if token.isspace():
            del self._buffer[: match.end()]
            self._scanned = 0
            return []
        if byte in b"{[":
            self._scanned = match.end()
            self._closers.append(_CLOSES[byte])
            return []
        if byte in b"\"'":
            self._scanned = match.end()
            self._quote = byte
            return []
        self._scanned = match.end()
        if byte in b"\xfe\xff":
            return self._stray(byte)
        if byte in b"]},:":
            return self._bad("JSON parse error, expecting value")
        # A bare word or number ends where something else begins.
        if _WORD_END.match(self._buffer, match.end()) is None:
            self._scanned = 0
            if len(self._buffer) <= self.max_message:
                return None
            return self._bad("JSON parse error, invalid keyword")
        return self._complete()

    def _string(self) -> list[Any | BadMessage] | None:
        pattern = _DOUBLE if self._quote == ord('"') else _SINGLE
        match = pattern.search(self._buffer, self._scanned)
        if match is None:
            self._scanned = len(self._buffer)
            return None
        byte = match.group()[0]
        if byte == ord("\\"):
            if match.end() == len(self._buffer):
                self._scanned = match.start()  # the escaped byte is not here yet
                return None
            # 0xFF resets whatever comes before it, a backslash too.
            self._scanned = match.end() + (self._buffer[match.end()] not in b"\xfe\xff")
            return []
        self._scanned = match.end()
        if byte == self._quote:
            self._quote = 0
            return [] if self._closers else self._complete()
        if byte in b"\xfe\xff":
            return self._stray(byte)
        return self._bad("JSON parse error, control character in a string")

    def _stray(self, byte: int) -> list[Any | BadMessage]:
        return self._bad(f"JSON parse error, stray '\\x{byte:02X}'")

    def _complete(self) -> list[Any | BadMessage]:
        raw, skipped = bytes(self._buffer[: self._scanned]), self._too_long
        self._reset()
        if skipped:
            return []
        if len(raw) > self.max_message:
            return [BadMessage(f"QMP message is larger than {self.max_message} bytes")]
        try:
            return [parse_message(raw)]
        except ValueError as error:
            return [BadMessage(f"JSON parse error, {error}")]

    def _bad(self, text: str) -> list[Any | BadMessage]:
        skipped = self._too_long
        self._reset()
        return [] if skipped else [BadMessage(text)]

    def _reset(self) -> None:
        del self._buffer[: self._scanned]
        self._scanned = 0
        self._closers.clear()
        self._quote = 0
        self._too_long = False
