# SPDX-License-Identifier: GPL-2.0-or-later
"""error-inject: makes chosen requests fail, to see what the guest makes of it.

An example of a filter: hooks that raise. See docs/filters.md.
"""

from __future__ import annotations

import errno
import os

from vhostblk.engine import OP_NAMES
from vhostblk.filter import Filter, FilterOptions, Request
from vhostblk.schema import Size, StrOrList, UInt64, VhostblkError, did_you_mean


class ErrorInjectOptions(FilterOptions):
    """Options of error-inject."""

    operations: StrOrList = ("read", "write")
    """Which operations fail: read, write, flush, discard, write-zeroes."""
    errno: str = "EIO"
    """The error, by name or number. Guests see EOPNOTSUPP as "unsupported", others as an error."""
    offset: Size = 0
    """Only requests that touch what is from here on …"""
    length: Size | None = None
    """… and is this long; to the end if absent."""
    skip: UInt64 = 0
    """How many matching requests succeed first."""
    every: UInt64 = 1
    """Of the matching requests after those, each how-manieth fails."""
    count: UInt64 | None = None
    """How many fail at most; without end if absent."""


class ErrorInject(Filter):
    """Makes requests fail."""

    driver = "error-inject"
    keeps_data = True
    Options = ErrorInjectOptions
    options: ErrorInjectOptions

    async def open(self) -> None:
        self._seen = 0
        self._failed_so_far = 0
        self._errno = _errno(self.options.errno)
        if self.options.every == 0:
            raise VhostblkError("Parameter 'every' expects a value from 1 on, not '0'")
        self._check_operations()

    def hooked_operations(self) -> set[str]:
        return self._operations()

    async def read(self, request: Request) -> None:
        self._maybe_fail(request)
        request.forward()

    write = flush = discard = write_zeroes = read

    def _maybe_fail(self, request: Request) -> None:
        options = self.options
        if request.length:  # a flush has no range and always matches
            end = self.size if options.length is None else options.offset + options.length
            if request.offset >= end or request.offset + request.length <= options.offset:
                return
        self._seen += 1
        if self._seen <= options.skip or (self._seen - options.skip) % options.every:
            return
        if options.count is not None and self._failed_so_far >= options.count:
            return
        self._failed_so_far += 1
        raise OSError(self._errno, f"{os.strerror(self._errno)} (injected)")

    def _operations(self) -> set[str]:
        wanted = self.options.operations
        return {wanted} if isinstance(wanted, str) else set(wanted)

    def _check_operations(self) -> None:
        for name in sorted(self._operations()):
            if name not in OP_NAMES:
                near = did_you_mean(name, OP_NAMES)
                hint = f"; did you mean '{near}'?" if near else ""
                raise VhostblkError(
                    f"Parameter 'operations' does not accept value '{name}'; "
                    f"allowed: {', '.join(OP_NAMES)}{hint}"
                )


def _errno(text: str) -> int:
    number = int(text) if text.isdecimal() else getattr(errno, text, 0)
    if number in errno.errorcode:
        return number
    near = did_you_mean(text, errno.errorcode.values())
    hint = f"; did you mean '{near}'?" if near else ""
    raise VhostblkError(
        f"Parameter 'errno' expects the name or number of an error, not '{text}'{hint}"
    )
