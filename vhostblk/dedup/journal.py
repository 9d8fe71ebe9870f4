# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: what has changed since the metadata store was last written, in files of its own.

Each change is a frame, appended with one `write()`: once that returns, a kill of this process does
not lose it. `sync()` makes it survive a power cut. Frames are numbered through all files; reading
ends at the first one that is not whole, or not the next one, because nobody was promised what
follows.

A checkpoint begins a new file. The older ones are removed once the database has what
they say.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vhostblk.dedup.format import Record, unpack_records

_HEADER = struct.Struct("<IIQ16s")
_MAGIC = 0x76646A31


class Journal:
    """The files of one store, the last of which is being written."""

    def __init__(self, directory: Path, uuid: bytes) -> None:
        self._directory = directory
        self._uuid = uuid
        self._fd = -1
        self._length = 0
        self._unsynced: list[int] = []  # descriptors of older files, not on disk yet
        self._directory_changed = False
        self.number = 0
        self.next_frame = 0

    # ---- reading

    def read(self, number: int, frame: int) -> Iterator[tuple[int, list[Record]]]:
        """All frames from `frame` on, which is the first one of file `number`.

        Of a long journal a little is in memory at a time. Any thread, one at a time.
        """
        while self.path(number).exists():
            with open(self.path(number), "rb") as file:
                left = os.fstat(file.fileno()).st_size
                while (payload := self._frame(file, left, frame)) is not None:
                    yield frame, list(unpack_records(payload))
                    left -= _HEADER.size + len(payload)
                    frame += 1
            number += 1

    def _frame(self, file: BinaryIO, left: int, number: int) -> bytes | None:
        if left < _HEADER.size:
            return None
        magic, length, found, digest = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC or found != number or length > left - _HEADER.size:
            return None
        payload = file.read(length)
        return payload if digest == self._digest(number, payload) else None

    def _digest(self, number: int, payload: bytes) -> bytes:
        key = self._uuid + struct.pack("<Q", number)
        return hashlib.blake2b(payload, digest_size=16, key=key).digest()

    # ---- writing

    def begin(self, number: int, frame: int) -> None:
        """Go on in a new file, whose first frame will be `frame`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(self.path(number), flags, 0o600)
        if self._fd >= 0:
            self._unsynced.append(self._fd)
        self._fd, self._length = fd, 0
        self._directory_changed = True
        self.number, self.next_frame = number, frame

    def go_on_from(self, number: int) -> None:
        """The files from `number` on, of an earlier process, are to be synced, too."""
        self._unsynced = [
            os.open(self.path(old), os.O_RDONLY | os.O_CLOEXEC)
            for old in range(number, self.number)
            if self.path(old).exists()
        ] + self._unsynced

    def append(self, payload: bytes) -> int:
        """A frame of packed records; its number. It is in the page cache, or OSError is raised."""
        number = self.next_frame
        header = _HEADER.pack(_MAGIC, len(payload), number, self._digest(number, payload))
        self._write(header + payload)
        self.next_frame = number + 1
        return number

    def _write(self, frame: bytes) -> None:
        try:
            written = os.write(self._fd, frame)
            while written < len(frame):
                written += os.write(self._fd, frame[written:])
        except OSError:
            # The next frame must follow the last one that is whole, and covers what there is of
            # this one even if it cannot be cut off.
            os.lseek(self._fd, self._length, os.SEEK_SET)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._length)
            raise
        self._length += len(frame)

    def syncing(self) -> Callable[[], None]:
        """What makes all frames appended so far survive a power cut, to be called in any thread.

        One at a time; the files are as they are now, even if a new one is begun meanwhile.
        """
        directory = self._directory if self._directory_changed else None
        self._directory_changed = False
        files = (*self._unsynced, self._fd)

        def sync() -> None:
            if directory is not None:
                try:
                    sync_directory(directory)
                except OSError:
                    self._directory_changed = True
                    raise
            for fd in files:
                os.fdatasync(fd)

        return sync

    def let_go(self, files: int) -> None:
        """The first `files` of the older files are on disk."""
        for fd in self._unsynced[:files]:
            os.close(fd)
        del self._unsynced[:files]

    @property
    def older(self) -> int:
        """How many files are written and not on disk yet, the last one aside."""
        return len(self._unsynced)

    def remove_before(self, number: int) -> None:
        """The metadata store has what the older files say."""
        for old in self.numbers():
            if old < number:
                self.path(old).unlink()

    def last_number(self, first: int) -> int:
        """The highest number of the files from `first` on; `first - 1` if there is none."""
        return max((n for n in self.numbers() if n >= first), default=first - 1)

    def numbers(self) -> list[int]:
        """Of all files there are."""
        suffixes = [path.suffix[1:] for path in self._directory.glob("journal.*")]
        return [int(suffix) for suffix in suffixes if suffix.isdecimal()]

    @property
    def size(self) -> int:
        """Bytes of the file that is being written."""
        return self._length

    def path(self, number: int) -> Path:
        """One of the files."""
        return self._directory / f"journal.{number}"

    def close(self) -> None:
        """Give everything back."""
        for fd in (*self._unsynced, self._fd):
            if fd >= 0:
                os.close(fd)
        self._unsynced.clear()
        self._fd = -1


def sync_directory(path: Path) -> None:
    """Names in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """A new file, which survives a power cut; its name does with sync_directory()."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
