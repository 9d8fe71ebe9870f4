# SPDX-License-Identifier: GPL-2.0-or-later
"""A leg of a quorum: its state, and how to recognise it after a restart.

    in-sync     has everything; votes
    stale       has missed writes, which its dirty map says; gets nothing
    failed      the same, and it did something wrong: an error, or it took too long
    rebuilding  gets all writes, and what it has missed from the others; does not vote

    in-sync, rebuilding ──error, timeout──► failed ──restart, operator──► stale
    stale ──job──► rebuilding ──has everything──► in-sync

The engine does what concerns requests, errors and timeouts among them; the rest is decided here.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
import struct
from enum import Enum
from weakref import WeakKeyDictionary

from vhostblk.engine.quorum import (
    LEG_FAILED,
    LEG_IN_SYNC,
    LEG_REBUILDING,
    LEG_STALE,
    LEG_STATE,
    LEG_WHOLE,
    LegHandle,
)
from vhostblk.nodes.driver import NodeDriver, Relations, present
from vhostblk.nodes.quorum.metadata import LegRecord, Metadata, regions_of


class LegState(Enum):
    """What a leg is good for; the values are those of the engine."""

    IN_SYNC = LEG_IN_SYNC
    STALE = LEG_STALE
    FAILED = LEG_FAILED
    REBUILDING = LEG_REBUILDING

    @property
    def text(self) -> str:
        """As operators see it."""
        return self.name.lower().replace("_", "-")


OUT = (LegState.STALE, LegState.FAILED)


class Leg:
    """One leg. The engine may take it out at any time; everything else happens here."""

    def __init__(
        self,
        node: NodeDriver,
        role: str,
        metadata: Metadata,
        index: int,
        size: int,
        region_bits: int,
    ) -> None:
        self.node = node
        self.role = role
        self.index = index
        self.metadata = metadata
        self.size = size
        """The quorum's. The node of a leg that is out gets it with its rebuild."""
        self.region_bits = region_bits
        self.told = LegState.IN_SYNC
        """The state that operators know."""
        self.reason: str | None = None
        """Why it is not in sync."""
        self.handle = LegHandle(*self._place(), region_bits)
        self._tail_done = 0
        """Where the copied part ends of what only the last bit stands for."""
        self.truncation: asyncio.Future[None] | None = None
        """The last change of its size, which may have been given up."""
        self.left_alone = False
        """Somebody has stopped rebuilding it: nobody begins without being asked."""
        self.failed_rebuilds = 0
        """How often in a row that has failed, through no fault of this leg."""
        self.files = identity(node)
        self.set_forgets(forgets(node))
        self.apart_at = -1
        """How often data had been changed when it ceased to be a leg."""

    def keep_apart(self, changes: int) -> None:
        """It is no leg any more, but may be again, if the change that took it away fails."""
        alone = Metadata(None, self.size, self.region_bits, [(self.node.name, self.files)], 0)
        self.copy_to(alone, 0)
        self.apart_at = changes
        self.moved(alone, 0, self.size)

    def copy_to(self, metadata: Metadata, index: int) -> None:
        """Say the same in another place."""
        since = self.metadata.since(self.index)
        metadata.describe_leg(index, self.handle.word, metadata.generation, since)
        dirty = self.metadata.dirty(self.index)
        if dirty.count(0) < len(dirty):  # new metadata say that there is nothing
            metadata.set_dirty(index, dirty)

    def moved(self, metadata: Metadata, index: int, size: int) -> None:
        """It has another place, which says the same. Nothing is in flight."""
        self.metadata, self.index = metadata, index
        self.handle.move(*self._place())
        self._tail_done = 0
        self.resize(size, has_it=self.state is LegState.IN_SYNC)

    def _place(self) -> tuple[int, int, int]:
        metadata, index = self.metadata, self.index
        bits = metadata.layout.bits
        return metadata.state_address(index), metadata.dirty_address(index), bits

    def resize(self, size: int, *, has_it: bool) -> None:
        """The quorum has that size now, and so has the leg, or not."""
        before, self.size = self.size, size
        if not has_it:
            self.mark(before, max(0, size - before))

    @property
    def strays(self) -> int:
        """How much that was given up is still on its way."""
        truncating = self.truncation is not None and not self.truncation.done()
        return self.handle.strays + truncating

    @property
    def state(self) -> LegState:
        """Now."""
        return LegState(self.handle.word & LEG_STATE)

    def change(self, old: LegState, new: LegState) -> bool:
        """Another state; False if the engine was faster."""
        return self.handle.change(old.value, new.value)

    def set_forgets(self, forgets: bool) -> None:
        """See forgets(). Whatever it had acknowledged may be gone as soon as it fails."""
        self._forgets = forgets
        self.handle.set_forgets(forgets)

    def fail(self, *, whole: bool = False) -> bool:
        """Something is wrong with it, and with `whole` it may have lost what it had acknowledged.

        False if it is known already.
        """
        lost = LEG_WHOLE if whole or self._forgets else 0
        while True:
            word = self.handle.word
            if self.handle.change(word, LEG_FAILED | (word & LEG_WHOLE) | lost):
                return word & LEG_STATE != LEG_FAILED

    # ---- what it has missed

    @property
    def regions(self) -> int:
        """How many there are."""
        return regions_of(self.size, self.region_bits)

    @property
    def dirty_bytes(self) -> int:
        """How much it has missed at most."""
        if self.handle.word & LEG_WHOLE:
            return self.size
        return min(self.size, self.handle.count_dirty(self.regions) << self.region_bits)

    def mark(self, offset: int, length: int) -> None:
        """It does not have what was written to this range."""
        if length:
            first = offset >> self.region_bits
            last = (offset + length - 1) >> self.region_bits
            self.handle.mark(first, last - first + 1, True)

    def mark_whole(self) -> None:
        """It may have missed anything."""
        self.handle.mark(0, self.regions, True)
        word = self.handle.word
        if word & LEG_WHOLE:
            self.handle.change(word, word & ~LEG_WHOLE)

    def settle_flags(self) -> None:
        """What the engine has said in short is said in full."""
        if self.handle.word & LEG_WHOLE:
            self.mark_whole()

    @property
    def tail(self) -> int:
        """The first of those regions that have the last bit together."""
        return self.metadata.layout.bits - 1

    def begin_copying(self) -> None:
        """Somebody is going to copy what it has missed, and to clear that."""
        self._tail_done = 0

    def clear(self, region: int, count: int) -> None:
        """It has these regions now. What has one bit together is told from its start to its end."""
        end = region + count
        if end <= self.tail:
            self.handle.mark(region, count, False)
            return
        if region < self.tail:
            self.handle.mark(region, self.tail - region, False)
        if region <= max(self.tail, self._tail_done) < end:
            self._tail_done = end
        if self._tail_done >= self.regions:
            self._tail_done = 0
            self.handle.mark(self.tail, 1, False)

    def clear_all(self) -> None:
        """It has everything. No bit may stay that is behind the end: there may be more one day."""
        self.handle.mark(0, self.metadata.layout.bits, False)

    def next_run(self, region: int, most: int) -> tuple[int, int] | None:
        """What it has missed from `region` on: the first of some regions in a row, and how many."""
        first, end = self.handle.next_dirty(region, self.regions), self.regions
        if self.tail <= first:
            first = max(first, self._tail_done)
        if first >= end:
            return None
        count = 1
        while count < most and first + count < end:
            if self.handle.next_dirty(first + count, first + count + 1) != first + count:
                break
            count += 1
        return first, count


# ---- recognising


def learn(node: NodeDriver, children_of: Relations[NodeDriver]) -> None:
    """Have answers for identity() and forgets() ready. May wait for the storage: in a thread."""
    identity(node, children_of)
    forgets(node, children_of)


def identity(node: NodeDriver, children_of: Relations[NodeDriver] = present) -> list[str]:
    """The files that a leg's data are in, the top one first, and what is below it behind.

    An overlay that a snapshot has put on top of a leg has the leg's own file behind it, so
    that whoever knows the one recognises the other.
    """
    found: dict[str, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        children = list(children_of(current).values())
        if children:
            waiting += reversed(children)
        else:
            if current not in _FILES:
                _FILES[current] = _file_of(current)
            found[_FILES[current]] = None
    return list(found)


# What a server answers for, as in /proc/filesystems; FUSE has a type for each kind of server.
_SERVED = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "virtiofs", "afs", "gfs2", "ocfs2", "lustre")
_SERVED_DEVICES = ("nbd", "rbd", "drbd")


def forgets(node: NodeDriver, children_of: Relations[NodeDriver] = present) -> bool:
    """Whether a leg may lose what it has not flushed although this host has not gone down.

    A server that dies takes along what it had in its own memory. Local files are in the host's.
    """
    waiting = [node]
    while waiting:
        current = waiting.pop()
        # A backing file is not written to.
        children = [node for name, node in children_of(current).items() if name != "backing"]
        waiting += children
        if not children and _is_served(current):
            return True
    return False


def _is_served(node: NodeDriver) -> bool:
    if node not in _SERVED_NODES:
        _SERVED_NODES[node] = _find_out(node.filename())
    return _SERVED_NODES[node]


def _find_out(name: str) -> bool:
    if not name:
        return False
    path = os.path.realpath(name)
    try:
        status = os.stat(path)
    except OSError:
        return True  # nobody answers for it now
    if stat.S_ISBLK(status.st_mode):
        return os.path.basename(path).startswith(_SERVED_DEVICES)
    return _file_system(status.st_dev).startswith(_SERVED)


def _file_system(device: int) -> str:
    """The type of the file system with that number (proc_pid_mountinfo(5)); "" if unknown."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            front, _, behind = line.partition(" - ")
            if front.split()[2] == number:
                return behind.split()[0]
    return ""


_SERVED_NODES: WeakKeyDictionary[NodeDriver, bool] = WeakKeyDictionary()

# Found out when a node is new, and so answers. Later its storage may hang whoever asks.
_FILES: WeakKeyDictionary[NodeDriver, str] = WeakKeyDictionary()

_AT_FDCWD, _STATX_BTIME = -100, 0x800
_BTIME_AT = 80


def _birth(path: str) -> str:
    """When a file was made (statx(2), stx_btime), in nanoseconds; "" where nobody knows."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    if libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, buffer):
        return ""
    (known,) = struct.unpack_from("=I", buffer)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME_AT)
    return str(seconds * 10**9 + nanoseconds) if known & _STATX_BTIME else ""


def _file_of(node: NodeDriver) -> str:
    """A file by its name, its inode and when it was made.

    Another file under the name has other data, and file systems give a new file the inode of one
    that has just been removed.
    """
    name = node.filename()
    if not name:
        return f"node:{node.name}"
    path = os.path.realpath(name)
    try:
        status = os.stat(path)
    except OSError:
        return path
    # The inode of a block device is that of its name, which is made anew when the host starts.
    return f"{path}#{status.st_ino}#{_birth(path)}" if stat.S_ISREG(status.st_mode) else path


def is_same_leg(leg: Leg, node: NodeDriver, files: list[str]) -> bool:
    """Whether a node that takes a leg's place has the same data: an overlay or a filter has been
    put on top of it, or a filter taken off. What is below an overlay is older, and not the same.
    `files`: the node's identity().
    """
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current is leg.node:
            return True
        below = {child.node for child in current.children.values()} - seen
        seen |= below
        waiting += below
    below_leg = leg.node
    while below_leg.is_filter and len(below_leg.children) == 1:
        below_leg = next(iter(below_leg.children.values())).node
        if below_leg is node:
            return True
    return leg.files[:1] == files[:1]


def recognise(nodes: list[NodeDriver], records: list[LegRecord]) -> list[LegRecord | None]:
    """Which of the recorded legs each node is; None for one that is not known."""
    left = list(records)
    found: list[LegRecord | None] = [None] * len(nodes)
    files = [identity(node) for node in nodes]

    def take(fits: int) -> None:
        for index in range(len(nodes)):
            candidates = [r for r in left if found[index] is None and _fits(files[index], r, fits)]
            # The one that was in the same place, if several legs have a file in common.
            candidates.sort(key=lambda r: records.index(r) != index)
            if candidates:
                found[index] = candidates[0]
                left.remove(candidates[0])

    take(2)
    take(1)
    return found


def _fits(files: list[str], record: LegRecord, how: int) -> bool:
    if how == 2:
        return files[:1] == list(record.identity[:1])
    return bool(set(files) & set(record.identity[:1]))
