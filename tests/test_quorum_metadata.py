# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: the file in which states survive, and the commands that show and change them."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import uuid
from pathlib import Path

import pytest
from in_process import MIB, Host, refused
from quorum_legs import BLOCK, Faulty, content, quorum, restart, run, states, until_states

from vhostblk.nodes.quorum import metadata as metadata_module
from vhostblk.nodes.quorum.metadata import SLOT, Claim, Metadata, boot
from vhostblk.schema import VhostblkError


def test_a_file_that_is_damaged() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        Faulty.faults["a"] = {"write": errno.EIO}
        await host.write("q", 0, b"1" * 512)
        await restart(host)
        path = Path(host.path("states"))
        good = path.read_bytes()
        for bad, text in (
            (b"", "is damaged"),
            (good[:100], "is damaged"),
            (good[:-4096], "and should have"),
            (b"QFI\xfb" + good[4:], "no metadata of a quorum"),
            (good[:8] + b"\2" + good[9:], "version 2"),
        ):
            path.write_bytes(bad)
            with refused("Quorum metadata", text):
                await quorum(host)
            for node in ("c", "b", "a", "file-c", "file-b", "file-a"):
                await host.backend.blockdev_del(node)
        path.write_bytes(good)
        assert states(await quorum(host, auto_rebuild=False)) == "sii"

    run(test)


def test_nonsense_is_an_error_and_nothing_worse() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await restart(host)
        path = Path(host.path("states"))
        good = path.read_bytes()
        chance = random.Random(1)
        for leg in "abc":
            await host.add("file", leg, filename=host.path(leg))
        options = {"children": list("abc"), "vote_threshold": 2, "auto_rebuild": False,
                   "metadata_file": str(path)}  # fmt: skip
        for _ in range(60):
            damaged = bytearray(good)
            for _ in range(chance.randrange(1, 8)):
                damaged[chance.randrange(5000)] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                node = await host.add("quorum", "q", **options)
            except VhostblkError:
                continue
            assert set(states(node)) <= {"i", "s"}
            await host.backend.blockdev_del("q")

    run(test)


def test_a_state_that_does_not_exist_is_not_believed() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await restart(host)
        path = Path(host.path("states"))
        content = bytearray(path.read_bytes())
        header = int.from_bytes(content[12:16], "little")
        content[header + SLOT] = 77  # the second leg's
        path.write_bytes(content)
        assert states(await quorum(host, auto_rebuild=False)) == "isi"

    run(test)


def test_a_new_file_with_the_name_and_inode_of_a_leg() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await restart(host)
        inode = os.stat(host.path("b")).st_ino
        os.unlink(host.path("b"))
        host.file("b")
        if os.stat(host.path("b")).st_ino != inode:
            pytest.skip("this file system takes another inode")
        assert states(await quorum(host, auto_rebuild=False)) == "isi"

    run(test)


def test_a_file_about_other_legs() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        await restart(host)
        for leg in "abc":
            os.rename(host.path(leg), host.path(f"old-{leg}"))
        with refused("none of them is among the children", "remove it if those are equal"):
            await quorum(host)
        for node in ("c", "b", "a", "file-c", "file-b", "file-a"):
            await host.backend.blockdev_del(node)
        # One that is known: the others have to prove themselves.
        os.rename(host.path("old-b"), host.path("b"))
        assert states(await quorum(host, auto_rebuild=False)) == "sis"

    run(test)


def test_a_file_that_is_in_use() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        for leg in "def":
            await host.add("file", leg, filename=host.file(leg))
        with refused("is in use by another quorum"):
            await host.add("quorum", "r", children=list("def"), vote_threshold=2,
                           metadata_file=host.path("states"))  # fmt: skip

    run(test)


def test_legs_in_another_order_and_overlays_keep_their_states() -> None:
    async def test(host: Host) -> None:
        await quorum(host)
        Faulty.faults["c"] = {"write": errno.EIO}
        await host.write("q", 3 * BLOCK, b"1" * 512)
        await restart(host)
        node = await quorum(host, "cab", auto_rebuild=False)
        assert states(node) == "sii" and node.describe_legs()[0]["missed-bytes"] == BLOCK
        await host.export("q")
        await host.backend.transaction([("blockdev-snapshot-sync", {"device": "e"})])
        assert states(node) == "sii" and node.describe_legs()[0]["missed-bytes"] == BLOCK
        async with host.device() as guest:
            await guest.write(0, b"2" * BLOCK)
        assert node.describe_legs()[0]["missed-bytes"] == 2 * BLOCK

    run(test)


def test_after_a_boot_whoever_is_out_may_have_missed_anything() -> None:
    """A power cut takes what was not flushed: bits of dirty maps, data of a leg that is out."""

    async def test(host: Host) -> None:
        await quorum(host)
        await host.write("q", 0, b"1" * BLOCK)
        Faulty.faults["a"] = {"write": errno.EIO}
        await host.write("q", 3 * BLOCK, b"2" * BLOCK)
        Faulty.faults.clear()
        await restart(host)
        size = len(content(host, "a"))
        path = Path(host.path("states"))
        assert path.read_bytes().count(boot().encode()) == 1
        path.write_bytes(path.read_bytes().replace(boot().encode(), str(uuid.uuid4()).encode()))
        Path(host.path("a")).write_bytes(bytes(size))  # nothing that it was given was flushed
        node = await quorum(host)
        await until_states(host, node, "iii")
        assert content(host, "a") == content(host, "b")
        # That has been the reason for its last time.
        await restart(host)
        node = await quorum(host)
        assert states(node) == "iii"

    run(test)


def torn(good: bytes) -> list[bytes]:
    """What a power cut may leave of a file that nobody has synced."""
    other = good.replace(boot().encode(), str(uuid.uuid4()).encode())
    flags = other[:20] + bytes(4) + other[24:]
    return [bytes(len(good)), flags[:4096] + bytes(len(good) - 4096), flags]


@pytest.mark.parametrize("kind", range(3))
def test_a_new_file_that_had_not_reached_the_disk(kind: int) -> None:
    """A power cut right after a snapshot: the file before that says who had missed something."""

    async def test(host: Host) -> None:
        node = await quorum(host, auto_rebuild=False)
        await host.write("q", 0, b"1" * BLOCK)
        Faulty.faults["a"] = {"write": errno.EIO}
        await host.write("q", 3 * BLOCK, b"2" * BLOCK)
        await host.until(lambda: node.metadata.whole)
        sync, held = Metadata.sync, asyncio.Event()

        async def slow(self: Metadata) -> None:
            await held.wait()
            await sync(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Metadata, "sync", slow)
            await host.backend.transaction(
                [("blockdev-snapshot-sync", {"node-name": "b", "snapshot-file": host.path("over")})]
            )
            path = Path(host.path("states"))
            new, old = path.read_bytes(), Path(f"{path}.old").read_bytes()
            held.set()
            await host.until(lambda: node.metadata.whole)
        assert not Path(f"{path}.old").exists()
        await restart(host)
        Path(f"{path}.old").write_bytes(old.replace(boot().encode(), str(uuid.uuid4()).encode()))
        path.write_bytes(torn(new)[kind])
        Faulty.faults.clear()
        node = await quorum(host, auto_rebuild=False)
        assert states(node)[0] == "s"
        assert node.describe_legs()[0]["missed-bytes"] == node.size
        await host.until(lambda: node.metadata.whole)
        assert not Path(f"{path}.old").exists()

    run(test)


@pytest.mark.parametrize("kind", range(3))
def test_the_first_file_had_not_reached_the_disk(kind: int) -> None:
    """Then no guest was told that a leg had missed something: all are what they were."""

    async def test(host: Host) -> None:
        await quorum(host)
        await restart(host)
        path = Path(host.path("states"))
        path.write_bytes(torn(path.read_bytes())[kind])
        assert states(await quorum(host)) == "iii"

    run(test)


def test_another_one_is_faster() -> None:
    """Two that begin with the same file at the same time: one of them has it."""

    async def test(host: Host) -> None:
        path = host.path("states")
        legs = [("a", ("a",)), ("b", ("b",))]
        first = Metadata(path, MIB, 16, legs, 1)
        with refused("is in use by another quorum"):
            Metadata(path, MIB, 16, legs, 1)  # the file that is to take its place
        first.publish(old_is_whole=False)
        with refused("is in use by another quorum"):
            Claim(path)
        first.close()
        claim = Claim(path)
        with refused("is in use by another quorum"):
            Claim(path)  # one that looks at what there is, too
        claim.release()
        # A file that was replaced before it was locked is not taken for the one of that name.
        opened = metadata_module._open

        def late(name: str) -> int:
            fd = opened(name)
            patch.undo()
            other = Metadata(path, MIB, 16, legs, 7)
            other.publish(old_is_whole=False)
            other.close()
            return fd

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metadata_module, "_open", late)
            claim = Claim(path)
        assert claim.recorded is not None and claim.recorded.generation == 7
        claim.release()

    run(test)


def test_a_larger_disk() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        Faulty.faults["c"] = {"write": errno.EIO}
        await host.write("q", 0, b"1" * 512)
        await host.backend.block_resize("q", 2 * MIB)
        assert states(node) == "iif" and node.size == 2 * MIB
        assert node.describe_legs()[2]["missed-bytes"] == BLOCK + MIB
        await host.write("q", 2 * MIB - 512, b"2" * 512)
        Faulty.faults.clear()
        await host.command("quorum-rebuild", node_name="q", leg="children.2")
        await until_states(host, node, "iii")
        assert await host.read("c", 2 * MIB - 512, 512) == b"2" * 512

    run(test)


def test_commands() -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.add("file", "d", filename=host.file("d"))
        await host.write("q", 0, os.urandom(MIB))
        assert await host.command("query-quorum") == [
            {
                "node-name": "q",
                "vote-threshold": 2,
                "discard-granularity": 1,
                "legs": [
                    {"child": f"children.{i}", "node-name": leg, "state": "in-sync",
                     "missed-bytes": 0, "discard-granularity": 1}
                    for i, leg in enumerate("abc")
                ],
            }
        ]  # fmt: skip
        await host.command("x-blockdev-change", parent="q", node="d")
        await until_states(host, node, "iiii")
        await host.command("x-blockdev-change", parent="q", child="children.0")
        await host.command("x-blockdev-change", parent="q", child="b")
        assert [leg.node.name for leg in node.legs] == ["c", "d"]
        with refused("threshold may not exceed children count"):
            await host.command("x-blockdev-change", parent="q", child="children.3")
        with refused("parameters child and node are in conflict"):
            await host.command("x-blockdev-change", parent="q", child="c", node="a")
        with refused("Either child or node must be specified"):
            await host.command("x-blockdev-change", parent="q")
        with refused("has no leg 'a'; its legs: c, d"):
            await host.command("quorum-rebuild", node_name="q", leg="a")
        with refused("Node 'd' is a 'file' and no quorum"):
            await host.command("quorum-scrub", node_name="d")
        await host.command("x-blockdev-change", parent="q", node="a")
        await until_states(host, node, "iii")
        await host.until(lambda: not host.backend.query_block_jobs())
        job = await host.command("quorum-scrub", node_name="q", speed=1)
        [entry] = host.backend.query_block_jobs()
        assert entry["device"] == job["job-id"] and entry["type"] == "quorum-scrub"

    run(test)


def test_a_disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(host: Host) -> None:
        node = await quorum(host)
        await host.write("q", 0, b"1" * 512)  # nobody is out: nothing has to be recorded
        Faulty.faults["c"] = {"write": errno.EIO}

        def fsync(fd: int) -> None:
            raise OSError(errno.EIO, "the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            # Who would be told that it is safe could be wrong after a power cut.
            with pytest.raises(OSError):
                await host.write("q", 0, b"2" * 512)
            assert states(node) == "iif"
            with pytest.raises(OSError):
                await host.write("q", 0, b"3" * 512)
            assert await host.read("q", 0, 512) == b"3" * 512
        await host.until(lambda: node.legs[2].handle.recorded)
        await host.write("q", 0, b"4" * 512)
        assert await host.read("q", 0, 512) == b"4" * 512

    run(test)


def test_a_disk_that_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(host: Host) -> None:
        def fsync(fd: int) -> None:
            raise OSError(errno.EIO, "the disk is gone")

        monkeypatch.setattr(os, "fsync", fsync)
        await quorum(host)
        Faulty.faults["c"] = {"write": errno.EIO}
        with pytest.raises(OSError):
            await host.write("q", 0, b"2" * 512)

    run(test)  # which ends


def test_without_a_file_that_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        def told() -> list[str]:
            return [r.getMessage() for r in caplog.records if "metadata-file" in r.getMessage()]

        for leg in "abc":
            await host.add("file", leg, filename=host.file(leg))
        options = {"children": list("abc"), "vote_threshold": 2}
        await host.add("quorum", "q", **options, metadata_file=host.path("states"))
        await host.backend.blockdev_del("q")
        await host.add("quorum", "q", **options, read_only=True)
        await host.backend.blockdev_del("q")
        assert told() == []
        await host.add("quorum", "q", **options)
        [line] = told()
        assert "'q'" in line and "--state" in line

    run(test)


def test_a_place_that_cannot_be_written() -> None:
    async def test(host: Host) -> None:
        with refused("Quorum metadata", "cannot be written: No such file or directory"):
            await quorum(host, metadata_file=host.path("nowhere/states"))

    run(test)
