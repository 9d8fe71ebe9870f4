# SPDX-License-Identifier: GPL-2.0-or-later
"""The state file and kill -9, at every step of a change: the next start serves the tree of
before or of after, a guest's writes are all there, and what was said to be done is done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from frontend import Daemon, Device, Qmp, Request, vhostblk
from guest_agent_peer import GuestAgentPeer

PLUGIN = str(Path(__file__).with_name("cow_driver.py"))
MIB = 1 << 20
VHOSTBLK = (sys.executable, "-m", "vhostblk")
TREE = (
    "--blockdev",
    "raw,node-name=leg0,file.driver=file,file.filename={dir}/disk0.img",
    "--blockdev",
    "raw,node-name=leg1,file.driver=file,file.filename={dir}/disk1.img",
    "--blockdev",
    "mirror,node-name=m,children.0=leg0,children.1=leg1",
    "--blockdev",
    "null-co,node-name=spare",
    "--export",
    "vhost-user-blk,id=e,node-name=m,addr.type=unix,addr.path={dir}/e.sock,writable=on",
)
PROCESS = ("--plugin", PLUGIN, "--state", "{dir}/state", "--control", "{dir}/q.sock")
STATE_POINTS = ("state-begun", "state-written", "state-synced", "state-renamed", "state-safe")
PAUSED_POINTS = ("snapshot-paused", "snapshot-flushed")
SNAPSHOT_POINTS = ("snapshot-file", "snapshot-created", "snapshot-opened", *PAUSED_POINTS)


@pytest.fixture(scope="module")
def prepared() -> Iterator[Path]:
    """A directory with a state file and images, as a backend leaves them."""
    with vhostblk(*TREE, *PROCESS, files={"disk0.img": MIB, "disk1.img": MIB}) as daemon:
        with Device(daemon.socket("e")) as device:
            device.write(0, b"before" + bytes(506))
            device.flush()
        daemon.terminate()
        yield daemon.directory


def start(directory: Path, fault: str | None = None) -> Daemon:
    """The same command for each start: nothing of the tree is in it."""
    command = [*VHOSTBLK, "serve", *(word.replace("{dir}", str(directory)) for word in PROCESS)]
    # What images leave for the next process is in the directory, too.
    env = {"VHOSTBLK_FAULT": fault or "", "VHOSTBLK_LOG_DIR": str(directory)}
    return Daemon(command, directory, env=env).when_ready()


def document(directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "state").read_text())
    return data


def check_tree(daemon: Daemon) -> None:
    """What is served is what the state file says."""
    with Qmp(daemon.socket("q")) as qmp:
        graph = qmp.command("query-block-graph")
        exports = qmp.command("query-block-exports")
    state = document(daemon.directory)
    assert {node["node-name"] for node in graph["nodes"]} == {n["name"] for n in state["nodes"]}
    children = {
        (node["name"], name)
        for node in state["nodes"]
        for role in ("file", "backing", "children")
        for name in _listed(node["options"].get(role))
    }
    edges = {(e["parent"], e["node-name"]) for e in graph["edges"] if e["parent-type"] == "node"}
    assert edges == children
    roots = {(export["id"], export["node-name"]) for export in exports}
    assert roots == {(export["id"], export["node-name"]) for export in state["exports"]}


def before(block: int) -> bytes:
    """What `prepared` has written."""
    return b"before" + bytes(506) if block == 0 else bytes(512)


def check_images(directory: Path) -> None:
    """Nothing that the tree uses is corrupt; clusters may have leaked."""
    used = [node["options"] for node in document(directory)["nodes"]]
    for path in sorted(directory.glob("*.qcow2")):
        if any(options.get("filename") == str(path) for options in used):
            done = subprocess.run(["qemu-img", "check", "-q", str(path)], check=False)
            assert done.returncode in (0, 3), path


def _listed(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


FILTER = {"driver": "through", "node-name": "t"}
SLOWER = {"driver": "null-co", "node-name": "spare", "latency-ns": 500}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "add": ("blockdev-add", {"driver": "null-co", "node-name": "n"}),
    "del": ("blockdev-del", {"node-name": "spare"}),
    "object": ("object-add", {"qom-type": "iothread", "id": "t0"}),
    "export-del": ("block-export-del", {"id": "e", "mode": "hard"}),
    "filter": ("block-filter-insert", {"export-id": "e", "filter": FILTER}),
    "snapshot": ("blockdev-snapshot-sync", {"device": "e"}),
    "reopen": ("blockdev-reopen", {"options": [SLOWER]}),
    "replace": (
        "blockdev-replace",
        {"parent-type": "export", "export-id": "e", "new-child": "leg0"},
    ),
    "resize": ("block_resize", {"node-name": "spare", "size": 2 * MIB}),
    "transaction": (
        "transaction",
        {
            "actions": [
                {"type": "block-filter-insert", "data": {"export-id": "e", "filter": FILTER}},
                {"type": "blockdev-reopen", "data": {"options": [SLOWER]}},
                {"type": "blockdev-snapshot-sync", "data": {"device": "e"}},
            ]
        },
    ),
}
CASES = [("filter", point) for point in STATE_POINTS]
CASES += [
    (change, point)
    for change in ("snapshot", "transaction")
    for point in (*STATE_POINTS, *SNAPSHOT_POINTS)
]
CASES += [
    (change, point)
    for change in ("add", "del", "object", "export-del", "reopen", "replace", "resize")
    for point in ("state-synced", "state-renamed")
]


@pytest.mark.parametrize(("change", "point"), CASES)
def test_killed_at_one_step(restored: Path, change: str, point: str) -> None:
    name, arguments = CHANGES[change]
    before = (restored / "state").read_text()
    with start(restored, point) as daemon:
        assert (restored / "state").read_text() == before  # nothing to write at the start
        with Device(daemon.socket("e")) as device:
            device.write(512, b"written" + bytes(505))
            device.flush()
            with Qmp(daemon.socket("q")) as qmp, pytest.raises((AssertionError, OSError)):
                qmp.command(name, **arguments)
            assert daemon.process.wait(20) == -9
            after = (restored / "state").read_text()
            recorded = point in ("state-renamed", "state-safe")
            # What reads the same is recorded before guests are paused.
            recorded |= change == "snapshot" and point in PAUSED_POINTS
            assert (after != before) == recorded
            daemon.close()
            with start(restored) as again:
                check_tree(again)
                if change == "export-del" and after != before:
                    return
                device.reconnect()
                assert device.read(0, 1024) == b"before" + bytes(506) + b"written" + bytes(505)
                device.write(1024, b"later" + bytes(507))
                device.flush()
                # The same change, or another snapshot, can be made now.
                if change == "snapshot" or after == before:
                    with Qmp(again.socket("q")) as qmp:
                        qmp.command(name, **arguments)
                    check_tree(again)
                    if change != "export-del":
                        assert device.read(1024, 5 * 512)[:5] == b"later"
    check_images(restored)


QUORUM = (
    *TREE[:4],
    "--blockdev",
    "quorum,node-name=m,children.0=leg0,children.1=leg1,vote-threshold=1",
    "--blockdev",
    "null-co,node-name=spare",
    *TREE[-2:],
)


@pytest.mark.parametrize("point", ["state-synced", "state-renamed", *PAUSED_POINTS])
def test_a_quorum_knows_its_legs_wherever_a_snapshot_was_killed(point: str) -> None:
    """Whether its metadata or the state file, or both, are those of before."""
    with vhostblk(*QUORUM, *PROCESS, files={"disk0.img": MIB, "disk1.img": MIB}) as daemon:
        with Device(daemon.socket("e")) as device:
            device.write(0, b"before" + bytes(506))
        daemon.terminate()
        killed_in_a_snapshot(daemon.directory, point)
        with start(daemon.directory) as again, Qmp(again.socket("q")) as qmp:
            check_tree(again)
            [quorum] = qmp.command("query-quorum")
            assert [leg["state"] for leg in quorum["legs"]] == ["in-sync", "in-sync"]
            with Device(again.socket("e")) as device:
                assert device.read(0, 512) == b"before" + bytes(506)


ALONE = (
    *TREE[:2],
    "--export",
    "vhost-user-blk,id=e,node-name=leg0,addr.type=unix,addr.path={dir}/e.sock,writable=on",
)


@pytest.mark.parametrize("point", ["state-synced", "state-renamed", *PAUSED_POINTS])
def test_killed_when_what_an_export_shows_is_covered(point: str) -> None:
    """There are no filters above it: the export has another root."""
    with vhostblk(*ALONE, *PROCESS, files={"disk0.img": MIB}) as daemon:
        with Device(daemon.socket("e")) as device:
            device.write(0, b"before" + bytes(506))
        daemon.terminate()
        killed_in_a_snapshot(daemon.directory, point)
        with start(daemon.directory) as again:
            check_tree(again)
            with Qmp(again.socket("q")) as qmp:
                [export] = qmp.command("query-block-exports")
            assert export["node-name"] == ("leg0" if point == "state-synced" else "leg0-1")
            with Device(again.socket("e")) as device:
                assert device.read(0, 512) == b"before" + bytes(506)


def test_a_job_goes_on_wherever_a_snapshot_was_killed() -> None:
    """What it is about has another name in the new tree: that is recorded in the pause."""
    with vhostblk(*QUORUM, *PROCESS, files={"disk0.img": MIB, "disk1.img": MIB}) as daemon:
        daemon.terminate()
        with start(daemon.directory, "snapshot-paused") as killed, Qmp(killed.socket("q")) as qmp:
            qmp.command("quorum-scrub", **{"job-id": "s", "node-name": "m", "speed": 1})
            before = document(daemon.directory)
            assert [job["id"] for job in before["jobs"]] == ["s"]
            with pytest.raises((AssertionError, OSError)):
                qmp.command("blockdev-snapshot-sync", device="e")
            assert killed.process.wait(20) == -9
        assert document(daemon.directory) == before
        with start(daemon.directory) as again, Qmp(again.socket("q")) as qmp:
            check_tree(again)
            assert [job["id"] for job in qmp.command("query-jobs")] == ["s"]


FAILING = {
    "actions": [
        {"type": "blockdev-snapshot-sync", "data": {"device": "e"}},
        {"type": "abort", "data": {}},
    ]
}


@pytest.mark.parametrize("point", ["state-synced:2", "state-renamed:2", "state-safe:2", ""])
def test_killed_while_a_snapshot_is_undone(restored: Path, point: str) -> None:
    """It was recorded before it failed: its files go after that has been taken back."""
    before, files = (restored / "state").read_text(), set(os.listdir(restored))
    with start(restored, point) as daemon, Device(daemon.socket("e")) as device:
        device.write(512, b"written" + bytes(505))
        with Qmp(daemon.socket("q")) as qmp, pytest.raises((AssertionError, OSError)):
            qmp.command("transaction", **FAILING)
        if point:
            assert daemon.process.wait(20) == -9
        else:
            left = set(os.listdir(restored)) - files
            assert left <= {"e.sock", "q.sock", f"vhostblk-logs-{os.geteuid()}"}
        assert ((restored / "state").read_text() != before) == (point == "state-synced:2")
        daemon.close()
        with start(restored) as again:
            check_tree(again)
            device.reconnect()
            assert device.read(512, 512) == b"written" + bytes(505)
            device.write(1024, b"later" + bytes(507))
            device.flush()
    check_images(restored)


@pytest.fixture
def restored(prepared: Path) -> Iterator[Path]:
    """What `prepared` left, to be changed by one test; put back at the end."""
    copy = prepared.with_name(prepared.name + "-copy")
    shutil.copytree(prepared, copy)
    yield prepared
    shutil.rmtree(prepared)
    copy.rename(prepared)


@pytest.mark.parametrize("format", ["cow", "qcow2"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_time(restored: Path, format: str, seed: int) -> None:
    """Changes one after the other while a guest writes; killed at random, several times.

    What a block may be afterwards: what was written last, or was being written.
    """
    rng = random.Random(seed)
    model: dict[int, list[bytes]] = {}
    daemon = start(restored)
    device = Device(daemon.socket("e"), timeout=30)
    try:
        with device:
            for _ in range(4):
                stop = threading.Event()
                acknowledged: list[str] = []
                changer = threading.Thread(
                    target=_change, args=(daemon.socket("q"), format, acknowledged, stop)
                )
                changer.start()
                end = time.monotonic() + rng.uniform(0.05, 0.4)
                while True:
                    requests: list[Request] = []
                    for block in rng.sample(range(1024), 16):
                        model.setdefault(block, [before(block)]).append(rng.randbytes(512))
                        requests.append(device.submit(1, block, model[block][-1]))
                    if time.monotonic() > end:
                        break  # killed with these in flight
                    device.wait(*requests)
                    if rng.random() < 0.2:
                        device.flush()
                    # Flushed or not: the guest lives on, and knows nothing of the kill.
                    model = {block: values[-1:] for block, values in model.items()}
                daemon.kill()
                stop.set()
                changer.join()
                daemon = start(restored)
                check_tree(daemon)
                if acknowledged and acknowledged[-1]:
                    names = {entry["name"] for entry in document(restored)["nodes"]}
                    assert acknowledged[-1] in names
                device.reconnect()
                device.wait(*requests)
                for block, values in model.items():
                    found = device.read(block * 512, 512)
                    assert found in values
                    model[block] = [found]
    finally:
        daemon.close()
    check_images(restored)
    assert sorted(set(os.listdir(restored)) & {"state", "state.lock"}) == ["state", "state.lock"]
    assert (restored / "state").stat().st_mode & 0o777 == 0o600


def _change(socket: str, format: str, acknowledged: list[str], stop: threading.Event) -> None:
    """Change the tree until the backend is gone; tells the node that each change has made."""
    rng = random.Random(format)
    count = 0
    with contextlib.suppress(AssertionError, OSError), Qmp(socket) as qmp:

        def add(node: str, name: str, **arguments: Any) -> Any:
            result = qmp.command(name, **arguments)
            acknowledged.append(node or result["snapshots"][0]["overlay"])
            return result

        def remove(name: str, node: str) -> None:
            acknowledged.append("")  # from now on it may be there or not
            qmp.command(name, **{"node-name": node})

        while not stop.is_set():
            count += 1
            name = f"x{rng.randrange(1 << 30)}"
            kind = rng.randrange(3)
            if kind == 0:
                add(name, "blockdev-add", driver="null-co", **{"node-name": name})
                remove("blockdev-del", name)
            elif kind == 1:
                filter = {"driver": "through", "node-name": name}
                add(name, "block-filter-insert", filter=filter, **{"export-id": "e"})
                if rng.random() < 0.9:
                    remove("block-filter-remove", name)
            elif count < 8:
                add("", "blockdev-snapshot-sync", device="e", format=format)


def test_the_command_line_counts_for_the_first_start_only(restored: Path) -> None:
    tree = [word.replace("{dir}", str(restored)) for word in TREE]
    process = [word.replace("{dir}", str(restored)) for word in PROCESS]
    with start(restored) as daemon:
        with Qmp(daemon.socket("q")) as qmp:
            qmp.command("blockdev-del", **{"node-name": "spare"})
        daemon.terminate()
    with Daemon([*VHOSTBLK, "serve", *tree, *process], restored) as daemon:
        daemon.wait_line("the tree is that of state file")
        daemon.wait_line("vhostblk: ready")
        with Qmp(daemon.socket("q")) as qmp:
            nodes = {node["node-name"] for node in qmp.command("query-named-block-nodes")}
        assert "spare" not in nodes and {"leg0", "leg1", "m"} <= nodes
        # Nobody else gets it.
        second = Daemon([*VHOSTBLK, "serve", "--state", str(restored / "state")], restored)
        with second:
            second.wait_line("belongs to a running backend")
            assert second.process.wait(10) == 1


def test_a_plug_in_must_be_given_again(restored: Path) -> None:
    with Daemon([*VHOSTBLK, "serve", "--state", str(restored / "state")], restored) as daemon:
        line = daemon.wait_line("State file")
        assert "node 'm'" in line and "'mirror'" in line
        assert daemon.process.wait(10) == 1


@pytest.mark.parametrize(
    "point", ["state-renamed", "state-safe", *PAUSED_POINTS, "snapshot-covered"]
)
def test_what_was_covered_becomes_read_only(restored: Path, point: str) -> None:
    """Of a snapshot that is in the tree; by the next process, if this one does not live."""
    killed_in_a_snapshot(restored, point)
    marked = [node["name"] for node in document(restored)["nodes"] if "covered" in node]
    assert marked == ["leg0", "leg1"]
    for _ in range(2):
        with start(restored) as daemon:
            with Qmp(daemon.socket("q")) as qmp:
                nodes = qmp.command("query-named-block-nodes")
            read_only = {node["node-name"] for node in nodes if node["ro"]}
            assert read_only >= {"leg0", "leg1"} and "m" not in read_only
            assert "covered" not in (restored / "state").read_text()
            for leg in "disk0.img", "disk1.img":
                # Other programs may have it for reading, and allow no writing to it.
                subprocess.run(
                    ["qemu-io", "-r", "-f", "raw", restored / leg, "-c", "q"], check=True
                )
            daemon.terminate()


FROZEN_POINTS = ("snapshot-frozen", "state-renamed:2", *PAUSED_POINTS)
"""While a guest is frozen; the last when the new tree is recorded (a record of the freeze is the
first document that is written)."""


@pytest.mark.parametrize("point", ["state-synced", "state-renamed", *FROZEN_POINTS])
def test_a_frozen_guest_is_thawed_by_the_next_process(restored: Path, point: str) -> None:
    async def run() -> None:
        async with GuestAgentPeer(str(restored / "ga.sock")) as agent:
            before = document(restored)
            options = {"guest-agent": agent.path}
            await asyncio.to_thread(killed_in_a_snapshot, restored, point, **options)
            assert agent.frozen == (point in FROZEN_POINTS)
            recorded = document(restored)
            expected = [agent.path] if point != "state-synced" else None
            assert recorded.pop("frozen-guests", None) == expected
            # Freezing is written down with the old tree, whatever has been prepared by then.
            assert (recorded == before) == (point not in ("state-renamed:2", *PAUSED_POINTS))
            if point == "state-synced":
                return
            again = await asyncio.to_thread(start, restored)
            with again:
                async with asyncio.timeout(20):
                    while agent.count("thaw") == 0 or "frozen-guests" in document(restored):
                        await asyncio.sleep(0.01)
                assert not agent.frozen
                assert document(restored) == finished(recorded)
                await asyncio.to_thread(again.terminate)

    asyncio.run(run())


def finished(recorded: dict[str, Any]) -> dict[str, Any]:
    """The document when what a snapshot has covered has become read-only."""
    for node in recorded["nodes"]:
        if node.pop("covered", False):
            node["options"]["read-only"] = True
    return recorded


def killed_in_a_snapshot(directory: Path, point: str, **options: str) -> None:
    with start(directory, point) as daemon, Qmp(daemon.socket("q")) as qmp:
        with pytest.raises((AssertionError, OSError)):
            qmp.command("blockdev-snapshot-sync", device="e", **options)
        assert daemon.process.wait(20) == -9


def test_an_agent_that_is_not_there_yet(restored: Path) -> None:
    """The next process serves at once, and thaws when it can: also if it is one more later."""
    path = str(restored / "ga.sock")
    state = document(restored)
    (restored / "state").write_text(json.dumps({**state, "frozen-guests": [path]}))
    for _ in range(2):
        with start(restored) as daemon:
            daemon.wait_line("may be frozen since the last process ended")
            with Device(daemon.socket("e")) as device:
                device.write(512, bytes(512))
            daemon.terminate()
        assert document(restored)["frozen-guests"] == [path]

    async def run() -> None:
        daemon = await asyncio.to_thread(start, restored)
        with daemon:
            async with GuestAgentPeer(path) as agent:
                agent.frozen = True
                async with asyncio.timeout(20):
                    while "frozen-guests" in document(restored):
                        await asyncio.sleep(0.01)
                assert not agent.frozen
                await asyncio.to_thread(daemon.terminate)

    asyncio.run(run())
