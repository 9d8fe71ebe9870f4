# SPDX-License-Identifier: GPL-2.0-or-later
"""A driver for tests: the engine's crypt node with a key given as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vhostblk.engine.crypt import WHOLE, CipherSpec, Half, new_cipher
from vhostblk.nodes._crypt import CryptNode
from vhostblk.nodes.driver import ChildRole, NodeOptions
from vhostblk.schema import BlockdevRef, Size


class RawKeyOptions(NodeOptions):
    """Keys in hexadecimal."""

    file: BlockdevRef
    cipher: str = "aes-xts-plain64"
    key: str
    high_key: str | None = None
    boundary: Size = WHOLE
    sector_size: int = 512
    offset: Size = 0


class RawKey(CryptNode):
    """Encrypts with `key`, from `boundary` on with `high_key`."""

    driver = "raw-key"
    Options = RawKeyOptions
    is_filter = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole()}
    options: RawKeyOptions

    async def open(self) -> None:
        self.halves = [self._half(key) for key in (self.options.key, self.options.high_key)]
        low, high = self.halves
        assert low is not None
        unmap = self.options.discard == "unmap"
        self.start_crypt(low, high, boundary=self.options.boundary, discard=unmap)

    def _half(self, key: str | None) -> Half | None:
        if key is None:
            return None
        options = self.options
        spec = CipherSpec.parse(options.cipher)
        cipher = None
        if key:
            cipher = new_cipher(
                self.engine, spec, bytes.fromhex(key), sector_size=options.sector_size
            )
        return Half(cipher, options.offset)

    async def close(self) -> None:
        await super().close()
        for half in self.halves:
            if half is not None and half.cipher is not None:
                half.cipher.free()

    @property
    def size(self) -> int:
        return self.child("file").size - self.options.offset
