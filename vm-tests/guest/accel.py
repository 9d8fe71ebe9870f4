# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accelerator works here, found by booting a guest with it.

That /dev/kvm exists, and even that a VM can be created, says little: inside some virtual
machines a guest then stops before its first message.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from .console import ConsoleError
from .images import GuestImages
from .process import ProcessError
from .qmp import QmpError
from .vm import Guest, qemu_version
from .workspace import Workspace

PROBE_SECONDS = 15
TCG = "tcg,thread=multi"


def find_accelerator(images: GuestImages) -> str:
    """QEMU's `-accel` argument: $VHOSTBLK_ACCEL, or KVM if a guest boots with it, or TCG."""
    chosen = os.environ.get("VHOSTBLK_ACCEL")
    if chosen:
        return TCG if chosen == "tcg" else chosen
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and _kvm_works(images):
        return "kvm"
    return TCG


def _kvm_works(images: GuestImages) -> bool:
    """Whether it does is known, once it has been tried, until the host or QEMU is another."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = [boot, *qemu_version()]
    try:
        file = (images.directory / "accelerator.json").open("a+")
    except OSError:  # not ours to write to
        return boots(images, "kvm")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several runs at once need one answer
        file.seek(0)
        with contextlib.suppress(ValueError, TypeError, KeyError):
            known = json.load(file)
            if known["key"] == key:
                return bool(known["kvm"])
        works = boots(images, "kvm")
        file.truncate(0)
        json.dump({"key": key, "kvm": works}, file)
    return works


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
