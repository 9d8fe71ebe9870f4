# SPDX-License-Identifier: GPL-2.0-or-later
"""One thread of a process under test, watched with ptrace: its system calls, its steps.

The process is a child of the test's: so an ordinary user may, where Yama restricts ptrace too.
All of ptrace belongs to the thread that attached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import pytest

PTRACE_SINGLESTEP = 9
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GET_SYSCALL_INFO = 0x420E
PTRACE_O_TRACESYSGOOD = 1
SYSCALL_STOP = signal.SIGTRAP | 0x80
SYSCALL_INFO_ENTRY = 1
SYSCALL_INFO = struct.Struct("<B3xIQQQ6Q")  # as far as an entry has it
WAIT_ALL = 0x40000000  # __WALL: threads too

IO_URING_ENTER = 426  # on all architectures in use

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Syscall(NamedTuple):
    """One that is about to be made."""

    number: int
    arguments: tuple[int, ...]


def _fail(what: str) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


class TracedThread:
    """Stopped, except while one of the methods runs."""

    def __init__(self, thread_id: int) -> None:
        self.id = thread_id
        self._ptrace(PTRACE_SEIZE, data=PTRACE_O_TRACESYSGOOD)
        self._ptrace(PTRACE_INTERRUPT)
        self._wait()

    def _ptrace(self, request: int, address: int = 0, data: object = 0) -> int:
        result = int(_libc.ptrace(request, self.id, address, data))
        if result < 0:
            _fail(f"ptrace({request:#x})")
        return result

    def _wait(self) -> int:
        """The signal of the next stop; what comes with an event is not one for the thread."""
        _, status = os.waitpid(self.id, WAIT_ALL)
        assert os.WIFSTOPPED(status), f"the thread has ended: {status:#x}"
        return 0 if status >> 16 else os.WSTOPSIG(status)

    def _entry(self) -> Syscall | None:
        buffer = ctypes.create_string_buffer(SYSCALL_INFO.size)
        self._ptrace(PTRACE_GET_SYSCALL_INFO, len(buffer), ctypes.addressof(buffer))
        kind, _, _, _, number, *arguments = SYSCALL_INFO.unpack(buffer.raw)
        return Syscall(number, tuple(arguments)) if kind == SYSCALL_INFO_ENTRY else None

    def syscalls(self) -> Iterator[Syscall]:
        """One after the other, each seen before it is made."""
        pass_on = 0
        while True:
            self._ptrace(PTRACE_SYSCALL, data=pass_on)
            pass_on = self._wait()
            if pass_on == SYSCALL_STOP:
                pass_on = 0
                entry = self._entry()
                if entry:
                    yield entry

    def step_until(self, condition: Callable[[], bool]) -> None:
        """Instruction by instruction; `condition` is asked after each."""
        pass_on = 0
        while not condition():
            self._ptrace(PTRACE_SINGLESTEP, data=pass_on)
            pass_on = self._wait()
            pass_on = 0 if pass_on == signal.SIGTRAP else pass_on

    def detach(self) -> None:
        self._ptrace(PTRACE_DETACH)


@contextmanager
def traced(thread_id: int) -> Iterator[TracedThread]:
    try:
        thread = TracedThread(thread_id)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip(f"ptrace is not allowed here: {error}")
    try:
        yield thread
    finally:
        thread.detach()
