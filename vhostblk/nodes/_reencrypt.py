# SPDX-License-Identifier: GPL-2.0-or-later
"""An encrypted disk that gets another key, or its first one, while it is used.

What the header says is in vhostblk/luks/reencryption.py, how zones move from one side of the
boundary to the other in _crypt.py and _zone_log.py; this is what begins and ends it. The
job is vhostblk/jobs/luks_reencrypt.py.

Order: the new key has its key slots before the header says that it will be used; the log is on
disk before that, too. The header says it is over when no zone is left, and only then are old key
slots destroyed. A crash anywhere leaves a header that says how to read every zone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from vhostblk import luks
from vhostblk.engine.crypt import WHOLE, Cipher, CipherSpec, Half, new_cipher
from vhostblk.luks import reencryption
from vhostblk.luks.luks2 import REENCRYPTION
from vhostblk.luks.reencryption import Reencryption
from vhostblk.nodes._crypt import CryptNode
from vhostblk.nodes._zone_log import ZoneLog
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.schema import VhostblkError
from vhostblk.secret import SecretBytes

REQUIREMENTS = frozenset({REENCRYPTION})


class ReencryptingNode(CryptNode):
    """A node with a LUKS header."""

    volume: luks.Volume
    log: ZoneLog | None = None
    """How far it is, while it is being re-encrypted."""

    def _prepare_ciphers(self) -> None:
        self._ciphers: list[Cipher] = []

    def _free_ciphers(self, keep: Cipher | None = None) -> None:
        for cipher in self._ciphers:
            if cipher is not keep:
                cipher.free()
        self._ciphers = [] if keep is None else [keep]

    @property
    def header(self) -> ChildStorage:
        """Where the header is."""
        return ChildStorage(self.child("header" if "header" in self.children else "file"))

    @property
    def discards(self) -> bool:
        """Whether discards go down."""
        raise NotImplementedError

    # ---- opening

    async def open_crypt(self, passphrase: SecretBytes) -> None:
        """Make the engine half, as the header says."""
        found = reencryption.find(self.volume) if isinstance(self.volume, luks.Luks2) else None
        segment = self.volume.segment
        high = await self._half_of(segment, passphrase)
        if found is None:
            self.start_crypt(high, discard=self.discards)
            return
        low = await self._half_of(found.after, passphrase)
        self.log = self._log_of(found)
        boundary = await self.recover(self.log, low)
        self.start_crypt(low, high, boundary=boundary, discard=self.discards)

    async def _half_of(self, segment: luks.Segment, passphrase: SecretBytes) -> Half:
        if not segment.cipher:
            return Half(None, segment.offset)
        _, key = await self.volume.unlock(passphrase, digest=segment.digest)
        with key:
            return self._half_with(segment, key)

    def _half_with(self, segment: luks.Segment, key: SecretBytes) -> Half:
        cipher = new_cipher(
            self.engine,
            CipherSpec.parse(segment.cipher),
            key.view(),
            sector_size=segment.sector_size,
            iv_offset=segment.iv_offset,
        )
        self._ciphers.append(cipher)
        return Half(cipher, segment.offset)

    def _log_of(self, found: Reencryption) -> ZoneLog:
        return ZoneLog(self.header, found.log_offset, found.log_size, found.run)

    def set_as_it_is(self) -> None:
        """Options may have changed. Nothing is in flight."""
        low, high = self._halves
        self.set_layout(low, high, boundary=self.boundary, discard=self.discards)

    # ---- re-encryption

    async def prepare_reencryption(
        self, passphrases: Sequence[SecretBytes], kdf: luks.KdfOptions | None = None
    ) -> tuple[Half, Half]:
        """Write down that there is a new key, with a slot for each passphrase; no zone has it yet.

        Takes seconds. Use the halves, with a boundary at 0, while nothing is in flight.
        """
        volume = self.volume
        if not isinstance(volume, luks.Luks2):
            raise VhostblkError(
                f"Node '{self.name}' has a LUKS1 header, which cannot say how far a re-encryption "
                "is; 'cryptsetup convert --type luks2' makes it LUKS2",
                data={"code": "luks-version", "node": self.name},
            )
        reencryption.place_for_log(volume)  # is there room?
        with luks.random_key(volume.key_size) as key:
            digest = await asyncio.to_thread(luks.new_digest, key)
            before = volume.metadata
            number = await self._add_digest(volume, digest)
            try:
                for passphrase in passphrases:
                    await volume.add_slot(key, passphrase, None, kdf, digest=number)
                log = reencryption.place_for_log(volume)
                run = reencryption.new_run()
                await ZoneLog(self.header, *log, run).create()
                begun = reencryption.begun(volume.metadata, number, run, log)
                await volume.write_metadata(begun)
            except BaseException:
                with contextlib.suppress(VhostblkError, OSError):
                    await volume.write_metadata(before)
                raise
            found = reencryption.find(volume)
            assert found is not None
            self.log = self._log_of(found)
            await self.log.load()
            return self._half_with(found.after, key), self._halves[1]

    async def _add_digest(self, volume: luks.Luks2, digest: dict[str, object]) -> str:
        metadata = volume.metadata
        number = next(str(n) for n in range(32) if str(n) not in metadata["digests"])
        metadata["digests"][number] = digest
        await volume.write_metadata(metadata)
        return number

    @property
    def is_reencrypted(self) -> bool:
        """Whether all of the disk has the new key."""
        return self.boundary >= self.size

    async def finish_reencryption(self) -> None:
        """The header says that there is one key only. Nothing is in flight."""
        volume = self.volume
        assert isinstance(volume, luks.Luks2)
        old = volume.metadata["keyslots"]
        await volume.write_metadata(reencryption.finished(volume.metadata))
        low, _ = self._halves
        self.set_layout(low, boundary=WHOLE, discard=self.discards)
        self._free_ciphers(keep=low.cipher)
        self.log = None
        kept = volume.metadata["keyslots"]
        self._leftover = [slot["area"] for number, slot in old.items() if number not in kept]

    async def destroy_old_slots(self) -> None:
        """The key slots of the old key, which no header knows any more."""
        assert isinstance(self.volume, luks.Luks2)
        for area in self._leftover:
            await self.volume.destroy_area(int(area["offset"]), int(area["size"]))
