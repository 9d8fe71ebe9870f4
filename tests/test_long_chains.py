# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains of 200 overlays perform: what a read and an open take is counted, not timed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crash import newest_tools
from in_process import MIB, Host, with_host

CLUSTER = 64 * 1024
DEPTH = 200
OWN = 8  # clusters that the top overlay has
READS = 50


def make_chain(host: Host) -> None:
    """000.qcow2 has all of 4 MiB; each of the others is an overlay on the one before."""
    tools = newest_tools()
    bottom = Path(host.path("000.qcow2"))
    tools.create(bottom, 4 * MIB)
    tools.io(bottom, "write -q -P 0x55 0 4M")
    first = Path(host.path("001.qcow2"))
    tools.create(first, 4 * MIB, backing="000.qcow2", backing_format="qcow2")
    template = first.read_bytes()
    for number in range(2, DEPTH + 1):
        name = f"{number - 1:03}.qcow2".encode()
        Path(host.path(f"{number:03}.qcow2")).write_bytes(template.replace(b"000.qcow2", name))


async def open_at(host: Host, depth: int) -> None:
    path = host.path(f"{depth:03}.qcow2")
    await host.add("qcow2", "disk", file={"driver": "file", "filename": path})


def reads(host: Host) -> dict[str, int]:
    """Of the file nodes, by the file's name: what has become of requests, and of metadata."""
    files = {
        node.name: node.filename()
        for node in host.backend.graph.nodes.values()
        if node.driver == "file"
    }
    return {
        Path(files[entry["node-name"]]).name: entry["stats"]["rd_operations"]
        for entry in host.backend.query_blockstats()
        if entry.get("node-name") in files
    }


@pytest.mark.parametrize("depth", [1, DEPTH])
def test_reads_touch_one_file_and_need_no_python(depth: int) -> None:
    async def test(host: Host) -> None:
        make_chain(host)
        await open_at(host, depth)
        await host.export("disk")
        top, bottom = f"{depth:03}.qcow2", "000.qcow2"
        await host.write("disk", 0, b"\x77" * OWN * CLUSTER)
        await host.read("disk", 0, 4 * MIB)  # all tables are in memory now
        rng = random.Random(depth)
        async with host.device() as guest:
            for file, value, first, end in (
                (top, b"\x77", 0, OWN * CLUSTER),
                (bottom, b"\x55", OWN * CLUSTER, 4 * MIB),
            ):
                before = reads(host)
                for _ in range(READS):
                    at = rng.randrange(first, end, 4096)
                    # The loop that runs Python's part stands still meanwhile.
                    assert guest.device.read(at, 4096) == value * 4096
                after = reads(host)
                more = {name: after[name] - before[name] for name in after}
                assert more == dict.fromkeys(after, 0) | {file: READS}

    with_host(test)


def test_opening_reads_as_much_of_each_image_however_many_there_are() -> None:
    async def test(host: Host) -> None:
        make_chain(host)
        for depth in (1, DEPTH // 2, DEPTH):
            await open_at(host, depth)
            found = reads(host)
            assert len(found) == depth + 1
            # The one that is written to is looked at once more than those below it.
            assert found.pop(f"{depth:03}.qcow2") <= 8
            assert set(found.values()) == {found["000.qcow2"]} and found["000.qcow2"] <= 6
            await host.backend.blockdev_del("disk")

    with_host(test)
