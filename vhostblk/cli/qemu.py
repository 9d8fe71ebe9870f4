# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU has to be told to use a backend, and what it has been told already."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk import keyval
from vhostblk.cli.errors import CliError
from vhostblk.schema import VhostblkError

DEFAULT_QEMU = "qemu-system-x86_64"
MARK = "@VHOSTBLK@"
# From here on milliseconds are written, and `reconnect` is deprecated.
_RECONNECT_MS = (9, 2)
MEMORY_ID = "vhostblk-mem"
# QEMU's options that say how a vhost-user device is used, and the key each may leave out.
_IMPLIED = {
    "device": "driver",
    "object": "qom-type",
    "chardev": "backend",
    "machine": "type",
    "numa": "type",
}
_SHARED_ANYWAY = ("memory-backend-memfd", "memory-backend-shm")


@dataclass(frozen=True)
class Export:
    """What QEMU must know of an export."""

    id: str
    path: str
    num_queues: int


def exports(listed: Iterable[dict[str, Any]]) -> list[Export]:
    """The exports of query-block-exports that QEMU can reach by a path."""
    result = []
    for entry in listed:
        addr = entry.get("addr") or {}
        if entry.get("type") == "vhost-user-blk" and addr.get("type") == "unix":
            queues = int(entry.get("num-queues", 1))
            result.append(Export(str(entry["id"]), str(addr["path"]), queues))
    return result


def version(program: str) -> tuple[int, int] | None:
    """Version of an installed QEMU; None if it cannot be asked."""
    try:
        answer = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"version (\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match else None


def arguments(
    served: Sequence[Export],
    *,
    memory: str | None = "1G",
    queues: int | None = None,
    qemu_version: tuple[int, int] | None = None,
    machine: bool = True,
) -> list[str]:
    """QEMU's arguments for these exports.

    `memory` must be the size of the guest's memory, all of which QEMU shares
    with the backend; None leaves that to what the command line says already.
    Without `queues` QEMU makes one for each vCPU.
    """
    for export in served:
        if queues is not None and queues > export.num_queues:
            raise CliError(
                f"--queues {queues}: export '{export.id}' offers {export.num_queues}; start the "
                "backend with a larger --num-queues"
            )
    result: list[str] = []
    if memory is not None:
        result += ["-object", f"memory-backend-memfd,id={MEMORY_ID},size={memory},share=on"]
        if machine:
            result += ["-machine", f"memory-backend={MEMORY_ID}"]
    modern = qemu_version is not None and qemu_version >= _RECONNECT_MS
    reconnect = "reconnect-ms=1000" if modern else "reconnect=1"
    for export in served:
        chardev = f"vhostblk-{export.id}"
        path = export.path.replace(",", ",,")
        result += ["-chardev", f"socket,id={chardev},path={path},{reconnect}"]
        count = "" if queues is None else f",num-queues={queues}"
        result += ["-device", f"vhost-user-blk-pci,chardev={chardev}{count}"]
    return result


def as_shell(words: Sequence[str]) -> str:
    """Arguments as lines to paste into a shell."""
    lines = []
    for option, value in zip(words[::2], words[1::2], strict=True):
        lines.append(f"  {option} {shlex.quote(value)}")
    return " \\\n".join(lines)


@dataclass(frozen=True)
class CommandLine:
    """What a QEMU command line says already."""

    program: str
    memory: str | None  # value of -m as a size with a unit
    shared_already: bool  # it sets a memory backend of its own

    @classmethod
    def read(cls, words: Sequence[str]) -> CommandLine:
        """Look through a command line, also one inside a word for a shell."""
        for word in words:
            if MARK in word and any(map(str.isspace, word)):
                try:
                    return cls.read(shlex.split(word))
                except ValueError:
                    break  # not a shell's word after all
        program = DEFAULT_QEMU
        memory: str | None = None
        shared = False
        for option, value in zip(reversed(words), ["", *reversed(words[1:])], strict=True):
            name = option.lstrip("-") if option.startswith("-") else ""
            if name == "m":
                memory = memory or memory_size(value)  # the last one counts
            elif (name in ("machine", "M") and "memory-backend=" in value) or (
                name == "numa" and "memdev=" in value
            ):
                shared = True
            elif option.rpartition("/")[2].startswith("qemu-"):
                program = option
        return cls(program, memory, shared)


@dataclass(frozen=True)
class RunningDisks:
    """How the vhost-user-blk devices of a running QEMU were asked for."""

    count: int
    shared: tuple[str, ...]  # ids of memory that others may map
    guest: tuple[str, ...]  # ids of what the guest's memory is said to be
    unsteady: tuple[str, ...]  # chardevs that do not connect again

    @classmethod
    def read(cls, words: Sequence[str]) -> RunningDisks:
        """Look through a command line."""
        given: dict[str, list[dict[str, Any]]] = {}
        for option, value in itertools.pairwise(words):
            name = option.lstrip("-") if option.startswith("-") else ""
            name = "machine" if name == "M" else name
            if name in _IMPLIED:
                with contextlib.suppress(VhostblkError):  # QEMU understood it, or does not run
                    parsed = keyval.parse(value, implied_key=_IMPLIED[name])
                    given.setdefault(name, []).append(parsed.options)
        disks = [
            device
            for device in given.get("device", [])
            if str(device.get("driver", "")).startswith("vhost-user-blk")
        ]
        used = [device["chardev"] for device in disks if "chardev" in device]
        memory = [entry.get("memory-backend") for entry in given.get("machine", [])]
        memory += [entry.get("memdev") for entry in given.get("numa", [])]
        return cls(
            len(disks),
            tuple(str(entry.get("id")) for entry in given.get("object", []) if _is_shared(entry)),
            tuple(str(id) for id in memory if id is not None),
            tuple(
                str(chardev["id"])
                for chardev in given.get("chardev", [])
                if chardev.get("id") in used and not _reconnects(chardev)
            ),
        )


def _is_shared(options: dict[str, Any]) -> bool:
    kind = str(options.get("qom-type", ""))
    if not kind.startswith("memory-backend-"):
        return False
    return options.get("share", kind in _SHARED_ANYWAY) in (True, "on", "yes", "true", "y")


def _reconnects(chardev: dict[str, Any]) -> bool:
    times = (chardev.get("reconnect", 0), chardev.get("reconnect-ms", 0))
    return any(str(time) != "0" for time in times)


def memory(text: str) -> str:
    """A size of memory, as a `type` of an option."""
    try:
        size = memory_size(text)
    except CliError:
        size = None
    if size is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size of memory")
    return size


def memory_size(value: str) -> str | None:
    """The size in the value of -m, with the unit that QEMU implies written out."""
    for index, item in enumerate(value.split(",")):
        key, equals, text = item.partition("=")
        if not equals and index == 0:
            text = key
        elif key != "size":
            continue
        if not re.fullmatch(r"\d+(\.\d+)?[bBkKmMgGtTpPeE]?", text):
            raise CliError(f"cannot read the memory size '{text}' in '-m {value}'")
        return text if text[-1].isalpha() else text + "M"
    return None


def substitute(words: Sequence[str], insert: Sequence[str]) -> list[str]:
    """Put `insert` where the mark stands, also inside a word for a shell."""
    result: list[str] = []
    for word in words:
        if word == MARK:
            result += insert
        else:
            result.append(word.replace(MARK, shlex.join(insert)))
    return result
