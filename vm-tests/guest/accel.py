# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accelerator works here, found by booting a guest with it.

That /dev/kvm exists, and even that a VM can be created, says little: inside some virtual
machines a guest then stops before its first message.
"""

from __future__ import annotations

import os

from .console import ConsoleError
from .images import GuestImages
from .process import ProcessError
from .qmp import QmpError
from .vm import Guest
from .workspace import Workspace

PROBE_SECONDS = 15
TCG = "tcg,thread=multi"


def find_accelerator(images: GuestImages) -> str:
    """QEMU's `-accel` argument: $VHOSTBLK_ACCEL, or KVM if a guest boots with it, or TCG."""
    chosen = os.environ.get("VHOSTBLK_ACCEL")
    if chosen:
        return TCG if chosen == "tcg" else chosen
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and boots(images, "kvm"):
        return "kvm"
    return TCG


def boots(images: GuestImages, accel: str) -> bool:
    """Whether the tiny guest reaches its shell in time."""
    workspace = Workspace()
    guest = Guest(workspace, images, accel, boot_timeout=PROBE_SECONDS)
    try:
        guest.start()
    except (ConsoleError, ProcessError, QmpError, TimeoutError):
        return False
    else:
        return True
    finally:
        guest.close()
        workspace.remove()
