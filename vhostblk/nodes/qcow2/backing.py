# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that an image names: which ones are meant, and whether they may be opened.

The name of a backing file or an external data file comes from inside the image,
that is, perhaps from a guest's owner or a download. It is followed only into
directories that the operator allowed (by default the image's own), through
drivers that read files, and in a format that is stated, never guessed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from vhostblk.schema import VhostblkError

# What an image may name: formats and filters that look at files, and files themselves.
CONTAINERS = ("raw", "qcow2", "qed")
STORAGE = ("file", "host_device")
_HAVE_CHAINS = ("qcow2", "qed")  # take allow-backing-from in turn
_MAX_NESTING = 16


class NamedFiles:
    """Turns the names in one image into options of nodes."""

    def __init__(self, node: str, filename: str, allowed: Sequence[str] | None) -> None:
        self._node = node
        self._filename = filename
        directory = os.path.dirname(os.path.realpath(filename))
        self._directory = directory
        self._given = allowed
        self._allowed = [os.path.realpath(entry) for entry in allowed or [directory]]

    def backing(self, name: str, format: str | None) -> dict[str, Any]:
        """Options of the backing node."""
        if name.startswith("json:"):
            return self._checked(self._parse(name, "backing file"), "backing file")
        if format is None:
            raise self._error(
                f"Image '{self._filename}' has the backing file '{name}' but does not say its "
                "format, and formats are not guessed",
                "backing-format-missing",
                "store it with: qemu-img rebase -u -F FORMAT -b FILE IMAGE; or give 'backing' in "
                "the options",
            )
        path = self._path(name, "backing file")
        if format in STORAGE:
            return {"driver": format, "filename": path}
        if format not in CONTAINERS:
            raise self._error(
                f"Image '{self._filename}': its backing file '{name}' has format '{format}', "
                f"which may not be opened because an image says so; allowed: "
                f"{', '.join((*CONTAINERS, *STORAGE))}",
                "backing-format",
                "give 'backing' in the options",
            )
        return self._with_chain({"driver": format, "file": self._storage(path)})

    def data_file(self, name: str) -> dict[str, Any]:
        """Options of the node with the data."""
        if name.startswith("json:"):
            return self._checked(self._parse(name, "data file"), "data file")
        return self._storage(self._path(name, "data file"))

    def _storage(self, path: str) -> dict[str, Any]:
        import stat

        try:
            block = stat.S_ISBLK(os.stat(path).st_mode)
        except OSError:
            block = False  # opening it will say what is wrong
        return {"driver": "host_device" if block else "file", "filename": path}

    def _with_chain(self, options: dict[str, Any]) -> dict[str, Any]:
        if self._given is not None and options["driver"] in _HAVE_CHAINS:
            options.setdefault("allow-backing-from", tuple(self._given))
        return options

    def _path(self, name: str, what: str) -> str:
        """The file that is meant, if it is where files may be."""
        plain = name.removeprefix("file:")
        head, colon, _ = plain.partition(":")
        if colon and "/" not in head:
            raise self._error(
                f"Image '{self._filename}': its {what} '{name}' is not a file but something "
                f"behind the protocol '{head}', which is not opened because an image says so",
                "backing-protocol",
                f"give '{what.split()[0]}' in the options",
            )
        path = os.path.realpath(os.path.join(self._directory, plain))
        if not any(_inside(path, directory) for directory in self._allowed):
            raise self._error(
                f"Image '{self._filename}': its {what} '{name}' ({path}) is not in "
                f"{_either(self._allowed)}, from where images may take files",
                "backing-not-allowed",
                f"allow its directory with allow-backing-from={os.path.dirname(path)}, or give "
                f"'{'backing' if what.startswith('backing') else 'data-file'}' in the options",
            )
        return path

    def _parse(self, name: str, what: str) -> dict[str, Any]:
        try:
            options = json.loads(name.removeprefix("json:"))
        except (ValueError, RecursionError):
            options = None
        if not isinstance(options, dict):
            raise self._error(
                f"Image '{self._filename}': the name of its {what} is not valid JSON: {name[:200]}",
                "backing-json",
            )
        return _nested(options)

    def _checked(self, options: dict[str, Any], what: str, depth: int = 0) -> dict[str, Any]:
        driver = options.get("driver")
        if depth > _MAX_NESTING or driver not in (*CONTAINERS, *STORAGE):
            raise self._error(
                f"Image '{self._filename}': its {what} uses driver '{driver}', which may not be "
                f"used because an image says so; allowed: {', '.join((*CONTAINERS, *STORAGE))}",
                "backing-driver",
                "give 'backing' in the options",
            )
        # An image says where its data are; how they are accessed is the operator's to say.
        known = {
            "file": ("driver", "filename"),
            "host_device": ("driver", "filename"),
            "raw": ("driver", "file", "offset", "size"),
            "qcow2": ("driver", "file", "backing", "data-file"),
            "qed": ("driver", "file", "backing"),
        }[str(driver)]
        checked = {key: options[key] for key in known if key in options}
        if driver in STORAGE:
            filename = options.get("filename")
            if not isinstance(filename, str):
                raise self._error(
                    f"Image '{self._filename}': its {what} has no file name", "backing-json"
                )
            checked["filename"] = self._path(filename, what)
            return checked
        for role in ("file", "backing", "data-file"):
            child = checked.get(role)
            if isinstance(child, dict):
                checked[role] = self._checked(child, what, depth + 1)
            elif child is not None:
                # The name of a node: none of the image's business.
                raise self._error(
                    f"Image '{self._filename}': its {what} refers to node '{child}', which an "
                    "image may not do",
                    "backing-driver",
                )
        return self._with_chain(checked)

    def _error(self, text: str, code: str, hint: str | None = None) -> VhostblkError:
        data = {"code": code, "node": self._node, "filename": self._filename}
        if hint is not None:
            data["hint"] = hint
            text = f"{text}; {hint}"
        return VhostblkError(text, data=data)


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """QEMU's flat spelling (`file.filename`) as objects in objects."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        parts = key.split(".")
        here = result
        for part in parts[:-1]:
            below = here.setdefault(part, {})
            if not isinstance(below, dict):
                below = here[part] = {}
            here = below
        if isinstance(value, dict):
            value = _nested(value)
            if isinstance(here.get(parts[-1]), dict):
                value = {**here[parts[-1]], **value}
        here[parts[-1]] = value
    return result


def _inside(path: str, directory: str) -> bool:
    return os.path.commonpath((path, directory)) == directory


def _either(directories: Sequence[str]) -> str:
    quoted = [f"'{entry}'" for entry in directories]
    return quoted[0] if len(quoted) == 1 else " or ".join((", ".join(quoted[:-1]), quoted[-1]))
