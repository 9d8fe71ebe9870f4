# SPDX-License-Identifier: GPL-2.0-or-later
"""The limits of an export: its place in a throttle-group.

A `throttle` node of the engine that is in no graph: it stands between the device and whatever
the drive's root is, so that it stays where it is when the tree below changes. Everything else
is as with the filter (nodes/throttle.py).
"""

from __future__ import annotations

from vhostblk.engine import Engine, NodeHandle
from vhostblk.engine.throttle import new_throttle
from vhostblk.objects.throttle_group import ThrottleGroup


class ExportLimits:
    """One export in one group."""

    def __init__(self, engine: Engine, group: ThrottleGroup, user: str) -> None:
        self.group = group
        self._user = user
        self._handle = new_throttle(engine, group.handle)
        group.join(self._handle)
        group.users.append(user)

    def above(self, root: NodeHandle) -> NodeHandle:
        """Where requests enter that are to reach `root`."""
        self._handle.set_child(0, root)
        return self._handle

    def drain(self, begin: bool) -> None:
        """From `begin` until its end nothing waits here."""
        self._handle.drain(begin)

    def close(self) -> None:
        """No request reaches it any more."""
        self.group.leave(self._handle)
        self.group.users.remove(self._user)
        self._handle.free()
