# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: the same data on several legs, read by vote.

Writes, flushes, discards and zero writes go to all legs at the same time and succeed
if `vote-threshold` of them do. A read asks all legs and returns the version that at least
`vote-threshold` of them agree on; with `read-pattern=fifo` the first leg that can answers alone.
Options, events and rules are QEMU's, with these differences: discards reach the legs, flushes
reach them in parallel, all options and children can be changed under a running guest, and
`blkverify` fails the request (EIO, QUORUM_FAILURE) where QEMU ends itself.
Engine half: cffi_build/engine/nodes/quorum.c.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from vhostblk.engine import MAX_CHILDREN, OP_NAMES
from vhostblk.engine.quorum import QUORUM_ALL, QuorumHandle, new_quorum
from vhostblk.nodes.driver import INHERITED, ChildRole, NodeDriver, NodeOptions
from vhostblk.ratelimit import RateLimitedLog
from vhostblk.schema import BlockdevRef, OnOff, UInt32, VhostblkError

logger = logging.getLogger(__name__)

SECTOR = 512
# QAPI's QuorumOpType knows three.
_REPORT_TYPES = ("read", "write", "flush", "write", "write")


class QuorumOptions(NodeOptions):
    """Options of quorum."""

    children: list[BlockdevRef]
    """The legs, 1 to 32, all of the same size."""
    vote_threshold: UInt32
    """How many legs must agree on a read, or succeed; from 1 to the number of legs."""
    read_pattern: Literal["quorum", "fifo"] = "quorum"
    """Ask all legs and vote, or ask one after the other until one answers."""
    rewrite_corrupted: OnOff = False
    """Write the winner's data to legs that were outvoted."""
    blkverify: OnOff = False
    """Two legs that must be equal: reads fail where they are not."""


class Quorum(NodeDriver):
    """Several legs with the same data."""

    driver = "quorum"
    Options = QuorumOptions
    is_filter = True
    child_roles: ClassVar[Mapping[str, ChildRole]] = {"children": ChildRole(many=True)}
    reopenable = frozenset(INHERITED) | {
        "vote-threshold",
        "read-pattern",
        "rewrite-corrupted",
        "blkverify",
    }
    options: QuorumOptions
    handle: QuorumHandle | None

    async def open(self) -> None:
        self._log = RateLimitedLog(logger)
        self._check(self.options)
        self.handle = new_quorum(self.engine, self._report, **self._half_options(self.options))

    @property
    def read_only(self) -> bool:
        return bool(self.options.read_only)

    def describe(self) -> dict[str, Any]:
        return {"legs": [child.node.name for child in self.children.values()]}

    # ---- options, now and later

    def _check(self, options: QuorumOptions) -> None:
        legs = list(self.children.values())
        if not 1 <= len(legs) <= MAX_CHILDREN:
            raise self._error(
                f"Number of provided children must be from 1 to {MAX_CHILDREN}", "children"
            )
        if options.vote_threshold < 1:
            raise self._error("Parameter 'vote-threshold' expects a value >= 1", "vote-threshold")
        if options.vote_threshold > len(legs):
            raise self._error(
                f"threshold may not exceed children count: quorum '{self.name}' has {len(legs)} "
                f"children and vote-threshold is {options.vote_threshold}",
                "vote-threshold",
            )
        if options.blkverify and (len(legs), options.vote_threshold) != (2, 2):
            raise self._error(
                "blkverify=on can only be set if there are exactly two files and vote-threshold "
                "is 2",
                "blkverify",
            )
        if options.blkverify and options.rewrite_corrupted:
            raise self._error(
                "rewrite-corrupted=on cannot be used with blkverify=on", "rewrite-corrupted"
            )
        for leg in legs:
            if leg.size != legs[0].size:
                raise self._error(
                    f"the legs of quorum '{self.name}' differ in size: '{legs[0].node.name}' has "
                    f"{legs[0].size} bytes, '{leg.node.name}' has {leg.size}",
                    "children",
                )

    def _half_options(self, options: QuorumOptions) -> dict[str, Any]:
        return {
            "legs": len(self.children),
            "threshold": options.vote_threshold,
            "fifo": options.read_pattern == "fifo",
            "rewrite_corrupted": options.rewrite_corrupted and not options.read_only,
        }

    def children_changed(self) -> None:
        self._check(self.options)
        if self.handle is not None:
            self.handle.set(**self._half_options(self.options))

    async def reopen_commit(self) -> None:
        await super().reopen_commit()
        self.children_changed()

    async def reopen_abort(self) -> None:
        await super().reopen_abort()
        if self.handle is not None:
            self.handle.set(**self._half_options(self.options))

    # ---- what the legs do wrong

    def _report(self, leg: int, ret: int, op: int, offset: int, length: int) -> None:
        where = {
            "sector-num": offset // SECTOR,
            "sectors-count": -(-(offset % SECTOR + length) // SECTOR),
        }
        if leg == QUORUM_ALL:
            self._log.log(
                logging.ERROR,
                "quorum '%s': %s of %d bytes at %d failed: %s",
                self.name,
                OP_NAMES[op],
                length,
                offset,
                os.strerror(-ret),
            )
            self.host.emit("QUORUM_FAILURE", {"reference": self.name, **where})
            return
        legs = list(self.children.values())
        if leg >= len(legs):  # taken away meanwhile
            return
        name = legs[leg].node.name
        reason = os.strerror(-ret) if ret < 0 else "it was outvoted"
        self._log.log(
            logging.WARNING,
            "quorum '%s': bad leg '%s', %s of %d bytes at %d: %s",
            self.name,
            name,
            OP_NAMES[op],
            length,
            offset,
            reason,
        )
        error = {"error": reason} if ret < 0 else {}
        report = {"type": _REPORT_TYPES[op], **error, "node-name": name, **where}
        self.host.emit("QUORUM_REPORT_BAD", report)

    # ---- size

    async def truncate(self, size: int) -> None:
        for child in self.children.values():
            await child.node.truncate(size)

    def _error(self, text: str, parameter: str) -> VhostblkError:
        return VhostblkError(text, data={"code": "bad-quorum", "parameter": parameter})
