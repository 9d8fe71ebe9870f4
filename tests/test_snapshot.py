# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots: of nodes as QEMU's, and below the filters of a drive, on all its legs at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from cow_driver import Cow, CowCreateOptions, Mirror, Through
from frontend import Device
from graph_changes import act, picture, roles, transaction
from in_process import MIB, Guest, Host, refused, with_host

from vhostblk.nodes.driver import CreateHost, NodeDriver
from vhostblk.snapshot import actions

DRIVERS = (Cow, Mirror, Through)


async def snapshot(host: Host, **arguments: Any) -> dict[str, Any]:
    """blockdev-snapshot-sync in the format of the tests."""
    return await act(host, "blockdev-snapshot-sync", **{"format": "cow", **arguments})


def only(answer: dict[str, Any]) -> dict[str, Any]:
    [result] = answer["results"]
    return dict(result)


async def three_legs(host: Host) -> None:
    """Drive e: filter, mirror, three raw legs."""
    for index in range(3):
        file = {"driver": "file", "filename": host.file(f"disk{index}.img")}
        await host.add("raw", f"leg{index}", file=file)
    await host.add("mirror", "m", children=["leg0", "leg1", "leg2"])
    await host.add("through", "top", file="m")
    await host.export("top")


# ---- one node, as QEMU does it


def test_a_node() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk.img"))
        await host.add("through", "t", file="f")
        await host.export("t")
        await host.write("f", 0, b"1" * 512)
        result = await snapshot(
            host,
            node_name="f",
            snapshot_file=host.path("over.img"),
            snapshot_node_name="over",
        )
        assert result["pause-us"] > 0
        assert only(result) == {
            "snapshots": [{"node": "f", "overlay": "over", "filename": host.path("over.img")}]
        }
        assert roles(host, "t") == {"file": "over"} and roles(host, "over")["backing"] == "f"
        async with host.device() as guest:
            assert await guest.read(0, 512) == b"1" * 512
            await guest.write(0, b"2" * 512)
            assert await guest.read(0, 1024) == b"2" * 512 + bytes(512)
        assert await host.read("f", 0, 512) == b"1" * 512

    with_host(test, *DRIVERS)


def test_a_node_that_is_a_filter_gets_the_overlay_on_top_as_with_qemu() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk.img"))
        await host.add("through", "t", file="f")
        await host.export("t")
        with refused("cannot refer to node 't'", "mode=existing"):
            await snapshot(host, node_name="t", snapshot_file=host.path("o"))
        assert not os.path.exists(host.path("o"))
        await make(host, host.path("o"))
        await snapshot(host, node_name="t", snapshot_file=host.path("o"), mode="existing")
        assert host.backend.graph.backend("e").root.driver == "cow"

    with_host(test, *DRIVERS)


async def make(host: Host, filename: str, size: int = MIB) -> None:
    """An empty image of the tests' format."""
    for options in (
        {"driver": "file", "filename": filename, "size": 0},
        {"driver": "cow", "file": {"driver": "file", "filename": filename}, "size": size},
    ):
        await host.backend.blockdev_create("j", options)
        job = host.backend.jobs.get("j")
        await host.until(lambda job=job: job.status.value == "concluded")  # type: ignore[misc]
        assert job.error is None
        job.dismiss()


def test_an_overlay_that_is_open_already() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk.img"))
        await host.export("f")
        for name in ("a", "b"):
            await make(host, host.path(name))
            await host.add("cow", name, file={"driver": "file", "filename": host.path(name)})
        await host.write("f", 0, b"1" * 512)
        result = await act(host, "blockdev-snapshot", node="f", overlay="a")
        assert only(result)["snapshots"] == [{"node": "f", "overlay": "a"}]
        async with host.device() as guest:
            await guest.write(512, b"2" * 512)
            await act(host, "blockdev-snapshot", device="e", overlay="b")
            await guest.write(512, b"3" * 512)
            assert await guest.read(0, 1024) == b"1" * 512 + b"3" * 512
        assert await host.read("a", 0, 1024) == b"1" * 512 + b"2" * 512
        assert await host.read("f", 0, 1024) == b"1" * 512 + bytes(512)
        before = picture(host.backend.graph)
        for node, overlay, words in (
            ("b", "a", "already in use"),
            ("f", "f", "does not support backing images"),
            ("b", "nonesuch", "Failed to find node"),
        ):
            with refused(words):
                await act(host, "blockdev-snapshot", node=node, overlay=overlay)
        await make(host, host.path("c"))
        file = {"driver": "file", "filename": host.path("c")}
        await host.add("cow", "c", file=file, backing="f")
        with refused("already has a backing image", "backing=null"):
            await act(host, "blockdev-snapshot", node="b", overlay="c")
        await host.backend.blockdev_del("c")
        assert picture(host.backend.graph) == before

    with_host(test, *DRIVERS)


# ---- a drive: below its filters


def test_all_legs_of_a_drive_and_no_filter() -> None:
    async def test(host: Host) -> None:
        await three_legs(host)
        graph = host.backend.graph
        async with host.device() as guest:
            await guest.write(0, b"1" * 512)
            result = await snapshot(host, device="e")
            await guest.write(0, b"2" * 512)
        snapshots = only(result)["snapshots"]
        assert [entry["node"] for entry in snapshots] == ["leg0", "leg1", "leg2"]
        assert [entry["overlay"] for entry in snapshots] == ["leg0-1", "leg1-1", "leg2-1"]
        for index, entry in enumerate(snapshots):
            name = os.path.basename(entry["filename"])
            assert os.path.dirname(entry["filename"]) == str(host.directory)
            moment = r"\d{8}T\d{6}\.\d{6}Z"
            assert re.fullmatch(rf"disk{index}\.leg{index}\.{moment}\.cow", name)
            assert await host.read(f"leg{index}", 0, 512) == b"1" * 512
            assert await host.read(entry["overlay"], 0, 512) == b"2" * 512
        drive = graph.backend("e")
        assert drive.root.name == "top" and [node.name for node in drive.filters] == ["top", "m"]
        assert roles(host, "m") == {f"children.{i}": f"leg{i}-1" for i in range(3)}
        # And again: names stay those of the legs.
        again = only(await snapshot(host, device="e"))["snapshots"]
        assert [entry["overlay"] for entry in again] == ["leg0-2", "leg1-2", "leg2-2"]
        assert [entry["node"] for entry in again] == ["leg0-1", "leg1-1", "leg2-1"]

    with_host(test, *DRIVERS)


def test_open_overlays_for_all_legs() -> None:
    async def test(host: Host) -> None:
        await three_legs(host)
        for index in range(3):
            await make(host, host.path(f"o{index}"))
            file = {"driver": "file", "filename": host.path(f"o{index}")}
            await host.add("cow", f"o{index}", file=file)
        with refused("2 overlays for 3 nodes", "leg0, leg1, leg2"):
            await act(host, "blockdev-snapshot", device="e", overlays=["o0", "o1"])
        await act(host, "blockdev-snapshot", device="e", overlays=["o0", "o1", "o2"])
        assert roles(host, "m") == {f"children.{i}": f"o{i}" for i in range(3)}

    with_host(test, *DRIVERS)


def test_names_from_templates() -> None:
    async def test(host: Host) -> None:
        await three_legs(host)
        (host.directory / "snaps").mkdir()
        template = "{directory}/snaps/{device}_{node}_{stem}_{number}.{format}"
        for number in (1, 2):
            result = await snapshot(
                host,
                device="e",
                # The second time the directory is that of the first overlays.
                snapshot_file_template=template if number == 1 else template.replace("snaps/", ""),
                snapshot_node_name="{node}.at.{number}",
            )
            for index, entry in enumerate(only(result)["snapshots"]):
                leg = f"leg{index}"
                wanted = host.path(f"snaps/e_{leg}_disk{index}_{number}.cow")
                assert entry["filename"] == wanted and os.path.exists(wanted)
                assert entry["overlay"] == f"{leg}.at.{number}"

    with_host(test, *DRIVERS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["One of 'device'", "'node-name'"]),
        ({"device": "e", "node_name": "leg0"}, ["One of 'device'"]),
        ({"device": "x"}, ["Export 'x' is not found"]),
        ({"device": "leg0"}, ["'leg0' is a node: use node-name=leg0"]),
        ({"node_name": "x"}, ["Failed to find node"]),
        ({"device": "e", "snapshot_file": "/x"}, ["3 nodes", "leg0, leg1", "snapshot-file-templ"]),
        (
            {"node_name": "leg0", "snapshot_file": "/x", "snapshot_file_template": "/x"},
            ["'snapshot-file-template' is unexpected"],
        ),
        ({"device": "e", "snapshot_file_template": "/{nodes}"}, ["no {nodes}", "{node}"]),
        ({"device": "e", "snapshot_file_template": "{directory}/x"}, ["exists already"]),
        ({"device": "e", "snapshot_node_name": "x"}, ["Duplicate nodes with node-name='x'"]),
        ({"device": "e", "snapshot_node_name": "-{node}"}, ["'-leg0' cannot be the name"]),
        ({"node_name": "leg0", "format": "raw"}, ["'raw' does not support backing", "cow"]),
        ({"node_name": "leg0", "format": "nonesuch"}, ["'nonesuch'"]),
        ({"device": "e", "mode": "existing"}, ["does not exist", "mode=existing"]),
        ({"device": "e", "mode": "some"}, ["'mode'", "absolute-paths"]),
        (
            {"device": "e", "mode": "existing", "create_options": {}},
            ["'create-options' is unexpected"],
        ),
        (
            {"device": "e", "create_options": {"backing-file": "/x"}},
            ["'create-options.backing-file'"],
        ),
        ({"device": "e", "create_options": {"nonesuch": 1}}, ["'create-options.nonesuch'"]),
        (
            {"device": "e", "snapshot_file_template": "/nonexistent/{node}"},
            ["Could not create '/nonexistent/leg0'", "No such file"],
        ),
    ],
)
def test_refusals_leave_everything_as_it_was(arguments: dict[str, Any], words: list[str]) -> None:
    async def test(host: Host) -> None:
        await three_legs(host)
        before, files = picture(host.backend.graph), sorted(os.listdir(host.directory))
        with refused(*words):
            await snapshot(host, **arguments)
        assert picture(host.backend.graph) == before
        assert sorted(os.listdir(host.directory)) == files
        # It works all the same afterwards.
        await snapshot(host, device="e")

    with_host(test, *DRIVERS)


@pytest.mark.parametrize("trouble", ["error", "hang"])
def test_a_leg_that_cannot_be_flushed(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its image would not be what it seems. Once it is no leg any more, all works."""
    monkeypatch.setattr(actions, "_FLUSH_PATIENCE", 0.1)

    async def test(host: Host) -> None:
        for index in range(3):
            await host.add("file", f"file{index}", filename=host.file(f"disk{index}.img"))
            await host.add("delay", f"delay{index}", file=f"file{index}")
            await host.add("error-inject", f"below{index}", file=f"delay{index}", count=0)
            await host.add("raw", f"leg{index}", file=f"below{index}")
        await host.add("quorum", "q", children=["leg0", "leg1", "leg2"], vote_threshold=2)
        await host.export("q")
        new: dict[str, Any] = {"driver": "error-inject", "node-name": "below1", "file": "delay1"}
        new["operations"] = "flush"
        if trouble == "hang":
            new = {"driver": "delay", "node-name": "delay1", "file": "file1", "flush-ns": 10**9}
        await host.backend.blockdev_reopen([new])
        before, files = picture(host.backend.graph), sorted(os.listdir(host.directory))
        with refused("No snapshot was taken: node 'leg1' cannot be flushed", "x-blockdev-change"):
            await snapshot(host, device="e", snapshot_file_template=host.path("{node}-{number}"))
        assert picture(host.backend.graph) == before
        assert sorted(os.listdir(host.directory)) == files
        await host.command("x-blockdev-change", parent="q", child="children.1")
        await snapshot(host, device="e", snapshot_file_template=host.path("{node}-{number}"))

    with_host(test, *DRIVERS)


def test_an_image_with_data_is_never_overwritten() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk.img"))
        await host.export("f")
        precious = Path(host.path("o"))
        precious.write_bytes(b"data")
        with refused(f"'{precious}' exists already and is not empty", "mode=existing"):
            await snapshot(host, node_name="f", snapshot_file=str(precious))
        assert precious.read_bytes() == b"data"
        precious.write_bytes(b"")
        precious.chmod(0o640)
        await snapshot(host, node_name="f", snapshot_file=str(precious))
        assert precious.stat().st_mode & 0o777 == 0o640  # what tools prepare is taken as it is

    with_host(test, *DRIVERS)


DEVICES = [path for path in ("/dev/loop0", "/dev/vda", "/dev/sda") if Path(path).is_block_device()]


class OnDevice(Through):
    """A disk that says that it is a block device."""

    driver = "on-device"
    is_filter = False

    def filename(self) -> str:
        return DEVICES[0]


@pytest.mark.skipif(not DEVICES, reason="there is no block device here")
def test_nothing_is_put_beside_a_block_device() -> None:
    async def test(host: Host) -> None:
        await host.add("on-device", "d", file={"driver": "null-co"})
        await host.export("d")
        with refused("{directory} means nothing for node 'd' (on-device)", "give snapshot-file"):
            await snapshot(host, device="e")

    with_host(test, *DRIVERS, OnDevice)


def test_a_drive_without_a_file_needs_a_name() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.export("n")
        with refused("{directory} means nothing for node 'n' (null-co)"):
            await snapshot(host, device="e")

    with_host(test, *DRIVERS)


# ---- several drives, one moment


def test_one_point_in_time_on_several_drives() -> None:
    """A guest writes the same counter to two drives in turn: what is never found is the
    second ahead of the first, or more than one behind."""

    async def test(host: Host) -> None:
        for name in ("a", "b"):
            await host.add("file", f"{name}0", filename=host.file(f"{name}.img"))
            await host.export(f"{name}0", name)
        async with (
            host.device("a") as first,
            host.device("b") as second,
            counting(first, second),
        ):
            for round in range(20):
                await asyncio.sleep(0.002)
                tops = [
                    {
                        "device": name,
                        "format": "cow",
                        "snapshot-node-name": f"{name}{round + 1}",
                    }
                    for name in ("a", "b")
                ]
                answer = await transaction(host, *(("blockdev-snapshot-sync", top) for top in tops))
                assert len(answer["results"]) == 2 and answer["pause-us"] > 0
        values = []
        for round in range(20):
            a, b = [
                int.from_bytes((await host.read(f"{name}{round}", 0, 512))[:8])
                for name in ("a", "b")
            ]
            assert a - 1 <= b <= a
            values.append(a)
        assert values == sorted(values) and values[-1] > values[1]

    with_host(test, *DRIVERS)


@asynccontextmanager
async def counting(first: Guest, second: Guest) -> AsyncIterator[None]:
    stop = threading.Event()

    def work(one: Device, other: Device) -> None:
        for value in itertools.count(1):
            data = value.to_bytes(8) * 64
            one.write(0, data)
            other.write(0, data)
            if stop.is_set():
                return

    task = asyncio.create_task(asyncio.to_thread(work, first.device, second.device))
    try:
        yield
    finally:
        stop.set()
        await task


def test_a_transaction_that_fails_leaves_no_file() -> None:
    async def test(host: Host) -> None:
        await three_legs(host)
        before, files = picture(host.backend.graph), sorted(os.listdir(host.directory))
        with refused("Transaction aborted"):
            await transaction(
                host,
                ("blockdev-snapshot-sync", {"device": "e", "format": "cow"}),
                ("abort", {}),
            )
        assert picture(host.backend.graph) == before
        assert sorted(os.listdir(host.directory)) == files

    with_host(test, *DRIVERS)


def test_with_other_changes_in_one_transaction() -> None:
    """A filter inserted above and a snapshot below, at one moment."""

    async def test(host: Host) -> None:
        await three_legs(host)
        filter = {"driver": "through", "node-name": "new"}
        answer = await transaction(
            host,
            ("block-filter-insert", {"filter": filter, "export-id": "e"}),
            ("blockdev-snapshot-sync", {"device": "e", "format": "cow"}),
        )
        assert len(answer["results"][1]["snapshots"]) == 3
        drive = host.backend.graph.backend("e")
        assert [node.name for node in drive.filters] == ["new", "top", "m"]
        assert [n.name for n in drive.top_nodes_below_filters] == ["leg0-1", "leg1-1", "leg2-1"]

    with_host(test, *DRIVERS)


# ---- what is written meanwhile


def test_every_snapshot_is_one_moment_of_a_guest_under_load() -> None:
    """Writes in flight from many queues; each snapshot has all that was complete before it,
    nothing that began after it, and the legs are the same."""

    async def test(host: Host) -> None:
        await three_legs(host)
        history: list[tuple[dict[int, int], dict[int, int]]] = []
        async with host.device() as guest:
            writer = Writer(guest.device)
            task = asyncio.create_task(asyncio.to_thread(writer.run))
            for _ in range(12):
                await asyncio.sleep(0.005)
                done = dict(writer.completed)
                await snapshot(host, device="e")
                history.append((done, dict(writer.begun)))
            writer.stop.set()
            await task
        names = [["leg0", "leg1", "leg2"]]
        names += [[f"leg{i}-{round}" for i in range(3)] for round in range(1, 12)]
        for (done, begun), legs in zip(history, names, strict=True):
            images = [await host.read(leg, 0, 64 * 512) for leg in legs]
            assert images[0] == images[1] == images[2]
            for sector in range(64):
                value = int.from_bytes(images[0][sector * 512 :][:8])
                assert done.get(sector, 0) <= value <= begun.get(sector, 0)
        assert sum(history[-1][0].values()) > sum(history[0][0].values())

    with_host(test, *DRIVERS)


class Writer:
    """Writes rising numbers to 64 sectors, eight requests at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.begun: dict[int, int] = {}
        self.completed: dict[int, int] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        for value in itertools.count(1):
            for first in range(0, 64, 8):
                batch = range(first, first + 8)
                for sector in batch:
                    self.begun[sector] = value
                data = value.to_bytes(8) * 64
                self.device.wait(*(self.device.submit(1, sector, data) for sector in batch))
                for sector in batch:
                    self.completed[sector] = value
            if self.stop.is_set():
                return


class Watched(Cow):
    """Knows whether guests were held up when it was created and opened."""

    driver = "watched"
    held_up: ClassVar[list[bool]] = []
    below: ClassVar[NodeDriver]

    @classmethod
    async def create(cls, host: CreateHost, options: CowCreateOptions) -> None:
        cls.held_up.append(cls.below.host.is_drained(cls.below))
        await super().create(host, options)

    async def open(self) -> None:
        self.held_up.append(self.host.is_drained(self.below))
        await super().open()

    def children_changed(self) -> None:
        self.held_up.append(self.host.is_drained(self.below))


class WatchedCreateOptions(CowCreateOptions):
    driver: Literal["watched"]  # type: ignore[assignment]


Watched.CreateOptions = WatchedCreateOptions


def test_what_is_slow_is_done_before_the_pause() -> None:
    async def test(host: Host) -> None:
        Watched.below = await host.add("file", "f", filename=host.file("disk.img"))
        Watched.held_up.clear()
        await host.export("f")
        await snapshot(host, device="e", format="watched")
        assert Watched.held_up == [False, False, True]  # created, opened, put on top

    with_host(test, Watched)


# ---- long chains


def test_a_chain_of_200() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk.img", 128 * 1024))
        await host.export("f")
        async with host.device() as guest:
            for number in range(1, 201):
                await guest.write((number - 1) * 512, number.to_bytes(2) * 256)
                await snapshot(host, device="e", snapshot_file=host.path(f"{number}.cow"))
            data = await guest.read(0, 200 * 512)
            assert data == b"".join(n.to_bytes(2) * 256 for n in range(1, 201))
        chain = host.backend.query_named_block_nodes()
        assert len(chain) == 401 and json.dumps(chain)
        assert await host.read("f-100", 0, 200 * 512) == b"".join(
            n.to_bytes(2) * 256 if n <= 101 else bytes(512) for n in range(1, 201)
        )

    with_host(test, *DRIVERS)
