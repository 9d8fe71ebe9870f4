# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots in qcow2, judged by QEMU's tools."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from cow_driver import Mirror, Through
from crash.tools import plain_environment
from frontend import Device
from graph_changes import act, load, roles, transaction
from in_process import MIB, Host, refused, with_host

from vhostblk.snapshot import overlay

SECTORS = 256


def qemu_img(*arguments: str) -> str:
    done = subprocess.run(
        ["qemu-img", *arguments], capture_output=True, text=True, env=plain_environment()
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def content(filename: str, format: str) -> bytes:
    """What QEMU reads from an image and everything below it."""
    raw = filename + ".as-raw"
    qemu_img("convert", "-f", format, "-O", "raw", filename, raw)
    data = Path(raw).read_bytes()
    Path(raw).unlink()
    return data


async def snapshot(host: Host, **arguments: Any) -> list[dict[str, Any]]:
    answer = await act(host, "blockdev-snapshot-sync", **arguments)
    assert answer["pause-us"] > 0
    return list(answer["results"][0]["snapshots"])


class Writer:
    """Writes rising numbers to all sectors in a random order, many requests at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.begun = [0] * SECTORS
        self.completed = [0] * SECTORS
        self.stop = threading.Event()
        self._rng = random.Random(1)

    def run(self) -> None:
        for value in itertools.count(1):
            sectors = self._rng.sample(range(SECTORS), SECTORS)
            for batch in _batches(sectors, 16):
                for sector in batch:
                    self.begun[sector] = value
                data = value.to_bytes(8) * 64
                self.device.wait(*(self.device.submit(1, sector, data) for sector in batch))
                for sector in batch:
                    self.completed[sector] = value
                if self.stop.is_set():
                    return


def _batches(values: list[int], size: int) -> list[list[int]]:
    return [values[at : at + size] for at in range(0, len(values), size)]


async def three_legs(host: Host, format: str) -> None:
    """A mirror of three legs: qcow2 with data of its own, raw, and an overlay."""
    for index in range(3):
        path = host.path(f"disk{index}.{format}")
        qemu_img("create", "-q", "-f", format, path, str(MIB))
        file = {"driver": "file", "filename": path}
        await host.add(format, f"leg{index}", file=file)
    await host.add("mirror", "m", children=["leg0", "leg1", "leg2"])
    await host.export("m")


@pytest.mark.parametrize(
    ("arguments", "cluster", "subclusters"),
    [
        ({"device": "e"}, 128 << 10, True),
        ({"device": "e", "create_options": {}}, 64 << 10, False),
        ({"device": "e", "create_options": {"cluster-size": 4096}}, 4096, False),
        ({"node_name": "leg0", "snapshot_file": "o.qcow2"}, 64 << 10, False),
        (
            {
                "node_name": "leg0",
                "snapshot_file": "o.qcow2",
                "create_options": {"extended-l2": True},
            },
            64 << 10,
            True,
        ),
    ],
)
def test_how_overlays_are_created(
    arguments: dict[str, Any], cluster: int, *, subclusters: bool
) -> None:
    """Those of a drive with subclusters, those of a node as QEMU's, unless somebody says."""

    async def test(host: Host) -> None:
        await three_legs(host, "raw")
        if "snapshot_file" in arguments:
            arguments["snapshot_file"] = host.path(arguments["snapshot_file"])
        for entry in await snapshot(host, **arguments):
            info = json.loads(qemu_img("info", "-U", "--output=json", entry["filename"]))
            assert info["cluster-size"] == cluster
            assert info["format-specific"]["data"]["extended-l2"] is subclusters

    with_host(test, Mirror)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_each_is_one_moment_of_a_guest_under_load(format: str) -> None:
    async def test(host: Host) -> None:
        await three_legs(host, format)
        moments: list[tuple[list[int], list[int]]] = []
        images = [[(host.path(f"disk{i}.{format}"), format) for i in range(3)]]
        async with host.device() as guest:
            writer = Writer(guest.device)
            task = asyncio.create_task(asyncio.to_thread(writer.run))
            for _ in range(8):
                await asyncio.sleep(0.03)
                done = list(writer.completed)
                made = await snapshot(host, device="e")
                moments.append((done, list(writer.begun)))
                images.append([(entry["filename"], "qcow2") for entry in made])
            writer.stop.set()
            await task
            last = await guest.read(0, SECTORS * 512)
        # Covered images are read-only: QEMU may look at them while we serve.
        for (done, begun), legs in zip(moments, images[:-1], strict=True):
            contents = [content(*leg) for leg in legs]
            assert contents[0] == contents[1] == contents[2]
            for sector in range(SECTORS):
                value = int.from_bytes(contents[0][sector * 512 :][:8])
                assert done[sector] <= value <= begun[sector]
        assert sum(moments[-1][0]) > sum(moments[0][0])
        for legs in images[:-1]:
            for filename, kind in legs:
                if kind == "qcow2":
                    qemu_img("check", "-q", filename)
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("m")
        for name in ("leg0", "leg1", "leg2"):
            for number in reversed(range(1, 9)):
                await host.backend.blockdev_del(f"{name}-{number}")
        for filename, kind in images[-1]:
            qemu_img("check", "-q", filename)
            assert content(filename, kind)[: len(last)] == last

    with_host(test, Mirror)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_the_first_writes_after_it_need_no_python(format: str) -> None:
    """They go to places that were ready before the pause, with a copy of what is around them."""

    async def test(host: Host) -> None:
        path = host.path("disk")
        data = random.Random(5).randbytes(4 * MIB)
        Path(path).write_bytes(data)
        if format == "qcow2":
            path += ".qcow2"
            qemu_img("convert", "-f", "raw", "-O", "qcow2", host.path("disk"), path)
        await host.add(format, "d", file={"driver": "file", "filename": path})
        await host.export("d")
        async with host.device() as guest:
            assert await guest.read(0, len(data)) == data  # its own tables are in memory now
            (made,) = await snapshot(host, device="e")
            for cluster in range(20):
                # The loop that runs Python's part stands still meanwhile.
                guest.device.write(cluster * 65536 + 512, bytes(512))
            expected = bytearray(data)
            for cluster in range(20):
                expected[cluster * 65536 + 512 : cluster * 65536 + 1024] = bytes(512)
            assert await guest.read(0, len(expected)) == expected
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("d-1")
        qemu_img("check", "-q", made["filename"])
        assert content(made["filename"], "qcow2") == expected

    with_host(test)


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_each_is_exactly_what_was_written(format: str) -> None:
    """Compared block for block, `qemu-img compare`, with what the guest had written so far."""

    async def test(host: Host) -> None:
        rng = random.Random(3)
        path = host.path("disk.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(MIB))
        await host.add("qcow2", "d", file={"driver": "file", "filename": path})
        await host.add("through", "t", file="d")
        await host.export("t")
        model = bytearray(MIB)
        images = [(path, "qcow2")]
        async with host.device() as guest:
            for number in range(10):
                for _ in range(40):
                    sector, count = rng.randrange(2000), rng.randrange(1, 40)
                    data = rng.randbytes(512 * count)
                    await guest.write(sector * 512, data)
                    model[sector * 512 : sector * 512 + len(data)] = data
                at, length = rng.randrange(200) * 4096, 8 * 4096
                await guest.write_zeroes(at, length, unmap=bool(number % 2))
                model[at : at + length] = bytes(length)
                [made] = await snapshot(host, device="e", format=format)
                images.append((made["filename"], format))
                reference = host.path(f"{number}.raw")
                Path(reference).write_bytes(model)
                name, kind = images[number]
                qemu_img("compare", "-f", kind, "-F", "raw", name, reference)
                assert await guest.read(0, MIB) == model
            info = json.loads(qemu_img("info", "-U", "--output=json", images[-1][0]))
            assert info["backing-filename"] == images[-2][0]
            if format == "qcow2":  # QED knows only whether it is raw
                assert info["backing-filename-format"] == "qcow2"
            assert info["virtual-size"] == MIB

    with_host(test, Through)


def test_two_drives_under_load() -> None:
    async def test(host: Host) -> None:
        for name in ("a", "b"):
            path = host.path(f"{name}.qcow2")
            qemu_img("create", "-q", "-f", "qcow2", path, str(MIB))
            await host.add("qcow2", name, file={"driver": "file", "filename": path})
            await host.export(name, f"e{name}")
        async with (
            host.device("ea") as first,
            host.device("eb") as second,
            load(first),
            load(second),
        ):
            for _ in range(10):
                answer = await transaction(
                    host,
                    ("blockdev-snapshot-sync", {"device": "ea"}),
                    ("blockdev-snapshot-sync", {"device": "eb"}),
                )
                assert len(answer["results"]) == 2
        drives = {drive["device"]: drive for drive in host.backend.query_block()}
        assert drives["ea"]["top-node-below-filters"] == "a-10"

    with_host(test)


@pytest.mark.parametrize(
    ("options", "name", "format"),
    [
        ({"driver": "file", "filename": "{file}"}, "{file}", "file"),
        ({"driver": "raw", "file": "f"}, "{file}", "raw"),
        ({"driver": "delay", "file": {"driver": "raw", "file": "f"}}, "{file}", "raw"),
        ({"driver": "raw", "file": {"driver": "delay", "file": "f"}}, "{file}", "raw"),
        ({"driver": "raw", "file": "f", "offset": 65536, "size": 65536}, "json:{", "raw"),
    ],
)
def test_what_the_image_names(options: dict[str, Any], name: str, format: str) -> None:
    """QEMU finds what is below an overlay, whatever that is to us."""

    async def test(host: Host) -> None:
        path = host.file("disk.img")
        data = random.Random(2).randbytes(MIB)
        Path(path).write_bytes(data)
        given = json.loads(json.dumps(options).replace("{file}", path))
        if options["driver"] != "file":
            await host.add("file", "f", filename=path)
        await host.backend.blockdev_add({**given, "node-name": "d"})
        await host.export("d")
        new = host.path("o.qcow2")
        await snapshot(host, node_name="d", snapshot_file=new)
        async with host.device() as guest:
            await guest.write(4096, b"n" * 4096)
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("d-1")
        info = json.loads(qemu_img("info", "-U", "--output=json", new))
        assert info["backing-filename"].startswith(name.replace("{file}", path))
        assert info["backing-filename-format"] == format
        seen = data[65536:131072] if "offset" in options else data
        wanted = seen[:4096] + b"n" * 4096 + seen[8192:]
        raw = host.path("raw")
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", new, raw)
        assert Path(raw).read_bytes() == wanted

    with_host(test)


def test_going_back_to_a_snapshot() -> None:
    """As docs/snapshots.md describes it."""

    async def test(host: Host) -> None:
        await host.add("raw", "d", file={"driver": "file", "filename": host.file("disk.img")})
        await host.export("d")
        async with host.device() as guest:
            await guest.write(0, b"1" * 4096)
            await snapshot(host, device="e")
            await guest.write(0, b"2" * 4096)
            await snapshot(host, device="e")
        await host.backend.block_export_del("e", "hard")
        new = host.path("b.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", host.path("disk.img"), "-F", "raw", new)
        await host.add("qcow2", "b", file={"driver": "file", "filename": new}, backing="d")
        await host.export("b")
        async with host.device() as guest:
            assert await guest.read(0, 4096) == b"1" * 4096
            await guest.write(4096, b"3" * 4096)
        for name in ("d-2", "d-1"):
            await host.backend.blockdev_del(name)
        await host.backend.block_export_del("e", "hard")
        await host.backend.blockdev_del("b")
        assert content(new, "qcow2")[:8192] == b"1" * 4096 + b"3" * 4096
        assert Path(host.path("disk.img")).read_bytes()[:8192] == b"1" * 4096 + bytes(4096)

    with_host(test)


def test_a_chain_of_200() -> None:
    async def test(host: Host) -> None:
        path = host.path("disk.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", path, str(16 * MIB))
        await host.add("qcow2", "d", file={"driver": "file", "filename": path})
        await host.export("d")
        model = bytearray(200 * 65536)
        top = path
        async with host.device() as guest:
            for number in range(200):
                data = number.to_bytes(2) * 2048
                at = number * 65536
                await guest.write(at, data)
                model[at : at + len(data)] = data
                [made] = await snapshot(host, device="e", snapshot_file=host.path(f"{number}"))
                top = made["filename"]
            for at in range(0, len(model), MIB):
                assert await guest.read(at, MIB) == model[at : at + MIB].ljust(MIB, b"\0")
        await host.backend.block_export_del("e", "hard")
        for number in reversed(range(1, 201)):
            await host.backend.blockdev_del(f"d-{number}")
        await host.backend.blockdev_del("d")
        assert not host.backend.graph.nodes
        # Opened by what the images say of each other.
        await host.add("qcow2", "again", file={"driver": "file", "filename": top})
        assert len(host.backend.graph.nodes) == 402
        assert await host.read("again", 0, len(model)) == model
        qemu_img("check", "-q", "-U", top)

    with_host(test)


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_an_empty_file_is_empty_again_if_nothing_comes_of_the_snapshot(format: str) -> None:
    async def test(host: Host) -> None:
        path = host.path("disk.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", path, str(MIB))
        await host.add("qcow2", "d", file={"driver": "file", "filename": path})
        await host.export("d")
        prepared = Path(host.path("prepared"))
        prepared.touch()
        wanted = {"device": "e", "snapshot-file": str(prepared), "format": format}
        for _ in range(2):  # it can be taken once more, too
            with refused("aborted"):
                await transaction(host, ("blockdev-snapshot-sync", wanted), ("abort", {}))
            assert prepared.stat().st_size == 0
        assert set(os.listdir(host.directory)) == {"disk.qcow2", "e.sock", "prepared"}

    with_host(test)


def test_blockdev_create() -> None:
    async def test(host: Host) -> None:
        path = host.path("new.qcow2")
        for options in (
            {"driver": "file", "filename": path, "size": 0},
            {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": path},
                "size": 64 * MIB,
                "cluster-size": 4096,
                "refcount-bits": 8,
                "lazy-refcounts": True,
            },
        ):
            await host.backend.blockdev_create("j", options)
            job = host.backend.jobs.get("j")
            await host.until(lambda job=job: job.status.value == "concluded")  # type: ignore[misc]
            assert job.error is None
            job.dismiss()
        qemu_img("check", "-q", path)
        info = json.loads(qemu_img("info", "--output=json", path))
        assert info["virtual-size"] == 64 * MIB and info["cluster-size"] == 4096
        assert info["format-specific"]["data"]["refcount-bits"] == 8
        assert info["format-specific"]["data"]["lazy-refcounts"]

    with_host(test)


def test_a_file_that_grows_while_its_overlay_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that holds an image to which guests write: the overlay is as long in the end."""
    create = overlay._create

    async def growing(backend: Any, change: Any, wanted: Any) -> None:
        await create(backend, change, wanted)
        await wanted.below.truncate(wanted.below.size + MIB)

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk.img"))
        await host.add("raw", "top", file="f")
        before = host.backend.graph.node("f").size
        monkeypatch.setattr(overlay, "_create", growing)
        await act(
            host,
            "blockdev-snapshot-sync",
            node_name="f",
            snapshot_file=host.path("over.qcow2"),
            snapshot_node_name="over",
        )
        assert roles(host, "over")["backing"] == "f"
        assert host.backend.graph.node("over").size == before + MIB
        await host.write("top", before, b"1" * 512)
        assert await host.read("top", before, 1024) == b"1" * 512 + bytes(512)

    with_host(test)
