# SPDX-License-Identifier: GPL-2.0-or-later
"""--config FILE: the options of a backend as YAML.

    name: web1
    objects:
      - {qom-type: iothread, id: t0}
    blockdevs:
      - {driver: file, node-name: f, filename: /srv/web1.img}
      - {driver: raw, node-name: disk, file: f}
    exports:
      - type: vhost-user-blk
        id: disk
        node-name: disk
        addr: {type: unix, path: /run/web1.sock}
        writable: true

The names are those of the command line and of the control socket, and a value is what it
is there as key=value: text, which each option reads in its way (`64M`, `on`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import yaml

from vhostblk.cli.errors import CliError
from vhostblk.cli.serving import Step
from vhostblk.jsontext import has_bad_text

_LISTS = {"objects": "object", "blockdevs": "blockdev", "exports": "export"}
_SETTINGS: dict[str, type] = {
    "name": str,
    "control": str,
    "control-group": str,
    "pidfile": str,
    "state": str,
    "plugins": list,
}
_MAX_SIZE = 4 << 20


@dataclass
class Config:
    """A loaded file."""

    steps: list[Step] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are text: `on`, `010`, `2001-01-01` arrive as they were written.

    Of the types that YAML would guess only null is left, for `backing: null`.
    """


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: str) -> Config:
    """Read a config file; errors name the file and the line."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_SIZE + 1)
    except OSError as error:
        raise CliError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CliError(f"--config {path}: not a text file (UTF-8)") from None
    if len(text) > _MAX_SIZE:
        raise CliError(f"--config {path}: larger than {_MAX_SIZE} bytes")
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        config = Config()
        if root is None:
            return config
        if not isinstance(root, yaml.MappingNode):
            raise _at(path, root, "expected names and values at the top")
        _check_nodes(path, root)
        for key, value in _members(path, root):
            _take(config, path, loader, key, value)
    except RecursionError:
        raise CliError(f"--config {path}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise CliError(f"--config {path}{line}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise CliError(
            f"--config {path}:{number}: not a text file: control character "
            f"{ord(text[error.position])}"
        ) from None
    except yaml.YAMLError as error:
        raise CliError(f"--config {path}: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    # Whatever the order in the file, nodes come before what uses them.
    order = list(_LISTS.values())
    config.steps.sort(key=lambda step: order.index(step.kind))
    return config


def _take(config: Config, path: str, loader: _Loader, key: str, value: yaml.Node) -> None:
    if key in _LISTS:
        if not isinstance(value, yaml.SequenceNode):
            raise _at(path, value, f"'{key}' must be a list")
        for entry in value.value:
            if not isinstance(entry, yaml.MappingNode):
                raise _at(path, entry, f"an entry of '{key}' must have names and values")
            options = _constructed(path, loader, entry)
            where = f"--config {path}:{entry.start_mark.line + 1}"
            config.steps.append(Step(where, _LISTS[key], options))
        return
    if key not in _SETTINGS:
        known = [*_LISTS, *_SETTINGS]
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "known are " + ", ".join(known)
        raise _at(path, value, f"unknown name '{key}'; {hint}")
    setting = _constructed(path, loader, value)
    if not isinstance(setting, _SETTINGS[key]):
        kind = "a list" if _SETTINGS[key] is list else "text"
        raise _at(path, value, f"'{key}' must be {kind}")
    entries = setting if isinstance(setting, list) else [setting]
    if not all(isinstance(entry, str) for entry in entries):
        raise _at(path, value, f"'{key}' must be a list of text")
    if not all(entries):
        raise _at(path, value, f"'{key}' may not be empty")
    config.settings[key] = setting


def _constructed(path: str, loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # what is marked !!int or !!timestamp and is none
        raise _at(path, node, str(error)) from None


def _members(path: str, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value]


def _check_nodes(path: str, root: yaml.Node) -> None:
    """Every name a plain word and written once (YAML itself would keep the last); all text is text.

    Each node is looked at once, however many aliases of it there are.
    """
    waiting: list[yaml.Node] = [root]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _at(path, key, "a name must be a plain word")
                if key.value in names:
                    raise _at(path, key, f"'{key.value}' is written twice")
                names.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif has_bad_text(node.value):
            raise _at(path, node, "text contains NUL or half a surrogate pair")


def _at(path: str, node: yaml.Node, text: str) -> CliError:
    return CliError(f"--config {path}:{node.start_mark.line + 1}: {text}")
