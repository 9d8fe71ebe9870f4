# SPDX-License-Identifier: GPL-2.0-or-later
"""libblkio as an independent vhost-user-blk front-end for tests, and what to do with it.

`disk` is the client, `model` says what the disk must contain, `server` starts what is tested.
"""

from blkio.disk import Disk, DiskError, Op, Queue, Request
from blkio.model import Model, Workload
from blkio.server import JUDGE, Server, needs_vhostblk

__all__ = [
    "JUDGE",
    "Disk",
    "DiskError",
    "Model",
    "Op",
    "Queue",
    "Request",
    "Server",
    "Workload",
    "needs_vhostblk",
]
