# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's memory: regions of shared memory, each with a file of its own."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Sequence

PAGE = 4096

_fence = threading.Lock()


def barrier() -> None:
    """A full memory barrier: taking a lock is one on every machine."""
    with _fence:
        pass


class Region:
    """`size` bytes at guest physical address `gpa`, `offset` bytes into a memfd."""

    def __init__(self, gpa: int, size: int, uva: int, offset: int = 0) -> None:
        self.gpa = gpa
        self.size = size
        self.uva = uva
        self.offset = offset
        self.fd = os.memfd_create(f"guest-{gpa:#x}")
        os.ftruncate(self.fd, offset + size)
        self.map = mmap.mmap(self.fd, size, offset=offset)
        self.bytes = memoryview(self.map)
        self.u16 = self.bytes.cast("H")

    def payload(self) -> bytes:
        return struct.pack("<QQQQ", self.gpa, self.size, self.uva, self.offset)

    def close(self) -> None:
        self.u16.release()
        self.bytes.release()
        self.map.close()
        os.close(self.fd)


class GuestMemory:
    """Two regions that are neighbours for the guest and strangers for the host.

    User addresses have nothing to do with guest addresses, and the second region
    starts inside its file: whoever mixes the three up is found out.
    """

    def __init__(self, layout: Sequence[tuple[int, int]] = ((0, 4 << 20), (4 << 20, 4 << 20))):
        self.regions: list[Region] = []
        for gpa, size in layout:
            self.add(gpa, size)
        self._next = PAGE  # guest address 0 stays unused
        self._mark = self._next

    def add(self, gpa: int, size: int) -> Region:
        index = len(self.regions)
        region = Region(gpa, size, 0x500000000000 + (index << 36), offset=3 * PAGE * index)
        self.regions.append(region)
        return region

    def remove(self, region: Region) -> None:
        self.regions.remove(region)
        region.close()

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions.clear()

    # ---- a bump allocator, emptied when nothing is in flight

    def alloc(self, size: int, align: int = 16, region: int | None = None) -> int:
        """Guest address of `size` free bytes; they may cross from one region into the next."""
        start = self._next
        if region is not None:
            start = max(start, self.regions[region].gpa)
        start = -(-start // align) * align
        end = start + size
        if end > self.end:
            raise MemoryError(f"{size} bytes do not fit into the guest's memory")
        self._next = end
        return start

    def keep(self) -> None:
        """What is allocated now survives release()."""
        self._mark = self._next

    def release(self) -> None:
        self._next = self._mark

    def reset(self) -> None:
        """Forget everything, also what was kept."""
        self._next = self._mark = PAGE

    @property
    def end(self) -> int:
        """First address after the regions that follow one another from the first one on."""
        end = self.regions[0].gpa
        for region in self.regions:
            if region.gpa != end:
                break
            end += region.size
        return end

    # ---- access

    def region(self, gpa: int) -> Region:
        for region in self.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return region
        raise ValueError(f"no memory at guest address {gpa:#x}")

    def uva(self, gpa: int) -> int:
        region = self.region(gpa)
        return region.uva + gpa - region.gpa

    def read(self, gpa: int, size: int) -> bytes:
        parts = []
        while size:
            region = self.region(gpa)
            start = gpa - region.gpa
            part = bytes(region.bytes[start : min(start + size, region.size)])
            parts.append(part)
            gpa += len(part)
            size -= len(part)
        return b"".join(parts)

    def write(self, gpa: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            region = self.region(gpa)
            start = gpa - region.gpa
            count = min(len(view), region.size - start)
            region.bytes[start : start + count] = view[:count]
            gpa += count
            view = view[count:]

    def get16(self, gpa: int) -> int:
        """One load, so that a counter is never seen half written."""
        region = self.region(gpa)
        return region.u16[(gpa - region.gpa) // 2]

    def set16(self, gpa: int, value: int) -> None:
        region = self.region(gpa)
        region.u16[(gpa - region.gpa) // 2] = value & 0xFFFF

    # ---- messages

    def table(self) -> tuple[bytes, list[int]]:
        """Payload and descriptors of SET_MEM_TABLE."""
        payload = struct.pack("<II", len(self.regions), 0)
        payload += b"".join(region.payload() for region in self.regions)
        return payload, [region.fd for region in self.regions]
