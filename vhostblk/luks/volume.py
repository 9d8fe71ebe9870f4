# SPDX-License-Identifier: GPL-2.0-or-later
"""A LUKS header that is open: what it says, its key slots, and changing them.

Opening never writes. Every change is made in steps with a flush in between, such that whoever
opens the header after a crash at any moment finds either the old key slots or the new ones, and
every passphrase that is not itself being removed still unlocks. There is to be one `Volume` of a
header at a time: it does not look whether others have written.

luks1.py and luks2.py have what the versions do not share.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vhostblk.luks import choices, kdf
from vhostblk.luks.errors import bad_passphrase, error, no_slot, too_costly
from vhostblk.luks.kdf import Limits
from vhostblk.luks.options import KdfOptions
from vhostblk.luks.slots import Digest, Slot, SlotInfo, material_size
from vhostblk.luks.storage import Storage, read_up_to
from vhostblk.schema import VhostblkError
from vhostblk.secret import SecretBytes
from vhostblk.secret.memory import Buffer

PATIENCE = 200.0
"""Seconds, roughly, that trying a passphrase on all slots may take."""


@dataclass(frozen=True)
class Segment:
    """A part of the disk, and what it is encrypted with."""

    offset: int
    """Where it starts on the storage, in bytes."""
    size: int | None
    """Bytes; None: up to the end of the storage."""
    sector_size: int
    cipher: str
    """As dm-crypt has it; "" if it is not encrypted."""
    iv_offset: int
    """Added to the number of a sector, in 512 bytes, to have its IV."""
    number: int = 0
    digest: str = "0"
    """The digest of the key it is encrypted with."""
    flags: tuple[str, ...] = ()

    @property
    def is_backup(self) -> bool:
        """Whether it is no part of the disk as it is now."""
        return any(flag.startswith("backup") for flag in self.flags)


class Volume(abc.ABC):
    """An open header."""

    version: int
    uuid: str
    damage: tuple[str, ...] = ()
    """What is wrong with it and did not keep it from being opened; `repair()` may help."""

    def __init__(self, storage: Storage, limits: Limits) -> None:
        self.storage = storage
        self.limits = limits
        self.converted = False
        """There is another `Volume` of this header now (conversion.py)."""
        self.step: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
        """Entered around what is written for a change of key slots, without any derivation."""
        self.changing = asyncio.Lock()
        """Held by whoever changes key slots, from the first look at them to the last write."""

    # ---- what the versions have

    @property
    @abc.abstractmethod
    def key_size(self) -> int:
        """Bytes of the volume key."""

    @property
    @abc.abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """The parts of the disk, in order of their numbers, with those that are backups."""

    @property
    @abc.abstractmethod
    def header_end(self) -> int:
        """Bytes from its start on that are the header's, with all that it may ever write to."""

    @property
    @abc.abstractmethod
    def digests(self) -> dict[str, Digest]:
        """The digests of volume keys, by number."""

    @abc.abstractmethod
    def active(self) -> list[Slot]:
        """The key slots that can hold a key, in the order in which to try them."""

    @abc.abstractmethod
    def slots(self) -> list[SlotInfo]:
        """All key slots."""

    @abc.abstractmethod
    async def repair(self) -> bool:
        """Write again what is damaged; whether there was something."""

    @abc.abstractmethod
    def new_slot(self, number: int | None, key_size: int, digest: str, made: kdf.Kdf) -> Slot:
        """A slot that is free, by number or the first, with a place for its key."""

    @abc.abstractmethod
    def _hash(self) -> str:
        """The hash that new slots use."""

    @abc.abstractmethod
    def _area_key_size(self) -> int:
        """Bytes of the key that a new slot's area is encrypted with."""

    @abc.abstractmethod
    async def _make_sound(self) -> None:
        """Before a change: both copies of the header are good afterwards, or it is refused."""

    @abc.abstractmethod
    async def _store(self, slot: Slot, material: bytes) -> None:
        """Write a new slot."""

    @abc.abstractmethod
    async def _erase(self, number: int) -> None:
        """Destroy what a slot holds and free it."""

    # ---- what they share

    @property
    def segment(self) -> Segment:
        """The disk, or its first part."""
        return next(segment for segment in self.segments if not segment.is_backup)

    @property
    def disk_digest(self) -> str:
        """The digest of the key that the disk is read with."""
        return self.segment.digest

    @property
    def is_reencrypting(self) -> bool:
        """Whether the disk has two keys at the moment."""
        return False

    def check_current(self) -> None:
        """Whoever has waited for `changing` looks whether there is still something to change."""
        if self.converted:
            raise error("luks-busy", "the header has just been converted to LUKS2", "try again")

    def _check_idle(self) -> None:
        self.check_current()
        if self.is_reencrypting:
            raise error("luks-busy", "the disk is being re-encrypted", "wait until that is done")

    async def unlock(
        self,
        passphrase: Buffer | SecretBytes,
        slot: int | None = None,
        *,
        digest: str | None = None,
    ) -> tuple[int, SecretBytes]:
        """A slot that the passphrase opens, and the volume key, which the caller closes.

        With `slot` only this one is tried, otherwise those that know the key of the disk, or the
        key that `digest` stands for.
        """
        words = _view(passphrase)
        skipped: VhostblkError | None = None
        candidates, cost = [], 0.0
        for entry in self._candidates(slot, digest):
            try:
                cost += self._cost_of(entry)
            except VhostblkError as error:
                skipped = skipped or error
                continue
            candidates.append(entry)
        _check_patience(cost, len(candidates))
        for entry in candidates:
            key = await self._try(entry, self.digests.get(entry.digest), words)
            if key is not None:
                return entry.number, key
        # What has not been tried might have been it.
        raise skipped or bad_passphrase()

    def _cost_of(self, slot: Slot) -> float:
        """Roughly the seconds that a passphrase takes there; refused if it may not be tried."""
        slot.check(self.limits)
        known = self.digests.get(slot.digest)
        if known is None:
            return slot.kdf.cost()
        known.check(self.limits)
        return slot.kdf.cost() + known.kdf.cost()

    async def _try(
        self, slot: Slot, digest: Digest | None, passphrase: Buffer
    ) -> SecretBytes | None:
        size = material_size(slot.key_size)
        material = await read_up_to(self.storage, slot.area_offset, size)
        if len(material) < size:
            return None  # the file has been cut off

        def work() -> SecretBytes | None:
            key = slot.open(passphrase, material)
            if digest is not None and digest.matches(key):
                return key
            key.close()
            return None

        return await kdf.in_thread(work)

    def _candidates(self, number: int | None, digest: str | None) -> list[Slot]:
        if number is not None:
            found = self._find(number)
            return [found] if digest in (None, found.digest) else []
        wanted = self.disk_digest if digest is None else digest
        return [slot for slot in self.active() if slot.digest == wanted and slot.priority]

    def _find(self, number: int) -> Slot:
        for slot in self.active():
            if slot.number == number:
                return slot
        used = ", ".join(str(slot.number) for slot in self.active()) or "none"
        raise no_slot(f"key slot {number} is not in use", f"in use: {used}")

    async def test(self, passphrase: Buffer | SecretBytes, slot: int | None = None) -> int:
        """The slot that the passphrase opens."""
        number, key = await self.unlock(passphrase, slot)
        key.close()
        return number

    async def add_slot(
        self,
        key: SecretBytes,
        passphrase: Buffer | SecretBytes,
        slot: int | None = None,
        kdf_options: KdfOptions | None = None,
        *,
        digest: str | None = None,
    ) -> int:
        """Let a passphrase unlock the volume key as well; the number of its slot."""
        async with self.changing:
            return await self.insert_slot(key, passphrase, slot, kdf_options, digest)

    async def insert_slot(
        self,
        key: SecretBytes,
        passphrase: Buffer | SecretBytes,
        number: int | None,
        kdf_options: KdfOptions | None,
        digest: str | None,
    ) -> int:
        """add_slot() for whoever holds `changing`."""
        self._check_idle()
        words = _view(passphrase)
        if not len(words):
            raise no_slot("the new passphrase is empty")
        name = self.disk_digest if digest is None else digest
        known = self.digests.get(name)
        if known is None:
            raise no_slot(f"the header has no digest {name}")
        known.check(self.limits)
        async with self.step():
            await self._make_sound()
        chosen = kdf_options or KdfOptions()

        def work() -> tuple[Slot, bytes]:
            if not known.matches(key):
                raise no_slot("this is not the volume key")
            made = choices.kdf_of(chosen, self.version, self._hash(), self._area_key_size())
            made.check(self.limits, "the new key slot")
            new = self.new_slot(number, len(key), name, made)
            return new, new.seal(words, key)

        self.new_slot(number, len(key), name, _NOTHING)  # is there room?
        new, material = await kdf.in_thread(work)
        async with self.step():
            await self._store(new, material)
        return new.number

    async def add_passphrase(
        self,
        known: Buffer | SecretBytes,
        new: Buffer | SecretBytes,
        slot: int | None = None,
        kdf_options: KdfOptions | None = None,
    ) -> int:
        """The same for whoever has a passphrase, and not the key."""
        _, key = await self.unlock(known)
        with key:
            return await self.add_slot(key, new, slot, kdf_options)

    async def remove_slot(self, number: int, *, force: bool = False) -> None:
        """Destroy a key slot. The last one only with `force`: the disk is lost with it."""
        async with self.changing:
            await self._remove([number], force)

    async def remove_passphrase(
        self, passphrase: Buffer | SecretBytes, *, force: bool = False
    ) -> list[int]:
        """Destroy all slots that the passphrase opens; their numbers."""
        async with self.changing:
            numbers = []
            wanted = self.disk_digest
            slots = [slot for slot in self.active() if slot.digest == wanted]
            _check_patience(sum(self._cost_of(slot) for slot in slots), len(slots))
            for slot in slots:
                try:
                    _, key = await self.unlock(passphrase, slot.number)
                except VhostblkError as error:
                    if (error.data or {}).get("code") == "bad-passphrase":
                        continue
                    raise
                key.close()
                numbers.append(slot.number)
            if not numbers:
                raise bad_passphrase()
            await self._remove(numbers, force)
            return sorted(numbers)

    async def _remove(self, numbers: list[int], force: bool) -> None:
        self._check_idle()
        used = {info.number for info in self.slots() if info.active}
        for number in numbers:
            if number not in used:
                self._find(number)
        disk = self.disk_digest
        left = [slot for slot in self.active() if slot.digest == disk]
        if not force and left and all(slot.number in numbers for slot in left):
            raise no_slot(
                "these are the last key slots: without them nobody can ever read the disk again"
                if len(numbers) > 1
                else "this is the last key slot: without it nobody can ever read the disk again",
                "add another one first, or force it",
            )
        async with self.step():
            await self._make_sound()
            for number in numbers:
                await self._erase(number)

    async def rotate(
        self,
        old: Buffer | SecretBytes,
        new: Buffer | SecretBytes,
        slot: int | None = None,
        kdf_options: KdfOptions | None = None,
    ) -> int:
        """Replace a passphrase: the new one gets a slot of its own before the old one loses its."""
        number, key = await self.unlock(old, slot)
        with key:
            return await self.replace_slot(number, key, new, kdf_options)

    async def replace_slot(
        self,
        number: int,
        key: SecretBytes,
        new: Buffer | SecretBytes,
        kdf_options: KdfOptions | None = None,
    ) -> int:
        """The same for whoever has unlocked the old slot."""
        async with self.changing:
            digest = self._find(number).digest
            added = await self.insert_slot(key, new, None, kdf_options, digest)
            await self._remove([number], False)
            return added


def describe(volume: Volume) -> dict[str, Any]:
    """What a header says, for the control socket (docs/luks.md)."""
    segment = volume.segment
    told: dict[str, Any] = {
        "version": volume.version,
        "uuid": volume.uuid,
        "cipher": segment.cipher,
        "key-size": volume.key_size,
        "sector-size": segment.sector_size,
        "payload-offset": segment.offset,
        "slots": [slot.describe() for slot in volume.slots()],
    }
    if volume.is_reencrypting:
        told["reencrypting"] = True
    if volume.damage:
        told["damage"] = list(volume.damage)
    return told


def _check_patience(cost: float, slots: int) -> None:
    if cost > PATIENCE and slots > 1:
        raise too_costly(
            f"trying the passphrase on {slots} key slots would take minutes", "name the slot"
        )


_NOTHING = kdf.Kdf("pbkdf2", b"", iterations=1)


def _view(secret: Buffer | SecretBytes) -> memoryview:
    return secret.view() if isinstance(secret, SecretBytes) else memoryview(secret)
