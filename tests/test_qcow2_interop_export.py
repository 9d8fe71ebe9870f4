# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of QEMU's served to libblkio, a vhost-user-blk client that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from blkio import Disk, Model, Op, Server, Workload
from crash import all_tools, newest_tools
from qcow2_variants import VARIANTS, Variant, make

NAMES = (
    "default", "cluster-512", "zlib", "extended", "data-file-raw", "on-three", "extended-on-raw",
    "compressed-snapshots",
)  # fmt: skip
some = pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.name in NAMES], ids=lambda variant: variant.name
)
REQUESTS = 400


@some
@pytest.mark.parametrize("queues", [1, 3])
def test_random_requests(tmp_path: Path, short_dir: Path, variant: Variant, queues: int) -> None:
    image = make(tmp_path, variant, newest_tools(), seed=20)
    nodes = (
        f"driver=file,node-name=storage,filename={image.path},discard=unmap",
        "driver=qcow2,node-name=disk,file=storage,discard=unmap",
    )
    model = Model(variant.size)
    model.data[:] = image.content
    with Server(short_dir, nodes, queues=queues) as server:
        with Disk(server.path, queues=queues) as disk:
            model.check_all(disk)
            for queue in disk.queues:
                # No discards: what they leave is the next read's to say, and other tests ask.
                ops = (Op.READ, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.FLUSH)
                Workload(queue, model, seed=20, depth=16, ops=ops).run(REQUESTS // queues)
            model.check_all(disk)
            disk.flush()
        server.check_alive()
    for tools in all_tools():
        found = tools.check(image.path)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
        assert tools.content(image.path) == model.data
        for name, content in image.snapshots.items():
            assert tools.content(image.path, "qcow2", "-l", f"snapshot.name={name}") == content


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_read_only(tmp_path: Path, short_dir: Path, variant: Variant) -> None:
    image = make(tmp_path, variant, newest_tools(), seed=21)
    before = image.path.read_bytes()
    nodes = (
        f"driver=file,node-name=storage,filename={image.path},read-only=on",
        "driver=qcow2,node-name=disk,file=storage,read-only=on",
    )
    with (
        Server(short_dir, nodes, writable=False) as server,
        Disk(server.path, read_only=True) as disk,
    ):
        assert disk.read(0, variant.size) == image.content
    assert image.path.read_bytes() == before
