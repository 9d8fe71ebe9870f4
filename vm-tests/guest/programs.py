# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of our own for guests: compiled here, static, and carried in on a disk."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .disks import DiskServer
from .vm import Guest
from .workspace import Workspace

SOURCES = Path(__file__).parent / "programs"


def compile_program(name: str, workspace: Workspace) -> Path:
    """programs/<name>.c as an executable that needs no library of the guest's."""
    output = workspace.path / name
    compiler = os.environ.get("CC", "cc")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s"]
    done = subprocess.run(
        [*compiler.split(), *flags, "-o", str(output), str(SOURCES / f"{name}.c")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}.c does not compile:\n{done.stderr}")
    return output


def install(name: str, guest: Guest, disks: DiskServer, workspace: Workspace) -> str:
    """Compile a program and put it into the guest; its path there."""
    program = compile_program(name, workspace).read_bytes()
    carrier = disks.add(-(-len(program) // 512) * 512, plug=False)
    with carrier.image.open("r+b") as file:
        file.write(program)
    carrier.plug()
    path = f"/tmp/{name}"
    guest.check(f"head -c {len(program)} {carrier.dev} >{path} && chmod +x {path}")
    carrier.unplug()
    return path
