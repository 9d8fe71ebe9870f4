# SPDX-License-Identifier: GPL-2.0-or-later
"""The two copies of a LUKS2 header: 4096 bytes of binary, then JSON, and a checksum over both.

LUKS2 On-Disk Format Specification 1.1, section 2. Numbers are big-endian. The second copy starts
where the first ends. A change writes the first copy, with a sequence number that is one higher,
and then the second: a crash leaves at least one that is whole.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass, replace
from typing import Any

from vhostblk.luks import hashes, json2
from vhostblk.luks.errors import bad_header, error, not_luks
from vhostblk.luks.storage import Storage, read_up_to
from vhostblk.schema import VhostblkError

MAGIC = b"LUKS\xba\xbe"
SECOND_MAGIC = b"SKUL\xba\xbe"
BINARY = 4096
SIZES = tuple(0x4000 << shift for shift in range(9))  # of a copy: 16 KiB to 4 MiB (table 1)
CHECKSUM = "sha256"

_HEAD = struct.Struct(">6sHQQ48s32s64s40s48sQ184x64s")
_CHECKSUM_AT = _HEAD.size - 64


@dataclass(frozen=True)
class Binary:
    """The binary part of a copy."""

    size: int
    """Of the copy, JSON included."""
    sequence: int
    label: bytes
    algorithm: str
    salt: bytes
    uuid: str
    subsystem: bytes


@dataclass(frozen=True)
class Copy:
    """A copy that is whole."""

    binary: Binary
    metadata: dict[str, Any]


def parse(data: bytes, offset: int) -> Copy:
    """The copy that was read from `offset`."""
    binary = _parse_binary(data, offset)
    if len(data) < binary.size:
        raise bad_header("it is cut off")
    copy = bytearray(data[: binary.size])
    found = bytes(copy[_CHECKSUM_AT : _CHECKSUM_AT + 64])
    copy[_CHECKSUM_AT : _CHECKSUM_AT + 64] = bytes(64)
    wanted = hashes.digest(binary.algorithm, copy)
    if not hmac.compare_digest(found[: len(wanted)], wanted):
        raise bad_header("the checksum does not match")
    return Copy(binary, json2.parse(bytes(copy[BINARY:]), binary.size))


def _parse_binary(data: bytes, offset: int) -> Binary:
    if len(data) < BINARY:
        raise bad_header("it is cut off")
    (magic, version, size, sequence, label, algorithm, salt, uuid, subsystem, own_offset, _) = (
        _HEAD.unpack_from(data)
    )
    if magic != (SECOND_MAGIC if offset else MAGIC):
        raise bad_header("there is none")
    if version != 2:
        raise bad_header(f"version {version} is not supported; known: 1, 2")
    if size not in SIZES:
        raise bad_header(f"a size of {size} bytes")
    if own_offset != offset:
        raise bad_header(f"it says that it is at {own_offset}, and is at {offset}")
    name = _text(algorithm, "checksum")
    if name not in hashes.NAMES:
        raise bad_header(f"checksum '{name}' is not supported")
    return Binary(size, sequence, label, name, salt, _text(uuid, "UUID"), subsystem)


def pack(binary: Binary, metadata: dict[str, Any], offset: int) -> bytes:
    """A copy for this offset, with a salt of its own."""
    text = json2.dump(metadata)
    room = binary.size - BINARY
    if len(text) >= room:  # a zero ends it
        raise error(
            "luks-full", f"the LUKS2 metadata need {len(text) + 1} bytes, and have {room}",
            "remove key slots or tokens",
        )  # fmt: skip
    head = _HEAD.pack(
        SECOND_MAGIC if offset else MAGIC, 2, binary.size, binary.sequence, binary.label,
        binary.algorithm.encode(), os.urandom(64), binary.uuid.encode(), binary.subsystem, offset,
        bytes(64),
    )  # fmt: skip
    copy = bytearray(head.ljust(BINARY, b"\0") + text.ljust(room, b"\0"))
    checksum = hashes.digest(binary.algorithm, copy)
    copy[_CHECKSUM_AT : _CHECKSUM_AT + len(checksum)] = checksum
    return bytes(copy)


@dataclass(frozen=True)
class Found:
    """What was found of a header."""

    copy: Copy
    """The copy that counts."""
    damage: tuple[str, ...] = ()
    """What is wrong with the other."""
    rewrite: int | None = None
    """Where that other copy has to be."""
    replaced: bool = False
    """Where the first copy should be there is something else altogether."""


async def find(storage: Storage) -> Found:
    """Read both copies. The one with the higher sequence number counts, or the only whole one."""
    start = await read_up_to(storage, 0, BINARY)
    first = await _read(storage, 0, start)
    if isinstance(first, Copy):
        second = await _read(storage, first.binary.size)
        if isinstance(second, Copy):
            return _newer(first, second)
        return _found(first, "second", _reason(second))
    replaced = start[: len(MAGIC)] != MAGIC
    # How large the copies are cannot be told: look everywhere, first where the first one says.
    for size in _likely_sizes(start):
        second = await _read(storage, size)
        if isinstance(second, Copy):
            return replace(_found(second, "first", _reason(first)), replaced=replaced)
    raise not_luks() if replaced else first


def _newer(first: Copy, second: Copy) -> Found:
    mine, other = first.binary, second.binary
    if mine.uuid != other.uuid:
        return _found(first, "second", "it belongs to another volume")
    if mine.sequence == other.sequence:
        if first.metadata == second.metadata:
            return Found(first)
        return _found(first, "second", "it differs from the first")
    if other.sequence > mine.sequence:
        return _found(second, "first", "it is not up to date")
    return _found(first, "second", "it is not up to date")


def _found(good: Copy, which: str, reason: str) -> Found:
    rewrite = 0 if which == "first" else good.binary.size
    return Found(good, (f"{which} copy of the header: {reason}",), rewrite)


async def _read(storage: Storage, offset: int, start: bytes | None = None) -> Copy | VhostblkError:
    try:
        if start is None:
            start = await read_up_to(storage, offset, BINARY)
        size = _parse_binary(start, offset).size
        return parse(await read_up_to(storage, offset, size), offset)
    except VhostblkError as error:
        return error


def _likely_sizes(start: bytes) -> list[int]:
    claimed = _HEAD.unpack_from(start)[2] if len(start) >= _HEAD.size else 0
    return sorted(SIZES, key=lambda size: (size != claimed, size))


def _reason(error: VhostblkError) -> str:
    return error.desc.removeprefix("LUKS header: ")


async def write(storage: Storage, binary: Binary, metadata: dict[str, Any]) -> Copy:
    """Replace both copies: the first, then the second, each on the disk before what follows."""
    binary = replace(binary, sequence=binary.sequence + 1)
    copies = [(offset, pack(binary, metadata, offset)) for offset in (0, binary.size)]
    for offset, data in copies:
        await storage.write(offset, data)
        await storage.flush()
    return Copy(binary, metadata)


async def write_again(storage: Storage, good: Copy, offset: int) -> None:
    """Replace the copy at `offset` by what the other says, which is left alone meanwhile."""
    await storage.write(offset, pack(good.binary, good.metadata, offset))
    await storage.flush()


def _text(field: bytes, what: str) -> str:
    text, _, _ = field.partition(b"\0")
    if not text.isascii() or not text.decode("ascii").isprintable():
        raise bad_header(f"the {what} is not text")
    return text.decode("ascii")
