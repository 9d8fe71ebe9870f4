# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a new LUKS header.

What was there is overwritten with zeroes first, so that no older header, nor a second copy of one,
comes to life again; then key material is written, and last the header that gives it meaning. A
crash in between leaves something that is no LUKS volume at all.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

from vhostblk.luks import binary2, hashes, kdf, luks1, luks2
from vhostblk.luks.choices import check, cipher_of, kdf_of
from vhostblk.luks.ciphers import CipherSpec
from vhostblk.luks.errors import bad_option, no_slot
from vhostblk.luks.kdf import Kdf, Limits
from vhostblk.luks.luks1 import Luks1
from vhostblk.luks.luks2 import Luks2
from vhostblk.luks.options import CreateOptions
from vhostblk.luks.slots import Digest, Slot, material_size, random_key
from vhostblk.luks.storage import Storage, write_zeroes
from vhostblk.luks.volume import Volume
from vhostblk.secret import SecretBytes
from vhostblk.secret.memory import Buffer

MIB = 1 << 20
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


async def create(
    storage: Storage,
    passphrase: Buffer | SecretBytes,
    options: CreateOptions,
    *,
    detached: bool = False,
    key: SecretBytes | None = None,
    pending: bool = False,
) -> Volume:
    """Write a header whose first key slot is for `passphrase`.

    The data start at the offset of the volume's segment: behind the header, or at 0 of another
    storage if it is detached. `key` is the volume key, a random one if there is none. With
    `pending` the header says that nothing of the disk has been encrypted yet (reencryption.py).
    """
    check(options)
    if options.uuid is not None and not _UUID.match(options.uuid):
        raise bad_option("uuid", f"'{options.uuid}' is not a UUID")
    words = passphrase.view() if isinstance(passphrase, SecretBytes) else memoryview(passphrase)
    if not len(words):
        raise no_slot("the passphrase is empty")
    spec, key_size = cipher_of(options)
    if key is not None and len(key) != key_size:
        raise bad_option("cipher-alg", f"its key has {key_size} bytes, not {len(key)}")
    if pending and (options.version == "luks1" or not detached):
        raise bad_option("in-place", "it needs version=luks2 and a detached header")
    own = key or random_key(key_size)
    try:
        if options.version == "luks1":
            return await _create1(storage, words, options, detached, own, spec)
        return await _create2(storage, words, options, detached, own, spec, pending)
    finally:
        if key is None:
            own.close()


async def _create1(
    storage: Storage,
    passphrase: memoryview,
    options: CreateOptions,
    detached: bool,
    key: SecretBytes,
    spec: CipherSpec,
) -> Volume:
    end = luks1.area_end(len(key))
    payload = _payload(options, end, detached, 512)
    hash = options.hash_alg

    def work() -> tuple[luks1.Header, Slot, bytes]:
        digest = _digest(key, hash, luks1.DIGEST_SIZE)
        header = luks1.empty(spec, hash, len(key), payload, digest, options.uuid)
        made = kdf_of(options, 1, hash, len(key))
        made.check(Limits(), "the new key slot")
        slot = Luks1(storage, Limits(), header).new_slot(None, len(key), "0", made)
        return header, slot, slot.seal(passphrase, key)

    header, slot, material = await kdf.in_thread(work)
    await write_zeroes(storage, 0, end)
    await storage.flush()
    await storage.write(slot.area_offset, material)
    await storage.flush()
    slots = (
        replace(header.slots[0], active=True, salt=slot.kdf.salt, iterations=slot.kdf.iterations),
        *header.slots[1:],
    )
    header = replace(header, slots=slots)
    await storage.write(0, header.pack().ljust(luks1.ALIGN, b"\0"))
    await storage.flush()
    return Luks1(storage, Limits(), header)


async def _create2(
    storage: Storage,
    passphrase: memoryview,
    options: CreateOptions,
    detached: bool,
    key: SecretBytes,
    spec: CipherSpec,
    pending: bool,
) -> Volume:
    if options.metadata_size not in binary2.SIZES:
        sizes = ", ".join(str(size) for size in binary2.SIZES)
        raise bad_option("metadata-size", f"it is one of {sizes}")
    before = options.data_offset if not detached else None
    area = options.keyslots_size
    if area is None:
        area = luks2.default_keyslots_size(options.metadata_size, before or None)
    needed = -(-material_size(len(key)) // luks2.ALIGN) * luks2.ALIGN
    if area % luks2.ALIGN or not needed <= area <= luks2.LARGEST_AREA:
        raise bad_option(
            "keyslots-size", f"{area} is not a multiple of {luks2.ALIGN} from {needed} to "
            f"{luks2.LARGEST_AREA}",
        )  # fmt: skip
    end = 2 * options.metadata_size + area
    payload = _payload(options, end, detached, options.sector_size)

    def work() -> tuple[binary2.Binary, dict[str, Any], Slot, bytes]:
        length = hashes.digest_size(options.hash_alg)
        binary, metadata = luks2.empty(
            options, spec, payload, area, _digest(key, options.hash_alg, length)
        )
        made = kdf_of(options, 2, options.hash_alg, len(key))
        made.check(Limits(), "the new key slot")
        slot = Slot(
            0, made, len(key), 2 * options.metadata_size, spec.text, len(key), options.hash_alg, "0"
        )
        return binary, luks2.with_slot(metadata, slot), slot, slot.seal(passphrase, key)

    binary, metadata, slot, material = await kdf.in_thread(work)
    await write_zeroes(storage, 0, end)
    await storage.flush()
    await storage.write(slot.area_offset, material)
    if pending:
        metadata = await _pending(storage, binary, metadata)
    await storage.flush()
    copy = await binary2.write(storage, binary, metadata)
    return Luks2(storage, Limits(), binary2.Found(copy))


async def _pending(
    storage: Storage, binary: binary2.Binary, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The metadata for a disk that is not encrypted yet; the log of how far it is, on disk."""
    from vhostblk.luks import reencryption
    from vhostblk.nodes._zone_log import ZoneLog

    made = Luks2(storage, Limits(), binary2.Found(binary2.Copy(binary, metadata)))
    log, run = reencryption.place_for_log(made), reencryption.new_run()
    await ZoneLog(storage, *log, run).create()
    return reencryption.pending(metadata, run, log)


def _payload(options: CreateOptions, end: int, detached: bool, sector_size: int) -> int:
    """Where the data start."""
    given = options.data_offset
    if given is None:
        return 0 if detached else -(-end // MIB) * MIB
    if given % max(sector_size, 512):
        raise bad_option("data-offset", f"{given} is not a multiple of {max(sector_size, 512)}")
    if not detached and given < end:
        raise bad_option("data-offset", f"the header needs {end} bytes")
    return given


def _digest(key: SecretBytes, hash: str, length: int) -> Digest:
    count = kdf.pbkdf2_for(hash, luks2.DIGEST_MILLISECONDS, length)
    return Digest.of(key, Kdf(kdf.PBKDF2, os.urandom(32), hash=hash, iterations=count), length)
