# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS headers and their key slots: reading, making and changing them.

Nothing in here needs the engine: a header is bytes on a `Storage`, be it a file or a node of the
graph. What encrypts the disk is vhostblk/nodes/luks.py and the engine's `crypt` node. Start with
volume.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhostblk.luks.conversion import convert
    from vhostblk.luks.creation import create
    from vhostblk.luks.kdf import Limits
    from vhostblk.luks.luks1 import Luks1
    from vhostblk.luks.luks2 import Luks2, new_digest
    from vhostblk.luks.opening import open_volume
    from vhostblk.luks.options import CreateOptions, KdfOptions
    from vhostblk.luks.slots import SlotInfo, random_key
    from vhostblk.luks.storage import Storage
    from vhostblk.luks.volume import Segment, Volume, describe

__all__ = [
    "CreateOptions",
    "KdfOptions",
    "Limits",
    "Luks1",
    "Luks2",
    "Segment",
    "SlotInfo",
    "Storage",
    "Volume",
    "convert",
    "create",
    "describe",
    "new_digest",
    "open_volume",
    "random_key",
]

# Loaded when they are used: most backends have nothing encrypted.
_MODULES = {
    "convert": "conversion",
    "create": "creation",
    "Limits": "kdf",
    "Luks1": "luks1",
    "Luks2": "luks2",
    "new_digest": "luks2",
    "open_volume": "opening",
    "CreateOptions": "options",
    "KdfOptions": "options",
    "SlotInfo": "slots",
    "random_key": "slots",
    "Storage": "storage",
    "Segment": "volume",
    "Volume": "volume",
    "describe": "volume",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
