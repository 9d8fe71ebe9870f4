# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup in trees: under throttle, over and under LUKS, over qcow2 with snapshots, over a quorum."""

from __future__ import annotations

import random
import shutil

import pytest
from dedup_lab import BLOCK, create, new_store, open_disk, run_job, sound, store_of
from in_process import MIB, Host, refused, with_host

from vhostblk.engine import OP_DISCARD, OP_FLUSH

DATA = 8 * MIB


async def use(host: Host, node: str, seed: int = 1) -> bytes:
    """Write, flush and read; what is on the disk now."""
    rnd = random.Random(seed)
    half = rnd.randbytes(MIB // 2)
    await host.write(node, 0, half)
    await host.write(node, MIB // 2, half)
    handle = host.backend.graph.node(node).effective
    await host.backend.engine.submit(handle, OP_FLUSH)
    await host.backend.engine.submit(handle, OP_DISCARD, 0, None, 16 * BLOCK)
    content = bytes(16 * BLOCK) + (half + half)[16 * BLOCK :]
    assert await host.read(node, 0, MIB) == content
    return content


async def secret(host: Host) -> None:
    await host.backend.objects.add({"qom-type": "secret", "id": "s", "data": "sesame"})


async def qcow2(host: Host, name: str, size: int = DATA) -> None:
    path = host.path(f"{name}.qcow2")
    await run_job(host, {"driver": "file", "filename": path, "size": 0})
    storage = {"driver": "file", "filename": path}
    await run_job(host, {"driver": "qcow2", "file": storage, "size": size})
    await host.add("qcow2", name, file=storage, discard="unmap")


def test_under_throttle() -> None:
    async def test(host: Host) -> None:
        await host.backend.objects.add({"qom-type": "throttle-group", "id": "g"})
        await create(host)
        await open_disk(host)
        await host.add("throttle", "top", file="disk", throttle_group="g")
        await use(host, "top")
        await sound(host)

    with_host(test)


@pytest.mark.parametrize("order", ["over", "under"])
def test_luks(order: str) -> None:
    """Encrypted below, equal blocks are found; encrypted above, they differ."""

    async def test(host: Host) -> None:
        await secret(host)
        if order == "over":
            storage = {"driver": "file", "filename": host.file("luks", DATA + 4 * MIB)}
            luks = {"driver": "luks", "key-secret": "s", "iter-time": 10}
            await run_job(host, {**luks, "file": storage, "size": DATA})
            await host.add("luks", "data", key_secret="s", file=storage)
            await new_store(host, "data")
            await open_disk(host)
            await use(host, "disk")
            assert store_of(host).tables.state.blocks == MIB // 2 // BLOCK
        else:
            await create(host, size=8 * MIB, data=16 * MIB)
            await open_disk(host)
            luks = {"driver": "luks", "key-secret": "s", "iter-time": 10}
            await run_job(host, {**luks, "file": "disk", "size": MIB})
            await host.add("luks", "top", key_secret="s", file="disk")
            await host.write("top", 0, b"x" * MIB)
            assert await host.read("top", 0, MIB) == b"x" * MIB
            assert store_of(host).tables.state.blocks > MIB // BLOCK
        await sound(host)

    with_host(test)


def test_over_qcow2_with_a_snapshot_below() -> None:
    """What the store writes after a snapshot goes into the overlay.

    The snapshot has all that is needed to make a store of it.
    """

    async def test(host: Host) -> None:
        await qcow2(host, "data")
        await new_store(host, "data")
        await open_disk(host)
        content = await use(host, "disk")
        await host.backend.engine.submit(host.backend.graph.node("disk").effective, OP_FLUSH)
        await host.backend.transaction(
            [
                (
                    "blockdev-snapshot-sync",
                    {"node-name": "data", "snapshot-file": host.path("o.qcow2"),
                     "snapshot-node-name": "overlay"},
                )
            ]
        )  # fmt: skip
        assert store_of(host).members[0].data.node.name == "overlay"
        assert await host.read("disk", 0, MIB) == content
        await use(host, "disk", seed=2)
        await sound(host)
        copy = shutil.copy(host.path("data.qcow2"), host.path("copy.qcow2"))
        await host.add("qcow2", "copy", file={"driver": "file", "filename": copy})
        given = {"job_id": "r", "file": "copy", "metadata": host.path("meta2")}
        await host.command("dedup-rebuild", **given)
        await host.until(lambda: host.backend.query_jobs()[-1]["status"] == "concluded")
        await host.add("dedup", "old", file="copy", metadata=host.path("meta2"))
        assert await host.read("old", 0, MIB) == content
        await sound(host, "old")

    with_host(test)


def test_a_snapshot_of_a_disk() -> None:
    """The overlay is above it, also where the export is named."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        await host.export("disk")
        content = await use(host, "disk")
        with refused("An image cannot refer to node 'disk'", "prepare the overlay yourself"):
            await host.command(
                "blockdev-snapshot-sync", device="e", snapshot_file=host.path("o.qcow2")
            )
        path = host.path("o.qcow2")
        await run_job(host, {"driver": "file", "filename": path, "size": 0})
        storage = {"driver": "file", "filename": path}
        await run_job(host, {"driver": "qcow2", "file": storage, "size": MIB})
        await host.add("qcow2", "over", file=storage, backing=None)
        await host.command("blockdev-snapshot", device="e", overlays=["over"])
        async with host.device() as guest:
            assert await guest.read(0, MIB) == content
            await guest.write(0, b"new".ljust(BLOCK))
            await guest.flush()
        assert await host.read("over", 0, BLOCK) == b"new".ljust(BLOCK)
        assert await host.read("disk", 0, MIB) == content
        await sound(host)

    with_host(test)


def test_over_a_quorum() -> None:
    async def test(host: Host) -> None:
        for leg in "abc":
            await host.add("file", leg, filename=host.file(f"{leg}.raw", DATA))
        await host.add("quorum", "data", children=["a", "b", "c"], vote_threshold=2)
        await new_store(host, "data")
        await open_disk(host)
        content = await use(host, "disk")
        await host.write("b", 64 << 10, random.Random(3).randbytes(MIB // 2))
        host.backend.graph.node("disk").forget_places()
        assert await host.read("disk", 0, MIB) == content
        await sound(host)

    with_host(test)


def test_below_an_overlay() -> None:
    """A snapshot of a dedup disk: qcow2 above it, and copied up by copy-on-read."""

    async def test(host: Host) -> None:
        await create(host)
        await open_disk(host)
        content = await use(host, "disk")
        path = host.path("over.qcow2")
        await run_job(host, {"driver": "file", "filename": path, "size": 0})
        storage = {"driver": "file", "filename": path}
        await run_job(host, {"driver": "qcow2", "file": storage, "size": MIB})
        await host.add("qcow2", "over", file=storage, backing="disk")
        await host.add("copy-on-read", "top", file="over")
        assert await host.read("top", 0, MIB) == content
        await host.write("top", 0, b"new".ljust(BLOCK))
        assert (await host.read("disk", 0, MIB)) == content
        await sound(host)

    with_host(test)
