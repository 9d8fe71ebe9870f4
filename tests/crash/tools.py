# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's tools: those of the host, and newer ones where scripts/fetch-qemu-tools has put them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
SECONDS = 60


class ToolError(AssertionError):
    """A tool has failed."""


def plain_environment() -> dict[str, str]:
    """Without the sanitizer that may be preloaded into this process."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@dataclass(frozen=True)
class Check:
    """What `qemu-img check` says."""

    corruptions: int
    leaks: int
    errors: int
    text: str


@dataclass(frozen=True)
class Tools:
    """One version of qemu-img, qemu-io and qemu-nbd."""

    qemu_img: str
    qemu_io: str
    qemu_nbd: str
    version: tuple[int, int]

    @property
    def name(self) -> str:
        return f"qemu-{self.version[0]}.{self.version[1]}"

    def run(
        self,
        *arguments: str | Path,
        ok: tuple[int, ...] = (0,),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run a tool, whose path comes first; what it prints.

        It runs in the directory of the image: QEMU takes the name of an external data file, unlike
        that of a backing file, relative to its own directory.
        """
        images = [argument for argument in arguments if isinstance(argument, Path)]
        done = subprocess.run(
            [str(argument) for argument in arguments],
            cwd=images[-1].parent if images else None,
            env=plain_environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
        text = done.stdout.decode(errors="replace")
        if done.returncode not in ok:
            line = " ".join(str(argument) for argument in arguments)
            raise ToolError(f"`{line}` ended with {done.returncode}:\n{text[-3000:]}")
        return text

    def img(self, *arguments: str | Path, ok: tuple[int, ...] = (0,)) -> str:
        return self.run(self.qemu_img, *arguments, ok=ok)

    def io(self, image: str | Path, *commands: str, options: tuple[str, ...] = ()) -> str:
        """qemu-io, whose exit status alone does not tell of a pattern that does not fit."""
        line: list[str] = []
        for command in commands:
            line += ["-c", command]
        text = self.run(self.qemu_io, *options, image, *line)
        if "failed" in text or "verification" in text or "unknown command" in text:
            raise ToolError(f"qemu-io {image} {' '.join(line)}:\n{text[-3000:]}")
        return text

    def create(self, path: Path, size: int | str, format: str = "qcow2", **options: Any) -> Path:
        """An image; underscores in names of options are theirs. backing=FILE, backing_format=…"""
        arguments: list[str] = ["create", "-q", "-f", format]
        if backing := options.pop("backing", None):
            arguments += ["-b", str(backing), "-F", options.pop("backing_format", "raw")]
        if options:
            arguments += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
        self.img(*arguments, path, str(size))
        return path

    def check(self, path: Path, *arguments: str, format: str = "qcow2") -> Check:
        if format == "raw":
            return Check(0, 0, 0, "nothing to check")
        text = self.img("check", "-f", format, "--output=json", *arguments, path, ok=(0, 1, 2, 3))
        # Messages come before the JSON, on the same stream.
        start = text.find("{\n")
        try:
            found, _ = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            return Check(0, 0, 1, text)
        return Check(
            found.get("corruptions", 0), found.get("leaks", 0), found.get("check-errors", 0), text
        )

    def info(self, path: Path, *arguments: str) -> Any:
        return json.loads(self.img("info", "--output=json", *arguments, path))

    def content(self, path: Path, format: str = "qcow2", *arguments: str) -> bytes:
        """All of the virtual disk."""
        raw = path.with_name(path.name + ".content")
        try:
            self.img("convert", "-q", "-f", format, "-O", "raw", *arguments, path, raw)
            return raw.read_bytes()
        finally:
            raw.unlink(missing_ok=True)


def _tools(find: Any) -> Tools | None:
    paths = [find(name) for name in ("qemu-img", "qemu-io", "qemu-nbd")]
    if None in paths:
        return None
    text = subprocess.run(
        [paths[0], "--version"], env=plain_environment(), capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    assert match is not None, text
    return Tools(paths[0], paths[1], paths[2], (int(match[1]), int(match[2])))


@functools.cache
def all_tools() -> tuple[Tools, ...]:
    """Every version there is here, the host's first."""
    newer = Path(os.environ.get("VHOSTBLK_QEMU_TOOLS") or TOP / "build" / "qemu-tools" / "bin")

    def find_newer(name: str) -> str | None:
        return str(newer / name) if (newer / name).exists() else None

    found = [tools for tools in (_tools(shutil.which), _tools(find_newer)) if tools is not None]
    assert found, "qemu-img, qemu-io and qemu-nbd are needed (Debian package qemu-utils)"
    return tuple(found)


def newest_tools() -> Tools:
    return max(all_tools(), key=lambda tools: tools.version)
