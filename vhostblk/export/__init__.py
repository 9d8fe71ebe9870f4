# SPDX-License-Identifier: GPL-2.0-or-later
"""Exports: ways out of the graph. Each type is a module with a class derived from `Export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vhostblk.graph import BlockBackend, Graph
from vhostblk.schema import Model, VhostblkError
from vhostblk.schema.validation import wrong_type_error

if TYPE_CHECKING:
    from vhostblk.engine import Engine, Stats
    from vhostblk.events import EventBus
    from vhostblk.nodes.driver import NodeDriver
    from vhostblk.objects import ObjectStore


class Export:
    """One export of a drive."""

    export_type: ClassVar[str]
    Options: ClassVar[type[Model]]

    def __init__(
        self,
        engine: Engine,
        graph: Graph,
        objects: ObjectStore,
        events: EventBus,
        options: Any,
    ) -> None:
        self.engine = engine
        self.graph = graph
        self.objects = objects
        self.events = events
        self.options = options
        self.backend: BlockBackend | None = None
        self.shutting_down = False

    @property
    def id(self) -> str:
        """Its name."""
        return str(self.options.id)

    async def open(self) -> None:
        """Start to serve."""
        raise NotImplementedError

    async def close(self) -> None:
        """Disconnect whoever is connected, and free everything."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Nobody uses it, and nobody can come to use it."""
        return False

    @property
    def in_use(self) -> bool:
        """Whether somebody is connected."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Its entry in `query-block-exports`."""
        raise NotImplementedError

    def state_options(self, root: NodeDriver) -> dict[str, Any]:
        """Options that make it again on that root after a restart, for the state file
        (docs/state.md)."""
        options: dict[str, Any] = self.options.to_options()
        return {**options, "node-name": root.name}

    async def set_throttle_group(self, id: str | None) -> None:
        """Have the limits of this throttle-group from now on; None: none."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Its counters."""
        raise NotImplementedError


def _vhost_user_blk() -> type[Export]:
    from vhostblk.export.vhost_user_blk import VhostUserBlkExport

    return VhostUserBlkExport


_TYPES: Mapping[str, Callable[[], type[Export]]] = {"vhost-user-blk": _vhost_user_blk}


def export_types() -> dict[str, type[Export]]:
    """All types by name."""
    return {name: load() for name, load in _TYPES.items()}


def export_type(options: dict[str, Any]) -> type[Export]:
    """The type that `options` ask for."""
    name = options.get("type")
    if name is None:
        raise VhostblkError(
            "Parameter 'type' is missing",
            data={"code": "missing-parameter", "parameter": "type"},
        )
    if not isinstance(name, str):
        raise wrong_type_error("type", "string")
    if name in _TYPES:
        return _TYPES[name]()
    text = f"Parameter 'type' does not accept value '{name}'; allowed: {', '.join(_TYPES)}"
    data: dict[str, Any] = {"code": "bad-value", "parameter": "type", "allowed": list(_TYPES)}
    raise VhostblkError(text, data=data).suggest(name, _TYPES)
