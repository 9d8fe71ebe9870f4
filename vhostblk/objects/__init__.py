# SPDX-License-Identifier: GPL-2.0-or-later
"""Objects: what is neither node nor export. `object-add`, `qom-get`, `qom-set`.

A type is a subclass of `BackendObject` with a `qom_type`, in a module of this
package; `register()` makes it known. Properties are the members of its options;
those named in `settable` can be changed while it is in use.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from vhostblk.engine import Engine
from vhostblk.schema import Identifier, Model, VhostblkError, did_you_mean, validate


class ObjectOptions(Model):
    """Options of every object."""

    qom_type: str
    """The object's type."""
    id: Identifier
    """The object's name."""


class BackendObject:
    """One object."""

    qom_type: ClassVar[str]
    Options: ClassVar[type[ObjectOptions]]
    settable: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, store: ObjectStore, options: Any) -> None:
        self.store = store
        self.options = options
        self.users: list[str] = []
        """Who uses it, for messages; an object in use cannot be deleted."""

    @property
    def id(self) -> str:
        """Its name."""
        return str(self.options.id)

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.store.engine

    async def open(self) -> None:
        """Make it work."""

    async def close(self) -> None:
        """Free what it has."""

    def merged(self, property: str, value: Any) -> Any:
        """What `property` is to be if `value` is given: some properties keep what is not named."""
        return value

    async def apply(self, options: Any) -> None:
        """Properties are about to change to `options`; raise to refuse."""

    def properties(self) -> dict[str, Any]:
        """All properties, with QAPI's names."""
        values: dict[str, Any] = self.options.model_dump(
            mode="json", by_alias=True, exclude={"qom_type", "id"}
        )
        return values

    def state_options(self) -> dict[str, Any] | None:
        """Options that make it again after a restart, for the state file (docs/state.md).

        None if they would give away a secret: the command line then has to make it again.
        """
        return self.options.to_options()  # type: ignore[no-any-return]


ObjectT = TypeVar("ObjectT", bound=BackendObject)
T = TypeVar("T", bound=type[BackendObject])
_types: dict[str, type[BackendObject]] = {}


def register(kind: T) -> T:
    """Class decorator: make an object type known."""
    _types[kind.qom_type] = kind
    return kind


def object_types() -> Mapping[str, type[BackendObject]]:
    """All types by name."""
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")
    return _types


class ObjectStore:
    """The objects of one backend."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._objects: dict[str, BackendObject] = {}

    def __iter__(self) -> Iterator[BackendObject]:
        return iter(self._objects.values())

    async def add(self, options: dict[str, Any]) -> BackendObject:
        """object-add."""
        kind = object_types().get(_string(options, "qom-type"))
        if kind is None:
            name = options["qom-type"]
            allowed = sorted(object_types())
            text = (
                f"Parameter 'qom-type' does not accept value '{name}'; "
                f"allowed: {', '.join(allowed)}"
            )
            data = {"code": "bad-value", "parameter": "qom-type"}
            raise VhostblkError(text, data=data).suggest(name, allowed)
        checked = validate(kind.Options, options)
        if checked.id in self._objects:
            raise VhostblkError(
                f"An object with id '{checked.id}' exists already; choose another id",
                data={"code": "duplicate-object", "id": checked.id},
            )
        made = kind(self, checked)
        self._objects[checked.id] = made
        try:
            await made.open()
        except BaseException:
            del self._objects[checked.id]
            raise
        return made

    async def delete(self, id: str) -> None:
        """object-del."""
        found = self._objects.get(id)
        if found is None:
            raise self._not_found(id, f"object '{id}' not found")
        if found.users:
            raise VhostblkError(
                f"object '{id}' is in use, can not be deleted: by {', '.join(found.users)}",
                data={"code": "object-in-use", "id": id, "users": list(found.users)},
            )
        del self._objects[id]
        await found.close()

    async def close(self) -> None:
        """Delete all."""
        while self._objects:
            _, found = self._objects.popitem()
            await found.close()

    def has(self, id: str, qom_type: str) -> bool:
        """Whether there is an object of this type with this id."""
        found = self._objects.get(id)
        return found is not None and found.qom_type == qom_type

    def find(self, id: str, kind: type[ObjectT]) -> ObjectT:
        """The object of this type with this id, or an error that says which there are."""
        found = self._objects.get(id)
        if isinstance(found, kind):
            return found
        known = [entry.id for entry in self._objects.values() if isinstance(entry, kind)]
        near = did_you_mean(id, known)
        hint = f"; did you mean '{near}'?" if near else ""
        if not known:
            hint = f"; make it first, with object {kind.qom_type},id={id}"
        raise VhostblkError(
            f'{kind.qom_type} "{id}" not found{hint}',
            data={"code": "no-such-object", "id": id, "allowed": known},
        )

    def use(self, id: str, kind: type[ObjectT], user: str) -> ObjectT:
        """The same, and it cannot be deleted until `release()` has been called for this user."""
        found = self.find(id, kind)
        found.users.append(user)
        return found

    def release(self, user: str, object: BackendObject | None = None) -> None:
        """`user` does not need this object any more; without one: none that it has used."""
        for entry in self._objects.values() if object is None else [object]:
            while user in entry.users:
                entry.users.remove(user)

    # ---- qom

    def qom_list(self, path: str) -> list[dict[str, Any]]:
        """Objects, or the properties of one."""
        if path.rstrip("/") in ("", "/objects"):
            if not path.rstrip("/"):
                return [{"name": "objects", "type": "child<container>"}]
            return [
                {"name": entry.id, "type": f"child<{entry.qom_type}>"}
                for entry in self._objects.values()
            ]
        found = self._at(path)
        listed = [{"name": "type", "type": "string"}]
        for name, value in found.properties().items():
            listed.append({"name": name, "type": _qom_type_name(value)})
        return listed

    def qom_get(self, path: str, property: str) -> Any:
        """The value of a property."""
        found = self._at(path)
        if property == "type":
            return found.qom_type
        values = found.properties()
        if property not in values:
            raise self._no_property(found, property)
        return values[property]

    async def qom_set(self, path: str, property: str, value: Any) -> None:
        """Change a property."""
        found = self._at(path)
        known = found.properties()
        if property not in known and property != "type":
            raise self._no_property(found, property)
        if property not in found.settable:
            settable = ", ".join(sorted(found.settable)) or "none"
            raise VhostblkError(
                f"Property '{found.qom_type}.{property}' is not writable; writable: {settable}",
                data={"code": "read-only-property", "property": property},
            )
        given = found.options.model_dump(by_alias=True)
        given[property] = found.merged(property, value)
        options = validate(type(found.options), given)
        await found.apply(options)
        found.options = options

    def _at(self, path: str) -> BackendObject:
        id = path.removeprefix("/objects/")
        found = self._objects.get(id)
        if found is None:
            from vhostblk.schema import DeviceNotFound

            known = [f"/objects/{name}" for name in self._objects]
            near = did_you_mean(path, [*known, *self._objects])
            hint = f"; did you mean '{near}'?" if near else ""
            raise DeviceNotFound(
                f"Device '{path}' not found{hint}", data={"code": "no-such-object", "path": path}
            )
        return found

    def _not_found(self, id: str, text: str) -> VhostblkError:
        error = VhostblkError(text, data={"code": "no-such-object", "id": id})
        return error.suggest(id, self._objects)

    def _no_property(self, found: BackendObject, property: str) -> VhostblkError:
        text = f"Property '{found.qom_type}.{property}' not found"
        error = VhostblkError(text, data={"code": "no-such-property", "property": property})
        return error.suggest(property, found.properties())


def _string(options: dict[str, Any], name: str) -> str:
    value = options.get(name)
    if value is None:
        raise VhostblkError(
            f"Parameter '{name}' is missing", data={"code": "missing-parameter", "parameter": name}
        )
    if not isinstance(value, str):
        raise VhostblkError(f"Invalid parameter type for '{name}', expected: string")
    return value


def _qom_type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "string"
