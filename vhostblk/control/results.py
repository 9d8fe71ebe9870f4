# SPDX-License-Identifier: GPL-2.0-or-later
"""What the query commands give, as models: for introspection and for tests.

Members without a note are QEMU's, with QEMU's meaning.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

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


class StatusInfo(Model):
    """Result of query-status."""

    running: bool
    status: str
    started: float
    nodes: int
    exports: int
    connected: int
    iothreads: int


class CacheInfo(Model):
    """How a node uses the host's page cache."""

    writeback: bool
    direct: bool
    no_flush: bool


class ImageInfo(Model):
    """What a node's image is."""

    filename: str
    format: str
    virtual_size: int = Field(alias="virtual-size")
    actual_size: int | None = None


class NodeChild(Model):
    """A child of a node (ours)."""

    child: str
    node_name: str


class NodeParent(Model):
    """What uses a node: another node, an export or a job (ours)."""

    parent: str
    child: str


class NodePermissions(Model):
    """What is done to a node and what others may do, as the bytes of QEMU's image locks (ours)."""

    used: int
    shared: int


class BlockDeviceInfo(Model):
    """One entry of query-named-block-nodes; drivers may add members of their own."""

    node_name: str
    drv: str
    file: str
    ro: bool
    active: bool
    encrypted: bool
    backing_file_depth: int = Field(alias="backing_file_depth")
    detect_zeroes: str = Field(alias="detect_zeroes")
    cache: CacheInfo
    write_threshold: int = Field(alias="write_threshold")
    bps: int
    bps_rd: int = Field(alias="bps_rd")
    bps_wr: int = Field(alias="bps_wr")
    iops: int
    iops_rd: int = Field(alias="iops_rd")
    iops_wr: int = Field(alias="iops_wr")
    image: ImageInfo
    filter: bool
    passive: bool
    children: list[NodeChild]
    parents: list[NodeParent]
    permissions: NodePermissions


class DriveInfo(Model):
    """One entry of query-block; from `node-name` on the members are ours."""

    device: str
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo
    node_name: str
    size: int
    writable: bool
    filters: list[str]
    top_node_below_filters: str
    siblings: list[str]


class GraphDrive(Model):
    """A drive in query-block-graph; `siblings` are those of `top-node-below-filters`."""

    id: str
    type: str
    node_name: str
    size: int
    writable: bool
    filters: list[str]
    top_node_below_filters: str
    siblings: list[str]


class EngineHalf(Model):
    """Who serves a node's requests: C, Python for some operations, or (none) the node `entry`."""

    kind: str
    entry: str
    operations: list[str] | None = None


class GraphNode(Model):
    """A node in query-block-graph."""

    node_name: str
    drv: str
    file: str
    size: int
    ro: bool
    filter: bool
    owned: bool
    passive: bool
    engine: EngineHalf
    draining: bool
    siblings: list[str]
    perm: list[str]
    shared_perm: list[str]


class GraphEdge(Model):
    """A relation in query-block-graph: `parent`, a drive or a node, has `node-name` as `child`."""

    parent: str
    parent_type: str
    child: str
    node_name: str
    kind: str | None = None
    perm: list[str]
    shared_perm: list[str]


class BlockGraph(Model):
    """Result of query-block-graph."""

    drives: list[GraphDrive]
    nodes: list[GraphNode]
    edges: list[GraphEdge]


class ChangeInfo(Model):
    """Result of a change of the graph (ours): how long guests were held up, in microseconds."""

    pause_us: int


class FilterInfo(ChangeInfo):
    """Result of block-filter-insert."""

    node_name: str


class SnapshotOfNode(Model):
    """One node that has been covered, and by what."""

    node: str
    overlay: str
    filename: str | None = None


class FreezeInfo(Model):
    """How a guest's file systems were frozen: how many, how long; what went wrong with thawing."""

    guest_agent: str
    filesystems: int
    frozen_us: int | None = None
    error: str | None = None


class SnapshotInfo(ChangeInfo):
    """Result of blockdev-snapshot-sync and blockdev-snapshot (ours)."""

    snapshots: list[SnapshotOfNode]
    freeze: FreezeInfo | None = None


class TransactionInfo(ChangeInfo):
    """Result of transaction: `results` has those of the actions, if any has one."""

    results: list[Any] | None = None


class BlockDeviceStats(Model):
    """QEMU's counters of one node or export."""

    rd_bytes: int = Field(alias="rd_bytes")
    wr_bytes: int = Field(alias="wr_bytes")
    zone_append_bytes: int = Field(alias="zone_append_bytes")
    unmap_bytes: int = Field(alias="unmap_bytes")
    rd_operations: int = Field(alias="rd_operations")
    wr_operations: int = Field(alias="wr_operations")
    zone_append_operations: int = Field(alias="zone_append_operations")
    flush_operations: int = Field(alias="flush_operations")
    unmap_operations: int = Field(alias="unmap_operations")
    rd_total_time_ns: int = Field(alias="rd_total_time_ns")
    wr_total_time_ns: int = Field(alias="wr_total_time_ns")
    zone_append_total_time_ns: int = Field(alias="zone_append_total_time_ns")
    flush_total_time_ns: int = Field(alias="flush_total_time_ns")
    unmap_total_time_ns: int = Field(alias="unmap_total_time_ns")
    wr_highest_offset: int = Field(alias="wr_highest_offset")
    rd_merged: int = Field(alias="rd_merged")
    wr_merged: int = Field(alias="wr_merged")
    zone_append_merged: int = Field(alias="zone_append_merged")
    unmap_merged: int = Field(alias="unmap_merged")
    failed_rd_operations: int = Field(alias="failed_rd_operations")
    failed_wr_operations: int = Field(alias="failed_wr_operations")
    failed_zone_append_operations: int = Field(alias="failed_zone_append_operations")
    failed_flush_operations: int = Field(alias="failed_flush_operations")
    failed_unmap_operations: int = Field(alias="failed_unmap_operations")
    invalid_rd_operations: int = Field(alias="invalid_rd_operations")
    invalid_wr_operations: int = Field(alias="invalid_wr_operations")
    invalid_zone_append_operations: int = Field(alias="invalid_zone_append_operations")
    invalid_flush_operations: int = Field(alias="invalid_flush_operations")
    invalid_unmap_operations: int = Field(alias="invalid_unmap_operations")
    account_invalid: bool = Field(alias="account_invalid")
    account_failed: bool = Field(alias="account_failed")
    timed_stats: list[Any] = Field(alias="timed_stats")


class Latency(Model):
    """Latencies of one operation since the start (ours)."""

    count: int
    mean_ns: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    p99_9_ns: int = Field(alias="p99.9-ns")
    histogram: list[list[int]]


class Latencies(Model):
    """Latencies of every operation (ours)."""

    read: Latency
    write: Latency
    flush: Latency
    discard: Latency
    write_zeroes: Latency


class BlockStats(Model):
    """One entry of query-blockstats: of a node, or of an export and then with its name."""

    node_name: str
    export: str | None = None
    driver: str | None = None
    stats: BlockDeviceStats
    latency: Latencies


class ExportAddress(Model):
    """Where front-ends connect."""

    type: str
    path: str | None = None
    number: str | None = Field(default=None, alias="str")


class BlockExportInfo(Model):
    """One entry of query-block-exports; from `addr` on the members are ours."""

    id: str
    type: str
    node_name: str
    shutting_down: bool
    addr: ExportAddress
    writable: bool
    size: int
    logical_block_size: int
    num_queues: int
    serial: str
    throttle_group: str | None = None
    iothreads: list[str]
    connected: bool
    writeback: bool
    features: int
    protocol_features: int
    queues_started: int
    memory_regions: int
    inflight: int
    resubmitted: int
    connections: int
    broken_connections: int
    unsupported_requests: int


class IOThreadInfo(Model):
    """One entry of query-iothreads; from `aio` on the members are ours."""

    id: str
    thread_id: int
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    aio_max_batch: int
    aio: str
    poll_ns: int
    loops: int
    sleeps: int
    requests: int
    notifies: int
    inline_ios: int
    queued_ios: int
    shared_requests: int
    fallback_reason: str | None = None


class JobInfo(Model):
    """One entry of query-jobs."""

    id: str
    type: str
    status: str
    current_progress: int
    total_progress: int
    error: str | None = None


class BlockJobInfo(Model):
    """One entry of query-block-jobs."""

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: str
    ready: bool
    status: str
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None
    waits_for: str | None = None
    """What keeps the job from going on, if something does."""


class QuorumLegInfo(Model):
    """A leg of a quorum."""

    child: str
    node_name: str
    state: Literal["in-sync", "stale", "failed", "rebuilding"]
    missed_bytes: int
    """How much it lacks at most."""
    discard_granularity: int | None = None
    """It gives space back in whole units of so many bytes; absent: it does not."""
    reason: str | None = None


class QuorumInfo(Model):
    """A quorum, in `query-quorum`."""

    node_name: str
    vote_threshold: int
    unclean: bool | None = None
    """Legs may differ in what was not flushed when the last process, or the host, ended."""
    discard_granularity: int | None = None
    """Whole units of so many bytes are zeroed where something is discarded; absent: nothing is."""
    legs: list[QuorumLegInfo]


class StartedJob(Model):
    """A job that a command has begun."""

    job_id: str


# Of commands that are not here nothing is said but whether they have a result.
RESULTS: dict[str, Any] = {
    "query-version": VersionInfo,
    "query-commands": list[CommandInfo],
    "query-events": list[EventInfo],
    "query-qmp-schema": list[Any],
    "query-status": StatusInfo,
    "query-named-block-nodes": list[BlockDeviceInfo],
    "query-blockstats": list[BlockStats],
    "query-block": list[DriveInfo],
    "query-block-graph": BlockGraph,
    "blockdev-reopen": ChangeInfo,
    "blockdev-replace": ChangeInfo,
    "block-filter-insert": FilterInfo,
    "block-filter-remove": ChangeInfo,
    "transaction": TransactionInfo,
    "query-block-exports": list[BlockExportInfo],
    "query-iothreads": list[IOThreadInfo],
    "query-jobs": list[JobInfo],
    "query-block-jobs": list[BlockJobInfo],
    "blockdev-snapshot-sync": SnapshotInfo,
    "blockdev-snapshot": SnapshotInfo,
    "query-quorum": list[QuorumInfo],
    "quorum-rebuild": StartedJob,
    "quorum-scrub": StartedJob,
    "block-stream": StartedJob,
    "luks-reencrypt": StartedJob,
    "dedup-defragment": StartedJob,
    "x-blockdev-change": ChangeInfo,
    "qom-list": list[ObjectPropertyInfo],
    "qom-get": Any,
}
