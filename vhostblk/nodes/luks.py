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
from vhostblk.engine.crypt import Cipher, CipherSpec, Half, new_cipher
from vhostblk.image import Extent
from vhostblk.luks.options import CreateOptions
from vhostblk.nodes._crypt import CryptNode
from vhostblk.nodes.driver import ChildRole, CreateHost, NodeOptions, RoleKind
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.objects.secret import Secret
from vhostblk.schema import BlockdevRef, Size, VhostblkError

logger = logging.getLogger(__name__)


class LuksOptions(NodeOptions):
    """Options of luks."""

    key_secret: str
    """Id of the secret object with the passphrase."""
    file: BlockdevRef
    """The node with the encrypted data, and the header before them."""
    header: BlockdevRef | None = None
    """The node with the header, if that is detached."""


class LuksCreateOptions(CreateOptions):
    """Options of blockdev-create for driver luks."""

    driver: Literal["luks"]
    file: BlockdevRef
    """The node to write the volume to."""
    header: BlockdevRef | None = None
    """The node that is to have the header, instead of `file`."""
    size: Size
    """Bytes of the disk."""
    key_secret: str
    """Id of the secret object with the passphrase."""


class Luks(CryptNode):
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
            file = ChildStorage(await opened.enter_async_context(host.image(options.file)))
            header = file
            if options.header is not None:
                header = ChildStorage(await opened.enter_async_context(host.image(options.header)))
            detached = header is not file
            volume = await luks.create(header, secret.data, options, detached=detached)
            # What follows a header may be a hole: noise, once decrypted.
            await file.ensure(volume.segment.offset + options.size)
            await file.flush()

    # ---- life

    async def open(self) -> None:
        secret = self.host.use_object(self, self.options.key_secret, Secret)
        role = "header" if "header" in self.children else "file"
        self._cipher: Cipher | None = None
        try:
            self.volume = await luks.open_volume(ChildStorage(self.child(role)))
            self.volume.step = lambda: self.host.working(self)
            self._segment = self._only_segment()
            self._check_size()
            self._cipher = await self._unlock(secret)
        except VhostblkError as error:
            raise VhostblkError(
                f"Cannot open node '{self.name}' ({self.child(role).node.filename()}): "
                f"{error.desc}",
                data=error.data,
            ) from None
        for damage in self.volume.damage:
            logger.warning("node '%s' (luks): %s", self.name, damage)
        self.start_crypt(self._half, discard=self._discards)

    def _only_segment(self) -> luks.Segment:
        """The disk. One in several parts has a requirement that open_volume() refuses."""
        found = [s for s in self.volume.segments if not any("backup" in f for f in s.flags)]
        if len(found) != 1:
            raise VhostblkError(
                f"LUKS header: a disk of {len(found)} segments is not supported",
                data={"code": "bad-luks-header"},
            )
        return found[0]

    async def _unlock(self, secret: Secret) -> Cipher | None:
        segment = self._segment
        slot, key = await self.volume.unlock(secret.data)
        logger.info("node '%s' (luks): unlocked with key slot %d", self.name, slot)
        with key:
            if not segment.cipher:
                return None
            return new_cipher(
                self.engine,
                CipherSpec.parse(segment.cipher),
                key.view(),
                sector_size=segment.sector_size,
                iv_offset=segment.iv_offset,
            )

    async def close(self) -> None:
        await super().close()
        if self._cipher is not None:
            self._cipher.free()
            self._cipher = None

    # ---- options

    @property
    def _half(self) -> Half:
        return Half(self._cipher, self._segment.offset)

    @property
    def _discards(self) -> bool:
        return self.options.discard == "unmap"

    def _exchange(self) -> None:
        super()._exchange()
        self.set_layout(self._half, discard=self._discards)

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
        there = self.child("file").size
        needed = self._segment.offset + (self._segment.size or 0)
        if there < needed:
            raise VhostblkError(
                f"it ends at {there}, before the encrypted data do, which take up to {needed}: "
                "it has been cut off, or has a detached header",
                data={"code": "bad-luks-header", "node": self.name},
            )

    def children_changed(self) -> None:
        self._check_size()

    async def truncate(self, size: int) -> None:
        if self._segment.size is not None:
            raise VhostblkError(
                f"Cannot resize node '{self.name}': its LUKS header gives a fixed size",
                data={"code": "fixed-size", "node": self.name},
            )
        await self.child("file").node.truncate(size + self._segment.offset)
