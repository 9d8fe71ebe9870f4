# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for secrets: never swapped, not in core dumps, not in children, wiped when it is given up.

A `SecretBytes` has pages of its own. What Python itself keeps of a secret on its way there (a line
read from a socket, the result of a hash) cannot be wiped by anybody; such copies are kept short
and few, and `forbid_core_dumps()` keeps the whole process out of core dumps.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import logging
import mmap
import os
import resource
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

_MADV_DONTDUMP = 16
_MADV_WIPEONFORK = 18
_PR_SET_DUMPABLE = 4
_ALLOWED = "VHOSTBLK_CORE_DUMPS"

_libc = ctypes.CDLL(None, use_errno=True)
_warned = False
_forbidden = False


class SecretBytes:
    """A secret of fixed length."""

    def __init__(self, content: int | Buffer | SecretBytes) -> None:
        """A copy of `content`, or that many zeroes to be filled through `view()`."""
        if isinstance(content, SecretBytes):
            content = content.view()
        self._length = content if isinstance(content, int) else len(content)
        pages = max(1, -(-self._length // mmap.PAGESIZE)) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = pages
        self._address = _address(self._memory)
        _protect(self._memory, self._address, pages)
        self._closed = False
        if not isinstance(content, int):
            self._memory[: self._length] = content

    @property
    def address(self) -> int:
        """Where it is, for C; valid until `close()`."""
        self._check()
        return self._address

    def view(self) -> memoryview:
        """The bytes themselves, writable. Do not keep it beyond `close()`: it shows zeroes then."""
        self._check()
        return memoryview(self._memory)[: self._length]

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """Wipe it; may be called twice."""
        if self._closed:
            return
        self._closed = True
        ctypes.memset(self._address, 0, self._pages)
        _libc.munlock(ctypes.c_void_p(self._address), ctypes.c_size_t(self._pages))
        try:
            self._memory.close()
        except BufferError:
            return  # somebody still has a view, of zeroes; the pages go with it

    def __enter__(self) -> SecretBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __eq__(self, other: object) -> bool:
        """In constant time."""
        if isinstance(other, SecretBytes):
            return hmac.compare_digest(self.view(), other.view())
        if isinstance(other, bytes | bytearray | memoryview):
            return hmac.compare_digest(self.view(), other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} secret bytes>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied")

    def _check(self) -> None:
        if self._closed:
            raise ValueError("this secret has been wiped")


def wipe(buffer: bytearray) -> None:
    """Overwrite what has been used up."""
    if buffer:
        view = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        ctypes.memset(ctypes.addressof(view), 0, len(buffer))


def wipe_bytes(value: bytes) -> None:
    """The same for bytes that a function has just made for us, and nobody else can have.

    Python has no way to change them; this is CPython's layout of an object, whose last byte is a
    zero that belongs to the object. The bytes must be longer than one: single ones are shared.
    """
    if len(value) > 1:
        ctypes.memset(id(value) + bytes.__basicsize__ - 1, 0, len(value))


def forbid_core_dumps() -> None:
    """No core dump of this process from now on, nor another user's debugger in it.

    Called when the first secret arrives. A dump would hold keys in OpenSSL's memory too, where no
    advice of ours reaches: the ciphers' key schedules begin with the key itself. What root makes
    all the same (gcore) has no memory of ours in it. VHOSTBLK_CORE_DUMPS=1 leaves things as they
    are, to find a bug.
    """
    global _forbidden
    if _forbidden or os.environ.get(_ALLOWED) == "1":
        return
    _forbidden = True
    with contextlib.suppress(OSError):  # first, as prctl() takes the file from us: core(5)
        Path("/proc/self/coredump_filter").write_text("0")
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    # The limit does not stop a dump into a pipe (core(5)); this does.
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _protect(memory: mmap.mmap, address: int, length: int) -> None:
    memory.madvise(_MADV_DONTDUMP)
    memory.madvise(_MADV_WIPEONFORK)
    if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)) != 0:
        global _warned
        if not _warned:
            _warned = True
            reason = os.strerror(ctypes.get_errno())
            logger.warning(
                "memory for secrets cannot be locked (%s) and may be swapped out; raise the limit "
                "with 'ulimit -l' or LimitMEMLOCK= in the unit",
                reason,
            )
