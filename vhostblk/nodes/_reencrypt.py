# SPDX-License-Identifier: GPL-2.0-or-later
"""An encrypted disk that gets another key, or its first one, while it is used.

What the header says is in vhostblk/luks/reencryption.py, how zones move from one side of the
boundary to the other in _crypt.py and _zone_log.py; this is what begins and ends it. The
job is vhostblk/jobs/luks_reencrypt.py.

Order: the key slots of the new key and the log are on disk before the header says, in one change,
that they exist and that re-encryption has begun. It says that it is over when no zone is left, and
only then are old key slots destroyed. A crash anywhere leaves a header that says how to read every
zone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence

from vhostblk import luks
from vhostblk.engine.crypt import WHOLE, Cipher, CipherSpec, Half, new_cipher
from vhostblk.luks import reencryption
from vhostblk.luks.luks2 import REENCRYPTION
from vhostblk.luks.reencryption import Reencryption
from vhostblk.nodes._chain import images_behind
from vhostblk.nodes._crypt import CryptNode
from vhostblk.nodes._zone_log import ZoneLog
from vhostblk.nodes.driver import NodeDriver
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.schema import VhostblkError
from vhostblk.secret import SecretBytes

REQUIREMENTS = frozenset({REENCRYPTION})


class ReencryptingNode(CryptNode):
    """A node with a LUKS header."""

    volume: luks.Volume
    log: ZoneLog | None = None
    """How far it is, while it is being re-encrypted."""
    preparing = False
    """The header is about to say that it is being re-encrypted."""
    _begun: tuple[ZoneLog, Half] | None = None
    """What the header says already, and the engine half does not know yet."""

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

    async def check_opens_all(self, passphrase: SecretBytes) -> None:
        """Whether it is one that the node can be opened with: half way there are two keys."""
        for segment in self.volume.segments:
            if segment.cipher:
                _, key = await self.volume.unlock(passphrase, digest=segment.digest)
                key.close()

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

    def check_reencryption(self, force: bool) -> None:
        """Refuse to begin one that cannot be, or after which images cannot be read that can be now.

        `force`: somebody has seen to those images.
        """
        if not isinstance(self.volume, luks.Luks2):
            raise VhostblkError(
                f"Node '{self.name}' has a LUKS1 header, which cannot say how far a re-encryption "
                "is; luks-convert ('vhostblk luks convert') makes it LUKS2, which QEMU cannot open",
                data={"code": "luks-version", "node": self.name},
            )
        header = self.children.get("header")
        if header is None or force:
            return
        behind = [node.name for node in images_behind(self.child("file").node)]
        if behind:
            raise VhostblkError(
                f"Node '{self.name}' has a detached header ('{header.node.name}'), and there are "
                f"images below that only the old key opens: {', '.join(behind)}. If they are of "
                "use, copy the header first, for them; then 'force'",
                data={"code": "snapshots-need-header", "node": self.name, "images": behind},
            )

    def check_snapshot(self, covered: Collection[NodeDriver]) -> None:
        header = self.children.get("header")
        busy = self.preparing or self._begun is not None or self.log is not None
        if header is None or not busy:
            return  # each image has its own, or any header of this key will do
        below = [header.node]
        for node in below:  # grows while it is walked
            if node in covered:
                return
            below += [child.node for child in node.children.values()]
        raise VhostblkError(
            f"Node '{self.name}' is being re-encrypted: an image of its disk can only be read "
            f"with its detached header as of the same moment. Cover '{header.node.name}' as well, "
            "in one transaction, or wait for the end of luks-reencrypt",
            data={"code": "luks-busy", "node": self.name, "header": header.node.name},
        )

    async def prepare_reencryption(
        self, passphrases: Sequence[SecretBytes], kdf: luks.KdfOptions | None = None
    ) -> None:
        """Write down that there is a new key, with a slot for each passphrase; no zone has it yet.

        The first passphrase is the node's own. Takes seconds; then call begin_reencryption().
        """
        if self._begun is not None:
            return
        volume = self.volume
        assert isinstance(volume, luks.Luks2)
        async with volume.changing:
            # What it is opened with at the next start has to open both keys.
            await self._check_opens(volume, passphrases[0])
            reencryption.place_for_log(volume)  # is there room?
            with luks.random_key(volume.key_size) as key:
                before = volume.metadata
                try:
                    found = await self._write_down(volume, key, passphrases, kdf)
                except BaseException:
                    with contextlib.suppress(VhostblkError, OSError):
                        async with self.host.working(self):
                            await volume.write_metadata(before)
                    raise
                log = self._log_of(found)
                await log.load()
                self._begun = log, self._half_with(found.after, key)

    async def _check_opens(self, volume: luks.Luks2, passphrase: SecretBytes) -> None:
        try:
            await volume.test(passphrase)
        except VhostblkError as error:
            raise VhostblkError(
                f"The secret of node '{self.name}' does not open its header any more, and would be "
                f"what opens it in future ({error.desc}); give the node the one that does, with "
                "blockdev-reopen and another 'key-secret'",
                data={"code": "stale-secret", "node": self.name},
            ) from None

    async def _write_down(
        self,
        volume: luks.Luks2,
        key: SecretBytes,
        passphrases: Sequence[SecretBytes],
        kdf: luks.KdfOptions | None,
    ) -> Reencryption:
        digest = await asyncio.to_thread(luks.new_digest, key)
        draft = volume.draft()
        draft.step = volume.step
        metadata = draft.metadata
        number = next(str(n) for n in range(32) if str(n) not in metadata["digests"])
        metadata["digests"][number] = digest
        async with draft.changing:
            await draft.write_metadata(metadata)
            for passphrase in passphrases:
                await draft.insert_slot(key, passphrase, None, kdf, number)
        log, run = reencryption.place_for_log(draft), reencryption.new_run()
        async with self.host.working(self):
            await ZoneLog(self.header, *log, run).create()
            await volume.write_metadata(reencryption.begun(draft.metadata, number, run, log))
        found = reencryption.find(volume)
        assert found is not None
        return found

    def begin_reencryption(self) -> None:
        """From now on zones can be moved. Nothing is in flight."""
        assert self._begun is not None
        log, low = self._begun
        self.set_layout(low, self._halves[1], boundary=0, discard=self.discards)
        self.log, self._begun = log, None

    @property
    def is_reencrypted(self) -> bool:
        """Whether all of the disk has the new key."""
        return self.boundary >= self.size

    async def finish_reencryption(self) -> None:
        """The header says that there is one key only. Nothing is in flight."""
        volume = self.volume
        assert isinstance(volume, luks.Luks2)
        before = volume.metadata
        async with volume.changing:
            try:
                await volume.write_metadata(reencryption.finished(volume.metadata))
            except BaseException:
                # It may be on the disk all the same, which may grow before the next try.
                with contextlib.suppress(VhostblkError, OSError):
                    await volume.write_metadata(before)
                raise
        low, _ = self._halves
        self.set_layout(low, boundary=WHOLE, discard=self.discards)
        self._free_ciphers(keep=low.cipher)
        self.log = None
        kept = volume.metadata["keyslots"]
        self._leftover = [
            (int(slot["area"]["offset"]), int(slot["area"]["size"]))
            for number, slot in before["keyslots"].items()
            if number not in kept
        ]

    async def destroy_old_slots(self) -> None:
        """The key slots of the old key, which no header knows any more."""
        assert isinstance(self.volume, luks.Luks2)
        await self.volume.destroy_leftovers(self._leftover)
