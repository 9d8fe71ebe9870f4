# SPDX-License-Identifier: GPL-2.0-or-later
"""Every kind of qcow2 image, as data, and how QEMU makes and fills one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash import Tools

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Variant:
    """How an image is created, and what is done to it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 4 * MIB + 5 * 512  # not a whole number of clusters
    chain: tuple[str, ...] = ()
    """Formats of the images below, the nearest first."""
    backing_size: int | None = None
    """Of the image below, if not as large."""
    compressed: bool = False
    snapshots: int = 0
    bitmaps: int = 0
    needs: tuple[int, int] = (0, 0)
    """QEMU's version."""

    @property
    def cluster(self) -> int:
        text = str(self.options.get("cluster_size", 64 * KIB))
        unit = {"k": KIB, "M": MIB}.get(text[-1], 1)
        return int(text.rstrip("kM")) * unit

    @property
    def compat(self) -> str:
        return str(self.options.get("compat", "1.1"))

    @property
    def has_data_file(self) -> bool:
        return "data_file" in self.options


def _variants() -> tuple[Variant, ...]:
    v = Variant
    found = [
        v("default"),
        v("v2", {"compat": "0.10"}),
        v("v2-4k", {"compat": "0.10", "cluster_size": "4k"}),
    ]
    found += [
        v(f"cluster-{size}", {"cluster_size": size})
        for size in ("512", "1k", "2k", "4k", "8k", "32k", "128k", "1M", "2M")
    ]
    found += [
        v(f"refcount-{bits}", {"refcount_bits": bits, "cluster_size": "1k"}, snapshots=bits > 1)
        for bits in (1, 2, 4, 8, 32, 64)
    ]
    found += [
        v("lazy", {"lazy_refcounts": "on", "cluster_size": "4k"}),
        v("zlib", {"cluster_size": "4k"}, compressed=True),
        v("zlib-64k", compressed=True),
        v("v2-zlib", {"compat": "0.10", "cluster_size": "512"}, compressed=True),
        v("zstd", {"compression_type": "zstd", "cluster_size": "4k"}, compressed=True),
        v("zstd-2M", {"compression_type": "zstd", "cluster_size": "2M"}, compressed=True),
        v("extended", {"extended_l2": "on", "cluster_size": "16k"}),
        v("extended-64k", {"extended_l2": "on"}),
        v("extended-2M", {"extended_l2": "on", "cluster_size": "2M"}),
        v("extended-zstd", {"extended_l2": "on", "cluster_size": "16k", "compression_type": "zstd"},
          compressed=True),
        v("data-file", {"data_file": "disk.data", "cluster_size": "4k"}),
        v("data-file-raw", {"data_file": "disk.data", "data_file_raw": "on", "cluster_size": "4k"}),
        v("data-file-extended",
          {"data_file": "disk.data", "cluster_size": "16k", "extended_l2": "on"}),
        v("prealloc-metadata", {"preallocation": "metadata", "cluster_size": "4k"}),
        v("prealloc-falloc", {"preallocation": "falloc"}),
        v("prealloc-full", {"preallocation": "full"}),
        v("snapshots", {"cluster_size": "4k"}, snapshots=3),
        v("v2-snapshots", {"compat": "0.10", "cluster_size": "4k"}, snapshots=2),
        v("extended-snapshots", {"extended_l2": "on", "cluster_size": "16k"}, snapshots=2),
        v("compressed-snapshots", {"cluster_size": "4k"}, compressed=True, snapshots=2),
        v("bitmaps", {"cluster_size": "4k"}, bitmaps=2),
        v("on-raw", {"cluster_size": "4k"}, chain=("raw",)),
        v("on-short-raw", {"cluster_size": "4k"}, chain=("raw",), backing_size=MIB + 512),
        v("on-long-raw", {"cluster_size": "4k"}, chain=("raw",), backing_size=6 * MIB),
        v("v2-on-raw", {"compat": "0.10", "cluster_size": "4k"}, chain=("raw",)),
        v("on-qcow2", {"cluster_size": "4k"}, chain=("qcow2",), compressed=True),
        v("on-three", {"cluster_size": "4k"}, chain=("qcow2", "qcow2", "raw")),
        v("extended-on-raw", {"extended_l2": "on", "cluster_size": "16k"}, chain=("raw",)),
        v("extended-on-qcow2", {"extended_l2": "on"}, chain=("qcow2",), snapshots=1),
        v("data-file-on-raw", {"data_file": "disk.data", "cluster_size": "4k"}, chain=("raw",)),
        v("snapshots-on-qcow2", {"cluster_size": "4k"}, chain=("qcow2",), snapshots=2),
    ]  # fmt: skip
    return tuple(found)


VARIANTS = _variants()


@dataclass
class Image:
    """An image that QEMU has made, and what is in it."""

    path: Path
    variant: Variant
    content: bytes
    snapshots: dict[str, bytes]
    backing: bytes | None
    """What the images below read as, as long as this one."""


def make(directory: Path, variant: Variant, tools: Tools, seed: int) -> Image:
    """Create and fill `disk.qcow2`."""
    rnd = random.Random(seed)
    sources = []
    for number in range(8):
        source = directory / f"source{number}"
        # Every other one can be compressed.
        letters = "ab" if number % 2 else [chr(value) for value in range(1, 256)]
        text = "".join(rnd.choices(letters, k=4093 + 2 * number))
        source.write_bytes(text.encode("latin-1"))
        sources.append(source)
    below: Path | None = None
    below_format = "raw"
    for depth in range(len(variant.chain) - 1, -1, -1):
        below = _backing(directory, variant, tools, rnd, sources, depth, below, below_format)
        below_format = variant.chain[depth]
    options = dict(variant.options)
    path = directory / "disk.qcow2"
    if below is not None:
        options |= {"backing": below.name, "backing_format": below_format}
    tools.create(path, variant.size, **options)
    snapshots: dict[str, bytes] = {}
    for number in range(variant.bitmaps):
        tools.img("bitmap", "--add", path, f"bitmap{number}")
    for number in range(variant.snapshots + 1):
        _fill(path, variant, tools, rnd, sources, fresh=number == 0)
        if number < variant.snapshots:
            name = f"snap{number}"
            tools.img("snapshot", "-c", name, path)
            snapshots[name] = tools.content(path)
    if below is not None and not variant.has_data_file:
        tools.io(path, f"write -z -u 0 {variant.cluster}")
    backing = None
    if below is not None:
        backing = tools.content(below, below_format)[: variant.size]
        backing += bytes(variant.size - len(backing))
    return Image(path, variant, tools.content(path), snapshots, backing)


def _backing(
    directory: Path,
    variant: Variant,
    tools: Tools,
    rnd: random.Random,
    sources: list[Path],
    depth: int,
    below: Path | None,
    below_format: str,
) -> Path:
    """An image of the chain; its own backing file is named without a directory."""
    format = variant.chain[depth]
    path = directory / f"below{depth}.{format}"
    size = variant.backing_size or variant.size
    if format == "raw":
        size = -(-size // 512) * 512
        path.write_bytes(rnd.randbytes(size // 2) + bytes(size - size // 2))
        return path
    extra = {"backing": below.name, "backing_format": below_format} if below else {}
    tools.create(path, size, cluster_size="64k", **extra)
    inner = Variant("below", compressed=variant.compressed)
    _fill(path, inner, tools, rnd, sources, size=size, fresh=True)
    return path


def _fill(
    path: Path,
    variant: Variant,
    tools: Tools,
    rnd: random.Random,
    sources: list[Path],
    size: int | None = None,
    fresh: bool = False,
) -> None:
    size = size or variant.size
    cluster = variant.cluster
    commands = []
    if variant.compressed and fresh:
        # Only into clusters that are not allocated: QEMU refuses the others.
        for number in rnd.sample(range(size // cluster), min(size // cluster - 1, 60)):
            commands.append(f"write -q -c -s {sources[1]} {number * cluster} {cluster}")
    for _ in range(24):
        what = rnd.random()
        source = rnd.choice(sources)
        length = 512 * rnd.randint(1, 200)
        offset = 512 * rnd.randint(0, (size - length) // 512)
        if what < 0.75:
            commands.append(f"write -q -s {source} {offset} {length}")
        elif what < 0.85:
            commands.append(f"write -q -z{rnd.choice(['', ' -u'])} {offset} {length}")
        else:
            commands.append(f"discard -q {offset} {length}")
    tools.io(path, *commands, options=("-d", "unmap", "-f", "qcow2"))
