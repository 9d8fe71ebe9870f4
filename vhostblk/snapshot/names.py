# SPDX-License-Identifier: GPL-2.0-or-later
"""Names for overlays, from templates such as `{directory}/{stem}.{node}.{timestamp}.{format}`.

What stands for one leg of a drive stays the same for all its snapshots: `{node}`
and `{stem}` are those of the image at the bottom of the chain.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

from vhostblk.nodes.driver import NodeDriver, RoleKind
from vhostblk.schema import VhostblkError, id_wellformed
from vhostblk.schema.model import NODE_NAME_MAX

DEFAULT_FILE = "{directory}/{stem}.{node}.{timestamp}.{format}"
DEFAULT_NODE = "{node}-{number}"
FIELDS = ("directory", "stem", "node", "device", "timestamp", "number", "format")
_FIELD = re.compile(r"\{([^{}]*)\}")


def timestamp() -> str:
    """This moment, in UTC, as it stands in names."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def chain_below(node: NodeDriver) -> list[NodeDriver]:
    """A node and its backing nodes, down to the one that has none."""
    chain = [node]
    while True:
        below = [
            child.node
            for role, child in chain[-1].children.items()
            if chain[-1].child_roles[role.split(".")[0]].kind is RoleKind.BACKING
        ]
        if not below:
            return chain
        chain.append(below[0])


class Names:
    """The names of one overlay: what the fields stand for."""

    def __init__(
        self,
        node: NodeDriver,
        *,
        device: str | None,
        format: str,
        moment: str,
        taken: Collection[str],
    ) -> None:
        chain = chain_below(node)
        named = [entry.name for entry in chain if not entry.name.startswith("#")]
        leg = named[-1] if named else node.name.lstrip("#")
        self._node = node
        self._taken = taken
        self._fields: dict[str, str | None] = {
            "directory": _directory(node),
            "stem": _stem(chain[-1]),
            "node": leg,
            "device": device if device is not None else leg,
            "timestamp": moment,
            "format": format,
        }
        self._number = len(chain)

    def file(self, template: str) -> str:
        """The path of the image."""
        path = self._expand(template, "snapshot-file-template", self._number)
        return os.path.abspath(path)

    def node(self, template: str) -> str:
        """The name of the node: one that is free, if the template leaves room for a number."""
        number = self._number
        while True:
            name = self._expand(template, "snapshot-node-name", number)
            if name not in self._taken or "{number}" not in template:
                break
            number += 1
        if len(name) > NODE_NAME_MAX and template == DEFAULT_NODE:
            return self.node("overlay-{number}")
        if not id_wellformed(name) or len(name) > NODE_NAME_MAX:
            raise VhostblkError(
                f"'{name}' cannot be the name of a node: at most {NODE_NAME_MAX} letters, digits, "
                "'-', '.' and '_', the first one a letter",
                data={"code": "bad-value", "parameter": "snapshot-node-name"},
            )
        return name

    def _expand(self, template: str, parameter: str, number: int) -> str:
        values: Mapping[str, str | None] = {**self._fields, "number": str(number)}

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name not in values:
                known = ", ".join(f"{{{field}}}" for field in FIELDS)
                raise VhostblkError(
                    f"Parameter '{parameter}': there is no {{{name}}}; there are {known}",
                    data={"code": "bad-value", "parameter": parameter, "allowed": list(FIELDS)},
                )
            found = values[name]
            if found is None:
                raise VhostblkError(
                    f"Parameter '{parameter}': {{{name}}} means nothing for node "
                    f"'{self._node.name}' ({self._node.driver}), which is not in a regular "
                    "file; give snapshot-file, or a template without it",
                    data={"code": "no-file", "node": self._node.name},
                )
            return found

        return _FIELD.sub(value, template)


def absolute(path: str) -> str:
    """A path that means the same in every directory."""
    return os.path.abspath(path)


def plain_filename(node: NodeDriver) -> str | None:
    """The file a node's image is in, if it is simply in a file."""
    name = node.filename()
    return name if name and not name.startswith("json:") and "://" not in name else None


def _directory(node: NodeDriver) -> str | None:
    name = plain_filename(node)
    if name is None or _is_device(name):
        return None  # nothing that stays can be put next to it
    return os.path.dirname(os.path.abspath(name))


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _stem(node: NodeDriver) -> str | None:
    name = plain_filename(node)
    if name is None:
        return None
    base = os.path.basename(name)
    stem, dot, _ = base.rpartition(".")
    return stem if dot and stem else base
