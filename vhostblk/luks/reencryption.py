# SPDX-License-Identifier: GPL-2.0-or-later
"""What a LUKS2 header says while the disk gets another key, or its first one.

Segment 0 is what the disk was before: encrypted with the old key, or `linear`. Segment 1, with the
flag `backup-final`, is what it will be; a key slot of a type of our own keeps room for the log that
knows how far it is (vhostblk/nodes/_zone_log.py). A mandatory requirement, also of our own, keeps
others from opening half a disk with one key. All of that appears in one change of the metadata, and
goes in one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vhostblk.luks import json2
from vhostblk.luks.errors import bad_header, no_slot
from vhostblk.luks.luks2 import REENCRYPTION, Luks2
from vhostblk.luks.volume import Segment
from vhostblk.schema import VhostblkError

LOG = "vhostblk-reencrypt"  # the type of the key slot that keeps room for the log
_SIZES = (1 << 20, 1 << 18, 1 << 16)  # of a zone, the larger the better
_RECORDS = 8192  # that the log has besides one zone
_FINAL = "backup-final"

Json = dict[str, Any]


@dataclass(frozen=True)
class Reencryption:
    """One that is under way."""

    before: Segment
    after: Segment
    run: bytes
    """Its name; a log with another one is of something else."""
    log_offset: int
    log_size: int


def find(volume: Luks2) -> Reencryption | None:
    """What a header says of it."""
    if REENCRYPTION not in volume.requirements:
        return None
    after = [segment for segment in volume.segments if _FINAL in segment.flags]
    logs = [entry for entry in volume.metadata["keyslots"].values() if entry["type"] == LOG]
    if len(after) != 1 or len(logs) != 1 or not after[0].cipher:
        raise bad_header("a re-encryption without a key or a log")
    before = volume.segment
    if (after[0].offset, after[0].size) != (before.offset, before.size):
        raise bad_header("a re-encryption that moves data")
    if before.cipher and after[0].sector_size != before.sector_size:
        raise bad_header("a re-encryption with sectors of another size")
    try:
        run = bytes.fromhex(logs[0].get("run", ""))
    except (TypeError, ValueError):
        run = b""
    if len(run) != 16:
        raise bad_header("a re-encryption without a name")
    place = logs[0]["area"]
    offset, size = (json2.number64(place, name, "the log") for name in ("offset", "size"))
    return Reencryption(before, after[0], run, offset, size)


def place_for_log(volume: Luks2) -> tuple[int, int]:
    """Offset and size of an area that is free for the log."""
    for zone in _SIZES:
        try:
            return volume.free_area(zone + _RECORDS), zone + _RECORDS
        except VhostblkError:
            continue
    raise no_slot("the LUKS header has no room for the log of a re-encryption",
                  f"{_SIZES[-1] + _RECORDS} bytes in one piece; remove key slots")  # fmt: skip


def new_run() -> bytes:
    """A name."""
    return os.urandom(16)


def begun(metadata: Json, digest: str, run: bytes, log: tuple[int, int]) -> Json:
    """The metadata from now on; the new key is that of `digest`."""
    final = dict(metadata["segments"]["0"])
    final["flags"] = [_FINAL]
    metadata["segments"]["1"] = final
    metadata["digests"][digest]["segments"] = ["1"]
    _add_log(metadata, run, log)
    return metadata


def pending(metadata: Json, run: bytes, log: tuple[int, int]) -> Json:
    """The metadata of a new header, for a disk that is not encrypted yet."""
    final = dict(metadata["segments"]["0"])
    metadata["segments"] = {
        "0": {"type": "linear", "offset": final["offset"], "size": final["size"]},
        "1": final | {"flags": [_FINAL]},
    }
    metadata["digests"]["0"]["segments"] = ["1"]
    _add_log(metadata, run, log)
    return metadata


def finished(metadata: Json) -> Json:
    """The metadata when all of the disk is what it was to be."""
    final = metadata["segments"]["1"]
    del final["flags"]
    metadata["segments"] = {"0": final}
    kept: set[str] = set()  # with those that belong to no disk: somebody keeps a key of his own
    for number, digest in list(metadata["digests"].items()):
        if "0" in digest["segments"]:
            del metadata["digests"][number]
            continue
        if "1" in digest["segments"]:
            digest["segments"] = ["0"]
        kept.update(digest["keyslots"])
    metadata["keyslots"] = {
        number: slot for number, slot in metadata["keyslots"].items() if number in kept
    }
    for token in metadata["tokens"].values():
        token["keyslots"] = [number for number in token["keyslots"] if number in kept]
    requirements = metadata["config"]["requirements"]
    requirements["mandatory"].remove(REENCRYPTION)
    if not requirements["mandatory"]:
        del metadata["config"]["requirements"]
    return metadata


def _add_log(metadata: Json, run: bytes, log: tuple[int, int]) -> None:
    used = metadata["keyslots"]
    number = next(str(n) for n in reversed(range(json2.SLOTS)) if str(n) not in used)
    used[number] = {
        "type": LOG,
        "key_size": 1,
        "run": run.hex(),
        "area": {"type": "vhostblk-log", "offset": str(log[0]), "size": str(log[1])},
    }
    requirements = metadata["config"].setdefault("requirements", {})
    requirements.setdefault("mandatory", []).append(REENCRYPTION)
