# SPDX-License-Identifier: GPL-2.0-or-later
"""The in-flight area of split virtqueues, as the protocol text lays it out."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

from .protocol import inflight_description

REGION = struct.Struct("<QHHHH")
ENTRY = struct.Struct("<B5xHQ")


RING_SIZE_MAX = 1024


def region_bytes(ring_size: int) -> int:
    """Of one queue: header and entries, in whole cache lines."""
    return -(-(REGION.size + ENTRY.size * ring_size) // 64) * 64


@dataclass
class Entry:
    inflight: int
    next: int
    counter: int


@dataclass
class QueueRegion:
    features: int
    version: int
    desc_num: int
    last_batch_head: int
    used_idx: int


class InflightArea:
    """What the back-end gave out with GET_INFLIGHT_FD, or what a test made up."""

    def __init__(
        self,
        fd: int,
        mmap_size: int,
        queues: int,
        queue_size: int,
        offset: int = 0,
    ) -> None:
        self.fd = fd
        self.mmap_size = mmap_size
        self.queues = queues
        self.queue_size = queue_size  # what messages say
        self.offset = offset
        self.map = mmap.mmap(fd, mmap_size, offset=offset)
        # The protocol lets a back-end place the regions as it likes. These are
        # libvhost-user's places, for rings of the largest size if that much is there.
        self.ring_size = queue_size
        if mmap_size >= queues * region_bytes(RING_SIZE_MAX):
            self.ring_size = RING_SIZE_MAX
        self.stride = region_bytes(self.ring_size)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)

    def description(self) -> bytes:
        return inflight_description(self.mmap_size, self.offset, self.queues, self.queue_size)

    def clear(self) -> None:
        self.map[:] = bytes(self.mmap_size)

    def region(self, queue: int = 0) -> QueueRegion:
        return QueueRegion(*REGION.unpack_from(self.map, self.stride * queue))

    def set_region(self, region: QueueRegion, queue: int = 0) -> None:
        REGION.pack_into(
            self.map,
            self.stride * queue,
            region.features,
            region.version,
            region.desc_num,
            region.last_batch_head,
            region.used_idx,
        )

    def entry(self, head: int, queue: int = 0) -> Entry:
        at = self.stride * queue + REGION.size + ENTRY.size * head
        return Entry(*ENTRY.unpack_from(self.map, at))

    def set_entry(self, head: int, entry: Entry, queue: int = 0) -> None:
        at = self.stride * queue + REGION.size + ENTRY.size * head
        ENTRY.pack_into(self.map, at, entry.inflight, entry.next, entry.counter)

    def heads(self, queue: int = 0) -> list[int]:
        """Heads marked in flight, oldest first."""
        found = [(self.entry(head, queue), head) for head in range(self.ring_size)]
        marked = [(entry.counter, head) for entry, head in found if entry.inflight]
        return [head for _, head in sorted(marked)]
