# SPDX-License-Identifier: GPL-2.0-or-later
"""What makes a process a daemon: pid file, going to the background, log lines."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
from typing import NoReturn

from vhostblk.cli.errors import FAILED, CliError
from vhostblk.creating import why_not

LOG_LEVELS = ("debug", "info", "warning", "error")
# What standard error was, if the log is a file; until --daemonize lets the terminal go.
_caller: int | None = None
# syslog's priorities, which the journal reads from the start of a line.
_PRIORITIES = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}


class Pidfile:
    """A file with our process id, locked while we live.

    The lock, not the content, says whether the process is alive: the kernel
    drops it whatever way the process ends.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._fd = self._lock()

    def _lock(self) -> int:
        while True:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise self._error("create", error) from None
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = read_pid(self.path)
                os.close(fd)
                by = f" (pid {owner})" if owner else ""
                raise CliError(
                    f"Pid file '{self.path}' belongs to a running process{by}; stop that one "
                    "or choose another file",
                    data={"code": "pidfile-locked", "path": self.path},
                ) from None
            # The previous owner may have removed the file after we opened it.
            try:
                same = os.path.samestat(os.fstat(fd), os.stat(self.path))
            except FileNotFoundError:
                same = False
            if same:
                os.ftruncate(fd, 0)  # a dead process is not the one that owns it now
                return fd
            os.close(fd)

    def write(self) -> None:
        """Put our process id into the file: we are ready."""
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise self._error("write", error) from None

    def _error(self, verb: str, error: OSError) -> CliError:
        return CliError(f"Cannot {verb} pid file '{self.path}': {why_not(error, self.path)}")

    def remove(self) -> None:
        """Remove the file and let go of it."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self._fd)


def read_pid(path: str) -> int | None:
    """The number in a pid file."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(32).strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and text.isascii() else None


def is_locked(path: str) -> bool:
    """Whether the owner of a pid file is alive."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        pid = read_pid(path)
        return pid is not None and os.path.exists(f"/proc/{pid}")
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class Background:
    """--daemonize: the parent stays until the child is ready, and ends with its status."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork():
            os.close(self._writer)
            _wait_for_child(reader)
        os.close(reader)
        os.setsid()

    def ready(self, log_file: str | None) -> None:
        """Let the parent go, and the terminal too."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        if log_file is None:
            os.dup2(null, 2)
        os.close(null)
        _let_caller_go()
        os.write(self._writer, b"\0")
        os.close(self._writer)


def _wait_for_child(reader: int) -> NoReturn:
    said = os.read(reader, 1)
    if said == b"\0":
        os._exit(0)
    # The child ended before it was ready; it has said why on standard error.
    try:
        _, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        code = FAILED
    os._exit(code if code > 0 else (128 - code if code < 0 else FAILED))


class _OneLine(logging.Formatter):
    """`vhostblk: warning: text`, whatever the text; with the journal's priority if it listens."""

    def __init__(self, program: str, journal: bool) -> None:
        super().__init__()
        self._program = program
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {error}"
            if os.environ.get("VHOSTBLK_TRACEBACK"):
                text += "\n" + self.formatException(record.exc_info)
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{self._program}: {level}" + text.replace("\n", "\\n")
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{line}" if self._journal else line


def set_up_logging(program: str, level: str, log_file: str | None) -> None:
    """Log to standard error or a file, one line for each record."""
    if log_file is not None:
        try:
            fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        except OSError as error:
            raise CliError(
                f"--log-file {log_file}: Cannot open it: {why_not(error, log_file)}"
            ) from None
        global _caller
        _caller = os.dup(2)
        os.dup2(fd, 2)
        os.close(fd)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(program, _stderr_is_journal()))
    logging.raiseExceptions = False  # a log nobody reads any more is no reason to complain
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(root.level, logging.WARNING))


def tell_caller(line: str) -> None:
    """Whoever started us is to know why we end, also if the log is elsewhere."""
    if _caller is not None:
        with contextlib.suppress(OSError):
            os.write(_caller, f"{line}\n".encode(errors="backslashreplace"))


def terminal() -> int | None:
    """The caller's standard error, if ours is a log file; for commands that are run."""
    return _caller


def _let_caller_go() -> None:
    global _caller
    if _caller is not None:
        os.close(_caller)
        _caller = None


def _stderr_is_journal() -> bool:
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    info = os.fstat(2)
    return (device, inode) == (str(info.st_dev), str(info.st_ino))
