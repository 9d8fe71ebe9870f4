# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk qmp`: one command of the control socket."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vhostblk import jsontext, keyval
from vhostblk.cli import places
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser, seconds
from vhostblk.control.client import ControlClient
from vhostblk.schema import VhostblkError

DESCRIPTION = """\
Send one command to a running backend and print its result as JSON. Arguments
are a JSON object, or key=value words with dotted keys.
"""

EPILOG = """\
examples:
  vhostblk qmp query-block-exports
  vhostblk qmp blockdev-add '{"driver": "null-co", "node-name": "n", "size": 1048576}'
  vhostblk qmp blockdev-add driver=file node-name=f filename=b.img cache.direct=true
  vhostblk qmp --name web1 block_resize node-name=disk size=42949672960
  vhostblk qmp --list

In key=value words what reads as a JSON number, true, false, null, list or object is
one; other words are text. 'qmp-shell SOCKET' gives an interactive session.

The status is 4 when the backend answers with an error, 3 when there is none.
"""


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument(
        "name_of_command", nargs="?", metavar="COMMAND", help="for example query-status"
    )
    parser.add_argument("arguments", nargs="*", metavar="JSON|KEY=VALUE", help="its arguments")
    parser.add_argument("--name", help="the backend (see 'vhostblk ls')")
    parser.add_argument("--socket", metavar="PATH", help="its control socket, instead of --name")
    parser.add_argument("--list", action="store_true", help="list the commands there are")
    parser.add_argument(
        "--json", action="store_true", help="as JSON: with --list; results are JSON anyway"
    )
    parser.add_argument("--compact", action="store_true", help="the result on one line")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=30.0,
        help="how long to wait for the answer (default: 30)",
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.name_of_command is None and not args.list:
        raise CliError("which command? 'vhostblk qmp --list' shows them", status=USAGE)
    arguments = parse_arguments(args.arguments)
    with ControlClient(places.find_socket(args.name, args.socket), args.timeout) as client:
        if args.list:
            names = sorted(entry["name"] for entry in client.execute("query-commands"))
            print(json.dumps(names) if args.json else "\n".join(names))
            return 0
        result = client.execute(args.name_of_command, arguments)
    print(json.dumps(result, indent=None if args.compact else 2))
    return 0


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """The arguments of the command from the words of the command line."""
    try:
        if len(words) == 1 and words[0].lstrip().startswith("{"):
            return keyval.parse(words[0]).options
        items = []
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise CliError(
                    f"'{word}' is neither KEY=VALUE nor the only JSON object", status=USAGE
                )
            items.append(f"{key}={value.replace(',', ',,')}")
        typed = _typed(keyval.parse(",".join(items)).options)
        assert isinstance(typed, dict)
        return typed
    except CliError:
        raise
    except VhostblkError as error:
        raise CliError(error.desc, status=USAGE, data=error.data) from None


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_typed(below) for below in value]
    try:
        return jsontext.loads(value)
    except jsontext.JsonError:
        return value
