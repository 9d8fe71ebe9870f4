# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest in a process of its own, to be killed in the middle of its writes.

    python -m blkio.guest SOCKET QUEUES SEED

It writes numbered sectors as fast as it can and reports on stdout, in binary: a `RECORD` when a
write is about to start and another when it has completed.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

RECORD = struct.Struct("=cQQ")  # b"s" (starts) or b"c" (completed), sector, number of the write
SECTOR = 512


def contents(sector: int, number: int) -> bytes:
    """What write `number` puts into a sector: it says where it belongs and which it was."""
    return struct.pack("=QQ", sector, number) * (SECTOR // 16)


def run(path: str, queues: int, seed: int) -> None:
    """Until somebody kills it."""
    from blkio.disk import Disk, Op

    rnd = random.Random(seed)
    with Disk(path, queues=queues, slots=32, slot_size=SECTOR) as disk:
        sectors = disk.capacity // SECTOR
        numbers = iter(range(seed << 32, (seed + 1) << 32))
        busy: set[int] = set()
        what: dict[int, tuple[int, int]] = {}
        while True:
            for queue in disk.queues:
                while queue.room:
                    sector = rnd.randrange(sectors)
                    if sector in busy:
                        continue
                    number = next(numbers)
                    busy.add(sector)
                    # Said before it is done: what is killed here may have begun.
                    sys.stdout.buffer.write(RECORD.pack(b"s", sector, number))
                    sys.stdout.buffer.flush()
                    request = queue.write(sector * SECTOR, contents(sector, number))
                    what[id(request)] = (sector, number)
                queue.submit()
            for queue in disk.queues:
                for request in queue.wait(1):
                    request.checked()
                    assert request.op is Op.WRITE
                    sector, number = what.pop(id(request))
                    busy.discard(sector)
                    sys.stdout.buffer.write(RECORD.pack(b"c", sector, number))
            sys.stdout.buffer.flush()


def records(data: bytes) -> list[tuple[bytes, int, int]]:
    """What was reported; a last record that is cut off has not been."""
    whole = len(data) - len(data) % RECORD.size
    return list(RECORD.iter_unpack(data[:whole]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
