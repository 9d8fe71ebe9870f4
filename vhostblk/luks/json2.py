# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON of a LUKS2 header: parsing it, and checking it before anything relies on it.

LUKS2 On-Disk Format Specification 1.1, section 3. Numbers that need 64 bits are strings of decimal
digits; objects are numbered by strings. What is not known (types of key slots and tokens, members
of objects) is kept as it is; what would be needed to read the disk is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Iterable
from typing import Any, NoReturn

from vhostblk.luks import af
from vhostblk.luks.ciphers import SECTOR, SECTOR_SIZES
from vhostblk.luks.errors import bad_header
from vhostblk.luks.kdf import PBKDF2, Kdf
from vhostblk.luks.slots import LARGEST_KEY, Digest, Slot, material_size
from vhostblk.luks.volume import Segment

SLOTS = 32
LARGEST_AREA = 128 << 20  # of all key slots together, as in cryptsetup
_MAXIMUM = {"keyslots": SLOTS, "tokens": 32, "segments": 32, "digests": 32}
# One name for each: with "00" there would be more key slots than a header can have.
_NUMBERS = tuple(map(str, range(max(_MAXIMUM.values()))))

Json = dict[str, Any]


def parse(area: bytes, header_size: int) -> Json:
    """The metadata in the JSON area of a copy, checked."""
    text, zero, rest = area.partition(b"\0")
    if not zero or rest.strip(b"\0"):
        raise bad_header("the JSON area does not end in zeroes")
    try:
        metadata = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise bad_header("the JSON area is not JSON") from None
    if not isinstance(metadata, dict):
        raise bad_header("the JSON area is not an object")
    check(metadata, header_size)
    return metadata


def dump(metadata: Json) -> bytes:
    """The text of the metadata."""
    return json.dumps(metadata, separators=(",", ":")).encode("ascii")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


# ---- checking


def check(metadata: Json, header_size: int) -> None:
    """Refuse what contradicts itself or reaches beyond where it may."""
    for name, most in _MAXIMUM.items():
        entries = _object(metadata, name, "the metadata")
        for number, entry in entries.items():
            where = f"{name} {number}"
            if number not in _NUMBERS[:most]:
                raise bad_header(f"{name}: '{number[:20]}' is not a number below {most}")
            if not isinstance(entry, dict):
                raise bad_header(f"{where} is not an object")
            _string(entry, "type", where)
    keyslots_offset, keyslots_size = area(metadata, header_size)
    _check_areas(metadata["keyslots"], keyslots_offset, keyslots_size)
    for number, entry in metadata["keyslots"].items():
        _integer(entry, "key_size", f"keyslots {number}", 1, LARGEST_KEY)
        if entry["type"] == "luks2":
            slot(metadata, number)
    for number in metadata["segments"]:
        segment(metadata, number)
    for number, entry in metadata["digests"].items():
        where = f"digests {number}"
        _references(entry, "keyslots", metadata, where)
        _references(entry, "segments", metadata, where)
        if entry["type"] == PBKDF2:
            digest(metadata, number)
    for number, entry in metadata["tokens"].items():
        _references(entry, "keyslots", metadata, f"tokens {number}")
    requirements(metadata)


def area(metadata: Json, header_size: int) -> tuple[int, int]:
    """Where key slots may have their areas: offset and size."""
    config = _object(metadata, "config", "the metadata")
    if number64(config, "json_size", "config") != header_size - 4096:
        raise bad_header("config: json_size is not the size of the JSON area")
    size = number64(config, "keyslots_size", "config")
    if size % 4096 or size > LARGEST_AREA:
        raise bad_header(f"config: a keyslots_size of {size}")
    return 2 * header_size, size


def requirements(metadata: Json) -> frozenset[str]:
    """What one must be capable of to use this volume."""
    given = metadata["config"].get("requirements", {})
    if not isinstance(given, dict):
        raise bad_header("config: requirements is not an object")
    mandatory = given.get("mandatory", [])
    if not isinstance(mandatory, list) or not all(isinstance(name, str) for name in mandatory):
        raise bad_header("config: requirements are not a list of names")
    return frozenset(mandatory)


def _check_areas(keyslots: Json, start: int, size: int) -> None:
    places = []
    for number, entry in keyslots.items():
        where = f"keyslots {number}"
        described = _object(entry, "area", where)
        _string(described, "type", where)
        offset = number64(described, "offset", where)
        length = number64(described, "size", where)
        if offset < start or length == 0 or offset + length > start + size:
            raise bad_header(f"{where}: its area is outside of the place for areas")
        places.append((offset, offset + length, where))
    places.sort()
    for (_, end, where), (offset, _, other) in itertools.pairwise(places):
        if offset < end:
            raise bad_header(f"the areas of {where} and {other} overlap")


def slot(metadata: Json, number: str) -> Slot:
    """A key slot of type luks2."""
    where = f"keyslots {number}"
    entry = metadata["keyslots"][number]
    described = _object(entry, "area", where)
    if described["type"] != "raw":
        raise bad_header(f"{where}: an area of type '{described['type'][:20]}'")
    splitter = _object(entry, "af", where)
    if _string(splitter, "type", where) != "luks1":
        raise bad_header(f"{where}: a splitter of type '{splitter['type'][:20]}'")
    _integer(splitter, "stripes", where, af.STRIPES, af.STRIPES)
    key_size = _integer(entry, "key_size", where, 1, LARGEST_KEY)
    if number64(described, "size", where) < material_size(key_size):
        raise bad_header(f"{where}: its area is too small")
    priority = entry.get("priority", 1)
    if type(priority) is not int or not 0 <= priority <= 2:
        raise bad_header(f"{where}: a priority that is not 0, 1 or 2")
    return Slot(
        int(number),
        _kdf(_object(entry, "kdf", where), where),
        key_size,
        number64(described, "offset", where),
        _string(described, "encryption", where),
        _integer(described, "key_size", where, 1, LARGEST_KEY),
        _string(splitter, "hash", where),
        _digest_of(metadata, "keyslots", number),
        priority,
    )


def _kdf(entry: Json, where: str) -> Kdf:
    type = _string(entry, "type", where)
    salt = _base64(entry, "salt", where)
    if type == PBKDF2:
        return Kdf(
            type, salt, hash=_string(entry, "hash", where),
            iterations=_integer(entry, "iterations", where, 1, (1 << 32) - 1),
        )  # fmt: skip
    return Kdf(
        type,
        salt,
        time=_integer(entry, "time", where, 1, (1 << 32) - 1),
        memory=_integer(entry, "memory", where, 1, (1 << 32) - 1),
        cpus=_integer(entry, "cpus", where, 1, (1 << 32) - 1),
    )


def segment(metadata: Json, number: str) -> Segment:
    """A part of the disk."""
    where = f"segments {number}"
    entry = metadata["segments"][number]
    type = entry["type"]
    offset = number64(entry, "offset", where)
    size = None
    if _string(entry, "size", where) != "dynamic":
        size = number64(entry, "size", where)
        if size == 0 or size % SECTOR:
            raise bad_header(f"{where}: a size of {size}")
    flags = entry.get("flags", [])
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        raise bad_header(f"{where}: flags are not a list of names")
    cipher, sector_size, tweak = "", SECTOR, 0
    if type == "crypt":
        if "integrity" in entry:
            raise bad_header(f"{where}: integrity protection is not supported")
        cipher = _string(entry, "encryption", where)
        sector_size = _integer(entry, "sector_size", where, 512, 4096)
        tweak = number64(entry, "iv_tweak", where)
        if sector_size not in SECTOR_SIZES:
            raise bad_header(f"{where}: sectors of {sector_size} bytes")
    elif type != "linear":
        raise bad_header(f"{where}: type '{type[:20]}' is not supported")
    if offset % sector_size or (size or 0) % sector_size:
        raise bad_header(f"{where}: offset and size are not multiples of a sector")
    name = _digest_of(metadata, "segments", number)
    return Segment(offset, size, sector_size, cipher, tweak, int(number), name, tuple(flags))


def digest(metadata: Json, number: str) -> Digest:
    """A digest of type pbkdf2."""
    where = f"digests {number}"
    entry = metadata["digests"][number]
    return Digest(_kdf(entry, where), _base64(entry, "digest", where))


def _digest_of(metadata: Json, kind: str, number: str) -> str:
    for name, entry in metadata["digests"].items():
        known = entry.get(kind)
        if isinstance(known, list) and number in known:
            return str(name)
    return ""


# ---- members


def number64(entry: Json, member: str, where: str) -> int:
    """A number of up to 64 bits, which JSON has as a string."""
    text = _string(entry, member, where)
    if not text.isascii() or not text.isdecimal() or len(text) > 20 or int(text) >= 1 << 63:
        raise bad_header(f"{where}: {member} is not a number")
    return int(text)


def _object(entry: Json, member: str, where: str) -> Json:
    value = entry.get(member)
    if not isinstance(value, dict):
        raise bad_header(f"{where}: {member} is not an object")
    return value


def _string(entry: Json, member: str, where: str) -> str:
    value = entry.get(member)
    if not isinstance(value, str):
        raise bad_header(f"{where}: {member} is not a string")
    if not value.isprintable() or len(value) > 2000:
        raise bad_header(f"{where}: {member} is not text")
    return value


def _integer(entry: Json, member: str, where: str, low: int, high: int) -> int:
    value = entry.get(member)
    if type(value) is not int:
        raise bad_header(f"{where}: {member} is not an integer")
    if not low <= value <= high:
        raise bad_header(f"{where}: {member} is not between {low} and {high}")
    return value


def _base64(entry: Json, member: str, where: str) -> bytes:
    try:
        value = base64.b64decode(_string(entry, member, where), validate=True)
    except (binascii.Error, ValueError):
        raise bad_header(f"{where}: {member} is not base64") from None
    if not 1 <= len(value) <= 1024:
        raise bad_header(f"{where}: {member} has {len(value)} bytes")
    return value


def _references(entry: Json, kind: str, metadata: Json, where: str) -> None:
    if kind not in entry:
        if kind == "keyslots" or where.startswith("digests"):
            raise bad_header(f"{where}: {kind} is missing")
        return
    numbers: Iterable[Any] = entry[kind] if isinstance(entry[kind], list) else [None]
    for number in numbers:
        if not isinstance(number, str) or number not in metadata[kind]:
            raise bad_header(f"{where}: it refers to {kind} that do not exist")
