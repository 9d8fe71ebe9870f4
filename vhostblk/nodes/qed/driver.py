# SPDX-License-Identifier: GPL-2.0-or-later
"""qed: QEMU's enhanced disk format, read and written while a guest runs.

The engine's `map` node answers from tables in memory, as for qcow2, whose caches and data path
serve here too (nodes/qcow2/l2cache.py, datapath.py). The rest is simpler. There are no reference
counts: a new cluster is appended to the file, and none is ever freed. Metadata are written
through: when a write completes, the entry that names its cluster is in the host's page cache, so
a kill of this process loses nothing, and a guest's flush goes straight to the storage.

What a power cut may leave decides the order of writes:

* The file grows in steps, with a barrier: what an entry names is there. The rest is cut off when
  the image is closed, or found by the check after a crash.
* The need-check bit is on disk before the first entry changes. It goes when nothing has been
  allocated for a while, after a flush, and when the image is closed. Whoever opens an image with
  the bit looks at all tables first (check.py): other programs do not take this much care.
* Data before the entry, with a barrier between them if a backing file shows through: else the
  rest of the cluster, copied from below, might be missing. Without one the rest is zeroes
  however little arrives, since the cluster is new.
* A new table is on disk, empty, before the L1 entry that names it.

Engine half: cffi_build/engine/nodes/map.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import struct
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from vhostblk.engine import OP_WRITE, REQ_LITERAL
from vhostblk.engine.map import MAP_BACKING, MAP_DATA, MAP_OFFSET, MAP_TYPE, MAP_ZERO, new_map
from vhostblk.image import Extent
from vhostblk.image.check import Repair
from vhostblk.nodes._mapped import MappedImage
from vhostblk.nodes.driver import (
    DETECT_ZEROES,
    ChildRole,
    CreateHost,
    NodeDriver,
    NodeOptions,
    Perm,
    RoleKind,
)
from vhostblk.nodes.hooks import Request
from vhostblk.nodes.qcow2.backing import NamedFiles
from vhostblk.nodes.qcow2.creating import NewFile
from vhostblk.nodes.qcow2.datapath import Claim, DataPath
from vhostblk.nodes.qcow2.extents import extents
from vhostblk.nodes.qcow2.geometry import ZERO, translate
from vhostblk.nodes.qcow2.l2cache import L2Cache, Slice
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.nodes.qed.check import QedCheck, check
from vhostblk.nodes.qed.create import QedCreateOptions, create, plan
from vhostblk.nodes.qed.header import (
    BACKING,
    MAX_L1_BYTES,
    NEED_CHECK,
    NO_PROBE,
    SECTOR,
    BadImage,
    Header,
    read_header,
    write_header,
)
from vhostblk.nodes.qed.tables import (
    SLICE_BYTES,
    entries_from,
    entry_of,
    geometry,
    words_of,
)
from vhostblk.schema import BlockdevRef, Model, StrOrList

logger = logging.getLogger(__name__)

_L2_CACHE = 32 << 20
_IDLE = 5.0
"""Seconds without an allocation after which the need-check bit is cleared."""
_MIN_STEP, _MAX_STEP = 1 << 20, 16 << 20
"""How far the file grows ahead of what is used, bytes."""


class QedOptions(NodeOptions):
    """Options of qed."""

    file: BlockdevRef
    """The node that holds the image."""
    backing: BlockdevRef | None = None
    """What the image does not have; null: nothing. What the image itself names if absent."""
    allow_backing_from: StrOrList | None = None
    """Directories whose files an image may name as its backing file; its own if absent."""


class _Clusters:
    """New clusters, at the end of the file: the allocator that the data path asks."""

    most = 1 << 32  # there is always room behind the end

    def __init__(self, file: ChildStorage, cluster_size: int) -> None:
        self._file = file
        self._size = cluster_size
        self._end = -(-file.size // cluster_size) * cluster_size
        self._durable = file.size
        self._step = _MIN_STEP
        self._lock = asyncio.Lock()

    async def reserve(self, count: int, *, zeroed: bool = False) -> int:
        """`count` clusters in one piece, full of zeroes; the offset of the first."""
        async with self._lock:
            host, end = self._end, self._end + count * self._size
            if end > self._durable:
                await self._grow(end)
            self._end = end
        return host

    async def _grow(self, end: int) -> None:
        """Lengthen the file, durably: no entry names what a power cut takes away."""
        ahead = end + self._step // self._size * self._size
        try:
            await self._file.ensure(ahead)
        except OSError:
            ahead = end
            await self._file.ensure(end)
        await self._file.flush()
        self._durable = ahead
        self._step = min(2 * self._step, _MAX_STEP)

    @property
    def end(self) -> int:
        """Where the last cluster that has been taken ends."""
        return self._end

    async def trim(self) -> None:
        """Cut off what was not needed."""
        async with self._lock:
            if self._file.size > self._end:
                await self._file.truncate(self._end)
            self._durable = min(self._durable, self._end)

    async def reserve_pieces(self, count: int) -> list[tuple[int, int]]:
        """`count` clusters, in one piece: offset and clusters."""
        return [(await self.reserve(count), count)]

    async def free_pieces(self, pieces: Iterable[tuple[int, int]]) -> None:
        """Nothing names them, and something may have been written there: they are leaked."""

    async def more_runs(self) -> bool:
        """The engine does not allocate."""
        return True


class _Path(DataPath):
    """The data path, with entries that are written before a request completes."""

    def __init__(self, live: Qed) -> None:
        super().__init__(live)
        self._qed = live

    async def publish(self, claims: list[Claim]) -> None:
        for claim in claims:
            # Written through: the slice may leave memory as soon as nobody needs it.
            self._qed.l2.dirty.pop(claim.slice.index, None)
        written: set[int] = set()
        try:
            await self._qed.write_entries(claims, written)
        finally:
            for claim in claims:
                if claim.cluster not in written:
                    # The guest is told of it. Memory is to say what the disk says.
                    claim.slice.words[claim.index] = self._qed.word_before(claim)
                self.settle(claim)


class Qed(MappedImage):
    """A QED image."""

    driver = "qed"
    Options = QedOptions
    options: QedOptions
    allocator: _Clusters
    reopenable = MappedImage.reopenable | {"allow-backing-from"}
    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole(RoleKind.STORAGE),
        "backing": ChildRole(RoleKind.BACKING, optional=True),
    }
    CreateOptions: ClassVar[type[Model] | None] = QedCreateOptions

    # What the data path asks of an image.
    stopped = False
    engine_allocates = False
    data_role = "file"

    @classmethod
    def check_create(cls, options: QedCreateOptions) -> None:
        plan(options)

    @classmethod
    async def create(cls, host: CreateHost, options: QedCreateOptions) -> None:
        async with host.image(options.file) as file:
            await create(options, NewFile(file))

    # ---- opening

    async def implied_children(self) -> Mapping[str, str | dict[str, Any]]:
        self.file = ChildStorage(self.child("file"))
        self.header = await self._read_header()
        if not self.header.backing_file or "backing" in self.options.model_fields_set:
            return {}
        names = NamedFiles(self.name, self.filename(), self.options.allow_backing_from)
        return {"backing": names.backing(self.header.backing_file, self.header.backing_format)}

    async def _read_header(self) -> Header:
        try:
            return await read_header(self.file)
        except BadImage as error:
            raise self._error(f"Could not open '{self.filename()}': {error.desc}") from None

    async def open(self) -> None:
        self._prepare_hooks()
        self._readers: set[asyncio.Future[None]] = set()
        self._written_to = False
        self._clearing: asyncio.Task[None] | None = None
        self._allocator_before: _Clusters | None = None
        await self._open_tables()

    async def _open_tables(self) -> None:
        """Make all that serves the image; nothing stays if it fails."""
        header = self.header
        if not self.read_only:
            await self._make_writable()
        self.geometry = geometry(header.cluster_bits, header.table_bytes)
        self._size = header.size
        self.data = self.file
        self.l1 = await self._load_l1(self.header)
        self._know_backing()
        self.map = new_map(
            self.engine,
            size=self._size,
            unit_bits=header.cluster_bits,
            cluster_bits=header.cluster_bits,
            table_bits=self.geometry.table_bits,
            has_backing=self.has_backing,
            backing_size=self.backing_size,
            allocate=False,
            detect_zeroes=DETECT_ZEROES[self.options.detect_zeroes],
            sink=self._start,
        )
        self.handle = self.map
        self.l2 = L2Cache(self.geometry, self.map, self, _L2_CACHE // SLICE_BYTES, _nothing)
        self.allocator = _Clusters(self.file, header.cluster_size)
        self.writeback = self  # what it has to flush is the file
        self.path = _Path(self)
        self._hooks = [
            self.path.read,
            self.path.write,
            self._flush,
            self._discard,
            self._write_zeroes,
        ]
        self._table_lock = asyncio.Lock()
        self._bit_lock = asyncio.Lock()
        self._marked = False
        """The need-check bit is on disk."""
        self._changing = 0
        self._changed = 0
        self._barrier_lock = asyncio.Lock()
        self._barriers_begun = self._barriers_done = 0

    async def _make_writable(self) -> None:
        header = self.header
        if header.need_check:
            logger.warning("image '%s' was not closed properly; it is checked", self.filename())
            result = await self._check("all")
            if result.corruptions:
                raise self._error(
                    f"Image '{self.filename()}' is corrupt: {result.messages[0]}; open it with "
                    "read-only=on and copy what can be read",
                    "corrupt",
                )
            header = result.header
        if header.autoclear:
            # Features that we do not know are off from the first write on.
            header = header.with_(autoclear=0)
            await write_header(self.file, header)
        self.header = header

    async def _load_l1(self, header: Header) -> array[int]:
        length = -(-8 * header.l1_entries // SECTOR) * SECTOR
        return entries_from(await self.file.read(header.l1_table_offset, length))

    # ---- what it is

    def describe(self) -> dict[str, Any]:
        header = self.header
        image: dict[str, Any] = {
            "format": "qed",
            "virtual-size": self._size,
            "cluster-size": header.cluster_size,
            "dirty-flag": header.need_check,
        }
        if header.backing_file:
            image["backing-filename"] = header.backing_file
            if header.backing_format:
                image["backing-filename-format"] = header.backing_format
        return self._describe(image)

    @property
    def allocation_unit(self) -> int:
        return self.header.cluster_size

    @property
    def discard_granularity(self) -> int | None:
        # Both are done in place.
        below = self.child("file").node.discard_granularity
        if self.options.discard != "unmap" or below is None:
            return None
        return max(self.header.cluster_size, below)

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        async for extent in extents(self, offset, length):
            yield extent

    async def check_image(self, patience: float | None) -> dict[str, Any]:
        if not self.read_only:
            await self._write_everything()  # what the file has grown ahead is not leaked
        async with asyncio.timeout(patience):
            return (await self._check("none")).describe()

    async def _check(self, repair: Repair) -> QedCheck:
        try:
            return await check(self.file, self.header, repair)
        except BadImage as error:
            raise self._error(f"Image '{self.filename()}': {error.desc}") from None

    def relink(self) -> None:
        for child in self.children.values():
            child.refresh()
        if self.handle is not None:
            self.handle.set_child(0, self.child("file").node.effective)
            if "backing" in self.children:
                self.handle.set_child(1, self.child("backing").node.effective)

    async def forget_backing(self) -> None:
        await self.flush()
        self._forgotten = self.header
        self.header = replace(
            self.header,
            features=self.header.features & ~(BACKING | NO_PROBE),
            backing_offset=0,
            backing_size=0,
            backing_file=None,
        )
        await write_header(self.file, self.header)

    async def remember_backing(self) -> None:
        self.header = self._forgotten
        await write_header(self.file, self.header)

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        self._written_to = bool(perm & (Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE))

    # ---- for the data path and the cache

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Clusters are never used again: there is nothing to be said."""
        yield

    async def grace(self) -> None:
        """Done when all requests that have begun by now have ended in the engine."""
        await self.map.grace()

    def map_entries(self, slice: Slice) -> array[int] | None:
        """What the engine is to know of a slice."""
        return translate(self.geometry, slice.words, self.nothing, not self.read_only)

    async def load_slice(self, index: int) -> array[int]:
        """The words of a slice as they are on disk; zeroes if there is no table."""
        table, part = divmod(index, self.geometry.slices_per_table)
        offset = self.l1[table]
        if not offset:
            return array("Q", bytes(SLICE_BYTES))
        if not self._inside(offset, self.header.table_bytes):
            raise self._corrupt(f"L1 entry {table} ({offset:#x}) names no table in the file")
        entries = entries_from(await self.file.read(offset + part * SLICE_BYTES, SLICE_BYTES))
        size = self.header.cluster_size
        for number, entry in enumerate(entries):
            if entry > 1 and not self._inside(entry, size):
                guest = (index * self.geometry.slice_entries + number) * size
                raise self._corrupt(f"the entry of guest offset {guest:#x} ({entry:#x}) is invalid")
        return words_of(entries)

    def _inside(self, offset: int, length: int) -> bool:
        size, l1 = self.header.cluster_size, self.header.l1_table_offset
        return (
            offset % size == 0
            and offset >= self.header.header_size * size
            and offset + length <= self.file.size
            and not l1 - length < offset < l1 + self.header.table_bytes
        )

    def _corrupt(self, text: str) -> OSError:
        logger.error("image '%s' (node '%s') is corrupt: %s", self.filename(), self.name, text)
        self.host.emit(
            "BLOCK_IMAGE_CORRUPTED",
            {"device": "", "node-name": self.name, "msg": text, "fatal": False},
        )
        return OSError(errno.EIO, f"the image is corrupt: {text}")

    def let_go(self, word: int) -> None:
        """A claim never moves what has a place."""

    async def write_back(self) -> None:
        """Nothing is kept back."""

    # ---- metadata to disk

    def word_before(self, claim: Claim) -> int:
        """What the L2 entry in memory was when it was claimed."""
        return ZERO if claim.units[0] & MAP_TYPE == MAP_ZERO and self.has_backing else 0

    async def write_entries(self, claims: list[Claim], written: set[int]) -> None:
        """Write the L2 entries of claims, whose data are there, and note which got written."""
        self._changing += 1
        try:
            await self._mark()
            uncovers = any(
                claim.units[0] & MAP_TYPE == MAP_BACKING
                and entry_of(claim.slice.words[claim.index]) > 1
                for claim in claims
            )
            if uncovers:
                await self.flush()
            for claims_of_table in _by_table(claims, self.geometry.table_entries):
                async with self._table_lock:
                    await self._write_table(claims_of_table, written)
        finally:
            self._changing -= 1
            self._changed += 1

    async def _write_table(self, claims: list[Claim], written: set[int]) -> None:
        table = claims[0].cluster // self.geometry.table_entries
        if not self.l1[table]:
            await self._new_table(table)
        sectors: dict[int, bytearray] = {}
        clusters: dict[int, list[int]] = {}
        for claim in claims:
            at = 8 * (claim.cluster % self.geometry.table_entries)
            sector = at // SECTOR * SECTOR
            if sector not in sectors:
                # From the disk: neighbours in memory may be waiting for their data.
                sectors[sector] = bytearray(await self.file.read(self.l1[table] + sector, SECTOR))
            entry = entry_of(claim.slice.words[claim.index])
            struct.pack_into("<Q", sectors[sector], at - sector, entry)
            clusters.setdefault(sector, []).append(claim.cluster)
        for sector, data in sectors.items():
            await self.file.write(self.l1[table] + sector, data)
            written.update(clusters[sector])

    async def _new_table(self, table: int) -> None:
        host = await self.allocator.reserve(self.header.table_size)
        await self.file.write_zeroes(host, self.header.table_bytes)
        await self.flush()
        first = table // 64 * 64
        entries = self.l1[first : first + 64]
        entries[table - first] = host
        data = struct.pack(f"<{len(entries)}Q", *entries)
        await self.file.write(self.header.l1_table_offset + 8 * first, data)
        self.l1[table] = host

    async def flush(self) -> None:
        """A barrier; those who ask while one is under way share the next."""
        wanted = self._barriers_begun + 1
        async with self._barrier_lock:
            if self._barriers_done >= wanted:
                return
            self._barriers_begun += 1
            serves = self._barriers_begun
            await self.file.flush()
            self._barriers_done = serves

    async def _mark(self) -> None:
        """The need-check bit is on disk before any table changes."""
        async with self._bit_lock:
            if not self._marked:
                header = self.header.with_(features=self.header.features | NEED_CHECK)
                await write_header(self.file, header)
                self.header = header
                self._marked = True
        if self._clearing is None:
            self._clearing = self.engine.loop.create_task(self._clear_when_idle())

    async def _clear_when_idle(self) -> None:
        try:
            seen = -1
            while seen != self._changed or self._changing or not await self._clear():
                seen = self._changed
                await asyncio.sleep(_IDLE)
        except OSError as error:
            logger.warning(
                "image '%s' may stay marked until it is closed: %s", self.filename(), error
            )
        finally:
            self._clearing = None

    async def _clear(self) -> bool:
        """Take the need-check bit away; False if tables are being changed."""
        async with self._bit_lock:
            if not self.header.need_check:
                return True
            seen = self._changed
            await self.allocator.trim()
            await self.file.flush()
            if self._changing or seen != self._changed:
                return False
            header = self.header.with_(features=self.header.features & ~NEED_CHECK)
            self._marked = False  # even if this fails: nobody knows what has got to the disk
            await write_header(self.file, header)
            self.header = header
            return True

    # ---- requests

    async def _flush(self, request: Request) -> None:
        await self.file.flush()

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, bool]]:
        """The clusters of a range: number, offset, bytes, whether it is all of the cluster."""
        size, end = self.header.cluster_size, offset + length
        while offset < end:
            cluster = offset // size
            stop = min(end, (cluster + 1) * size)
            whole = offset == cluster * size and stop == min((cluster + 1) * size, self._size)
            yield cluster, offset, stop - offset, whole
            offset = stop

    async def _discard(self, request: Request) -> None:
        if self.options.discard != "unmap":
            return
        # In place: a cluster without a name would be lost.
        for cluster, offset, length, _ in self._pieces(request.offset, request.length):
            slice = await self.l2.pin(cluster // self.geometry.slice_entries)
            try:
                entry = self.map.get(cluster)
                if entry & MAP_TYPE == MAP_DATA:
                    host = (entry & MAP_OFFSET) + offset % self.header.cluster_size
                    await self.data.child.discard(host, length)
            finally:
                self.l2.unpin(slice)

    async def _write_zeroes(self, request: Request) -> None:
        await self.zero(request.offset, request.length, unmap=request.may_unmap)
        if request.fua:
            await self.flush()

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeroes."""
        step = self.geometry.slice_entries * self.header.cluster_size
        end = offset + length
        while offset < end:
            stop = min(end, (offset // step + 1) * step)
            slice = await self.l2.pin(offset // step)
            try:
                await self._zero_in(slice, offset, stop - offset, unmap)
            finally:
                self.l2.unpin(slice)
            offset = stop

    async def _zero_in(self, slice: Slice, offset: int, length: int, unmap: bool) -> None:
        """The same inside one slice, which stays. Nothing waits for others while it has claims."""
        claims: list[Claim] = []
        left: list[tuple[int, int]] = []
        for cluster, start, count, whole in self._pieces(offset, length):
            entry = self.map.get(cluster)
            kind = entry & MAP_TYPE
            claim = None
            if kind == MAP_ZERO:
                continue
            if kind == MAP_BACKING and whole:
                claim = self.path.claim(cluster, slice, cluster % self.geometry.slice_entries, [0])
            if claim is None:
                left.append((start, count))
            else:
                claims.append(claim)
        for claim in claims:
            claim.slice.words[claim.index] = ZERO
        if claims:
            await self.path.publish(claims)
        for start, count in left:
            entry = self.map.get(start // self.header.cluster_size)
            if entry & MAP_TYPE == MAP_DATA:
                host = (entry & MAP_OFFSET) + start % self.header.cluster_size
                await self.data.child.write_zeroes(host, count, unmap=unmap)
            else:
                # A part of what shows through from below, or somebody is at it: a plain write.
                await self.engine.submit(
                    self.map, OP_WRITE, start, bytearray(count), flags=REQ_LITERAL
                )

    # ---- changes

    async def reopen_prepare(self, options: QedOptions) -> None:
        if options.read_only and not self.read_only:
            if self._written_to:
                raise self._error(
                    f"Node '{self.name}' cannot be made read-only: it is written to", "in-use"
                )
            await self._write_everything()
        await super().reopen_prepare(options)

    # ---- to another file
    #
    # All that completed was written; what it takes is to see that it is there.

    async def before_move(self) -> None:
        if not self.read_only:
            await self._write_everything()

    async def move(self, before: Mapping[str, NodeDriver]) -> None:
        await super().move(before)
        there = await self._header_of_copy()
        self._same_image(there)
        if self.read_only or self._before is not None:
            return  # nothing is written, or the image was opened there just now
        if self.file.size < self.allocator.end:
            raise self.not_a_copy(f"it is shorter than {self.allocator.end} bytes")
        await self.file.truncate(self.allocator.end)  # what lies behind may be anything
        self._allocator_before = self.allocator
        self.allocator = _Clusters(self.file, self.header.cluster_size)
        if there != self.header:
            await write_header(self.file, self.header)

    async def move_back(self) -> None:
        if self._allocator_before is not None:
            self.allocator, self._allocator_before = self._allocator_before, None

    async def moved(self) -> None:
        self._allocator_before = None

    async def _header_of_copy(self) -> Header:
        try:
            return await read_header(self.file)
        except BadImage as error:
            raise self.not_a_copy(error.desc) from None

    def _same_image(self, there: Header) -> None:
        if there.with_(features=there.features & ~NEED_CHECK) != self.header.with_(
            features=self.header.features & ~NEED_CHECK
        ):
            raise self.not_a_copy("its header is another one")

    async def _quiet(self) -> None:
        if self._clearing is not None:
            self._clearing.cancel()
            await asyncio.gather(self._clearing, return_exceptions=True)
        await self.l2.settle()

    async def _open_again(self) -> None:
        old, self.header = self.header, await self._read_header()
        same = ("size", "cluster_size", "table_size", "backing_file")
        if any(getattr(old, name) != getattr(self.header, name) for name in same):
            raise self._error(
                f"Image '{self.filename()}' is another one than when it was opened; remove node "
                f"'{self.name}' and add it anew",
                "changed",
            )
        await self._open_tables()

    async def _close_again(self) -> None:
        await self.close()

    async def _read_only_again(self) -> None:
        self.l2.clear()
        self.header = await self._read_header()
        self.l1 = await self._load_l1(self.header)

    async def _free_before(self, before: dict[str, Any]) -> None:
        before["map"].free()

    async def become_read_only(self) -> bool:
        if self._written_to or self.read_only:
            return False
        await self._write_everything()
        self.options = self.options.model_copy(update={"read_only": True})
        return True

    async def truncate(self, size: int) -> None:
        """Grow. What appears reads as zeroes on disk before the header says that it is there."""
        old = self._size
        if size == old:
            return
        self._check_size(size)
        header = self.header.with_(size=size)
        tail = old % header.cluster_size
        if tail:
            cluster = old // header.cluster_size
            slice = await self.l2.pin(cluster // self.geometry.slice_entries)
            try:
                entry = self.map.get(cluster)
            finally:
                self.l2.unpin(slice)
            if entry & MAP_TYPE == MAP_DATA:
                host = (entry & MAP_OFFSET) + tail
                await self.file.write_zeroes(host, header.cluster_size - tail)
        await self.file.flush()
        l1 = await self._load_l1(header)
        async with self._bit_lock:
            header = self.header.with_(size=size)
            await write_header(self.file, header)
            self.header = header
        self.l1 = l1
        self._size = size
        self.map.set_size(size, self.backing_size)

    def _check_size(self, size: int) -> None:
        header = self.header
        if self.read_only:
            raise self._error(f"Node '{self.name}' is read-only", "read-only")
        if size % SECTOR:
            raise self._error("The new size must be a multiple of 512", "cannot-resize")
        if size < self._size:
            raise self._error("Shrinking QED images is not supported", "cannot-resize")
        if size > header.max_size or header.with_(size=size).l1_entries * 8 > MAX_L1_BYTES:
            raise self._error(
                f"The tables of '{self.filename()}' cannot describe {size} bytes", "cannot-resize"
            )
        if self.backing_size > self._size:
            raise self._error(
                "The backing file is larger than the image: what it has there would appear",
                "cannot-resize",
            )

    # ---- closing

    async def close(self) -> None:
        if self.handle is None:
            return
        try:
            await self._quiet()
            if not self.read_only:
                await self._write_everything()
        except OSError as error:
            logger.error("image '%s' could not be closed in order: %s", self.filename(), error)
        finally:
            self.handle = None
            self.map.free()

    async def _write_everything(self) -> None:
        await self.allocator.trim()
        await self.file.flush()
        await self._clear()


def _nothing() -> None:
    """Nobody is waiting for it."""


def _by_table(claims: list[Claim], entries: int) -> Iterator[list[Claim]]:
    """Claims that are in one L2 table together."""
    tables: dict[int, list[Claim]] = {}
    for claim in claims:
        tables.setdefault(claim.cluster // entries, []).append(claim)
    yield from tables.values()
