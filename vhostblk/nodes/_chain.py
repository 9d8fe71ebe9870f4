# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains of images: which overlays are below a node, and what they take from further down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from vhostblk.nodes.driver import NodeDriver, RoleKind
from vhostblk.schema import VhostblkError


@dataclass(frozen=True)
class Layer:
    """A node of a chain, and how many images are above it there."""

    node: NodeDriver
    depth: int


@dataclass(frozen=True)
class Leg:
    """An overlay with something behind it, seen from a node above."""

    node: NodeDriver
    shift: int
    """Where in it the data of the node above begin."""
    depth: int | None
    """How many images behind it count; None: all, and what none of them has counts too."""
    short: range
    """Where an image that counts ends, and one behind those that count would show."""
    keeps_zeroes: bool
    """What is zeroes there is zeroes in the node above: nothing between them encrypts."""

    async def extents(self, offset: int, length: int) -> AsyncIterator[tuple[int, int, bool, bool]]:
        """What a range consists of: offset, bytes, whether it is the overlay's to get, zeroes."""
        async for extent in self.node.extents(offset + self.shift, length):
            own = extent.depth == 0 and extent.present
            if self.depth is None:
                wanted = not own
            else:
                wanted = extent.present and 1 <= extent.depth <= self.depth
                wanted = wanted or (not own and _overlap(extent.start, extent.length, self.short))
            zero = extent.zero and self.keeps_zeroes
            yield extent.start - self.shift, extent.length, wanted, zero

    async def lacks(self, offset: int, length: int) -> bool:
        """Whether there is something in a range for the overlay to get."""
        async for _, _, wanted, _ in self.extents(offset, length):
            if wanted:
                return True
        return False

    def beside(self, size: int) -> list[tuple[int, int]]:
        """Where what the overlay has before and behind a disk of `size` bytes begins and ends.

        A header of LUKS for one. Counted from where the disk begins.
        """
        ranges = [(-self.shift, 0), (size, self.node.size - self.shift)]
        return [(begin, end) for begin, end in ranges if begin < end]


def _overlap(start: int, length: int, other: range) -> bool:
    return start < other.stop and other.start < start + length


def backing_role(node: NodeDriver) -> str | None:
    """The role in which a node has what it does not have itself."""
    for name, role in node.child_roles.items():
        if role.kind is RoleKind.BACKING:
            return name
    return None


def backing_of(node: NodeDriver) -> NodeDriver | None:
    """The node behind an overlay; None if there is none, or it is no overlay."""
    role = backing_role(node)
    child = node.children.get(role) if role is not None else None
    return child.node if child is not None else None


def data_children(node: NodeDriver) -> list[NodeDriver]:
    """The children that have the data of a node: not those that only describe them."""
    return [
        child.node
        for role, child in node.children.items()
        if node.child_roles[role.partition(".")[0]].kind is not RoleKind.METADATA
    ]


def images_behind(top: NodeDriver) -> list[NodeDriver]:
    """What is behind each overlay at or below a node."""
    found: dict[NodeDriver, None] = {}
    waiting = [top]
    for node in waiting:  # grows while it is walked
        if backing_role(node) is None:
            waiting += data_children(node) if node.data_shift() is not None else []
        elif (behind := backing_of(node)) is not None:
            found[behind] = None
            waiting.append(behind)
    return list(found)


def layers(top: NodeDriver) -> Iterator[Layer]:
    """The images of a chain, from the top down. Filters between them are left out."""
    node: NodeDriver | None = top
    depth = 0
    while node is not None:
        if not node.is_filter:
            yield Layer(node, depth)
        if backing_role(node) is not None:
            node, depth = backing_of(node), depth + 1
        elif node.children and node.data_shift() is not None:
            node = data_children(node)[0]
        else:
            return


def legs_below(node: NodeDriver, bottom: str | None) -> tuple[list[Leg], bool]:
    """The topmost overlays below a node that have something behind them.

    And whether there is nothing else: beside them, a quorum may have legs that are no overlays.
    """
    found: list[Leg] = []
    whole = True
    waiting = [(child, 0, True) for child in data_children(node)]
    while waiting:
        current, shift, zeroes = waiting.pop(0)
        further = current.data_shift()
        if backing_role(current) is not None:
            legs = _legs_of(current, shift, zeroes, node, bottom)
            found += legs
            whole &= bool(legs)
        elif further is not None and (below := data_children(current)):
            zeroes = zeroes and current.keeps_zeroes
            waiting += [(child, shift + further, zeroes) for child in below]
        else:
            whole = False
    if bottom is not None and not found:
        _check_bottom(node, bottom)
    return list({leg.node: leg for leg in found}.values()), whole


def _legs_of(
    top: NodeDriver, shift: int, zeroes: bool, above: NodeDriver, bottom: str | None
) -> list[Leg]:
    if bottom is not None:
        return _limited(top, shift, zeroes, above, bottom)
    return [Leg(top, shift, None, range(0), zeroes)] if backing_of(top) is not None else []


def _limited(
    top: NodeDriver, shift: int, zeroes: bool, above: NodeDriver, bottom: str
) -> list[Leg]:
    """An overlay that copies from images down to `bottom` only; none if it is that itself."""
    chain = list(layers(top))
    depth = next((layer.depth for layer in chain if layer.node.name == bottom), None)
    if depth is None:
        raise _not_in_chain(above, top, bottom)
    if depth == 0:
        return []
    shortest = min(layer.node.size for layer in chain if 1 <= layer.depth <= depth)
    behind = max((layer.node.size for layer in chain if layer.depth == depth + 1), default=0)
    short = range(shortest, max(shortest, behind))
    return [Leg(top, shift, depth, short, zeroes)]


def _check_bottom(node: NodeDriver, bottom: str) -> None:
    """`bottom` must be somewhere below, though it makes no difference."""
    waiting = data_children(node)
    for current in waiting:  # grows while it is walked
        if any(layer.node.name == bottom for layer in layers(current)):
            return
        if current.is_filter:
            waiting += data_children(current)
    raise _not_in_chain(node, waiting[0], bottom)


def _not_in_chain(node: NodeDriver, top: NodeDriver, bottom: str) -> VhostblkError:
    below = [layer.node.name for layer in layers(top)]
    return VhostblkError(
        f"Bottom node '{bottom}' of node '{node.name}' is not in the chain below it, or is a "
        f"filter; the chain: {', '.join(below)}",
        data={"code": "bad-bottom", "node": node.name, "allowed": below},
    )
