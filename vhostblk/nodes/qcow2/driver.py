# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2: QEMU's image format, read and written while a guest runs.

The engine's `map` node carries out what the tables in memory answer; this class
opens the image, owns its parts, and closes it: tables in memory (l2cache.py),
requests that came up (datapath.py, discard.py), new and freed clusters
(allocator.py), metadata to disk (writeback.py), another size (resize.py). The
format itself is in header.py, refcounts.py, entries.py and their neighbours.
Engine half: cffi_build/engine/nodes/map.c. docs/qcow2.md explains all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vhostblk.engine import (
    IO,
    MAP_BACKING,
    MAP_ZERO,
    OP_READ,
    MapHandle,
)
from vhostblk.nodes.driver import ChildRole, CreateHost, Perm, RoleKind
from vhostblk.nodes.hooks import HookedChild, HookedNode, Request
from vhostblk.nodes.qcow2.allocator import Allocator
from vhostblk.nodes.qcow2.backing import NamedFiles
from vhostblk.nodes.qcow2.compression import decompress
from vhostblk.nodes.qcow2.create import Qcow2CreateOptions
from vhostblk.nodes.qcow2.creating import create_image
from vhostblk.nodes.qcow2.datapath import DataPath
from vhostblk.nodes.qcow2.discard import Discarder
from vhostblk.nodes.qcow2.geometry import (
    COMPRESSED,
    L1_RESERVED,
    OFFSET_MASK,
    BrokenEntry,
    Geometry,
    translate,
    units_of,
)
from vhostblk.nodes.qcow2.header import Header
from vhostblk.nodes.qcow2.l2cache import L2Cache, Slice, words_from
from vhostblk.nodes.qcow2.options import Qcow2Options, cache_limits, check
from vhostblk.nodes.qcow2.refcounts import Refcounts
from vhostblk.nodes.qcow2.resize import resize
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.nodes.qcow2.writeback import Writeback
from vhostblk.schema import Model, VhostblkError

logger = logging.getLogger(__name__)

# Decompressed clusters that are kept: sequential small reads ask for each many times.
_DECOMPRESSED = 8


class Qcow2Child(HookedChild):
    """A child of a live image."""

    def transfer(self, request: Request, offset: int, length: int, position: int) -> IO:
        """Read into a guest's memory, `position` bytes from its beginning."""
        self.check_range(offset, length)
        assert self._target is not None
        request._inflight += 1
        io = self._host.engine.submit(
            self._target,
            OP_READ,
            offset,
            None,
            length,
            request=request.handle,
            buffer_offset=position,
        )
        io.owner = request
        return io


class Qcow2(HookedNode):
    """A qcow2 image."""

    driver = "qcow2"
    Options = Qcow2Options
    options: Qcow2Options
    child_class = Qcow2Child
    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole(RoleKind.STORAGE),
        "data-file": ChildRole(RoleKind.STORAGE, optional=True),
        "backing": ChildRole(RoleKind.BACKING, optional=True),
    }

    # ---- creating

    CreateOptions: ClassVar[type[Model] | None] = Qcow2CreateOptions

    @classmethod
    async def create(cls, host: CreateHost, options: Qcow2CreateOptions) -> None:
        await create_image(host, options)

    # ---- opening

    async def implied_children(self) -> Mapping[str, str | dict[str, Any]]:
        check(self.options)
        self.file = ChildStorage(self.child("file"))
        self.header = await self._read_header()
        given = self.options.model_fields_set
        names = NamedFiles(self.name, self.filename(), self.options.allow_backing_from)
        implied: dict[str, str | dict[str, Any]] = {}
        if self.header.has_data_file:
            if self.options.data_file is None:
                if self.header.data_file is None:
                    raise self._error(
                        f"Image '{self.filename()}' keeps its data in another file and does not "
                        "say in which; give 'data-file'",
                        "data-file-missing",
                    )
                implied["data-file"] = names.data_file(self.header.data_file)
        elif self.options.data_file is not None:
            raise self._error(
                f"'data-file' can only be set for images with an external data file, and "
                f"'{self.filename()}' is none",
                "data-file",
            )
        if self.header.backing_file and "backing" not in given:
            implied["backing"] = names.backing(self.header.backing_file, self.header.backing_format)
        return implied

    async def open(self) -> None:
        self._prepare_hooks()
        self._readers: set[asyncio.Future[None]] = set()
        self._decompressed: dict[int, bytes] = {}
        self._cleaner: asyncio.Task[None] | None = None
        self.stopped = False
        header = self.header
        if header.crypt_method:
            raise self._error(
                f"Image '{self.filename()}' is encrypted, which is not supported yet", "encrypted"
            )
        if not self.read_only:
            await self._make_writable()
        limits = cache_limits(
            self.options, 1 << header.cluster_bits, self.options.refcount_cache_size or 0
        )
        self.geometry = Geometry(
            cluster_bits=header.cluster_bits,
            extended=header.extended_l2,
            version=header.version,
            slice_bytes=limits.slice_bytes,
            external=header.has_data_file,
        )
        self._size = self.header.size
        self.data_role = "data-file" if header.has_data_file else "file"
        self.data = self.file
        if header.has_data_file:
            self.data = ChildStorage(self.child("data-file"))
        self.data_is_raw = header.data_file_raw
        self.l1_offset = header.l1_table_offset
        self.l1 = await self._load_l1()
        self.refcounts = await self._load_refcounts()
        self._know_backing()
        # A cluster with subclusters is not the engine's to allocate, nor one with a fixed place.
        self.engine_allocates = not (
            self.read_only or self.geometry.extended or self.geometry.external
        )
        self.map = self._new_map()
        self.handle = self.map
        self.l2 = L2Cache(self.geometry, self.map, self, limits.slices, self._made_dirty)
        self._size_at_open = self.file.size
        self.metadata: set[int] = set()
        self.allocator = Allocator(self.geometry, self.refcounts, self.file, self.map, self)
        self.writeback = Writeback(self, self._writeback_failed)
        self.path = DataPath(self)
        discarder = Discarder(self)
        self._hooks = [
            self.path.read,
            self.path.write,
            self._flush,
            discarder.discard,
            discarder.write_zeroes,
        ]
        self.discarder = discarder
        request = self.options.pass_discard_request
        self.pass_discard_request = self.options.discard == "unmap" if request is None else request
        self._start_cleaning()

    # ---- the format

    async def _read_header(self) -> Header:
        return Header.parse(await self.file.read(0, max(65536, 4096)))

    async def _make_writable(self) -> None:
        pass

    async def _load_l1(self) -> list[int]:
        raw = await self.file.read(self.header.l1_table_offset, 8 * self.header.l1_size)
        return list(words_from(raw))

    async def _load_refcounts(self) -> Refcounts:
        counts = Refcounts(self.file, self.header)
        await counts.load()
        return counts

    def _new_map(self) -> MapHandle:
        geometry = self.geometry
        return self.engine.new_map(
            size=self._size,
            unit_bits=geometry.unit_bits,
            cluster_bits=geometry.cluster_bits,
            table_bits=geometry.table_bits,
            has_backing=self.has_backing,
            backing_size=self.backing_size,
            allocate=self.engine_allocates,
            sink=self._start,
            low=self._low,
        )

    def _low(self) -> None:
        self.allocator.run_is_low()

    async def decompress(self, word: int) -> bytes:
        """The contents of a compressed cluster."""
        data = self._decompressed.get(word)
        if data is not None:
            return data
        offset, length = self._compressed_range(word)
        with self.reading():
            raw = await self.file.read(offset, length)
            data = await asyncio.to_thread(
                decompress, self.header.compression, raw, self.geometry.cluster_size
            )
        if len(self._decompressed) >= _DECOMPRESSED:
            del self._decompressed[next(iter(self._decompressed))]
        self._decompressed[word] = data
        return data

    def _compressed_range(self, word: int) -> tuple[int, int]:
        """Where a compressed cluster is: offset, bytes up to the end of its last sector."""
        shift = 62 - (self.geometry.cluster_bits - 8)
        offset = word & ((1 << shift) - 1)
        sectors = ((word & ((1 << 62) - 1)) >> shift) + 1
        return offset, sectors * 512 - (offset & 511)

    def _compressed_clusters(self, word: int) -> range:
        offset, length = self._compressed_range(word)
        size = self.geometry.cluster_size
        return range(offset // size * size, offset + length, size)

    def _know_backing(self) -> None:
        child = self.children.get("backing")
        self.has_backing = child is not None
        self.backing_size = child.size if child is not None else 0
        self.nothing = MAP_BACKING if self.has_backing else MAP_ZERO

    # ---- what it is

    @property
    def size(self) -> int:
        return self._size

    def filename(self) -> str:
        return self.child("file").node.filename()

    def relink(self) -> None:
        for child in self.children.values():
            child.refresh()
        if self.handle is not None:
            self.handle.set_child(0, self.child(self.data_role).node.effective)
            if "backing" in self.children:
                self.handle.set_child(1, self.child("backing").node.effective)

    def children_changed(self) -> None:
        before = self.has_backing, self.backing_size
        self._know_backing()
        if (self.has_backing, self.backing_size) != before:
            self.map.set_size(self._size, self.backing_size)
            self.l2.install_again()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if role.kind is RoleKind.BACKING:
            return Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        return super().child_permissions(role, perm, shared)

    def refuse_writes(self) -> None:
        """Raise if nothing may be written any more."""
        if self.stopped:
            raise OSError(errno.EIO, "the image is corrupt, nothing is written to it")

    # ---- for the parts

    def transfer(self, role: str, request: Request, offset: int, length: int, position: int) -> IO:
        """Read from a child into a guest's memory, `position` bytes from its beginning."""
        child = self.children[role]
        assert isinstance(child, Qcow2Child)
        return child.transfer(request, offset, length, position)

    def read_backing(self, offset: int, into: memoryview) -> IO:
        """Read what the image does not have."""
        return self.children["backing"].read(offset, into)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, clusters that are named now are not reused."""
        done = self.engine.loop.create_future()
        self._readers.add(done)
        try:
            yield
        finally:
            self._readers.discard(done)
            done.set_result(None)

    async def grace(self) -> None:
        """Done when all requests that have begun by now have ended, in the engine and here."""
        readers = list(self._readers)
        await self.map.grace()
        for reader in readers:
            await reader

    async def again(self, request: Request, op: int) -> None:
        """Carry out a request through the engine's map once more, without its flags."""
        io = self.engine.submit(
            self.map, op, request.offset, None, request.length, request=request.handle
        )
        request._inflight += 1
        io.owner = request
        await io

    def entries_of(self, slice: Slice, index: int) -> list[int]:
        """What the engine is to know of one cluster."""
        entries = units_of(self.geometry, slice.words, index, self.nothing, not self.read_only)
        return entries

    async def load_slice(self, index: int) -> array[int]:
        """The words of a slice as they are on disk; zeroes if there is no table."""
        table, part = divmod(index, self.geometry.slices_per_table)
        size = self.geometry.slice_bytes
        entry = self.l1[table]
        if not entry:
            return array("Q", bytes(size))
        host = entry & OFFSET_MASK
        if entry & L1_RESERVED or host & (self.geometry.cluster_size - 1):
            raise self.corrupt(f"L1 entry {table} ({entry:#x}) is not a valid offset", fatal=True)
        with self.reading():
            words = words_from(await self.file.read(host + part * size, size))
        self._check_slice(words, host + part * size, index)
        return words

    def _check_slice(self, words: array[int], where: int, index: int) -> None:
        try:
            entries = translate(self.geometry, words, self.nothing, True)
        except BrokenEntry as error:
            cluster = index * self.geometry.slice_entries + error.index
            raise self.corrupt(
                f"{error} (guest offset {cluster << self.geometry.cluster_bits:#x}, "
                f"L2 table at {where:#x})",
                offset=cluster << self.geometry.cluster_bits,
                size=self.geometry.cluster_size,
            ) from None
        del entries

    def map_entries(self, slice: Slice) -> array[int] | None:
        """What the engine is to know of a slice."""
        if self.stopped:
            return None
        return translate(self.geometry, slice.words, self.nothing, not self.read_only)

    def replaced(self, word: int) -> None:
        """The engine has allocated a cluster for what had this L2 word."""
        self.let_go(word)

    def let_go(self, word: int, *, discard: bool | None = None) -> None:
        """No L2 entry in memory names the cluster(s) of `word` any more."""
        if discard is None:
            discard = self.options.pass_discard_other
        if word & COMPRESSED:
            self._decompressed.clear()
            for host in self._compressed_clusters(word):
                self.allocator.free_later(host, 1, discard=discard)
        elif word & OFFSET_MASK and not self.geometry.external:
            self.allocator.free_later(word & OFFSET_MASK, 1, discard=discard)

    async def write_back(self) -> None:
        """Write all dirty slices."""
        await self.writeback.flush()

    def _made_dirty(self) -> None:
        self.map.set_dirty(True)

    async def _flush(self, request: Request) -> None:
        if self.stopped:
            await self.data.flush()
            return
        await self.writeback.flush()

    # ---- broken images

    def corrupt(
        self, text: str, *, offset: int | None = None, size: int | None = None, fatal: bool = False
    ) -> OSError:
        """Something is wrong in the image: stop writing to it; an error to raise."""
        if not self.stopped:
            logger.error("image '%s' (node '%s') is corrupt: %s", self.filename(), self.name, text)
            data: dict[str, Any] = {
                "device": "",
                "node-name": self.name,
                "msg": text,
                "fatal": fatal or not self.read_only,
            }
            if offset is not None:
                data["offset"] = offset
            if size is not None:
                data["size"] = size
            self.host.emit("BLOCK_IMAGE_CORRUPTED", data)
            if not self.read_only:
                self.stopped = True
                self.l2.stop_serving()
                task = self.engine.loop.create_task(self._mark_corrupt())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return OSError(errno.EIO, f"the image is corrupt: {text}")

    def check_new(self, host: int, length: int) -> None:
        """Raise if metadata are where the reference counts say that clusters are free."""
        if self.options.overlap_check == "none":
            return
        size = self.geometry.cluster_size
        for cluster in range(host, host + length, size):
            if cluster in self.metadata:
                raise self.corrupt(
                    f"a cluster that is counted as free holds metadata (at {cluster:#x})",
                    offset=cluster,
                    size=size,
                    fatal=True,
                )

    def _writeback_failed(self, error: OSError) -> None:
        logger.warning("metadata of '%s' could not be written: %s", self.filename(), error)

    def _error(self, text: str, code: str = "bad-image") -> VhostblkError:
        return VhostblkError(
            text, data={"code": code, "node": self.name, "filename": self.filename()}
        )

    # ---- changes

    async def truncate(self, size: int) -> None:
        await resize(self, size)

    def set_size(self, size: int) -> None:
        """The disk has another size; nothing is in flight."""
        self._size = size
        self.map.set_size(size, self.backing_size)

    def moved_metadata(self, old: int, old_clusters: int, new: int, new_clusters: int) -> None:
        """A table is elsewhere now."""
        size = self.geometry.cluster_size
        self.metadata.difference_update(range(old, old + old_clusters * size, size))
        self.metadata.update(range(new, new + new_clusters * size, size))

    # ---- closing

    async def close(self) -> None:
        if self.handle is None:
            return
        if self._cleaner is not None:
            self._cleaner.cancel()
        try:
            await self.l2.settle()
            if not self.read_only and not self.stopped:
                await self._write_everything()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        except OSError as error:
            logger.error("image '%s' could not be closed in order: %s", self.filename(), error)
        finally:
            self.handle = None
            self.map.free()

    async def _write_everything(self) -> None:
        self.l2.apply_log()
        await self.allocator.settle()
        await self.writeback.flush()
        await self.allocator.settle()
        # Nothing allocates any more: the end of the file may be what was not used.
        unused = await self.allocator.take_back()
        await self.allocator.write_counts()
        await self._shorten(unused)
        await self.file.flush()

    async def _shorten(self, unused: list[tuple[int, int]]) -> None:
        """Cut clusters off the end of the file that were taken in advance and not used."""
        end = self.file.size
        for host, length in sorted(unused, reverse=True):
            if host + length >= end and host >= self._size_at_open:
                end = host
        if end < self.file.size:
            await self.file.truncate(end)

    def _start_cleaning(self) -> None:
        interval = self.options.cache_clean_interval
        if interval is None:
            interval = 600
        if interval:
            self._cleaner = self.engine.loop.create_task(self._clean(interval))

    async def _clean(self, interval: int) -> None:
        while True:
            await asyncio.sleep(interval)
            await self.l2.drop_unused()
