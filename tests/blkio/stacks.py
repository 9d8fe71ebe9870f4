# SPDX-License-Identifier: GPL-2.0-or-later
"""Every stack of nodes that the data tests go through, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blkio.server import JUDGE, Server

MIB = 1 << 20
SIZE = 8 * MIB
PLUGINS = (
    Path(__file__).with_name("filters.py"),
    Path(__file__).parents[2] / "scripts" / "bench.d" / "pass_through.py",
)


@dataclass(frozen=True)
class Stack:
    """Nodes whose root is called `disk`, and what may be expected of it."""

    name: str
    nodes: tuple[str, ...]  # {file}: the image
    discards: str = "keep"
    offset: int = 0  # where in the image the disk begins
    size: int = SIZE
    inverted: bool = False  # the image holds the complement
    reads_zero: bool = False  # a null node
    objects: tuple[str, ...] = ()
    iothread: str = ""
    plugin: bool = False
    judge_has_it: bool = True  # qemu-storage-daemon can run it, too

    def __str__(self) -> str:
        return self.name

    def server(self, directory: Path, *, queues: int = 1) -> Server:
        """A server for this stack over a fresh image (or the one that is there)."""
        file = self.image(directory)
        if not self.reads_zero and not file.exists():
            with file.open("wb") as image:
                image.truncate(self.offset + self.size + MIB)
                if self.offset == 0:
                    image.truncate(self.size)
                if self.inverted:
                    image.write(b"\xff" * self.size)
        return Server(
            directory,
            [node.replace("{file}", str(file)) for node in self.nodes],
            queues=queues,
            objects=self.objects,
            iothread=self.iothread,
            plugins=PLUGINS if self.plugin else (),
        )

    def image(self, directory: Path) -> Path:
        """The image file."""
        return directory / "image.raw"

    @property
    def expected_discards(self) -> str:
        """QEMU leaves out the unaligned ends of a discard; vhostblk is exact."""
        return self.discards if JUDGE == "vhostblk" else "any"


FILE = "driver=file,filename={file}"
SMALL = SIZE - MIB
HALF = SIZE // 2

STACKS = (
    Stack(
        "null",
        (f"driver=null-co,node-name=disk,size={SIZE},read-zeroes=on",),
        reads_zero=True,
    ),
    Stack("file", (f"{FILE},node-name=disk",)),
    Stack("file-unmap", (f"{FILE},node-name=disk,discard=unmap",), discards="zero"),
    Stack("file-direct", (f"{FILE},node-name=disk,cache.direct=on",)),
    Stack(
        "file-direct-unmap",
        (f"{FILE},node-name=disk,cache.direct=on,discard=unmap,detect-zeroes=unmap",),
        discards="zero",
    ),
    Stack("file-no-flush", (f"{FILE},node-name=disk,cache.no-flush=on",)),
    Stack("file-detect-zeroes", (f"{FILE},node-name=disk,detect-zeroes=on",)),
    Stack(
        "file-detect-zeroes-unmap",
        (f"{FILE},node-name=disk,detect-zeroes=unmap,discard=unmap",),
        discards="zero",
    ),
    Stack(
        "raw",
        (f"{FILE},node-name=f,discard=unmap", "driver=raw,node-name=disk,file=f,discard=unmap"),
        discards="zero",
    ),
    Stack(
        "raw-offset-size",
        (
            f"{FILE},node-name=f,discard=unmap",
            f"driver=raw,node-name=disk,file=f,offset={3 * MIB + 512},size={SMALL},discard=unmap",
        ),
        discards="zero",
        offset=3 * MIB + 512,
        size=SMALL,
    ),
    Stack(
        "raw-in-raw-direct",
        (
            f"{FILE},node-name=f,cache.direct=on",
            f"driver=raw,node-name=r,file=f,offset={MIB}",
            f"driver=raw,node-name=disk,file=r,offset=512,size={HALF}",
        ),
        offset=MIB + 512,
        size=HALF,
        judge_has_it=False,  # wants sizes to be multiples of what O_DIRECT asks for
    ),
    Stack(
        "inline-children",
        ("driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={file}",),
        discards="zero",
    ),
    Stack(
        "aio-threads",
        (f"{FILE},node-name=disk,discard=unmap",),
        discards="zero",
        objects=("iothread,id=io,aio=threads",),
        iothread="io",
        judge_has_it=False,
    ),
    Stack(
        "aio-threads-direct",
        (f"{FILE},node-name=disk,cache.direct=on,detect-zeroes=on",),
        objects=("iothread,id=io,aio=threads,thread-pool-max=3",),
        iothread="io",
        judge_has_it=False,
    ),
    Stack(
        "never-polls",
        (f"{FILE},node-name=disk",),
        objects=("iothread,id=io,poll-max-ns=0",),
        iothread="io",
    ),
    Stack(
        "python-hand-over",
        (
            f"{FILE},node-name=f,discard=unmap",
            "driver=pass-through,node-name=disk,file=f,discard=unmap",
        ),
        discards="zero",
        plugin=True,
        judge_has_it=False,
    ),
    Stack(
        "python-wait-direct",
        (f"{FILE},node-name=f,cache.direct=on", "driver=test-wait,node-name=disk,file=f"),
        plugin=True,
        judge_has_it=False,
    ),
    Stack(
        "python-invert-twice-and-once",
        (
            f"{FILE},node-name=f",
            "driver=test-invert,node-name=i1,file=f",
            "driver=raw,node-name=r,file=i1,offset=0",
            "driver=test-wait,node-name=w,file=r",
            "driver=test-invert,node-name=i2,file=w",
            "driver=test-invert,node-name=disk,file=i2",
        ),
        inverted=True,
        plugin=True,
        judge_has_it=False,
    ),
    Stack(
        "delay",
        (
            f"{FILE},node-name=f",
            "driver=delay,node-name=disk,file=f,read-ns=20000,write-ns=50000,jitter-ns=300000",
        ),
        judge_has_it=False,
    ),
)


def by_name(*names: str) -> list[Stack]:
    """Some of them."""
    return [stack for stack in usable() if stack.name in names]


def usable() -> list[Stack]:
    """Those that the program under test knows."""
    return [stack for stack in STACKS if stack.judge_has_it or JUDGE == "vhostblk"]
