# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command line tells an operator to type works with a real QEMU."""

from __future__ import annotations

import json
import subprocess

import pytest
from guest import Backend, Guest, GuestImages, Workspace
from guest.backend import vhostblk_command
from guest.disks import MIB
from guest.fio import fio
from guest.vm import QEMU

MEMORY = "512M"
LOAD = "--rw=randwrite --bs=4k --iodepth=16 --size=8M"


def test_qemu_args_of_a_running_backend(
    workspace: Workspace, images: GuestImages, accel: str
) -> None:
    image = workspace.image("disk.raw", 64 * MIB)
    socket = workspace.path / "disk.sock"
    address = f"addr.type=unix,addr.path={socket}"
    options = [
        *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
        "--export",
        f"type=vhost-user-blk,id=disk,node-name=disk,writable=on,serial=args,{address}",
    ]
    backend = Backend(workspace, options)
    try:
        backend.start()
        command = [*vhostblk_command(), "qemu-args", "--socket", str(backend.control_path)]
        done = subprocess.run(
            [*command, "--memory", MEMORY, "--qemu", QEMU, "--json"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        guest = Guest(
            workspace,
            images,
            accel,
            memory=MEMORY,
            shared_memory=False,
            qemu_options=json.loads(done.stdout),
        )
        try:
            guest.start()
            assert guest.check("cat /sys/block/vda/serial") == "args"
            guest.check(fio("/dev/vda", LOAD))
            # The options include QEMU's coming back.
            backend.kill()
            backend.start()
            guest.check(fio("/dev/vda", LOAD))
            assert guest.kernel_errors() == []
        finally:
            guest.close()
        backend.terminate()
    finally:
        backend.close()


def test_run_ends_with_qemu(
    workspace: Workspace, images: GuestImages, accel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(workspace.path))
    image = workspace.image("disk.raw", 64 * MIB)
    wrapper = [*vhostblk_command(), "run", str(image), "--serial", "captive", "--"]
    guest = Guest(
        workspace,
        images,
        accel,
        memory=MEMORY,
        shared_memory=False,
        wrapper=wrapper,
        qemu_options=["@VHOSTBLK@"],
    )
    try:
        guest.start()
        assert guest.check("cat /sys/block/vda/serial") == "captive"
        guest.check(fio("/dev/vda", LOAD))
        guest.console.send("poweroff -f")
        assert guest.process.wait(30) == 0
        assert not list(workspace.path.rglob("vhost.sock"))
    finally:
        guest.close()
