# SPDX-License-Identifier: GPL-2.0-or-later
"""What scripts/bench measures: one `Row` for each thing that vhostblk says about its speed.

A row is data. A new one needs a name, the nodes of both programs, what to do, and a target; how to
run and judge it follows from its kind (see bench.py). In node options `{file}` stands for a file
whose pages are in the page cache, `{image}` for the row's qcow2 image (images.py) and `{here}` for
this directory. The node that is exported is called `disk`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from images import EMPTY_SIZE, PASSPHRASE, Image

GIB = 1 << 30
FILE_SIZE = 256 << 20

NULL = f"driver=null-co,node-name=disk,size={GIB}"
FILE = "driver=file,node-name=disk,filename={file}"


class Kind(Enum):
    """How a row is measured."""

    LOAD = "load"  # requests per second and their latency
    MEMORY = "memory"  # MiB of a backend that a client has used and left idle
    START = "start"  # seconds from exec to the first accepted connection
    IDLE_CPU = "idle-cpu"  # per cent of a CPU while a connected client does nothing
    ACCURACY = "accuracy"  # per cent that a throttle group is off its limit; see accuracy.py
    STALL = "stall"  # ms of the slowest request while snapshots are taken; see stall.py


class Compare(Enum):
    """What a target means."""

    IOPS = "iops"  # at least TARGET times qemu-storage-daemon's requests per second
    LATENCY = "latency"  # qemu-storage-daemon's median latency is at least TARGET times ours
    AT_MOST = "at-most"  # the value itself is at most TARGET


@dataclass(frozen=True)
class Job:
    """What the client does."""

    what: str = "randread"
    depth: int = 32
    block: int = 4096
    queues: int = 1
    span: int = 0  # MiB at the start of the disk that the requests go to; 0: all of it
    unique: bool = False  # no two pieces of 4 KiB that are written are the same
    poll: bool = False  # the client spins on the used ring, so that its waking up is not measured

    def __str__(self) -> str:
        many = f", {self.queues} queues" if self.queues > 1 else ""
        span = f", over {self.span} MiB" if self.span else ""
        how = ", client polls" if self.poll else ""
        return f"{self.what} {self.block // 1024} KiB, depth {self.depth}{many}{span}{how}"


@dataclass(frozen=True)
class Daemon:
    """One way to run qemu-storage-daemon. A row takes the better of its daemons, run by run."""

    label: str
    nodes: tuple[str, ...]
    iothread: bool = True  # its own I/O thread, which polls; else the main loop


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    nodes: tuple[str, ...]
    compare: Compare
    target: float | None  # None: for information
    kind: Kind = Kind.LOAD
    job: Job = field(default_factory=Job)
    daemons: tuple[Daemon, ...] = ()
    iothreads: int = 1  # of vhostblk, and one for each queue at least
    limit: bool = False  # the same job by io_uring on the file itself, too
    plugins: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()  # of both programs
    unit: str = ""
    image: Image | None = None
    count: int = 0  # requests of a run, which then is not limited in time


def qcow2(file: str = "") -> tuple[str, ...]:
    """The row's image on a file node with options of its own."""
    return (
        f"driver=file,node-name=storage,filename={{image}}{file}",
        "driver=qcow2,node-name=disk,file=storage",
    )


QCOW2_DAEMONS = (
    Daemon("aio=io_uring", qcow2(",aio=io_uring")),
    Daemon("aio=threads", qcow2(",aio=threads")),
)


def luks(file: str = "") -> tuple[str, ...]:
    """The same for LUKS."""
    return (
        f"driver=file,node-name=storage,filename={{image}}{file}",
        "driver=luks,node-name=disk,file=storage,key-secret=key",
    )


def quorum(file: str = "") -> tuple[str, ...]:
    """Three qcow2 images, two of which must agree."""
    legs = (
        f"driver=qcow2,node-name={leg},file.driver=file,file.filename={{image}}{suffix}"
        + "".join(f",file.{option}" for option in file.split(",") if option)
        for leg, suffix in (("a", ""), ("b", ".b"), ("c", ".c"))
    )
    children = "children.0=a,children.1=b,children.2=c"
    return (*legs, f"driver=quorum,node-name=disk,vote-threshold=2,{children}")


def flagship(file: str = "") -> tuple[str, ...]:
    """Limits (never reached) and encryption above three legs."""
    return (
        *(node.replace("node-name=disk", "node-name=legs") for node in quorum(file)),
        "driver=luks,node-name=plain,file=legs,key-secret=key",
        "driver=throttle,node-name=disk,throttle-group=limits,file=plain",
    )


FLAGSHIP_DAEMONS = (
    Daemon("aio=io_uring", flagship("aio=io_uring")),
    Daemon("aio=threads", flagship("aio=threads")),
)
QUORUM_DAEMONS = (
    Daemon("aio=io_uring", quorum("aio=io_uring")),
    Daemon("aio=threads", quorum("aio=threads")),
)
LUKS_DAEMONS = (
    Daemon("aio=io_uring", luks(",aio=io_uring")),
    Daemon("aio=threads", luks(",aio=threads")),
)


def dedup(delay: str = "") -> tuple[str, ...]:
    """A dedup disk on the row's data device, which is as slow as a disk if wanted."""
    below = "delayed" if delay else "data"
    return (
        "driver=file,node-name=data,filename={image}",
        *((f"driver=delay,node-name=delayed,file=data,{delay}",) if delay else ()),
        f"driver=dedup,node-name=disk,file={below},metadata={{image}}.meta",
    )


DISK_LATENCY = 4_000_000  # ns
DISK_LIKE = f"read-ns={DISK_LATENCY},write-ns={DISK_LATENCY}"
DEDUP_COUNT = FILE_SIZE // 65536
THROTTLED = (
    NULL.replace("node-name=disk", "node-name=null"),
    "driver=throttle,node-name=disk,throttle-group=limits,file=null",
)
NULL_DAEMONS = (
    Daemon("iothread", (NULL,)),
    Daemon("main loop", (NULL,), iothread=False),
)
FILE_DAEMONS = (
    Daemon("aio=io_uring", (FILE + ",aio=io_uring",)),
    Daemon("aio=threads", (FILE + ",aio=threads",)),
)


def _name(stack: str, what: str, block: int, queues: int = 1) -> str:
    return f"{stack}-{what}{'-64k' if block > 4096 else ''}{'-2q' if queues > 1 else ''}"


ROWS: tuple[Row, ...] = (
    Row(
        name="null-randread",
        title="null",
        nodes=(NULL,),
        compare=Compare.IOPS,
        target=3.0,
        daemons=NULL_DAEMONS,
    ),
    Row(
        name="file-randread",
        title="file in the page cache",
        nodes=(FILE,),
        compare=Compare.IOPS,
        target=2.0,
        daemons=FILE_DAEMONS,
        limit=True,
    ),
    Row(
        name="file-randwrite",
        title="file in the page cache",
        nodes=(FILE,),
        compare=Compare.IOPS,
        target=2.0,
        # So little that the warm-up makes all of its pages dirty.
        job=Job("randwrite", span=16),
        daemons=FILE_DAEMONS,
        limit=True,
    ),
    # Here nearly every write dirties a page for the first time, which takes the file system
    # several times as long as the rest: the limit leaves no room for a factor of two.
    Row(
        name="file-randwrite-clean",
        title="file in the page cache, clean pages",
        nodes=(FILE,),
        compare=Compare.IOPS,
        target=None,
        job=Job("randwrite"),
        daemons=FILE_DAEMONS,
        limit=True,
    ),
    Row(
        name="file-randread-depth1",
        title="file in the page cache",
        nodes=(FILE,),
        compare=Compare.LATENCY,
        target=2.0,
        job=Job(depth=1, poll=True),
        daemons=FILE_DAEMONS,
        limit=True,
    ),
    # What a client that sleeps adds, its own waking up, is the same for everyone.
    Row(
        name="file-randread-depth1-sleeping",
        title="file in the page cache",
        nodes=(FILE,),
        compare=Compare.LATENCY,
        target=None,
        job=Job(depth=1),
        daemons=FILE_DAEMONS,
        limit=True,
    ),
    # 100 000 requests per second where qemu-storage-daemon's null does 500 000.
    Row(
        name="python-filter",
        title="pass-through Python filter on null",
        nodes=(
            NULL.replace("node-name=disk", "node-name=null"),
            "driver=pass-through,node-name=disk,file=null",
        ),
        compare=Compare.IOPS,
        target=0.2,
        daemons=NULL_DAEMONS,
        plugins=("{here}/pass_through.py",),
    ),
    Row(
        name="idle-memory",
        title="memory of an idle backend with one disk",
        kind=Kind.MEMORY,
        nodes=(FILE,),
        compare=Compare.AT_MOST,
        target=64.0,
        daemons=FILE_DAEMONS[:1],
        unit="MiB RSS",
    ),
    Row(
        name="start",
        title="start to socket ready",
        kind=Kind.START,
        nodes=(FILE,),
        compare=Compare.AT_MOST,
        target=0.5,
        daemons=FILE_DAEMONS[:1],
        unit="s",
    ),
    Row(
        name="idle-cpu",
        title="CPU of a backend whose connected client is idle",
        kind=Kind.IDLE_CPU,
        nodes=(FILE,),
        compare=Compare.AT_MOST,
        target=0.1,  # the resolution of the measurement; what is meant is 0
        daemons=FILE_DAEMONS[:1],
        unit="% of a CPU",
    ),
    Row(
        name="qcow2-randread",
        title="qcow2, filled",
        nodes=qcow2(),
        compare=Compare.IOPS,
        target=2.0,
        daemons=QCOW2_DAEMONS,
        image=Image.FILLED,
    ),
    Row(
        name="qcow2-randwrite",
        title="qcow2, filled",
        nodes=qcow2(),
        compare=Compare.IOPS,
        target=2.0,
        job=Job("randwrite", span=16),
        daemons=QCOW2_DAEMONS,
        image=Image.FILLED,
    ),
    # As many requests as make the image full: the next would be overwrites.
    Row(
        name="qcow2-empty-write",
        title="qcow2, empty",
        nodes=qcow2(),
        compare=Compare.IOPS,
        target=1.5,
        job=Job("write", depth=8, block=65536),
        daemons=QCOW2_DAEMONS,
        image=Image.EMPTY,
        count=(1 << 30) // 65536,
    ),
    # Fewer than the image has clusters: nine in ten allocate one.
    Row(
        name="qcow2-empty-randwrite",
        title="qcow2, empty",
        nodes=qcow2(),
        compare=Compare.IOPS,
        target=1.5,
        job=Job("randwrite"),
        daemons=QCOW2_DAEMONS,
        image=Image.EMPTY,
        count=EMPTY_SIZE // 65536 // 4,
    ),
    Row(
        name="qcow2-overlay-randread",
        title="qcow2 overlay on a filled backing file",
        nodes=qcow2(),
        compare=Compare.IOPS,
        target=2.0,
        daemons=QCOW2_DAEMONS,
        image=Image.OVERLAY,
    ),
    # What 200 snapshots cost a read from the bottom: the row above is the same with one.
    Row(
        name="qcow2-chain-randread",
        title="200 qcow2 overlays on a filled backing file",
        nodes=qcow2(),
        compare=Compare.IOPS,
        target=None,
        daemons=QCOW2_DAEMONS,
        image=Image.CHAIN,
    ),
    # Three legs on tmpfs, 20 snapshots of all of them under load.
    Row(
        name="snapshot-stall",
        title="longest stall of a guest while a drive of three qcow2 legs is snapshotted",
        kind=Kind.STALL,
        nodes=(),
        compare=Compare.AT_MOST,
        target=10.0,
        job=Job("randwrite"),
        unit="ms",
    ),
    *(
        Row(
            name=_name("luks", what, block),
            title="luks on a file in the page cache",
            nodes=luks(),
            compare=Compare.IOPS,
            target=6.0 if block > 4096 else 4.0,
            job=Job(
                what,
                depth=8 if block > 4096 else 32,
                block=block,
                span=16 if what == "randwrite" else 0,
            ),
            objects=(f"secret,id=key,data={PASSPHRASE}",),
            daemons=LUKS_DAEMONS,
            iothreads=2,
            image=Image.LUKS,
        )
        for block in (4096, 65536)
        for what in ("randread", "randwrite")
    ),
    *(
        Row(
            name=_name("quorum", what, block),
            title="quorum of three qcow2, filled",
            nodes=quorum(),
            compare=Compare.IOPS,
            target=None if block > 4096 else 5.0 if what == "randread" else 4.0,
            job=Job(
                what,
                depth=8 if block > 4096 else 32,
                block=block,
                span=16 if what == "randwrite" else 0,
            ),
            daemons=QUORUM_DAEMONS,
            iothreads=2,
            image=Image.LEGS,
        )
        for block in (4096, 65536)
        for what in ("randread", "randwrite")
    ),
    *(
        Row(
            name=_name("flagship", what, block, queues),
            title="throttle, luks, quorum of three qcow2",
            nodes=flagship(),
            compare=Compare.IOPS,
            target=None
            if queues > 1
            else 8.0
            if block > 4096
            else 6.0
            if what == "randread"
            else 4.0,
            job=Job(
                what,
                depth=8 if block > 4096 else 32,
                block=block,
                queues=queues,
                span=16 if what == "randwrite" else 0,
            ),
            objects=(
                f"secret,id=key,data={PASSPHRASE}",
                "throttle-group,id=limits,x-iops-total=100000000",
            ),
            daemons=FLAGSHIP_DAEMONS,
            iothreads=2,
            image=Image.FLAGSHIP,
        )
        for queues in (1, 2)
        for block in (4096, 65536)
        for what in ("randread", "randwrite")
    ),
    # Against the same file without deduplication. As many requests as the file is long.
    *(
        Row(
            name=f"dedup-write-{'unique' if unique else 'duplicate'}",
            title=f"dedup, {'unique' if unique else 'duplicate'} data",
            nodes=dedup(),
            compare=Compare.IOPS,
            target=0.5 if unique else 1.0,
            job=Job("write", depth=8, block=65536, unique=unique),
            daemons=FILE_DAEMONS,
            image=Image.DEDUP,
            count=DEDUP_COUNT,
        )
        for unique in (True, False)
    ),
    Row(
        name="dedup-randread",
        title="dedup, hot set",
        nodes=dedup(),
        compare=Compare.IOPS,
        target=1.0,
        job=Job(span=16),
        daemons=FILE_DAEMONS,
        image=Image.DEDUP_FILLED,
    ),
    # The data device answers as slowly as a disk; what it has already is not written to it.
    Row(
        name="dedup-slow-duplicate",
        title="dedup of duplicate data on a device of 4 ms",
        nodes=dedup(DISK_LIKE),
        compare=Compare.IOPS,
        target=5.0,
        job=Job("write", depth=8, block=65536),
        daemons=(
            Daemon(
                "null-co of 4 ms",
                (f"driver=null-co,node-name=disk,size={GIB},latency-ns={DISK_LATENCY}",),
            ),
        ),
        image=Image.DEDUP,
        count=DEDUP_COUNT,
    ),
    # A limit that is looked at for each request and never reached.
    Row(
        name="throttle-randread",
        title="throttle on null",
        nodes=THROTTLED,
        compare=Compare.IOPS,
        target=3.0,
        objects=("throttle-group,id=limits,x-iops-total=100000000",),
        daemons=(
            Daemon("iothread", THROTTLED),
            Daemon("main loop", THROTTLED, iothread=False),
        ),
    ),
    Row(
        name="throttle-accuracy",
        title="error of a limit of 10 to 100 000 requests a second over 5 s, "
        "also with two disks of four queues",
        kind=Kind.ACCURACY,
        nodes=(),
        compare=Compare.AT_MOST,
        target=2.0,
        unit="%",
    ),
)
