# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots below an encrypted disk whose header is elsewhere: what reads them later?

A key slot says nothing about the data, so that any header of the same key will do. Re-encryption
changes the key, and how far it is: an image then needs the header of its own moment.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from crash import newest_tools
from in_process import Host, refused, with_host
from luks_headers import MIB, cryptsetup, opens
from test_luks_reencrypt import (
    CHEAP,
    ONE,
    TWO,
    command,
    content_of,
    disk,
    ended_well,
    formatted,
    until_done,
)

from vhostblk.schema import VhostblkError

DISK = 4 * MIB


class Detached:
    """A disk in qcow2 with its header in a file, and copies of both."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.content = os.urandom(DISK)
        self.header = directory / "header"

    async def make(self) -> None:
        with open(self.directory / "whole", "wb") as file:
            file.truncate(DISK)
        cryptsetup("luksFormat", "--type", "luks2", "--sector-size", "512", "--pbkdf", "pbkdf2",
                   "--pbkdf-force-iterations", "1000", "--header", self.header,
                   self.directory / "whole", key=ONE)  # fmt: skip
        host = self.host
        await host.add("file", "f", filename=str(self.directory / "whole"))
        await host.add("raw", "base", file="f")
        await host.add("file", "h", filename=str(self.header))
        await disk(host, self.header, file="base", header="h")
        await host.write("disk", 0, self.content)
        await host.export("disk", "e")

    def cover(self, number: int) -> tuple[str, dict[str, Any]]:
        path = str(self.directory / f"{number}.qcow2")
        return "blockdev-snapshot-sync", {"device": "e", "snapshot-file": path}

    def cover_header(self, name: str = "h") -> tuple[str, dict[str, Any]]:
        path = str(self.directory / "header.qcow2")
        return "blockdev-snapshot-sync", {"node-name": name, "snapshot-file": path}


def reads(directory: Path, header: Path, secret: str) -> bytes:
    """What an image of the disk says with a header. Both are copies that may be written to."""
    found: list[bytes] = []

    async def look(host: Host) -> None:
        for id, words in (("one", ONE), ("two", TWO)):
            given = {"qom-type": "secret", "id": id, "data": words.decode()}
            await host.backend.object_add(given)
        await host.add("file", "h", filename=str(header))
        await host.add("luks", "disk", key_secret=secret, header="h",
                       file={"driver": "file", "filename": str(directory)})  # fmt: skip
        found.append(await host.read("disk", 0, DISK))

    with_host(look)
    return found[0]


def test_a_key_slot_that_changes_after_a_snapshot(tmp_path: Path) -> None:
    """The snapshot opens with the passphrases of now: it is the same key."""
    before: list[bytes] = []

    async def test(host: Host) -> None:
        made = Detached(host, tmp_path)
        await made.make()
        before.append(made.content)
        await host.backend.transaction([made.cover(1)])
        await host.write("disk", 0, os.urandom(DISK))
        await command(host, "luks-key-slot-rotate", old_secret="one", new_secret="two", **CHEAP)

    with_host(test)
    assert reads(tmp_path / "whole", tmp_path / "header", "two") == before[0]
    assert not opens(tmp_path / "whole", ONE, "--header", tmp_path / "header")


def test_a_header_inside_is_part_of_the_snapshot(tmp_path: Path) -> None:
    """It opens with the passphrases of its moment, the disk with those of now."""
    base, overlay = tmp_path / "base", tmp_path / "1.qcow2"
    before = os.urandom(DISK)
    formatted(base, size=DISK)

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=str(base))
        await host.add("raw", "base", file="f")
        await disk(host, base, file="base")
        await host.write("disk", 0, before)
        await host.export("disk", "e")
        given = {"device": "e", "snapshot-file": str(overlay)}
        await host.backend.transaction([("blockdev-snapshot-sync", given)])
        await command(host, "luks-key-slot-rotate", old_secret="one", new_secret="two", **CHEAP)
        await host.write("disk", 0, bytes(DISK))

    with_host(test)
    assert opens(base, ONE)
    assert not opens(base, TWO)
    assert content_of(base, DISK) == before
    (tmp_path / "now").write_bytes(newest_tools().content(overlay))
    assert opens(tmp_path / "now", TWO)
    assert not opens(tmp_path / "now", ONE)


def test_a_new_key_with_snapshots_below(tmp_path: Path) -> None:
    """It would make them unreadable, which somebody has to want."""
    before: list[bytes] = []

    async def test(host: Host) -> None:
        made = Detached(host, tmp_path)
        await made.make()
        before.append(made.content)
        await host.backend.transaction([made.cover(1)])
        with refused("detached header ('h')", "only the old key opens: base. ", "copy the header"):
            await command(host, "luks-reencrypt", **CHEAP)
        assert not list(host.backend.jobs)
        shutil.copy(made.header, tmp_path / "copy")
        await command(host, "luks-reencrypt", force=True, **CHEAP)
        await until_done(host)
        assert ended_well(host)
        assert await host.read("disk", 0, DISK) == made.content

    with_host(test)
    assert reads(tmp_path / "whole", tmp_path / "header", "one") != before[0]
    assert reads(tmp_path / "whole", tmp_path / "copy", "one") == before[0]


@pytest.mark.parametrize("iterations", [1000, 1_000_000])
def test_a_snapshot_while_it_begins(tmp_path: Path, iterations: int) -> None:
    """One of the two is refused, or the snapshot is older and opens with a copy of the header."""

    async def test(host: Host) -> None:
        made = Detached(host, tmp_path)
        await made.make()
        node = host.backend.graph.node("disk")
        costs = CHEAP | {"pbkdf-force-iterations": iterations}
        if iterations > 1000:
            await command(host, "luks-reencrypt", speed=MIB, **costs)
            await host.until(lambda: node.preparing, 30)
            with refused("'disk' is being re-encrypted"):
                await host.backend.transaction([made.cover(1)])
            host.backend.block_job("reencrypt-disk").set_speed(0)
            await until_done(host)
            assert ended_well(host)
            return
        begun = asyncio.create_task(command(host, "luks-reencrypt", speed=MIB, **costs))
        await asyncio.sleep(0)
        try:
            # It waits for the command, and the job for it, most of the time.
            await host.backend.transaction([made.cover(1)])
        except VhostblkError as error:
            assert "'disk' is being re-encrypted" in error.desc
            await begun
            return
        await begun
        await until_done(host)
        [told] = host.named("BLOCK_JOB_COMPLETED")
        assert "only the old key opens: base. " in told["error"]
        assert not node.volume.is_reencrypting

    with_host(test)


@pytest.mark.parametrize("paused", [False, True])
def test_a_snapshot_half_way(tmp_path: Path, paused: bool) -> None:
    """Refused, unless the header is kept with it, of the same moment."""
    before: list[bytes] = []

    async def test(host: Host) -> None:
        made = Detached(host, tmp_path)
        await made.make()
        before.append(made.content)
        await command(host, "luks-reencrypt", speed=2 * MIB, **CHEAP)
        job = host.backend.block_job("reencrypt-disk")
        await host.until(lambda: job.current_progress >= MIB, 30)
        if paused:
            job.pause()
        reason = "'disk' is being re-encrypted", "Cover 'h' as well, in one transaction"
        with refused(*reason):
            await host.backend.transaction([made.cover(1)])
        with refused(*reason):
            leg = {"node-name": "base", "snapshot-file": str(tmp_path / "1.qcow2")}
            await host.backend.transaction([("blockdev-snapshot-sync", leg)])
        assert not (tmp_path / "1.qcow2").exists()
        await host.backend.transaction([made.cover(1), made.cover_header()])
        if paused:
            job.resume()
        job.set_speed(0)
        await until_done(host)
        assert ended_well(host)
        assert await host.read("disk", 0, DISK) == made.content
        await host.write("disk", 0, bytes(DISK))
        await host.backend.transaction([made.cover(2)])

    with_host(test)
    assert reads(tmp_path / "whole", tmp_path / "header", "one") == before[0]


def test_a_snapshot_inside_an_image_half_way(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        made = Detached(host, tmp_path)
        await made.make()
        await host.backend.transaction([made.cover(1)])
        node = host.backend.graph.parents_of(host.backend.graph.node("base"))[0].parent.name
        await command(host, "luks-reencrypt", speed=2 * MIB, force=True, **CHEAP)
        job = host.backend.block_job("reencrypt-disk")
        await host.until(lambda: job.current_progress > 0, 30)
        with refused("'disk' is being re-encrypted"):
            await host.backend.internal_snapshot(node, "create", "s")
        job.set_speed(0)
        await until_done(host)
        await host.backend.internal_snapshot(node, "create", "s")

    with_host(test)


@pytest.mark.parametrize("what", ["block-stream", "copy-on-read"])
def test_a_header_that_is_an_overlay_is_no_leg(tmp_path: Path, what: str) -> None:
    """What fills the disk's overlays has no business in the header's, nor lets it go."""
    before: list[bytes] = []

    async def test(host: Host) -> None:
        from vhostblk.jobs.stream import start_stream

        made = Detached(host, tmp_path)
        await made.make()
        before.append(made.content)
        await host.backend.transaction([made.cover(1), made.cover_header()])
        graph = host.backend.graph
        if what == "copy-on-read":
            node = await host.add("copy-on-read", "cor", file="disk")
            assert [leg.node.driver for leg in node.targets] == ["qcow2"]
            assert await host.read("cor", 0, DISK) == made.content
        else:
            async with host.backend.changing():
                await start_stream(host.backend, "e", "job")
            await host.until(lambda: not list(host.backend.jobs), 40)
            [told] = host.named("BLOCK_JOB_COMPLETED")
            assert "error" not in told
            assert "backing" not in graph.node("disk").child("file").node.children
        header = graph.node("disk").child("header").node
        assert header.driver == "qcow2"
        assert header.children["backing"].node.name == "h"
        assert await host.read("disk", 0, DISK) == made.content
        await command(host, "luks-key-slot-test", key_secret="one")

    with_host(test)


@pytest.mark.parametrize("header", [None, "other", "base"])
def test_the_header_stays_where_it_is(tmp_path: Path, header: str | None) -> None:
    """Without it the next change of key slots would be written over the disk's first sectors."""

    async def test(host: Host) -> None:
        made = Detached(host, tmp_path)
        await made.make()
        await host.add("file", "other", filename=host.file("other", 16 * MIB))
        given = {"driver": "luks", "node-name": "disk", "key-secret": "one", "file": "base"}
        with refused("header"):
            await host.backend.blockdev_reopen([given | {"header": header}])
        await host.backend.blockdev_reopen([given | {"header": "h"}])
        await command(host, "luks-key-slot-add", key_secret="one", new_secret="two", **CHEAP)
        assert await host.read("disk", 0, DISK) == made.content
        assert opens(tmp_path / "whole", TWO, "--header", made.header)

    with_host(test)


def test_no_header_comes_to_a_disk_that_has_one_inside(tmp_path: Path) -> None:
    formatted(tmp_path / "image", size=DISK)

    async def test(host: Host) -> None:
        await host.add("file", "f", filename=str(tmp_path / "image"))
        await disk(host, tmp_path / "image", file="f")
        await host.add("file", "other", filename=host.file("other", 16 * MIB))
        given = {"driver": "luks", "node-name": "disk", "key-secret": "one", "file": "f"}
        with refused("header"):
            await host.backend.blockdev_reopen([given | {"header": "other"}])
        await command(host, "luks-key-slot-add", key_secret="one", new_secret="two", **CHEAP)

    with_host(test)
    assert opens(tmp_path / "image", TWO)
