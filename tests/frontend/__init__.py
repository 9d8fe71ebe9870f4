# SPDX-License-Identifier: GPL-2.0-or-later
"""A vhost-user front-end in pure Python, for tests.

It plays the part of QEMU and of the guest's driver at once: it owns the guest's
memory and rings, speaks the vhost-user protocol, and can break every rule of
both on purpose.

    with Device(path, queues=2) as device:   # connects, negotiates, starts the queues
        device.write(0, b"x" * 4096)
        assert device.read(0, 4096) == b"x" * 4096

One idea per module: `protocol` is messages and constants, `memory` the guest's
memory, `virtqueue` a split ring seen by the driver, `inflight` the shared
in-flight area, `device` the whole front-end, `daemon` the back-end process.
"""

from .daemon import Daemon, Qmp, listens, qemu_storage_daemon, vhostblk
from .device import BlockError, Config, Device, Request
from .inflight import InflightArea
from .memory import GuestMemory, Region
from .protocol import (
    Channel,
    Disconnected,
    Feature,
    Flag,
    Message,
    ProtocolFeature,
    Status,
    Type,
)
from .virtqueue import Segment, Virtqueue

__all__ = [
    "BlockError",
    "Channel",
    "Config",
    "Daemon",
    "Device",
    "Disconnected",
    "Feature",
    "Flag",
    "GuestMemory",
    "InflightArea",
    "Message",
    "ProtocolFeature",
    "Qmp",
    "Region",
    "Request",
    "Segment",
    "Status",
    "Type",
    "Virtqueue",
    "listens",
    "qemu_storage_daemon",
    "vhostblk",
]
