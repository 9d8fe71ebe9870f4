# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of commands.

A command is an `async` function with two parameters, the `Context` and a model
of its arguments:

    @command("block_resize")
    async def block_resize(context: Context, arguments: BlockResize) -> None: ...

Everything else (checking arguments, introspection) is derived from that.
"""

from __future__ import annotations

import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.schema import CommandNotFound, Model, VhostblkError, json_types, validate

if TYPE_CHECKING:
    from vhostblk.backend import Backend


class NoArguments(Model):
    """A command without arguments."""


@dataclass(frozen=True)
class Union:
    """The arguments of a command whose members depend on the value of one of them.

    They reach the backend as they are, which checks them against the model
    that the tag selects.
    """

    name: str
    tag: str
    variants: Callable[[Backend], dict[str, type[Model]]]


@dataclass
class Context:
    """What a command may use."""

    backend: Backend
    registry: Registry
    quit: Callable[[], None]

    async def run_action(self, name: str, arguments: Model) -> dict[str, Any]:
        """Carry out the action of that name on its own: its result, and `pause-us`."""
        answer = await self.backend.transaction([(name, arguments.to_options())])
        [result] = answer.pop("results", [{}])
        return {**answer, **result}


Handler = Callable[[Context, Any], Awaitable[Any]]


@dataclass(frozen=True)
class Command:
    """One command: its name, what it takes and gives, and what it does."""

    name: str
    handler: Handler
    arguments: type[Model] | Union
    allow_oob: bool

    @property
    def gives(self) -> Any:
        """Any, or None for a command without a result."""
        given = typing.get_type_hints(self.handler)["return"]
        return None if given is type(None) else given

    @property
    def description(self) -> str:
        """The first paragraph of the handler's docstring."""
        return " ".join((self.handler.__doc__ or "").split("\n\n")[0].split())

    async def run(self, context: Context, arguments: dict[str, Any]) -> Any:
        """Check the arguments and carry the command out."""
        with json_types():
            if isinstance(self.arguments, Union):
                result = await self.handler(context, arguments)
            else:
                result = await self.handler(context, validate(self.arguments, arguments, ""))
        return {} if result is None else result


class Registry:
    """The commands of one control socket."""

    def __init__(self) -> None:
        self.commands: dict[str, Command] = {}

    def command(
        self, name: str, *, oob: bool = False, union: Union | None = None
    ) -> Callable[[Handler], Handler]:
        """Decorator: register a function as the command `name`."""

        def register(handler: Handler) -> Handler:
            arguments = typing.get_type_hints(handler)["arguments"]
            self.commands[name] = Command(
                name,
                handler,
                union or typing.cast(type[Model], arguments),
                oob,
            )
            return handler

        return register

    def include(self, other: Registry) -> None:
        """Have the commands of another one as well."""
        self.commands |= other.commands

    def find(self, name: str) -> Command:
        """The command called `name`, or an error that suggests one."""
        command = self.commands.get(name)
        if command is not None:
            return command
        import difflib

        data: dict[str, Any] = {"code": "unknown-command", "command": name[:100]}
        near = difflib.get_close_matches(name[:100], self.commands, n=1)
        if near:
            data["hint"] = f"did you mean '{near[0]}'?"
        raise CommandNotFound(f"The command {name[:100]} has not been found", data=data)


def error_object(error: VhostblkError) -> dict[str, Any]:
    """`error` as QMP sends it. Clients look at `class`, machines also at `data`."""
    result: dict[str, Any] = {"class": error.error_class, "desc": error.desc}
    if error.data:
        result["data"] = error.data
    return result
