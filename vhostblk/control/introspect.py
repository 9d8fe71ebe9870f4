# SPDX-License-Identifier: GPL-2.0-or-later
"""query-qmp-schema: what the commands take and give, in QAPI's introspection format.

Everything comes from the annotations of the commands and from the models of
drivers, exports and objects, plug-ins included, so it cannot be out of date.
Type names are readable here, but as with QEMU they are not part of the
interface: clients follow them from the commands and events.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo

from vhostblk.control.registry import Registry, Union
from vhostblk.schema import BlockdevRef, Model, StrOrList
from vhostblk.transaction import ACTIONS, BlockdevOptions

if typing.TYPE_CHECKING:
    from vhostblk.backend import Backend

_BUILTINS = {
    "str": "string",
    "int": "int",
    "bool": "boolean",
    "number": "number",
    "null": "null",
    "any": "value",
}
_PYTHON: dict[Any, str] = {
    str: "str",
    int: "int",
    bool: "bool",
    float: "number",
    type(None): "null",
    Any: "any",
}
BlockdevCreateOptions = Annotated[dict[str, Any], "BlockdevCreateOptions"]
"""Options of an image to create; the note is the name of the union."""

_REFERENCE = typing.get_args(BlockdevRef)[0]
_STR_OR_LIST = typing.get_args(StrOrList)[0]


class _Builder:
    def __init__(self, backend: Backend, registry: Registry) -> None:
        self._backend = backend
        self._registry = registry
        self.entries: dict[str, dict[str, Any]] = {}

    def add(self, name: str, meta: str, **rest: Any) -> str:
        self.entries[name] = {"name": name, "meta-type": meta, **rest}
        return name

    def type_name(self, annotation: Any) -> str:
        """The name of the type for an annotation; describes it on first use."""
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *notes = typing.get_args(annotation)
            if notes[0] in _UNIONS:
                return self.union(_UNIONS[notes[0]])
        if annotation is None:
            return self._object("EmptyType", [])
        if annotation == _REFERENCE:
            return self._reference()
        if annotation == _STR_OR_LIST:
            return self._alternate("StrOrStrList", ["str", self._array("str")])
        if annotation in _PYTHON:
            name = _PYTHON[annotation]
            return self.add(name, "builtin", **{"json-type": _BUILTINS[name]})
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return self.model(annotation)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Literal:
            return self._enum([str(value) for value in arguments])
        if origin in (list, tuple):
            return self._array(self.type_name(arguments[0]))
        if origin in (typing.Union, types.UnionType):
            rest = [argument for argument in arguments if argument is not type(None)]
            names = [self.type_name(argument) for argument in rest]
            if len(names) == 1:
                return names[0]
            return self._alternate("Or".join(name.title() for name in names), names)
        return self.type_name(Any)

    def model(self, model: type[BaseModel]) -> str:
        """An object type for a model."""
        name = model.__name__
        if name not in self.entries:
            self._object(name, [])  # it may contain itself
            self._object(name, self.members(model))
        return name

    def members(self, model: type[BaseModel]) -> list[dict[str, Any]]:
        """The members of an object type."""
        return [self._member(name, field) for name, field in model.model_fields.items()]

    def union(self, union: Union) -> str:
        """An object type whose tag member selects further members."""
        if union.name in self.entries:
            return union.name
        self._object(union.name, [])
        variants = union.variants(self._backend)
        every = {tag: self.members(model) for tag, model in sorted(variants.items())}
        common = [
            member
            for member in next(iter(every.values()), [])
            if member["name"] != union.tag and all(member in members for members in every.values())
        ]
        tag_type = self._enum(sorted(variants), union.name + "Tag")
        cases = []
        for tag, members in every.items():
            own = [m for m in members if m not in common and m["name"] != union.tag]
            cases.append({"case": tag, "type": self._object(f"{union.name}-{tag}", own)})
        self._object(
            union.name,
            [{"name": union.tag, "type": tag_type}, *common],
            tag=union.tag,
            variants=cases,
        )
        return union.name

    def _member(self, name: str, field: FieldInfo) -> dict[str, Any]:
        annotation: Any = field.annotation
        if any(isinstance(note, str) for note in field.metadata):
            annotation = typing.Annotated[annotation, *field.metadata]
        member: dict[str, Any] = {"name": field.alias or name, "type": self.type_name(annotation)}
        if not field.is_required():
            default = field.get_default(call_default_factory=False)
            simple = isinstance(default, str | int | bool | float)
            member["default"] = default if simple else None
        return member

    def _object(self, name: str, members: list[dict[str, Any]], **rest: Any) -> str:
        return self.add(name, "object", members=members, **rest)

    def _array(self, element: str) -> str:
        return self.add(f"[{element}]", "array", **{"element-type": element})

    def _enum(self, values: list[str], name: str | None = None) -> str:
        return self.add(
            name or "|".join(values),
            "enum",
            values=values,
            members=[{"name": value} for value in values],
        )

    def _alternate(self, name: str, members: list[str]) -> str:
        for member in members:
            if member in _BUILTINS:
                self.add(member, "builtin", **{"json-type": _BUILTINS[member]})
        return self.add(name, "alternate", members=[{"type": member} for member in members])

    def _reference(self) -> str:
        if "BlockdevRef" not in self.entries:
            self._alternate("BlockdevRef", ["str"])
            self._alternate("BlockdevRef", ["str", self.union(blockdev_options)])
        return "BlockdevRef"


blockdev_options = Union(
    "BlockdevOptions",
    "driver",
    lambda backend: {name: driver.Options for name, driver in backend.drivers().items()},
)
blockdev_create_options = Union(
    "BlockdevCreateOptions",
    "driver",
    lambda backend: {
        name: driver.CreateOptions
        for name, driver in backend.drivers().items()
        if driver.CreateOptions is not None
    },
)
export_options = Union("BlockExportOptions", "type", lambda backend: backend.export_types())
object_options = Union("ObjectOptions", "qom-type", lambda backend: backend.object_types())


def _actions() -> dict[str, type[Model]]:
    """What `transaction` takes: for each type a wrapper around the arguments, as QAPI has it."""
    return {
        name: create_model(
            name.title().replace("-", "") + "Wrapper",
            __base__=Model,
            type=(str, ...),
            data=(kind.arguments or BlockdevOptions, ...),
        )
        for name, kind in ACTIONS.items()
    }


transaction_actions = Union("TransactionAction", "type", lambda backend: _actions())
_UNIONS = {
    union.name: union
    for union in (
        blockdev_options,
        blockdev_create_options,
        export_options,
        object_options,
        transaction_actions,
    )
}


def schema(
    backend: Backend, registry: Registry, events: dict[str, type[Model]]
) -> list[dict[str, Any]]:
    """Every command, event and type."""
    from vhostblk.control.results import RESULTS  # seldom needed, so not at start-up

    builder = _Builder(backend, registry)
    for command in registry.commands.values():
        arguments = command.arguments
        builder.add(
            command.name,
            "command",
            **{
                "arg-type": builder.union(arguments)
                if isinstance(arguments, Union)
                else builder.model(arguments),
                "ret-type": builder.type_name(RESULTS.get(command.name, command.gives)),
                "allow-oob": command.allow_oob,
            },
        )
    for name, model in events.items():
        builder.add(name, "event", **{"arg-type": builder.model(model)})
    return list(builder.entries.values())
