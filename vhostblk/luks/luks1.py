# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS1: the header, its eight key slots, and writing them.

LUKS1 On-Disk Format Specification 1.2.3, section 3 (figures 1 to 3). All numbers are big-endian,
all offsets in sectors of 512 bytes.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass, replace

from vhostblk.luks import af, hashes
from vhostblk.luks.ciphers import SECTOR, CipherSpec
from vhostblk.luks.errors import bad_header, no_slot
from vhostblk.luks.kdf import Kdf, Limits
from vhostblk.luks.slots import LARGEST_KEY, Digest, Slot, SlotInfo, material_size
from vhostblk.luks.storage import Storage
from vhostblk.luks.volume import Segment, Volume
from vhostblk.schema import VhostblkError

MAGIC = b"LUKS\xba\xbe"
SLOTS = 8
ALIGN = 4096  # of key material
DIGEST_SIZE = 20

_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
SIZE = _HEAD.size + SLOTS * _SLOT.size  # 592
_ACTIVE = 0x00AC71F3
_DEAD = 0x0000DEAD


@dataclass(frozen=True)
class KeySlot:
    """A key slot as it is stored."""

    active: bool
    iterations: int
    salt: bytes
    material: int
    """Where its key material is, in sectors."""

    def pack(self) -> bytes:
        state = _ACTIVE if self.active else _DEAD
        return _SLOT.pack(state, self.iterations, self.salt, self.material, af.STRIPES)


@dataclass(frozen=True)
class Header:
    """The header as it is stored."""

    cipher: str
    mode: str
    hash: str
    payload: int
    """Where the data start, in sectors."""
    key_size: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    def pack(self) -> bytes:
        """The bytes."""
        head = _HEAD.pack(
            MAGIC, 1, self.cipher.encode(), self.mode.encode(), self.hash.encode(), self.payload,
            self.key_size, self.digest, self.digest_salt, self.digest_iterations,
            self.uuid.encode(),
        )  # fmt: skip
        return head + b"".join(slot.pack() for slot in self.slots)

    @property
    def spec(self) -> str:
        """What the disk and the key material are encrypted with."""
        return f"{self.cipher}-{self.mode}"


def parse(data: bytes) -> Header:
    """The header in these bytes, checked."""
    if len(data) < SIZE:
        raise bad_header("it is cut off")
    (_, _, cipher, mode, hash, payload, key_size, digest, salt, iterations, uuid) = (
        _HEAD.unpack_from(data)
    )
    slots = []
    for number in range(SLOTS):
        state, count, own_salt, material, stripes = _SLOT.unpack_from(
            data, _HEAD.size + number * _SLOT.size
        )
        if state not in (_ACTIVE, _DEAD):
            raise bad_header(f"key slot {number} is neither active nor inactive ({state:#x})")
        if stripes != af.STRIPES:
            raise bad_header(f"key slot {number} has {stripes} stripes, not {af.STRIPES}")
        slots.append(KeySlot(state == _ACTIVE, count, own_salt, material))
    header = Header(
        _text(cipher, "cipher"), _text(mode, "mode"), _text(hash, "hash"), payload, key_size,
        digest, salt, iterations, _text(uuid, "UUID"), tuple(slots),
    )  # fmt: skip
    _check(header)
    return header


def slot_place(number: int) -> tuple[int, int]:
    """Where in the header a key slot is described, in bytes: first, and after the last."""
    at = _HEAD.size + number * _SLOT.size
    return at, at + _SLOT.size


def _check(header: Header) -> None:
    if not 1 <= header.key_size <= LARGEST_KEY:
        raise bad_header(f"a volume key of {header.key_size} bytes")
    CipherSpec.parse(header.spec).check_key_size(header.key_size)
    hashes.digest_size(header.hash)
    sectors = material_size(header.key_size) // SECTOR
    end = 0
    # Their places, in order: behind the header, before the data, none in another.
    for number, slot in sorted(enumerate(header.slots), key=lambda entry: entry[1].material):
        if slot.material * SECTOR < SIZE:
            raise bad_header(f"the key material of slot {number} is inside the header")
        if slot.material < end:
            raise bad_header(f"the key material of slot {number} overlaps that of another")
        end = slot.material + sectors
        if header.payload and end > header.payload:  # 0: the data are elsewhere
            raise bad_header(f"the key material of slot {number} overlaps the data")


def _text(field: bytes, what: str) -> str:
    text, _, _ = field.partition(b"\0")
    if not text.isascii() or not text.decode("ascii").isprintable():
        raise bad_header(f"the name of the {what} is not text")
    return text.decode("ascii")


class Luks1(Volume):
    """An open LUKS1 header."""

    version = 1

    def __init__(self, storage: Storage, limits: Limits, header: Header) -> None:
        super().__init__(storage, limits)
        self.header = header
        self.uuid = header.uuid

    @property
    def key_size(self) -> int:
        return self.header.key_size

    @property
    def hash(self) -> str:
        """The hash of everything."""
        return self.header.hash

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (Segment(self.header.payload * SECTOR, None, SECTOR, self.header.spec, 0),)

    @property
    def header_end(self) -> int:
        size = material_size(self.header.key_size)
        return max(slot.material * SECTOR + size for slot in self.header.slots)

    @property
    def digests(self) -> dict[str, Digest]:
        header = self.header
        made = Kdf(
            "pbkdf2", header.digest_salt, hash=header.hash, iterations=header.digest_iterations
        )
        return {"0": Digest(made, header.digest)}

    def active(self) -> list[Slot]:
        return [
            self._slot(number, entry, self._kdf(entry))
            for number, entry in enumerate(self.header.slots)
            if entry.active
        ]

    def slots(self) -> list[SlotInfo]:
        told = []
        for number, entry in enumerate(self.header.slots):
            if not entry.active:
                told.append(SlotInfo(number, False))
                continue
            slot, problem = self._slot(number, entry, self._kdf(entry)), None
            try:
                slot.check(self.limits)
            except VhostblkError as error:
                problem = error.desc
            told.append(
                SlotInfo(number, True, slot.kdf, slot.area_offset, slot.key_size, slot.cipher,
                         digest="0", problem=problem)
            )  # fmt: skip
        return told

    async def repair(self) -> bool:
        return False  # there is one copy only

    async def _make_sound(self) -> None:
        return

    def _kdf(self, entry: KeySlot) -> Kdf:
        return Kdf("pbkdf2", entry.salt, hash=self.header.hash, iterations=entry.iterations)

    def _slot(self, number: int, entry: KeySlot, made: Kdf) -> Slot:
        header = self.header
        return Slot(
            number, made, header.key_size, entry.material * SECTOR, header.spec, header.key_size,
            header.hash, "0",
        )  # fmt: skip

    def _hash(self) -> str:
        return self.header.hash

    def _area_key_size(self) -> int:
        return self.header.key_size

    def new_slot(self, number: int | None, key_size: int, digest: str, made: Kdf) -> Slot:
        slots = self.header.slots
        free = [index for index, entry in enumerate(slots) if not entry.active]
        if number is None:
            if not free:
                raise no_slot("all eight key slots are in use", "remove one first")
            number = free[0]
        elif not 0 <= number < SLOTS:
            raise no_slot(f"there is no key slot {number}", f"they are 0 to {SLOTS - 1}")
        elif number not in free:
            raise no_slot(f"key slot {number} is in use", "remove it first, or choose another")
        return self._slot(number, slots[number], made)

    async def _store(self, slot: Slot, material: bytes) -> None:
        # Key material, then the slot's description, still inactive, then the word that makes it
        # active: the description may lie in two sectors, of which a crash may leave one written.
        await self.storage.write(slot.area_offset, material)
        entry = KeySlot(False, slot.kdf.iterations, slot.kdf.salt, slot.area_offset // SECTOR)
        await self._write_slot(slot.number, entry)
        await self._write_slot(slot.number, replace(entry, active=True))

    async def _erase(self, number: int) -> None:
        # First what the passphrase unlocks: whatever happens then, it does not any more.
        entry = self.header.slots[number]
        size = material_size(self.header.key_size)
        await self.storage.write(entry.material * SECTOR, os.urandom(size))
        await self.storage.flush()
        await self._write_slot(number, KeySlot(False, 0, bytes(32), entry.material))

    async def _write_slot(self, number: int, entry: KeySlot) -> None:
        slots = list(self.header.slots)
        slots[number] = entry
        header = replace(self.header, slots=tuple(slots))
        at, after = slot_place(number)
        start, end = at // SECTOR * SECTOR, -(-after // SECTOR) * SECTOR
        sectors = bytearray(await self.storage.read(start, end - start))
        sectors[at - start : after - start] = entry.pack()
        await self.storage.write(start, bytes(sectors))
        await self.storage.flush()
        self.header = header


def empty(
    spec: CipherSpec, hash: str, key_size: int, payload: int, digest: Digest, name: str | None
) -> Header:
    """A new header without key slots, the data of which start at `payload` bytes."""
    cipher, _, mode = spec.text.partition("-")
    sectors = -(-material_size(key_size) // ALIGN) * ALIGN // SECTOR
    first = ALIGN // SECTOR
    slots = tuple(KeySlot(False, 0, bytes(32), first + number * sectors) for number in range(SLOTS))
    header = Header(
        cipher, mode, hash, payload // SECTOR, key_size, digest.value, digest.kdf.salt,
        digest.kdf.iterations, name or str(uuid.uuid4()), slots,
    )  # fmt: skip
    _check(header)
    return header


def area_end(key_size: int) -> int:
    """Where the key material of a new header ends, in bytes."""
    return ALIGN + SLOTS * (-(-material_size(key_size) // ALIGN) * ALIGN)
