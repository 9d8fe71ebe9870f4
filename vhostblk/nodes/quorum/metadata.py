# SPDX-License-Identifier: GPL-2.0-or-later
"""What a quorum knows about its legs, in a file that the engine writes to through a mapping.

The legs themselves hold nothing but guest data, byte by byte the same, so that QEMU or anybody
else can use them. So the file is beside them; it may be removed, and then all legs are believed
to be equal. All numbers are little-endian:

    0       magic, version (u32), size of the header (u32), length of the text (u32), flags (u32),
            generation (u64); the text from byte 64 on: JSON with the size that the maps are for, of
            a region, for each leg how to recognise it, and the boot of the host that wrote it
    header  for each leg 64 bytes: state and flags (u32, see quorum.api.h), reserved (u32),
            generation at which it was last in sync (u64), since when it is in its state (f64)
    + 4096  writes that have been acknowledged and had not reached all legs (struct vb_quorum_late)
    behind  for each leg its dirty map, a bit for each region, in whole pages; the last bit stands
            for all that is behind its region, too

The text never changes: with other legs a new file takes the place of the old one, in one step
(rename). So it does for a disk that has outgrown its maps, once nothing is in flight; they have
room for more than there is. All else changes in place. A process that is killed leaves what it has
last stored, since stores to a mapping are the kernel's at once.

Against a power cut there is `sync()`: the state of a leg that is out is on the disk before a guest
is told of anything that the leg has missed. Not so its dirty map, and such a leg may also lose what
it had been given before and nobody flushed. So after a boot, or on another host, dirty maps count
for nothing: whoever is out then has to be compared from end to end.

A new file takes its place while guests wait, which is no time for a sync, and until there has been
one a power cut may leave anything of it. So a flag says that all of it has been on the disk, and up
to then the last file with that flag stays beside it as `….old`. What that says is still true: with
the first leg that leaves, nobody is told anything before the new file is whole.

Another flag says that the quorum is in use. It is on the disk before the first write reaches a leg,
and is taken away when all legs have been flushed and nothing more is to come. Found in a file that
nobody has open it tells of an end after which some legs may have a write and others not. What
follows from that is in two more flags, until all legs have been compared from end to end.

Without a path the same lives in plain memory, and ends with the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import json
import logging
import mmap
import os
import stat
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk.engine.quorum import LATE_ENTRY, LATE_SIZE
from vhostblk.schema import VhostblkError

logger = logging.getLogger(__name__)

MAGIC = b"VBQUORUM"
VERSION = 1
PAGE = 4096
TEXT_AT = 64
SLOT = 64
LEGS_MAX = PAGE // SLOT
ROOM = 1 << 18
"""Regions that maps are made for at least."""
_HEADER = struct.Struct("<8sIIIIQ")
_SLOT = struct.Struct("<IIQd")
_LATE = struct.Struct("<QQQQ")
_FLAGS_AT = 20
_GENERATION_AT = 24
# Flags.
WHOLE = 1  # all of the file has been on the disk
IN_USE = 2  # a process may be changing the legs, or has not ended in order
UNCLEAN = 4  # one had not: legs may differ in what was not flushed, and none of them is wrong
POWER_CUT = 8  # and the host had gone down with it

LateWrite = tuple[int, int, int]
"""Start, end, and the legs (bits) that a write which has been acknowledged has not reached yet."""

if sys.byteorder != "little":
    raise ImportError("the metadata of a quorum are little-endian, and mapped")


@dataclass(frozen=True)
class LegRecord:
    """A leg as a file describes it."""

    node_name: str
    identity: tuple[str, ...]
    """Files with its data, the top one first; see legs.identity()."""
    word: int
    generation: int
    since: float
    dirty: bytes
    """The map, whole pages."""


@dataclass(frozen=True)
class Recorded:
    """What a file says."""

    size: int
    """The largest disk that the maps are for."""
    region_bits: int
    generation: int
    boot: str
    legs: list[LegRecord]
    late: list[LateWrite]
    """Writes that were on their way."""
    flags: int


@dataclass(frozen=True)
class Layout:
    """Where things are."""

    header: int
    map_size: int
    legs: int

    @property
    def slots(self) -> int:
        return self.header

    @property
    def lates(self) -> int:
        return self.header + PAGE

    def dirty(self, leg: int) -> int:
        return self.lates + LATE_SIZE + leg * self.map_size

    @property
    def bits(self) -> int:
        """Of a map."""
        return 8 * self.map_size

    @property
    def total(self) -> int:
        return self.dirty(self.legs)


@functools.cache
def boot() -> str:
    """Which run of which host this is (proc_sys_kernel(5), random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def regions_of(size: int, region_bits: int) -> int:
    """How many regions a disk has."""
    return (size + (1 << region_bits) - 1) >> region_bits


def map_size(size: int, region_bits: int) -> int:
    """Bytes of a dirty map: whole pages, and whole words for the engine."""
    return max(PAGE, -(-regions_of(size, region_bits) // (8 * PAGE)) * PAGE)


def with_room(size: int, region_bits: int) -> int:
    """The size of a disk that this one may become without other maps."""
    return max(size + size // 2, ROOM << region_bits)


class Metadata:
    """One version of it, mapped."""

    def __init__(
        self,
        path: str | None,
        size: int,
        region_bits: int,
        legs: Sequence[tuple[str, Sequence[str]]],
        generation: int,
        flags: int = 0,
    ) -> None:
        """New, in memory or in a file beside `path` that `publish()` puts in its place.

        `legs`: node name and identity of each.
        """
        size = with_room(size, region_bits)
        self._for = size, [(name, list(files)) for name, files in legs]
        text = json.dumps(
            {
                "size": size,
                "region-size": 1 << region_bits,
                "boot": boot(),
                "legs": [{"node-name": name, "identity": list(files)} for name, files in legs],
            }
        ).encode()
        header = -(-(TEXT_AT + len(text)) // PAGE) * PAGE
        self.path = path
        self._region_bits = region_bits
        self.layout = Layout(header, map_size(size, region_bits), len(legs))
        self.fd = -1
        self.whole = path is None
        """What a power cut would leave is all of it."""
        self._memory = self._map(path)
        self._memory[TEXT_AT : TEXT_AT + len(text)] = text
        _HEADER.pack_into(self._memory, 0, MAGIC, VERSION, header, len(text), flags, generation)
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._anchor)

    def is_for(self, size: int, legs: Sequence[tuple[str, Sequence[str]]]) -> bool:
        """Whether its text is the one that such a disk with such legs needs."""
        room, known = self._for
        return room == with_room(size, self._region_bits) and known == [
            (name, list(files)) for name, files in legs
        ]

    def touch(self) -> None:
        """Have all of its memory at hand; it is new."""
        for at in range(self.layout.header, self.layout.total, PAGE):
            self._memory[at] = 0

    def _map(self, path: str | None) -> mmap.mmap:
        if path is None:
            return mmap.mmap(-1, self.layout.total)
        temporary = f"{path}.tmp"
        try:
            _remove_left_over(path, temporary)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                self.fd = os.open(temporary, flags, 0o600)
            except FileExistsError:
                raise _in_use(path) from None  # by one that was faster
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_file(self.fd, temporary):
                raise _in_use(path)  # somebody took it for left over before it was locked
            # All of it now: a full file system must not be SIGBUS in the middle of a guest's write.
            os.posix_fallocate(self.fd, 0, self.layout.total)
            return mmap.mmap(self.fd, self.layout.total)
        except VhostblkError:
            if self.fd >= 0:
                os.close(self.fd)
            raise
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
                os.unlink(temporary)
            raise metadata_error(path, f"cannot be written: {error.strerror}") from None

    def publish(self, *, old_is_whole: bool) -> None:
        """Take the place of what was there before, if it is a file."""
        if self.path is None:
            return
        try:
            if old_is_whole:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.path}.old")
                os.link(self.path, f"{self.path}.old", follow_symlinks=False)
            os.rename(f"{self.path}.tmp", self.path)
        except OSError as error:
            raise metadata_error(self.path, f"cannot be written: {error.strerror}") from None

    async def sync(self) -> None:
        """All of it is on disk afterwards."""
        if self.fd < 0:
            return
        await self._sync(None if self.whole else self.path)
        if self.whole or self.fd < 0:
            return
        self.flags |= WHOLE
        await self._sync(None)
        if self.fd >= 0:  # else another one has taken its place, and needs the old one
            self.whole = True
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.path}.old")

    async def _sync(self, name: str | None) -> None:
        fd = os.dup(self.fd)  # it may be closed meanwhile
        await asyncio.to_thread(_sync, fd, name)

    def close(self, *, remove: bool = False) -> None:
        """The engine uses it no more; `remove` a file that was never published."""
        del self._anchor
        self._memory.close()
        if self.fd >= 0:
            if remove:
                os.unlink(f"{self.path}.tmp")
            os.close(self.fd)
            self.fd = -1

    # ---- its parts

    @property
    def lates(self) -> int:
        """Address of the table of late writes."""
        return self.address + self.layout.lates

    @property
    def flags(self) -> int:
        """What is true of all of it."""
        return int(struct.unpack_from("<I", self._memory, _FLAGS_AT)[0])

    @flags.setter
    def flags(self, flags: int) -> None:
        struct.pack_into("<I", self._memory, _FLAGS_AT, flags)

    def set_lates(self, writes: Sequence[LateWrite]) -> None:
        """These are on their way, and no others. Before the engine knows any."""
        table = b"".join(_LATE.pack(*write, 0) for write in writes)
        at = self.layout.lates
        self._memory[at : at + LATE_SIZE] = table.ljust(LATE_SIZE, b"\0")

    def state_address(self, leg: int) -> int:
        """Address of a leg's state word."""
        return self.address + self.layout.slots + leg * SLOT

    def dirty_address(self, leg: int) -> int:
        """Address of a leg's map."""
        return self.address + self.layout.dirty(leg)

    def describe_leg(self, leg: int, word: int, generation: int, since: float) -> None:
        """Before the engine knows the leg."""
        at = self.layout.slots + leg * SLOT
        _SLOT.pack_into(self._memory, at, word, 0, generation, since)

    def changed(self, leg: int, generation: int) -> None:
        """The leg has another state since now, and was last in sync at `generation`."""
        at = self.layout.slots + leg * SLOT
        struct.pack_into("<Qd", self._memory, at + 8, generation, time.time())

    def since(self, leg: int) -> float:
        """Since when it is in its state."""
        at = self.layout.slots + leg * SLOT
        return float(struct.unpack_from("<d", self._memory, at + 16)[0])

    @property
    def generation(self) -> int:
        """Grows with every leg that leaves, or comes back."""
        return int(struct.unpack_from("<Q", self._memory, _GENERATION_AT)[0])

    @generation.setter
    def generation(self, generation: int) -> None:
        struct.pack_into("<Q", self._memory, _GENERATION_AT, generation)

    def set_dirty(self, leg: int, dirty: bytes) -> None:
        """What a whole map says, of this size or another. Before the engine knows the leg."""
        at, size = self.layout.dirty(leg), self.layout.map_size
        behind = b"\xff" if dirty[-1] & 0x80 else b"\0"
        self._memory[at : at + size] = dirty[:size].ljust(size, behind)
        if any(dirty[size:]):
            self._memory[at + size - 1] |= 0x80

    def dirty(self, leg: int) -> bytes:
        """The whole map."""
        at = self.layout.dirty(leg)
        return self._memory[at : at + self.layout.map_size]


def _sync(fd: int, name: str | None) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if name is not None:
        directory = os.open(os.path.dirname(name) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _is_file(fd: int, path: str) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_left_over(path: str, temporary: str) -> None:
    """What a killed process has left, or somebody's trap: never written through."""
    try:
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError:
        os.unlink(temporary)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(temporary)
    except BlockingIOError:
        raise _in_use(path) from None
    finally:
        os.close(fd)


# ---- what is there already


class Claim:
    """A file of a predecessor's, which nobody else can have until it is replaced."""

    def __init__(self, path: str) -> None:
        self._fd = -1
        self.recorded: Recorded | None = None
        """What is known; None if there is no file."""
        self.is_whole = False
        """Whether the file may stay as `….old`."""
        self._is_torn = False
        try:
            data = self._take(path)
            if data is not None:
                self._understand(path, data)
        except BaseException:
            self.release()
            raise

    def _take(self, path: str) -> bytes | None:
        while True:
            try:
                self._fd = _open(path)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(path) from None
            if _is_file(self._fd, path):
                with open(self._fd, "rb", closefd=False) as file:
                    return file.read()
            self.release()  # replaced before it was locked

    def _understand(self, path: str, data: bytes) -> None:
        recorded = _parsed(path, data) if any(data[:TEXT_AT]) or not data else None
        if recorded is not None:
            whole = bool(recorded.flags & WHOLE)
            if whole or recorded.boot == boot():
                self.recorded, self.is_whole = recorded, whole
                return
        self._is_torn = True
        logger.warning(
            "Quorum metadata '%s' had not been written to the disk when the host went down", path
        )
        try:
            fd = _open(f"{path}.old")
        except FileNotFoundError:
            return  # the first one: until it is whole nobody hears that a leg has missed something
        with open(fd, "rb") as file:
            self.recorded = _parsed(f"{path}.old", file.read())

    @property
    def flags(self) -> int:
        """UNCLEAN and POWER_CUT, if what it says means that."""
        flags = 0 if self.recorded is None else self.recorded.flags
        found = flags & (UNCLEAN | POWER_CUT)
        if flags & IN_USE or self._is_torn:
            found |= UNCLEAN
            if self.recorded is None or self.recorded.boot != boot():
                found |= POWER_CUT
        return found

    def release(self) -> None:
        """It has been replaced, or is not needed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise metadata_error(path, f"cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise metadata_error(path, "is not a regular file")
    return fd


def _parsed(path: str, data: bytes) -> Recorded:
    try:
        return _parse(data)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise metadata_error(path, f"is damaged: {error}") from None


def _parse(data: bytes) -> Recorded:
    magic, version, header, length, flags, generation = _HEADER.unpack_from(data, 0)
    if magic != MAGIC:
        raise ValueError("it has no metadata of a quorum in it")
    if version != VERSION:
        raise ValueError(f"it has version {version}, and only {VERSION} is known")
    text: dict[str, Any] = json.loads(data[TEXT_AT : TEXT_AT + length])
    size, region = int(text["size"]), int(text["region-size"])
    region_bits = region.bit_length() - 1
    if size < 0 or region != 1 << region_bits or not 9 <= region_bits <= 40:
        raise ValueError(f"a disk of {size} bytes in regions of {region}")
    if len(text["legs"]) > LEGS_MAX:
        raise ValueError(f"{len(text['legs'])} legs")
    layout = Layout(header, map_size(size, region_bits), len(text["legs"]))
    if len(data) < layout.total:
        raise ValueError(f"it has {len(data)} bytes, and should have {layout.total}")
    legs = []
    for index, leg in enumerate(text["legs"]):
        word, _, last, since = _SLOT.unpack_from(data, layout.slots + index * SLOT)
        at = layout.dirty(index)
        dirty = data[at : at + layout.map_size]
        files = tuple(str(file) for file in leg["identity"])
        legs.append(LegRecord(str(leg["node-name"]), files, word, last, since, dirty))
    late = []
    for at in range(layout.lates, layout.lates + LATE_SIZE, LATE_ENTRY):
        start, end, bits, _ = _LATE.unpack_from(data, at)
        if bits:
            late.append((start, end, bits))
    return Recorded(size, region_bits, generation, str(text.get("boot")), legs, late, flags)


def _in_use(path: str) -> VhostblkError:
    return metadata_error(path, "is in use by another quorum", "image-locked")


def metadata_error(path: str, text: str, code: str = "quorum-metadata") -> VhostblkError:
    """About the file."""
    return VhostblkError(f"Quorum metadata '{path}' {text}", data={"code": code, "path": path})
