# SPDX-License-Identifier: GPL-2.0-or-later
"""Internal snapshots of a live image.

Nothing is in flight meanwhile. Everything is written first, so that the image on disk is
complete; the format's module changes it there (snapshots.py). What was in memory is forgotten
then, because clusters that were ours are shared now. What takes its place is read before the
header is written: after that nothing may fail, and whatever fails before leaves all as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vhostblk.nodes.qcow2 import journal, snapshots
from vhostblk.nodes.qcow2.header import Header
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
    if what == "apply":
        table = await snapshots.read_table(live.file, live.header)
        size = snapshots.find(table, name).disk_size
        if size != live.size:
            raise VhostblkError(
                f"Snapshot '{name}' has {size} bytes and node '{live.name}' {live.size}; "
                "resize the node first (block_resize)",
                data={"code": "size-mismatch", "node": live.name},
            )
        await live.outdate_bitmaps()  # or the header would change twice

    async def write_header(**changes: int) -> Header:
        exchange = await live.prepare_exchange(live.header.replace(**changes))
        await live.write_header(**changes)
        exchange()
        return live.header

    editor = snapshots.Editor(
        live.file, live.header, known=journal.HAS_LOG, write_header=write_header
    )
    try:
        if what == "create":
            return await editor.create(name)
        if what == "delete":
            return await editor.delete(name)
        return await editor.apply(name)
    except BaseException:
        live.allocator.adopt(live.refcounts)  # what was free may hold what was written in vain
        raise
