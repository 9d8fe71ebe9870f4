# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 with LUKS inside: the clusters with guest data are encrypted, the metadata are not.

A header extension ("Full disk encryption header pointer", docs/interop/qcow2.txt) says where in
the image the LUKS header is. IVs are made from the place in the file that holds the data, not from
the guest's offset: so the engine's crypt node lies between the map and the file, and sees nothing
but host offsets.

New clusters are Python's business in such an image: the engine would count on the rest of a new
cluster reading as zeroes, and what is nothing but zeroes on disk is noise, once decrypted.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

from vhostblk import luks
from vhostblk.engine import IO, OP_READ, OP_WRITE, OP_WRITE_ZEROES, Engine
from vhostblk.engine.crypt import CipherSpec, Half, new_cipher, new_crypt
from vhostblk.nodes.driver import Child
from vhostblk.nodes.hooks import Request
from vhostblk.nodes.qcow2.header import EXT_ENCRYPTION, Header
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.schema import VhostblkError
from vhostblk.secret import SecretBytes

METHODS = {1: "aes", 2: "luks"}
"""What the header calls them; the first, weak one is not supported (QEMU only converts it)."""


class Window:
    """The part of the image that has the LUKS header."""

    def __init__(self, file: ChildStorage, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self.size = size

    async def read(self, offset: int, length: int) -> bytes:
        """See luks.Storage."""
        return await self._file.read(self._offset + offset, length)

    async def write(self, offset: int, data: bytes) -> None:
        """See luks.Storage."""
        if offset + len(data) > self.size:
            raise VhostblkError(
                f"the LUKS header does not fit into the {self.size} bytes it has in the image",
                data={"code": "luks-slots"},
            )
        await self._file.write(self._offset + offset, data)

    async def flush(self) -> None:
        """See luks.Storage."""
        await self._file.flush()


async def open_volume(file: ChildStorage, header: Header) -> luks.Volume:
    """The LUKS header of an image."""
    extension = header.extension(EXT_ENCRYPTION)
    if extension is None or len(extension) < 16:
        raise VhostblkError(
            "the image has no pointer to its encryption header", data={"code": "bad-luks-header"}
        )
    offset, size = struct.unpack_from(">QQ", extension)
    if offset % header.cluster_size or not 0 < size <= 64 << 20 or offset + size > file.size:
        raise VhostblkError(
            f"the encryption header ({size} bytes at {offset}) is not inside the image",
            data={"code": "bad-luks-header"},
        )
    return await luks.open_volume(Window(file, offset, size))


class _Memory:
    """A header in the making."""

    def __init__(self) -> None:
        self.content = bytearray()

    @property
    def size(self) -> int:
        return len(self.content)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        self.content.extend(bytes(max(0, offset + len(data) - len(self.content))))
        self.content[offset : offset + len(data)] = data

    async def flush(self) -> None:
        pass


async def new_luks_header(options: luks.CreateOptions, passphrase: SecretBytes) -> bytes:
    """A LUKS header for a new image: all of the place that it has there."""
    memory = _Memory()
    volume = await luks.create(memory, passphrase, options)
    # QEMU checks that the data that the header speaks of come after it, wherever they are.
    return bytes(memory.content).ljust(volume.segment.offset, b"\0")


class EncryptedStorage(ChildStorage):
    """Guest data in clusters, by host offset; encrypted below."""

    def __init__(
        self, engine: Engine, child: Child, segment: luks.Segment, key: SecretBytes
    ) -> None:
        super().__init__(child)
        self._engine = engine
        spec = CipherSpec.parse(segment.cipher)
        self._cipher = new_cipher(engine, spec, key.view(), sector_size=segment.sector_size)
        try:
            self.handle = new_crypt(engine, _never, Half(self._cipher, 0))
        except BaseException:
            self._cipher.free()
            raise

    def free(self) -> None:
        """Nothing is in flight."""
        self.handle.free()
        self._cipher.free()

    def relink(self) -> None:
        """The child is another node now."""
        self.handle.set_child(0, self.child.node.effective)

    def transfer(self, request: Request, offset: int, length: int, position: int) -> IO:
        """Read into a guest's memory, `position` bytes from its beginning."""
        self.child.check_range(offset, length)
        return request.submit_part(self.handle, OP_READ, offset, length, position)

    async def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    async def read_into(self, offset: int, into: memoryview) -> None:
        there = max(0, min(len(into), self.child.size - offset))
        if there:
            await self._submit(OP_READ, offset, into[:there], there)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self.ensure(offset + len(data))
        await self._submit(OP_WRITE, offset, data, len(data))

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.ensure(offset + length)
        await self._submit(OP_WRITE_ZEROES, offset, None, length)

    def _submit(self, op: int, offset: int, buffer: Any, length: int) -> IO:
        self.child.check_range(offset, length)
        return self._engine.submit(self.handle, op, offset, buffer, length)


def _never(*_: int) -> NoReturn:
    """Sectors are as small as requests can be, and nothing is ever held here."""
    raise AssertionError("the crypt node of a qcow2 image has handed up a request")
