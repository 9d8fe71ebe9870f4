# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be done to the graph by command: `transaction` and its actions.

An action is a coroutine that says what it wants of a `Change` (graph/change.py):
what is slow it does at once, the rest happens in the one drained section that all
actions of a transaction share. A command that changes the graph is a
transaction of one action, so that both mean the same.

    @action("blockdev-del", BlockdevDel)
    async def blockdev_del(backend, change, arguments): …
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from vhostblk.graph import Change, Parent
from vhostblk.nodes.driver import NodeDriver
from vhostblk.schema import BlockdevRef, Model, OnOff, VhostblkError, validate

if TYPE_CHECKING:
    from vhostblk.backend import Backend

BlockdevOptions = Annotated[dict[str, Any], "BlockdevOptions"]
"""Options of a node; the name is that of the type in the schema."""

Run = Callable[["Backend", Change, Any], Awaitable[dict[str, Any] | None]]


@dataclass(frozen=True)
class Action:
    """One kind of action. Without a model the data go to `run` as they are."""

    name: str
    arguments: type[Model] | None
    run: Run


ACTIONS: dict[str, Action] = {}


def action(name: str, arguments: type[Model] | None) -> Callable[[Run], Run]:
    """Decorator: make a kind of action known."""

    def register(run: Run) -> Run:
        ACTIONS[name] = Action(name, arguments, run)
        return run

    return register


class TransactionAction(Model):
    """One action: its type, and the arguments of the command of that name."""

    type: str
    data: dict[str, Any]


class TransactionProperties(Model):
    """Accepted for QEMU's sake: no action here goes on after the transaction."""

    completion_mode: Literal["individual", "grouped"] = "individual"


async def run_actions(
    backend: Backend, actions: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """All of them in one change, or none. The caller holds the graph's lock.

    The result: `pause-us`, and `results`, one for each action, if any has one.
    """
    results: list[dict[str, Any]] = []
    wanted = [_checked(name, data) for name, data in actions]
    async with backend.graph.change() as change:
        for kind, arguments in wanted:
            results.append(await kind.run(backend, change, arguments) or {})
    answer: dict[str, Any] = {"pause-us": change.pause_us}
    if any(results):
        answer["results"] = results
    return answer


def _checked(name: str, data: dict[str, Any]) -> tuple[Action, Any]:
    kind = _find(name)
    return kind, data if kind.arguments is None else validate(kind.arguments, data)


def _find(name: str) -> Action:
    if name in ACTIONS:
        return ACTIONS[name]
    allowed = sorted(ACTIONS)
    text = f"Parameter 'type' does not accept value '{name}'; allowed: {', '.join(allowed)}"
    data: dict[str, Any] = {"code": "bad-value", "parameter": "type", "allowed": allowed}
    raise VhostblkError(text, data=data).suggest(name, allowed)


class Abort(Model):
    """Arguments of abort."""


@action("abort", Abort)
async def abort(backend: Backend, change: Change, arguments: Abort) -> None:
    """Fail, so that everything is undone: for tests."""

    async def fail() -> None:
        raise VhostblkError(
            "Transaction aborted using Abort action", data={"code": "transaction-aborted"}
        )

    change.inside(fail)


@action("blockdev-add", None)
async def blockdev_add(backend: Backend, change: Change, arguments: dict[str, Any]) -> None:
    """Add a node."""
    await change.add(arguments)


class BlockdevDel(Model):
    """Arguments of blockdev-del."""

    node_name: str


@action("blockdev-del", BlockdevDel)
async def blockdev_del(backend: Backend, change: Change, arguments: BlockdevDel) -> None:
    """Remove a node that nobody uses any more."""
    change.delete(change.node(arguments.node_name))


class BlockdevReopen(Model):
    """Arguments of blockdev-reopen."""

    options: list[BlockdevOptions]
    """For each node all its options; those left out go back to their defaults."""
    allow_size_change: OnOff = False
    """Whether drives above may have another size afterwards (ours)."""


@action("blockdev-reopen", BlockdevReopen)
async def blockdev_reopen(backend: Backend, change: Change, arguments: BlockdevReopen) -> None:
    """Give nodes other options and other children."""
    change.allow_resize |= arguments.allow_size_change
    for options in arguments.options:
        name = options.get("node-name")
        if not isinstance(name, str):
            raise VhostblkError(
                "node-name not specified",
                data={"code": "missing-parameter", "parameter": "node-name"},
            )
        if "driver" not in options:
            raise VhostblkError(
                "Parameter 'driver' is missing",
                data={"code": "missing-parameter", "parameter": "driver"},
            )
        change.reopen(change.node(name), options)


class BlockdevReplace(Model):
    """Arguments of blockdev-replace."""

    parent_type: Literal["driver", "export"]
    """Who gets another child: a node or an export."""
    node_name: str | None = None
    """With parent-type=driver: the parent."""
    child: str | None = None
    """With parent-type=driver: which of its children, for example file or children.1."""
    export_id: str | None = None
    """With parent-type=export: the parent."""
    new_child: str
    """The node that takes the place of the child."""
    allow_size_change: OnOff = False
    """Whether drives above may have another size afterwards (ours)."""


@action("blockdev-replace", BlockdevReplace)
async def blockdev_replace(backend: Backend, change: Change, arguments: BlockdevReplace) -> None:
    """Put another node in the place of a child."""
    change.allow_resize |= arguments.allow_size_change
    if arguments.parent_type == "export":
        _refuse(arguments, "node_name", "child")
        parent: Parent = backend.graph.backend(_needed(arguments, "export_id"))
        role = "root"
    else:
        _refuse(arguments, "export_id")
        parent = change.node(_needed(arguments, "node_name"))
        role = _needed(arguments, "child")
    change.replace_child(parent, role, change.node(arguments.new_child))


class BlockFilterInsert(Model):
    """Arguments of block-filter-insert. Where: `export-id`, `above`, or `node-name` and `child`."""

    filter: BlockdevRef
    """The filter: the name of a node, or options of one to make; its child need not be said."""
    export_id: str | None = None
    """Above all that this export has."""
    above: str | None = None
    """Between this node and all that use it."""
    node_name: str | None = None
    """Between this node and its child `child`."""
    child: str | None = None
    """See node-name."""
    filter_child: str = "file"
    """The role in which the filter has what is below it."""


@action("block-filter-insert", BlockFilterInsert)
async def block_filter_insert(
    backend: Backend, change: Change, arguments: BlockFilterInsert
) -> dict[str, Any]:
    """Insert a filter anywhere."""
    given = [
        name for name in ("export_id", "above", "node_name") if getattr(arguments, name) is not None
    ]
    if len(given) != 1:
        raise VhostblkError(
            "One of 'export-id', 'above' and 'node-name' (with 'child') must say where",
            data={"code": "missing-parameter", "parameter": "export-id"},
        )
    if arguments.above is not None:
        _refuse(arguments, "child")
        node = change.node(arguments.above)
        filter = await _the_filter(change, arguments, node)
        change.insert_filter_above(filter, node, arguments.filter_child)
        return {"node-name": filter.name}
    if arguments.export_id is not None:
        _refuse(arguments, "child")
        parent: Parent = backend.graph.backend(arguments.export_id)
        role = "root"
    else:
        parent = change.node(_needed(arguments, "node_name"))
        role = _needed(arguments, "child")
    filter = await _the_filter(change, arguments, change.child(parent, role))
    change.insert_filter(filter, parent, role, arguments.filter_child)
    return {"node-name": filter.name}


async def _the_filter(
    change: Change, arguments: BlockFilterInsert, below: NodeDriver
) -> NodeDriver:
    if isinstance(arguments.filter, str):
        return change.node(arguments.filter)
    role, _, index = arguments.filter_child.partition(".")
    child = {role: [below.name] if index else below.name}
    return await change.add({**child, **arguments.filter})


class BlockFilterRemove(Model):
    """Arguments of block-filter-remove."""

    node_name: str
    """The filter."""
    child: str | None = None
    """Which of its children takes its place, if there is more than one."""
    keep: OnOff = False
    """Keep the node, unused, instead of deleting it."""


@action("block-filter-remove", BlockFilterRemove)
async def block_filter_remove(
    backend: Backend, change: Change, arguments: BlockFilterRemove
) -> None:
    """Take a filter out of wherever it is."""
    filter = change.node(arguments.node_name)
    if not change.parents_of(filter):
        raise VhostblkError(
            f"Node '{filter.name}' is below nothing; blockdev-del deletes it",
            data={"code": "not-in-use", "node": filter.name},
        )
    change.remove_filter(filter, arguments.child)
    if arguments.keep and not backend.graph.is_owned(filter):
        raise VhostblkError(
            f"Node '{filter.name}' cannot be kept: it was defined inside its parent",
            data={"code": "not-owned", "node": filter.name},
        )
    if not arguments.keep and backend.graph.is_owned(filter):
        change.delete(filter)


def _needed(arguments: Model, name: str) -> str:
    value = getattr(arguments, name)
    if value is None:
        parameter = name.replace("_", "-")
        raise VhostblkError(
            f"Parameter '{parameter}' is missing",
            data={"code": "missing-parameter", "parameter": parameter},
        )
    return str(value)


def _refuse(arguments: Model, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            parameter = name.replace("_", "-")
            raise VhostblkError(
                f"Parameter '{parameter}' is unexpected",
                data={"code": "unexpected-parameter", "parameter": parameter},
            )
