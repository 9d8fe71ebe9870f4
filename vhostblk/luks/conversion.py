# SPDX-License-Identifier: GPL-2.0-or-later
"""From LUKS1 to LUKS2 where the header is: same data, same key, same passphrases.

Nothing of the disk moves, and of the key material only what lies where the two copies of the
new header are to be: 2 x 16 KiB from the start (LUKS2 On-Disk Format Specification 1.1, section 2),
which is where LUKS1 has that of slot 0. Steps, with a flush after each:

 1. the key material in the way is copied to the place of a slot that is not in use;
 2. both slots exchange their places, with one write of the sector that describes them: still LUKS1;
 3. the second copy of the new header is written, where nothing of use is any more;
 4. the first sector of the first copy, which makes it LUKS2: the rest of it does not match its
    checksum yet, and so the second copy counts;
 5. the rest of the first copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vhostblk.luks import binary2, json2, luks1, luks2
from vhostblk.luks.binary2 import Binary, Copy, Found
from vhostblk.luks.ciphers import SECTOR
from vhostblk.luks.errors import error, no_slot
from vhostblk.luks.luks1 import Header, Luks1
from vhostblk.luks.luks2 import Luks2
from vhostblk.luks.slots import material_size
from vhostblk.luks.volume import Volume

HEADER = binary2.SIZES[0]
IN_THE_WAY = 2 * HEADER


async def convert(volume: Volume) -> Luks2:
    """Make it LUKS2. The old `volume` is of no use afterwards, and says so."""
    if not isinstance(volume, Luks1):
        raise error("luks-version", "the header is LUKS2 already")
    async with volume.changing:
        volume.check_current()
        moved = _make_room(volume.header)
        after = Luks1(volume.storage, volume.limits, moved)
        binary, metadata = _new_header(after)
        second = binary2.pack(binary, metadata, HEADER)
        first = binary2.pack(binary, metadata, 0)
        async with volume.step():
            if moved != volume.header:
                await _move(volume, moved)
            for offset, data in (
                (HEADER, second), (0, first[:SECTOR]), (SECTOR, first[SECTOR:])
            ):  # fmt: skip
                await volume.storage.write(offset, data)
                await volume.storage.flush()
        volume.converted = True
    new = Luks2(volume.storage, volume.limits, Found(Copy(binary, metadata)))
    new.step = volume.step
    return new


def _make_room(header: Header) -> Header:
    """The same header with no key material where the new one will be."""
    slots = list(header.slots)
    for number, entry in enumerate(slots):
        if not entry.active or entry.material * SECTOR >= IN_THE_WAY:
            continue
        for other, place in enumerate(slots):
            free = not place.active and place.material * SECTOR >= IN_THE_WAY
            if free and _described_in_one_sector(number, other):
                slots[number] = replace(entry, material=place.material)
                slots[other] = replace(place, material=entry.material)
                break
        else:
            raise no_slot(
                f"the key material of slot {number} has to move, and there is no room for it",
                "remove one of the key slots 1 to 5",
            )
    return replace(header, slots=tuple(slots))


def _described_in_one_sector(number: int, other: int) -> bool:
    return all(luks1.slot_place(slot)[1] <= SECTOR for slot in (number, other))


async def _move(volume: Luks1, moved: Header) -> None:
    size = material_size(moved.key_size)
    for old, new in zip(volume.header.slots, moved.slots, strict=True):
        if new.active and new != old:
            material = await volume.storage.read(old.material * SECTOR, size)
            await volume.storage.write(new.material * SECTOR, material)
    await volume.storage.flush()
    await volume.storage.write(0, moved.pack()[:SECTOR])
    await volume.storage.flush()


def _new_header(volume: Luks1) -> tuple[Binary, dict[str, Any]]:
    """What it will say; refused before anything is written if it cannot be."""
    segment = volume.segment
    # A detached header has the room that there is.
    room = segment.offset or volume.storage.size
    size = luks2.default_keyslots_size(HEADER, room)
    if not size:
        raise no_slot(f"a LUKS2 header needs more than the {room} bytes that this one has")
    slots = {str(slot.number): luks2.slot_json(slot) for slot in volume.active()}
    digest = luks2.digest_json(volume.digests["0"])
    metadata: dict[str, Any] = {
        "keyslots": slots,
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(segment.offset),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": segment.cipher,
                "sector_size": segment.sector_size,
            }
        },
        "digests": {"0": digest | {"keyslots": list(slots), "segments": ["0"]}},
        "config": {"json_size": str(HEADER - binary2.BINARY), "keyslots_size": str(size)},
    }
    json2.check(metadata, HEADER)
    return Binary(HEADER, 1, b"", binary2.CHECKSUM, b"", volume.uuid, b""), metadata
