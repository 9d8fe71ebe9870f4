# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk check`: check an image in use."""

from __future__ import annotations

import argparse
import json

from vhostblk.cli import image
from vhostblk.cli.parser import Parser

DESCRIPTION = """\
Check the tables of an image while it is in use, changing nothing. Guests are paused
until that is done, which takes a moment for each table of the image. For
an image that nobody uses, and to repair one, there is 'qemu-img check'.
"""

EPILOG = """\
examples:
  vhostblk check
  vhostblk check vda --json

The status is that of 'qemu-img check': 0 nothing is wrong, 2 the image is
corrupt, 3 it has leaked clusters, which cost space only.
"""

CORRUPT, LEAKS = 2, 3


def configure(parser: Parser) -> None:
    """Declare the options."""
    image.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with image.connect(args) as client:
        result = client.execute("block-image-check", {"device": image.device_of(args, client)})
    corruptions, leaks = result.get("corruptions", 0), result.get("leaks", 0)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for message in result.get("messages", ()):
            print(message)
        name = result["node-name"]
        if corruptions:
            print(f"{name}: {corruptions} errors were found; data may be corrupt")
        if leaks:
            print(f"{name}: {leaks} leaked clusters were found; they cost space, no data")
        if not corruptions and not leaks:
            print(f"{name}: no errors were found")
        print(
            f"{result.get('allocated-clusters', 0)} of {result['total-clusters']} clusters are "
            f"allocated; guests were paused for {result['pause-us'] / 1000:.1f} ms"
        )
    return CORRUPT if corruptions or result.get("check-errors") else LEAKS if leaks else 0
