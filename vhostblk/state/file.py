# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that always holds one complete document, whenever the process or the host dies.

The new document is written to a second file, which then takes the place of the
first: FILE.tmp is written and synced, renamed to FILE, and the directory
synced. Whoever looks finds the old document or the new one, and after `write()`
has returned the new one, also when power has failed.

FILE.lock is locked as long as the process lives. The lock cannot be on FILE
itself: that is another file after each change.

A write that hangs is given up, since guests may be waiting for it. What it did, or does
when its file system answers again, is undone by its own thread; until then nothing else is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import threading

from vhostblk.creating import why_not
from vhostblk.fault import fault_point
from vhostblk.schema import VhostblkError

MAX_SIZE = 64 << 20
PATIENCE = 10.0
"""Seconds that a write may take."""


class StateFile:
    """The file, locked. Made by one thread, and written by one at a time."""

    def __init__(self, path: str) -> None:
        # A link stays a link: it is what it points to that is replaced.
        self.path = os.path.realpath(path)
        self._directory = os.path.dirname(self.path)
        self._written: str | None = None
        self._safe: str | None = None
        self._writer: asyncio.Future[None] | None = None
        """Done when the thread that writes has ended."""
        self._given_up = False
        self._concluding = threading.Lock()
        self._lock = self._take_lock()

    def _take_lock(self) -> int:
        path = f"{self.path}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise self._error(f"Cannot create '{path}': {why_not(error, path)}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).strip().decode("ascii", "replace")
            os.close(fd)
            by = f" (pid {owner})" if owner.isdecimal() else ""
            raise self._error(
                f"State file '{self.path}' belongs to a running backend{by}",
                code="state-locked",
                hint="stop that one, or choose another file",
            ) from None
        except OSError as error:
            os.close(fd)
            raise self._error(
                f"Cannot lock '{path}': {error.strerror}",
                hint="choose a file on a file system with locks",
            ) from None
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(fd)
            raise self._error(f"Cannot write '{path}': {why_not(error, path)}") from None
        return fd

    def close(self) -> None:
        """Let another backend have it. FILE.lock stays: removing it would race with that one."""
        if self._lock >= 0 and not self._hangs:  # else it goes with the process
            os.close(self._lock)
            self._lock = -1

    # ---- reading

    def read(self) -> str | None:
        """What is in it; None if it does not exist yet."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self.path, flags)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(f"Cannot open '{self.path}': {error.strerror}") from None
        try:
            self._check_owner(os.fstat(fd))
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_SIZE + 1)
        except OSError as error:
            raise self._error(f"Cannot read '{self.path}': {error.strerror}") from None
        finally:
            os.close(fd)
        if len(data) > MAX_SIZE:
            raise self._error(f"'{self.path}' is larger than {MAX_SIZE} bytes: no state file")
        try:
            self._written = self._safe = data.decode("utf-8")
            return self._written
        except UnicodeDecodeError:
            raise self._error(f"'{self.path}' is not a state file: it is not text") from None

    def _check_owner(self, info: os.stat_result) -> None:
        """What is in it is done with our rights: nobody else may have written it."""
        if not stat.S_ISREG(info.st_mode):
            raise self._error(f"'{self.path}' is not a regular file")
        if info.st_uid not in (0, os.geteuid()):
            raise self._error(
                f"State file '{self.path}' belongs to user {info.st_uid}, who could have this "
                "process open any file",
                hint="look at what is in it, then make it yours with chown",
            )
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise self._error(
                f"State file '{self.path}' can be written by others, who could have this process "
                "open any file",
                hint=f"look at what is in it, then: chmod 600 '{self.path}'",
            )

    # ---- writing

    @property
    def safe(self) -> str | None:
        """The document as last read, or written for certain."""
        return self._safe

    @property
    def _hangs(self) -> bool:
        return self._given_up and self._writer is not None and not self._writer.done()

    async def write(self, text: str) -> None:
        """Replace the document; safe on disk when done. The same one again is not written."""
        if text == self._written:
            return
        if self._hangs:
            raise self._unwritten("an earlier write to it still hangs")
        try:
            async with asyncio.timeout(PATIENCE):
                if self._writer is not None:  # of somebody who has not waited for its end
                    await asyncio.wait([self._writer])
                self._writer = self._start_writing(text)
                await asyncio.shield(self._writer)
        except TimeoutError:
            with self._concluding:
                self._given_up = self._written != text
            if self._given_up:
                raise self._unwritten(
                    f"it has taken more than {PATIENCE:g} s; does its file system hang?"
                ) from None

    def _start_writing(self, text: str) -> asyncio.Future[None]:
        """In a thread that the end of the process does not wait for."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        done.add_done_callback(asyncio.Future.exception)  # perhaps nobody waits any more
        self._given_up = False

        def end(error: BaseException | None) -> None:
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def work() -> None:
            failure: BaseException | None = None
            try:
                self.write_now(text)
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(end, failure)

        threading.Thread(target=work, name="state", daemon=True).start()
        return done

    def write_now(self, text: str) -> None:
        """The same, waiting."""
        self._written = None  # whatever it is if this fails
        replaced = False
        try:
            self._write_temporary(text)
            fault_point("state-synced")
            self._check_wanted()
            os.rename(self._temporary, self.path)
            replaced = True
            fault_point("state-renamed")
            _sync_directory(self._directory)
            with self._concluding:
                self._check_wanted()
                self._written = self._safe = text
        except OSError as error:
            if replaced and self._safe is not None:
                # What is being undone must not be what the next start finds.
                with contextlib.suppress(OSError):
                    self._write_temporary(self._safe)
                    os.rename(self._temporary, self.path)
            raise self._unwritten(why_not(error, self.path)) from None
        fault_point("state-safe")

    def _check_wanted(self) -> None:
        if self._given_up:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    @property
    def _temporary(self) -> str:
        return f"{self.path}.tmp"

    def _write_temporary(self, text: str) -> None:
        # Left over from a process that was killed, or somebody's trap: never written through.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(self._temporary, flags, 0o600), "wb", buffering=0) as file:
            fault_point("state-begun")
            view = memoryview(text.encode())
            while view:
                view = view[file.write(view) :]
            fault_point("state-written")
            os.fsync(file.fileno())

    def _unwritten(self, why: str) -> VhostblkError:
        return self._error(f"Cannot write state file '{self.path}': {why}", code="state-unwritten")

    def error(self, text: str, *, hint: str | None = None) -> VhostblkError:
        """An error about what is in it."""
        return self._error(f"State file '{self.path}': {text}", hint=hint)

    def _error(
        self, text: str, *, code: str = "state-file", hint: str | None = None
    ) -> VhostblkError:
        data = {"code": code, "path": self.path}
        if hint is not None:
            data["hint"] = hint
            text = f"{text}; {hint}"
        return VhostblkError(text, data=data)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
