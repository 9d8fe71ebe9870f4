# SPDX-License-Identifier: GPL-2.0-or-later
"""Block drivers: one module (or package) each, found by name.

A driver is a subclass of `NodeDriver` with a `driver` name. Those that come
with vhostblk are found by scanning this package, those of other packages by
entry point (group `vhostblk.nodes`), and those in single files are loaded with
`load_plugin()`. To keep the start fast, a name is first looked for in the
module that bears it, and entry points are scanned only when nothing else knows
the name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from vhostblk.nodes.driver import NodeDriver
from vhostblk.schema import VhostblkError

ENTRY_POINTS = "vhostblk.nodes"
_NOT_DRIVERS = {"driver", "hooks", "locks"}


def drivers_in(module: ModuleType) -> Iterator[type[NodeDriver]]:
    """The drivers that a module or package defines (not those it imports from elsewhere)."""
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, NodeDriver)
            and f"{value.__module__}.".startswith(f"{module.__name__}.")
            and "driver" in vars(value)
        ):
            yield value


class DriverRegistry:
    """All drivers of one backend, loaded when first asked for."""

    def __init__(self) -> None:
        self._known: dict[str, type[NodeDriver]] = {}
        self._modules = [
            info.name
            for info in pkgutil.iter_modules(__path__)
            if info.name not in _NOT_DRIVERS and not info.name.startswith("_")
        ]
        self._entry_points_scanned = False
        self._plugins = 0

    def load_plugin(self, path: Path) -> list[type[NodeDriver]]:
        """Run a Python file and register the drivers it defines."""
        self._plugins += 1
        name = f"vhostblk_plugin_{self._plugins}_{path.stem.replace('-', '_')}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise _plugin_error(path, "it is not a Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pydantic looks up annotations there
        try:
            spec.loader.exec_module(module)
        except FileNotFoundError:
            del sys.modules[name]
            raise _plugin_error(path, "there is no such file") from None
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            where = _line_in(error, path)
            text = f"{type(error).__name__}: {error}{where}"
            raise _plugin_error(path, text) from error
        found = list(drivers_in(module))
        if not found:
            raise _plugin_error(
                path, "it defines no driver (a subclass of Filter with a 'driver' name)"
            )
        for driver in found:
            self.register(driver)
        return found

    def register(self, driver: type[NodeDriver]) -> None:
        """Make a driver known under its name."""
        other = self._find_builtin(driver.driver)
        if other is not None and other is not driver:
            raise VhostblkError(
                f"Driver '{driver.driver}' of {driver.__module__} exists already, "
                f"in {other.__module__}",
                data={"code": "duplicate-driver", "driver": driver.driver},
            )
        self._known[driver.driver] = driver

    def find(self, name: str) -> type[NodeDriver] | None:
        """The driver called `name`."""
        driver = self._find_builtin(name)
        if driver is None and not self._entry_points_scanned:
            self._scan_entry_points()
            driver = self._known.get(name)
        return driver

    def get(self, name: str, where: str = "driver") -> type[NodeDriver]:
        """The driver called `name`, or an error that suggests one."""
        driver = self.find(name)
        if driver is not None:
            return driver
        known = sorted(self.all())
        text = f"Parameter '{where}' does not accept value '{name}'; allowed: {', '.join(known)}"
        data = {"code": "bad-value", "parameter": where, "allowed": known}
        raise VhostblkError(text, data=data).suggest(name, known)

    def all(self) -> dict[str, type[NodeDriver]]:
        """Every driver by name. Imports them all."""
        for module in list(self._modules):
            self._import(module)
        if not self._entry_points_scanned:
            self._scan_entry_points()
        return dict(sorted(self._known.items()))

    def _find_builtin(self, name: str) -> type[NodeDriver] | None:
        if name in self._known:
            return self._known[name]
        # null-co is in null.py: the module that bears the longest part of the name.
        plain = name.replace("-", "_")
        likely = [m for m in self._modules if plain == m or plain.startswith(m + "_")]
        rest = [m for m in self._modules if m not in likely]
        for module in [*sorted(likely, key=len, reverse=True), *rest]:
            self._import(module)
            if name in self._known:
                return self._known[name]
        return None

    def _import(self, module: str) -> None:
        if module in self._modules:
            self._modules.remove(module)
            for driver in drivers_in(importlib.import_module(f"{__name__}.{module}")):
                self._known[driver.driver] = driver

    def _scan_entry_points(self) -> None:
        from importlib.metadata import entry_points

        self._entry_points_scanned = True
        for point in entry_points(group=ENTRY_POINTS):
            try:
                loaded = point.load()
            except (Exception, SystemExit) as error:
                # Somebody else's broken package must not keep ours from working.
                import logging

                logging.getLogger(__name__).error(
                    "driver '%s' cannot be loaded from %s: %s: %s",
                    point.name,
                    point.value,
                    type(error).__name__,
                    error,
                )
                continue
            found: list[type[NodeDriver]] = (
                list(drivers_in(loaded)) if isinstance(loaded, ModuleType) else [loaded]
            )
            for driver in found:
                self._known.setdefault(driver.driver, driver)


def _plugin_error(path: Path, text: str) -> VhostblkError:
    return VhostblkError(
        f"Plugin '{path}' cannot be loaded: {text}",
        data={"code": "bad-plugin", "path": str(path)},
    )


def _line_in(error: BaseException, path: Path) -> str:
    """Where in the plugin it went wrong."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            line = trace.tb_lineno
        trace = trace.tb_next
    if line is None:
        line = getattr(error, "lineno", None)
    return f" (line {line})" if line is not None else ""
