# SPDX-License-Identifier: GPL-2.0-or-later
"""detect-zeroes on formats: what writes of zeroes take is compared with what they take in QEMU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from blkio import Disk, Model, Op, Server, Workload
from crash import Tools, newest_tools
from in_process import Host, refused, with_host
from qcow2_variants import VARIANTS, make
from test_graph_change_reopen import reopen

from vhostblk.engine import OP_WRITE, REQ_FUA
from vhostblk.schema import VhostblkError

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB + 2560

# Value, offset, length.
WRITES = (
    (0x11, 0, 2 * MIB),
    (0, 256 * KIB, 512 * KIB),  # clusters that have data
    (0, MIB + 4096, 20 * KIB),  # a part of one
    (0, MIB + 124 * KIB, 72 * KIB),  # parts of two, and one in between
    (0, 2 * MIB, 256 * KIB),  # what has no place yet
    (0, 3 * MIB + 512, 3 * KIB),
    (0x22, 3 * MIB + 64 * KIB, 4096),
    (0, 3 * MIB + 64 * KIB, 64 * KIB),
    (0, 4 * MIB, 2560),  # the end, in the middle of a cluster
)


def options_of(mode: str) -> dict[str, str]:
    return {"detect-zeroes": mode, "discard": "unmap" if mode == "unmap" else "ignore"}


def allocated(tools: Tools, path: Path, format: str) -> int:
    """Clusters with a place in the file."""
    text = tools.img("check", "-f", format, "--output=json", path)
    return int(json.loads(text).get("allocated-clusters", 0))


def allocated_by_qemu(tools: Tools, path: Path, format: str, mode: str) -> int:
    options = ",".join(f"{name}={value}" for name, value in options_of(mode).items())
    tools.io(
        f"driver={format},{options},file.driver=file,file.filename={path}",
        *(f"write -q -P {value} {offset} {length}" for value, offset, length in WRITES),
        options=("--image-opts",),
    )
    return allocated(tools, path, format)


async def write_all(host: Host) -> None:
    for value, offset, length in WRITES:
        await host.write("disk", offset, bytes([value]) * length)


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
@pytest.mark.parametrize("backing", [False, True], ids=["", "backing"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", {}),
        ("qcow2", {"cluster_size": "4k"}),
        ("qcow2", {"compat": "0.10"}),
        ("qcow2", {"extended_l2": "on"}),
        ("qed", {}),
    ],
    ids=["qcow2", "4k", "v2", "extended", "qed"],
)
def test_as_many_clusters_as_in_qemu(
    format: str, options: dict[str, Any], backing: bool, mode: str
) -> None:
    async def test(host: Host) -> None:
        tools = newest_tools()
        path, other = Path(host.path("disk")), Path(host.path("other"))
        content = bytearray(SIZE)
        extra = dict(options)
        if backing:
            content[:] = b"\x77" * SIZE
            Path(host.path("base.raw")).write_bytes(content)
            extra |= {"backing": "base.raw", "backing_format": "raw"}
        tools.create(path, SIZE, format, **extra)
        shutil.copy(path, other)
        for value, offset, length in WRITES:
            content[offset : offset + length] = bytes([value]) * length
        file = {"driver": "file", "filename": str(path)}
        await host.add(format, "disk", file=file, **options_of(mode))
        await write_all(host)
        assert await host.read("disk", 0, SIZE) == content
        await host.backend.blockdev_del("disk")
        assert not tools.check(path, format=format).corruptions
        assert tools.content(path, format)[:SIZE] == content
        ours = allocated(tools, path, format)
        theirs = allocated_by_qemu(tools, other, format, mode)
        # A part of what reads as zeroes already takes a cluster in QEMU's QED.
        assert ours == theirs or (format == "qed" and theirs - 2 <= ours < theirs)

    with_host(test)


@pytest.mark.parametrize(
    "name", ["cluster-4k", "v2-on-raw", "extended-on-raw", "zlib", "snapshots"]
)
def test_random_requests_of_which_many_write_zeroes(
    tmp_path: Path, short_dir: Path, name: str
) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    image = make(tmp_path, variant, newest_tools(), seed=40)
    options = "discard=unmap,detect-zeroes=unmap"
    nodes = (f"driver=qcow2,node-name=disk,{options},file.driver=file,file.filename={image.path}",)
    model = Model(variant.size)
    model.data[:] = image.content
    with Server(short_dir, nodes, queues=2) as server, Disk(server.path, queues=2) as disk:
        for queue in disk.queues:
            ops = (Op.READ, Op.WRITE, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.FLUSH)
            Workload(queue, model, seed=40, depth=16, ops=ops).run(300)
        model.check_all(disk)
        disk.flush()
    found = newest_tools().check(image.path)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    assert newest_tools().content(image.path) == model.data
    for snapshot, content in image.snapshots.items():
        arguments = ("qcow2", "-l", f"snapshot.name={snapshot}")
        assert newest_tools().content(image.path, *arguments) == content


def test_switched_on_and_off_under_a_guest() -> None:
    async def test(host: Host) -> None:
        tools, path = newest_tools(), Path(host.path("disk"))
        tools.create(path, 8 * MIB)
        options = {"driver": "qcow2", "node-name": "disk", "discard": "unmap"}
        await host.add("file", "f", filename=str(path), discard="unmap")
        await host.add("qcow2", "disk", file="f", discard="unmap")
        await host.export("disk")

        async def taken() -> int:
            extents = (await host.backend.block_image_map("disk", 0, None, 1000))["extents"]
            return sum(extent["length"] for extent in extents if extent["data"])

        await host.write("disk", 0, bytes(MIB))
        assert await taken() == MIB
        await reopen(host, {**options, "file": "f", "detect-zeroes": "unmap"})
        await host.write("disk", 0, bytes(2 * MIB))
        assert await taken() == 0
        with pytest.raises(VhostblkError):
            actions = [
                ("blockdev-reopen", {"options": [{**options, "file": "f"}]}),
                ("abort", {}),
            ]
            await host.backend.transaction(actions)
        await host.write("disk", 0, bytes(2 * MIB))
        assert await taken() == 0
        await reopen(host, {**options, "file": "f"})
        await host.write("disk", 0, bytes(2 * MIB))
        assert await taken() == 2 * MIB

    with_host(test)


def test_a_guests_write_stays_a_write_in_the_statistics_and_goes_through_to_the_disk() -> None:
    async def test(host: Host) -> None:
        tools, path = newest_tools(), Path(host.path("disk"))
        tools.create(path, 8 * MIB)
        file = {"driver": "file", "filename": str(path), "node-name": "f"}
        node = await host.add("qcow2", "disk", file=file, **{"detect-zeroes": "on"})
        assert host.backend.graph.node("f").options.detect_zeroes == "off"
        await host.write("disk", 0, b"\x11" * MIB)
        await host.backend.engine.submit(node.effective, OP_WRITE, 0, bytes(MIB), flags=REQ_FUA)
        stats = {s.get("node-name"): s["stats"] for s in host.backend.query_blockstats()}
        assert stats["disk"]["wr_operations"] == 2
        # Nothing waits for a flush any more.
        assert tools.content(path, "qcow2", "-U") == bytes(8 * MIB)

    with_host(test)


def test_refused_where_it_would_do_nothing() -> None:
    async def test(host: Host) -> None:
        path = Path(host.path("disk"))
        newest_tools().create(path, MIB)
        file = {"driver": "file", "filename": str(path)}
        with refused("Parameter 'detect-zeroes'", "without setting discard operation to unmap"):
            await host.add("qcow2", "disk", file=file, **{"detect-zeroes": "unmap"})
        for driver, more in (("luks", {"key-secret": "s"}), ("dedup", {"metadata": "m"})):
            with refused(f"'detect-zeroes' has no effect on driver '{driver}'"):
                await host.add(driver, "disk", file=file, **more, **{"detect-zeroes": "on"})
            with refused(f"'file.detect-zeroes' has no effect on driver '{driver}'"):
                inner = {"driver": driver, "file": file, **more}
                await host.add("raw", "disk", file=inner, **{"detect-zeroes": "on"})

    with_host(test)
