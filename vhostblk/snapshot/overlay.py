# SPDX-License-Identifier: GPL-2.0-or-later
"""Overlays: making the image, and opening it for the node that it is to cover.

All this is slow and happens while guests still run. What was made for a snapshot that
does not come about is removed again. A process that is killed in between leaves a
file that nothing refers to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vhostblk.creating import creating
from vhostblk.fault import fault_point
from vhostblk.graph import Change
from vhostblk.jobs.create import Creator
from vhostblk.nodes._create_file import FileCreateOptions, create_file
from vhostblk.nodes.driver import INHERITED, NodeDriver, RoleKind
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    from vhostblk.backend import Backend

# Drivers besides formats that a program understands when it finds them named in an image.
_WELL_KNOWN = ("raw", "file", "host_device")

SET_BY_US = ("driver", "file", "size", "backing-file", "backing-fmt")
"""What the options of blockdev-create say that a snapshot decides."""


@dataclass(frozen=True)
class Wanted:
    """One overlay to make."""

    below: NodeDriver
    filename: str
    node_name: str
    format: str
    existing: bool
    """The image is there already."""
    create_options: Mapping[str, Any]
    """Of blockdev-create, for one that is not; without SET_BY_US."""


async def make(backend: Backend, change: Change, wanted: Wanted) -> NodeDriver:
    """The overlay's node: without a backing node yet, and used by nobody."""
    with contextlib.nullcontext() if wanted.existing else creating(wanted.filename):
        return await _make(backend, change, wanted)


async def _make(backend: Backend, change: Change, wanted: Wanted) -> NodeDriver:
    _check_format(backend, wanted)
    if wanted.existing:
        await asyncio.to_thread(_check_exists, wanted.filename)
    else:
        await _create(backend, change, wanted)
    fault_point("snapshot-created")
    overlay = await change.add(
        {
            **inherited_options(wanted.below),
            "driver": wanted.format,
            "node-name": wanted.node_name,
            "file": {"driver": "file", "filename": wanted.filename},
            "backing": None,  # guests still write to what is to be covered
        }
    )
    fault_point("snapshot-opened")
    if not wanted.existing:
        # A file that holds an image grows while guests write.
        change.inside(partial(_lengthen, overlay, wanted.below))
        change.is_empty(overlay)
    elif overlay.size != wanted.below.size:
        raise VhostblkError(
            f"Overlay '{wanted.filename}' has {overlay.size} bytes, and node "
            f"'{wanted.below.name}' has {wanted.below.size}; resize the image first",
            data={
                "code": "size-mismatch",
                "node": wanted.below.name,
                "size": wanted.below.size,
                "new-size": overlay.size,
            },
        )
    await overlay.expect_writes(wanted.below)
    return overlay


async def expect(change: Change, overlay: NodeDriver, below: NodeDriver) -> None:
    """Make an overlay ready that is there already, and stays if the change fails."""

    async def undo() -> None:
        overlay.forget_expected()

    change.on_failure(undo)
    await overlay.expect_writes(below)


async def _lengthen(overlay: NodeDriver, below: NodeDriver) -> None:
    if overlay.size < below.size:
        overlay.forget_expected()  # what grows hides what is below, and that has grown before
        await overlay.truncate(below.size)


def can_be_overlay(driver: type[NodeDriver]) -> bool:
    """Whether the nodes of a driver can have something below them that they do not have."""
    return any(role.kind is RoleKind.BACKING for role in driver.child_roles.values())


def inherited_options(node: NodeDriver) -> dict[str, Any]:
    """How the covered node's data are stored (cache, discard, …): the overlay's are alike."""
    found: dict[str, Any] = {}
    current: NodeDriver | None = node
    while current is not None:
        given = current.options.to_options()
        found.update({name: given[name] for name in INHERITED if name in given})
        current = _storage_of(current)
    found.pop("force-share", None)
    found["read-only"] = node.read_only
    return found


def _storage_of(node: NodeDriver) -> NodeDriver | None:
    for role, child in node.children.items():
        if node.child_roles[role.split(".")[0]].kind is not RoleKind.BACKING:
            return child.node
    return None


# ---- the image


def _check_format(backend: Backend, wanted: Wanted) -> None:
    driver = backend.driver_registry.get(wanted.format, "format")
    if not can_be_overlay(driver):
        able = sorted(name for name, kind in backend.drivers().items() if can_be_overlay(kind))
        raise VhostblkError(
            f"Parameter 'format': driver '{wanted.format}' does not support backing files; those "
            f"that do: {', '.join(able)}",
            data={"code": "bad-value", "parameter": "format", "allowed": able},
        )


def _check_exists(path: str) -> None:
    if not os.path.exists(path):
        raise VhostblkError(
            f"Overlay '{path}' does not exist; mode=existing takes an image that was prepared, "
            "mode=absolute-paths creates one",
            data={"code": "no-file", "filename": path},
        )


async def _create(backend: Backend, change: Change, wanted: Wanted) -> None:
    name, format = backing_reference(wanted.below)
    clean_up = await asyncio.to_thread(_make_file, wanted.filename)
    # From here on the file is ours, and goes if the snapshot does not come about.
    change.on_failure(lambda: asyncio.to_thread(clean_up))
    fault_point("snapshot-file")
    creator = Creator(backend.graph, backend.driver_registry, "snapshot", locked=True)
    options = {
        **wanted.create_options,
        "driver": wanted.format,
        "file": {"driver": "file", "filename": wanted.filename},
        "size": wanted.below.size,
        "backing-file": name,
        "backing-fmt": format,
    }
    try:
        await creator.create(options)
    except VhostblkError as error:
        raise _as_named_here(error) from None


def _as_named_here(error: VhostblkError) -> VhostblkError:
    """What blockdev-create calls `options` is `create-options` in a snapshot."""
    data = error.data
    if data is not None and str(data.get("parameter", "")).startswith("options."):
        data = {**data, "parameter": f"create-{data['parameter']}"}
    desc = error.desc.replace("'options.", "'create-options.")
    return VhostblkError(desc, error_class=error.error_class, data=data)


def _make_file(path: str) -> Callable[[], None]:
    """An empty file, and how to go back. An overlay never replaces data.

    A file that is there and empty is taken: tools make one to give it an owner.
    """
    options = FileCreateOptions(driver="file", filename=path, size=0)
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        create_file(options, exclusive=True)
        return lambda: _quietly(os.unlink, path)
    except OSError as error:
        raise VhostblkError(
            f"Could not create '{path}': {error.strerror}",
            data={"code": "create-failed", "filename": path},
        ) from None
    if not stat.S_ISREG(info.st_mode) or info.st_size:
        raise VhostblkError(
            f"Overlay '{path}' exists already and is not empty; choose another name, or use "
            "mode=existing to take it as it is",
            data={"code": "file-exists", "filename": path},
        )
    create_file(options)
    return lambda: _quietly(os.truncate, path, 0)


def _quietly(function: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(OSError):
        function(*arguments)


# ---- how an image names what is below it


def backing_reference(node: NodeDriver) -> tuple[str, str]:
    """What an overlay's header says about `node`: a name and a format, as QEMU writes them."""
    options = _as_options(node)
    driver, file = str(options["driver"]), options.get("file")
    if set(options) == {"driver", "filename"}:
        return str(options["filename"]), driver
    if set(options) == {"driver", "file"} and isinstance(file, Mapping) and "filename" in file:
        return str(file["filename"]), driver
    return "json:" + json.dumps(options, separators=(",", ":")), driver


def _as_options(node: NodeDriver) -> dict[str, Any]:
    """The data of a node as options that another program could open it with."""
    while node.keeps_data:  # such filters come and go; the image is there without them
        node = node.child("file").node
    if node.driver not in _WELL_KNOWN and not can_be_overlay(type(node)):
        raise VhostblkError(
            f"An image cannot refer to node '{node.name}' ({node.driver}): other programs would "
            "not know how to open it; prepare the overlay yourself and use mode=existing",
            data={"code": "no-backing-name", "node": node.name},
        )
    if not node.children:
        return {"driver": node.driver, "filename": os.path.abspath(node.filename())}
    options: dict[str, Any] = {"driver": node.driver}
    if node.driver == "raw":
        given = node.options.to_options()
        options.update({name: given[name] for name in ("offset", "size") if given.get(name)})
    for role, child in node.children.items():
        if node.child_roles[role].kind is not RoleKind.BACKING and role == "file":
            options[role] = _as_options(child.node)
    return options
