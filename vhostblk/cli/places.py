# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a running backend keeps its sockets, and how to find it by name.

A backend with a name has the directory RUNTIME/vhostblk/NAME:

    vhost.sock   for QEMU
    qmp.sock     the control socket
    pid          locked as long as the backend lives

RUNTIME is $XDG_RUNTIME_DIR, or /run for root, or /tmp/vhostblk-UID; backends are
looked for in all of these. $VHOSTBLK_RUNTIME_DIR takes the place of all.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vhostblk.cli.errors import NOT_RUNNING, USAGE, CliError
from vhostblk.control.listen import is_alive
from vhostblk.schema import did_you_mean

VHOST_SOCKET = "vhost.sock"
CONTROL_SOCKET = "qmp.sock"
PIDFILE = "pid"
_OVERRIDE = "VHOSTBLK_RUNTIME_DIR"


def runtime_dir() -> Path:
    """The directory for sockets of this user."""
    variable = runtime_variable()
    if variable is not None:
        return Path(os.environ[variable])
    if os.geteuid() == 0:
        return Path("/run")
    return Path(f"/tmp/vhostblk-{os.geteuid()}")


def runtime_variable() -> str | None:
    """The variable that names it."""
    for variable in (_OVERRIDE, "XDG_RUNTIME_DIR"):
        if os.path.isabs(os.environ.get(variable, "")):
            return variable
    return None


def search_dirs() -> list[Path]:
    """Where backends this user may talk to can be."""
    if os.environ.get(_OVERRIDE):
        return [runtime_dir() / "vhostblk"]
    dirs = [runtime_dir(), Path("/run"), Path(f"/tmp/vhostblk-{os.geteuid()}")]
    return [base / "vhostblk" for base in dict.fromkeys(dirs)]


@dataclass(frozen=True)
class Place:
    """The directory of one named backend."""

    name: str
    path: Path

    @property
    def vhost_socket(self) -> str:
        """Socket for QEMU."""
        return str(self.path / VHOST_SOCKET)

    @property
    def control_socket(self) -> str:
        """Socket for operators."""
        return str(self.path / CONTROL_SOCKET)

    @property
    def pidfile(self) -> str:
        """Process id, locked while it runs."""
        return str(self.path / PIDFILE)

    def create(self) -> None:
        """Make the directory, for a backend that is about to start."""
        base = self.path.parent
        try:
            if base.parent == Path(f"/tmp/vhostblk-{os.geteuid()}"):
                _private_dir(base.parent)
            base.mkdir(mode=0o755, exist_ok=True)
            self.path.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise CliError(
                f"Cannot create '{self.path}': {error.strerror}; set XDG_RUNTIME_DIR to a "
                "directory of yours, or give --control and --socket-path"
            ) from None

    def remove(self) -> None:
        """Remove the directory if nothing is left in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _private_dir(path: Path) -> None:
    """A directory in /tmp that is ours and nobody else's."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise CliError(
                f"'{path}' exists and is not a private directory of yours; remove it or set "
                "XDG_RUNTIME_DIR"
            ) from None


def name_of_image(image: str) -> str:
    """A name for the backend of an image file: letters, digits, '-', '_', '.'."""
    stem = Path(image).name
    stem = stem.rsplit(".", 1)[0] if "." in stem.lstrip(".") else stem
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")
    if not name or not name[0].isalpha():
        name = f"disk-{name}".rstrip("-")
    # Node names are at most 31 characters, and one ends in "-file".
    return name[:26]


def check_name(name: str) -> str:
    """A name given by the user, or an error saying what is allowed."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,25}", name):
        raise CliError(
            f"Invalid name '{name}': use a letter followed by up to 25 letters, digits, "
            "'-', '_' or '.'",
            status=USAGE,
        )
    return name


def place(name: str) -> Place:
    """The place of a backend called `name` that this process would start."""
    return Place(name, runtime_dir() / "vhostblk" / name)


def all_places() -> Iterator[Place]:
    """Every named backend's directory, also those of dead ones."""
    for base in search_dirs():
        try:
            names = sorted(entry.name for entry in base.iterdir())
        except OSError:
            continue
        for name in names:
            if (base / name / CONTROL_SOCKET).is_socket():
                yield Place(name, base / name)


def running_places() -> list[Place]:
    """The backends that answer this user."""
    return [found for found in all_places() if _is_ours(found) and is_alive(found.control_socket)]


def _is_ours(place: Place) -> bool:
    """Whether this user may talk to it: others' backends are no choice."""
    return os.access(place.control_socket, os.W_OK)


def find_socket(name: str | None, socket_path: str | None) -> str:
    """The control socket of one backend: by path, by name, or the only one running."""
    path = name if socket_path is None and name is not None and "/" in name else socket_path
    if path is not None:
        _refuse_vhost_socket(path)
        return path
    running = running_places()
    if name is not None:
        for found in running:
            if found.name == name:
                return found.control_socket
        for found in all_places():
            if found.name == name and not _is_ours(found):
                raise CliError(
                    f"You may not use the control socket '{found.control_socket}' of backend "
                    f"'{name}'; ask as its user, or start it with --control-group"
                )
        near = did_you_mean(name, [found.name for found in running])
        hint = f"; did you mean '{near}'?" if near else _running_hint(running)
        raise CliError(f"No backend named '{name}' is running{hint}", status=NOT_RUNNING)
    if len(running) == 1:
        return running[0].control_socket
    if not running:
        raise CliError(
            "No backend is running here; start one with 'vhostblk serve IMAGE', or point at "
            "its control socket with --socket PATH",
            status=NOT_RUNNING,
        )
    names = ", ".join(found.name for found in running)
    raise CliError(f"Several backends are running: name one of {names}", status=USAGE)


def _refuse_vhost_socket(path: str) -> None:
    """To connect to it would keep QEMU out, and nobody there would answer."""
    beside = os.path.join(os.path.dirname(path), CONTROL_SOCKET)
    if os.path.basename(path) == VHOST_SOCKET and os.path.exists(beside):
        raise CliError(f"'{path}' is for QEMU; the control socket is '{beside}'", status=USAGE)


def _running_hint(running: list[Place]) -> str:
    if not running:
        return " (none is; a control socket elsewhere can be given with --socket PATH)"
    return " (running: " + ", ".join(found.name for found in running) + ")"
