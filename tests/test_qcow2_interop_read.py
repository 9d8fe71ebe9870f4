# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that QEMU has written, in every variant it knows, read by our driver byte for byte."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from crash import Tools, all_tools, newest_tools
from in_process import Host, with_host
from qcow2_variants import MIB, VARIANTS, Image, Variant, make

by_name = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
both_tools = pytest.mark.parametrize("tools", all_tools(), ids=lambda tools: tools.name)


async def add(host: Host, image: Image, name: str = "disk", **options: Any) -> Any:
    file = {"driver": "file", "filename": str(image.path)}
    return await host.add("qcow2", name, file=file, **options)


async def compare(host: Host, node: str, content: bytes, seed: int) -> None:
    """In pieces of all sizes, many at once would only be slower to debug."""
    size = host.backend.graph.node(node).size
    assert size == len(content)
    rnd = random.Random(seed)
    pieces = [(at, min(MIB, size - at)) for at in range(0, size, MIB)]
    for _ in range(200):
        length = 512 * rnd.choice((1, 2, 7, 8, 9, 64, 127, 128, 129, 400))
        length = min(length, size)
        pieces.append((512 * rnd.randint(0, (size - length) // 512), length))
    rnd.shuffle(pieces)
    for offset, length in pieces:
        read = await host.read(node, offset, length)
        expected = content[offset : offset + length]
        if read != expected:
            wrong = next(i for i in range(length) if read[i] != expected[i])
            raise AssertionError(
                f"byte {offset + wrong:#x}, in a read of {length:#x} bytes at {offset:#x}, is"
                f" {read[wrong : wrong + 8].hex()} instead of {expected[wrong : wrong + 8].hex()}"
            )


@both_tools
@by_name
def test_what_qemu_wrote(tmp_path: Path, tools: Tools, variant: Variant) -> None:
    image = make(tmp_path, variant, tools, seed=1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    async def test(host: Host) -> None:
        await add(host, image, read_only=True)
        await compare(host, "disk", image.content, seed=1)

    with_host(test)
    assert {path: path.read_bytes() for path in before} == before, "a reader has written"


@by_name
def test_opened_for_writing_and_closed(tmp_path: Path, variant: Variant) -> None:
    """Opening for writing may change an image (feature bits), but not what is in it."""
    tools = newest_tools()
    image = make(tmp_path, variant, tools, seed=2)

    async def test(host: Host) -> None:
        await add(host, image)
        await compare(host, "disk", image.content, seed=2)

    with_host(test)
    found = tools.check(image.path)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    assert tools.content(image.path) == image.content
    for name, content in image.snapshots.items():
        assert tools.content(image.path, "qcow2", "-l", f"snapshot.name={name}") == content


@pytest.mark.parametrize("seed", range(10, 16))
def test_small_cache(tmp_path: Path, seed: int) -> None:
    """A cache of a few L2 slices: tables come and go."""
    image = make(
        tmp_path, Variant("small", {"cluster_size": "512"}, size=3 * MIB), newest_tools(), seed
    )

    async def test(host: Host) -> None:
        await add(host, image, l2_cache_size=2048, l2_cache_entry_size=512)
        await compare(host, "disk", image.content, seed)

    with_host(test)


class TestBacking:
    def test_null_leaves_it_out(self, tmp_path: Path) -> None:
        variant = next(v for v in VARIANTS if v.name == "on-raw")
        image = make(tmp_path, variant, newest_tools(), seed=3)
        newest_tools().img("rebase", "-u", "-F", "raw", "-b", "", image.path)
        alone = newest_tools().content(image.path)
        newest_tools().img("rebase", "-u", "-F", "raw", "-b", "below0.raw", image.path)

        async def test(host: Host) -> None:
            await add(host, image, backing=None)
            await compare(host, "disk", alone, seed=3)

        with_host(test)

    def test_found_from_another_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Relative names are the image's, not the process's."""
        variant = next(v for v in VARIANTS if v.name == "on-three")
        image = make(tmp_path, variant, newest_tools(), seed=4)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)

        async def test(host: Host) -> None:
            await add(host, image)
            await compare(host, "disk", image.content, seed=4)

        with_host(test)

    def test_a_long_chain(self, tmp_path: Path) -> None:
        """Forty overlays, each with a sector of its own."""
        tools = newest_tools()
        tools.create(tmp_path / "0.qcow2", MIB)
        content = bytearray(MIB)
        for number in range(1, 41):
            path = tmp_path / f"{number}.qcow2"
            backing = f"{number - 1}.qcow2"
            tools.create(path, MIB, backing=backing, backing_format="qcow2", cluster_size="4k")
            tools.io(path, f"write -q -P {number} {number * 8192 + 512} 512")
            content[number * 8192 + 512 : number * 8192 + 1024] = bytes([number]) * 512

        async def test(host: Host) -> None:
            image = Image(path, Variant("chain"), bytes(content), {}, None)
            await add(host, image)
            await compare(host, "disk", bytes(content), seed=5)

        with_host(test)
