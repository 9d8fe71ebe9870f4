# SPDX-License-Identifier: GPL-2.0-or-later
"""An image that is open for reading becomes writable where it is (`blockdev-reopen`).

What opening for writing does to an image (repair, replay a log, mark it) needs the file writable
and locked, so it happens late in a change: in the pause, when all permissions can be had. The
image is read anew then, into a second set of everything that the node knows: engine half, caches,
allocator. Until the change is complete the first set is kept, and if another part of it fails
that is what the node goes back to. Its tables are read anew, since a repair stays.
"""

from __future__ import annotations

import abc
from typing import Any

from vhostblk.nodes.hooks import HookedNode


class WritableLater(HookedNode, abc.ABC):
    """A format whose `read-only` may change."""

    _before: dict[str, Any] | None = None
    """What the node knew when it was read-only, until the change is complete."""

    @abc.abstractmethod
    async def _quiet(self) -> None:
        """Nothing is in flight; end what goes on by itself. May be called twice."""

    @abc.abstractmethod
    async def _open_again(self) -> None:
        """Open the image anew, writable. What was there is not freed; what fails leaves nothing."""

    @abc.abstractmethod
    async def _close_again(self) -> None:
        """Undo a complete _open_again(); nothing has been written by a guest."""

    @abc.abstractmethod
    async def _read_only_again(self) -> None:
        """The first set is back: read again what may have changed on disk."""

    @abc.abstractmethod
    async def _free_before(self, before: dict[str, Any]) -> None:
        """Free the engine's half, and the like, of the first set."""

    async def begin_writing(self) -> None:
        if self.read_only or not self.prepared["options"].read_only:
            return
        await self._quiet()
        before = dict(vars(self))
        try:
            await self._open_again()
        except BaseException:
            await self._go_back(before)
            raise
        self._before = before

    async def stop_writing(self) -> None:
        if self._before is not None:
            before = self._before
            try:
                await self._close_again()
            finally:
                await self._go_back(before)

    async def _go_back(self, before: dict[str, Any]) -> None:
        vars(self).clear()
        vars(self).update(before)
        await self._read_only_again()

    async def reopen_clean(self) -> None:
        await super().reopen_clean()
        if self._before is not None:
            before, self._before = self._before, None
            await self.engine.settle({before["map"].address})
            await self._free_before(before)
