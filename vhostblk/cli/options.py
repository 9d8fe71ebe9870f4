# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of `serve` and `run`: what they mean as a `Plan`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

from vhostblk import keyval
from vhostblk.cli import places
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import Parser, seconds
from vhostblk.cli.parser import Step as StepAction
from vhostblk.cli.process import LOG_LEVELS
from vhostblk.cli.serving import Control, Plan, Step
from vhostblk.schema import VhostblkError

logger = logging.getLogger("vhostblk")

IMPLIED_KEYS = {"blockdev": "driver", "object": "qom-type", "export": "type"}
FORMATS = ("raw", "qcow2", "qed", "auto")
_SECRET = re.compile(r"\bsecret\b.*\bdata\b", re.DOTALL)
_ID = re.compile(r"""\bid(?:=|"\s*:\s*")([\w.-]+)""")
# Parameters of the export, by the options they come from.
_IMAGE_SOURCES = {
    "socket-path": "addr",
    "fd": "addr",
    "serial": "serial",
    "num-queues": "num-queues",
}
# What errors say of the options of nodes, and what IMAGE has instead of them.
_IMAGE_WORDS = {
    "read-only=on,force-share=on": "'vhostblk serve --blockdev' with read-only=on,force-share=on",
    "read-only=on or auto-read-only=on": "--read-only",
    "read-only=on": "--read-only",
    "use cache.direct=off": "leave out --direct",
    "locking=off does without": "'vhostblk serve --blockdev' with locking=off does without",
}
# The first four bytes: qcow2 and QED, as their specifications have them.
_MAGIC = {b"QFI\xfb": "qcow2", b"QED\0": "qed"}


def configure_tree(parser: Parser) -> None:
    """Options that build the tree, in the order they are written."""
    group = parser.add_argument_group(
        "the tree (as for qemu-storage-daemon; done strictly in this order; 'help' as a value "
        "describes what there is)"
    )
    group.add_argument(
        "--blockdev",
        action=StepAction,
        metavar="DRIVER,node-name=NAME,...",
        help="add a block node: key=value with dotted keys, or JSON",
    )
    group.add_argument(
        "--object",
        action=StepAction,
        metavar="TYPE,id=ID,...",
        help="add an object, such as an I/O thread: iothread,id=t0",
    )
    group.add_argument(
        "--export",
        action=StepAction,
        metavar="TYPE,id=ID,node-name=NODE,...",
        help="export a node: vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=SOCKET",
    )
    group.add_argument(
        "--config",
        action=StepAction,
        metavar="FILE",
        help="do what a YAML file says: lists named objects, blockdevs and exports",
    )
    group.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="load a filter written in Python",
    )


def configure_image(parser: Parser) -> None:
    """Options for the simple case: one image, one device."""
    group = parser.add_argument_group("one image")
    group.add_argument("image", nargs="?", metavar="IMAGE", help="an image or a block device")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="raw",
        help="of IMAGE: raw (the default, whatever is in it), qcow2, qed, or auto to look at it",
    )
    group.add_argument("--name", help="name of the backend (from IMAGE if not given)")
    group.add_argument("--read-only", action="store_true", help="the guest may not write")
    group.add_argument("--serial", metavar="TEXT", help="serial number the guest sees")
    group.add_argument("--num-queues", metavar="N", help="virtqueues offered to QEMU at most")
    group.add_argument(
        "--direct", action="store_true", help="do not use the host's page cache (O_DIRECT)"
    )


def configure_process(parser: Parser) -> None:
    """Options about the process itself."""
    group = parser.add_argument_group("the process")
    group.add_argument("--control", metavar="PATH", help="control socket ('none': do without)")
    group.add_argument(
        "--control-group",
        metavar="GROUP",
        help="let members of GROUP use the control socket too (mode 0660 instead of 0600)",
    )
    group.add_argument(
        "--chardev",
        action="append",
        default=[],
        metavar="socket,id=ID,path=PATH,server=on",
        help="with --monitor chardev=ID: a control socket as qemu-storage-daemon has it",
    )
    group.add_argument("--monitor", action="append", default=[], help=argparse.SUPPRESS)
    group.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="what to log (default: info)"
    )
    group.add_argument("--log-file", metavar="FILE", help="log to FILE, not to standard error")
    group.add_argument(
        "--stop-timeout",
        metavar="SECONDS",
        type=seconds,
        default=30.0,
        help="when told to stop, wait this long for requests in flight (default: 30)",
    )


def tree_steps(written: list[tuple[str, str]] | None) -> tuple[list[Step], dict[str, Any]]:
    """The steps the tree options ask for, and the settings of --config files."""
    steps: list[Step] = []
    settings: dict[str, Any] = {}
    for option, value in written or []:
        kind = option.lstrip("-")
        if kind == "config":
            from vhostblk.cli import config

            loaded = config.load(value)
            steps += loaded.steps
            settings.update(loaded.settings)
            continue
        secret = kind == "object" and _SECRET.search(value) is not None
        where = f"{option} {_without_secret(value) if secret else value}"
        try:
            parsed = keyval.parse(value, implied_key=IMPLIED_KEYS[kind])
        except VhostblkError as error:
            if secret:
                text = "cannot be read; a comma inside a value is written as ',,'"
                raise CliError(f"{where}: {text}", status=USAGE) from None
            raise CliError(f"{where}: {error.desc}", status=USAGE, data=error.data) from None
        steps.append(Step(where, kind, parsed.options))
    return steps, settings


def _without_secret(value: str) -> str:
    """What errors, which end up in logs, call an object that may have a secret in its options."""
    found = _ID.search(value)
    return f"secret,id={found[1]},…" if found else "secret,…"


def wants_help(written: list[tuple[str, str]] | None) -> tuple[str, dict[str, Any]] | None:
    """The first option whose value asks for help: its kind, and what else it says."""
    for option, value in written or []:
        kind = option.lstrip("-")
        if kind == "config" or value.lstrip().startswith("{"):
            continue
        try:
            parsed = keyval.parse(value, implied_key=IMPLIED_KEYS[kind])
        except VhostblkError:
            continue  # reported in its turn
        if parsed.help:
            return kind, parsed.options
    return None


def image_steps(
    image: str,
    name: str,
    addr: dict[str, Any],
    args: argparse.Namespace,
) -> list[Step]:
    """What serving one image takes: two nodes and an export."""
    path = os.path.abspath(image)
    read_only = args.read_only
    file: dict[str, Any] = {
        "driver": "host_device" if _is_block_device(path) else "file",
        "node-name": f"{name}-file",
        "filename": path,
        "read-only": read_only,
        "discard": "unmap",
    }
    if getattr(args, "direct", False):
        file["cache"] = {"direct": True}
    disk = {
        "driver": _format(path, getattr(args, "format", "raw")),
        "node-name": name,
        "file": f"{name}-file",
        "read-only": read_only,
        "discard": "unmap",
    }
    export: dict[str, Any] = {
        "type": "vhost-user-blk",
        "id": name,
        "node-name": name,
        "addr": addr,
        "writable": not read_only,
    }
    if getattr(args, "serial", None):
        export["serial"] = args.serial
    if getattr(args, "num_queues", None):
        export["num-queues"] = _number("--num-queues", args.num_queues)
    sources = {
        parameter: f"--{option} {vars(args)[name]}"
        for option, parameter in _IMAGE_SOURCES.items()
        if vars(args).get(name := option.replace("-", "_")) is not None
    }
    steps = (("blockdev", file), ("blockdev", disk), ("export", export))
    return [Step(image, kind, given, sources, _IMAGE_WORDS) for kind, given in steps]


def _format(path: str, wanted: str) -> str:
    """The driver for an image; a guess is made only if that is asked for."""
    found = "raw"
    with contextlib.suppress(OSError):  # opening it will say what is wrong
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = _MAGIC.get(os.read(fd, 4), "raw")
        finally:
            os.close(fd)
    if wanted == "auto":
        return found
    if wanted == "raw" != found:
        logger.warning(
            "'%s' looks like a %s image, and is served as raw: the guest sees the bytes of the "
            "file; --format %s serves the disk inside",
            path,
            found,
            found,
        )
    return wanted


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False  # opening it will say what is wrong


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > 9:
        raise CliError(f"{option} {text}: expected a number of at most 9 digits", status=USAGE)
    return int(text)


def plan_process(args: argparse.Namespace, plan: Plan, settings: dict[str, Any]) -> None:
    """Fill in what the options (or else the config file) say about the process."""
    plan.plugins = [Path(plugin) for plugin in [*settings.get("plugins", []), *args.plugin]]
    plan.log_file = args.log_file
    plan.stop_timeout = args.stop_timeout
    plan.state = getattr(args, "state", None) or settings.get("state")
    group = args.control_group or settings.get("control-group")
    plan.controls = [_monitor(text, args.chardev, group) for text in args.monitor]
    control = args.control or settings.get("control")
    if control is None and plan.place is not None and not plan.controls:
        control = plan.place.control_socket
    if control not in (None, "none"):
        plan.controls.append(Control(f"--control {control}", group, path=control))
    if group is not None and not plan.controls:
        raise CliError("--control-group needs a control socket: add --control PATH", status=USAGE)


def _monitor(text: str, chardevs: list[str], group: str | None) -> Control:
    """The control socket that qemu-storage-daemon's --chardev and --monitor describe."""
    monitor = _parsed("--monitor", text, "chardev", {"chardev", "mode", "pretty"})
    if monitor.get("mode", "control") != "control":
        raise CliError(f"--monitor {text}: only mode=control is known", status=USAGE)
    known = {"backend", "id", "path", "fd", "server", "wait"}
    for written in chardevs:
        chardev = _parsed("--chardev", written, "backend", known)
        if chardev.get("id") != monitor.get("chardev"):
            continue
        where = f"--chardev {written}"
        if chardev.get("backend") != "socket" or chardev.get("server", "off") not in ("on", "yes"):
            raise CliError(f"{where}: only 'socket' with server=on is known", status=USAGE)
        if ("path" in chardev) == ("fd" in chardev):
            raise CliError(f"{where}: expected one of path and fd", status=USAGE)
        if "fd" in chardev:
            return Control(where, fd=_number(where, chardev["fd"]))
        return Control(where, group, path=chardev["path"])
    raise CliError(f"--monitor {text}: there is no such --chardev", status=USAGE)


def _parsed(option: str, text: str, implied: str, known: set[str]) -> dict[str, str]:
    try:
        options = keyval.parse(text, implied_key=implied).options
    except VhostblkError as error:
        raise CliError(f"{option} {text}: {error.desc}", status=USAGE, data=error.data) from None
    for key, value in options.items():
        if key not in known or not isinstance(value, str):
            raise CliError(f"{option} {text}: Parameter '{key}' is unexpected", status=USAGE)
    return options


def chosen_name(args: argparse.Namespace, settings: dict[str, Any]) -> str | None:
    """The backend's name if one was given."""
    name = args.name or settings.get("name")
    return None if name is None else places.check_name(str(name))
