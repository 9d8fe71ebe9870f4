# SPDX-License-Identifier: GPL-2.0-or-later
"""`--blockdev help`, `--export vhost-user-blk,help`: what there is, from the models themselves."""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vhostblk.backend import Backend
from vhostblk.cli.errors import USAGE, CliError
from vhostblk.cli.parser import did_you_mean
from vhostblk.schema import BlockdevRef, Model, Size, StrOrList

_WHAT = {
    "blockdev": ("block drivers", "driver"),
    "object": ("object types", "qom-type"),
    "export": ("export types", "type"),
}
_NAMES: dict[Any, str] = {
    int: "number",
    str: "text",
    bool: "on|off",
    float: "number",
    Any: "anything",
}


def show(kind: str, options: Mapping[str, Any], plugins: Sequence[str] = ()) -> int:
    """Print what is known of one kind of thing, or the options of one of them."""
    what, tag = _WHAT[kind]
    known = asyncio.run(_known(kind, plugins))
    name = options.get(tag)
    if name is None:
        print(f"{what}:")
        width = max(map(len, known), default=0) + 2
        for each, (_, text) in sorted(known.items()):
            print(f"  {each:<{width}}{text}")
        print(f"\nThe options of one: --{kind} {next(iter(sorted(known)), 'NAME')},help")
        return 0
    if name not in known:
        hint = did_you_mean(str(name), known) or f"; known: {', '.join(sorted(known))}"
        raise CliError(
            f"--{kind} {name},help: there is no '{name}' among the {what}{hint}", status=USAGE
        )
    model, text = known[name]
    print(f"{name}: {text}" if text else name, end="\n\noptions:\n")
    for line in _options(model, ""):
        print(line)
    return 0


async def _known(kind: str, plugins: Sequence[str]) -> dict[str, tuple[type[Model], str]]:
    backend = Backend(plugins=[Path(plugin) for plugin in plugins])
    await backend.start()
    try:
        if kind == "blockdev":
            return {
                name: (driver.Options, _summary(driver))
                for name, driver in backend.drivers().items()
            }
        models = backend.object_types() if kind == "object" else backend.export_types()
        return {name: (model, _summary(model)) for name, model in models.items()}
    finally:
        await backend.close()


def _summary(documented: type) -> str:
    text = inspect.cleandoc(documented.__doc__ or "")  # its own: not that of a base class
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def _options(model: type[BaseModel], prefix: str) -> list[str]:
    texts = attribute_texts(model)
    lines = []
    for name, field in sorted(model.model_fields.items(), key=lambda item: _rank(model, item[0])):
        full = prefix + (field.alias or name)
        below = _model_of(field.annotation)
        if below is not None:
            lines += _options(below, full + ".")
            continue
        default = ""
        value = field.get_default(call_default_factory=False)
        if field.is_required():
            default = " (required)"
        elif isinstance(value, bool):
            default = f" (default: {'on' if value else 'off'})"
        elif isinstance(value, str | int):
            default = f" (default: {value})"
        lines.append(f"  {full}=<{type_text(field)}>{default}")
        if name in texts:
            lines.append(textwrap.indent(textwrap.fill(texts[name], 88), "        "))
    return lines


def _rank(model: type[BaseModel], name: str) -> int:
    """What must be said first, then what is special, then what all of the kind have."""
    if model.model_fields[name].is_required():
        return 0
    return 1 if name in model.__annotations__ else 2


def type_text(field: FieldInfo) -> str:
    """A short word for the type of an option."""
    annotation = field.annotation
    if any(meta in typing.get_args(Size)[1:] for meta in field.metadata):
        return "size"
    return _annotation_text(annotation)


def _annotation_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        if annotation == Size:
            return "size"
        annotation = typing.get_args(annotation)[0]
    if annotation == typing.get_args(BlockdevRef)[0]:
        return "node name or options"
    if annotation == typing.get_args(StrOrList)[0]:
        return "text or list"
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        rest = [argument for argument in arguments if argument is not type(None)]
        return " or ".join(dict.fromkeys(_annotation_text(argument) for argument in rest))
    if origin in (list, tuple):
        return f"list of {_annotation_text(arguments[0])}"
    return "object"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def attribute_texts(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under a model's members: name -> text."""
    texts: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (issubclass(cls, BaseModel) and cls is not BaseModel):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source at hand: then without texts
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for member, text in itertools.pairwise(body):
            if (
                isinstance(member, ast.AnnAssign)
                and isinstance(member.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                texts[member.target.id] = " ".join(text.value.value.split())
    return texts
