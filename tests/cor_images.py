# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains of images for the tests of copy-on-read, and what QEMU's tools say of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crash import Tools
from crash.tools import all_tools
from in_process import Host

KIB, MIB = 1 << 10, 1 << 20
NEEDS_TOOLS = pytest.mark.skipif(not all_tools(), reason="qemu-img is not here")


def tools(version: tuple[int, int] = (0, 0)) -> Tools:
    for found in all_tools():
        if found.version >= version:
            return found
    pytest.skip(f"needs QEMU {version}")


def some_data(size: int, seed: int = 1) -> bytearray:
    """Data with holes: every other 64 KiB or so is zeroes, some of them full of data."""
    rnd = random.Random(seed)
    data = bytearray(size)
    at = 0
    while at < size:
        length = min(rnd.choice((4096, 65536, 100 * KIB, 200 * KIB)), size - at)
        if rnd.random() < 0.6:
            data[at : at + length] = rnd.randbytes(length)
        at += length
    return data


def write_sparse(path: Path, data: bytes) -> None:
    """A file with holes where 4 KiB are zeroes."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                file.seek(at)
                file.write(data[at : at + 4096])


@dataclass
class Chain:
    """A base, and overlays above it, the topmost last."""

    host: Host
    data: bytearray
    """What the guest sees."""
    paths: list[Path]
    formats: list[str]

    @property
    def top(self) -> Path:
        return self.paths[-1]

    @property
    def format(self) -> str:
        return self.formats[-1]

    def map(self) -> list[tuple[int, int, int, bool, bool]]:
        return image_map(self.top, self.format)

    async def open(self, name: str = "top", **options: Any) -> Any:
        """The topmost image with all below it, as the images themselves say."""
        file = {"driver": "file", "filename": str(self.top)}
        return await self.host.add(self.format, name, file=file, **options)

    def check(self) -> None:
        """QEMU finds nothing wrong and reads what the guest wrote."""
        found = tools().check(self.top, format=self.format)
        assert (found.corruptions, found.errors) == (0, 0), found.text
        assert tools().content(self.top, self.format) == bytes(self.data)


def make_chain(
    host: Host,
    *formats: str,
    size: int = 2 * MIB,
    seed: int = 1,
    name: str = "image",
    base_format: str = "raw",
    base_size: int | None = None,
    header: bytes = b"",
    **options: Any,
) -> Chain:
    """A base with data, then an overlay of each format; those in between have data, too."""
    rnd = random.Random(seed)
    data = some_data(size if base_size is None else base_size, seed)
    data[: len(header)] = header
    base = Path(host.path(f"{name}.base"))
    if base_format == "raw":
        write_sparse(base, data)
    else:
        raw = Path(host.path(f"{name}.raw"))
        write_sparse(raw, data)
        tools().img("convert", "-q", "-f", "raw", "-O", base_format, raw, base)
        raw.unlink()
    data = data[:size] + bytes(max(0, size - len(data)))
    chain = Chain(host, data, [base], [base_format])
    for number, format in enumerate(formats):
        path = Path(host.path(f"{name}.{number}.{format}"))
        given = {"backing": chain.top, "backing_format": chain.format}
        tools().create(path, size, format, **given, **(options if format == "qcow2" else {}))
        chain.paths.append(path)
        chain.formats.append(format)
        if number + 1 < len(formats):
            for _ in range(4):
                length = rnd.choice((4096, 65536, 128 * KIB))
                offset = rnd.randrange(0, size - length, 4096)
                value = rnd.randrange(1, 256)
                tools().io(path, f"write -P {value} {offset} {length}", options=("-f", format))
                data[offset : offset + length] = bytes([value]) * length
    return chain


def image_map(path: Path, format: str) -> list[tuple[int, int, int, bool, bool]]:
    """What `qemu-img map` says: start, length, depth, zero, data; alike neighbours together."""
    text = tools().img("map", "-f", format, "--output=json", path)
    found: list[tuple[int, int, int, bool, bool]] = []
    for e in json.loads(text):
        entry = (e["start"], e["length"], e["depth"], e["zero"], e["data"])
        if found and found[-1][2:] == entry[2:]:
            found[-1] = (found[-1][0], found[-1][1] + entry[1], *entry[2:])
        else:
            found.append(entry)
    return found


def in_top(path: Path, format: str) -> set[int]:
    """Units of 4 KiB that the topmost image has."""
    units: set[int] = set()
    for start, length, depth, _, _ in image_map(path, format):
        if depth == 0:
            units.update(range(start // 4096, (start + length) // 4096))
    return units
