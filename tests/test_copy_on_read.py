# SPDX-License-Identifier: GPL-2.0-or-later
"""copy-on-read: what is copied, when, and what that does to guests. QEMU's tools judge."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cor_images import KIB, MIB, NEEDS_TOOLS, Chain, image_map, in_top, make_chain, tools
from cow_driver import Cow
from graph_changes import Through, act, load
from in_process import Host, refused, with_host
from luks_headers import CHEAP1, header

from vhostblk.engine import OP_DISCARD, OP_READ, OP_WRITE, OP_WRITE_ZEROES
from vhostblk.filter import Filter, Request
from vhostblk.image import Extent
from vhostblk.nodes.driver import Perm

pytestmark = NEEDS_TOOLS


async def cor(host: Host, below: str = "top", name: str = "cor", **options: Any) -> Any:
    return await host.add("copy-on-read", name, file=below, **options)


def came_up(node: Any) -> list[str]:
    """The operations of requests that reach Python from now on."""
    seen: list[str] = []
    for op, hook in enumerate(node._hooks):
        if hook is not None:
            node._hooks[op] = _recorded(seen, hook)
    return seen


def _recorded(seen: list[str], hook: Any) -> Any:
    def recorded(request: Any) -> Any:
        seen.append(request.operation)
        return hook(request)

    return recorded


# ---- what is copied


@pytest.mark.parametrize(
    ("formats", "options"),
    [
        (("qcow2",), {}),
        (("qcow2",), {"cluster_size": 4096}),
        (("qcow2",), {"cluster_size": 512, "size": 256 * KIB}),
        (("qcow2",), {"cluster_size": MIB * 2, "size": 5 * MIB + 512}),
        (("qcow2",), {"extended_l2": "on", "cluster_size": 128 * KIB}),
        (("qcow2",), {"compat": "0.10"}),
        (("qcow2",), {"base_size": MIB}),
        (("qcow2",), {"base_format": "qcow2"}),
        (("qed",), {}),
        (("qed", "qcow2", "qcow2"), {}),
    ],
)
def test_reads_copy_what_qemu_copies(formats: tuple[str, ...], options: dict[str, Any]) -> None:
    # Only QEMU 9 and later round to subclusters.
    judge = tools((9, 0)) if "extended_l2" in options else tools()

    async def test(host: Host) -> None:
        chain = make_chain(host, *formats, **options)
        size = len(chain.data)
        theirs = Path(host.path("theirs"))
        shutil.copyfile(chain.top, theirs)
        rnd = random.Random(2)
        reads = []
        for _ in range(8):
            length = rnd.choice((512, 4096, 70 * KIB, 130 * KIB))
            reads.append((rnd.randrange(0, size - length, 512), length))
        await chain.open()
        await cor(host)
        for offset, length in reads:
            assert await host.read("cor", offset, length) == chain.data[offset : offset + length]
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        commands = [f"read {offset} {length}" for offset, length in reads]
        judge.io(theirs, *commands, options=("-C", "-f", chain.format))
        assert chain.map() == image_map(theirs, chain.format)
        assert any(depth == 0 for _, _, depth, _, _ in chain.map())
        chain.check()

    with_host(test)


def test_what_is_there_does_not_leave_c() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        node = await cor(host)
        await host.read("cor", 0, MIB)
        seen = came_up(node)
        await host.read("cor", 0, MIB)
        await host.write("cor", 4096, b"x" * 4096)
        assert seen == []
        await host.read("cor", MIB, 4096)
        await host.write("cor", MIB + 128 * KIB, b"y" * 512)  # the overlay copies the cluster
        assert seen == ["read", "write"]
        await host.write("cor", MIB + 128 * KIB, b"z" * 512)
        await host.read("cor", MIB + 128 * KIB, 64 * KIB)
        assert seen == ["read", "write"]

    with_host(test)


def test_what_was_there_before_does_not_come_up_twice() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        tools().io(chain.top, "write -P 1 0 1M", options=("-f", "qcow2"))
        await chain.open()
        node = await cor(host)
        seen = came_up(node)
        await host.read("cor", 0, 4096)
        for offset in range(0, MIB, 64 * KIB):
            await host.write("cor", offset, b"1" * 512)
        assert seen == ["read"]

    with_host(test)


def test_zeroes_take_no_space() -> None:
    async def test(host: Host) -> None:
        data = bytes(MIB) + b"\1" * 512 + bytes(MIB - 512)
        Path(host.path("base")).write_bytes(data)  # zeroes as data, not holes
        top = tools().create(Path(host.path("top")), 2 * MIB, backing=Path(host.path("base")))
        await host.add("qcow2", "top", file={"driver": "file", "filename": str(top)})
        await cor(host)
        assert await host.read("cor", 0, 2 * MIB) == data
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        assert [entry[2:] for entry in image_map(top, "qcow2")] == [
            (0, True, False),
            (0, False, True),
            (0, True, False),
        ]

    with_host(test)


def test_bottom() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", "qcow2", "qcow2")
        before = chain.map()
        top = await chain.open()
        middle = top.child("backing").node
        await cor(host, bottom=middle.name)
        assert await host.read("cor", 0, 2 * MIB) == chain.data
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        # What was in the image right below is in the topmost now; everything else is where it was.
        from_middle = {unit for s, n, d, _, _ in before if d == 1 for unit in _units(s, n)}
        assert from_middle and in_top(chain.top, "qcow2") == from_middle
        assert [e for e in chain.map() if e[2] > 0] == [e for e in before if e[2] > 1]
        chain.check()

    with_host(test)


def _units(start: int, length: int) -> range:
    return range(start // 4096, (start + length) // 4096)


def test_bottom_that_is_shorter_than_what_is_behind() -> None:
    async def test(host: Host) -> None:
        base = Path(host.path("base"))
        base.write_bytes(b"\1" * 2 * MIB)
        middle = tools().create(Path(host.path("middle")), MIB, backing=base)
        tools().io(middle, "write -P 2 0 64k", options=("-f", "qcow2"))
        top = Path(host.path("top"))
        tools().create(top, 2 * MIB, backing=middle, backing_format="qcow2")
        await host.add(
            "qcow2",
            "top",
            file={"driver": "file", "filename": str(top)},
            backing={
                "driver": "qcow2",
                "node-name": "middle",
                "file": {"driver": "file", "filename": str(middle)},
            },
        )
        await cor(host, bottom="middle")
        data = b"\2" * (64 * KIB) + b"\1" * (MIB - 64 * KIB) + bytes(MIB)
        assert await host.read("cor", 0, 2 * MIB) == data
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        # With the base behind it the guest must still see zeroes from 1 MiB on.
        tools().img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(base), top)
        assert tools().content(top) == data

    with_host(test)


def test_bottoms_that_are_none() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", "qcow2")
        top = await chain.open()
        await host.null()
        for name in ("nothing", "null", "cor"):
            with refused(f"Bottom node '{name}' of node 'cor' is not in the chain", "top, #block"):
                await cor(host, bottom=name)
        # Nothing is above the topmost image itself: a filter without anything to do.
        node = await cor(host, bottom="top")
        assert node.handle is None
        await host.backend.blockdev_reopen(
            [{"driver": "copy-on-read", "node-name": "cor", "file": "top"}]
        )
        assert node.handle is not None
        below = top.child("backing").node.name
        options = {"driver": "copy-on-read", "node-name": "cor", "file": "top"}
        await host.backend.blockdev_reopen([{**options, "bottom": below}])
        with refused("Bottom node 'null' of node 'cor'"):
            await host.backend.blockdev_reopen([{**options, "bottom": "null"}])
        assert node.options.bottom == below

    with_host(test)


# ---- where there is nothing to do


def test_without_a_backing_file_it_costs_nothing() -> None:
    async def test(host: Host) -> None:
        path = tools().create(Path(host.path("a")), MIB)
        await host.add("qcow2", "top", file={"driver": "file", "filename": str(path)})
        await host.null()
        for below in ("top", "null"):
            node = await cor(host, below, name=f"over-{below}")
            assert node.handle is None and node.effective is node.child("file").node.handle
            assert node.size == MIB
        assert host.backend.graph.permissions_of(node.child("file").node)[0] == Perm.NONE

    with_host(test)


def test_a_read_only_image() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        before = chain.top.read_bytes()
        await chain.open(read_only=True)
        await host.export("top", writable=False)
        with refused("read-only"):
            filter = {"driver": "copy-on-read", "node-name": "cor"}
            await act(host, "block-filter-insert", export_id="e", filter=filter)
        # One that is read-only itself has nothing to do, and may be there.
        filter = {"driver": "copy-on-read", "node-name": "cor", "read-only": True}
        await act(host, "block-filter-insert", export_id="e", filter=filter)
        async with host.device() as guest:
            assert await guest.read(0, MIB) == chain.data[:MIB]
        assert chain.top.read_bytes() == before

    with_host(test)


def test_an_export_that_cannot_write_still_copies() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        await cor(host)
        await host.export("cor", writable=False)
        perm, _ = host.backend.graph.permissions_of(host.backend.graph.node("top"))
        assert perm == Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        async with host.device() as guest:
            assert await guest.read(0, 128 * KIB) == chain.data[: 128 * KIB]
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        assert in_top(chain.top, "qcow2") == set(range(32))

    with_host(test)


def test_nobody_else_may_write_to_the_overlay() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        await cor(host)
        await host.export("cor", share_rw=True)
        with refused("Permission conflict on node 'top'", "write"):
            await host.export("top", id="f", share_rw=True)
        await host.export("top", id="f", share_rw=True, writable=False)

    with_host(test)


# ---- on and off


def test_on_and_off_above_the_root_of_an_export() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", seed=5)
        await chain.open()
        await host.export("top")
        filter = {"driver": "copy-on-read", "node-name": "cor"}
        async with host.device() as guest, load(guest):
            for _ in range(3):
                await act(host, "block-filter-insert", export_id="e", filter=filter)
                await asyncio.sleep(0.01)
                await act(host, "block-filter-remove", node_name="cor")
        await act(host, "block-filter-insert", export_id="e", filter=filter)
        async with host.device() as guest:
            assert await guest.read(MIB, 4096) == chain.data[MIB : MIB + 4096]
        await act(host, "block-filter-remove", node_name="cor")
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("top")
        assert set(range(256, 272)) <= in_top(chain.top, "qcow2")

    with_host(test)


def test_a_snapshot_below_it() -> None:
    async def test(host: Host) -> None:
        path = tools().create(Path(host.path("first.qcow2")), MIB)
        await host.add("qcow2", "first", file={"driver": "file", "filename": str(path)})
        node = await cor(host, "first")
        await host.export("cor")
        async with host.device() as guest:
            data = random.Random(1).randbytes(MIB)
            await guest.write(0, data)
            assert node.handle is None
            second = host.path("second.qcow2")
            await act(host, "blockdev-snapshot-sync", device="e", snapshot_file=second)
            assert node.handle is not None and node.describe() == {"copies-into": ["first-1"]}
            assert await guest.read(0, 256 * KIB) == data[: 256 * KIB]
            third = host.path("third.qcow2")
            await act(host, "blockdev-snapshot-sync", device="e", snapshot_file=third)
            assert await guest.read(128 * KIB, 256 * KIB) == data[128 * KIB : 384 * KIB]
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("cor")
        for node in reversed(list(host.backend.graph.nodes.values())):
            if node.driver == "qcow2" and not host.backend.graph.parents_of(node):
                await host.backend.blockdev_del(node.name)
        assert in_top(Path(second), "qcow2") == set(range(64))
        assert in_top(Path(third), "qcow2") == set(range(32, 96))

    with_host(test)


def test_a_change_that_fails_leaves_it_as_it_was() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        node = await cor(host)
        await host.export("cor")
        async with host.device() as guest:
            await guest.read(0, MIB)
            snapshot = {"device": "e", "snapshot-file": host.path("snapshot")}
            with refused("aborted"):
                await host.backend.transaction(
                    [("blockdev-snapshot-sync", snapshot), ("abort", {})]
                )
            assert node.describe() == {"copies-into": ["top"]}
            assert await guest.read(MIB, MIB) == chain.data[MIB:]
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        assert len(in_top(chain.top, "qcow2")) == 512

    with_host(test)


def test_resize() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", base_size=4 * MIB)
        await chain.open()
        await cor(host)
        await host.export("cor")
        async with host.device() as guest:
            for name, size in (("cor", 3 * MIB), ("top", 4 * MIB + 512)):
                await host.backend.block_resize(name, size)
                await guest.write(size - 4096, b"e" * 4096)
                assert await guest.read(size - 4096, 4096) == b"e" * 4096
                assert await guest.read(0, 2 * MIB) == chain.data

    with_host(test)


# ---- other trees


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_each_leg_of_a_quorum_is_filled(format: str) -> None:
    async def test(host: Host) -> None:
        chains = [make_chain(host, format, name=f"leg{n}") for n in range(3)]
        for n, chain in enumerate(chains):
            await chain.open(f"leg{n}")
        # One of them has some of it already.
        children = [f"leg{n}" for n in range(3)]
        await host.write("leg1", 0, bytes(chains[1].data[: 192 * KIB]))
        await host.add("quorum", "q", children=children, vote_threshold=2)
        await cor(host, "q")
        assert await host.read("cor", 64 * KIB, 512 * KIB) == chains[0].data[64 * KIB : 576 * KIB]
        for name in ("cor", "q", *children):
            await host.backend.blockdev_del(name)
        wanted = set(range(16, 144))
        assert [in_top(chain.top, format) for chain in chains] == [
            wanted,
            wanted | set(range(16)),
            wanted,
        ]
        for chain in chains:
            chain.check()

    with_host(test)


class CowThatTells(Cow):
    """One that says what it has."""

    driver = "cow"

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        for at in range(offset, offset + length, 512):
            yield Extent(at, 512, depth=0 if self._has[at // 512] else 1)


def test_an_overlay_written_in_python() -> None:
    async def test(host: Host) -> None:
        data = random.Random(1).randbytes(256 * KIB)
        Path(host.path("base")).write_bytes(data)
        file = host.file("cow", 0)
        await host.backend.blockdev_create(
            "j", {"driver": "cow", "file": {"driver": "file", "filename": file}, "size": 256 * KIB}
        )
        await host.until(lambda: host.named("JOB_STATUS_CHANGE")[-1]["status"] == "concluded")
        await host.add("file", "base", filename=host.path("base"), read_only=True)
        await host.add("cow", "top", file={"driver": "file", "filename": file}, backing="base")
        node = await cor(host)
        assert node.handle is not None
        await host.write("cor", 512, b"new" * 512)
        assert await host.read("cor", 0, 4096) == data[:512] + b"new" * 512 + data[2048:4096]
        top = host.backend.graph.node("top")
        assert top._has[:8] == b"\1" * 8

    with_host(test, CowThatTells)


def test_filters_and_an_offset_between() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2", size=2 * MIB)
        await chain.open()
        await host.add("through", "between", file="top")
        await host.add("raw", "part", file="between", offset=20 * KIB, size=MIB)
        node = await cor(host, "part")
        assert node.handle is not None
        start = 20 * KIB
        assert await host.read("cor", 0, 4096) == chain.data[start : start + 4096]
        await host.write("cor", 60 * KIB, b"w" * 512)  # the overlay's second cluster
        chain.data[80 * KIB : 80 * KIB + 512] = b"w" * 512
        for offset in range(0, MIB, 64 * KIB):
            wanted = chain.data[start + offset : start + offset + 64 * KIB]
            assert await host.read("cor", offset, 64 * KIB) == wanted
        for name in ("cor", "part", "between", "top"):
            await host.backend.blockdev_del(name)
        assert in_top(chain.top, "qcow2") == set(range((MIB + 64 * KIB) // 4096))
        chain.check()

    with_host(test, Through)


@pytest.mark.parametrize("bottom", [None, "base"])
def test_holes_are_noise_in_an_encrypted_disk(bottom: str | None) -> None:
    """Zeroes of the image are not the guest's: they are copied like any data."""
    begin = header("words", CHEAP1)

    async def test(host: Host) -> None:
        await host.backend.object_add({"qom-type": "secret", "id": "s", "data": "words"})
        chain = make_chain(host, "qcow2", size=4 * MIB, base_size=3 * MIB, header=begin)
        await host.add("file", "base", filename=str(chain.paths[0]), read_only=True)
        await chain.open(backing="base")
        luks = await host.add("luks", "luks", file="top", key_secret="s")
        before = await host.read("luks", 0, luks.size)
        options = {} if bottom is None else {"bottom": bottom}
        node = await cor(host, "luks", **options)
        assert node.describe() == {"copies-into": ["top"]}
        for _ in range(2):
            assert await host.read("cor", 0, luks.size) == before
        for name in ("cor", "luks", "top"):
            await host.backend.blockdev_del(name)
        end = 4 * MIB if bottom is None else 3 * MIB
        assert in_top(chain.top, "qcow2") >= set(range(len(begin) // 4096 + 1, end // 4096))
        chain.check()

    with_host(test)


def test_where_a_filter_shows_other_data_zeroes_mean_nothing() -> None:
    """A filter in Python that does not say that it keeps the data may do anything to them."""

    class Inverted(Filter):
        driver = "inverted"

        async def read(self, request: Request) -> None:
            data = bytearray(request.length)
            await self.file.read(request.offset, data)
            request.fill(_inverted(data))

        async def write(self, request: Request) -> None:
            await self.file.write(request.offset, _inverted(request.data()))

        async def write_zeroes(self, request: Request) -> None:
            await self.file.write(request.offset, b"\xff" * request.length)

    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await chain.open()
        await host.add("inverted", "inverted", file="top")
        answer = await host.command("block-image-map", device="inverted")
        assert not any(extent["zero"] for extent in answer["extents"])
        await cor(host, "inverted")
        for _ in range(2):
            assert await host.read("cor", 0, len(chain.data)) == _inverted(chain.data)
        for name in ("cor", "inverted", "top"):
            await host.backend.blockdev_del(name)
        chain.check()

    with_host(test, Inverted)


def _inverted(data: bytes | bytearray) -> bytes:
    return bytes(data).translate(bytes(range(255, -1, -1)))


def test_the_file_of_an_image_grows() -> None:
    """Between an image and its file: the image makes it longer while requests are under way."""

    async def test(host: Host) -> None:
        inner = Path(host.path("inner"))
        tools().create(inner, 16 * MIB, "qcow2")
        tools().io(inner, f"write -P 1 0 {MIB}", options=("-f", "qcow2"))
        outer = Path(host.path("outer"))
        tools().create(outer, inner.stat().st_size, "qcow2", backing=inner, backing_format="raw")
        await host.add("qcow2", "overlay", file={"driver": "file", "filename": str(outer)})
        await cor(host, "overlay")
        await host.add("qcow2", "top", file="cor")
        await host.export("top")
        data = bytearray(b"\1" * MIB + bytes(15 * MIB))
        rnd = random.Random(1)
        async with host.device() as guest:
            for offset in (0, 2 * MIB, 4 * MIB, MIB - 4096, 12 * MIB):
                data[offset : offset + MIB] = rnd.randbytes(MIB)
                await guest.write(offset, data[offset : offset + MIB])
                assert await guest.read(offset, MIB) == data[offset : offset + MIB]
            await host.command("block-stream", device="overlay", job_id="job")
            await guest.write(6 * MIB, data[:MIB])
            data[6 * MIB : 7 * MIB] = data[:MIB]
            await host.until(lambda: not list(host.backend.jobs), 30)
            [event] = host.named("BLOCK_JOB_COMPLETED")
            assert "error" not in event
            for offset in range(0, len(data), MIB):
                assert await guest.read(offset, MIB) == data[offset : offset + MIB]
        await host.backend.close()
        inner.write_bytes(tools().content(outer, "qcow2"))
        assert tools().check(inner).corruptions == 0
        assert tools().content(inner, "qcow2") == bytes(data)

    with_host(test)


# ---- errors


def test_a_base_that_fails_does_no_harm() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        chain.data[:] = chain.paths[0].read_bytes()
        await host.add("file", "file", filename=str(chain.paths[0]), read_only=True)
        await host.add("error-inject", "bad", file="file", operations="discard")
        await chain.open(backing="bad")
        await cor(host)
        await host.export("cor")
        async with host.device() as guest:
            bad = {"driver": "error-inject", "node-name": "bad", "file": "file"}
            await host.backend.blockdev_reopen([{**bad, "operations": "read"}])
            status = await asyncio.to_thread(_read_status, guest.device, 0, 4096)
            assert status == 1  # an I/O error: the data cannot be had
            assert host.named("VHOSTBLK_FILTER_ERROR")[0]["node-name"] == "bad"
            await guest.write(64 * KIB, b"w" * 64 * KIB)
            chain.data[64 * KIB : 128 * KIB] = b"w" * 64 * KIB
            assert await guest.read(64 * KIB, 64 * KIB) == b"w" * 64 * KIB
            await host.backend.blockdev_reopen([{**bad, "operations": "discard"}])
            assert await guest.read(0, MIB) == chain.data[:MIB]
        assert {data["node-name"] for data in host.named("VHOSTBLK_FILTER_ERROR")} == {"bad"}
        await host.backend.block_export_del("e", "hard")
        for name in ("cor", "top"):
            await host.backend.blockdev_del(name)
        chain.check()
        assert in_top(chain.top, "qcow2") == set(range(256))

    with_host(test)


def _read_status(device: Any, offset: int, length: int) -> int:
    request = device.submit(0, offset // 512, length=length)
    device.wait(request)
    return int(request.status)


def test_no_room_in_the_overlay_does_not_fail_a_read() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await host.add("file", "file", filename=str(chain.top))
        inject = {"driver": "error-inject", "node-name": "full", "file": "file", "errno": "ENOSPC"}
        await host.backend.blockdev_add({**inject, "operations": "discard"})
        await host.add("qcow2", "top", file="full")
        node = await cor(host)
        await host.export("cor")
        async with host.device() as guest:
            await guest.read(0, 64 * KIB)
            await host.backend.blockdev_reopen([{**inject, "operations": "write"}])
            assert await guest.read(64 * KIB, 512 * KIB) == chain.data[64 * KIB : 576 * KIB]
            assert node._half.find(0, marked=False) == 1
            await host.backend.blockdev_reopen([{**inject, "operations": "discard"}])
            assert await guest.read(64 * KIB, 512 * KIB) == chain.data[64 * KIB : 576 * KIB]
            assert node._half.find(0, marked=False) == 9

    with_host(test)


# ---- guests that write meanwhile


def test_a_write_during_the_copy_is_not_lost() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await host.add("file", "file", filename=str(chain.paths[0]), read_only=True)
        await host.add("delay", "slow", file="file", read_ns=100_000_000)
        await chain.open(backing="slow")
        node = await cor(host)
        engine = host.backend.engine
        wanted = bytes(chain.data[: 64 * KIB])

        for op, data, expected in (
            (OP_WRITE, b"w" * 512, b"w" * 512),
            (OP_WRITE_ZEROES, None, bytes(512)),
            (OP_DISCARD, None, None),
        ):
            node._look()
            offset = {OP_WRITE: 0, OP_WRITE_ZEROES: 128 * KIB, OP_DISCARD: 512 * KIB}[op]
            wanted = bytes(chain.data[offset : offset + 64 * KIB])
            buffer = bytearray(4096)
            reading = engine.submit(node.effective, OP_READ, offset + 8192, buffer)
            await host.until(lambda: any(claim.exclusive for claim in node._claims))
            length = 512 if data is None else len(data)
            await engine.submit(node.effective, op, offset + 512, data, length)
            await reading
            assert buffer == wanted[8192 : 8192 + 4096]
            if expected is not None:
                assert await host.read("cor", offset + 512, 512) == expected
                assert await host.read("cor", offset + 1024, 512) == wanted[1024:1536]

    with_host(test)


class Writers:
    """Random requests that do not overlap, and the disk as it must be."""

    def __init__(self, host: Host, chain: Chain, seed: int) -> None:
        self.host, self.chain = host, chain
        self.rnd = random.Random(seed)

    async def batch(self, node: str, count: int) -> None:
        """Some at a time, most of them near one another."""
        handle = self.host.backend.graph.node(node).effective
        submit = self.host.backend.engine.submit
        size, rnd, data = len(self.chain.data), self.rnd, self.chain.data
        taken: list[tuple[int, int]] = []
        ios, reads = [], []
        near = rnd.randrange(0, size, 512)
        for _ in range(count):
            length = rnd.choice((512, 1024, 4096, 20 * KIB, 64 * KIB, 128 * KIB))
            offset = near + rnd.randrange(-256 * KIB, 256 * KIB, 512)
            offset = max(0, min(offset, size - length))
            if any(offset < end and start < offset + length for start, end in taken):
                continue
            taken.append((offset, offset + length))
            op = rnd.choice((OP_READ, OP_READ, OP_WRITE, OP_WRITE_ZEROES))
            if op == OP_READ:
                buffer = bytearray(length)
                reads.append((offset, buffer))
                ios.append(submit(handle, op, offset, buffer))
            elif op == OP_WRITE:
                new = rnd.randbytes(length)
                ios.append(submit(handle, op, offset, new))
                data[offset : offset + length] = new
            else:
                ios.append(submit(handle, op, offset, None, length))
                data[offset : offset + length] = bytes(length)
        await asyncio.gather(*(_done(io) for io in ios))
        for offset, buffer in reads:
            assert buffer == data[offset : offset + len(buffer)], offset


async def _done(io: Any) -> None:
    await io


@pytest.mark.parametrize(
    ("formats", "options"),
    [
        (("qcow2",), {}),
        (("qcow2",), {"cluster_size": 4096}),
        (("qcow2",), {"extended_l2": "on"}),
        (("qed",), {}),
        (("qcow2", "qcow2"), {"compat": "0.10"}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_random_requests(formats: tuple[str, ...], options: dict[str, Any], seed: int) -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, *formats, seed=seed, **options)
        await chain.open()
        await cor(host)
        writers = Writers(host, chain, seed)
        for _ in range(30):
            await writers.batch("cor", 24)
        assert await host.read("cor", 0, len(chain.data)) == chain.data
        await host.backend.blockdev_del("cor")
        await host.backend.blockdev_del("top")
        chain.check()
        assert len(in_top(chain.top, chain.format)) == len(chain.data) // 4096

    with_host(test)


def test_errno_of_a_failing_write() -> None:
    async def test(host: Host) -> None:
        chain = make_chain(host, "qcow2")
        await host.add("file", "file", filename=str(chain.top))
        inject = {"driver": "error-inject", "node-name": "full", "file": "file", "errno": "ENOSPC"}
        await host.backend.blockdev_add({**inject, "operations": "discard"})
        await host.add("qcow2", "top", file="full")
        await cor(host)
        await host.export("cor")
        await host.backend.blockdev_reopen([{**inject, "operations": "write"}])
        with pytest.raises(OSError) as caught:
            await host.write("cor", 0, b"x" * 64 * KIB)
        assert caught.value.errno == errno.ENOSPC

    with_host(test)
