# SPDX-License-Identifier: GPL-2.0-or-later
"""A live image whose file is replaced by another one (`blockdev-replace`). Nothing is in flight.

The other file must be a copy: it has the header that is in memory, with the token of the log
(journal.py), which tells a copy made since the image was opened from an older one. It may have
been made before the last flush, so all tables that memory knows are written to it, too. Then it
gets a log of its own, and the old file loses its token: whenever this process is killed, each of
the two is an image by itself, and what is written from here on is found in one of them only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhostblk.nodes._map_log import LogFile
from vhostblk.nodes.driver import Child, NodeDriver
from vhostblk.nodes.qcow2 import journal
from vhostblk.nodes.qcow2.header import BadImage, Header
from vhostblk.nodes.qcow2.layout import commit_header, read_header, rewrite_header
from vhostblk.nodes.qcow2.storage import ChildStorage

if TYPE_CHECKING:
    from vhostblk.nodes.qcow2.driver import Qcow2

logger = logging.getLogger(__name__)


@dataclass
class Move:
    """What a move has exchanged, to be brought back or freed."""

    header: Header
    log: LogFile | None
    token: int
    new: ChildStorage
    """The new file, also when the image is in the old one again."""
    new_log: LogFile | None = None


async def check(live: Qcow2) -> None:
    """Whether the image is where it is said to be now."""
    try:
        header = await read_header(live.file)
    except BadImage as error:
        raise live.not_a_copy(error.desc) from None
    if live.header.autoclear & journal.HAS_LOG:
        # The token says enough, and the table may have grown since the copy was made.
        offset, clusters = live.refcounts.table_offset, live.refcounts.table_clusters
        header = header.replace(refcount_table_offset=offset, refcount_table_clusters=clusters)
    if header != live.header:
        raise live.not_a_copy("its header is another one")
    end = await live.refcounts.end(set(live.writeback.known_tables()))
    size = live.geometry.cluster_size
    if -(-live.file.size // size) * size < end:
        raise live.not_a_copy(f"it has {live.file.size} bytes, and {end} are in use")


async def move(live: Qcow2, before: Mapping[str, NodeDriver]) -> None:
    """Carry it out. If this fails, `move_back()` undoes it."""
    live.move_under_way = move = Move(
        live.header, live.log, live.token, storage_of(live, live.child("file").node)
    )
    old = storage_of(live, before["file"])
    await live.complete_last_cluster()
    await live.writeback.write_again(old)
    await live.file.flush()
    live.allocator.adopt(live.refcounts)  # what lies behind may be anything
    others = move.header.autoclear & ~journal.HAS_LOG
    plain = move.header.replace(autoclear=others)
    move.new_log, token, _ = await journal.open_for(live, plain)
    if move.header.autoclear & journal.HAS_LOG:
        await commit_header(old, move.header, autoclear=others)
    if move.new_log is not None:
        plain = plain.replace(autoclear=others | token)
        move.new_log.belongs_to(token.to_bytes(8, "big"))
    await rewrite_header(live.file, plain)
    await live.file.flush()
    live.begin_log(move.new_log, token, plain)


async def move_back(live: Qcow2, move: Move) -> None:
    """The image is in its old file again, which is complete."""
    live.begin_log(move.log, move.token, move.header)
    if move.new_log is not None:
        move.new_log.close(remove=True)
    live.doubt_header()
    for settle in (live.settle_header, lambda: _restore(move)):
        try:
            await settle()
        except OSError as error:
            logger.error(
                "image '%s' has moved back, and its header not: %s", live.filename(), error
            )


async def _restore(move: Move) -> None:
    """The copy is to be one that can be tried again."""
    await rewrite_header(move.new, move.header)
    await move.new.flush()


def storage_of(live: Qcow2, node: NodeDriver) -> ChildStorage:
    """A node as storage, whatever it is to the image now."""
    child = Child(live.host, "file", node)
    child.refresh()
    return ChildStorage(child)
