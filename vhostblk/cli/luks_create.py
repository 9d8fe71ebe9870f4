# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk create -f luks`: an encrypted disk, or a detached header for one."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from vhostblk import luks
from vhostblk.cli import passphrase
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser
from vhostblk.creating import creating
from vhostblk.luks.file import open_storage
from vhostblk.luks.options import CreateOptions
from vhostblk.nodes._create_file import FileCreateOptions, create_file
from vhostblk.schema import validate


def configure(parser: Parser) -> None:
    """Declare the options that this format has in addition."""
    passphrase.configure(parser, "key-", "of what is encrypted, the passphrase")
    parser.add_argument(
        "--header", metavar="FILE", help="with -f luks: put the header into this file, and into "
        "the image nothing but data"
    )  # fmt: skip


def create(args: argparse.Namespace, size: int, given: dict[str, Any]) -> str:
    """Do it; what was made."""
    options = validate(CreateOptions, given)
    if size % options.sector_size:
        raise CliError(
            f"the size is not a multiple of the size of a sector, {options.sector_size}",
            status=USAGE,
        )
    path, header = args.file, args.header or args.file
    with passphrase.get(args, "key-", "new passphrase", twice=True) as words:

        async def work() -> str:
            with open_storage(header, write=True) as storage:
                volume = await luks.create(storage, words, options, detached=bool(args.header))
                offset, version = volume.segment.offset, volume.version
                if not args.header:
                    # From the end of the header on the file is a hole: noise, once decrypted.
                    os.truncate(path, offset + size)
            if args.header:
                os.truncate(path, offset + size)
            return f"luks{version}"

        existed = [name for name in (path, header) if os.path.exists(name)]
        for name in {path, header}:
            create_file(FileCreateOptions(driver="file", filename=name, size=0))
        try:
            with creating(header):
                return asyncio.run(work())
        except BaseException:
            for name in {path, header} - set(existed):
                os.unlink(name)
            raise
