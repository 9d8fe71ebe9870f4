# SPDX-License-Identifier: GPL-2.0-or-later
"""luks: a disk that is encrypted below, with a LUKS1 or LUKS2 header.

The header (vhostblk/luks) says where the data begin and what they are encrypted with; the
passphrase that opens one of its key slots is in a `secret` object. From then on the engine encrypts
and decrypts by itself (nodes/_crypt.py, cffi_build/engine/nodes/crypt.c). With `header` the header
is a node of its own and `file` has nothing but data.

Zero writes are written encrypted, and discards only go down with discard=unmap: where the storage
has nothing, anybody who can read it sees that nothing is there. See docs/luks.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, Literal

from vhostblk import luks
from vhostblk.image import Extent
from vhostblk.luks.options import CreateOptions
from vhostblk.nodes._reencrypt import REQUIREMENTS, ReencryptingNode
from vhostblk.nodes.driver import ChildRole, CreateHost, NodeOptions, Perm, RoleKind
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.objects.secret import Secret
from vhostblk.schema import BlockdevRef, OnOff, Size, UInt32, VhostblkError

logger = logging.getLogger(__name__)


class LuksOptions(NodeOptions):
    """Options of luks."""

    key_secret: str
    """Id of the secret object with the passphrase."""
    file: BlockdevRef
    """The node with the encrypted data, and the header before them."""
    header: BlockdevRef | None = None
    """The node with the header, if that is detached."""
    max_memory: Size | None = None
    """What the header may ask for at most when a passphrase is tried (Argon2); 1 GiB if absent."""
    max_iterations: UInt32 | None = None
    """The same for the iterations of PBKDF2; 100000000 if absent."""


class LuksCreateOptions(CreateOptions):
    """Options of blockdev-create for driver luks."""

    driver: Literal["luks"]
    file: BlockdevRef
    """The node to write the volume to."""
    header: BlockdevRef | None = None
    """The node that is to have the header, instead of `file`."""
    in_place: OnOff = False
    """Make `header` only, for what `file` has now, which luks-reencrypt is going to encrypt."""
    size: Size
    """Bytes of the disk."""
    key_secret: str
    """Id of the secret object with the passphrase."""


class Luks(ReencryptingNode):
    """A disk encrypted with LUKS."""

    driver = "luks"
    Options = LuksOptions
    options: LuksOptions
    CreateOptions = LuksCreateOptions
    is_filter = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole(RoleKind.STORAGE),
        "header": ChildRole(RoleKind.METADATA, optional=True),
    }

    reopenable = ReencryptingNode.reopenable | {"key-secret"}

    # ---- creating

    @classmethod
    async def create(cls, host: CreateHost, options: LuksCreateOptions) -> None:
        if options.size % options.sector_size:
            raise VhostblkError(
                f"The size ({options.size}) must be a multiple of sector-size "
                f"({options.sector_size})",
                data={"code": "bad-value", "parameter": "size"},
            )
        async with contextlib.AsyncExitStack() as opened:
            secret = opened.enter_context(host.using(options.key_secret, Secret))
            if options.in_place:
                await cls._create_in_place(host, options, secret)
                return
            file = ChildStorage(await opened.enter_async_context(host.image(options.file)))
            header = file
            if options.header is not None:
                header = ChildStorage(await opened.enter_async_context(host.image(options.header)))
            detached = header is not file
            volume = await luks.create(header, secret.data, options, detached=detached)
            # What follows a header may be a hole: noise, once decrypted.
            await file.ensure(volume.segment.offset + options.size)
            await file.flush()

    @staticmethod
    async def _create_in_place(
        host: CreateHost, options: LuksCreateOptions, secret: Secret
    ) -> None:
        """The header alone: a guest may be using the disk."""
        if options.header is None:
            raise VhostblkError(
                "Parameter 'header' is missing: a disk that is encrypted in place has no room for "
                "a header",
                data={"code": "missing-parameter", "parameter": "header"},
            )
        async with host.image(options.header) as child:
            storage = ChildStorage(child)
            await luks.create(storage, secret.data, options, detached=True, pending=True)

    # ---- life

    async def open(self) -> None:
        self.secret = self.host.use_object(self, self.options.key_secret, Secret)
        self._detached = "header" in self.children
        role = "header" if self._detached else "file"
        self._prepare_ciphers()
        try:
            limits = luks.Limits.raised(self.options.max_memory, self.options.max_iterations)
            self.volume = await luks.open_volume(self.header, limits, REQUIREMENTS)
            self.volume.step = lambda: self.host.working(self)
            self._segment = self._only_segment()
            self._check_size()
            await self.open_crypt(self.secret.data)
        except BaseException as error:
            self._free_ciphers()
            if not isinstance(error, VhostblkError):
                raise
            raise VhostblkError(
                f"Cannot open node '{self.name}' ({self.child(role).node.filename()}): "
                f"{error.desc}",
                data=error.data,
            ) from None
        for damage in self.volume.damage:
            logger.warning("node '%s' (luks): %s", self.name, damage)

    def _only_segment(self) -> luks.Segment:
        """The disk. One in several parts has a requirement that open_volume() refuses."""
        found = [segment for segment in self.volume.segments if not segment.is_backup]
        if len(found) != 1:
            raise VhostblkError(
                f"LUKS header: a disk of {len(found)} segments is not supported",
                data={"code": "bad-luks-header"},
            )
        return found[0]

    async def close(self) -> None:
        await super().close()
        self._free_ciphers()

    # ---- options

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if role is self.child_roles["file"] and "header" in self.children:
            # Nothing of ours is in there: it is written when the disk is, and the node can be
            # inserted above a disk in use, which is then encrypted.
            return perm | Perm.CONSISTENT_READ, shared
        return super().child_permissions(role, perm, shared)

    @property
    def discards(self) -> bool:
        return self.options.discard == "unmap"

    async def reopen_prepare(self, options: LuksOptions) -> None:
        if isinstance(options.header, str) and self._detached:
            current = self.child("header").node.name
            if options.header != current:
                raise self._header_stays(f"it is '{current}'")
        await super().reopen_prepare(options)
        if options.key_secret == self.options.key_secret:
            return
        secret = self.host.use_object(self, options.key_secret, Secret)
        try:
            # The disk goes on as it is; but it is what the next start has.
            await self.check_opens_all(secret.data)
        except BaseException:
            self.host.release_object(self, secret)
            raise
        self.prepared["secret"] = secret

    def _exchange(self) -> None:
        super()._exchange()
        self.set_as_it_is()

    async def reopen_dispose(self, attributes: dict[str, Any]) -> None:
        await super().reopen_dispose(attributes)
        if "secret" in attributes:
            self.host.release_object(self, attributes["secret"])

    # ---- what it is

    @property
    def is_format(self) -> bool:
        # Its size follows that of its file.
        return False

    @property
    def size(self) -> int:
        if self._segment.size is not None:
            return self._segment.size
        size = max(0, self.child("file").size - self._segment.offset)
        return size // self._segment.sector_size * self._segment.sector_size

    def data_shift(self) -> int:
        return self._segment.offset

    def filename(self) -> str:
        return self.child("file").node.filename()

    def describe(self) -> dict[str, Any]:
        return {
            "encrypted": True,
            "image": {
                "filename": self.filename(),
                "format": "luks",
                "virtual-size": self.size,
                "encrypted": True,
                "format-specific": {"type": "luks", "data": luks.describe(self.volume)},
            },
        }

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """All of it is data: what reads as zeroes below is noise here."""
        yield Extent(offset, length, offset=offset + self._segment.offset, filename=self.filename())

    # ---- size

    def _check_size(self) -> None:
        if not self._detached and self._segment.offset < self.volume.header_end:
            # A guest would overwrite it, and with it all that it opens.
            raise VhostblkError(
                f"its data begin at {self._segment.offset}, and the header takes up to "
                f"{self.volume.header_end}: it is a detached header; 'file' is the node with the "
                "data, and this one 'header'",
                data={"code": "bad-luks-header", "node": self.name},
            )
        there = self.child("file").size
        needed = self._segment.offset + (self._segment.size or 0)
        if there < needed:
            raise VhostblkError(
                f"it ends at {there}, before the encrypted data do, which take up to {needed}: "
                "it has been cut off, or has a detached header",
                data={"code": "bad-luks-header", "node": self.name},
            )

        self._check_sectors(there - self._segment.offset)

    def _check_sectors(self, size: int) -> None:
        """A disk that is being encrypted for the first time must not end in part of a sector."""
        sector = max(segment.sector_size for segment in self.volume.segments)
        if not self._segment.cipher and size % sector:
            raise VhostblkError(
                f"a disk of {size} bytes cannot be encrypted with sectors of {sector}: the header "
                "has to have another sector-size, or the disk another size",
                data={"code": "bad-luks-header", "node": self.name},
            )

    def children_changed(self) -> None:
        if ("header" in self.children) is not self._detached:
            raise self._header_stays(
                "detached" if self._detached else f"inside '{self.filename()}'"
            )
        self._check_size()

    def _header_stays(self, where: str) -> VhostblkError:
        """What is known of the header would be written to where that is not."""
        return VhostblkError(
            f"The header of node '{self.name}' cannot be exchanged ({where}): delete the node, and "
            "add it again with the other one",
            data={"code": "cannot-change", "node": self.name, "parameter": "header"},
        )

    async def truncate(self, size: int) -> None:
        self._check_sectors(size)
        if self._segment.size is not None:
            raise VhostblkError(
                f"Cannot resize node '{self.name}': its LUKS header gives a fixed size",
                data={"code": "fixed-size", "node": self.name},
            )
        await self.child("file").node.truncate(size + self._segment.offset)
