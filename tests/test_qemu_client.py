# SPDX-License-Identifier: GPL-2.0-or-later
"""Exports as QEMU's own vhost-user-blk client sees them: its tools open a socket like an image.

The driver `virtio-blk-vhost-user` is in Debian's qemu-block-extra; scripts/fetch-qemu-tools has it.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from blkio import Server
from crash import Tools, all_tools, newest_tools
from qcow2_variants import VARIANTS, make

MIB = 1 << 20
SIZE = 8 * MIB


def options_of(path: Path) -> str:
    return f"driver=virtio-blk-vhost-user,path={path},cache.direct=on"


@functools.cache
def client() -> Tools | None:
    """The newest tools that have the driver."""
    for tools in reversed(all_tools()):
        nowhere = options_of(Path("/nonexistent/socket"))
        if "Unknown driver" not in tools.img("info", "--image-opts", nowhere, ok=(1,)):
            return tools
    return None


@pytest.fixture
def qemu() -> Tools:
    tools = client()
    if tools is None:
        pytest.skip("QEMU's tools here have no driver virtio-blk-vhost-user")
    return tools


def compare(qemu: Tools, server: Server, file: Path) -> None:
    """Every byte of the export with those of a raw file."""
    raw = f"driver=raw,file.driver=file,file.filename={file}"
    text = qemu.img("compare", "--image-opts", options_of(server.path), raw)
    assert "Images are identical" in text


@pytest.mark.parametrize("name", ["default", "cluster-512", "zlib", "extended", "on-three"])
def test_images_read_as_the_files_they_were_made_from(
    tmp_path: Path, short_dir: Path, qemu: Tools, name: str
) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    image = make(tmp_path, variant, newest_tools(), seed=31)
    content = tmp_path / "content"
    content.write_bytes(image.content)
    nodes = (f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image.path}",)
    with Server(short_dir, nodes) as server:
        compare(qemu, server, content)
        server.check_alive()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_written_to(tmp_path: Path, short_dir: Path, qemu: Tools, format: str) -> None:
    path, source = tmp_path / "disk", tmp_path / "source"
    qemu.create(path, SIZE, format)
    content = bytearray(random.Random(7).randbytes(SIZE))
    source.write_bytes(content)
    file = f"file.driver=file,file.filename={path},discard=unmap,file.discard=unmap"
    with Server(short_dir, (f"driver={format},node-name=disk,{file}",)) as server:
        # A whole disk, with many requests in flight.
        target = ("-n", "--target-image-opts")
        qemu.img("convert", *target, "-f", "raw", source, options_of(server.path))
        compare(qemu, server, source)
        qemu.io(
            options_of(server.path),
            "write -q -P 5 4096 65536",
            "write -q -P 6 512 512",
            "writev -q -P 7 1M 4k 64k 512",
            "write -q -z 2M 1M",
            "write -q -z -u 3M 1M",
            "write -q -f -P 8 5M 128k",
            "read -q -P 5 4096 65536",
            "read -q -P 0 2M 2M",
            "discard -q 6M 1M",
            "write -q -P 9 6M 1M",
            "flush",
            options=("--image-opts",),
        )
        for value, offset, length in (
            (5, 4096, 65536),
            (6, 512, 512),
            (7, MIB, 4096 + 65536 + 512),
            (0, 2 * MIB, 2 * MIB),
            (8, 5 * MIB, 131072),
            (9, 6 * MIB, MIB),
        ):
            content[offset : offset + length] = bytes([value]) * length
        source.write_bytes(content)
        compare(qemu, server, source)
        server.check_alive()
    for tools in all_tools():
        found = tools.check(path, format=format)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
        assert tools.content(path, format) == content


def test_a_read_only_export(tmp_path: Path, short_dir: Path, qemu: Tools) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\x11" * MIB)
    nodes = (f"driver=file,node-name=disk,filename={path},read-only=on",)
    with Server(short_dir, nodes, writable=False) as server:
        compare(qemu, server, path)
        refused = ("-r", "--image-opts")
        qemu.io(options_of(server.path), "read -q -P 0x11 0 1M", options=refused)
        server.check_alive()
