# SPDX-License-Identifier: GPL-2.0-or-later
"""Internal snapshots of a live image.

Nothing is in flight meanwhile. Everything is written first, so that the image on disk is
complete; the format's module changes it there (snapshots.py); then what was in memory is
forgotten and read again, because clusters that were ours are shared now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vhostblk.nodes.qcow2 import snapshots
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.driver import Qcow2

Change = Literal["create", "delete", "apply"]


async def change(live: Qcow2, what: Change, name: str) -> snapshots.Snapshot:
    """Create, delete or go back to a snapshot."""
    if live.read_only or live.stopped:
        raise VhostblkError(
            f"Node '{live.name}' cannot have its snapshots changed: it is "
            + ("read-only" if live.read_only else "corrupt"),
            data={"code": "read-only" if live.read_only else "corrupt", "node": live.name},
        )
    await live.write_everything()
    editor = snapshots.Editor(live.file, live.header)
    try:
        if what == "create":
            return await editor.create(name)
        if what == "delete":
            return await editor.delete(name)
        return await editor.apply(name)
    finally:
        await live.read_again()


async def listed(live: Qcow2) -> list[snapshots.Snapshot]:
    """All snapshots of the image."""
    return list((await snapshots.read_table(live.file, live.header)).snapshots)
