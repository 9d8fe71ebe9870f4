# SPDX-License-Identifier: GPL-2.0-or-later
"""From pydantic's errors to QAPI's sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vhostblk.schema.errors import VhostblkError, did_you_mean
from vhostblk.schema.model import Model

M = TypeVar("M", bound=Model)

# pydantic's error types -> what QAPI would have called the type it wanted.
_TYPES = {
    "string_type": "string",
    "bool_type": "boolean",
    "bool_parsing": "boolean",
    "int_type": "integer",
    "int_parsing": "integer",
    "int_from_float": "integer",
    "float_type": "number",
    "float_parsing": "number",
    "list_type": "array",
    "tuple_type": "array",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
}

# What is looked at first: a value of a union's type that is not known makes all its members
# unexpected, and a misspelt name also makes the correct one "missing".
_ORDER = {"literal_error": 0, "extra_forbidden": 1, "missing": 3}


def validate(model: type[M], data: Any, where: str = "") -> M:
    """An instance of `model` made from plain data.

    `where` is the dotted path of `data` in what the user wrote ("" for the top);
    it precedes the names of parameters in errors.
    """
    if not isinstance(data, dict):
        raise VhostblkError(
            f"Invalid parameter type for '{where}', expected: object"
            if where
            else "Expected an object of parameters",
            data={"code": "bad-type", "parameter": where},
        )
    try:
        checked = model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        first = min(details, key=lambda detail: _ORDER.get(detail["type"], 2))
        raise _translate(model, first, where) from None
    _refuse_python_names(checked, data, where)
    return checked


def _refuse_python_names(checked: Any, data: Any, where: str) -> None:
    """Members have two names for our own code, and one for all others: `node-name`.

    What looks for options before they are checked knows that one only.
    """
    if isinstance(checked, Model) and isinstance(data, dict):
        for name, field in type(checked).model_fields.items():
            known = field.alias or name
            if known != name and name in data:
                parameter = f"{where}.{name}" if where else name
                raise _unexpected(type(checked), parameter)
            if known in data:
                below = f"{where}.{known}" if where else known
                _refuse_python_names(getattr(checked, name), data[known], below)
    elif isinstance(checked, list | tuple) and isinstance(data, list | tuple):
        for index, (entry, given) in enumerate(zip(checked, data, strict=False)):
            _refuse_python_names(entry, given, f"{where}.{index}")


def _translate(model: type[Model], detail: ErrorDetails, where: str) -> VhostblkError:
    path = [str(part) for part in detail["loc"] if not _is_internal(part)]
    parameter = ".".join([*([where] if where else []), *path])
    context = detail.get("ctx", {})
    kind = detail["type"]
    value = detail.get("input")
    if kind == "extra_forbidden":
        return _unexpected(_model_at(model, path[:-1]), parameter)
    if kind == "missing":
        return _error("missing-parameter", parameter, f"Parameter '{parameter}' is missing")
    if kind == "literal_error":
        allowed = [entry.strip("'") for entry in _split_expected(str(context["expected"]))]
        if not isinstance(value, str):
            return wrong_type_error(parameter, "string")
        return _error(
            "bad-value",
            parameter,
            f"Parameter '{parameter}' does not accept value '{_shown(value)}'",
            near=did_you_mean(value, allowed),
            allowed=allowed,
            list_allowed=True,
        )
    if kind == "qapi_type" or kind in _TYPES:
        expected = str(context["expected"]) if kind == "qapi_type" else _TYPES[kind]
        hint = str(context.get("hint", ""))
        if kind in ("model_type", "model_attributes_type"):
            members = [f"{parameter}.{name}" for name in _names(_model_at(model, path))]
            hint = f"its members are {', '.join(members)}"
        return wrong_type_error(parameter, expected, hint)
    expected = str(context["expected"]) if kind == "qapi_value" else detail["msg"]
    if kind != "qapi_value" and expected.startswith("Value error, "):
        expected = expected.removeprefix("Value error, ")
        name = f"Parameter '{parameter}': " if parameter else ""
        return _error("bad-value", parameter, name + expected)
    return _error(
        "bad-value",
        parameter,
        f"Parameter '{parameter}' expects {expected}, not '{_shown(value)}'",
    )


def _unexpected(model: type[BaseModel], parameter: str) -> VhostblkError:
    """A name that is none of `model`'s, with the one that was meant or all there are."""
    name = parameter.rpartition(".")[2]
    known = _names(model)
    near = _nested(model, name) or did_you_mean(name, known)
    return _error(
        "unexpected-parameter",
        parameter,
        f"Parameter '{parameter}' is unexpected",
        near=near,
        allowed=known,
        list_allowed=near is None or len(known) <= 12,
    )


def wrong_type_error(parameter: str, expected: str, hint: str = "") -> VhostblkError:
    """A value of the wrong type, in QAPI's words."""
    text = f"Invalid parameter type for '{parameter}', expected: {expected}"
    error = _error("bad-type", parameter, f"{text}; {hint}" if hint else text)
    if hint and error.data is not None:
        error.data["hint"] = hint
    return error


def _error(
    code: str,
    parameter: str,
    text: str,
    *,
    near: str | None = None,
    allowed: list[str] | None = None,
    list_allowed: bool = False,
) -> VhostblkError:
    data: dict[str, Any] = {"code": code, "parameter": parameter}
    if allowed is not None:
        data["allowed"] = allowed
    if allowed and list_allowed:
        text = f"{text}; allowed: {', '.join(allowed)}"
    if near is not None:
        data["hint"] = f"did you mean '{near}'?"
        text = f"{text}; {data['hint']}"
    return VhostblkError(text, data=data)


def _is_internal(part: int | str) -> bool:
    """Steps of pydantic's own in a path: `function-before[…]`, the branch of a union."""
    return isinstance(part, str) and ("[" in part or part in ("str", "dict", "tuple"))


def _split_expected(text: str) -> Iterator[str]:
    """pydantic writes "'a', 'b' or 'c'"."""
    for part in text.replace(" or ", ", ").split(", "):
        yield part.strip()


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _nested(model: type[BaseModel], name: str) -> str | None:
    """Where the members of `model` have one called `name`: `addr.path` for `path`."""
    for field_name, field in model.model_fields.items():
        below = _model_in(field.annotation)
        if below is not None and name in _names(below):
            return f"{field.alias or field_name}.{name}"
    return None


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model of what stands at `path`."""
    for name in path:
        for field_name, field in model.model_fields.items():
            if name in (field_name, field.alias):
                below = _model_in(field.annotation)
                if below is not None:
                    model = below
                break
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation, perhaps optional, stands for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
