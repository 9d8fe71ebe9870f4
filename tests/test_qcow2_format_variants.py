# SPDX-License-Identifier: GPL-2.0-or-later
"""Check, repair and internal snapshots on every kind of image that QEMU makes, judged by QEMU."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from crash import Tools, all_tools, newest_tools
from file_storage import FileStorage
from qcow2_memory import MemoryDisk
from qcow2_variants import VARIANTS, Variant, make

from vhostblk.image.check import Repair
from vhostblk.nodes.qcow2 import bitmaps, facts, snapshots
from vhostblk.nodes.qcow2.check import CheckResult, check, repair_dirty
from vhostblk.nodes.qcow2.geometry import COPIED, OFFSET_MASK
from vhostblk.nodes.qcow2.header import DIRTY, Header
from vhostblk.nodes.qcow2.layout import (
    bytes_of,
    entry_words,
    patch_header,
    read_header,
    words_of,
)
from vhostblk.schema import VhostblkError

COUNTED = (
    "check-errors",
    "corruptions",
    "leaks",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)
SNAPSHOTS = [v for v in VARIANTS if not v.has_data_file and v.name not in ("refcount-1",)]


def on(path: Path, do: Callable[[FileStorage, Header], Coroutine[Any, Any, Any]]) -> Any:
    """Run something on an image at rest."""

    async def go() -> Any:
        with FileStorage(path, writable=True) as file:
            return await do(file, await read_header(file))

    return asyncio.run(go())


def checked(path: Path, repair: Repair = "none") -> CheckResult:
    async def go(file: FileStorage, header: Header) -> CheckResult:
        return await check(file, header, repair)

    result = on(path, go)
    assert isinstance(result, CheckResult)
    return result


def edit(path: Path, what: str, name: str) -> None:
    async def go(file: FileStorage, header: Header) -> None:
        editor = snapshots.Editor(file, header)
        await getattr(editor, what)(name)
        assert editor.header == await read_header(file)

    on(path, go)


def report(tools: Tools, path: Path) -> dict[str, int]:
    text = tools.check(path).text
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text[text.find("{\n") :])[0]
    return {name: found.get(name, 0) for name in COUNTED}


def ours(path: Path) -> dict[str, int]:
    found = checked(path).describe()
    return {name: found.get(name, 0) for name in COUNTED}


def assert_clean(tools: Tools, path: Path) -> None:
    found = tools.check(path)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    result = checked(path)
    assert result.clean, result.messages


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_check_counts_what_qemu_counts(tmp_path: Path, variant: Variant) -> None:
    image = make(tmp_path, variant, newest_tools(), seed=11)
    for tools in all_tools():
        if tools.version >= variant.needs:
            assert ours(image.path) == report(tools, image.path)


@pytest.mark.parametrize("variant", SNAPSHOTS, ids=lambda v: v.name)
def test_snapshots_ours_and_qemus(tmp_path: Path, variant: Variant) -> None:
    tools = newest_tools()
    image = make(tmp_path, variant, tools, seed=5)
    path, first = image.path, image.content
    edit(path, "create", "ours")
    assert_clean(tools, path)
    tools.io(path, "write -P 7 0 1M", "write -z 1M 512k", "write -P 9 3M 70k", "discard 2M 64k")
    assert_clean(tools, path)
    second = tools.content(path)
    assert second != first
    kept = {**image.snapshots, "ours": first}
    if variant.name != "refcount-2":  # which cannot count further
        tools.img("snapshot", "-c", "theirs", path)
        kept["theirs"] = second
    for name, content in kept.items():
        assert tools.content(path, "qcow2", "-l", f"snapshot.name={name}") == content
    current = second
    if variant.name != "refcount-2":
        edit(path, "apply", "ours")
        assert_clean(tools, path)
        current = first
        assert tools.content(path) == first
        tools.io(path, "write -P 3 512k 1M")
        current = tools.content(path)
    tools.img("snapshot", "-d", "ours", path)
    del kept["ours"]
    for name in list(kept):
        edit(path, "delete", name)
        assert_clean(tools, path)
        del kept[name]
        for other, content in kept.items():
            assert tools.content(path, "qcow2", "-l", f"snapshot.name={other}") == content
    assert tools.content(path) == current
    assert on(path, _no_snapshots)


async def _no_snapshots(file: FileStorage, header: Header) -> bool:
    return header.nb_snapshots == 0 and header.snapshots_offset == 0


def test_what_cannot_be_counted_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    variant = next(v for v in VARIANTS if v.name == "refcount-1")
    path = make(tmp_path, variant, newest_tools(), seed=1).path
    before = path.read_bytes()
    with pytest.raises(OSError, match="1 bit"):
        edit(path, "create", "s")
    after = path.read_bytes()
    assert after[: len(before)] == before
    assert_clean(newest_tools(), path)


def test_snapshots_are_named_once_and_sizes_come_back(tmp_path: Path) -> None:
    tools = newest_tools()
    path = tools.create(tmp_path / "disk.qcow2", "1M", cluster_size="4k")
    tools.io(path, "write -P 1 0 1M")
    small = tools.content(path)
    edit(path, "create", "small")
    for name in ("small", "1"):
        with pytest.raises(VhostblkError, match="exists already"):
            edit(path, "create", name)
    tools.img("resize", "-f", "qcow2", path, "40M")
    tools.io(path, "write -P 2 39M 1M")
    large = tools.content(path)
    edit(path, "create", "large")
    for name, content in (("small", small), ("large", large), ("small", small)):
        edit(path, "apply", name)
        assert_clean(tools, path)
        assert tools.content(path) == content
        assert tools.info(path)["virtual-size"] == len(content)
    found = {entry["name"]: entry for entry in tools.info(path)["snapshots"]}
    assert list(found) == ["small", "large"]

    async def listed(file: FileStorage, header: Header) -> list[dict[str, Any]]:
        table = await snapshots.read_table(file, header)
        return [one.describe() for one in table.snapshots]

    assert on(path, listed) == list(found.values())
    with pytest.raises(VhostblkError, match="does not exist"):
        edit(path, "delete", "none")


@pytest.mark.parametrize("what", ["create", "apply", "delete"])
@pytest.mark.parametrize("variant", ["snapshots", "compressed-snapshots", "refcount-4"])
def test_power_cut_at_every_write_of_a_snapshot_operation(
    tmp_path: Path, what: str, variant: str
) -> None:
    """Before the header is written the image is the old one, and then it is the new one."""
    tools = newest_tools()
    image = make(tmp_path, next(v for v in VARIANTS if v.name == variant), tools, seed=3)
    before = image.path.read_bytes()
    disk = MemoryDisk(bytearray(before))

    async def go() -> None:
        editor = snapshots.Editor(disk, await read_header(disk))
        await getattr(editor, what)("new" if what == "create" else "snap0")

    asyncio.run(go())
    rng = random.Random(2)
    commit = max(i for i, event in enumerate(disk.log) if event is not None)
    assert disk.log[commit - 1] is None and disk.log[-1] is None
    assert disk.log[commit][0] < 104 and len(disk.log) > 4
    seen: set[bytes] = set()
    for events in range(len(disk.log) + 1):
        for lost in (None, rng):
            left = disk.cut(before, events, lost)
            state = MemoryDisk(bytearray(left))

            async def judge(state: MemoryDisk = state) -> CheckResult:
                return await check(state, await read_header(state))

            result = asyncio.run(judge())
            assert not (result.corruptions or result.leaks), result.messages
            seen.add(left[:104])
            if events in (1, commit, len(disk.log)):
                image.path.write_bytes(left)
                assert_clean(tools, image.path)
    assert seen == {before[:104], bytes(disk.data[:104])}
    new = what == "apply"
    assert tools.content(image.path) == (image.snapshots["snap0"] if new else image.content)


# ---- damage


async def damage(file: FileStorage, header: Header, rng: random.Random) -> None:
    """Wrong counts, wrong flags, entries that name other clusters, tables that are gone."""
    size, step = header.cluster_size, entry_words(header)
    l1 = words_of(await file.read(header.l1_table_offset, 8 * header.l1_size))
    blocks = [
        word
        for word in words_of(
            await file.read(header.refcount_table_offset, header.refcount_table_clusters * size)
        )
        if word
    ]
    for _ in range(rng.randint(1, 4)):
        what = rng.choice(("count", "flag", "swap", "l1 flag", "forget", "block", "beyond"))
        if what == "count":
            at = rng.choice(blocks) + rng.randrange(min(size, 64))
            await file.write(at, bytes([rng.randrange(256)]))
        elif what == "block":
            entry = header.refcount_table_offset + 8 * rng.randrange(len(blocks))
            await file.write(entry, struct.pack(">Q", rng.choice((0, size * rng.randrange(16)))))
        elif what == "l1 flag":
            index = rng.choice([index for index, word in enumerate(l1) if word])
            l1[index] ^= COPIED
            await file.write(header.l1_table_offset, bytes_of(l1))
        else:
            table = rng.choice([word & OFFSET_MASK for word in l1 if word])
            words = words_of(await file.read(table, size))
            used = [index for index in range(0, len(words), step) if words[index]]
            if not used:
                continue
            index = rng.choice(used)
            words[index] = {
                "flag": words[index] ^ COPIED,
                "swap": words[rng.choice(used)],
                "forget": 0,
                "beyond": words[index] & ~OFFSET_MASK | 1 << 45,
            }[what]
            await file.write(table, bytes_of(words))


@pytest.mark.parametrize(
    "name", ["default", "v2-4k", "snapshots", "compressed-snapshots", "extended", "refcount-4"]
)
def test_damage_is_counted_as_by_qemu_and_repaired(tmp_path: Path, name: str) -> None:
    tools = newest_tools()
    path = make(tmp_path, next(v for v in VARIANTS if v.name == name), tools, seed=9).path
    good = path.read_bytes()
    rng = random.Random(name)
    repaired = 0
    for _ in range(8):
        path.write_bytes(good)
        on(path, lambda file, header: damage(file, header, rng))
        damaged = path.read_bytes()
        theirs = report(tools, path)
        assert ours(path) == theirs
        result = checked(path, "leaks")
        assert result.corruptions >= 0 and tools.check(path).leaks == result.leaks
        path.write_bytes(damaged)
        result = checked(path, "all")
        after = tools.check(path)
        assert (after.corruptions, after.leaks) == (result.corruptions, result.leaks), after.text
        repaired += result.clean
    assert repaired, "no damage could be repaired: the test shows nothing"


def test_nothing_is_freed_while_an_entry_points_nowhere(tmp_path: Path) -> None:
    tools = newest_tools()
    path = tools.create(tmp_path / "disk.qcow2", "1M", cluster_size="4k")
    tools.io(path, "write -P 1 0 1M")

    async def break_it(file: FileStorage, header: Header) -> None:
        (entry,) = words_of(await file.read(header.l1_table_offset, 8))
        await file.write(header.l1_table_offset, struct.pack(">Q", entry | 1 << 50))

    on(path, break_it)
    result = checked(path, "all")
    assert result.corruptions and result.leaks and not result.leaks_fixed

    async def mend(file: FileStorage, header: Header) -> None:
        (entry,) = words_of(await file.read(header.l1_table_offset, 8))
        await file.write(header.l1_table_offset, struct.pack(">Q", entry & ~(1 << 50)))

    on(path, mend)
    assert checked(path, "all").clean
    tools.io(path, "read -P 1 0 1M")
    assert_clean(tools, path)


def test_dirty_images_are_repaired_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """An image with lazy refcounts whose program was killed, and cuts in the repair."""
    tools = newest_tools()
    path = tools.create(tmp_path / "d.qcow2", "4M", cluster_size="4k", lazy_refcounts="on")
    tools.io(path, "write -P 5 0 1M", "flush")
    content = tools.content(path)

    async def spoil(file: FileStorage, header: Header) -> None:
        await patch_header(file, header, incompatible=header.incompatible | DIRTY)
        table = words_of(await file.read(header.refcount_table_offset, 8))
        block = bytearray(await file.read(table[0], 4096))
        block[60:200] = bytes(140)
        block[400:440] = b"\0\1" * 20
        await file.write(table[0], bytes(block))

    on(path, spoil)
    before = path.read_bytes()
    disk = MemoryDisk(bytearray(before))

    async def repair() -> Header:
        return await repair_dirty(disk, await read_header(disk))

    assert not asyncio.run(repair()).dirty
    rng = random.Random(1)
    for events in range(len(disk.log) + 1):
        left = disk.cut(before, events, rng)
        path.write_bytes(left)
        dirty = on(path, _is_dirty)
        # As long as anything may be wrong the image says so, and can be repaired again.
        assert dirty or checked(path).clean
        if dirty:
            on(path, repair_dirty)
        assert_clean(tools, path)
        assert tools.content(path) == content


async def _is_dirty(file: FileStorage, header: Header) -> bool:
    return header.dirty


# ---- bitmaps


def test_enabled_bitmaps_become_in_use_and_disabled_ones_stay(tmp_path: Path) -> None:
    tools = newest_tools()
    path = tools.create(tmp_path / "disk.qcow2", "4M")
    for name in ("enabled", "disabled"):
        tools.img("bitmap", "--add", path, name)
    tools.img("bitmap", "--disable", path, "disabled")

    def flags() -> dict[str, list[str]]:
        data = tools.info(path)["format-specific"]["data"]
        return {entry["name"]: entry["flags"] for entry in data["bitmaps"]}

    def ours() -> dict[str, list[str]]:
        async def go(file: FileStorage, header: Header) -> dict[str, list[str]]:
            directory = await bitmaps.read_directory(file, header)
            assert directory is not None
            return {one.name: one.describe()["flags"] for one in directory.bitmaps}

        found: dict[str, list[str]] = on(path, go)
        return found

    assert ours() == flags() == {"enabled": ["auto"], "disabled": []}
    on(path, bitmaps.mark_in_use)
    assert ours() == flags() == {"enabled": ["in-use", "auto"], "disabled": []}
    assert_clean(tools, path)
    on(path, lambda file, header: bitmaps.mark_in_use(file, header, every=True))
    assert ours() == flags() == {"enabled": ["in-use", "auto"], "disabled": ["in-use"]}
    for name in ("enabled", "disabled"):
        tools.img("bitmap", "--remove", path, name)
    assert_clean(tools, path)


def test_unknown_autoclear_bits_are_cleared(tmp_path: Path) -> None:
    path = newest_tools().create(tmp_path / "disk.qcow2", "4M")

    async def go(file: FileStorage, header: Header) -> int:
        header = await patch_header(file, header, autoclear=1 << 40)
        header = await bitmaps.mark_in_use(file, header)
        assert header == await read_header(file)
        return header.autoclear

    assert on(path, go) == 0


# ---- facts


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_info_is_what_qemu_says(tmp_path: Path, variant: Variant) -> None:
    tools = newest_tools()
    image = make(tmp_path, variant, tools, seed=31)
    theirs = tools.info(image.path)

    async def said(file: FileStorage, header: Header) -> dict[str, Any]:
        return facts.info(header, await facts.read_tables(file, header))

    found = on(image.path, said)
    for name, value in found.items():
        assert theirs.get(name) == value, name
    for name in ("snapshots", "backing-filename"):
        assert (name in theirs) == (name in found)


@pytest.mark.parametrize("cluster", ["512", "4k"])
def test_snapshots_of_tables_that_are_full_and_in_order(tmp_path: Path, cluster: str) -> None:
    """They are counted as one run; a run with a gap, a shared cluster or a zero is not."""
    tools = newest_tools()
    path = tools.create(
        tmp_path / "disk.qcow2", "8M", cluster_size=cluster, preallocation="metadata"
    )
    tools.io(path, "write -P 1 0 8M")
    contents = {}
    for number, command in enumerate(("write -P 2 1M 4k", "write -z 2M 8k", "discard 3M 4k")):
        contents[f"s{number}"] = tools.content(path)
        edit(path, "create", f"s{number}")
        assert_clean(tools, path)
        tools.io(path, command)
        assert_clean(tools, path)
    for name in ("s1", "s0", "s2"):
        edit(path, "apply", name)
        assert_clean(tools, path)
        assert tools.content(path) == contents[name]
    for name in ("s0", "s2", "s1"):
        edit(path, "delete", name)
        assert_clean(tools, path)
    assert tools.content(path) == contents["s2"]
