# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS headers for tests: in memory with a record of writes, in files for cryptsetup and QEMU."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from crash.tools import plain_environment
from qemu_clock import quick_kdf

from vhostblk import luks

MIB = 1 << 20
QUICK = luks.KdfOptions(iter_time=1, pbkdf="pbkdf2", pbkdf_force_iterations=1000)
CHEAP1: dict[str, Any] = {"version": "luks1", "pbkdf_force_iterations": 1000}
CHEAP2: dict[str, Any] = {"version": "luks2", "pbkdf": "pbkdf2", "pbkdf_force_iterations": 1000}


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


class Memory:
    """A `Storage` that remembers in which order it was written."""

    def __init__(self, content: bytes | int = 0) -> None:
        self.content = bytearray(content)
        self.start = bytes(self.content)
        self.steps: list[tuple[int, bytes] | None] = []
        """Writes; None is a flush."""

    @property
    def size(self) -> int:
        return len(self.content)

    async def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        _put(self.content, offset, data)
        self.steps.append((offset, bytes(data)))

    async def flush(self) -> None:
        self.steps.append(None)

    def mark(self) -> None:
        """Forget what was done so far."""
        self.start, self.steps = bytes(self.content), []

    def cut(self, after: int, rnd: random.Random, sector: int = 512) -> bytes:
        """What may be there if the power fails after so many steps.

        All that was flushed, and of what was written since, any sectors.
        """
        done = self.steps[:after]
        flushed = max((at + 1 for at, step in enumerate(done) if step is None), default=0)
        content = bytearray(self.start)
        for at, step in enumerate(done):
            if step is None:
                continue
            offset, data = step
            if at < flushed:
                _put(content, offset, data)
                continue
            begin = 0
            while begin < len(data):
                length = min(sector - (offset + begin) % sector, len(data) - begin)
                if rnd.random() < 0.5:
                    _put(content, offset + begin, data[begin : begin + length])
                begin += length
        return bytes(content)


def header(passphrase: str, options: dict[str, Any], *, detached: bool = False) -> bytes:
    """All that is before the data of a new volume, or its header in a file of its own."""
    memory, given = Memory(), luks.CreateOptions(**options)
    volume = run(luks.create(memory, passphrase.encode(), given, detached=detached))
    return bytes(memory.content).ljust(volume.segment.offset, b"\0")


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def cryptsetup(*words: object, key: bytes | None = None, ok: bool = True) -> str:
    """Run it; `key` goes to its standard input, as the key file."""
    more = [] if key is None else ["--key-file", "-"]
    done = subprocess.run(
        ["cryptsetup", "--batch-mode", *map(str, words), *more],
        input=key or b"",
        capture_output=True,
        timeout=120,
        env=plain_environment(),
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert (done.returncode == 0) == ok, said
    return said


def opens(path: Path, passphrase: bytes, *words: object) -> bool:
    """Whether cryptsetup accepts it."""
    done = subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", *map(str, words), str(path), "--key-file=-"],
        input=passphrase,
        capture_output=True,
        timeout=120,
        env=plain_environment(),
    )
    said = done.stderr.decode()
    assert done.returncode in (0, 2) or "No usable keyslot" in said, said
    return done.returncode == 0


def volume_key(path: Path, passphrase: bytes, to: Path) -> bytes:
    """The key that cryptsetup finds."""
    to.unlink(missing_ok=True)
    cryptsetup("luksDump", "--dump-volume-key", "--volume-key-file", to, path, key=passphrase)
    return to.read_bytes()


def metadata(path: Path) -> dict[str, Any]:
    """The JSON of LUKS2 as cryptsetup prints it."""
    told: dict[str, Any] = json.loads(cryptsetup("luksDump", "--dump-json-metadata", path))
    return told


def write_image(path: Path, content: bytes | bytearray, size: int) -> None:
    """Most of it is zeroes, which are left out."""
    with path.open("wb") as file:
        for at in range(0, len(content), MIB):
            piece = content[at : at + MIB]
            if piece != bytes(len(piece)):
                file.seek(at)
                file.write(piece)
        file.truncate(size)


def sparse(path: Path, size: int = 32 * MIB) -> Path:
    """An empty file."""
    with open(path, "wb") as file:
        os.ftruncate(file.fileno(), size)
    return path


def qemu(passphrase: str, program: str, *words: object) -> str:
    """A program of QEMU, the secret `s` being this passphrase."""
    secret = ["--object", f"secret,id=s,data={passphrase}"]
    first = list(words[:1]) if program == "qemu-img" else []
    command = [program, *first, *secret, *words[len(first) :]]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=120,
        env=quick_kdf(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
