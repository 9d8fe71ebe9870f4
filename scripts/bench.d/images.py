# SPDX-License-Identifier: GPL-2.0-or-later
"""The qcow2 and LUKS images that rows are measured on, made by qemu-img.

An image that a run changes is made anew before each run; the others once.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from enum import Enum
from pathlib import Path


class Image(Enum):
    """What `{image}` in a row's node options stands for."""

    FILLED = "filled"  # every cluster allocated
    EMPTY = "empty"  # of 4 GiB, nothing allocated; new for every run
    OVERLAY = "overlay"  # nothing of its own, on a filled backing file
    CHAIN = "chain"  # CHAIN_DEPTH of these, one on the other
    LEGS = "legs"  # FILLED three times: also at {image}.b and {image}.c
    DEDUP = "dedup"  # the data device of an empty dedup store; metadata in {image}.meta
    DEDUP_FILLED = "dedup-filled"  # the same with the data on its disk
    FLAGSHIP = "flagship"  # LEGS, of which each has the encrypted data of LUKS
    LUKS = "luks"  # the data encrypted, with QEMU's defaults (LUKS1, AES-256 in XTS mode)


EMPTY_SIZE = 4 << 30
CHAIN_DEPTH = 200
SMOKE_CHAIN_DEPTH = 20  # just to see that it works
PASSPHRASE = "bench"


class ImageError(Exception):
    """An image could not be made."""


def path_of(image: Image, file: Path) -> Path:
    """Beside the raw file with the data."""
    suffix = "qcow2" if image not in (Image.LUKS, Image.DEDUP, Image.DEDUP_FILLED) else "img"
    return file.with_name(f"{file.stem}-{image.value}.{suffix}")


def legs_of(path: Path) -> tuple[Path, ...]:
    """All files of a row with several legs."""
    return (path, Path(f"{path}.b"), Path(f"{path}.c"))


def chain_of(path: Path, depth: int = CHAIN_DEPTH) -> tuple[Path, ...]:
    """All overlays of a chain, the lowest first."""
    return (*(Path(f"{path}.{number}") for number in range(1, depth)), path)


def prepare(image: Image, file: Path, chain_depth: int = CHAIN_DEPTH) -> None:
    """Before a run."""
    path = path_of(image, file)
    if image is Image.EMPTY:
        path.unlink(missing_ok=True)
        _qemu_img("create", "-q", "-f", "qcow2", str(path), str(EMPTY_SIZE))
    elif image is Image.FILLED and not path.exists():
        # -S 0: zeroes are data, too.
        _qemu_img("convert", "-q", "-S", "0", "-O", "qcow2", str(file), str(path))
    elif image is Image.LEGS and not path.exists():
        _qemu_img("convert", "-q", "-S", "0", "-O", "qcow2", str(file), str(path))
        for leg in legs_of(path)[1:]:
            shutil.copyfile(path, leg)
    elif image is Image.FLAGSHIP and not path.exists():
        prepare(Image.LUKS, file)
        encrypted = str(path_of(Image.LUKS, file))
        _qemu_img("convert", "-q", "-S", "0", "-f", "raw", "-O", "qcow2", encrypted, str(path))
        for leg in legs_of(path)[1:]:
            shutil.copyfile(path, leg)
    elif image is Image.OVERLAY and not path.exists():
        filled = path_of(Image.FILLED, file)
        prepare(Image.FILLED, file)
        _qemu_img("create", "-q", "-f", "qcow2", "-b", str(filled), "-F", "qcow2", str(path))
    elif image is Image.CHAIN and not path.exists():
        prepare(Image.FILLED, file)
        below = path_of(Image.FILLED, file)
        for overlay in chain_of(path, chain_depth):
            _qemu_img("create", "-q", "-f", "qcow2", "-b", str(below), "-F", "qcow2", str(overlay))
            below = overlay
    elif image is Image.DEDUP or (image is Image.DEDUP_FILLED and not path.exists()):
        asyncio.run(
            _make_store(path, file.stat().st_size, file if image is Image.DEDUP_FILLED else None)
        )
    elif image is Image.LUKS and not path.exists():
        secret = ("--object", f"secret,id=key,data={PASSPHRASE}")
        options = ("-O", "luks", "-o", "key-secret=key,iter-time=10")
        _qemu_img("convert", "-q", *secret, *options, str(file), str(path))


async def _make_store(path: Path, file_size: int, content: Path | None) -> None:
    from vhostblk.dedup.file import FileData
    from vhostblk.dedup.format import FIRST_SEGMENT, Superblock
    from vhostblk.dedup.interface import Tuning
    from vhostblk.dedup.store import Store
    from vhostblk.engine.dedup import blake3

    metadata = Path(f"{path}.meta")
    shutil.rmtree(metadata, ignore_errors=True)
    path.unlink(missing_ok=True)
    with open(path, "wb") as made:
        made.truncate(1 << 30)
    data = FileData(path)
    bits = 12 if content is not None else 16
    super = Superblock(bits, 22, "blake3", os.urandom(16))
    await Store.create(metadata, data, super)
    store = Store(metadata, Tuning())
    await store.open(data)
    size = content.stat().st_size if content is not None else 1 << 30
    disk = store.set_disk("disk", size)
    if content is not None:
        with open(content, "rb") as file:
            at = 0
            while piece := file.read(1 << 20):
                prints = [blake3(piece[i : i + 4096]) for i in range(0, len(piece), 4096)]
                await store.write(data, disk, at >> 12, memoryview(piece), prints)
                at += len(piece)
    await store.close(data)
    if content is None:
        # What is compared is writing to blocks that the file has and the cache knows, as those of
        # qemu-storage-daemon's file are: finding new ones is the file system's work.
        for at in range(FIRST_SEGMENT, file_size + (8 << 20), 1 << 20):
            await data.write(at, bytes(1 << 20))
    data.close()


def forget(file: Path) -> None:
    """The data have changed, or nobody needs the images any more."""
    for image in Image:
        made = path_of(image, file)
        for path in (*legs_of(made), *chain_of(made)):
            path.unlink(missing_ok=True)
            shutil.rmtree(f"{path}.meta", ignore_errors=True)


def _qemu_img(*arguments: str) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        raise ImageError("the qcow2 rows need qemu-img (Debian package qemu-utils)")
    for _ in range(20):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        # QEMU 7.2 gives up when the clock of its own CPU time jumps, on a busy machine.
        if "accurate CPU usage" not in done.stderr:
            break
    if done.returncode:
        raise ImageError(f"qemu-img {' '.join(arguments)}: {done.stderr.strip()}")
