# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk throttle`, as an operator types it, while requests wait."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import fresh_process
import pytest
from frontend import Daemon, Device, Qmp, Type
from frontend import vhostblk as serve

from vhostblk.cli.throttle import add_rates


@pytest.fixture
def backend() -> Iterator[Daemon]:
    """A limited disk, vda, and one without limits, vdb."""
    with serve(
        *("--blockdev", "null-co,node-name=n,size=1M"),
        *("--blockdev", "null-co,node-name=m,size=1M"),
        *("--object", "throttle-group,id=g,limits.bps-write=1"),
        *("--blockdev", "throttle,node-name=t,throttle-group=g,file=n"),
        *("--export", _export("vda", "t")),
        *("--export", _export("vdb", "m")),
        *("--control", "{dir}/control"),
    ) as daemon:
        yield daemon


def _export(id: str, node: str) -> str:
    address = f"addr.type=unix,addr.path={{dir}}/{id}.sock"
    return f"vhost-user-blk,id={id},node-name={node},{address},writable=on"


def throttle(backend: Daemon, *words: str, status: int = 0) -> str:
    """What it prints."""
    command, *rest = words
    done = fresh_process.run(
        [
            *fresh_process.COMMAND,
            *("throttle", command),
            *("--socket", f"{backend.directory}/control"),
            *rest,
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said
    return said


def groups(backend: Daemon) -> dict[str, dict[str, Any]]:
    with Qmp(f"{backend.directory}/control") as qmp:
        return {entry["id"]: entry for entry in qmp.command("query-throttle-groups")}


def limits(backend: Daemon, group: str) -> dict[str, int]:
    """Those that are not what they are without being said."""
    given = groups(backend)[group]["limits"]
    return {
        name: value
        for name, value in given.items()
        if value != (1 if name.endswith("length") else 0)
    }


def waiting(backend: Daemon, group: str, count: int) -> None:
    end = time.monotonic() + 30
    while groups(backend)[group]["statistics"]["write"]["queued"] != count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_limit_is_lifted_while_requests_wait(backend: Daemon) -> None:
    with Device(backend.socket("vda")) as device:
        requests = [device.submit(Type.OUT, 0, bytes(512)) for _ in range(10)]
        waiting(backend, "g", 9)
        assert "node 't'" in throttle(backend, "show", "g")
        for target in ("g", "vda", "t"):
            [shown] = json.loads(throttle(backend, "show", target, "--json"))
            assert shown["id"] == "g"
        words = ("iops=50000", "burst=4x", "burst-seconds=2", "bps=off")
        said = throttle(backend, "set", "vda", *words)
        assert "iops-total=50000, iops-total-max=200000 for 2 s" in said
        device.wait(*requests)
    assert limits(backend, "g") == {
        "iops-total": 50000,
        "iops-total-max": 200000,
        "iops-total-max-length": 2,
    }
    [shown] = json.loads(throttle(backend, "show", "--json"))
    assert shown["statistics"]["write"]["waited"] == 9


def test_rates_are_differences_by_time() -> None:
    def group(id: str, reads: int, length: int) -> dict[str, Any]:
        return {"id": id, "statistics": {"read": {"requests": reads, "bytes": length}}}

    after = [group("g", 150, 5 << 20), group("new", 7, 7)]
    add_rates([group("g", 100, 1 << 20), group("gone", 1, 1)], after, 2.0)
    read = {
        "requests": 150,
        "bytes": 5 << 20,
        "per-second": 25.0,
        "bytes-per-second": 2.0 * (1 << 20),
    }
    assert after == [{"id": "g", "statistics": {"read": read}}, group("new", 7, 7)]


def test_rates_of_a_disk_that_works(backend: Daemon) -> None:
    """What passes while it is measured, and nothing else."""
    throttle(backend, "set", "g", "bps-write=off")
    with Device(backend.socket("vda")) as device:
        device.write(0, bytes(512))
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                device.read(0, 4096)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            [shown] = json.loads(throttle(backend, "show", "vda", "--json"))
            text = throttle(backend, "show", "vda", "--interval", "0.2")
        finally:
            over.set()
            worker.join()
    read = shown["statistics"]["read"]
    assert 0 < read["per-second"] <= read["requests"]
    assert read["bytes-per-second"] == pytest.approx(4096 * read["per-second"], abs=4096)
    assert shown["statistics"]["write"]["per-second"] == 0
    assert re.search(r"[1-9]\d*/s \([\d.]+ [KMG]iB/s\)", text), text
    [idle] = json.loads(throttle(backend, "show", "vda", "--json", "--interval", "0.1"))
    assert all(entry["per-second"] == 0 for entry in idle["statistics"].values())
    [unmeasured] = json.loads(throttle(backend, "show", "--json", "--interval", "0"))
    assert "per-second" not in unmeasured["statistics"]["read"]
    assert re.search(r"none +- ", throttle(backend, "show", "--interval", "0"))


def test_a_disk_without_a_throttle_gets_one(backend: Daemon) -> None:
    with Device(backend.socket("vdb")) as device:
        device.write(0, bytes(512))
        assert "vdb" in throttle(backend, "show", "vdb", status=1)
        throttle(backend, "set", "vdb", "bps-write=1")
        requests = [device.submit(Type.OUT, 0, bytes(512)) for _ in range(10)]
        waiting(backend, "throttle-vdb", 9)
        device.read(0, 512)
        throttle(backend, "set", "vdb", "bps-write=off")
        device.wait(*requests)
    assert limits(backend, "throttle-vdb") == {}
    assert set(groups(backend)) == {"g", "throttle-vdb"}


def test_a_group_of_the_export_itself(backend: Daemon) -> None:
    with Qmp(f"{backend.directory}/control") as qmp:
        qmp.command("object-add", **{"qom-type": "throttle-group", "id": "own"})
        qmp.command("block-export-set-throttle-group", id="vda", **{"throttle-group": "own"})
    assert "export 'vda'" in throttle(backend, "set", "vda", "iops=7")
    assert limits(backend, "own") == {"iops-total": 7}
    assert limits(backend, "g") == {"bps-write": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["iops=500"], {"iops-total": 500, "bps-write": 1}),
        (["bps=4k", "burst=8k"], {"bps-total": 4096, "bps-total-max": 8192}),
        (["bps-read=10M"], {"bps-write": 1, "bps-read": 10 << 20}),
        (
            ["iops-read=5", "iops-size=16k"],
            {"bps-write": 1, "iops-read": 5, "iops-size": 16384},
        ),
        (["flush=20"], {"bps-write": 1, "iops-flush": 20}),
        (["bps=10", "bps-total-max=30"], {"bps-total": 10, "bps-total-max": 30}),
        (["iops=off", "bps=off"], {}),
    ],
)
def test_words(backend: Daemon, words: list[str], expected: dict[str, int]) -> None:
    throttle(backend, "set", "g", *words)
    assert limits(backend, "g") == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["g", "iops"], "not LIMIT=VALUE"),
        (["g", "iops=fast"], "not a number"),
        (["g", "iops=0.5"], "not a number"),  # and not 0, which is no limit
        (["g", "iops=2", "burst=0.1x"], "not a number"),
        (["g", "speed=3"], "there is no limit 'speed'"),
        (["g", "iops-totl=3"], "did you mean 'iops-total'?"),
        (["g", "burst=3x"], "burst= needs a limit"),
        (["g", "iops=500", "burst=100"], "iops-total-max (100) cannot be lower than iops-total"),
        (["vdb", "iops=500", "burst=100"], "iops-total-max (100) cannot be lower than iops-total"),
        (["nobody", "iops=500"], "there is no throttle group, throttle node or export 'nobody'"),
    ],
)
def test_what_is_refused(backend: Daemon, words: list[str], said: str) -> None:
    process = fresh_process.run(
        [
            *fresh_process.COMMAND,
            *("throttle", "set"),
            *("--socket", f"{backend.directory}/control", *words),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode != 0
    assert said in process.stderr
    assert "Traceback" not in process.stderr
    assert limits(backend, "g") == {"bps-write": 1}
    assert set(groups(backend)) == {"g"}


def test_names_that_are_long_or_taken(backend: Daemon) -> None:
    """Exports may have longer names than nodes, and an earlier filter may have left its group."""
    with Qmp(f"{backend.directory}/control") as qmp:
        throttle(backend, "set", "vdb", "iops=100")
        qmp.command("block-filter-remove", **{"node-name": "throttle-vdb"})
        assert "throttle-1" in throttle(backend, "set", "vdb", "iops=100")
        qmp.command("blockdev-add", **{"driver": "null-co", "node-name": "o", "size": 1 << 20})
        long = "vm-0001-of-the-database-disk-0001"
        address = {"type": "unix", "path": f"{backend.directory}/o.sock"}
        export = {"type": "vhost-user-blk", "id": long, "node-name": "o", "addr": address}
        qmp.command("block-export-add", **export)
        assert "throttle-2" in throttle(backend, "set", long, "iops=100")
        assert "throttle-2" in throttle(backend, "set", long, "iops=200")
