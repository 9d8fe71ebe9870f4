# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk create`: make a new image."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

from vhostblk.cli import luks_create, passphrase
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser, did_you_mean
from vhostblk.creating import creating
from vhostblk.nodes._create_file import FileCreateOptions, create_file
from vhostblk.nodes.qcow2.backing import CONTAINERS, STORAGE
from vhostblk.schema.model import parse_size

DESCRIPTION = """\
Create an image. A file that exists is left alone, unless it is empty or --force is given.
"""

EPILOG = """\
examples:
  vhostblk create -f qcow2 disk.qcow2 40G
  vhostblk create -f qcow2 -o cluster-size=128k,extended-l2=on disk.qcow2 40G
  vhostblk create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2 40G
  vhostblk create -f raw -o preallocation=falloc disk.img 40G
  vhostblk create -f luks -o version=luks2,sector-size=4096 disk.luks 40G
      An encrypted disk; the passphrase is asked for, or read with --key-file.
  vhostblk create -f qcow2 -o encrypt.format=luks disk.qcow2 40G
      The same inside a qcow2 image.

Options are those of blockdev-create, and the names that 'qemu-img create -o' has for them
(cluster_size, compat=0.10 or 1.1, backing_fmt, …); nocow and extent_size_hint are the file's.
"""

FORMATS = ("raw", "qcow2", "qed", "luks")
SECTOR = 512
_PASSPHRASE = "passphrase"  # the id of the secret object
_OF_FILE = ("nocow", "extent-size-hint")
_COMPAT = {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("-f", "--format", required=True, choices=FORMATS, help="of the image")
    parser.add_argument(
        "-o",
        "--options",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help="options of the format",
    )
    parser.add_argument("-b", "--backing", metavar="FILE", help="the image below")
    parser.add_argument("-F", "--backing-format", metavar="FORMAT", help="its format")
    luks_create.configure(parser)
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("file", metavar="FILE", help="the image to make")
    parser.add_argument("size", metavar="SIZE", help="of the disk: bytes, or with k, M, G, T")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    try:
        size = parse_size(args.size)
    except ValueError as error:
        raise CliError(str(error), status=USAGE) from None
    options = _options(args.options)
    path = Path(args.file)
    files = [file for file in (args.file, args.header, options.get("data-file")) if file]
    if len({os.path.realpath(file) for file in files}) != len(files):
        raise CliError("an image and its other file must be two files", status=USAGE)
    for file in files:
        if os.path.exists(file) and os.path.getsize(file) and not args.force:
            raise CliError(f"'{file}' exists and is not empty; --force replaces it")
    if args.format != "luks" and args.header:
        raise CliError(f"{args.format} has no header of its own; luks has", status=USAGE)
    if args.format != "luks" and "encrypt" not in options and passphrase.is_given(args, "key-"):
        raise CliError(f"{args.format} has no passphrase; luks has, and qcow2 with -o "
                       "encrypt.format=luks", status=USAGE)  # fmt: skip
    made = args.format
    if args.backing is not None and args.format in ("raw", "luks"):
        raise CliError(f"a {args.format} image cannot have a backing file", status=USAGE)
    if args.format == "luks":
        made = luks_create.create(args, size, options)
    elif args.format == "raw":
        _create_raw(str(path), size, options)
    else:
        if args.backing is not None:
            if args.backing_format is None:
                raise CliError("-b needs -F: the format of a backing file is not guessed",
                               status=USAGE)  # fmt: skip
            _check_backing(path, args.backing)
            options |= {"backing-file": args.backing, "backing-fmt": args.backing_format}
        known, fmt = (*CONTAINERS, *STORAGE), options.get("backing-fmt")
        if fmt is not None and fmt not in known:
            near = did_you_mean(fmt, known)
            raise CliError(f"the format of a backing file is one of {', '.join(known)}, not "
                           f"'{fmt}'{near}", status=USAGE)  # fmt: skip
        size = -(-size // SECTOR) * SECTOR
        asyncio.run(_create(args, size, options))
    print(f"{path}: {made}, {size} bytes")
    return 0


def _options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in ",".join(words).split(",") if words else []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise CliError(f"'{word}' in -o is not KEY=VALUE", status=USAGE)
        name = key.replace("_", "-")
        group, _, member = name.partition(".")
        if group == "encrypt":
            if not member:
                raise CliError(f"'{word}' in -o: say encrypt.format=luks", status=USAGE)
            if member == "key-secret":
                raise CliError(
                    f"'{key}' in -o: the passphrase is asked for, or read with --key-file",
                    status=USAGE,
                )
            options.setdefault(group, {"key-secret": _PASSPHRASE})[member] = value
            continue
        if name == "compat":
            if value not in _COMPAT:
                raise CliError(f"compat is 0.10 or 1.1, not '{value}'", status=USAGE)
            name, value = "version", _COMPAT[value]
        options[name] = value
    return options


def _create_raw(path: str, size: int, options: dict[str, Any]) -> None:
    from vhostblk.schema import validate

    given = {"driver": "file", "filename": path, "size": size, **options}
    create_file(validate(FileCreateOptions, given))


def _check_backing(path: Path, name: str) -> None:
    if name.startswith("json:"):
        return
    below = path.parent / name
    if not below.exists():
        raise CliError(f"the backing file '{below}' does not exist")
    if below.resolve() == path.resolve():
        raise CliError("an image cannot be its own backing file", status=USAGE)


async def _create(args: argparse.Namespace, size: int, options: dict[str, Any]) -> None:
    from vhostblk.backend import Backend
    from vhostblk.jobs.create import Creator, check_options
    from vhostblk.schema import validate

    path: str = args.file
    of_file = {name: options.pop(name) for name in _OF_FILE if name in options}

    backend = Backend()
    await backend.start()
    try:
        creator = Creator(backend.graph, backend.driver_registry, "create", locked=False)
        files = [path]
        wanted = {
            "driver": args.format,
            "file": {"driver": "file", "filename": path},
            "size": size,
            **options,
        }
        if "data-file" in options:
            files.append(options["data-file"])
            wanted["data-file"] = {"driver": "file", "filename": options["data-file"]}
        # Before a file is emptied that --force may replace.
        driver, checked = check_options(backend.driver_registry, wanted)
        driver.check_create(checked)
        new = [
            validate(FileCreateOptions, {"driver": "file", "filename": file, "size": 0, **of_file})
            for file in files
        ]
        if "encrypt" in options:
            secret = passphrase.as_object(args, "key-", "new passphrase", twice=True)
            await backend.object_add({"id": _PASSPHRASE, **secret})
        made: list[str] = []
        try:
            for one in new:
                existed = os.path.exists(one.filename)
                create_file(one)
                if not existed:
                    made.append(one.filename)
            with creating(path):
                await creator.create(wanted)
        except BaseException:
            for file in made:
                os.unlink(file)
            raise
    finally:
        await backend.close()
