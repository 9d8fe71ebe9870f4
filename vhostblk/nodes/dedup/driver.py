# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup: a disk whose blocks are in a store, where equal content is kept once.

Several nodes may be disks of one store; they share the data node below and the `Store` object,
which does the work (vhostblk/dedup). What is left for here are a guest's requests: they are cut
into blocks, blocks that a guest writes partly are filled up, and the engine's `map` node is told
where blocks are, so that reads of what it knows never leave C.

Writes never go to a place where something is. So the map's entries are never writable, and a
place stays what it is until the store has asked all maps for a period of grace.

Engine halves: cffi_build/engine/nodes/dedup.c, which hashes what is written, above map.c; and
digest.c beside them for blocks that are written partly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from array import array
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from vhostblk.dedup.interface import Send, Tuning
from vhostblk.dedup.store import Store
from vhostblk.dedup.tables import PAGE
from vhostblk.engine.dedup import DIGEST, Digester, new_dedup, written_digests
from vhostblk.engine.map import MAP_DATA, MAP_MISS, MAP_ZERO, new_map
from vhostblk.image import Extent
from vhostblk.image.extent import merged
from vhostblk.nodes.dedup.create import DedupCreateOptions, create
from vhostblk.nodes.driver import ChildRole, CreateHost, NodeDriver, NodeOptions, Perm, RoleKind
from vhostblk.nodes.hooks import HookedNode, Request
from vhostblk.schema import BlockdevRef, Model, OnOff, Size, VhostblkError

_PAGE_BITS = PAGE.bit_length() - 1
HOLD_PATIENCE = 12.0
"""Seconds until writes that are held fail because a VM is being stopped, and QEMU hangs until they
end. Longer than the graph's patience: a change is given up before."""
_TABLE_BYTES = 8 * PAGE + 256  # what one costs in memory, about


class DedupOptions(NodeOptions):
    """Options of dedup."""

    file: BlockdevRef
    """The node that holds the blocks; the same one for all disks of a store."""
    metadata: str
    """The directory with the metadata, on a fast device."""
    disk: str = "disk"
    """Which disk of the store this is."""
    size: Size | None = None
    """Its size, if there is no such disk yet."""
    verify: OnOff = False
    """Compare blocks byte by byte before taking them for equal. For all disks of the store."""
    on_enospc: Literal["report", "hold"] = "report"
    """When the store is full, writes fail, or wait until there is space."""
    compress: Literal["off", "zstd"] = "off"
    """Whether new blocks are compressed. For all disks of the store."""
    metadata_size: Size = 256 << 30
    """The most that the database may grow to. For all disks of the store."""
    changes_size: Size = 64 << 20
    """Bytes of memory for changes that are not in the database yet. For all disks of the store."""
    cache_size: Size = 32 << 20
    """Bytes of memory for the map of this disk."""


class _Shared:
    """A store and the nodes that are its disks."""

    stores: ClassVar[dict[tuple[int, str], _Shared]] = {}

    def __init__(self, store: Store) -> None:
        self.store = store
        self.users = 0
        self.lock = asyncio.Lock()
        self.is_open = False


class Dedup(HookedNode):
    """A disk of a store."""

    driver = "dedup"
    Options = DedupOptions
    options: DedupOptions
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole(RoleKind.STORAGE)}
    CreateOptions: ClassVar[type[Model] | None] = DedupCreateOptions
    takes_growth = True

    @classmethod
    async def create(cls, host: CreateHost, options: DedupCreateOptions) -> None:
        async with host.image(options.file) as file:
            await create(options, file)

    # ---- life

    async def open(self) -> None:
        self._prepare_hooks()
        self._hooks = [self._read, self._write, self._flush, self._discard, self._write_zeroes]
        self._busy: list[tuple[int, int, asyncio.Future[None]]] = []
        self._tables: deque[int] = deque()
        self._installed: set[int] = set()
        self._patient_until = math.inf
        self._most_tables = max(16, self.options.cache_size // _TABLE_BYTES)
        if self.read_only:
            raise self._error("a dedup store cannot be opened read-only: opening it may repair it")
        self._directory = self._metadata_path()
        self._key = (id(self.engine), self._directory)
        await self._open_store()
        try:
            self._open_disk()
        except BaseException:
            await self._close_store()
            raise

    async def _open_store(self) -> None:
        shared = _Shared.stores.get(self._key)
        if shared is None:
            tuning = Tuning(
                metadata_size=self.options.metadata_size,
                changes=Tuning.changes_in(self.options.changes_size),
                verify=self.options.verify,
                compress=self.options.compress == "zstd",
                hold=self.options.on_enospc == "hold",
                discard=self.options.discard == "unmap",
            )
            shared = _Shared.stores[self._key] = _Shared(Store(Path(self._directory), tuning))
        self._shared = shared
        shared.users += 1
        try:
            async with shared.lock:
                if not shared.is_open:
                    await shared.store.open(self.child("file"))
                    shared.is_open = True
        except VhostblkError as error:
            self._forget_store()
            raise self._error(error.desc, error.data) from None
        except BaseException:
            self._forget_store()
            raise
        self.store = shared.store
        self._bits = self.store.super.block_bits

    def _open_disk(self) -> None:
        store, name = self.store, self.options.disk
        below = self.child("file").node
        for other in store.members:
            assert isinstance(other, Dedup)
            if other.child("file").node is not below:
                raise self._error(
                    f"the store's data are on node '{other.child('file').node.name}' already, "
                    f"not on '{below.name}'"
                )
            if other.options.disk == name:
                raise self._error(f"disk '{name}' of the store is node '{other.name}' already")
        if name in store.deleting:
            raise self._error(f"disk '{name}' of the store is being deleted")
        found = store.disk(name)
        if found is None:
            if self.options.size is None:
                known = ", ".join(f"'{other}'" for _, other in store.tables.disks().values())
                raise self._error(
                    f"the store has no disk '{name}' (it has {known or 'none'}); "
                    "give its size to make one"
                )
            size = -(-self.options.size // 512) * 512
            found = store.set_disk(name, size), size
        self.number, self._size = found
        self.map = new_map(
            self.engine,
            size=self._size,
            unit_bits=self._bits,
            cluster_bits=self._bits,
            table_bits=_PAGE_BITS,
            has_backing=False,
            backing_size=0,
            allocate=False,
            sink=self._start,
        )
        sha256 = store.super.hash == "sha256"
        self._hasher = self.handle = new_dedup(self.engine, self._bits, sha256=sha256)
        self._digester = Digester(self.engine, self._bits, sha256=sha256)
        self.map.set_dirty(store.dirty)
        store.join(self)

    async def close(self) -> None:
        if self.handle is not None:
            await self.store.leave(self)
            await self._close_store()
            self._digester.free()
            self._hasher.free()
            self.map.free()
            self.handle = None

    def relink(self) -> None:
        child = self.child("file")
        child.refresh()
        if self.handle is not None:
            self.map.set_child(0, child.node.effective)
            self._hasher.set_child(0, self.map)

    async def _close_store(self) -> None:
        shared = self._shared
        async with shared.lock:
            if shared.users == 1:
                shared.is_open = False
                await shared.store.close(self.child("file"))
            self._forget_store()

    def _forget_store(self) -> None:
        self._shared.users -= 1
        if self._shared.users == 0:
            del _Shared.stores[self._key]

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        # Nobody makes it smaller under us.
        return Perm.CONSISTENT_READ | Perm.WRITE, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED

    def shared_with(self, other: NodeDriver) -> Perm:
        # Other disks of the store write there, too. Not those of a copy of its metadata.
        same = isinstance(other, Dedup) and other._metadata_path() == self._metadata_path()
        return Perm.WRITE if same else Perm.NONE

    def _metadata_path(self) -> str:
        return os.path.realpath(self.options.metadata)

    # ---- drained sections

    def drain_begin(self) -> None:
        self._patient_until = self.engine.loop.time() + HOLD_PATIENCE

    def drain_end(self) -> None:
        self._patient_until = math.inf

    # ---- what it is

    @property
    def size(self) -> int:
        return self._size

    def filename(self) -> str:
        # For the header of an overlay: its data device's name alone would lead to other data.
        below = self.child("file").node
        name = {
            "driver": "dedup",
            "disk": self.options.disk,
            "metadata": self._directory,
            "file": {"driver": below.driver, "filename": below.filename()},
        }
        return f"json:{json.dumps(name)}" if below.filename() else ""

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        size, end = 1 << self._bits, offset + length
        name = self.child("file").node.filename()
        for page in range(offset // size // PAGE, (end - 1) // size // PAGE + 1):
            numbers = self.store.tables.page(self.number, page)
            found = []
            for index, number in enumerate(numbers):
                at = (page * PAGE + index) * size
                begin, stop = max(at, offset), min(at + size, end)
                if begin < stop:
                    found.append(self._extent(number, begin, stop - begin, begin - at, name))
            for extent in merged(found):
                yield extent

    def _extent(self, number: int, start: int, length: int, skip: int, name: str) -> Extent:
        block = self.store.tables.block(number) if number else None
        if block is None:
            return Extent(start, length, present=bool(number), zero=not number, data=False)
        if block.length < 1 << self._bits:
            return Extent(start, length, compressed=True)
        return Extent(start, length, offset=block.offset + skip, filename=name)

    def describe(self) -> dict[str, Any]:
        image = {
            "filename": self.child("file").node.filename(),
            "format": "dedup",
            "virtual-size": self._size,
            "cluster-size": 1 << self._bits,
        }
        return {"image": image, "dedup": {"disk": self.options.disk, **self.store.stats()}}

    @property
    def allocation_unit(self) -> int:
        return 1 << self._bits

    @property
    def discard_granularity(self) -> int:
        return 1 << self._bits

    def state_options(self) -> dict[str, Any]:
        options = super().state_options()
        return {**options, "metadata": os.path.abspath(self.options.metadata)}

    def _error(self, text: str, data: dict[str, Any] | None = None) -> VhostblkError:
        return VhostblkError(f"Could not open node '{self.name}' (dedup): {text}", data=data)

    async def check_image(self, patience: float | None) -> dict[str, Any]:
        # All of the store, in one go: what one disk shows, another may, too.
        result = await self.store.check(self.data, repair=False)
        return {
            "check-errors": 0,
            "corruptions": result.corruptions + result.wrong,
            "leaks": result.leaks,
            "total-clusters": result.mapped,
            "allocated-clusters": result.blocks,
        }

    # ---- for the store

    @property
    def disk(self) -> str:
        """Which disk of the store this is."""
        return self.options.disk

    @property
    def data(self) -> Any:
        """The data device."""
        return self.child("file")

    def set_dirty(self, dirty: bool) -> None:
        """Whether flushes must come up."""
        self.map.set_dirty(dirty)

    def is_patient(self) -> bool:
        """Whether writes may wait for space: not for long if somebody waits for them to end."""
        return self.host.closing or self.engine.loop.time() < self._patient_until

    def forget_places(self) -> None:
        """Blocks have moved."""
        for table in self._tables:
            self.map.evict(table)
        self._tables.clear()
        self._installed.clear()

    async def grace(self) -> None:
        """Done when no request under way uses a place that it has learnt before."""
        await self.map.grace()

    def working(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A step of background work."""
        return self.host.working(self)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the control clients."""
        self.host.emit(name, data)

    # ---- the engine's map

    def _entry(self, number: int) -> int:
        """What the engine is to know of a block that shows the stored block `number`."""
        if number == 0:
            return MAP_ZERO
        block = self.store.tables.block(number)
        if block is None or block.length != 1 << self._bits:
            return MAP_MISS  # compressed (or missing): read() sees to it
        return block.offset | MAP_DATA

    def _install(self, table: int) -> None:
        while len(self._tables) >= self._most_tables:
            victim = self._tables.popleft()
            if self.map.used(victim):
                self._tables.append(victim)
                continue
            self.map.evict(victim)
            self._installed.discard(victim)
        page = self.store.tables.page(self.number, table)
        self.map.install(table, array("Q", map(self._entry, page)))
        self._tables.append(table)
        self._installed.add(table)

    def _show(self, first: int, numbers: list[int]) -> None:
        """Blocks show other stored blocks now."""
        size, set_entries = 1 << self._bits, self.map.set
        at = 0
        entries = [self._entry(number) for number in numbers]
        while at < len(entries):
            end, entry = at + 1, entries[at]
            step = size if entry > MAP_ZERO and entry & MAP_DATA else 0
            while end < len(entries) and entries[end] == entry + (end - at) * step:
                end += 1
            set_entries(first + at, end - at, entry, step)
            at = end

    # ---- claims: who changes a block has it for himself

    async def _claim(self, first: int, end: int) -> tuple[int, int, asyncio.Future[None]]:
        while others := [busy for busy in self._busy if first < busy[1] and busy[0] < end]:
            await others[0][2]
        claim = (first, end, asyncio.get_running_loop().create_future())
        self._busy.append(claim)
        return claim

    def _release(self, claim: tuple[int, int, asyncio.Future[None]]) -> None:
        self._busy.remove(claim)
        claim[2].set_result(None)

    # ---- requests

    def _range(self, request: Request) -> tuple[int, int]:
        bits = self._bits
        return request.offset >> bits, ((request.offset + request.length - 1) >> bits) + 1

    async def _read(self, request: Request) -> None:
        first, end = self._range(request)
        tables = range(first >> _PAGE_BITS, ((end - 1) >> _PAGE_BITS) + 1)
        missing = [table for table in tables if table not in self._installed]
        if missing:
            for table in missing:
                self._install(table)
            request.retry()
            return
        size, content = 1 << self._bits, bytearray()
        for block in range(first, end):
            content += await self.store.read_block(self.data, self.number, block)
        begin = request.offset - first * size
        request.fill(memoryview(content)[begin : begin + request.length])

    def _write(self, request: Request) -> Coroutine[Any, Any, None] | None:
        size = 1 << self._bits
        if (request.offset | request.length) % size or request.fua:
            return self._write_slowly(request)
        first, end = self._range(request)
        for busy in self._busy:
            if first < busy[1] and busy[0] < end:
                return self._write_slowly(request)
        digests = written_digests(request._iov)
        prints = [digests[at : at + DIGEST] for at in range(0, len(digests), DIGEST)]
        # By far the fastest way, if all of it is there: no task, no copy, nothing to wait for.
        numbers = self.store.write_known(self.number, first, prints)
        if numbers is not None:
            self._show(first, numbers)
            return None
        # And the fastest one if nothing of it is.
        place = self.store.begin_new(prints)
        if place is None:
            return self._write_slowly(request)
        claim = (first, end, self.engine.loop.create_future())
        self._busy.append(claim)
        return self._write_new(request, claim, prints, place)

    async def _write_new(
        self,
        request: Request,
        claim: tuple[int, int, asyncio.Future[None]],
        prints: list[bytes],
        place: int,
    ) -> None:
        store, first = self.store, claim[0]
        written = False
        try:
            try:
                await self.data.forward_part(request, place, 0, request.length)
                written = True
            except OSError:
                pass  # write() knows what to do
            finally:
                numbers = store.end_new(self.number, first, prints, place, written=written)
            if numbers is not None:
                self._show(first, numbers)
                return
            data, digests = request.buffers
            await self._put(request.offset, data, first, claim[1], digests, request)
        finally:
            self._release(claim)

    async def _write_slowly(self, request: Request) -> None:
        first, end = self._range(request)
        data, prints = request.buffers  # a copy of the guest's, and its fingerprints
        claim = await self._claim(first, end)
        try:
            await self._put(request.offset, data, first, end, prints, request)
        finally:
            self._release(claim)
        if request.fua:
            await self.store.flush(self.data)

    async def _put(
        self,
        offset: int,
        data: bytes | memoryview,
        first: int,
        end: int,
        digests: memoryview | None = None,
        request: Request | None = None,
    ) -> None:
        """Write to claimed blocks, some of them only partly: these have no digests yet.

        With digests, the data are those of `request`, which is what this is done for, if any.
        """
        size = 1 << self._bits
        before, after = offset - first * size, end * size - offset - len(data)
        send: Send | None = None
        if before or after:
            data = await self._filled(data, before, after, first, end)
        elif digests is not None and request is not None:
            send = partial(self.data.forward_part, request)
        view = memoryview(data)
        handle = 0 if request is None else request.handle
        if digests is None:
            prints = await self._digester.digest(view, handle)
        else:
            prints = [bytes(digests[at : at + DIGEST]) for at in range(0, len(digests), DIGEST)]
            if before:
                [prints[0]] = await self._digester.digest(view[:size], handle)
            if after and not (before and len(prints) == 1):
                [prints[-1]] = await self._digester.digest(view[-size:], handle)
        numbers = await self.store.write(self.data, self.number, first, view, prints, send)
        self._show(first, numbers)

    async def _filled(
        self, data: bytes | memoryview, before: int, after: int, first: int, end: int
    ) -> bytes:
        """The same with what the blocks at both ends show in front and behind."""
        parts: list[bytes | bytearray | memoryview] = [b"", data, b""]
        if before:
            old = await self.store.read_block(self.data, self.number, first)
            parts[0] = old[:before]
        if after and (end << self._bits) - after >= self._size:
            parts[2] = bytes(after)  # beyond the end there is nothing
        elif after:
            if not before or end > first + 1:
                old = await self.store.read_block(self.data, self.number, end - 1)
            parts[2] = old[len(old) - after :]
        return b"".join(parts)

    async def _flush(self, request: Request) -> None:
        await self.store.flush(self.data)

    async def _discard(self, request: Request) -> None:
        bits, stop = self._bits, request.offset + request.length
        first = -(-request.offset >> bits)
        end = -(-stop >> bits) if stop >= self._size else stop >> bits
        if first < end:
            await self._unmap(first, end)

    async def _unmap(self, first: int, end: int) -> None:
        claim = await self._claim(first, end)
        try:
            async for begin, count in self.store.unmap(self.data, self.number, first, end):
                self.map.set(begin, count, MAP_ZERO, 0)
        finally:
            self._release(claim)

    async def _write_zeroes(self, request: Request) -> None:
        first, end = self._range(request)
        size = 1 << self._bits
        offset, stop = request.offset, request.offset + request.length
        if offset % size or (stop % size and stop < self._size):
            await self._zero_edges(offset, stop, request)
            first, end = -(-offset // size), stop // size
        if first < end:
            await self._unmap(first, end)
        if request.fua:
            await self.store.flush(self.data)

    async def _zero_edges(self, offset: int, stop: int, request: Request | None) -> None:
        size = 1 << self._bits
        edges = {offset // size, (stop - 1) // size}
        for block in sorted(edges):
            begin, end = max(offset, block * size), min(stop, (block + 1) * size)
            claim = await self._claim(block, block + 1)
            try:
                await self._put(begin, bytes(end - begin), block, block + 1, None, request)
            finally:
                self._release(claim)

    # ---- changes

    async def truncate(self, size: int) -> None:
        if size < self._size:
            await self._unmap(-(-size >> self._bits), -(-self._size >> self._bits))
            block_end = -(-size >> self._bits) << self._bits
            if size < block_end:
                # Else what is cut off would be back when the disk grows.
                await self._zero_edges(size, min(block_end, self._size), None)
        self.store.set_disk(self.options.disk, size)
        await self.store.flush(self.data)
        self._size = size
        self.map.set_size(size, 0)

    def grown(self) -> None:
        self.store.resize(self.child("file").size)

    resized = grown


def _nothing() -> None:
    """The engine allocates nothing."""
