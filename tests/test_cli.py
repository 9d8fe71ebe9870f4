# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: what it says, how it ends, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fresh_process
import psutil
import pytest
from backend_process import BackendProcess
from frontend import Device, Feature, Type

from vhostblk.cli import COMMANDS, qemu
from vhostblk.cli.errors import CliError
from vhostblk.control.client import ControlClient

Start = Callable[..., BackendProcess]
NODE = "null-co,node-name=n0,size=1M"
EXPORT = "vhost-user-blk,id=e,node-name=n0,addr.type=unix"
QEMU = "qemu-system-x86_64"
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")


def vhostblk(
    *arguments: str, directory: Path | None = None, program: str = "vhostblk", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    runtime = {"VHOSTBLK_RUNTIME_DIR": str(directory)} if directory else {}
    start = (
        fresh_process.COMMAND
        if program == "vhostblk"
        else [
            *(sys.executable, "-c"),
            "import sys; from vhostblk.cli import backend_main; sys.exit(backend_main())",
        ]
    )
    return fresh_process.run(
        [*start, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env=os.environ | runtime | env,
    )


NOBODY = 65534


def as_nobody(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The same as another user, who has no environment but this."""
    if os.geteuid() != 0:
        pytest.skip("needs another user")
    command = [sys.executable, "-m", "vhostblk"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "env": env}
    try:
        subprocess.run([*command, "--version"], user=NOBODY, check=True, **options)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("other users cannot reach this Python")
    return subprocess.run([*command, *arguments], user=NOBODY, check=False, **options)


@pytest.fixture
def image(short_dir: Path) -> Path:
    path = short_dir / "disk.img"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    return path


# ---- help ------------------------------------------------------------------------------------


def test_overview() -> None:
    done = vhostblk("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout
    assert vhostblk().returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    done = vhostblk(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: vhostblk " + command)
    assert f"vhostblk {command}" in done.stdout or "a name" in done.stdout
    assert vhostblk("help", command).stdout == done.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--blockdev", "help"], ["null-co", "raw", "file"]),
        (["--blockdev", "null-co,help"], ["size=<size>", "default: 1073741824", "latency-ns"]),
        (["--blockdev", "driver=file,help"], ["filename=<text> (required)", "cache.direct"]),
        (["--export", "help"], ["vhost-user-blk"]),
        (["--export", "vhost-user-blk,help"], ["num-queues", "logical-block-size"]),
        (["--object", "help"], ["iothread"]),
        (["--object", "iothread,help"], ["poll-max-ns"]),
    ],
)
def test_help_of_options(option: list[str], words: list[str]) -> None:
    done = vhostblk("serve", *option)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout


def test_version() -> None:
    assert vhostblk("--version").stdout.startswith("vhostblk ")
    assert set(json.loads(vhostblk("--version", "--json").stdout)) >= {"vhostblk", "libvhost-user"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    done = vhostblk("completion", shell)
    assert done.returncode == 0, done.stderr
    for word in ("serve", "blockdev", "qemu-args"):
        assert word in done.stdout
    if shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(done.stdout)
        assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["sevre"], 2, ["unknown command 'sevre'", "did you mean 'serve'"]),
        (["--versoin"], 2, ["unknown option", "did you mean '--version'?"]),
        (["help", "sevre"], 2, ["unknown command 'sevre'", "did you mean 'serve'"]),
        (["serve"], 2, ["nothing to serve"]),
        (["serve", "--blokdev", "x"], 2, ["unknown option '--blokdev'", "'--blockdev'"]),
        (["serve", "--blockdev"], 2, ["--blockdev"]),
        (["serve", "--log-level", "loud", "x"], 2, ["--log-level", "loud"]),
        (["serve", "--log-level", "debugg", "x"], 2, ["did you mean 'debug'?"]),
        (
            ["serve", "--blockdev", "null-cx,node-name=a"],
            1,
            ["--blockdev null-cx,node-name=a:", "'null-cx'", "did you mean 'null-co'?"],
        ),
        (
            ["serve", "--blockdev", "null-co,node-name=a,siez=1"],
            1,
            ["'siez' is unexpected", "did you mean 'size'?"],
        ),
        (["serve", "--blockdev", "null-co,node-name=a,size=big"], 1, ["'size'", "'big'"]),
        (
            ["serve", "--blockdev", "null-co,node-name=a,,b,c"],
            2,
            ["--blockdev", "Expected '='", "'c'"],
        ),
        (["serve", "--blockdev", '{"driver": null-co}'], 2, ["JSON parse error", "character"]),
        (
            ["serve", "--blockdev", '{"driver": "null-co", "size": %s}' % ("9" * 5000)],
            2,
            ["a number has 5000 digits"],
        ),
        (
            ["serve", "--blockdev", r'{"driver": "file", "filename": "a\u0000b"}'],
            2,
            ["not a valid Unicode character"],
        ),
        (
            ["serve", "--blockdev", "file,node-name=a,filename=/"],
            1,
            ["Could not open '/': Is a directory"],
        ),
        (["serve", "x", "--num-queues", "9" * 5000], 2, ["--num-queues", "expected a number"]),
        (["serve", "x", "--stop-timeout", "nan"], 2, ["--stop-timeout", "'nan'"]),
        (["serve", "x", "--stop-timeout", "-1"], 2, ["--stop-timeout", "'-1'"]),
        (["status", "--interval", "abc"], 2, ["--interval", "'abc'"]),
        (
            ["serve", *["--object", "iothread,id=t"] * 2],
            1,
            ["--object iothread,id=t: An object with id 't' exists already"],
        ),
        (["serve", "--object", "iothread,id=a b"], 1, ["'id' expects an identifier", "'a b'"]),
        (
            ["serve", "--export", "vhost-user-blk,id=,node-name=n,addr.type=unix,addr.path=x"],
            1,
            ["'id' expects an identifier"],
        ),
        (
            ["serve", "--export", "vhost-user-blk,id=e,node-name=n,addr.type=inet,addr.host=h"],
            1,
            ["'addr.type' does not accept value 'inet'; allowed: unix, fd"],
        ),
        (
            ["serve", "--blockdev", "file,node-name=a,filename=/nonexistent/x"],
            1,
            ["/nonexistent/x", "No such file or directory"],
        ),
        (["serve", "/nonexistent/disk.img"], 1, ["/nonexistent/disk.img", "No such file"]),
        (
            ["serve", "/no.img"],
            1,
            ["No such file", "is its file system mounted? 'vhostblk create'"],
        ),
        (["serve", "--object", "iothread"], 1, ["--object iothread:", "'id' is missing"]),
        (
            ["serve", "--export", "vhost-user-blk,id=e,node-name=zz,addr.type=unix,addr.path=x"],
            1,
            ["--export", "zz"],
        ),
        (
            ["serve", "--blockdev", NODE, "--control", "/nonexistent/q"],
            1,
            ["--control /nonexistent/q", "No such file or directory"],
        ),
        (["serve", "--blockdev", NODE, "--control", "/tmp/" + "x" * 120], 1, ["107"]),
        (
            ["serve", "--blockdev", NODE, "--control", "q", "--control-group", "nogroupp"],
            1,
            ["no group 'nogroupp'", "did you mean 'nogroup'?"],
        ),
        (["serve", "--name", "a/b", "x"], 2, ["Invalid name 'a/b'"]),
        (["serve", "--fd", "x", "--blk-file", "y"], 2, ["--fd x"]),
        (["serve", "--fd", "9" * 30, "--blk-file", "/etc/hostname", "--read-only"], 1, ["9" * 30]),
        (["serve", "--fd", "3", "--socket-path", "y"], 2, ["not allowed with"]),
        (["serve", "--config", "/nonexistent.yaml"], 1, ["--config /nonexistent.yaml: No such"]),
        *(
            (["serve", "x", option, ""], 2, [f"{option}: the value may not be empty"])
            for option in (
                *("--state", "--pidfile", "--control", "--control-group", "--name"),
                *("--socket-path", "--log-file", "--config"),
            )
        ),
        (["status", ""], 2, ["NAME: the value may not be empty"]),
        (["luks", "list", ""], 2, ["TARGET: the value may not be empty"]),
        (["serve", "x", "--direct=yes"], 2, ["option --direct takes no value"]),
        (["run", "x", "--queues", "0", "--", "a", "@VHOSTBLK@"], 2, ["--queues: '0'"]),
        (["run", "x", "--memory", "1X", "--", "a", "@VHOSTBLK@"], 2, ["--memory: '1X'"]),
        (["qemu-args", "--queues", "-3"], 2, ["--queues"]),
        (["qemu-args", "--memory", "1X"], 2, ["--memory: '1X' is not a size"]),
        (
            ["serve", "--blockdev", NODE, "--control", "q", "--control-group", "5000000000"],
            1,
            ["--control-group 5000000000: There is no group '5000000000'"],
        ),
        (
            ["serve", "--blockdev", NODE, "--control", "q", "--control-group", str(2**32 - 1)],
            1,
            [f"There is no group '{2**32 - 1}'"],
        ),
        (
            ["serve", "--blockdev", NODE, "--export", f"{EXPORT},addr.path="],
            1,
            ["'addr.path' expects the path of a socket"],
        ),
        (["run", "disk.img"], 2, ["no command to run"]),
        (["run", "disk.img", "--", "qemu-system-x86_64"], 2, ["@VHOSTBLK@"]),
        (["status", "nobody"], 3, ["No backend named 'nobody' is running"]),
        (["status"], 3, ["No backend is running"]),
        (["qmp", "query-version", "--socket", "/nonexistent"], 3, ["/nonexistent"]),
        (["qmp"], 2, ["which command?"]),
        (["qmp", "x", "a=1", "b"], 2, ["'b' is neither"]),
        (["qemu-args", "--socket", "/dev/null"], 3, ["/dev/null"]),
        (["completion", "csh"], 2, ["csh"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_errors(short_dir: Path, arguments: list[str], status: int, words: list[str]) -> None:
    done = vhostblk(*arguments, directory=short_dir)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("vhostblk: ")
    for word in words:
        assert word in done.stderr
    assert [p for p in short_dir.rglob("*") if p.is_socket()] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-queues", "300"], ["--num-queues 300:", "from 1 to 256"]),
        (["--num-queues", "99999"], ["--num-queues 99999:", "from 1 to 256"]),
        (["--serial", "x" * 21], ["--serial x", "at most 20"]),
        (["--fd", "77"], ["--fd 77:", "Bad file descriptor"]),
        (["--socket-path", "/nonexistent/s"], ["--socket-path /nonexistent/s:", "does not exist"]),
        (["--log-file", "/nonexistent/l"], ["--log-file /nonexistent/l:", "does not exist"]),
        (["--pidfile", "/nonexistent/p"], ["--pidfile /nonexistent/p:", "does not exist"]),
    ],
)
def test_errors_name_the_option_they_come_from(
    short_dir: Path, image: Path, options: list[str], words: list[str]
) -> None:
    done = vhostblk("serve", str(image), *options, directory=short_dir)
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr
    assert done.stderr.startswith(f"vhostblk: {options[0]} ")


def test_hints_speak_of_the_options_there_are(
    start_backend: Start, short_dir: Path, image: Path
) -> None:
    """IMAGE has --read-only; read-only=on is what --blockdev takes."""
    start_backend(str(image))
    taken = vhostblk("serve", str(image), "--name", "b", directory=short_dir)
    assert "]? Stop the other process, or use 'vhostblk serve --blockdev' with read" in taken.stderr
    node = vhostblk(
        *["serve", "--blockdev", f"file,node-name=n0,filename={image}"],
        *["--export", f"{EXPORT},addr.path={short_dir}/s,writable=on"],
    )
    assert "or use read-only=on,force-share=on" in node.stderr


def test_two_exports_at_one_path(short_dir: Path) -> None:
    exports = [f"{EXPORT},addr.path={short_dir}/s", f"{EXPORT},addr.path={short_dir}/s"]
    exports[1] = exports[1].replace("id=e", "id=f")
    options = [word for export in exports for word in ("--export", export)]
    done = vhostblk("serve", "--blockdev", NODE, *options)
    assert done.returncode == 1
    assert "this process itself listens there already" in done.stderr


@pytest.mark.parametrize("option", ["--pidfile", "--state"])
def test_a_full_file_system_is_named(
    small_disk: Path, short_dir: Path, image: Path, option: str
) -> None:
    with contextlib.suppress(OSError), (small_disk / "full").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    done = vhostblk("serve", str(image), option, str(small_disk / "f"), directory=short_dir)
    assert done.returncode == 1
    assert f"vhostblk: {option} {small_disk}/f: " in done.stderr
    assert "No space left on device; make room" in done.stderr


def test_a_pidfile_is_locked_before_anything_is_opened(
    start_backend: Start, short_dir: Path
) -> None:
    start_backend("--blockdev", NODE, "--pidfile", "{dir}/pid")
    done = vhostblk(
        *["serve", "--pidfile", str(short_dir / "pid"), "--blockdev", NODE],
        *["--blockdev", "file,node-name=f,filename=/nonexistent"],
    )
    assert "belongs to a running process" in done.stderr


@pytest.mark.parametrize("option", ["--pidfile", "--log-file", "--control", "--state"])
def test_a_directory_of_others(option: str) -> None:
    done = as_nobody("serve", "--blockdev", NODE, option, "/new")
    assert done.stderr.startswith(f"vhostblk: {option} /new: ")
    assert "you may not create files in '/': choose a directory of yours" in done.stderr


@pytest.mark.parametrize("where", ["import", "open", "hooked_operations"])
def test_a_plugin_that_exits(short_dir: Path, where: str) -> None:
    """The process may end; its operator is to know why."""
    plugin = short_dir / "p.py"
    plugin.write_text(
        "import sys\nsys.exit(3)\n"
        if where == "import"
        else "import sys\nfrom vhostblk.filter import Filter\n"
        "class Leaving(Filter):\n    driver = 'leaving'\n"
        f"    {'async ' * (where == 'open')}def {where}(self):\n        sys.exit(3)\n"
    )
    done = vhostblk(
        *["serve", "--plugin", str(plugin), "--blockdev", NODE],
        *["--blockdev", "leaving,node-name=f,file=n0"],
    )
    assert done.returncode == 1
    assert "SystemExit: 3 (p.py line " in done.stderr or "SystemExit: 3 (line 2)" in done.stderr


def test_a_plugin_that_exits_at_the_end(start_backend: Start, short_dir: Path) -> None:
    (short_dir / "p.py").write_text(
        "import sys\nfrom vhostblk.filter import Filter\n"
        "class Leaving(Filter):\n    driver = 'leaving'\n"
        "    async def close(self):\n        sys.exit(3)\n"
    )
    process = start_backend(
        *["--plugin", "{dir}/p.py", "--blockdev", NODE],
        *["--blockdev", "leaving,node-name=f,file=n0"],
    )
    assert process.stop() == 0
    assert any("closing node 'f' (leaving) failed: SystemExit: 3" in line for line in process.log)


def test_addresses_hold_in_any_directory(start_backend: Start, short_dir: Path) -> None:
    relative = os.path.relpath(short_dir / "s")
    start_backend(
        *["--blockdev", NODE, "--export", f"{EXPORT},addr.path={relative}", "--control", "{dir}/q"]
    )
    done = vhostblk("qemu-args", "--socket", str(short_dir / "q"))
    assert f"path={short_dir}/s," in done.stdout


def test_broken_pipe() -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m vhostblk --help | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr


# ---- serve -----------------------------------------------------------------------------------


def test_serve_an_image(start_backend: Start, short_dir: Path, image: Path) -> None:
    process = start_backend(str(image))
    place = short_dir / "vhostblk" / "disk"
    assert sorted(p.name for p in place.iterdir()) == ["pid", "qmp.sock", "vhost.sock"]
    with ControlClient(str(place / "qmp.sock")) as client:
        [export] = client.execute("query-block-exports")
        assert export["id"] == "disk" and export["writable"]
        assert client.peer_pid == process.process.pid
    assert process.stop() == 0
    assert process.process.stdout is not None
    shown = process.process.stdout.read()
    assert "memory-backend-memfd" in shown and str(place / "vhost.sock") in shown
    assert not place.exists()


@pytest.mark.parametrize(
    ("made", "given", "driver"),
    [
        ("qcow2", "qcow2", "qcow2"),
        ("qcow2", "auto", "qcow2"),
        ("qed", "auto", "qed"),
        ("raw", "auto", "raw"),
        ("qcow2", None, "raw"),
    ],
)
def test_the_format_is_not_guessed_unless_asked(
    start_backend: Start, short_dir: Path, made: str, given: str | None, driver: str
) -> None:
    path = short_dir / "a.img"
    assert vhostblk("create", "-f", made, str(path), "8M").returncode == 0
    process = start_backend(str(path), *([] if given is None else ["--format", given]))
    with ControlClient(str(short_dir / "vhostblk/a/qmp.sock")) as client:
        nodes = {n["node-name"]: n for n in client.execute("query-named-block-nodes")}
        [export] = client.execute("query-block-exports")
    assert nodes["a"]["drv"] == driver
    inside = given is not None or made == "raw"
    assert (export["size"] == 8 << 20) == inside
    assert any("looks like a qcow2 image" in line for line in process.log) != inside
    assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(
    start_backend: Start, image: Path, number: signal.Signals, short_dir: Path
) -> None:
    process = start_backend(str(image), "--pidfile", "{dir}/pid")
    assert (short_dir / "pid").read_text() == f"{process.process.pid}\n"
    assert process.stop(number) == 0
    assert not (short_dir / "pid").exists()
    assert not any(path.is_socket() for path in short_dir.rglob("*"))


def test_a_filter_that_holds_requests_for_ever_does_not_prevent_the_end(
    start_backend: Start, short_dir: Path
) -> None:
    plugin = short_dir / "never.py"
    plugin.write_text(
        "import asyncio\nfrom vhostblk.filter import Filter\n"
        "class Never(Filter):\n    driver = 'never'\n"
        "    async def write(self, request):\n        await asyncio.Event().wait()\n"
    )
    process = start_backend(
        *["--plugin", str(plugin), "--stop-timeout", "0.5", "--pidfile", "{dir}/pid"],
        *["--blockdev", "null-co,node-name=n,size=1M", "--blockdev", "never,node-name=f,file=n"],
        "--export",
        "vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={dir}/e.sock",
    )
    with Device(str(short_dir / "e.sock")) as device:
        device.submit(1, 0, b"x" * 512)
        device.read(0, 512)  # so that the write has arrived
        assert process.stop() == 1
    assert any("have not finished within 0.5 seconds" in line for line in process.log)
    assert not (short_dir / "pid").exists()


def test_an_empty_image_is_said_to_be_one(start_backend: Start, image: Path) -> None:
    os.truncate(image, 0)
    process = start_backend(str(image))
    [warning] = [line for line in process.log if "warning" in line]
    assert "node 'disk' is empty: the guest sees a disk of 0 bytes" in warning


def test_help_of_a_filter_is_its_own(short_dir: Path) -> None:
    plugin = short_dir / "p.py"
    plugin.write_text(
        "from vhostblk.filter import Filter\nclass Mine(Filter):\n    driver = 'mine'\n"
    )
    done = vhostblk("serve", "--plugin", str(plugin), "--blockdev", "mine,help")
    assert done.stdout.startswith("mine\n\noptions:\n"), done.stdout


def test_options_are_done_in_order(short_dir: Path) -> None:
    done = vhostblk(
        "serve",
        "--export",
        "vhost-user-blk,id=e,node-name=n0,addr.type=unix,addr.path=x",
        "--blockdev",
        NODE,
        directory=short_dir,
    )
    assert done.returncode == 1 and "n0" in done.stderr


def test_a_name_is_used_once(start_backend: Start, short_dir: Path, image: Path) -> None:
    start_backend(str(image))
    done = vhostblk("serve", str(image), directory=short_dir)
    assert done.returncode == 1
    assert "A backend named 'disk' is already running" in done.stderr
    assert "--name" in done.stderr


def test_what_a_killed_backend_left_is_replaced(
    start_backend: Start, short_dir: Path, image: Path
) -> None:
    process = start_backend(str(image), "--pidfile", "{dir}/pid")
    process.process.kill()
    process.wait()
    assert (short_dir / "vhostblk/disk/qmp.sock").exists()
    again = start_backend(str(image), "--pidfile", "{dir}/pid")
    assert again.stop() == 0


def test_two_processes_and_one_pidfile(start_backend: Start, short_dir: Path) -> None:
    process = start_backend("--blockdev", NODE, "--pidfile", "{dir}/pid")
    done = vhostblk("serve", "--blockdev", NODE, "--pidfile", str(short_dir / "pid"))
    assert done.returncode == 1
    assert f"(pid {process.process.pid})" in done.stderr
    assert (short_dir / "pid").read_text() == f"{process.process.pid}\n"


def test_backends_of_others_are_no_choice(
    start_backend: Start, short_dir: Path, image: Path
) -> None:
    """An ordinary user is not asked to choose among root's, and told whose a named one is."""
    start_backend(str(image))
    short_dir.chmod(0o755)

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return as_nobody(*words, VHOSTBLK_RUNTIME_DIR=str(short_dir))

    assert "disk" not in ask("ls").stdout
    assert "No backend is running here" in ask("status").stderr
    assert "You may not use the control socket" in ask("status", "disk").stderr
    path = str(short_dir / "vhostblk/disk/qmp.sock")
    assert "ask as its user" in ask("status", "--socket", path).stderr


@pytest.mark.parametrize("words", [["status"], ["qmp", "query-status"]])
def test_the_other_socket_is_not_waited_for(
    start_backend: Start, short_dir: Path, image: Path, words: list[str]
) -> None:
    """It is QEMU's, and has room for one."""
    start_backend(str(image))
    place = short_dir / "vhostblk/disk"
    done = vhostblk(*words, "--socket", str(place / "vhost.sock"))
    assert done.returncode == 2
    assert f"is for QEMU; the control socket is '{place}/qmp.sock'" in done.stderr


def test_a_socket_that_does_not_greet(start_backend: Start, short_dir: Path) -> None:
    start_backend("--blockdev", NODE, "--export", f"{EXPORT},addr.path={{dir}}/s")
    done = vhostblk("status", "--socket", str(short_dir / "s"))
    assert done.returncode == 124
    assert "said nothing within 5 s" in done.stderr and "an export's" in done.stderr


def test_control_socket_in_use(start_backend: Start, short_dir: Path) -> None:
    start_backend("--blockdev", NODE, "--control", "{dir}/q")
    done = vhostblk("serve", "--blockdev", NODE, "--control", str(short_dir / "q"))
    assert done.returncode == 1 and "is in use" in done.stderr
    plain = short_dir / "file"
    plain.write_text("precious")
    done = vhostblk("serve", "--blockdev", NODE, "--control", str(plain))
    assert done.returncode == 1 and "not a socket" in done.stderr
    assert plain.read_text() == "precious"


def test_daemonize(short_dir: Path, image: Path) -> None:
    pidfile = short_dir / "pid"
    done = vhostblk(
        "serve", str(image), "--daemonize", "--pidfile", str(pidfile), directory=short_dir
    )
    assert done.returncode == 0, done.stderr
    pid = int(pidfile.read_text())
    try:
        # Ready means ready: no waiting for any socket here.
        with ControlClient(str(short_dir / "vhostblk/disk/qmp.sock")) as client:
            assert client.peer_pid == pid
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
        assert os.readlink(f"/proc/{pid}/fd/2") == os.devnull
    finally:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 15
    while pidfile.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not pidfile.exists()


@pytest.mark.parametrize("log", [False, True])
def test_daemonize_says_what_failed(short_dir: Path, log: bool) -> None:
    """To the caller, also if the log is a file."""
    more = ["--log-file", str(short_dir / "log")] if log else []
    done = vhostblk(
        "serve", "--daemonize", *more, "--blockdev", "null-cx,node-name=a", directory=short_dir
    )
    assert done.returncode == 1
    assert "null-co" in done.stderr
    if log:
        assert "null-co" in (short_dir / "log").read_text()


def test_log_file(start_backend: Start, short_dir: Path, image: Path) -> None:
    done = vhostblk(
        "serve",
        str(image),
        "--daemonize",
        "--log-file",
        str(short_dir / "log"),
        "--pidfile",
        str(short_dir / "pid"),
        directory=short_dir,
    )
    assert done.returncode == 0, done.stderr
    os.kill(int((short_dir / "pid").read_text()), signal.SIGTERM)
    deadline = time.monotonic() + 15
    while (short_dir / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    log = (short_dir / "log").read_text()
    assert "vhostblk: ready" in log and "SIGTERM" in log


CONFIG = """\
control: {dir}/q
objects:
  - {{qom-type: iothread, id: t0}}
exports:            # before what they need: the file's order does not matter
  - type: vhost-user-blk
    id: e
    node-name: n
    addr: {{type: unix, path: {dir}/v}}
    writable: on
    serial: 2026
    iothread: t0
blockdevs:
  - driver: "null-co"
    node-name: n
    size: 010M
    read-zeroes: true
"""


def test_config(start_backend: Start, short_dir: Path) -> None:
    config = short_dir / "c.yaml"
    config.write_text(CONFIG.format(dir=short_dir))
    process = start_backend("--config", str(config))
    with ControlClient(str(short_dir / "q")) as client:
        [export] = client.execute("query-block-exports")
        assert export["id"] == "e" and export["writable"]
        [node] = client.execute("query-named-block-nodes")
        # As key=value: YAML alone would take 010 for eight, and 2026 for a number.
        assert node["image"]["virtual-size"] == 10 << 20
        assert export["serial"] == "2026"
        assert [t["id"] for t in client.execute("query-iothreads")] == ["t0"]
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blockdev: []", [":1: unknown name 'blockdev'", "'blockdevs'"]),
        ("blockdevs:\n  - {driver: null-cx}", [":2:", "null-co"]),
        (
            "blockdevs:\n  - {driver: null-co, node-name: a}\n  - {driver: null-co, siez: 1}",
            [":3:", "'size'"],
        ),
        ("blockdevs: {driver: null-co}", [":1: 'blockdevs' must be a list"]),
        ("blockdevs:\n - null-co", [":2: an entry of 'blockdevs'"]),
        ("name: [a]", ["'name' must be text"]),
        ("name: a\nname: b", [":2: 'name' is written twice"]),
        ("blockdevs:\n  - {driver: null-co", [":2"]),
        ("a: &a [*a]", []),
        # Each line nine times the one above: 9 to the 20th, written out.
        (
            "blockdevs:\n  - {driver: null-co, size: &a0 [x]}\n"
            + "".join(
                f"  - {{driver: null-co, size: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]}}\n"
                for n in range(1, 20)
            ),
            [":2:", "'size', expected: integer"],
        ),
        ("blockdevs:\n  - {driver: null-co, size: 2026-99-99}", [":2:", "'size'", "2026-99-99"]),
        ("blockdevs:\n  - {driver: null-co, size: !!timestamp 2026-99-99}", [":2:"]),
        ("blockdevs:\n  - {driver: null-co, size: %s}" % ("9" * 5000), [":2:", "'size'"]),
        ('blockdevs:\n  - {driver: file, filename: "a\\0b"}', [":2:", "NUL"]),
        ("- x", ["names and values"]),
        ("name: a\nx: \x01", [":2: not a text file"]),
        ("plugins: [[x]]", ["'plugins' must be a list of text"]),
        ("plugins: [1, {a: b}]", ["'plugins' must be a list of text"]),
        ('state: ""', ["'state' may not be empty"]),
        ("x: !!python/object/apply:os.system [true]", []),
    ],
)
def test_config_errors(short_dir: Path, text: str, words: list[str]) -> None:
    config = short_dir / "c.yaml"
    config.write_text(text)
    done = vhostblk("serve", "--config", str(config), directory=short_dir)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(f"vhostblk: --config {config}")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_qemu_storage_daemon_line(start_backend: Start, short_dir: Path, image: Path) -> None:
    """A command line as written for qemu-storage-daemon, monitor included."""
    process = start_backend(
        "--object",
        "iothread,id=t0",
        "--blockdev",
        f"driver=file,node-name=f,filename={image},cache.direct=off",
        "--blockdev",
        '{"driver": "raw", "node-name": "d", "file": "f"}',
        "--chardev",
        "socket,id=c,path={dir}/q,server=on,wait=off",
        "--monitor",
        "chardev=c",
        "--export",
        "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={dir}/v,"
        "writable=on,num-queues=2,logical-block-size=4096",
    )
    with ControlClient(str(short_dir / "q")) as client:
        assert [e["id"] for e in client.execute("query-block-exports")] == ["e"]
    assert process.stop() == 0


def test_nobody_reads_what_we_print(short_dir: Path, image: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vhostblk", "serve", str(image)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"VHOSTBLK_RUNTIME_DIR": str(short_dir)},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"ready" in process.stderr.readline()
        process.stderr.close()
        control = str(short_dir / "vhostblk/disk/qmp.sock")
        with ControlClient(control) as client:
            assert client.execute("query-status")["running"]
        process.terminate()
        assert process.wait(15) == 0


# ---- conventions of vhost-user backends --------------------------------------------------------


@pytest.mark.parametrize("program", ["vhostblk", "vhostblk-backend"])
def test_print_capabilities(program: str) -> None:
    arguments = ["serve"] if program == "vhostblk" else []
    done = vhostblk(*arguments, "--print-capabilities", "--socket-path=/x", program=program)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


class BackendProgram:
    """`vhostblk-backend` with these options, ready."""

    def __init__(self, *options: str, fds: Sequence[int] = ()) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from vhostblk.cli import backend_main; sys.exit(backend_main())",
                *options,
            ],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )
        assert self.process.stderr is not None
        assert "ready" in self.process.stderr.readline()

    def __enter__(self) -> BackendProgram:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def terminate(self) -> None:
        self.process.terminate()
        assert self.process.wait(10) == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_backend_program(short_dir: Path, image: Path, read_only: bool) -> None:
    path = short_dir / "v"
    options = [f"--socket-path={path}", f"--blk-file={image}", *["--read-only"] * read_only]
    with BackendProgram(*options) as program:
        for _ in range(2):
            use(Device(path), read_only)
        program.terminate()
        assert not path.exists()


def use(device: Device, read_only: bool = False) -> None:
    """As a front-end does, from the first message to the last."""
    with device:
        assert device.offered >> Feature.RO & 1 == read_only
        if not read_only:
            device.write(512, b"x" * 512)
            assert device.read(512, 512) == b"x" * 512
        device.read(0, 4096)


def test_backend_program_with_a_listening_descriptor(short_dir: Path, image: Path) -> None:
    path = short_dir / "v"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        with BackendProgram(f"--fd={fd}", f"--blk-file={image}", fds=[fd]) as program:
            for _ in range(2):
                use(Device(path))
            program.terminate()
            assert path.exists()  # who made it removes it


def connected_device(ours: socket.socket) -> Device:
    """On a connection that has been made already."""
    device = Device("")
    device.connect(ours)
    device.start()
    return device


def test_backend_program_with_a_connection(image: Path) -> None:
    """As some management programs do it: no path at all. No other front-end can ever come."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with BackendProgram(f"--fd={fd}", f"--blk-file={image}", fds=[fd]) as program:
        theirs.close()
        with contextlib.closing(connected_device(ours)) as device:
            device.write(0, b"y" * 512)
            assert device.read(0, 512) == b"y" * 512
        assert program.process.wait(10) == 0


def test_backend_program_hangs_up_a_connection(image: Path) -> None:
    """A front-end that breaks the protocol notices, although others hold the descriptor too."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with BackendProgram(f"--fd={fd}", f"--blk-file={image}", fds=[fd]) as program:
        ours.sendall(bytes(12))
        assert ours.recv(1) == b""
        assert program.process.wait(10) == 0
    ours.close()
    theirs.close()


def test_serve_with_a_connection(image: Path) -> None:
    """It has a life beyond that front-end, and ends in order."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    process = subprocess.Popen(
        [sys.executable, "-m", "vhostblk", "serve", f"--fd={fd}", f"--blk-file={image}"],
        pass_fds=[fd],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "ready" in process.stderr.readline()
        with contextlib.closing(connected_device(ours)) as device:
            device.read(0, 512)
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]
        theirs.close()


def test_a_descriptor_that_leads_nowhere(image: Path) -> None:
    with socket.socket(socket.AF_UNIX) as alone:
        done = subprocess.run(
            [sys.executable, "-m", "vhostblk", "serve", f"--fd={alone.fileno()}", str(image)],
            pass_fds=[alone.fileno()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    assert "not a UNIX stream socket that listens or is connected" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--socket-path=/x"],
        ["--blk-file=/x"],
        ["--fd=3", "--socket-path=/x"],
        ["--blk-file=/nonexistent", "--socket-path=/tmp/never"],
        ["--sockt-path=/x"],
    ],
)
def test_backend_program_errors(arguments: list[str]) -> None:
    done = vhostblk(*arguments, program="vhostblk-backend")
    assert done.returncode != 0
    assert done.stderr.startswith("vhostblk-backend: ")
    assert len(done.stderr.splitlines()) == 1


# ---- looking at a running one -----------------------------------------------------------------


def test_status_shows_what_guests_were_refused(
    start_backend: Start, short_dir: Path, image: Path
) -> None:
    start_backend(str(image))
    with Device(short_dir / "vhostblk/disk/vhost.sock") as device:
        for _ in range(3):
            assert device.run(Type.DISCARD, data=bytes(15)).status != 0
    done = vhostblk("status", "disk", "--json", "--interval", "0.1", directory=short_dir)
    [export] = json.loads(done.stdout)[0]["exports"]
    assert export["operations"]["discard"]["refused"] == 3
    lines = vhostblk("status", "disk", "--interval", "0.1", directory=short_dir).stdout.splitlines()
    [head] = [line for line in lines if "REFUSED" in line]
    [row] = [line for line in lines if " discard " in line]
    assert row[head.index("REFUSED") :].split()[0] == "3"


def test_ls_status_and_qmp(start_backend: Start, short_dir: Path, image: Path) -> None:
    assert json.loads(vhostblk("ls", "--json", directory=short_dir).stdout) == []
    process = start_backend(str(image), "--object", "iothread,id=t0")
    [listed] = json.loads(vhostblk("ls", "--json", directory=short_dir).stdout)
    assert listed["name"] == "disk" and listed["pid"] == process.process.pid
    assert "disk" in vhostblk("ls", directory=short_dir).stdout

    done = vhostblk("status", "--interval", "0.1", directory=short_dir)
    assert done.returncode == 0, done.stderr
    for word in ("disk", "disk-file", "waiting", "t0", "open files", str(image)):
        assert word in done.stdout
    [report] = json.loads(
        vhostblk("status", "disk", "--json", "--interval", "0.1", directory=short_dir).stdout
    )
    assert report["pid"] == process.process.pid
    assert report["process"]["memory-private"] > 1 << 20
    operations = report["exports"][0]["operations"]
    assert operations["read"]["operations"] == 0
    assert all("cpu-percent" in thread for thread in report["iothreads"])

    done = vhostblk("qmp", "query-version", directory=short_dir)
    assert json.loads(done.stdout)["package"].startswith("vhostblk")
    done = vhostblk(
        "qmp",
        "blockdev-add",
        "driver=null-co",
        "node-name=x",
        "size=4096",
        "cache.direct=true",
        directory=short_dir,
    )
    assert done.returncode == 0 and json.loads(done.stdout) == {}
    done = vhostblk(
        "qmp", "--name", "disk", "blockdev-del", '{"node-name": "x"}', directory=short_dir
    )
    assert done.returncode == 0
    done = vhostblk("qmp", "blockdev-del", "node-name=x", directory=short_dir)
    assert done.returncode == 4 and "'x'" in done.stderr
    assert "query-status" in vhostblk("qmp", "--list", directory=short_dir).stdout.split()
    done = vhostblk("qmp", "--list", "--json", directory=short_dir)
    assert "query-status" in json.loads(done.stdout)
    done = vhostblk("qmp", "query-status", "--json", directory=short_dir)
    assert json.loads(done.stdout)["running"]
    done = vhostblk("status", "dsik", directory=short_dir)
    assert done.returncode == 3 and "did you mean 'disk'?" in done.stderr
    done = vhostblk("qmp", "quit", directory=short_dir)
    assert done.returncode == 0
    assert process.wait() == 0


def test_doctor(start_backend: Start, short_dir: Path, image: Path) -> None:
    start_backend(str(image))
    done = vhostblk("doctor", "--json", str(image), directory=short_dir)
    assert done.returncode in (0, 1), done.stderr
    findings = json.loads(done.stdout)
    assert {
        "kernel",
        "io_uring",
        "memory locking",
        "open files",
        "sockets",
        "QEMU",
        "shared memory",
        "KVM",
        "disk use",
    } <= {f["check"] for f in findings}
    for finding in findings:
        if finding["state"] == "problem":
            assert finding["remedy"]
    assert done.returncode == any(f["state"] == "problem" for f in findings)
    assert any("disk/disk-file" in f["text"] for f in findings)


def test_doctor_finds_problems(start_backend: Start, short_dir: Path, image: Path) -> None:
    process = start_backend(str(image))
    process.process.kill()
    process.wait()
    left = short_dir / "vhostblk" / "disk"
    done = vhostblk("doctor", "--qemu", "no-such-qemu", "/nonexistent.img", directory=short_dir)
    assert done.returncode == 1
    for word in (
        "'disk' ended without cleaning up",
        f"rm {left}/pid",
        "no-such-qemu",
        "apt-get install",
        "/nonexistent.img",
    ):
        assert word in done.stdout
    # The remedy is exact.
    [remedy] = [line for line in done.stdout.splitlines() if "rmdir" in line]
    subprocess.run(remedy.split("'")[1], shell=True, check=True)
    assert not left.exists()
    start_backend(str(image))
    os.chmod(left / "qmp.sock", 0o666)
    done = vhostblk("doctor", directory=short_dir)
    assert done.returncode == 1 and "anyone on this machine" in done.stdout
    assert stat.S_IMODE(os.stat(left / "qmp.sock").st_mode) == 0o666


@pytest.mark.parametrize(
    ("directory", "remedy"),
    [
        ("/root", "'unset XDG_RUNTIME_DIR': that directory is another user's"),
        ("/root/x", "'unset XDG_RUNTIME_DIR': you cannot reach that directory"),
        ("/nonexistent/x", f"'install -d -m 0700 -o {NOBODY} /nonexistent/x'"),
    ],
)
def test_doctor_harms_nobody(directory: str, remedy: str) -> None:
    """After su, XDG_RUNTIME_DIR is still that of somebody else, and stays theirs."""
    if os.stat("/root").st_mode & 0o001:
        pytest.skip("/root is open to all")
    findings = json.loads(as_nobody("doctor", "--json", XDG_RUNTIME_DIR=directory).stdout)
    [finding] = [f for f in findings if f["check"] == "sockets" and f["state"] == "problem"]
    assert remedy in finding["remedy"]


MEMORY = ["-object", "memory-backend-memfd,id=m,size=1G,share=on", "-machine", "memory-backend=m"]
DISK = ["-chardev", "socket,id=c,path=/s,reconnect=1", "-device", "vhost-user-blk-pci,chardev=c"]


@pytest.mark.parametrize(
    ("words", "shared", "guest", "unsteady"),
    [
        ([*MEMORY, *DISK], ("m",), ("m",), ()),
        (["-object", "memory-backend-file,id=m,mem-path=/x,share=yes", *DISK], ("m",), (), ()),
        (["-object", "memory-backend-file,id=m,mem-path=/x", *DISK], (), (), ()),
        (["-object", "memory-backend-memfd,id=m,size=1G", *DISK], ("m",), (), ()),
        (["-object", "memory-backend-memfd,id=m,size=1G,share=off", *DISK], (), (), ()),
        (
            [
                *["-object", '{"qom-type": "memory-backend-file", "id": "m", "share": true}'],
                *["-numa", "node,memdev=m", "-M", "q35", *DISK],
            ],
            ("m",),
            ("m",),
            (),
        ),
        (
            [
                *[*MEMORY, "-chardev", "socket,id=c,path=/s", "-chardev", "socket,id=d,path=/t"],
                *["-device", '{"driver": "vhost-user-blk-pci", "chardev": "c"}'],
            ],
            ("m",),
            ("m",),
            ("c",),
        ),
        ([*MEMORY, *DISK[:1], "socket,id=c,path=/s,reconnect-ms=0", *DISK[2:]], *2 * [("m",)], "c"),
    ],
)
def test_what_a_running_qemu_was_told(
    words: list[str], shared: Sequence[str], guest: Sequence[str], unsteady: Sequence[str]
) -> None:
    told = qemu.RunningDisks.read(["qemu-system-x86_64", "-m", "1G", *words])
    assert told == qemu.RunningDisks(1, tuple(shared), tuple(guest), tuple(unsteady))
    assert qemu.RunningDisks.read(["grep", "vhost-user-blk-pci"]).count == 0
    odd = ["-device", '{"driver": "vhost-user-blk-pci", "chardev": {}}', "-chardev", "socket"]
    assert qemu.RunningDisks.read(odd).count == 1


@needs_qemu
def test_doctor_looks_at_running_guests(start_backend: Start, short_dir: Path, image: Path) -> None:
    start_backend(str(image))
    words = json.loads(
        vhostblk("qemu-args", "--memory", "64M", "--json", directory=short_dir).stdout
    )
    words = [word.replace(",reconnect=1", "").replace(",reconnect-ms=1000", "") for word in words]
    command = [QEMU, "-S", "-nodefaults", "-display", "none", "-m", "64M", *words]
    guest = subprocess.Popen(command)
    try:
        findings = json.loads(vhostblk("doctor", "--json", directory=short_dir).stdout)
        about = [f for f in findings if f"QEMU (pid {guest.pid})" in f["text"]]
        assert [f["check"] for f in about] == ["reconnect"]
    finally:
        guest.kill()
        guest.wait()


# ---- QEMU --------------------------------------------------------------------------------------


def test_memory_size() -> None:
    assert qemu.memory_size("2G") == "2G"
    assert qemu.memory_size("512") == "512M"
    assert qemu.memory_size("slots=2,size=1G,maxmem=4G") == "1G"
    assert qemu.memory_size("maxmem=4G") is None


def test_command_line_is_understood() -> None:
    read = qemu.CommandLine.read
    assert read(["q", "-m", "2G", "@VHOSTBLK@"]).memory == "2G"
    assert read(["q", "-m", "1G", "-m", "3G"]).memory == "3G"
    assert read(["/usr/bin/qemu-system-x86_64", "-nographic"]).program.endswith("x86_64")
    assert read(["sh", "-c", "exec qemu-kvm -m 512 @VHOSTBLK@"]).memory == "512M"
    assert read(["q", "-M", "q35,memory-backend=m"]).shared_already
    assert not read(["q", "-M", "q35"]).shared_already
    assert qemu.substitute(["a", qemu.MARK, "x " + qemu.MARK], ["-o", "b c"]) == [
        "a",
        "-o",
        "b c",
        "x -o 'b c'",
    ]


def test_reconnect_is_written_for_the_version() -> None:
    export = qemu.Export("e", "/a,b", 4)
    assert "reconnect=1" in " ".join(qemu.arguments([export], qemu_version=(7, 2)))
    words = qemu.arguments([export], qemu_version=(10, 0), queues=4)
    assert "reconnect-ms=1000" in " ".join(words)
    assert "path=/a,,b," in " ".join(words)
    assert words[-1].endswith("num-queues=4")
    with pytest.raises(CliError, match="--queues 5: export 'e' offers 4"):
        qemu.arguments([export], queues=5)


@needs_qemu
def test_qemu_accepts_its_arguments(start_backend: Start, short_dir: Path, image: Path) -> None:
    process = start_backend(str(image))
    done = vhostblk("qemu-args", "disk", "--memory", "64M", "--json", directory=short_dir)
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    line = vhostblk("qemu-args", "--memory", "64M", "--one-line", directory=short_dir).stdout
    assert shlex.split(line) == words
    answer = _ask_qemu(
        [
            QEMU,
            "-S",
            "-nodefaults",
            "-display",
            "none",
            "-smp",
            "2",
            "-m",
            "64M",
            "-qmp",
            "stdio",
            *words,
        ],
        {"execute": "query-block"},
    )
    assert "return" in answer
    assert process.stop() == 0


@needs_qemu
def test_run(short_dir: Path, image: Path) -> None:
    """QEMU runs with the options at the mark; its end is the end, its status the status."""
    command = [QEMU, "-S", "-nodefaults", "-display", "none", "-m", "80", "-qmp", "stdio"]
    answer = _ask_qemu(
        [sys.executable, "-m", "vhostblk", "run", str(image), "--", *command, "@VHOSTBLK@"],
        {"execute": "query-memory-size-summary"},
        short_dir,
    )
    assert answer["return"]["base-memory"] == 80 << 20
    assert not (short_dir / "vhostblk" / "disk").exists()


def _ask_qemu(
    command: list[str], request: dict[str, Any], directory: Path | None = None
) -> dict[str, Any]:
    runtime = {"VHOSTBLK_RUNTIME_DIR": str(directory)} if directory else {}
    text = "".join(
        json.dumps(r) + "\n"
        for r in ({"execute": "qmp_capabilities"}, request, {"execute": "quit"})
    )
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | runtime,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    answers = [line for line in lines if "return" in line or "error" in line]
    answer: dict[str, Any] = answers[1]
    return answer


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", 143)])
def test_run_ends_with_the_status_of_the_command(
    short_dir: Path, image: Path, script: str, status: int
) -> None:
    done = vhostblk(
        "run", str(image), "--", "sh", "-c", f": @VHOSTBLK@; {script}", directory=short_dir
    )
    assert done.returncode == status, done.stderr


def test_run_replaces_the_mark(short_dir: Path, image: Path) -> None:
    done = vhostblk(
        "run",
        "--name",
        "vm",
        str(image),
        "--",
        "printf",
        "%s\n",
        "a",
        "@VHOSTBLK@",
        "b",
        directory=short_dir,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")
    assert words[0] == "a" and words[-2] == "b"
    assert f"socket,id=vhostblk-vm,path={short_dir}/vhostblk/vm/vhost.sock" in done.stdout


def test_run_logs_to_a_file_what_is_ours(short_dir: Path, image: Path) -> None:
    """What QEMU has to say stays on the terminal."""
    log = short_dir / "log"
    script = "echo : @VHOSTBLK@ >/dev/null; echo from-qemu >&2"
    done = vhostblk(
        "run", "--log-file", str(log), str(image), "--", "sh", "-c", script, directory=short_dir
    )
    assert done.returncode == 0 and done.stderr == "from-qemu\n"
    assert "ready" in log.read_text() and "from-qemu" not in log.read_text()


def test_run_without_such_a_program(short_dir: Path, image: Path) -> None:
    done = vhostblk("run", str(image), "--", "no-such-qemu", "@VHOSTBLK@", directory=short_dir)
    assert done.returncode == 127
    assert "cannot run 'no-such-qemu'" in done.stderr


def test_sigterm_ends_run_and_its_command(
    start_backend: Start, short_dir: Path, image: Path
) -> None:
    process = start_backend(
        str(image), "--", "sh", "-c", ": @VHOSTBLK@; exec sleep 60", command="run"
    )
    assert process.stop() == 143
    assert not any(path.is_socket() for path in short_dir.rglob("*"))


@needs_qemu
@pytest.mark.parametrize("wrapped", [False, True])
def test_kill_9_of_run_ends_its_qemu(
    start_backend: Start, short_dir: Path, image: Path, wrapped: bool
) -> None:
    command = [QEMU, "-S", "-nodefaults", "-display", "none", "-m", "80", "@VHOSTBLK@"]
    if wrapped:
        command = ["sh", "-c", f"exec {' '.join(command)}"]
    run = start_backend(str(image), "--", *command, command="run")
    child = only_child(run.process.pid, "qemu")
    try:
        run.process.kill()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def only_child(pid: int, name: str) -> psutil.Process:
    """The one process that it has started, as soon as that is the program called so."""
    found: list[psutil.Process] = []

    def started() -> bool:
        found[:] = psutil.Process(pid).children()
        return [child.name()[: len(name)] for child in found] == [name]

    until(started)
    return found[0]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
