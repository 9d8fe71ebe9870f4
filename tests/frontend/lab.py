# SPDX-License-Identifier: GPL-2.0-or-later
"""One back-end with many exports, shared by the tests of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .daemon import Daemon, Qmp, vhostblk
from .device import Device
from .protocol import Disconnected

MIB = 1 << 20
DISK_SIZE = 64 * MIB
NULL_SIZE = 1 << 40
SERIAL = "frontend-0123456789a"
SLOW_NS = 200_000_000

NODES = {
    "disk": "driver=file,filename={dir}/disk.raw,discard=unmap",
    "null": f"driver=null-co,size={NULL_SIZE},read-zeroes=on",
    "slow": f"driver=null-co,size={NULL_SIZE},read-zeroes=on,latency-ns={SLOW_NS}",
    "ro": "driver=file,filename={dir}/ro.raw,read-only=on",
    "many": "driver=file,filename={dir}/many.raw",
    "plain": "driver=null-co,size=1048576",
    "sectors": "driver=null-co,size=1048576,read-zeroes=on",
    "bystander": f"driver=null-co,size={NULL_SIZE},read-zeroes=on",
}

EXPORTS: dict[str, dict[str, Any]] = {
    "disk": {"writable": True, "num-queues": 4, "serial": SERIAL},
    "null": {"writable": True, "num-queues": 4},
    "slow": {"writable": True, "num-queues": 2},
    "ro": {"num-queues": 1},
    "many": {"writable": True, "num-queues": 8, "iothread": ["io1", "io2"]},
    "plain": {},
    "sectors": {
        "writable": True,
        "num-queues": 1,
        "logical-block-size": 4096,
        "writethrough": True,
    },
    "bystander": {"writable": True, "num-queues": 1},
}

# Of lines that a hostile front-end can cause, an export says 100 and then few.
LINES_MAX = 90


def node_options(name: str) -> list[str]:
    return ["--blockdev", f"node-name={name},{NODES[name]}"]


def export_description(name: str, directory: str) -> dict[str, Any]:
    return {
        "type": "vhost-user-blk",
        "id": name,
        "node-name": name,
        "addr": {"type": "unix", "path": f"{directory}/{name}.sock"},
        **EXPORTS[name],
    }


def key_values(value: object, key: str = "") -> Iterator[str]:
    """As on a command line: dotted keys, on and off."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from key_values(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from key_values(inner, f"{key}.{number}")
    elif isinstance(value, bool):
        yield f"{key}={'on' if value else 'off'}"
    else:
        yield f"{key}={value}"


def export_options(name: str) -> list[str]:
    return ["--export", ",".join(key_values(export_description(name, "{dir}")))]


class Lab:
    """The back-end, and an innocent front-end that must never notice anything."""

    def __init__(self) -> None:
        arguments = ["--object", "iothread,id=io1", "--object", "iothread,id=io2"]
        arguments += ["--control", "{dir}/qmp.sock"]
        for name in NODES:
            arguments += node_options(name)
        for name in EXPORTS:
            arguments += export_options(name)
        files = {"disk.raw": DISK_SIZE, "ro.raw": MIB, "many.raw": DISK_SIZE}
        self.daemon: Daemon = vhostblk(*arguments, files=files)
        self.bystander = Device(self.path("bystander"))
        self.bystander.__enter__()
        self._said: dict[str, int] = {}

    def close(self) -> None:
        self.bystander.close()
        self.daemon.close()

    def path(self, export: str) -> str:
        return self.daemon.socket(export)

    def file(self, export: str) -> Path:
        return self.daemon.directory / f"{export}.raw"

    def device(self, export: str = "disk", **options: Any) -> Device:
        return Device(self.path(export), **options)

    def qmp(self) -> Qmp:
        return Qmp(self.path("qmp"))

    def open_files(self) -> int:
        """Once the number stays the same for a while: hanging up takes its time."""
        seen: list[int] = []
        while len(seen) < 4 or len(set(seen[-4:])) > 1:
            time.sleep(0.01)
            seen.append(len(os.listdir(f"/proc/{self.daemon.pid}/fd")))
        return seen[-1]

    def until_files_are(self, number: int) -> None:
        """That many are open, or fewer; whoever hung up last may take longer than usual."""
        end = time.monotonic() + 20
        while (now := self.open_files()) > number:
            assert time.monotonic() < end, f"{now} open files, and not {number}"

    def works(self, export: str) -> None:
        """A new front-end is served there, and the bystander still is."""
        with self.device(export) as device:
            device.read(0, 4096)
            assert device.run(8, length=20).status == 0
        self.bystander.read(1 << 30, 4096)
        assert self.daemon.alive

    def renew(self, export: str) -> None:
        """Delete the export and add it again: it has said too much."""
        with self.qmp() as qmp:
            qmp.command("block-export-del", id=export, mode="hard")
            while export in {entry["id"] for entry in qmp.command("query-block-exports")}:
                time.sleep(0.01)
            description = export_description(export, str(self.daemon.directory))
            qmp.command("block-export-add", **description)
        self._said[export] = 0

    def noise(self, *exports: str) -> None:
        """Unknown numbers of lines were said about these."""
        for export in exports:
            self._said[export] = LINES_MAX

    @contextmanager
    def attack(
        self, export: str = "disk", *, dropped: bool = True, **options: Any
    ) -> Iterator[Device]:
        """Connected and negotiated inside; afterwards the damage is assessed.

        `dropped`: the back-end must have hung up, for a reason it gave in one line.
        Otherwise it may, and then too there is one line.
        """
        if self._said.get(export, 0) >= LINES_MAX:
            self.renew(export)
        mark = self.daemon.mark()
        device = self.device(export, **options)
        try:
            device.connect()
            with suppress(Disconnected):
                yield device
            if dropped:
                assert device.channel.wait_closed(), "the connection was not dropped"
            hung_up = device.channel.wait_closed(0.02)
        finally:
            device.close()
        if hung_up:
            self.daemon.wait_line(export, since=mark)
        self.works(export)  # the next front-end is let in when all is said about this one
        said = self.daemon.lines(mark)
        self._said[export] = self._said.get(export, 0) + len(said)
        assert len(said) <= 1 and (said or not hung_up), said
