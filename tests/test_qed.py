# SPDX-License-Identifier: GPL-2.0-or-later
"""The qed driver: random operations against a model, QEMU's tools as judges, broken images.

What power cuts leave is tested in test_qed_crash.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from crash.tools import Tools, newest_tools
from in_process import Host, refused, with_host

from vhostblk.cli import main
from vhostblk.engine import OP_FLUSH, OP_WRITE, OP_WRITE_ZEROES, REQ_MAY_UNMAP
from vhostblk.nodes.qed import driver
from vhostblk.nodes.qed.header import Header

MIB = 1 << 20
CLUSTER = 4096
NEED_CHECK = 2


@pytest.fixture
def tools() -> Tools:
    return newest_tools()


def file_of(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


def features(path: Path) -> int:
    with open(path, "rb") as file:
        return int(struct.unpack("<Q", file.read(24)[16:])[0])


def patch(path: Path, offset: int, form: str, *values: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, *values))


def new_image(tools: Tools, path: Path, size: int, **options: Any) -> Path:
    return tools.create(path, size, "qed", **{"cluster_size": CLUSTER, "table_size": 2, **options})


def submit(
    host: Host, op: int, offset: int, data: bytes | None, length: int, flags: int = 0
) -> Any:
    handle = host.backend.graph.node("d").effective
    return host.backend.engine.submit(handle, op, offset, data, length, flags=flags)


async def work(host: Host, model: bytearray, rnd: random.Random, rounds: int) -> None:
    """Batches of requests; those of one batch do not overlap, but share clusters."""
    for _ in range(rounds):
        at, jobs = rnd.randrange(0, 64) * 512, []
        while at < len(model) - 64 * 1024 and len(jobs) < 12:
            length = rnd.choice((512, 1536, 4096, 8192, 30 * 512))
            if rnd.random() < 0.7:
                data = rnd.randbytes(length)
                jobs.append(submit(host, OP_WRITE, at, data, length))
                model[at : at + length] = data
            else:
                length = rnd.choice((512, 4096, 5 * 4096 + 512))
                flags = rnd.choice((0, REQ_MAY_UNMAP))
                jobs.append(submit(host, OP_WRITE_ZEROES, at, None, length, flags))
                model[at : at + length] = bytes(length)
            at += length + rnd.choice((0, 0, 512, 4096, 200 * 512))
        await asyncio.gather(*jobs)
        if rnd.random() < 0.3:
            await submit(host, OP_FLUSH, 0, None, 0)
        at = rnd.randrange(0, len(model) // 512 - 100) * 512
        assert await host.read("d", at, 51200) == model[at : at + 51200]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("below", ["alone", "backing", "short backing"])
def test_random_operations(tmp_path: Path, tools: Tools, below: str, seed: int) -> None:
    size, rnd = 3 * MIB - 1536, random.Random(seed)
    image, base = tmp_path / "d.qed", tmp_path / "base.raw"
    model = bytearray(size)
    if below == "alone":
        new_image(tools, image, size)
    else:
        there = size if below == "backing" else MIB + 512
        base.write_bytes(rnd.randbytes(there))
        model[:there] = base.read_bytes()
        new_image(tools, image, size, backing=base.name)

    async def run(host: Host) -> None:
        for _ in range(2):
            await host.add("qed", "d", file=file_of(image))
            await work(host, model, rnd, 25)
            assert await host.read("d", 0, size) == model
            await host.backend.blockdev_del("d")
            found = tools.check(image, format="qed")
            assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
            assert not features(image) & NEED_CHECK
            assert tools.content(image, "qed") == model

    with_host(run)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize(("cluster", "table"), [(4 * MIB, 2), (64 * MIB, 1), (8 * MIB, 16)])
def test_large_clusters_and_tables(
    tmp_path: Path, tools: Tools, below: bool, cluster: int, table: int
) -> None:
    """As large as the format has them, which is more than QEMU can open."""
    size, image, base = 3 * cluster + MIB, tmp_path / "d.qed", tmp_path / "base.raw"
    options: dict[str, Any] = {}
    if below:
        base.write_bytes(b"b" * MIB)
        os.truncate(base, size)
        options["backing"] = base.name
    new_image(tools, image, size, **{"cluster_size": 4 * MIB, "table_size": 2, **options})
    patch(image, 4, "<III", cluster, table, 1)
    patch(image, 40, "<Q", cluster)  # the L1 table, full of zeroes
    os.truncate(image, cluster * (1 + table))
    places = (2 * MIB, cluster - 512, 2 * cluster + MIB, size - 4096)

    async def run(host: Host) -> None:
        for turn in (b"1", b"2"):
            await host.add("qed", "d", file=file_of(image))
            for at in places:
                await host.write("d", at, turn * 512)
            await submit(host, OP_FLUSH, 0, None, 0)
            for at in places:
                assert await host.read("d", at, 512) == turn * 512
            first = b"b" * MIB if below else bytes(MIB)
            assert await host.read("d", 0, 2 * MIB) == first + bytes(MIB)
            assert await host.read("d", cluster - MIB, MIB - 512) == bytes(MIB - 512)
            assert await host.read("d", 2 * cluster + MIB + 512, MIB) == bytes(MIB)
            checked = await host.backend.block_image_check("d")
            assert not checked.get("corruptions") and not checked.get("leaks"), checked
            await host.backend.blockdev_del("d")
            if table == 2:
                found = tools.check(image, format="qed")
                assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text

    with_host(run)


def test_what_qemu_writes_is_read(tmp_path: Path, tools: Tools) -> None:
    image = tools.create(tmp_path / "d.qed", 64 * MIB, "qed")
    commands = ("write -P 1 0 64k", "write -P 2 100k 3M", "write -P 3 63M 1M", "write -z 1M 1M")
    for command in commands:
        tools.io(image, command, options=("-f", "qed"))

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image), read_only=True)
        assert await host.read("d", 0, 64 * MIB) == tools.content(image, "qed")

    with_host(run)


def test_create_and_grow(tmp_path: Path, tools: Tools) -> None:
    image = tmp_path / "d.qed"

    async def run(host: Host) -> None:
        host.file("d.qed", 0)
        image.write_bytes(b"")
        await host.backend.blockdev_create(
            "j",
            {
                "driver": "qed",
                "file": file_of(image),
                "size": 5000 * 512,
                "cluster-size": 4096,
                "table-size": 2,
            },
        )
        await host.until(lambda: host.backend.query_jobs()[0]["status"] == "concluded")
        assert "error" not in host.backend.query_jobs()[0]
        await host.add("qed", "d", file=file_of(image))
        last = 4999 * 512
        await host.write("d", last, b"x" * 512)
        await host.backend.block_resize("d", 8 * MIB)
        assert await host.read("d", last, 8192) == b"x" * 512 + bytes(8192 - 512)
        await host.write("d", 8 * MIB - 512, b"y" * 512)
        with refused("Shrinking"):
            await host.backend.block_resize("d", MIB)
        await host.backend.blockdev_del("d")

    with_host(run)
    found = tools.check(image, format="qed")
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    content = tools.content(image, "qed")
    assert len(content) == 8 * MIB
    assert content[4999 * 512 :][:513] == b"x" * 512 + b"\0"
    assert content[-512:] == b"y" * 512


def test_growing_does_not_show_what_was_behind_the_end(tmp_path: Path, tools: Tools) -> None:
    image = new_image(tools, tmp_path / "d.qed", MIB + 512)
    tools.io(image, f"write -P 7 {MIB} 512", options=("-f", "qed"))
    # The rest of its cluster is nobody's.
    l1 = struct.unpack("<Q", image.read_bytes()[40:48])[0]
    l2 = struct.unpack("<Q", image.read_bytes()[l1 : l1 + 8])[0]
    entry = l2 + 8 * (MIB // CLUSTER)
    host = struct.unpack("<Q", image.read_bytes()[entry : entry + 8])[0]
    assert image.read_bytes()[host : host + 513] == b"\7" * 512 + b"\0"
    with open(image, "r+b") as file:
        file.seek(host + 512)
        file.write(b"s" * (CLUSTER - 512))

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        await host.backend.block_resize("d", 2 * MIB)
        assert await host.read("d", MIB, MIB) == b"\7" * 512 + bytes(MIB - 512)

    with_host(run)
    assert tools.content(image, "qed")[MIB:] == b"\7" * 512 + bytes(MIB - 512)


def test_growing_does_not_show_a_larger_backing_file(tmp_path: Path, tools: Tools) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 2 * MIB)
    image = new_image(tools, tmp_path / "d.qed", MIB, backing=base.name)

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        with refused("larger than the image"):
            await host.backend.block_resize("d", 2 * MIB)

    with_host(run)


def test_need_check_bit_is_there_before_an_entry_and_goes_at_the_end(
    tmp_path: Path, tools: Tools
) -> None:
    image = new_image(tools, tmp_path / "d.qed", MIB)

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        assert not features(image) & NEED_CHECK
        await host.write("d", 0, b"a" * 512)
        assert features(image) & NEED_CHECK
        # Whoever dies now has written everything: another process would find it.
        copy = tmp_path / "copy.qed"
        copy.write_bytes(image.read_bytes())
        assert tools.content(copy, "qed")[:513] == b"a" * 512 + b"\0"
        await host.backend.blockdev_del("d")
        assert not features(image) & NEED_CHECK

    with_host(run)


@pytest.mark.parametrize("failing", ["write", "flush"])
def test_need_check_bit_whose_going_failed(tmp_path: Path, tools: Tools, failing: str) -> None:
    """At its write, or the barrier after that: it is there before the next entry all the same."""
    image = new_image(tools, tmp_path / "d.qed", 4 * MIB)

    async def run(host: Host) -> None:
        node = await host.add("qed", "d", file=file_of(image))
        await host.write("d", 0, b"a" * 8192)
        broken: dict[str, Any] = {"driver": "error-inject", "node-name": "broken", "count": 1}
        broken |= {"operations": [failing], "skip": 2 if failing == "flush" else 0}
        insert = {"filter": broken, "node-name": "d", "child": "file"}
        await host.backend.transaction([("block-filter-insert", insert)])
        with pytest.raises(OSError):
            await node.check_image(None)  # which needs an image that is marked no more
        assert bool(features(image) & NEED_CHECK) == (failing == "write")
        await host.write("d", 2 * MIB, b"b" * 8192)
        assert features(image) & NEED_CHECK
        await host.backend.blockdev_del("d")
        assert not features(image) & NEED_CHECK

    with_host(run)
    found = tools.check(image, format="qed")
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text


def test_idle_image_is_sound_on_disk(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bit goes, and so does what the file has grown ahead; work begins anew."""
    monkeypatch.setattr(driver, "_IDLE", 0.05)
    image = new_image(tools, tmp_path / "d.qed", 4 * MIB)

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        for at in (0, MIB, 2 * MIB):
            await host.write("d", at, b"a" * 8192)
            assert features(image) & NEED_CHECK
            await host.until(lambda: not features(image) & NEED_CHECK)
            copy = tmp_path / "copy.qed"
            copy.write_bytes(image.read_bytes())
            found = tools.check(copy, format="qed")
            assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
            assert tools.content(copy, "qed")[at : at + 8192] == b"a" * 8192

    with_host(run)


@pytest.mark.parametrize("seed", range(2))
def test_random_operations_while_the_bit_comes_and_goes(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(driver, "_IDLE", 0.0)
    monkeypatch.setattr(driver, "_MIN_STEP", CLUSTER)
    monkeypatch.setattr(driver, "_MAX_STEP", CLUSTER)
    image, model = new_image(tools, tmp_path / "d.qed", 3 * MIB), bytearray(3 * MIB)

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        await work(host, model, random.Random(seed), 40)
        await host.backend.blockdev_del("d")

    with_host(run)
    found = tools.check(image, format="qed")
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    assert tools.content(image, "qed") == model


def test_image_that_was_not_closed_is_repaired(tmp_path: Path, tools: Tools) -> None:
    image = new_image(tools, tmp_path / "d.qed", 4 * MIB)
    tools.io(image, "write -P 7 0 64k", "write -P 8 3M 4k", options=("-f", "qed"))
    l1 = struct.unpack("<Q", image.read_bytes()[40:48])[0]
    l2 = struct.unpack("<Q", image.read_bytes()[l1 : l1 + 8])[0]
    length = image.stat().st_size
    patch(image, 16, "<Q", NEED_CHECK)
    patch(image, l2 + 8 * 100, "<Q", length + 64 * CLUSTER)  # the end of the file was lost
    with open(image, "ab") as file:
        file.truncate(length + 5 * CLUSTER)  # and these were never named

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        assert not features(image) & NEED_CHECK
        assert await host.read("d", 100 * CLUSTER, CLUSTER) == bytes(CLUSTER)
        assert await host.read("d", 0, 65536) == b"\7" * 65536
        await host.backend.blockdev_del("d")

    with_host(run)
    assert image.stat().st_size == length
    found = tools.check(image, format="qed")
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text


def test_cluster_named_twice_is_not_written_to(tmp_path: Path, tools: Tools) -> None:
    image = new_image(tools, tmp_path / "d.qed", MIB)
    tools.io(image, "write -P 7 0 8k", options=("-f", "qed"))
    l1 = struct.unpack("<Q", image.read_bytes()[40:48])[0]
    l2, *_ = struct.unpack("<Q", image.read_bytes()[l1 : l1 + 8])
    first = struct.unpack("<Q", image.read_bytes()[l2 : l2 + 8])[0]
    patch(image, l2 + 8, "<Q", first)
    patch(image, 16, "<Q", NEED_CHECK)
    before = image.read_bytes()

    async def run(host: Host) -> None:
        with refused("in use", "read-only=on"):
            await host.add("qed", "d", file=file_of(image))
        await host.add("qed", "d", file=file_of(image), read_only=True)
        assert await host.read("d", 0, 4096) == b"\7" * 4096

    with_host(run)
    assert image.read_bytes() == before


def test_a_long_file_with_nothing_in_it_takes_no_memory(tmp_path: Path, tools: Tools) -> None:
    """Its header says that it has 2^22 clusters, and that it has to be checked."""
    image, clusters = tmp_path / "d.qed", 1 << 22
    header = Header(CLUSTER, 1, clusters, NEED_CHECK, 0, 0, clusters * CLUSTER, MIB)
    image.write_bytes(header.pack())
    os.truncate(image, (clusters + 1) * CLUSTER)

    async def run(host: Host) -> None:
        tracemalloc.start()
        try:
            await host.add("qed", "d", file=file_of(image))
            assert tracemalloc.get_traced_memory()[1] < 16 * MIB
        finally:
            tracemalloc.stop()
        await host.write("d", 0, b"\1" * CLUSTER)
        assert await host.read("d", 0, 2 * CLUSTER) == b"\1" * CLUSTER + bytes(CLUSTER)

    with_host(run)


@pytest.mark.parametrize(
    ("offset", "form", "value", "text"),
    [
        (0, "<I", 0, "does not begin with"),
        (4, "<I", 2048, "cluster size"),
        (4, "<I", 4096 + 512, "cluster size"),
        (4, "<I", 1 << 27, "cluster size"),
        (8, "<I", 0, "table size"),
        (8, "<I", 3, "table size"),
        (8, "<I", 32, "table size"),
        (12, "<I", 0, "header size"),
        (12, "<I", 1 << 31, "header size"),
        (16, "<Q", 8, "bits 3"),
        (16, "<Q", 1 << 63, "bits 63"),
        (40, "<Q", 0, "L1 table"),
        (40, "<Q", 4096 + 512, "multiple of the cluster size"),
        (40, "<Q", (1 << 64) - 4096, "outside"),
        (48, "<Q", 1000, "multiple of 512"),
        (48, "<Q", (1 << 64) - 512, "more than the tables"),
    ],
)
def test_broken_headers_are_refused(
    tmp_path: Path, tools: Tools, offset: int, form: str, value: int, text: str
) -> None:
    image = new_image(tools, tmp_path / "d.qed", MIB)
    patch(image, offset, form, value)
    before = image.read_bytes()

    async def run(host: Host) -> None:
        with refused(text, str(image)):
            await host.add("qed", "d", file=file_of(image))

    with_host(run)
    assert image.read_bytes() == before


@pytest.mark.parametrize(("offset", "length"), [(0, 8), (64, 5000), (4090, 8), (4000, 0)])
def test_names_outside_the_header_are_refused(
    tmp_path: Path, tools: Tools, offset: int, length: int
) -> None:
    image = new_image(tools, tmp_path / "d.qed", MIB)
    patch(image, 16, "<Q", 1)
    patch(image, 56, "<II", offset, length)

    async def run(host: Host) -> None:
        with refused("backing file name"):
            await host.add("qed", "d", file=file_of(image))

    with_host(run)


def test_backing_format_is_not_guessed(tmp_path: Path, tools: Tools) -> None:
    base = tools.create(tmp_path / "base.qcow2", MIB, "qcow2")
    tools.io(base, "write -P 5 0 1M", options=("-f", "qcow2"))
    image = new_image(tools, tmp_path / "d.qed", MIB)
    name = base.name.encode()
    patch(image, 16, "<Q", 1)  # a backing file, and not marked raw
    patch(image, 56, "<II", 64, len(name))
    with open(image, "r+b") as file:
        file.seek(64)
        file.write(name)

    async def run(host: Host) -> None:
        with refused("not guessed"):
            await host.add("qed", "d", file=file_of(image))
        below = {"driver": "qcow2", "file": file_of(base)}
        await host.add("qed", "d", file=file_of(image), backing=below)
        assert await host.read("d", 0, MIB) == b"\5" * MIB
        await host.write("d", 512, b"z" * 512)
        expected = b"\5" * 512 + b"z" * 512 + b"\5" * (CLUSTER - 1024)
        assert await host.read("d", 0, CLUSTER) == expected

    with_host(run)


@pytest.mark.parametrize("entry", [2048, 1 << 62, 4096, 0])
def test_entries_that_lead_nowhere_fail_alone(tmp_path: Path, tools: Tools, entry: int) -> None:
    image = new_image(tools, tmp_path / "d.qed", 8 * MIB)
    tools.io(image, "write -P 7 0 4k", "write -P 8 5M 4k", options=("-f", "qed"))
    l1 = struct.unpack("<Q", image.read_bytes()[40:48])[0]
    l2 = struct.unpack("<Q", image.read_bytes()[l1 : l1 + 8])[0]
    patch(image, l2, "<Q", entry)

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        if entry:
            with pytest.raises(OSError):
                await host.read("d", 0, 512)
            assert host.named("BLOCK_IMAGE_CORRUPTED")
        else:
            assert await host.read("d", 0, 4096) == bytes(4096)
        assert await host.read("d", 5 * MIB, 4096) == b"\x08" * 4096

    with_host(run)


def test_tables_that_qemu_cannot_open_are_not_created(tmp_path: Path) -> None:
    async def run(host: Host) -> None:
        path = host.file("d.qed", 0)
        for cluster, table, text in (
            (65536, 1, "table-size=2"),
            (65536, 3, "table size"),
            (2 * MIB, 16, "use smaller ones"),
            (4 * MIB, 4, "use smaller ones"),
        ):
            options = {"driver": "qed", "file": file_of(Path(path)), "size": MIB}
            options |= {"table-size": table, "cluster-size": cluster}
            await host.backend.blockdev_create(f"j{table}", options)
            await host.until(
                lambda: all(j["status"] == "concluded" for j in host.backend.query_jobs())
            )
            assert text in host.backend.query_jobs()[-1]["error"]

    with_host(run)


@pytest.mark.parametrize("below", [False, True])
def test_map_and_check_of_an_image_in_use(tmp_path: Path, tools: Tools, below: bool) -> None:
    size = MIB + 1536
    base, options = tmp_path / "base.raw", {}
    if below:
        base.write_bytes(b"b" * (MIB // 2))
        options = {"backing": base.name}
    image = new_image(tools, tmp_path / "d.qed", size, **options)
    seen: list[dict[str, Any]] = []

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image))
        for at in (0, 10 * CLUSTER, 11 * CLUSTER + 512, 200 * CLUSTER, size - 512):
            await host.write("d", at, b"w" * 512)
        await submit(host, OP_WRITE_ZEROES, 40 * CLUSTER, None, 8 * CLUSTER)
        answer = await host.backend.block_image_map("d", 0, None, 1000)
        seen.extend(answer["extents"])
        assert "next-offset" not in answer
        checked = await host.backend.block_image_check("d")
        assert checked["allocated-clusters"] == 5
        assert "leaks" not in checked and "corruptions" not in checked
        # The guest goes on afterwards.
        await host.write("d", 100 * CLUSTER, b"x" * CLUSTER)
        assert await host.read("d", 100 * CLUSTER, CLUSTER) == b"x" * CLUSTER
        await host.backend.blockdev_del("d")

    with_host(run)
    assert [entry["start"] for entry in seen[1:]] == [
        entry["start"] + entry["length"] for entry in seen[:-1]
    ]
    assert seen[-1]["start"] + seen[-1]["length"] == size

    def kind(extents: list[dict[str, Any]], at: int) -> tuple[Any, ...]:
        entry = next(e for e in extents if e["start"] <= at < e["start"] + e["length"])
        offset = entry["offset"] + at - entry["start"] if "offset" in entry else None
        return entry["depth"] if not entry["zero"] else None, entry["zero"], entry["data"], offset

    theirs = json.loads(tools.img("map", "--output=json", "-f", "qed", image))
    for at in range(0, size, 512):
        if at // CLUSTER != 100:  # written after ours was asked
            assert kind(seen, at) == kind(theirs, at), at


def test_check_of_a_damaged_image_in_use(tmp_path: Path, tools: Tools) -> None:
    image = new_image(tools, tmp_path / "d.qed", MIB)
    tools.io(image, "write -P 7 0 16k", options=("-f", "qed"))
    l1 = struct.unpack("<Q", image.read_bytes()[40:48])[0]
    l2 = struct.unpack("<Q", image.read_bytes()[l1 : l1 + 8])[0]
    first = struct.unpack("<Q", image.read_bytes()[l2 : l2 + 8])[0]
    patch(image, l2 + 8, "<Q", first)  # one cluster twice, and another not at all
    patch(image, l2 + 8 * 50, "<Q", 1 << 40)  # and one that is not there
    before = image.read_bytes()

    async def run(host: Host) -> None:
        await host.add("qed", "d", file=file_of(image), read_only=True)
        checked = await host.backend.block_image_check("d")
        theirs = tools.check(image, format="qed")
        assert (checked["corruptions"], checked["leaks"]) == (theirs.corruptions, theirs.leaks)
        assert (checked["corruptions"], checked["leaks"]) == (2, 1)

    with_host(run)
    assert image.read_bytes() == before


def test_create_from_the_command_line(tmp_path: Path, tools: Tools) -> None:
    base, image = tmp_path / "base.raw", tmp_path / "d.qed"
    base.write_bytes(b"b" * MIB)
    words = ["-f", "qed", "-o", "cluster_size=8k,table_size=2", "-b", "base.raw", "-F", "raw"]
    assert main(["create", *words, str(image), "2M"]) == 0
    facts = json.loads(tools.img("info", "--output=json", "-f", "qed", image))
    assert facts["virtual-size"] == 2 * MIB
    assert facts["cluster-size"] == 8192
    assert facts["backing-filename"] == "base.raw"
    assert facts["backing-filename-format"] == "raw"
    assert tools.content(image, "qed") == b"b" * MIB + bytes(MIB)


@pytest.mark.parametrize("operations", [["write"], ["flush"], ["write", "flush"]])
@pytest.mark.parametrize("below", [False, True])
def test_failing_storage(tmp_path: Path, tools: Tools, below: bool, operations: list[str]) -> None:
    """What a guest reads after failed writes is what is there when the image is opened again."""
    base, options, size = tmp_path / "base.raw", {}, 4 * MIB
    if below:
        base.write_bytes(b"b" * size)
        options = {"backing": base.name}
    image, rnd, failed = new_image(tools, tmp_path / "d.qed", size, **options), random.Random(1), 0

    async def run(host: Host) -> None:
        nonlocal failed
        await host.add("file", "f", filename=str(image))
        await host.add("error-inject", "x", file="f", operations=operations, every=5, skip=20)
        await host.add("qed", "d", file="x")
        for _ in range(40):
            jobs = []
            for _ in range(6):
                at, length = rnd.randrange(0, size // 512 - 64) * 512, rnd.choice((512, 9216))
                jobs.append(submit(host, OP_WRITE, at, rnd.randbytes(length), length))
            failed += sum(
                isinstance(result, OSError)
                for result in await asyncio.gather(*jobs, return_exceptions=True)
            )
        seen = await host.read("d", 0, size)
        await host.backend.blockdev_del("d")
        await host.backend.blockdev_del("x")
        await host.backend.blockdev_del("f")
        assert tools.content(image, "qed") == seen
        await host.add("qed", "d", file=file_of(image))  # repaired, if it could not be closed
        assert await host.read("d", 0, size) == seen

    with_host(run)
    assert failed or operations == ["flush"]
    found = tools.check(image, format="qed")
    assert (found.corruptions, found.errors) == (0, 0), found.text
