# SPDX-License-Identifier: GPL-2.0-or-later
"""What the query commands give, as models: for introspection and for tests.

Members without a note are QEMU's, with QEMU's meaning.
"""

from __future__ import annotations

from typing import Any

from vhostblk.schema import Model


class QemuVersion(Model):
    """Three numbers."""

    major: int
    minor: int
    micro: int


class VersionInfo(Model):
    """Result of query-version. `qemu` holds our version, `package` our name."""

    qemu: QemuVersion
    package: str


class CommandInfo(Model):
    """One command."""

    name: str


class EventInfo(Model):
    """One event."""

    name: str


class ObjectPropertyInfo(Model):
    """One property of an object, or one object."""

    name: str
    type: str
    description: str | None = None
    default_value: Any = None
