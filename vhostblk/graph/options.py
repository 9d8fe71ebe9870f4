# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of nodes, as the graph sees them: references to children, and what is inherited."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from vhostblk.nodes.driver import INHERITED, NodeDriver, RoleKind
from vhostblk.origin import origin
from vhostblk.schema import VhostblkError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def sentence(text: str, code: str, node: NodeDriver) -> Iterator[None]:
    """What a driver raises, somebody's plug-in mostly, becomes a sentence for the operator."""
    try:
        yield
    except VhostblkError:
        raise
    except (Exception, SystemExit) as error:
        logger.debug("%s", text, exc_info=True)
        reason = str(error)
        if not isinstance(error, OSError):
            reason = f"{type(error).__name__}: {error}{origin(error)}"
        elif error.strerror:
            reason = error.strerror
        raise VhostblkError(f"{text}: {reason}", data={"code": code, "node": node.name}) from error


def inherit(
    options: dict[str, Any], parent: Mapping[str, Any], driver: type[NodeDriver]
) -> tuple[dict[str, Any], frozenset[str]]:
    """A child's options with those it takes from its parent's, a node of `driver`; their names."""
    inherited = frozenset(key for key in INHERITED if key in parent and key not in options)
    if driver.detects_zeroes:
        inherited -= {"detect-zeroes"}
    return {**options, **{key: parent[key] for key in inherited}}, inherited


def references(driver: type[NodeDriver], options: Any) -> Iterator[tuple[str, Any]]:
    """The children that options name or define: role (and index), reference."""
    for role, kind in driver.child_roles.items():
        value = getattr(options, role.replace("-", "_"))
        if value is None:
            continue
        if kind.many:
            for index, entry in enumerate(value):
                yield f"{role}.{index}", entry
        else:
            yield role, value


def check_detect_zeroes(driver: type[NodeDriver], options: Any, prefix: str) -> None:
    """Refuse `detect-zeroes` where it would do nothing, or what QEMU does not allow."""
    if options.detect_zeroes == "off":
        return
    if options.detect_zeroes == "unmap" and options.discard != "unmap":
        raise _bad_detect_zeroes(
            f"Parameter '{prefix}detect-zeroes': setting detect-zeroes to unmap is not allowed "
            "without setting discard operation to unmap",
            prefix,
        )
    if driver.detects_zeroes:
        return
    text = f"Parameter '{prefix}detect-zeroes' has no effect on driver '{driver.driver}'"
    if any(role.kind is RoleKind.STORAGE for role in driver.child_roles.values()):
        raise _bad_detect_zeroes(f"{text}, which does not store zeroes as such", prefix)
    for _, reference in references(driver, options):
        if isinstance(reference, str):
            raise _bad_detect_zeroes(
                f"{text}; set it on the node that stores the data, below '{reference}'", prefix
            )


def _bad_detect_zeroes(text: str, prefix: str) -> VhostblkError:
    return VhostblkError(text, data={"code": "bad-value", "parameter": f"{prefix}detect-zeroes"})
