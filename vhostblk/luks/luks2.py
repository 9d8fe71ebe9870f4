# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS2: an open header, its key slots, and changing them.

binary2.py has the two copies, json2.py what is in them.
"""

from __future__ import annotations

import base64
import copy
import os
import uuid
from collections.abc import Iterable
from typing import Any

from vhostblk.luks import binary2, hashes, json2, kdf
from vhostblk.luks.binary2 import Binary, Copy, Found
from vhostblk.luks.ciphers import CipherSpec
from vhostblk.luks.errors import bad_header, error, no_slot
from vhostblk.luks.kdf import Kdf, Limits
from vhostblk.luks.options import CreateOptions
from vhostblk.luks.slots import Digest, Slot, SlotInfo, material_size
from vhostblk.luks.storage import Storage
from vhostblk.luks.volume import Segment, Volume
from vhostblk.schema import VhostblkError
from vhostblk.secret import SecretBytes

ALIGN = 4096  # of areas
LARGEST_AREA = json2.LARGEST_AREA
DEFAULT_AREA_CIPHER = ("aes-xts-plain64", 64)
REENCRYPTION = "vhostblk-reencrypt"  # a requirement of ours (reencryption.py)
DIGEST_MILLISECONDS = 125  # of PBKDF2 for the digest of a random key, as cryptsetup does


class Luks2(Volume):
    """An open LUKS2 header."""

    version = 2

    def __init__(self, storage: Storage, limits: Limits, found: Found) -> None:
        super().__init__(storage, limits)
        self._binary = found.copy.binary
        self._metadata = found.copy.metadata
        self.damage = found.damage
        self._rewrite = found.rewrite
        self._replaced = found.replaced
        self.uuid = self._binary.uuid
        if all(segment.is_backup for segment in self.segments):
            raise bad_header("it describes no data")

    # ---- what it says

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of the JSON, for `write_metadata()`."""
        return copy.deepcopy(self._metadata)

    @property
    def header_size(self) -> int:
        """Bytes of one copy of the header."""
        return self._binary.size

    @property
    def keyslots_area(self) -> tuple[int, int]:
        """Offset and size of the place for areas of key slots."""
        return json2.area(self._metadata, self._binary.size)

    @property
    def label(self) -> str:
        """Its name, "" if it has none."""
        return self._binary.label.rstrip(b"\0").decode(errors="replace")

    @property
    def requirements(self) -> frozenset[str]:
        """What one must be capable of to use this volume."""
        return json2.requirements(self._metadata)

    @property
    def key_size(self) -> int:
        wanted = self.disk_digest
        for slot in self.active():
            if slot.digest == wanted:
                return slot.key_size
        return 0  # without a key slot nobody can say

    @property
    def disk_digest(self) -> str:
        if self.is_reencrypting:
            # Whoever is to read the disk in future needs the new key.
            for segment in self.segments:
                if "backup-final" in segment.flags:
                    return segment.digest
        return self.segment.digest

    @property
    def is_reencrypting(self) -> bool:
        return REENCRYPTION in self.requirements

    @property
    def segments(self) -> tuple[Segment, ...]:
        numbers = sorted(self._metadata["segments"], key=int)
        return tuple(json2.segment(self._metadata, number) for number in numbers)

    @property
    def header_end(self) -> int:
        return sum(self.keyslots_area)

    @property
    def digests(self) -> dict[str, Digest]:
        return {
            number: json2.digest(self._metadata, number)
            for number, entry in self._metadata["digests"].items()
            if entry["type"] == kdf.PBKDF2
        }

    def active(self) -> list[Slot]:
        found = [
            json2.slot(self._metadata, number)
            for number, entry in self._metadata["keyslots"].items()
            if entry["type"] == "luks2"
        ]
        return sorted(found, key=lambda slot: (-slot.priority, slot.number))

    def slots(self) -> list[SlotInfo]:
        told = []
        for number, entry in sorted(self._metadata["keyslots"].items(), key=_by_number):
            offset = int(entry["area"]["offset"])
            if entry["type"] != "luks2":
                told.append(
                    SlotInfo(int(number), True, key_offset=offset, key_size=entry["key_size"],
                             type=entry["type"][:32], problem="it is not a key slot of luks2")
                )  # fmt: skip
                continue
            slot, problem = json2.slot(self._metadata, number), None
            try:
                slot.check(self.limits)
            except VhostblkError as error:
                problem = error.desc
            told.append(
                SlotInfo(slot.number, True, slot.kdf, offset, slot.key_size, slot.cipher,
                         slot.priority, slot.digest, "luks2", problem)
            )  # fmt: skip
        return told

    # ---- changing it

    async def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the JSON, in both copies; afterwards it is on the disk.

        Whoever calls this holds `changing`, since before it had a look at `metadata`.
        """
        assert self.changing.locked()
        # What is written is what was checked, whatever the caller does with its dictionary.
        checked = copy.deepcopy(metadata)
        json2.check(checked, self._binary.size)
        await self._make_sound()
        await self._write(checked)

    async def _write(self, metadata: dict[str, Any]) -> None:
        written = await binary2.write(self.storage, self._binary, metadata)
        self._binary, self._metadata = written.binary, written.metadata

    def draft(self) -> Luks2:
        """The same header, of which only areas of key slots are written.

        For several changes at once: `write_metadata(draft.metadata)` makes them count.
        """
        return _Draft(self.storage, self.limits, Found(Copy(self._binary, self.metadata)))

    async def repair(self) -> bool:
        async with self.changing:
            return await self._repair()

    async def _repair(self) -> bool:
        if self._rewrite is None:
            return False
        good = Copy(self._binary, self._metadata)
        await binary2.write_again(self.storage, good, self._rewrite)
        self.damage, self._rewrite, self._replaced = (), None, False
        return True

    async def _make_sound(self) -> None:
        if self._replaced:
            raise error(
                "bad-luks-header",
                "the first copy of the LUKS2 header has been overwritten with something else",
                "if that was a mistake, 'vhostblk luks repair' writes it again",
            )
        await self._repair()

    def free_area(self, size: int) -> int:
        """Where there is room for this many bytes among the areas of key slots."""
        start, length = self.keyslots_area
        at = start
        taken = sorted(
            (int(entry["area"]["offset"]), int(entry["area"]["size"]))
            for entry in self._metadata["keyslots"].values()
        )
        for offset, used in taken:
            if offset - at >= size:
                break
            at = max(at, -(-(offset + used) // ALIGN) * ALIGN)
        if at + size > start + length:
            raise no_slot("there is no room for another key slot", "remove one first")
        return at

    def _hash(self) -> str:
        for slot in self.active():
            return slot.af_hash
        return "sha256"

    def _area_cipher(self) -> tuple[str, int]:
        """What the areas of new slots are encrypted with: as the disk, or as others have it."""
        wanted = self.disk_digest
        for slot in self.active():
            if slot.digest == wanted:
                return slot.cipher, slot.area_key_size
        return DEFAULT_AREA_CIPHER

    def _area_key_size(self) -> int:
        return self._area_cipher()[1]

    def new_slot(self, number: int | None, key_size: int, digest: str, made: Kdf) -> Slot:
        used = {int(name) for name in self._metadata["keyslots"]}
        if number is None:
            free = [index for index in range(json2.SLOTS) if index not in used]
            if not free:
                raise no_slot(f"all {json2.SLOTS} key slots are in use", "remove one first")
            number = free[0]
        elif not 0 <= number < json2.SLOTS:
            raise no_slot(f"there is no key slot {number}", f"they are 0 to {json2.SLOTS - 1}")
        elif number in used:
            raise no_slot(f"key slot {number} is in use", "remove it first, or choose another")
        cipher, area_key_size = self._area_cipher()
        place = self.free_area(_area_size(key_size))
        return Slot(number, made, key_size, place, cipher, area_key_size, self._hash(), digest)

    async def _store(self, slot: Slot, material: bytes) -> None:
        # Key material where no copy of the header points to, then the copies.
        await self.storage.write(slot.area_offset, material)
        await self.storage.flush()
        metadata = self.metadata
        number = str(slot.number)
        metadata["keyslots"][number] = slot_json(slot)
        metadata["digests"][slot.digest]["keyslots"].append(number)
        await self._write(metadata)

    async def _erase(self, number: int) -> None:
        # First what the passphrase unlocks: whatever happens then, it does not any more.
        name = str(number)
        place = self._metadata["keyslots"][name]["area"]
        await self.destroy_area(int(place["offset"]), int(place["size"]))
        metadata = self.metadata
        del metadata["keyslots"][name]
        for kind in ("digests", "tokens"):
            for entry in metadata[kind].values():
                entry["keyslots"] = [other for other in entry["keyslots"] if other != name]
        await self._write(metadata)

    async def destroy_leftovers(self, areas: Iterable[tuple[int, int]]) -> None:
        """Destroy areas (offset, size) that were given up, unless a new slot lies there already."""
        async with self.changing:
            used = [
                (int(entry["area"]["offset"]), int(entry["area"]["size"]))
                for entry in self._metadata["keyslots"].values()
            ]
            for offset, size in areas:
                if not any(at < offset + size and offset < at + length for at, length in used):
                    async with self.step():
                        await self.destroy_area(offset, size)

    async def destroy_area(self, offset: int, size: int) -> None:
        """Overwrite it with noise."""
        for at in range(offset, offset + size, 1 << 20):
            length = min(1 << 20, offset + size - at)
            await self.storage.write(at, os.urandom(length))
        await self.storage.flush()


class _Draft(Luks2):
    """Metadata that nobody has written yet."""

    async def _write(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata


def new_digest(
    key: SecretBytes, hash: str = "sha256", *, milliseconds: int = DIGEST_MILLISECONDS
) -> dict[str, Any]:
    """A digest of a volume key, for `metadata["digests"]`; measures this machine for a moment."""
    length = hashes.digest_size(hash)
    count = kdf.pbkdf2_for(hash, milliseconds, length)
    made = Digest.of(key, Kdf(kdf.PBKDF2, os.urandom(32), hash=hash, iterations=count), length)
    return digest_json(made)


def digest_json(digest: Digest) -> dict[str, Any]:
    """A digest that nothing belongs to yet."""
    return {
        "type": kdf.PBKDF2,
        "keyslots": [],
        "segments": [],
        "hash": digest.kdf.hash,
        "iterations": digest.kdf.iterations,
        "salt": _base64(digest.kdf.salt),
        "digest": _base64(digest.value),
    }


def slot_json(slot: Slot) -> dict[str, Any]:
    """A key slot."""
    made = slot.kdf
    costs: dict[str, Any] = {"time": made.time, "memory": made.memory, "cpus": made.cpus}
    if made.type == kdf.PBKDF2:
        costs = {"hash": made.hash, "iterations": made.iterations}
    return {
        "type": "luks2",
        "key_size": slot.key_size,
        "af": {"type": "luks1", "stripes": 4000, "hash": slot.af_hash},
        "area": {
            "type": "raw",
            "offset": str(slot.area_offset),
            "size": str(_area_size(slot.key_size)),
            "encryption": slot.cipher,
            "key_size": slot.area_key_size,
        },
        "kdf": {"type": made.type, **costs, "salt": _base64(made.salt)},
    }


def empty(
    options: CreateOptions, spec: CipherSpec, offset: int, keyslots_size: int, digest: Digest
) -> tuple[Binary, dict[str, Any]]:
    """A new header without key slots, for data that start at `offset`."""
    size = options.metadata_size
    metadata: dict[str, Any] = {
        "keyslots": {},
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(offset),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": spec.text,
                "sector_size": options.sector_size,
            }
        },
        "digests": {"0": digest_json(digest) | {"segments": ["0"]}},
        "config": {
            "json_size": str(size - binary2.BINARY),
            "keyslots_size": str(keyslots_size),
        },
    }
    json2.check(metadata, size)
    binary = Binary(
        size, 0, _field(options.label), binary2.CHECKSUM, b"", options.uuid or str(uuid.uuid4()),
        _field(options.subsystem),
    )  # fmt: skip
    return binary, metadata


def default_keyslots_size(metadata_size: int, data_offset: int | None) -> int:
    """What is left of 16 MiB, or of what is before the data (cryptsetup's choice)."""
    whole = 16 << 20 if data_offset is None else data_offset
    return max(0, min(whole - 2 * metadata_size, LARGEST_AREA) // ALIGN * ALIGN)


def with_slot(metadata: dict[str, Any], slot: Slot) -> dict[str, Any]:
    """The metadata of a new header, with its first slot."""
    metadata["keyslots"][str(slot.number)] = slot_json(slot)
    metadata["digests"]["0"]["keyslots"] = [str(slot.number)]
    return metadata


def _area_size(key_size: int) -> int:
    return -(-material_size(key_size) // ALIGN) * ALIGN


def _by_number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _field(text: str | None) -> bytes:
    return (text or "").encode()
