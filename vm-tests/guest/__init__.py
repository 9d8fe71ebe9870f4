# SPDX-License-Identifier: GPL-2.0-or-later
"""Real QEMU guests for tests: images, accelerator, console, monitor, and the backend under test.

Everything here is synchronous: a test reads as the story of one operator, and every wait is for
a condition and has a limit.
"""

from __future__ import annotations

from .backend import Backend, BackendError
from .console import Console, ConsoleError, Result
from .disks import DiskServer, ServedDisk
from .images import GuestImages
from .process import Process, ProcessError, wait_until
from .qmp import QmpClient, QmpError
from .vm import Disk, Guest, Job
from .workspace import Workspace

__all__ = [
    "Backend",
    "BackendError",
    "Console",
    "ConsoleError",
    "Disk",
    "DiskServer",
    "Guest",
    "GuestImages",
    "Job",
    "Process",
    "ProcessError",
    "QmpClient",
    "QmpError",
    "Result",
    "ServedDisk",
    "Workspace",
    "wait_until",
]
