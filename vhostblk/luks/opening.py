# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening a header, whichever version it has."""

from __future__ import annotations

import struct

from vhostblk.luks import binary2, luks1
from vhostblk.luks.errors import error
from vhostblk.luks.kdf import Limits
from vhostblk.luks.luks1 import Luks1
from vhostblk.luks.luks2 import Luks2
from vhostblk.luks.storage import Storage, read_up_to
from vhostblk.luks.volume import Volume


async def open_volume(
    storage: Storage,
    limits: Limits | None = None,
    requirements: frozenset[str] | None = frozenset(),
) -> Volume:
    """The LUKS header on a storage; nothing is written.

    `requirements` are those of LUKS2 that the caller meets; a header with others is refused.
    None: the caller will only look at it.
    """
    limits = limits or Limits()
    start = await read_up_to(storage, 0, luks1.SIZE)
    if start[: len(luks1.MAGIC)] == luks1.MAGIC and len(start) >= 8:
        (version,) = struct.unpack_from(">H", start, len(luks1.MAGIC))
        if version == 1:
            return Luks1(storage, limits, luks1.parse(start))
        # Another one may be damage, which the second copy of a LUKS2 header outlives.
    volume = Luks2(storage, limits, await binary2.find(storage))
    if requirements is not None:
        unmet = sorted(name[:40] for name in volume.requirements - requirements)
        if unmet:
            hint = None
            if any("reencrypt" in name for name in unmet):
                hint = "finish the re-encryption with what began it"
            raise error("luks-requirements", f"LUKS header: it requires {', '.join(unmet)}", hint)
    return volume
