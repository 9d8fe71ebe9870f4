# SPDX-License-Identifier: GPL-2.0-or-later
"""throttle: requests pass as fast as the limits of a throttle-group allow.

What waits is counted when it passes, as in QEMU (objects/throttle_group.py says by which
rules). A drained section does not wait for limits: everything that is queued passes at once,
and is counted. Engine half: cffi_build/engine/nodes/throttle.c. See docs/throttle.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vhostblk.engine.throttle import ThrottleHandle, new_throttle
from vhostblk.nodes.driver import ChildRole, NodeDriver, NodeOptions
from vhostblk.objects.throttle_group import ThrottleGroup
from vhostblk.schema import BlockdevRef


class ThrottleOptions(NodeOptions):
    """Options of throttle."""

    throttle_group: str
    """Id of the throttle-group object whose limits hold."""
    file: BlockdevRef
    """The node below."""


class Throttle(NodeDriver):
    """A limit on operations and bytes per second."""

    driver = "throttle"
    Options = ThrottleOptions
    options: ThrottleOptions
    is_filter = True
    keeps_data = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole()}
    reopenable = NodeDriver.reopenable | {"throttle-group"}
    handle: ThrottleHandle

    async def open(self) -> None:
        self.group = self.host.use_object(self, self.options.throttle_group, ThrottleGroup)
        self.handle = new_throttle(self.engine, self.group.handle)
        self.group.join(self.handle)

    async def close(self) -> None:
        self.group.leave(self.handle)
        await super().close()

    async def truncate(self, size: int) -> None:
        await self.child("file").node.truncate(size)

    def filename(self) -> str:
        return self.child("file").node.filename()

    def describe(self) -> dict[str, Any]:
        return {"throttle-group": self.group.id}

    # ---- another group

    async def reopen_prepare(self, options: ThrottleOptions) -> None:
        await super().reopen_prepare(options)
        if options.throttle_group != self.options.throttle_group:
            self.prepared["group"] = self.host.use_object(
                self, options.throttle_group, ThrottleGroup
            )

    def _exchange(self) -> None:
        old = self.group
        super()._exchange()
        if self.group is not old:
            old.leave(self.handle)
            self.handle.set_group(self.group.handle)
            self.group.join(self.handle)

    async def reopen_dispose(self, attributes: dict[str, Any]) -> None:
        await super().reopen_dispose(attributes)
        if "group" in attributes:
            self.host.release_object(self, attributes["group"])

    # ---- drained sections

    def drain_begin(self) -> None:
        self.handle.drain(True)

    def drain_end(self) -> None:
        self.handle.drain(False)
