# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk luks`: the key slots of encrypted disks, at rest or in use."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
from contextlib import ExitStack
from typing import Any

from vhostblk import luks
from vhostblk.cli import passphrase, places
from vhostblk.cli.errors import FAILED, USAGE, CliError
from vhostblk.cli.parser import Parser
from vhostblk.cli.table import size as size_text
from vhostblk.cli.table import table
from vhostblk.control.client import ControlClient
from vhostblk.luks.options import KdfOptions
from vhostblk.schema import VhostblkError, parse_size, validate
from vhostblk.secret import SecretBytes

DESCRIPTION = """\
List, test, add, remove and replace the passphrases of an encrypted disk (LUKS1 or LUKS2). TARGET is
a file: an image that nobody uses, or its detached header; or a node of a running backend.
"""

EPILOG = """\
examples:
  vhostblk luks list disk.luks
  vhostblk luks add disk.luks
  vhostblk luks add disk.luks --key-file old --new-key-file new --iter-time 5000
  vhostblk luks remove disk.luks --slot 3
  vhostblk luks rotate crypt0 --name web1
      The passphrase of a disk in use: node crypt0 of the backend web1.

'vhostblk luks COMMAND --help' explains one. 'vhostblk create -f luks' makes a new disk.
"""

_TIMEOUT = 600.0  # deriving a key may take its time, and wait for others


def configure(parser: Parser) -> None:
    """Declare the commands and their options."""
    commands = parser.add_subparsers(
        parser_class=Parser, metavar="COMMAND", dest="luks_command", required=True
    )
    for name, text, declare in (
        ("list", "show the header and its key slots", _nothing),
        ("test", "say whether a passphrase is right, and which slot it opens", _test),
        ("add", "let one more passphrase unlock the disk", _add),
        ("remove", "destroy a key slot, or all that a passphrase opens", _remove),
        ("rotate", "replace a passphrase; the new one works before the old one ceases to", _rotate),
        ("reencrypt", "give a disk in use another key, or its first one, or go on", _reencrypt),
        ("convert", "make a LUKS1 header LUKS2: same key, same passphrases", _nothing),
        ("repair", "write the damaged one of the two copies of a LUKS2 header again", _nothing),
    ):
        below = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=passphrase.HELP
        )
        below.add_argument(
            "target",
            metavar="TARGET",
            help="a file at rest; with --name or --socket, or if there is no such file, a node",
        )
        below.add_argument("--name", help="the backend (see 'vhostblk ls')")
        below.add_argument("--socket", metavar="PATH", help="its control socket")
        below.add_argument("--json", action="store_true", help="for programs")
        below.add_argument("--max-memory", metavar="SIZE", help="what a header may ask for at "
                           "most when a passphrase is tried (files only; 1G)")  # fmt: skip
        below.add_argument("--max-iterations", metavar="N", type=int, help="the same for the "
                           "iterations of PBKDF2 (100000000)")  # fmt: skip
        declare(below)


def _nothing(parser: Parser) -> None:
    pass


def _test(parser: Parser) -> None:
    _slot(parser, "try this slot only")
    passphrase.configure(parser, "key-", "the passphrase")


def _add(parser: Parser) -> None:
    _slot(parser, "use this slot, which must be free")
    passphrase.configure(parser, "key-", "a passphrase that there is")
    _new(parser)


def _remove(parser: Parser) -> None:
    _slot(parser, "this slot; without it, those that the passphrase opens")
    passphrase.configure(parser, "key-", "the passphrase to remove")
    parser.add_argument("--force", action="store_true", help="also the last one: after that nobody "
                        "can ever read the disk again")  # fmt: skip


def _rotate(parser: Parser) -> None:
    _slot(parser, "the slot of the old passphrase, if it has several")
    passphrase.configure(parser, "key-", "the old passphrase")
    _new(parser)


def _reencrypt(parser: Parser) -> None:
    parser.add_argument("--secret", action="append", default=[], metavar="ID", help="a secret "
                        "object with a passphrase for the new key, besides the disk's own; may be "
                        "repeated")  # fmt: skip
    parser.add_argument("--speed", metavar="SIZE", help="at most so much per second")
    parser.add_argument("--force", action="store_true", help="although images behind an overlay "
                        "can only be opened with the detached header as it is now")  # fmt: skip
    configure_kdf(parser)


def _slot(parser: Parser, text: str) -> None:
    parser.add_argument("--slot", metavar="N", type=int, help=text)


def _new(parser: Parser) -> None:
    passphrase.configure(parser, "new-key-", "the new passphrase")
    configure_kdf(parser)


def configure_kdf(parser: Parser) -> None:
    """Declare the options about the cost of a passphrase."""
    parser.add_argument("--iter-time", metavar="MS", help="time to spend on it here (2000)")
    parser.add_argument("--pbkdf", choices=("pbkdf2", "argon2i", "argon2id"),
                        help="argon2id with LUKS2; LUKS1 has pbkdf2 only")  # fmt: skip
    parser.add_argument("--pbkdf-memory", metavar="SIZE", help="for Argon2 (1G, or half of all)")
    parser.add_argument("--pbkdf-parallel", metavar="N", help="threads for Argon2 (up to 4)")
    parser.add_argument("--pbkdf-force-iterations", metavar="N", help="instead of measuring")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    try:
        with ExitStack() as secrets:
            result = _on_node(args, secrets) if _is_live(args) else _at_rest(args, secrets)
    except VhostblkError as error:
        if (error.data or {}).get("code") == "bad-passphrase":
            # The same status, whoever says so.
            raise CliError(error.desc, status=FAILED, data=error.data) from None
        if error.desc.startswith("LUKS header") or (error.data or {}).get("code") == "not-luks":
            error.desc = f"{args.target}: {error.desc}"
        raise
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(_text(args, result), end="")
    return 0


def _is_live(args: argparse.Namespace) -> bool:
    if args.luks_command == "reencrypt" or args.name is not None or args.socket is not None:
        return True
    if os.path.exists(args.target):
        return False
    if "/" in args.target or not places.running_places():
        raise CliError(f"there is no file '{args.target}'")
    return True


# ---- files


def _at_rest(args: argparse.Namespace, secrets: ExitStack) -> dict[str, Any]:
    from vhostblk.luks.file import open_storage

    command, slot = args.luks_command, getattr(args, "slot", None)
    write = command not in ("list", "test")

    async def work() -> dict[str, Any]:
        with open_storage(args.target, write=write) as storage:
            # To look at a header, or to repair it, one need not be able to use it.
            met = None if command in ("list", "repair") else frozenset[str]()
            volume = await luks.open_volume(storage, _limits(args), met)
            return await act(volume)

    async def act(volume: luks.Volume) -> dict[str, Any]:
        if command == "list":
            return luks.describe(volume)
        if command == "repair":
            damage = list(volume.damage)
            return {"repaired": await volume.repair(), "damage": damage}
        if command == "convert":
            return luks.describe(await luks.convert(volume))
        if command == "remove" and slot is not None:
            await volume.remove_slot(slot, force=args.force)
            return {"keyslots": [slot]}
        key = _key(args, secrets)
        if command == "test":
            return {"keyslot": await volume.test(key, slot)}
        if command == "remove":
            return {"keyslots": await volume.remove_passphrase(key, force=args.force)}
        old, disk_key = await volume.unlock(key, slot if command == "rotate" else None)
        secrets.enter_context(disk_key)
        new = _new_key(args, secrets)  # asked for after the old one was right
        if command == "add":
            return {"keyslot": await volume.add_slot(disk_key, new, slot, kdf_options(args))}
        return {"keyslot": await volume.replace_slot(old, disk_key, new, kdf_options(args))}

    return asyncio.run(work())


def _limits(args: argparse.Namespace) -> luks.Limits:
    memory = None
    if args.max_memory is not None:
        try:
            memory = parse_size(args.max_memory)
        except ValueError as error:
            raise CliError(f"--max-memory: {error}", status=USAGE) from None
    return luks.Limits.raised(memory, args.max_iterations or None)


# ---- nodes


def _on_node(args: argparse.Namespace, secrets: ExitStack) -> dict[str, Any]:
    command, slot = args.luks_command, getattr(args, "slot", None)
    if command == "repair":
        raise CliError(
            "a header in use is repaired by the backend before its next change; repair works on "
            "files",
            status=USAGE,
        )
    given: dict[str, Any] = {"node-name": args.target}
    if slot is not None:
        given["keyslot"] = slot
    with ControlClient(places.find_socket(args.name, args.socket), timeout=_TIMEOUT) as client:

        def ask(what: str, more: dict[str, Any]) -> dict[str, Any]:
            result: dict[str, Any] = client.execute(f"luks-key-slot-{what}", given | more)
            return result

        if command == "list":
            return ask("list", {})
        if command == "convert":
            converted: dict[str, Any] = client.execute("luks-convert", given)
            return converted
        if command == "reencrypt":
            given |= {"secrets": args.secret, "speed": _speed(args), "force": args.force,
                      **_costs(args)}  # fmt: skip
            begun: dict[str, Any] = client.execute("luks-reencrypt", given)
            return begun
        if command == "remove":
            more: dict[str, Any] = {"force": args.force}
            if slot is None:
                more["old-data"] = _base64(_key(args, secrets))
            return ask("remove", more)
        key = _base64(_key(args, secrets))
        if command == "test":
            return ask("test", {"key-data": key})
        new = {"new-data": _base64(_new_key(args, secrets)), **_costs(args)}
        return ask(command, {"key-data" if command == "add" else "old-data": key, **new})


def _speed(args: argparse.Namespace) -> int:
    try:
        return parse_size(args.speed or "0")
    except ValueError as error:
        raise CliError(f"--speed: {error}", status=USAGE) from None


def _base64(secret: SecretBytes) -> str:
    return base64.b64encode(secret.view()).decode("ascii")


# ---- both


def _key(args: argparse.Namespace, secrets: ExitStack) -> SecretBytes:
    what = {"remove": "passphrase to remove", "rotate": "old passphrase"}
    text = what.get(args.luks_command, "passphrase")
    return secrets.enter_context(passphrase.get(args, "key-", text))


def _new_key(args: argparse.Namespace, secrets: ExitStack) -> SecretBytes:
    return secrets.enter_context(passphrase.get(args, "new-key-", "new passphrase", twice=True))


def _costs(args: argparse.Namespace) -> dict[str, Any]:
    """What was said about the cost of a passphrase, with JSON's types."""
    return kdf_options(args).to_options()


def kdf_options(args: argparse.Namespace) -> KdfOptions:
    """The same, checked."""
    names = KdfOptions.model_fields
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return validate(KdfOptions, {name.replace("_", "-"): value for name, value in given.items()})


def _text(args: argparse.Namespace, result: dict[str, Any]) -> str:
    command = args.luks_command
    if command in ("list", "convert"):
        return _listed(args.target, result)
    if command == "repair":
        if not result["repaired"]:
            return f"{args.target}: nothing to repair\n"
        return "".join(f"{args.target}: repaired: {text}\n" for text in result["damage"])
    if command == "reencrypt":
        return (
            f"{args.target}: job '{result['job-id']}' has begun; 'vhostblk qmp query-block-jobs' "
            "says how far it is\n"
        )
    if command == "remove":
        slots = ", ".join(map(str, result["keyslots"]))
        return f"{args.target}: key slot {slots} destroyed\n"
    said: dict[str, str] = {
        "test": "the passphrase opens key slot {}",
        "add": "the new passphrase has key slot {}",
        "rotate": "the new passphrase has key slot {}; the old one is gone",
    }
    return f"{args.target}: {said[command].format(result['keyslot'])}\n"


def _listed(target: str, told: dict[str, Any]) -> str:
    head = (
        f"{target}: LUKS{told['version']}, {told['cipher']} with a key of {8 * told['key-size']} "
        f"bits, sectors of {told['sector-size']} bytes\n"
        f"UUID {told['uuid']}, data from {size_text(told['payload-offset'])} on\n"
    )
    rows = []
    for slot in told["slots"]:
        if slot["state"] != "inactive":
            rows.append((str(slot["slot"]), slot["state"], _slot_text(slot)))
    damage = "".join(f"damage: {text}; 'vhostblk luks repair' helps\n"
                     for text in told.get("damage", ()))  # fmt: skip
    if not rows:
        return f"{head}no key slots: nobody can read this disk\n{damage}"
    return head + table(("slot", "state", "passphrase"), rows) + damage


def _slot_text(slot: dict[str, Any]) -> str:
    if "problem" in slot:
        return str(slot["problem"])
    if slot["pbkdf"] == "pbkdf2":
        return f"pbkdf2-{slot['hash']}, {slot['iterations']} iterations"
    return (
        f"{slot['pbkdf']}, {slot['iterations']} passes over {size_text(slot['memory'])}, "
        f"{slot['parallel']} threads"
    )
