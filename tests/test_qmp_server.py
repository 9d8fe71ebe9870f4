# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a running backend, seen by many kinds of clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_process import BackendProcess
from crash.tools import plain_environment
from frontend import listens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thoroughness import tries

from vhostblk.control import results
from vhostblk.control.client import ControlClient, Refused
from vhostblk.schema import validate

NODE = "null-co,node-name=n0,size=1048576"


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, path: str, *, negotiate: bool = True, oob: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)
        self.pending = b""
        self.greeting = self.receive()
        if negotiate:
            enable = {"enable": ["oob"]} if oob else {}
            assert self.ask({"execute": "qmp_capabilities", "arguments": enable}) == {"return": {}}

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> bytes:
        while b"\r\n" not in self.pending:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self.pending += data
        line, _, self.pending = self.pending.partition(b"\r\n")
        return line

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.line().decode("ascii"))
        return message

    def ask(self, message: Any) -> dict[str, Any]:
        self.send(message if isinstance(message, bytes) else json.dumps(message).encode())
        while "event" in (answer := self.receive()):
            pass
        return answer


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One backend for all tests that leave it as they found it."""
    directory = Path(tempfile.mkdtemp(prefix="vb-"))
    process = BackendProcess(
        directory, "--control", "{dir}/qmp", "--blockdev", NODE, "--object", "iothread,id=t0"
    )
    try:
        process.wait_ready()
        yield process
        assert process.stop() == 0
    finally:
        process.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def path(backend: Any) -> str:
    return str(backend.directory / "qmp")


@pytest.fixture(scope="module")
def reference() -> Iterator[str]:
    """The control socket of a real qemu-storage-daemon with the same node."""
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is not installed")
    directory = tempfile.mkdtemp(prefix="vb-")
    path = f"{directory}/qmp"
    process = subprocess.Popen(
        [
            program,
            "--chardev",
            f"socket,id=c,path={path},server=on,wait=off",
            "--monitor",
            "chardev=c",
            "--blockdev",
            NODE,
            "--object",
            "iothread,id=t0",
        ],
        env=plain_environment(),
    )
    try:
        deadline = time.monotonic() + 10
        while not listens(path) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield path
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


# ---- the protocol, beside the original ------------------------------------------------------

SAME = [
    {"execute": "query-version"},
    {"execute": "query-block-exports", "id": 3},
    {"execute": "query-block-exports", "id": {"a": [None, "x"]}},
    {"execute": "nope", "id": [1]},
    {"execute": 5},
    {"exec": 5},
    {},
    [],
    b'"abc"',
    b"12 ",
    {"execute": "query-version", "exec-oob": "query-version"},
    {"execute": "query-version", "arguments": []},
    {"execute": "query-version", "arguments": {"x": 1}},
    {"execute": "query-version", "extra": 1},
    {"exec-oob": "blockdev-add", "id": 1},
    {"execute": "qmp_capabilities"},
    b"\xff",
    b'{"a":]',
    b"}",
    b"foo\n",
    b'{"a":1,"a":2}',
    b'{"execute":"query-version",}',
    b"{'execute':'query-version'}",
    b'{"execute":"\\ud800"}',
    b'{"execute":"a\x80"}',
    b'{"execute": nan}',
    {"execute": "block-export-add", "arguments": {"type": "vhost-user-bl"}},
    {"execute": "blockdev-add", "arguments": {"node-name": "x"}},
    {"execute": "blockdev-add", "arguments": {"driver": "null-cx"}},
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n0"}},
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a", "size": []}},
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a", "size": "1M"}},
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a", "size": "1"}},
    {
        "execute": "blockdev-add",
        "arguments": {"driver": "null-co", "node-name": "a", "read-zeroes": "on"},
    },
    {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-co"}]}},
    {
        "execute": "blockdev-reopen",
        "arguments": {"options": [{"driver": "null-co", "node-name": "zz"}]},
    },
    {"execute": "blockdev-reopen", "arguments": {}},
    {"execute": "blockdev-reopen", "arguments": {"options": {}}},
    {"execute": "transaction", "arguments": {"actions": [{"type": "abort", "data": {}}]}},
    {"execute": "transaction", "arguments": {"actions": [{"type": "abort"}]}},
    {"execute": "transaction", "arguments": {"actions": [{"type": "nope", "data": {}}]}},
    {"execute": "transaction", "arguments": {}},
    {"execute": "blockdev-del", "arguments": {"node-name": "zz"}},
    {"execute": "blockdev-del"},
    {"execute": "block-export-del", "arguments": {"id": "zz"}},
    {"execute": "block-export-del", "arguments": {"id": "zz", "mode": "soft"}},
    {"execute": "block_resize", "arguments": {"node-name": "zz", "size": 1024}},
    {"execute": "block_resize", "arguments": {"node-name": "n0", "size": []}},
    {"execute": "object-add", "arguments": {"qom-type": "iothrea", "id": "x"}},
    {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "t0"}},
    {"execute": "object-del", "arguments": {"id": "zz"}},
    {"execute": "qom-get", "arguments": {"path": "/objects/zz", "property": "x"}},
    {"execute": "qom-get", "arguments": {"path": "/objects/t0", "property": "x"}},
    {"execute": "qom-get", "arguments": {"path": "/objects/t0", "property": "poll-max-ns"}},
    {"execute": "qom-list", "arguments": {"path": "/objects"}},
]

# Sentences that must be QEMU's to the letter: the protocol's own, and argument checks.
EXACT = (
    "QMP input",
    "The command",
    "Capabilities",
    "Expecting",
    "Parameter 'x' is unexpected",
    "Parameter 'driver' is missing",
    "Parameter 'node-name' is missing",
    "Invalid parameter type",
    "Failed to find node with node-name",
    "Duplicate nodes",
)


def shape(value: Any) -> Any:
    """The types of a JSON value, with the names of members."""
    if isinstance(value, dict):
        return {key: shape(below) for key, below in sorted(value.items())}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


@pytest.mark.parametrize("request_", SAME, ids=lambda r: r if isinstance(r, bytes) else None)
def test_answers_as_qemu_does(path: str, reference: str, request_: Any) -> None:
    with Raw(path) as ours, Raw(reference) as theirs:
        mine, original = ours.ask(request_), theirs.ask(request_)
    assert mine.get("id") == original.get("id")
    assert ("error" in mine) == ("error" in original), (mine, original)
    if "error" in original:
        assert mine["error"]["class"] == original["error"]["class"]
        if original["error"]["desc"].startswith(EXACT):
            assert mine["error"]["desc"].startswith(original["error"]["desc"])
    elif isinstance(original["return"], dict | int):
        assert shape(mine["return"]) == shape(original["return"])


def test_greeting_as_qemu_does(path: str, reference: str) -> None:
    with Raw(path, negotiate=False) as ours, Raw(reference, negotiate=False) as theirs:
        assert shape(ours.greeting) == shape(theirs.greeting)
        assert ours.greeting["QMP"]["version"]["package"].startswith("vhostblk ")
        request = {"execute": "query-version", "id": 1}
        assert ours.ask(request) == theirs.ask(request)
        for enable in (["foo"], [5], "oob"):
            request = {"execute": "qmp_capabilities", "arguments": {"enable": enable}}
            mine, original = ours.ask(request), theirs.ask(request)
            assert mine["error"]["class"] == original["error"]["class"]


def test_a_refusal_of_the_host_is_no_mistake_of_ours(path: str, tmp_path: Path) -> None:
    """What the host refuses is told with the command's name, as an error of the host."""
    with Raw(path) as ours:
        image = tmp_path / "full.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"]
        subprocess.run(create, check=True, env=plain_environment())
        file = {"driver": "file", "node-name": "file", "filename": str(image)}
        full = {"driver": "error-inject", "node-name": "full", "file": "file", "errno": "ENOSPC"}
        node = {"driver": "qcow2", "node-name": "disk", "file": {**full, "file": file, "count": 0}}
        assert "return" in ours.ask({"execute": "blockdev-add", "arguments": node})
        again = {"options": [{**full, "operations": ["write"]}]}
        assert "return" in ours.ask({"execute": "blockdev-reopen", "arguments": again})
        resize = {"node-name": "disk", "size": 8 << 30}
        answer = ours.ask({"execute": "block_resize", "arguments": resize})
        assert answer["error"] == {
            "class": "GenericError",
            "desc": "block_resize: No space left on device",
            "data": {"code": "host-error", "errno": "ENOSPC"},
        }


def test_nodes_and_statistics_have_the_members_of_qemu(path: str, reference: str) -> None:
    """Ours may say more, never less."""
    for name, arguments in [
        ("query-named-block-nodes", {}),
        ("query-blockstats", {"query-nodes": True}),
        ("qom-list", {"path": "/objects/t0"}),
    ]:
        request = {"execute": name, "arguments": arguments}
        with Raw(path) as ours, Raw(reference) as theirs:
            mine = ours.ask(request)["return"][0]
            original = theirs.ask(request)["return"][0]
        missing = _missing(shape(original), shape(mine), name)
        # Optional, and a node that stores nothing has none.
        assert set(missing) <= {"query-named-block-nodes.image.actual-size"}


def _missing(theirs: Any, ours: Any, where: str) -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            text
            for key in theirs
            for text in (
                [f"{where}.{key}"]
                if key not in ours
                else _missing(theirs[key], ours[key], f"{where}.{key}")
            )
        ]
    return [] if type(theirs) is type(ours) else [where]


@pytest.mark.parametrize(
    ("member", "hint"),
    [
        ({"size": "1M"}, "for '1M' write 1048576"),
        ({"read-zeroes": "on"}, "for 'on' write true"),
        ({"size": "big"}, None),
        ({"latency-ns": "5"}, None),
    ],
)
def test_numbers_are_numbers(path: str, member: dict[str, Any], hint: str | None) -> None:
    with Raw(path) as client:
        arguments = {"driver": "null-co", "node-name": "a", **member}
        error = client.ask({"execute": "blockdev-add", "arguments": arguments})["error"]
        assert error["desc"].startswith("Invalid parameter type for")
        assert error["data"].get("hint") == hint
        assert hint is None or error["desc"].endswith(hint)


def test_a_transaction_over_the_socket(path: str) -> None:
    null = {"driver": "null-co", "node-name": "t", "size": 4096}
    with ControlClient(path) as client:
        before = client.execute("query-block-graph")
        assert client.execute("transaction", {"actions": []}) == {"pause-us": 0}
        actions: list[dict[str, Any]] = [
            {"type": "blockdev-add", "data": null},
            {"type": "blockdev-reopen", "data": {"options": [{**null, "latency-ns": 1000}]}},
        ]
        with pytest.raises(Refused, match="Transaction aborted"):
            client.execute("transaction", {"actions": [*actions, {"type": "abort", "data": {}}]})
        assert client.execute("query-block-graph") == before
        properties = {"completion-mode": "grouped"}
        result = client.execute("transaction", {"actions": actions, "properties": properties})
        validate(results.TransactionInfo, result)
        client.execute(
            "transaction", {"actions": [{"type": "blockdev-del", "data": {"node-name": "t"}}]}
        )
        assert client.execute("query-block-graph") == before


# ---- the protocol on its own ----------------------------------------------------------------


def test_nothing_but_negotiation_before_negotiation(path: str) -> None:
    with Raw(path, negotiate=False) as client:
        error = client.ask({"execute": "quit"})["error"]
        assert error["class"] == "CommandNotFound"
        assert "qmp_capabilities" in error["desc"]


def test_lines_are_ascii_and_single(path: str) -> None:
    with Raw(path) as client:
        client.send(json.dumps({"execute": "ä\n😀", "id": "ö"}, ensure_ascii=False).encode())
        line = client.line()
        assert line.isascii() and b"\n" not in line
        assert json.loads(line)["id"] == "ö"


def test_error_has_data_for_machines(path: str) -> None:
    with Raw(path) as client:
        error = client.ask({"execute": "query-block-export"})["error"]
        assert error["data"]["code"] == "unknown-command"
        assert "query-block-exports" in error["data"]["hint"]
        error = client.ask(
            {"execute": "blockdev-add", "arguments": {"driver": "null-cx", "node-name": "a"}}
        )["error"]
        assert "null-co" in error["data"]["hint"]


def test_commands_of_one_client_are_answered_in_order(path: str) -> None:
    with Raw(path) as client:
        client.send(
            b"".join(
                json.dumps(
                    {"execute": "query-qmp-schema" if i % 10 == 0 else "query-version", "id": i}
                ).encode()
                for i in range(200)
            )
        )
        assert [client.receive()["id"] for _ in range(200)] == list(range(200))


def test_oob(path: str) -> None:
    with Raw(path, oob=True) as client:
        assert client.ask({"exec-oob": "query-version", "id": 1})["id"] == 1
        error = client.ask({"exec-oob": "blockdev-add", "id": 2})["error"]
        assert error["desc"] == "The command blockdev-add does not support OOB"
    with Raw(path) as client:
        error = client.ask({"exec-oob": "query-version"})["error"]
        assert error["class"] == "GenericError"


def test_half_closed(path: str) -> None:
    """`printf … | nc -N -U SOCKET`: the answers still come."""
    with Raw(path, negotiate=False) as client:
        client.send(b'{"execute":"qmp_capabilities"}{"execute":"query-version"}')
        client.socket.shutdown(socket.SHUT_WR)
        assert client.receive() == {"return": {}}
        assert "qemu" in client.receive()["return"]
        with pytest.raises(EOFError):
            client.line()


REQUESTS: list[dict[str, Any]] = [
    {"execute": "query-version", "id": 1},
    {"execute": "nope", "id": "ä'\"{"},
    {"execute": "qom-get", "arguments": {"path": "/objects/t0", "property": "x"}, "id": None},
]


@settings(
    max_examples=tries(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cuts=st.lists(st.integers(0, 400), max_size=8).map(sorted), noise=st.booleans())
def test_stream_split_anywhere(path: str, cuts: list[int], noise: bool) -> None:
    raw = b"".join(json.dumps(r, ensure_ascii=False).encode() for r in REQUESTS)
    with Raw(path) as client:
        if noise:
            client.send(b'{"half": [\xff')
            assert "error" in client.receive()
        for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            client.send(raw[start:end])
        assert [client.receive()["id"] for _ in REQUESTS] == [r["id"] for r in REQUESTS]


def test_every_single_split(path: str) -> None:
    raw = b'{"execute":"query-version","id":"\\"\xc3\xa4"}'
    with Raw(path) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for cut in range(len(raw)):
            client.send(raw[:cut])
            client.send(raw[cut:])
            assert client.receive()["id"] == '"ä'


def test_large_message(path: str) -> None:
    with Raw(path) as client:
        answer = client.ask({"execute": "query-version", "id": "x" * (1 << 20)})
        assert len(answer["id"]) == 1 << 20


def test_oversized_message(path: str) -> None:
    with Raw(path) as client:
        client.send(b'{"execute":"query-version","id":"' + b"x" * (5 << 20) + b'"}')
        error = client.receive()["error"]
        assert "larger than" in error["desc"]
        assert client.ask({"execute": "query-version", "id": 7})["id"] == 7


@settings(
    max_examples=tries(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=200) | st.text(alphabet="{}[]\"':,a1 \n", max_size=100).map(str.encode))
def test_noise_costs_only_error_messages(path: str, noise: bytes) -> None:
    with Raw(path) as client:
        client.send(noise + b'\xff{"execute":"query-version","id":"mark"}')
        while (answer := client.receive()).get("id") != "mark":
            assert answer["error"]["class"] == "GenericError"
        assert "return" in answer


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below, max_size=3)
    ),
    max_leaves=5,
)
names = st.sampled_from(
    [
        "driver",
        "node-name",
        "size",
        "file",
        "id",
        "type",
        "addr",
        "qom-type",
        "path",
        "property",
        "value",
        "mode",
        "cache",
        "query-nodes",
        "read-only",
        "latency-ns",
        "iothread",
        "filename",
        "options",
        "actions",
        "filter",
        "above",
        "child",
        "parent-type",
        "new-child",
        "export-id",
        "data",
        "keep",
    ]
)
hostile_arguments = st.dictionaries(
    names,
    json_values
    | st.sampled_from(
        [
            "null-co",
            "raw",
            "file",
            "iothread",
            "vhost-user-blk",
            "n0",
            "t0",
            "/objects/t0",
            "/objects",
            "blockdev-add",
            "driver",
            "delay",
            {"driver": "delay", "node-name": "d0", "file": "n0"},
            [{"driver": "null-co", "node-name": "n0", "size": 1048576}],
            [{"type": "blockdev-del", "data": {"node-name": "n0"}}],
            [{"type": "blockdev-reopen", "data": {"options": [{"driver": 5, "node-name": "n0"}]}}],
            [{"type": ["abort"], "data": {}}, {}],
        ]
    ),
    max_size=5,
)


@settings(
    max_examples=tries(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_hostile_arguments_are_errors(path: str, backend: Any, data: st.DataObject) -> None:
    """Any arguments: an answer, never an internal error, and the backend lives."""
    with ControlClient(path) as client:
        commands = [c["name"] for c in client.execute("query-commands")]
        command = data.draw(
            st.sampled_from([c for c in commands if c not in ("quit", "qmp_capabilities")])
        )
        try:
            client.execute(command, data.draw(hostile_arguments))
        except Refused as error:
            assert (error.data or {}).get("code") != "internal-error", error.desc
        for node in client.execute("query-named-block-nodes"):
            if node["node-name"] != "n0":
                with contextlib.suppress(Refused):
                    client.execute("blockdev-del", {"node-name": node["node-name"]})
        for entry in client.execute("qom-list", {"path": "/objects"}):
            if entry["type"].startswith("child") and entry["name"] != "t0":
                client.execute("object-del", {"id": entry["name"]})
        names = [node["node-name"] for node in client.execute("query-named-block-nodes")]
        assert "n0" in names or command in ("blockdev-del", "transaction")
        if "n0" not in names:
            client.execute(
                "blockdev-add", {"driver": "null-co", "node-name": "n0", "size": 1048576}
            )
        if not any(e["name"] == "t0" for e in client.execute("qom-list", {"path": "/objects"})):
            client.execute("object-add", {"qom-type": "iothread", "id": "t0"})
    assert backend.process.poll() is None


# ---- many clients ---------------------------------------------------------------------------


def test_a_hundred_clients(path: str) -> None:
    clients = [Raw(path) for _ in range(100)]
    try:
        for number, client in enumerate(clients):
            client.send(json.dumps({"execute": "query-commands", "id": number}).encode())
        for number, client in enumerate(clients):
            assert client.receive()["id"] == number
        # Everyone sees every event.
        with ControlClient(path) as other:
            other.execute("blockdev-add", {"driver": "null-co", "node-name": "ev"})
            other.execute(
                "block-export-add",
                {
                    "type": "vhost-user-blk",
                    "id": "ev",
                    "node-name": "ev",
                    "addr": {"type": "unix", "path": path + ".vhost"},
                },
            )
            other.execute("block-export-del", {"id": "ev", "mode": "hard"})
            other.execute("blockdev-del", {"node-name": "ev"})
        for client in clients:
            event = client.receive()
            while event.get("event") != "BLOCK_EXPORT_DELETED":
                event = client.receive()
            assert event["data"] == {"id": "ev"}
            assert set(event["timestamp"]) == {"seconds", "microseconds"}
            assert abs(event["timestamp"]["seconds"] - time.time()) < 60
    finally:
        for client in clients:
            client.socket.close()


def test_slow_reader_harms_nobody(path: str) -> None:
    """One who asks and asks and never reads: others are served, memory stays bounded."""
    with Raw(path, oob=True) as slow, Raw(path) as other:
        slow.socket.settimeout(1)
        request = b'{"exec-oob":"query-qmp-schema"}{"execute":"query-qmp-schema"}' * 100
        with contextlib.suppress(TimeoutError):
            for _ in range(2000):
                slow.send(request)
        for number in range(20):
            start = time.monotonic()
            assert other.ask({"execute": "query-version", "id": number})["id"] == number
            assert time.monotonic() - start < 2
    with Raw(path) as other:
        assert other.ask({"execute": "query-version", "id": 1})["id"] == 1


def test_reader_that_ignores_events_is_dropped(start_backend: Any, short_dir: Path) -> None:
    process = start_backend(
        "--control", "{dir}/q", "--blockdev", "null-co,node-name=n", "--log-level", "warning"
    )
    path = str(short_dir / "q")
    with Raw(path) as slow, ControlClient(path) as busy:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        long_id = "e" + "x" * 20000
        deadline = time.monotonic() + 60
        while not any("does not read" in line for line in process.log):
            assert time.monotonic() < deadline, "never dropped"
            for _ in range(20):
                busy.execute(
                    "block-export-add",
                    {
                        "type": "vhost-user-blk",
                        "id": long_id,
                        "node-name": "n",
                        "addr": {"type": "unix", "path": path + ".v"},
                    },
                )
                busy.execute("block-export-del", {"id": long_id})
            busy.events.clear()
        assert busy.execute("query-version")
    # The others are still there.
    with Raw(path) as other:
        assert other.ask({"execute": "query-version", "id": 1})["id"] == 1


def test_disconnect_in_the_middle(path: str) -> None:
    for cut in range(1, 60, 7):
        client = Raw(path)
        client.send((b'{"execute":"query-qmp-schema"}' * 20)[: cut * 10])
        client.socket.close()
    with Raw(path) as other:
        assert other.ask({"execute": "query-version", "id": 1})["id"] == 1


# ---- who may -------------------------------------------------------------------------------


def test_mode_is_for_the_owner(path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_group(start_backend: Any, short_dir: Path) -> None:
    gid = os.getgid()
    start_backend("--control", "{dir}/q", "--control-group", str(gid), "--blockdev", NODE)
    info = os.stat(short_dir / "q")
    assert stat.S_IMODE(info.st_mode) == 0o660 and info.st_gid == gid


def test_peer_is_logged_at_debug(start_backend: Any, short_dir: Path) -> None:
    process = start_backend("--control", "{dir}/q", "--blockdev", NODE, "--log-level", "debug")
    with ControlClient(str(short_dir / "q")) as client:
        client.execute("query-version")
    assert process.stop() == 0
    assert any(
        f"pid {os.getpid()} uid {os.geteuid()}" in line and "query-version" in line
        for line in process.log
    )


# ---- introspection -------------------------------------------------------------------------


def test_schema_is_complete(path: str) -> None:
    with ControlClient(path) as client:
        entries = client.execute("query-qmp-schema")
        commands = {entry["name"] for entry in client.execute("query-commands")}
        events = {entry["name"] for entry in client.execute("query-events")}
    by_name = {entry["name"]: entry for entry in entries}
    assert len(by_name) == len(entries)
    of = {
        meta: {e["name"] for e in entries if e["meta-type"] == meta}
        for meta in ("command", "event")
    }
    assert of["command"] == commands - {"qmp_capabilities"}
    assert of["event"] == events
    for entry in entries:
        for name in _types(entry):
            assert name in by_name, (entry["name"], name)
    [actions] = by_name[by_name["transaction"]["arg-type"]]["members"][:1]
    action = by_name[by_name[actions["type"]]["element-type"]]
    wrappers = {v["case"]: by_name[v["type"]]["members"] for v in action["variants"]}
    assert {"abort", "blockdev-add", "blockdev-snapshot-sync"} <= set(wrappers)
    data = {name: by_name[members[0]["type"]] for name, members in wrappers.items()}
    assert data["blockdev-add"]["name"] == by_name["blockdev-add"]["arg-type"]
    assert [m["name"] for m in data["blockdev-del"]["members"]] == ["node-name"]
    add = by_name[by_name["blockdev-add"]["arg-type"]]
    assert add["tag"] == "driver"
    assert {"null-co", "raw", "file"} <= {variant["case"] for variant in add["variants"]}


def test_schema_says_which_commands_have_results(path: str) -> None:
    with ControlClient(path) as client:
        by_name = {entry["name"]: entry for entry in client.execute("query-qmp-schema")}
        assert client.execute("query-throttle-groups") == []
    result = {name: by_name[e["ret-type"]] for name, e in by_name.items() if "ret-type" in e}
    assert [m["name"] for m in result["block-stream"]["members"]] == ["job-id"]
    assert result["query-throttle-groups"]["name"] == "any"
    assert result["blockdev-add"]["members"] == []


def test_schema_has_the_form_of_qemus(path: str, reference: str) -> None:
    """For each kind of entry the same members, so that tools which read one read the other."""
    with ControlClient(path) as ours, ControlClient(reference) as theirs:
        mine, original = ours.execute("query-qmp-schema"), theirs.execute("query-qmp-schema")
    needed: dict[str, set[str]] = {}
    for entry in original:
        known = needed.setdefault(entry["meta-type"], set(entry))
        known &= set(entry)
    for entry in mine:
        assert needed[entry["meta-type"]] <= set(entry), entry
    # What QEMU's commands of the same name need, ours accept.
    theirs_by = {e["name"]: e for e in original}
    ours_by = {e["name"]: e for e in mine}
    for name in (
        "blockdev-del",
        "block_resize",
        "object-del",
        "qom-get",
        "qom-set",
        "qom-list",
        "block-export-del",
        "query-named-block-nodes",
        "query-blockstats",
        "blockdev-reopen",
        "transaction",
    ):
        want = {m["name"] for m in theirs_by[theirs_by[name]["arg-type"]]["members"]}
        have = {m["name"] for m in ours_by[ours_by[name]["arg-type"]]["members"]}
        assert want - have <= {"device"}, name


def _types(entry: dict[str, Any]) -> Iterator[str]:
    for key in ("arg-type", "ret-type", "element-type"):
        if key in entry:
            yield entry[key]
    for member in entry.get("members", []):
        if entry["meta-type"] != "enum":
            yield member["type"]
    for variant in entry.get("variants", []):
        yield variant["type"]


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("query-version", results.VersionInfo),
        ("query-commands", results.CommandInfo),
        ("query-status", results.StatusInfo),
        ("query-named-block-nodes", results.BlockDeviceInfo),
        ("query-block-exports", results.BlockExportInfo),
        ("query-blockstats", results.BlockStats),
        ("query-iothreads", results.IOThreadInfo),
        ("query-block", results.DriveInfo),
        ("query-block-graph", results.BlockGraph),
    ],
)
def test_results_are_what_the_schema_says(
    start_backend: Any, short_dir: Path, command: str, model: Any
) -> None:
    image = short_dir / "disk.img"
    image.write_bytes(bytes(1 << 20))
    start_backend(str(image), "--object", "iothread,id=t0", "--control", "{dir}/q")
    with ControlClient(str(short_dir / "q")) as client:
        for arguments in ({}, {"query-nodes": True}) if command == "query-blockstats" else ({},):
            result = client.execute(command, arguments)
            entries = result if isinstance(result, list) else [result]
            assert entries
            for entry in entries:
                validate(model, entry)


# ---- other people's clients -----------------------------------------------------------------


def test_qemu_qmp_client(path: str) -> None:
    qmp = pytest.importorskip("qemu.qmp")

    async def talk() -> None:
        client = qmp.QMPClient("test")
        await client.connect(path)
        try:
            assert "n0" in [n["node-name"] for n in await client.execute("query-named-block-nodes")]
            with pytest.raises(qmp.ExecuteError):
                await client.execute("blockdev-del", {"node-name": "zz"})
            listener = qmp.EventListener(names=["BLOCK_EXPORT_DELETED"])
            with client.listen(listener):
                await client.execute(
                    "block-export-add",
                    {
                        "type": "vhost-user-blk",
                        "id": "q",
                        "node-name": "n0",
                        "addr": {"type": "unix", "path": path + ".v"},
                    },
                )
                await client.execute("block-export-del", {"id": "q"})
                event = await asyncio.wait_for(listener.get(), 10)
            assert event["data"] == {"id": "q"}
            # The client numbers its requests and matches the answers.
            answers = await asyncio.gather(*(client.execute("query-version") for _ in range(20)))
            assert len(answers) == 20
        finally:
            await client.disconnect()

    asyncio.run(talk())


def test_qmp_shell(path: str) -> None:
    shell = Path(sys.executable).with_name("qmp-shell")
    if not shell.exists():
        pytest.skip("qmp-shell is not installed")
    commands = (
        "query-version\n"
        "blockdev-add driver=null-co node-name=shell size=4096 cache={'direct':false}\n"
        "blockdev-del node-name=shell\n"
        "blockdev-del node-name=shell\n"
    )
    done = subprocess.run(
        [str(shell), "-v", path],
        input=commands,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Connected to QEMU" in done.stdout
    assert '"package": "vhostblk' in done.stdout.replace("'", '"')
    assert "Failed to find node with node-name='shell'" in done.stdout


def test_quit(start_backend: Any, short_dir: Path) -> None:
    process = start_backend("--control", "{dir}/q", "--blockdev", NODE)
    with Raw(str(short_dir / "q")) as asks, Raw(str(short_dir / "q")) as waits:
        assert asks.ask({"execute": "quit"}) == {"return": {}}
        assert process.wait() == 0
        with pytest.raises((EOFError, ConnectionError)):
            while True:
                waits.receive()
    assert not (short_dir / "q").exists()
