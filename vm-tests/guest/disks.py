# SPDX-License-Identifier: GPL-2.0-or-later
"""Disk images with a backend each, plugged into a guest."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .backend import Backend
from .vm import Disk, Guest
from .workspace import Workspace

MIB = 1 << 20


def check_ext4(image: Path) -> None:
    """e2fsck reads the ext4 file system, which is the whole image, as the guest has left it."""
    done = subprocess.run(
        ["/sbin/e2fsck", "-f", "-n", str(image)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"e2fsck {image}:\n{done.stdout}{done.stderr}")


def read_ext4(image: Path, path: str) -> bytes:
    """A file out of that file system."""
    return subprocess.run(
        ["/sbin/debugfs", "-R", f"cat {path}", str(image)],
        capture_output=True,
        timeout=60,
        check=True,
    ).stdout


@dataclass
class ServedDisk:
    """A disk image, the backend that serves it, and the disk in the guest."""

    guest: Guest
    backend: Backend
    disk: Disk
    image: Path
    node: str
    """The node of the image file, for commands on the control socket."""
    name: str = ""
    plugged: bool = False

    @property
    def dev(self) -> str:
        """The device in the guest."""
        return f"/dev/{self.name}"

    def attribute(self, path: str) -> str:
        """A file below the disk's directory of the guest's sysfs."""
        return self.guest.check(f"cat /sys/block/{self.name}/{path}")

    def reads(self) -> int:
        """How many read requests the guest has seen complete."""
        return int(self.attribute("stat").split()[0])

    def writes(self) -> int:
        return int(self.attribute("stat").split()[4])

    def has_read(self, count: int) -> bool:
        return self.reads() >= count

    def has_written(self, count: int) -> bool:
        return self.writes() >= count

    def connected(self) -> bool:
        """Whether QEMU has set the device going in the backend that runs now.

        QEMU answers its monitor only after the handshake.
        """
        started: int = self.backend.export(self.disk.id)["queues-started"]
        return started > 0 and self.guest.connected(self.disk)

    def plug(self) -> None:
        self.name = self.guest.plug(self.disk)
        self.plugged = True

    def unplug(self) -> None:
        self.plugged = False
        self.guest.unplug(self.disk)

    # ---- what the host sees ----

    def allocated(self) -> int:
        """Bytes of the host's storage that the image occupies."""
        return self.image.stat().st_blocks * 512


class DiskServer:
    """Serves new images to one guest."""

    def __init__(self, guest: Guest, workspace: Workspace) -> None:
        self._guest = guest
        self._workspace = workspace
        self._numbers = itertools.count(1)
        self._served: list[ServedDisk] = []
        self.expected_kernel_errors = False

    def add(
        self,
        size: int = 128 * MIB,
        *,
        file: str = "",
        filters: Sequence[str] = (),
        export: str = "writable=on",
        options: Sequence[str] = (),
        num_queues: int | None = None,
        plug: bool = True,
    ) -> ServedDisk:
        """Serve a new sparse image and plug it into the guest.

        `file` and `export` are further options of the file node and of the export, `filters` are
        --blockdev options of nodes above the file, lowest first; `options` come before all.
        """
        name = f"disk{next(self._numbers)}"
        image = self._workspace.image(f"{name}.raw", size)
        node = top = f"{name}-file"
        base = f"driver=file,node-name={node},filename={image},discard=unmap"
        arguments = [*options, "--blockdev", f"{base},{file}" if file else base]
        for number, text in enumerate(filters):
            top, below = f"{name}-filter{number}", top
            arguments += ["--blockdev", f"{text},node-name={top},file={below}"]
        return self.serve(name, image, node, top, arguments, export, num_queues, plug=plug)

    def serve(
        self,
        name: str,
        image: Path,
        node: str,
        top: str,
        arguments: Sequence[str],
        export: str = "writable=on",
        num_queues: int | None = None,
        *,
        plug: bool = True,
    ) -> ServedDisk:
        """The same for nodes, `top` the highest of them, that `arguments` describe.

        The export is called `name`.
        """
        socket = self._workspace.path / f"{name}.sock"
        address = f"addr.type=unix,addr.path={socket}"
        exported = f"type=vhost-user-blk,id={name},node-name={top},{address},{export}"
        backend = Backend(self._workspace, [*arguments, "--export", exported], name=name)
        served = ServedDisk(self._guest, backend, Disk(name, socket, num_queues), image, node)
        self._served.append(served)
        backend.start()
        if plug:
            served.plug()
        return served

    def finish(self) -> None:
        """What must be true at the end of each test.

        Every disk comes out of the guest, every backend ends cleanly on SIGTERM, and the guest's
        kernel has nothing to complain about, unless the test has said that it will.
        """
        for served in self._served:
            if served.plugged:
                served.unplug()
            served.backend.terminate()
        errors = self._guest.kernel_errors()
        if errors and not self.expected_kernel_errors:
            raise AssertionError("the guest's kernel complains:\n" + "\n".join(errors))

    def close(self) -> None:
        for served in self._served:
            served.backend.close()
