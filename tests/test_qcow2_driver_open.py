# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening qcow2 images: chains, names from inside images, what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from in_process import Host, refused, with_host

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not here")

MIB = 1 << 20


def qemu_img(*arguments: str) -> None:
    subprocess.run(("qemu-img", *arguments), check=True, stdout=subprocess.DEVNULL)


def create(path: str, size: int = 4 * MIB, *arguments: str) -> str:
    qemu_img("create", "-q", "-f", "qcow2", *arguments, path, str(size))
    return path


def overlay(path: str, backing: str, format: str = "qcow2") -> str:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, path, str(4 * MIB))
    return path


def pattern(path: str, value: int, offset: int, length: int, format: str = "qcow2") -> None:
    command = f"write -P {value} {offset} {length}"
    subprocess.run(
        ("qemu-io", "-f", format, "-c", command, path), check=True, stdout=subprocess.DEVNULL
    )


async def add(host: Host, path: str, name: str = "disk", **options: object) -> None:
    await host.add("qcow2", name, file={"driver": "file", "filename": path}, **options)


def test_a_chain_by_relative_names() -> None:
    async def test(host: Host) -> None:
        with open(host.path("base.raw"), "wb") as file:
            file.write(b"\x11" * 2 * MIB)
        overlay(host.path("mid.qcow2"), "base.raw", "raw")
        overlay(host.path("top.qcow2"), "mid.qcow2")
        pattern(host.path("mid.qcow2"), 0x22, 65536, 4096)
        await add(host, host.path("top.qcow2"))
        assert await host.read("disk", 0, 4096) == b"\x11" * 4096
        assert await host.read("disk", 65536 - 512, 5120) == (
            b"\x11" * 512 + b"\x22" * 4096 + b"\x11" * 512
        )
        assert await host.read("disk", 2 * MIB - 512, 1024) == b"\x11" * 512 + bytes(512)
        nodes = {n["node-name"]: n for n in host.backend.query_named_block_nodes()}
        assert nodes["disk"]["image"]["backing-filename"] == "mid.qcow2"
        assert [c["child"] for c in nodes["disk"]["children"]] == ["file", "backing"]

    with_host(test)


def test_backing_null_and_a_backing_node() -> None:
    async def test(host: Host) -> None:
        with open(host.path("base.raw"), "wb") as file:
            file.write(b"\x11" * MIB)
        overlay(host.path("a.qcow2"), "base.raw", "raw")
        await add(host, host.path("a.qcow2"), backing=None)
        assert await host.read("disk", 0, 512) == bytes(512)
        await host.backend.blockdev_del("disk")
        await host.null("zeroes", size=MIB)
        await add(host, host.path("a.qcow2"), backing="zeroes")
        assert await host.read("disk", 0, 512) == bytes(512)
        await host.backend.blockdev_del("disk")
        await add(
            host,
            host.path("a.qcow2"),
            backing={"driver": "file", "filename": host.path("base.raw")},
        )
        assert await host.read("disk", 0, 512) == b"\x11" * 512

    with_host(test)


def test_names_that_are_not_followed() -> None:
    async def test(host: Host) -> None:
        os.mkdir(host.path("elsewhere"))
        os.mkdir(host.path("images"))
        base = create(host.path("elsewhere/base.qcow2"))
        top = host.path("images/top.qcow2")
        overlay(top, "../elsewhere/base.qcow2")
        with refused("not in", "allow-backing-from"):
            await add(host, top)
        await add(host, top, allow_backing_from=[host.path("elsewhere")])
        await host.backend.blockdev_del("disk")
        os.symlink(base, host.path("images/link.qcow2"))
        overlay(host.path("images/b.qcow2"), "link.qcow2")
        with refused("not in"):
            await add(host, host.path("images/b.qcow2"))
        overlay(host.path("images/c.qcow2"), "nbd://example.invalid/x", "raw")
        with refused("behind the protocol 'nbd'"):
            await add(host, host.path("images/c.qcow2"))
        name = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": base}})
        overlay(host.path("images/d.qcow2"), f"json:{name}")
        with refused("not in"):
            await add(host, host.path("images/d.qcow2"))
        await add(host, host.path("images/d.qcow2"), allow_backing_from=host.path("elsewhere"))
        await host.backend.blockdev_del("disk")
        name = json.dumps({"driver": "null-co", "size": 4096})
        overlay(host.path("images/e.qcow2"), f"json:{name}", "raw")
        with refused("driver 'null-co'"):
            await add(host, host.path("images/e.qcow2"))
        assert not host.backend.graph.nodes

    with_host(test)


def test_a_format_is_not_guessed() -> None:
    async def test(host: Host) -> None:
        create(host.path("base.qcow2"))
        path = overlay(host.path("top.qcow2"), "base.qcow2")
        data = bytearray(Path(path).read_bytes())
        at = data.index(bytes.fromhex("e2792aca"))
        # An extension of a type that nobody knows is skipped.
        data[at : at + 4] = bytes.fromhex("7fffffff")
        Path(path).write_bytes(data)
        with refused("does not say its format"):
            await add(host, path)

    with_host(test)


def test_a_chain_that_is_a_loop() -> None:
    async def test(host: Host) -> None:
        overlay(host.path("a.qcow2"), "b.qcow2")
        overlay(host.path("b.qcow2"), "a.qcow2")
        with refused("loop"):
            await add(host, host.path("a.qcow2"), read_only=True)
        assert not host.backend.graph.nodes

    with_host(test)


def test_locks() -> None:
    """Nobody else writes to the image or to what backs it; others may read the latter."""

    async def test(host: Host) -> None:
        create(host.path("base.qcow2"))
        overlay(host.path("a.qcow2"), "base.qcow2")
        overlay(host.path("b.qcow2"), "base.qcow2")
        await add(host, host.path("a.qcow2"), "a")
        await add(host, host.path("b.qcow2"), "b")

        async def qemu_io(name: str, command: str, *options: str) -> int:
            process = await asyncio.create_subprocess_exec(
                "qemu-io", "-f", "qcow2", *options, "-c", command, host.path(name),
                stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            return await process.wait()

        assert await qemu_io("a.qcow2", "read 0 512", "-r") == 1
        assert await qemu_io("base.qcow2", "write 0 512") == 1
        assert await qemu_io("base.qcow2", "read 0 512", "-r") == 0

    with_host(test)


def test_reading_only_writes_nothing() -> None:
    async def test(host: Host) -> None:
        path = create(host.path("a.qcow2"))
        pattern(path, 0x33, 0, 8192)
        qemu_img("bitmap", "--add", path, "b0")
        before = Path(path).read_bytes()
        await add(host, path, read_only=True)
        assert await host.read("disk", 4096, 8192) == b"\x33" * 4096 + bytes(4096)
        with pytest.raises(OSError):
            await host.write("disk", 0, bytes(512))
        await host.backend.blockdev_del("disk")
        assert Path(path).read_bytes() == before

    with_host(test)


def test_a_chain_of_two_hundred() -> None:
    """Opened, read through, and copied from, all the way down."""

    async def test(host: Host) -> None:
        create(host.path("000.qcow2"))
        pattern(host.path("000.qcow2"), 0x55, 0, 4 * MIB)
        template = Path(overlay(host.path("001.qcow2"), "000.qcow2")).read_bytes()
        assert template.count(b"000.qcow2") == 1
        for number in range(2, 201):
            data = template.replace(b"000.qcow2", f"{number - 1:03}.qcow2".encode())
            Path(host.path(f"{number:03}.qcow2")).write_bytes(data)
        await add(host, host.path("200.qcow2"))
        assert len(host.backend.graph.nodes) == 402
        for offset in range(0, 4 * MIB, 256 * 1024):
            assert await host.read("disk", offset + 512, 4096) == b"\x55" * 4096
        await host.write("disk", 65536 + 512, b"\x66" * 512)
        assert await host.read("disk", 65536, 2048) == (
            b"\x55" * 512 + b"\x66" * 512 + b"\x55" * 1024
        )

    with_host(test)
