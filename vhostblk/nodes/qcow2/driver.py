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
import itertools
import logging
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

from vhostblk import luks
from vhostblk.engine import IO
from vhostblk.engine.map import MapHandle, new_map
from vhostblk.image import Extent
from vhostblk.nodes._map_log import LogFile, Record
from vhostblk.nodes._mapped import MappedImage
from vhostblk.nodes.driver import (
    DETECT_ZEROES,
    ChildRole,
    CreateHost,
    NodeDriver,
    Perm,
    RoleKind,
)
from vhostblk.nodes.hooks import Request
from vhostblk.nodes.qcow2 import bitmaps, extents, facts, internal, journal, moving
from vhostblk.nodes.qcow2.allocator import Allocator
from vhostblk.nodes.qcow2.backing import NamedFiles
from vhostblk.nodes.qcow2.check import check as check_at_rest
from vhostblk.nodes.qcow2.check import repair_dirty
from vhostblk.nodes.qcow2.compression import decompress
from vhostblk.nodes.qcow2.create import Qcow2CreateOptions, plan
from vhostblk.nodes.qcow2.create import check as check_options
from vhostblk.nodes.qcow2.creating import create_image
from vhostblk.nodes.qcow2.datapath import Claim, DataPath
from vhostblk.nodes.qcow2.discard import Discarder
from vhostblk.nodes.qcow2.encryption import METHODS, EncryptedStorage, open_volume
from vhostblk.nodes.qcow2.geometry import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    BrokenEntry,
    Geometry,
    translate,
)
from vhostblk.nodes.qcow2.header import CORRUPT, BadImage, Header
from vhostblk.nodes.qcow2.l2cache import L2Cache, Slice, words_from
from vhostblk.nodes.qcow2.layout import commit_header, read_header, rewrite_header
from vhostblk.nodes.qcow2.metadata import Metadata
from vhostblk.nodes.qcow2.options import Qcow2Options, cache_limits, check
from vhostblk.nodes.qcow2.refcounts import Refcounts
from vhostblk.nodes.qcow2.resize import resize
from vhostblk.nodes.qcow2.snapshots import Snapshot
from vhostblk.nodes.qcow2.storage import ChildStorage, background
from vhostblk.nodes.qcow2.writeback import Writeback
from vhostblk.objects.secret import Secret
from vhostblk.schema import Model, VhostblkError
from vhostblk.secret import SecretBytes

logger = logging.getLogger(__name__)

# Decompressed clusters that are kept: sequential small reads ask for each many times.
_FIRST_SLICES = 64  # loaded for an overlay's first writes, with those that the covered image has
_DECOMPRESSED = 8


class Qcow2(MappedImage):
    """A qcow2 image."""

    driver = "qcow2"
    Options = Qcow2Options
    options: Qcow2Options
    allocator: Allocator
    writeback: Writeback
    reopenable = MappedImage.reopenable | {
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
        "lazy-refcounts",
        "allow-backing-from",
    }
    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole(RoleKind.STORAGE),
        "data-file": ChildRole(RoleKind.STORAGE, optional=True),
        "backing": ChildRole(RoleKind.BACKING, optional=True),
    }

    # ---- creating

    CreateOptions: ClassVar[type[Model] | None] = Qcow2CreateOptions

    @classmethod
    def check_create(cls, options: Qcow2CreateOptions) -> None:
        check_options(options)
        plan(options)

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
        self._cleaner: asyncio.Task[None] | None = None
        self._early: asyncio.Task[None] | None = None
        self._written_to = False
        self.owes_flush = False
        self._bitmaps: bitmaps.Directory | None = None
        self.volume: luks.Volume | None = None
        self._encrypted: EncryptedStorage | None = None
        secret = self._secret()
        # Before anything is written: a wrong passphrase changes nothing.
        key = None if secret is None else await self._unlock(secret)
        with key or contextlib.nullcontext():
            await self._open_tables(key)

    async def _open_tables(self, key: SecretBytes | None) -> None:
        """Make all that serves the image; nothing stays if it fails."""
        self._decompressed: dict[int, bytes] = {}
        self._header_lock = asyncio.Lock()
        self._header_unsure = False
        self.stopped = False
        self._lost = False
        self.move_under_way: moving.Move | None = None
        self.refcounts = await self._load_refcounts(self.header)
        if not self.read_only:
            await self._make_writable()
        self._tables = await facts.read_tables(self.file, self.header)
        header, token = self.header, 0
        limits = cache_limits(
            self.options,
            1 << header.cluster_bits,
            self.options.refcount_cache_size or 0,
            extended=header.extended_l2,
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
        self.l1 = await self._load_l1(header)
        self._know_backing()
        log: LogFile | None = None
        records: list[Record] = []
        if not self.read_only:
            log, token, records = await journal.open_for(self, header)
        if key is not None:
            self._encrypted = self._encrypt(key)
        if self._encrypted is not None:
            self.data = self._encrypted
        # A cluster with a fixed place is not the engine's to allocate, nor one whose zeroes
        # are noise.
        self.engine_allocates = not (
            self.read_only or self.geometry.external or self._encrypted is not None
        )
        self.map = self._new_map(log)
        self.handle = self.map
        self.l2 = L2Cache(self.geometry, self.map, self, limits.slices, self._made_dirty)
        self._size_at_open = self.file.size
        self.metadata = await self._where_metadata_are(self.header, self.l1, self.refcounts)
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
        try:
            await self._begin_log(log, token, records)
        except BaseException:
            await self._settle()
            self._free_half()
            if key is not None:
                self._free_cipher()
            if log is not None:
                log.close(remove=False)
            raise
        self._start_cleaning()

    def _secret(self) -> Secret | None:
        """Where the passphrase is, if one is needed."""
        method, given = self.header.crypt_method, self.options.encrypt
        name = METHODS.get(method)
        if not method:
            if given is not None:
                raise self._error(f"Image '{self.filename()}' is not encrypted", "not-encrypted")
            return None
        if name != "luks":
            raise self._error(
                f"Image '{self.filename()}' is encrypted with '{name}', which is too weak to be "
                "supported; convert it with qemu-img convert",
                "encrypted",
            )
        if given is None:
            raise self._error(
                f"Image '{self.filename()}' is encrypted: give encrypt.format=luks and "
                "encrypt.key-secret=ID of a secret object",
                "encrypted",
            )
        return self.host.use_object(self, given.key_secret, Secret)

    async def _unlock(self, secret: Secret) -> SecretBytes:
        try:
            self.volume = await open_volume(self.file, self.header)
            self.volume.step = lambda: self.host.working(self)
            _, key = await self.volume.unlock(secret.data)
        except VhostblkError as error:
            raise VhostblkError(
                f"Cannot open node '{self.name}' ({self.filename()}): {error.desc}",
                data=error.data,
            ) from None
        return key

    def _encrypt(self, key: SecretBytes) -> EncryptedStorage:
        assert self.volume is not None
        child = self.child(self.data_role)
        return EncryptedStorage(self.engine, child, self.volume.segment, key)

    async def _begin_log(self, log: LogFile | None, token: int, records: list[Record]) -> None:
        """Enter what a predecessor left behind; from now on the image has this log."""
        self.log = log
        self.token = token
        if records:
            logger.info("image '%s': %d changes of a killed process", self.filename(), len(records))
            # The child nodes are tied to the engine half after open() only.
            self.relink()
            await journal.replay(self, records)
        if log is None:
            if not self.read_only and self.header.autoclear & journal.HAS_LOG:
                # There is one somewhere that will not know of what is written from here on.
                others = self.header.autoclear & ~journal.HAS_LOG
                await self.write_header(autoclear=others)
            return
        log.clear()
        # Another one each time: a log that this opening has not found is worth nothing from now on.
        others = self.header.autoclear & ~journal.HAS_LOG
        await self.write_header(autoclear=others | token)
        log.belongs_to(token.to_bytes(8, "big"))

    async def record(self, claim: Claim) -> None:
        """A change of an L2 entry in memory, about to be seen, is to survive a kill."""
        if self.log is None:
            return
        geometry = self.geometry
        words, at = claim.slice.words, claim.index * geometry.words
        bitmap = 0
        if geometry.extended:
            bitmap = journal.known_of(words[at + 1], claim.units, geometry.units)
        if not self.map.add_to_log(claim.cluster << geometry.cluster_bits, words[at], bitmap):
            await self.writeback.flush()  # puts it on disk, and empties the log

    # ---- the format

    async def _read_header(self) -> Header:
        try:
            return await read_header(self.file)
        except BadImage as error:
            raise self._error(f"Could not open '{self.filename()}': {error.desc}") from None

    async def write_header(self, **changes: int) -> Header:
        """Change fields of the header, durably; all of them, or none. The header as it is then.

        If this fails the disk has the old header or the new one, now or after a power cut. The old
        one stays in force, and is written once more before what only the new one names is reused.
        """
        async with self._header_lock:
            await self._header_again()
            try:
                self.header = await commit_header(self.file, self.header, **changes)
            except BaseException:
                self.doubt_header()
                raise
            return self.header

    def doubt_header(self) -> None:
        """The disk may not have the header that is in force."""
        self._header_unsure = True
        self.map.set_dirty(True)  # the next flush is to come up

    async def settle_header(self) -> None:
        """The disk has the header that is in force, and will have no other."""
        if self._header_unsure:
            async with self._header_lock:
                await self._header_again()

    async def _header_again(self) -> None:
        if self._header_unsure:
            await rewrite_header(self.file, self.header)
            await self.file.flush()
            self._header_unsure = False

    async def _make_writable(self) -> None:
        """What must be done before anything else is written."""
        header = self.header
        if header.corrupt:
            raise self._error(
                f"Image '{self.filename()}' is corrupt; cannot be opened read/write; repair it "
                f"with: qemu-img check -r all '{self.filename()}', or open it with read-only=on",
                "corrupt",
            )
        if header.dirty:
            await self._repair()
        await self.outdate_bitmaps()

    async def outdate_bitmaps(self, *, every: bool = False) -> None:
        """Bitmaps that would have to know of our writes (`every` one) are out of date now."""
        async with self._header_lock:
            self.header = await bitmaps.mark_in_use(
                self.file, self.header, every=every, known=journal.HAS_LOG
            )

    async def _repair(self) -> None:
        """The image was not closed: find out what is used."""
        logger.warning("image '%s' was not closed properly; it is repaired", self.filename())
        try:
            self.header = await repair_dirty(self.file, self.header)
        except BadImage as error:
            raise self._error(
                f"Image '{self.filename()}': {error.desc}; try: "
                f"qemu-img check -r all '{self.filename()}'",
                "dirty",
            ) from None
        self.refcounts = await self._load_refcounts(self.header)

    async def _load_l1(self, header: Header) -> array[int]:
        raw = await self.file.read(header.l1_table_offset, 8 * header.l1_size)
        return words_from(raw)

    async def _load_refcounts(self, header: Header) -> Refcounts:
        counts = Refcounts(self.file, header, self.write_header)
        await counts.load()
        return counts

    async def _where_metadata_are(
        self, header: Header, l1: array[int], refcounts: Refcounts
    ) -> Metadata:
        """Clusters where no guest data can be."""
        found = Metadata()
        if self.options.overlap_check == "none":
            return found
        size = self.geometry.cluster_size
        await found.find(l1, refcounts.table)
        found.add(0, size)
        found.add(header.l1_table_offset, 8 * len(l1))
        found.add(refcounts.table_offset, refcounts.table_clusters * size)
        if header.nb_snapshots:
            found.add(header.snapshots_offset, size)
        return found

    def _new_map(self, log: LogFile | None) -> MapHandle:
        geometry = self.geometry
        return new_map(
            self.engine,
            size=self._size,
            unit_bits=geometry.unit_bits,
            cluster_bits=geometry.cluster_bits,
            table_bits=geometry.table_bits,
            has_backing=self.has_backing,
            backing_size=self.backing_size,
            allocate=self.engine_allocates,
            detect_zeroes=DETECT_ZEROES[self.options.detect_zeroes],
            sink=self._start,
            low=self._low,
            log_half=self._log_is_half_full,
            log=log,
        )

    def _low(self) -> None:
        """The engine is about to run out of clusters; it has allocated some."""
        self.allocator.run_is_low()
        self.l2.apply_log()

    def _log_is_half_full(self) -> None:
        """Before it is full and requests have to wait for a flush."""
        self.l2.apply_log()  # which is all that the engine's own log needs
        if self.log is not None and self._early is None:
            self._early = background(self._flush_early())

    def waiting_records(self) -> int:
        """Records in the map's log of what is not on disk."""
        return 0 if self.log is None else self.map.log_taken() - self.writeback.recorded

    @property
    def map_records(self) -> int:
        """How many there is room for."""
        return 1 if self.log is None else self.log.records

    async def _flush_early(self) -> None:
        try:
            await self.writeback.flush()
        except OSError:
            pass  # it has been logged; the guest's own flush will tell the guest
        finally:
            self._early = None

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

    # ---- what it is

    def describe(self) -> dict[str, Any]:
        image = facts.info(self.header, self._tables)
        described = self._describe(image)
        if self.volume is not None:
            described["encrypted"] = True
            specific = image["format-specific"]["data"]
            specific["encrypt"] = {"format": "luks", **luks.describe(self.volume)}
        described["l2-cache"] = {"slices": len(self.l2), "limit": self.l2.limit}
        return described

    @property
    def allocation_unit(self) -> int:
        return 1 << self.geometry.unit_bits

    @property
    def discard_granularity(self) -> int | None:
        if self.options.discard != "unmap" or (self.geometry.version < 3 and self.has_backing):
            return None
        if not self.data_is_raw:
            return self.geometry.cluster_size
        if self._encrypted is not None:
            return None  # there, zeroes are noise
        return self.child("data-file").node.discard_granularity

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        async for extent in extents.extents(self, offset, length):
            yield extent

    async def check_image(self, patience: float | None) -> dict[str, Any]:
        if not self.read_only and not self.stopped:
            await self.write_everything()
        async with asyncio.timeout(patience):
            return (await check_at_rest(self.file, self.header)).describe()

    def relink(self) -> None:
        for child in self.children.values():
            child.refresh()
        if self.handle is not None:
            data = self.child(self.data_role).node.effective
            if self._encrypted is not None:
                self._encrypted.relink()
                data = self._encrypted.handle
            self.handle.set_child(0, data)
            if "backing" in self.children:
                self.handle.set_child(1, self.child("backing").node.effective)

    async def forget_backing(self) -> None:
        self.refuse_writes()
        await self.writeback.flush()
        await self.file.flush()
        start = await self.file.read(0, 24)
        self._forgotten = (start, self.header.backing_file)
        # Offset and length of the name; one sector, so all of it or nothing.
        await self.file.write(0, start[:8] + bytes(12) + start[20:])
        await self.file.flush()
        self.header = self.header.replace(backing_file=None)

    async def remember_backing(self) -> None:
        start, name = self._forgotten
        self.header = self.header.replace(backing_file=name)
        await self.file.write(0, start)
        await self.file.flush()

    def refuse_writes(self) -> None:
        """Raise if nothing may be written any more."""
        if self.stopped:
            raise OSError(errno.EIO, "the image is corrupt, nothing is written to it")

    # ---- for the parts

    def transfer(self, role: str, request: Request, offset: int, length: int, position: int) -> IO:
        if role == self.data_role and self._encrypted is not None:
            return self._encrypted.transfer(request, offset, length, position)
        return super().transfer(role, request, offset, length, position)

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

    def missing_tables(self) -> int:
        """How many L2 tables what is in memory may need at the next flush."""
        per_table = self.geometry.slices_per_table
        tables = {index // per_table for index in self.l2.indexes()}
        return sum(not self.l1[table] & COPIED for table in tables)

    async def load_slice(self, index: int) -> array[int]:
        """The words of a slice as they are on disk; zeroes if there is no table."""
        table, part = divmod(index, self.geometry.slices_per_table)
        size = self.geometry.slice_bytes
        if self._lost:
            raise OSError(errno.EIO, "the tables of the image could not be read again")
        entry = self.l1[table]
        if not entry:
            return array("Q", bytes(size))
        host = entry & OFFSET_MASK
        if entry & L1_RESERVED or host & (self.geometry.cluster_size - 1):
            raise self.corrupt(f"L1 entry {table} ({entry:#x}) is not a valid offset", fatal=True)
        if host >= self.file.size:
            raise self.corrupt(f"L1 entry {table} points beyond the end of the file", fatal=True)
        with self.reading():
            words = words_from(await self.file.read(host + part * size, size))
        if self._check_slice(words, host + part * size, index) and not self.read_only:
            await self.complete_last_cluster()
        return words

    async def complete_last_cluster(self) -> None:
        """QEMU may end the file inside a cluster, since it writes subclusters one by one.

        The engine, writing there, would make it longer, and nobody here would know of that.
        """
        size = self.geometry.cluster_size
        try:
            await self.file.ensure(-(-self.file.size // size) * size)
        except OSError as error:
            # Where a device ends nothing can be written either.
            logger.debug("the last cluster of '%s' is cut short: %s", self.filename(), error)

    def _check_slice(self, words: array[int], where: int, index: int) -> bool:
        """Refuse entries that lead to where no guest data can be.

        Whether one of them leads to a cluster that the end of the file cuts short.
        """
        try:
            translate(self.geometry, words, self.nothing, True)
        except BrokenEntry as error:
            self._broken_slice(str(error), where, index, error.index)
        if self.geometry.external:
            return False
        step, file_size = self.geometry.words, self.file.size
        end = -(-file_size // self.geometry.cluster_size) * self.geometry.cluster_size
        hosts = {word & OFFSET_MASK for word in words[::step] if not word & COMPRESSED}
        wrong = self.metadata.among(hosts - {0})
        wrong.update(host for host in hosts if host >= end)
        for entry, word in enumerate(words[::step]):
            if word & COMPRESSED:
                offset, _ = self._compressed_range(word)
                if offset >= file_size:
                    text = f"compressed cluster at {offset:#x} lies beyond the end of the file"
                    self._broken_slice(text, where, index, entry)
            elif wrong and word & OFFSET_MASK in wrong:
                host = word & OFFSET_MASK
                what = "beyond the end of the file" if host >= end else "where metadata are"
                self._broken_slice(f"L2 entry {word:#x} points {what}", where, index, entry)
        return end > file_size and end - self.geometry.cluster_size in hosts

    def _broken_slice(self, text: str, where: int, index: int, entry: int) -> NoReturn:
        guest = (index * self.geometry.slice_entries + entry) << self.geometry.cluster_bits
        raise self.corrupt(
            f"{text} (guest offset {guest:#x}, L2 table at {where:#x})",
            offset=guest,
            size=self.geometry.cluster_size,
        )

    def map_entries(self, slice: Slice) -> array[int] | None:
        """What the engine is to know of a slice."""
        if self.stopped:
            return None
        return translate(self.geometry, slice.words, self.nothing, not self.read_only)

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
        await self._flush_below()
        if self.stopped:
            self.l2.apply_log()
            if self.l2.dirty:
                # Nothing on disk names the clusters of what was written last.
                raise OSError(errno.EIO, "the image is corrupt, its tables cannot be written")
            await self.data.flush()
            return
        await self.writeback.flush()

    async def make_durable(self) -> None:
        await self._flush_below()
        await super().make_durable()

    def owe_flush(self) -> bool:
        self.owes_flush = True
        self.map.set_dirty(True)  # so that flushes come up
        return True

    def flush_paid(self) -> None:
        self.owes_flush = False

    async def _flush_below(self) -> None:
        if self.owes_flush:
            backing = self.children.get("backing")
            if backing is not None:
                await backing.flush()
            self.owes_flush = False

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

    def _give_up(self, text: str) -> None:
        """What is in memory may be wrong, and there is nothing else: serve nothing."""
        logger.error("image '%s' (node '%s'): %s", self.filename(), self.name, text)
        data = {"device": "", "node-name": self.name, "msg": text, "fatal": True}
        self.host.emit("BLOCK_IMAGE_CORRUPTED", data)
        self.stopped = self._lost = True
        self.l2.clear()

    async def check_new(self, host: int, length: int) -> None:
        """Raise if metadata are where the reference counts say that clusters are free."""
        if self.options.overlap_check == "none":
            return
        if self.metadata.first(host, length) is not None:
            # A refcount table that has grown leaves its place to others.
            self.metadata = await self._where_metadata_are(self.header, self.l1, self.refcounts)
        wrong = self.metadata.first(host, length)
        if wrong is not None:
            raise self.corrupt(
                f"a cluster that is counted as free holds metadata (at {wrong:#x})",
                offset=wrong,
                size=self.geometry.cluster_size,
                fatal=True,
            )

    async def _mark_corrupt(self) -> None:
        if self.header.version < 3:
            return  # has no bit for it
        try:
            await self.write_header(incompatible=self.header.incompatible | CORRUPT)
        except OSError as error:
            logger.error("image '%s' cannot be marked corrupt: %s", self.filename(), error)

    def _writeback_failed(self, error: OSError) -> None:
        logger.warning("metadata of '%s' could not be written: %s", self.filename(), error)

    # ---- changes

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        self._written_to = bool(perm & (Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE))

    @property
    def pass_discard_request(self) -> bool:
        """Whether what the guest discards is given back to the storage."""
        request = self.options.pass_discard_request
        return self.options.discard == "unmap" if request is None else request

    async def reopen_prepare(self, options: Qcow2Options) -> None:
        check(options)
        if options.read_only and not self.read_only:
            if self._written_to:
                raise self._error(
                    f"Node '{self.name}' cannot be made read-only: it is written to", "in-use"
                )
            # Nobody allocates any more. The file may be read-only before we are.
            await self._finish_writing()
        await super().reopen_prepare(options)

    async def reopen_clean(self) -> None:
        if self.read_only:
            self._retire_log()
        await super().reopen_clean()

    async def reopen_abort(self) -> None:
        await super().reopen_abort()
        if self.log is None or self.read_only or self.stopped:
            return
        if self.header.autoclear & journal.HAS_LOG:
            return
        # Writable after all: what is written from here on is in the log until it is on disk.
        try:
            await self.write_header(autoclear=self.header.autoclear | self.token)
        except OSError as error:
            logger.error(
                "image '%s': %s; until it is opened anew, unflushed writes do not survive kill -9",
                self.filename(),
                error,
            )

    async def expect_writes(self, below: NodeDriver) -> None:
        await super().expect_writes(below)
        if not self.engine_allocates:
            return
        wanted: Iterable[int] = range(_FIRST_SLICES)
        before = None
        if isinstance(below, Qcow2) and below.engine_allocates:
            wanted = {*below.l2.indexes(), *wanted}
            before = below.allocator
        self.allocator.expect_guest_of(before)
        last = (self.geometry.clusters(self._size) - 1) // self.geometry.slice_entries
        for index in itertools.islice(wanted, self.l2.limit // 2):
            if index <= last:
                self.l2.unpin(await self.l2.pin(index))
        try:
            for _ in range(2):
                await self.allocator.more_runs()
        except OSError as error:
            logger.debug("no clusters in advance: %s", error)  # the first write will get the error

    async def become_read_only(self) -> bool:
        if self._written_to or self.read_only or self.stopped:
            return False
        await self._finish_writing()
        self.options = self.options.model_copy(update={"read_only": True})
        self._retire_log()
        return True

    def _retire_log(self) -> None:
        """We are read-only from here on, and everything is on disk."""
        if self.log is not None and not self.header.autoclear & journal.HAS_LOG:
            self.log.retire()

    # ---- to another file

    async def before_move(self) -> None:
        if not self.read_only and not self.stopped:
            await self.write_everything()

    async def move(self, before: Mapping[str, NodeDriver]) -> None:
        await super().move(before)
        if "file" in before:
            await moving.check(self)
            if not (self.read_only or self.stopped) and self._before is None:
                await moving.move(self, before)
            # else nothing is written, or the image was opened there just now

    async def move_back(self) -> None:
        move, self.move_under_way = self.move_under_way, None
        if move is not None:
            await moving.move_back(self, move)

    async def moved(self) -> None:
        move, self.move_under_way = self.move_under_way, None
        if move is not None and move.log is not None:
            move.log.close(remove=True)

    def begin_log(self, log: LogFile | None, token: int, header: Header) -> None:
        """Another log, and the header that names it; nothing is in flight, nor dirty."""
        if log is not self.map.log:
            self.map.set_log(log)
        self.log, self.token, self.header = log, token, header
        self.writeback.begin_log()

    # ---- from read-only to writable (_writable.py)

    async def _quiet(self) -> None:
        if self._cleaner is not None:
            self._cleaner.cancel()
        await self.l2.settle()

    async def _open_again(self) -> None:
        old, self.header = self.header, await self._read_header()
        if not _same_disk(old, self.header):
            raise self._error(
                f"Image '{self.filename()}' is another one than when it was opened; remove node "
                f"'{self.name}' and add it anew",
                "changed",
            )
        with contextlib.suppress(BadImage):  # they are marked as a whole, and stay so
            self._bitmaps = await bitmaps.read_directory(self.file, self.header)
        try:
            await self._open_tables(None)
        except BaseException:
            with contextlib.suppress(OSError, BadImage):
                await bitmaps.still_good(self.file, self.header, self._bitmaps)
            raise

    async def _close_again(self) -> None:
        try:
            await bitmaps.still_good(self.file, self.header, self._bitmaps)
        finally:
            await self._close_tables()

    async def _read_only_again(self) -> None:
        self._start_cleaning()
        try:
            exchange = await self.prepare_exchange(await self._read_header())
        except BaseException as error:
            self._give_up(f"it may have been repaired, and cannot be read again: {error}")
            raise
        exchange()

    async def _free_before(self, before: dict[str, Any]) -> None:
        before["map"].free()
        if before["log"] is not None:
            before["log"].close(remove=False)

    async def truncate(self, size: int) -> None:
        await resize(self, size)
        self._tables = await facts.read_tables(self.file, self.header)  # bitmaps may be out of date

    def set_size(self, size: int) -> None:
        """The disk has another size; nothing is in flight."""
        self._size = size
        self.map.set_size(size, self.backing_size)

    def moved_metadata(self, old: int, new: int, clusters: int) -> None:
        """A table is elsewhere now."""
        self.metadata.remove(old)
        self.metadata.add(new, clusters << self.geometry.cluster_bits)

    async def change_snapshots(self, what: internal.Change, name: str) -> Snapshot:
        """Create, delete or go back to an internal snapshot; inside a drained section."""
        return await internal.change(self, what, name)

    # ---- closing

    async def close(self) -> None:
        if self.handle is None:
            return
        await self._close_tables()
        self._free_cipher()

    async def _close_tables(self) -> None:
        """The opposite of _open_tables(). Must not fail."""
        try:
            await self._quiet()
            if not self.read_only and not self.stopped:
                await self._finish_writing()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        except OSError as error:
            logger.error("image '%s' could not be closed in order: %s", self.filename(), error)
        finally:
            await self._settle()
            self._free_half()
            if self.log is not None:
                self.log.close(remove=not self.header.autoclear & journal.HAS_LOG)

    def _free_half(self) -> None:
        self.handle = None
        self.map.free()

    def _free_cipher(self) -> None:
        if self._encrypted is not None:
            self._encrypted.free()

    async def _settle(self) -> None:
        """Wait for what goes on by itself and asks the engine's half for something."""
        if self._early is not None:
            await self._early
        await self.allocator.settle()

    async def write_everything(self) -> None:
        """All that is in memory to disk; nothing is in flight. The engine's runs are taken back."""
        await self.l2.settle()
        if self._early is not None:
            await self._early
        self.l2.apply_log()
        await self.allocator.settle()
        await self.writeback.flush()
        await self.allocator.settle()
        # Nothing allocates any more: the end of the file may be what was not used.
        unused = await self.allocator.take_back()
        await self.allocator.write_counts()
        await self._shorten(unused)
        await self.file.flush()

    async def prepare_exchange(self, header: Header) -> Callable[[], None]:
        """Read the tables that `header` names; how to put them in force, once it is on disk.

        Nothing is dirty, and nothing in flight.
        """
        tables = await facts.read_tables(self.file, header)
        l1 = await self._load_l1(header)
        refcounts = await self._load_refcounts(header)
        metadata = await self._where_metadata_are(header, l1, refcounts)

        def exchange() -> None:
            self.l2.clear()
            self._decompressed.clear()
            self.header = header
            self._tables = tables
            self._size = header.size
            self.l1, self.l1_offset = l1, header.l1_table_offset
            self.refcounts = refcounts
            self.allocator.adopt(refcounts)
            self.metadata = metadata

        return exchange

    async def _finish_writing(self) -> None:
        """The same, and the image needs no log any more."""
        await self.write_everything()
        if self.header.autoclear & journal.HAS_LOG:
            await self.write_header(autoclear=self.header.autoclear & ~journal.HAS_LOG)

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


def _same_disk(one: Header, other: Header) -> bool:
    """Whether all is the same in two headers of an image but what use of it changes."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in (
            "size",
            "version",
            "cluster_bits",
            "extended_l2",
            "has_data_file",
            "data_file_raw",
            "crypt_method",
            "backing_file",
        )
    )
