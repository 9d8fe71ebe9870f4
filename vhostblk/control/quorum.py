# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about quorums: their legs, and the jobs that look after them."""

from __future__ import annotations

from typing import Any

from vhostblk.control.registry import Context, Registry
from vhostblk.jobs.block_job import OnError
from vhostblk.jobs.quorum import find_quorum, start_rebuild, start_scrub
from vhostblk.nodes.driver import NodeDriver
from vhostblk.schema import Model, OnOff, UInt64, VhostblkError

registry = Registry()
command = registry.command


class QueryQuorum(Model):
    """Arguments of query-quorum."""

    node_name: str | None = None
    """The quorum; all of them if absent."""


@command("query-quorum", oob=True)
async def query_quorum(context: Context, arguments: QueryQuorum) -> Any:
    """The legs of a quorum, their states, and how much they have missed."""
    from vhostblk.nodes.quorum import Quorum

    if arguments.node_name is not None:
        quorums = [find_quorum(context.backend, arguments.node_name)]
    else:
        quorums = [node for node in context.backend.graph.open_nodes if isinstance(node, Quorum)]
    return [
        {
            "node-name": quorum.name,
            "vote-threshold": quorum.options.vote_threshold,
            **({"unclean": True} if quorum.unclean else {}),
            **({"discard-granularity": unit} if (unit := quorum.discard_granularity) else {}),
            "legs": quorum.describe_legs(),
        }
        for quorum in quorums
    ]


class QuorumJobArguments(Model):
    """What the commands that begin a job on a quorum have in common."""

    job_id: str | None = None
    """What the job is called."""
    node_name: str
    """The quorum."""
    speed: UInt64 = 0
    """Bytes per second; 0: no limit."""
    on_error: OnError = "report"
    """What happens when something cannot be read or written."""
    auto_finalize: OnOff = True
    auto_dismiss: OnOff = True

    def for_job(self) -> dict[str, Any]:
        """As the job's arguments."""
        names = ("speed", "on_error", "auto_finalize", "auto_dismiss")
        return {name: getattr(self, name) for name in names}


class QuorumRebuild(QuorumJobArguments):
    """Arguments of quorum-rebuild."""

    leg: str
    """The leg: the name of its node, or `children.N`."""
    full: OnOff = False
    """Compare all of it, not only what it is known to have missed."""


@command("quorum-rebuild")
async def quorum_rebuild(context: Context, arguments: QuorumRebuild) -> Any:
    """Begin a job that brings a leg up to date which has missed something."""
    async with context.backend.changing():
        quorum = find_quorum(context.backend, arguments.node_name)
        leg = quorum.leg(arguments.leg)
        job = start_rebuild(
            context.backend, quorum, leg, arguments.job_id, full=arguments.full,
            **arguments.for_job(),
        )  # fmt: skip
    return {"job-id": job.id}


class QuorumScrub(QuorumJobArguments):
    """Arguments of quorum-scrub."""

    repair: OnOff = True
    """Make legs right that are wrong, instead of only telling."""


@command("quorum-scrub")
async def quorum_scrub(context: Context, arguments: QuorumScrub) -> Any:
    """Begin a job that compares all legs with one another."""
    async with context.backend.changing():
        quorum = find_quorum(context.backend, arguments.node_name)
        job = start_scrub(
            context.backend, quorum, arguments.job_id, repair=arguments.repair,
            **arguments.for_job(),
        )  # fmt: skip
    return {"job-id": job.id}


class XBlockdevChange(Model):
    """Arguments of x-blockdev-change."""

    parent: str
    """The quorum."""
    child: str | None = None
    """The leg to take away: `children.N`, or the name of its node."""
    node: str | None = None
    """The node to add as a leg."""


@command("x-blockdev-change")
async def x_blockdev_change(context: Context, arguments: XBlockdevChange) -> Any:
    """Add a leg to a quorum, or take one away. A new leg is rebuilt before it votes."""
    if (arguments.child is None) == (arguments.node is None):
        raise VhostblkError(
            "The parameters child and node are in conflict"
            if arguments.child is not None
            else "Either child or node must be specified",
            data={"code": "bad-value"},
        )
    graph = context.backend.graph
    async with context.backend.changing():
        quorum = find_quorum(context.backend, arguments.parent)
        async with graph.change() as change:
            if arguments.node is not None:
                change.set_child(quorum, quorum.free_role(), graph.node(arguments.node))
            else:
                change.set_child(quorum, _role_of(quorum, arguments.child or ""), None)
    return {"pause-us": change.pause_us}


def _role_of(quorum: NodeDriver, name: str) -> str:
    for role, child in quorum.children.items():
        if child.node.name == name:
            return role
    return name  # what is no child is refused, with the names of those that are
