# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process that has used secrets leaves behind: in its memory, its log, its state file."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_process import BackendProcess
from crash.tools import plain_environment
from frontend import Device
from luks_headers import run

from vhostblk import luks
from vhostblk.control.client import ControlClient, Refused
from vhostblk.luks.file import open_storage
from vhostblk.secret import SecretBytes

MAPPED_MAX = 64 << 20
# A sanitizer has terabytes of memory of its own, which nobody can search.
MAY_LOOK = os.geteuid() == 0 and "LD_PRELOAD" not in os.environ

# A process that unlocks and changes a header step by step, and waits for a line before each.
SCRIPT = """
import asyncio, sys
from vhostblk import luks
from vhostblk.luks.file import open_storage
from vhostblk.secret import forbid_core_dumps, source

def pause(what):
    print(what, flush=True)
    sys.stdin.readline()

async def work(image, file):
    forbid_core_dumps()
    with open_storage(image, write=True) as storage:
        volume = await luks.open_volume(storage)
        with source.read_file(file) as words:
            _, key = await volume.unlock(words)
            with key:
                pause("unlocked")
                cheap = luks.KdfOptions(pbkdf_force_iterations=int(sys.argv[3]))
                await volume.add_slot(key, words, None, cheap)
        pause("closed")

asyncio.run(work(*sys.argv[1:3]))
"""


def memory_of(pid: int) -> Iterator[tuple[str, bytes]]:
    """All that a process can write to: its mappings, with their contents."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            start, end, mode = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()  # type: ignore[union-attr]
            if "w" not in mode or "[v" in line:
                continue
            memory.seek(int(start, 16))
            try:
                # What is shared is the image, in a mapping with room to grow.
                most = MAPPED_MAX if "s" in mode else sys.maxsize
                yield line, memory.read(min(int(end, 16) - int(start, 16), most))
            except OSError:
                continue


def places(pid: int, secret: bytes) -> int:
    """How often a secret is in there."""
    return sum(content.count(secret) for _, content in memory_of(pid))


@pytest.mark.skipif(not MAY_LOOK, reason="only root may look into such a process")
@pytest.mark.parametrize(
    "options",
    [
        {"version": "luks1", "pbkdf_force_iterations": 1000},
        {"version": "luks2", "pbkdf_force_iterations": 4, "pbkdf_memory": 1 << 20},
    ],
    ids=["luks1", "luks2"],
)
def test_nothing_is_left_in_memory(tmp_path: Path, options: dict[str, object]) -> None:
    words, key = os.urandom(24).hex().encode(), os.urandom(64)
    image, file = tmp_path / "image", tmp_path / "key"
    image.touch()
    file.write_bytes(words)

    async def create() -> None:
        with open_storage(str(image), write=True) as storage:
            given = luks.CreateOptions.model_validate(options)
            await luks.create(storage, words, given, key=SecretBytes(key))

    run(create())
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, image, file, str(options["pbkdf_force_iterations"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "unlocked\n"
        # Each where it belongs, and nowhere else; this also shows that they would be found.
        assert places(process.pid, words) == 1 or options["version"] == "luks2"
        assert places(process.pid, key) == 1
        assert places(process.pid, key[:32]) == 1
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
        # OpenSSL's Argon2 leaves a copy of the passphrase where it has given memory back.
        assert places(process.pid, words) == 0 or options["version"] == "luks2"
        for part in (key[:32], key[32:], key[:16], key[32:48]):
            assert places(process.pid, part) == 0
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 ", limits)
        process.communicate("\n", timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_nothing_is_written_or_told(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    """Of what a backend says, logs and records, while secrets come, are used, and go."""
    words, new, inline = (os.urandom(24).hex() for _ in range(3))
    (short_dir / "key").write_text(words)
    (short_dir / "new").write_text(new)
    image = short_dir / "image"
    image.touch()
    key = os.urandom(64)

    async def create() -> None:
        with open_storage(str(image), write=True) as storage:
            given = luks.CreateOptions(pbkdf_force_iterations=1000)
            with SecretBytes(key) as own:
                await luks.create(storage, words.encode(), given, key=own)
            os.truncate(image, 8 << 20)

    run(create())
    backend = start_backend(
        "--log-level", "debug", "--state", "{dir}/state.json", "--control", "{dir}/qmp.sock",
        "--object", "secret,id=s,file={dir}/key",
        "--blockdev", "luks,node-name=disk,key-secret=s,file.driver=file,file.filename={dir}/image",
        "--export", "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={dir}/e.sock",
    )  # fmt: skip
    answers = []

    def command(name: str, **arguments: Any) -> Any:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        with ControlClient(str(short_dir / "qmp.sock")) as client:
            answer = client.execute(name, given)
        answers.append(json.dumps(answer))
        return answer

    node = {"node_name": "disk"}
    cheap = {"pbkdf_force_iterations": 1000}
    command("object-add", qom_type="secret", id="inline", data=inline)
    command("luks-key-slot-add", **node, **cheap, key_secret="s", new_secret="inline")
    encoded = base64.b64encode(new.encode()).decode()
    command("luks-key-slot-rotate", **node, **cheap, old_secret="inline", new_data=encoded)
    with pytest.raises(Refused) as caught:
        command("luks-key-slot-test", **node, key_secret="inline")
    answers.append(str(caught.value) + json.dumps(caught.value.data))
    with pytest.raises(Refused) as caught:
        command("object-add", qom_type="secret", id="bad", data=inline, format="bad")
    answers.append(str(caught.value) + json.dumps(caught.value.data))
    with pytest.raises(Refused) as caught:
        command("object-add", qom_type="secret", id="bad", data=inline + "!", format="base64")
    answers.append(str(caught.value) + json.dumps(caught.value.data))
    for query in ("query-block", "query-block-graph", "query-named-block-nodes", "query-status"):
        command(query)
    command("qom-list", path="/objects/inline")
    command("luks-key-slot-list", **node)
    state = (short_dir / "state.json").read_text()
    assert '"id": "s"' in state
    pid = backend.process.pid
    if MAY_LOOK:
        # The disk is in use: its key is in the engine's cipher, expanded, and nowhere as it is.
        assert places(pid, key) == 0
    assert backend.stop() == 0
    said = "\n".join([*backend.log, *answers, state, (short_dir / "state.json").read_text()])
    assert "luks-key-slot-rotate" in said
    for secret in (words, new, inline, encoded, key.hex()):
        assert secret not in said


def test_reencryption_tells_nothing(
    start_backend: Callable[..., BackendProcess], short_dir: Path
) -> None:
    """Neither passphrases nor the old and the new key: in logs, answers, state, arguments."""
    words, other, old = os.urandom(24).hex(), os.urandom(24).hex(), os.urandom(64)
    (short_dir / "key").write_text(words)
    (short_dir / "other").write_text(other)
    image = short_dir / "image"
    image.touch()

    async def create() -> None:
        with open_storage(str(image), write=True) as storage:
            given = luks.CreateOptions(version="luks2", pbkdf="pbkdf2", pbkdf_force_iterations=1000)
            with SecretBytes(old) as own:
                await luks.create(storage, words.encode(), given, key=own)
            os.truncate(image, 20 << 20)

    async def new_key() -> bytes:
        with open_storage(str(image), write=False) as storage:
            _, key = await (await luks.open_volume(storage)).unlock(other.encode())
            with key:
                return bytes(key.view())

    run(create())
    backend = start_backend(
        "--log-level", "debug", "--state", "{dir}/state.json", "--control", "{dir}/qmp.sock",
        "--object", "secret,id=s,file={dir}/key", "--object", "secret,id=t,file={dir}/other",
        "--blockdev", "luks,node-name=disk,key-secret=s,file.driver=file,file.filename={dir}/image",
    )  # fmt: skip
    seen = []
    with ControlClient(str(short_dir / "qmp.sock")) as client:
        options = {"pbkdf": "pbkdf2", "pbkdf-force-iterations": 1000, "speed": 4 << 20}
        client.execute("luks-reencrypt", {"node-name": "disk", "secrets": ["t"], **options})
        while client.execute("query-block-jobs"):
            for query in ("query-named-block-nodes", "query-jobs", "query-block-graph"):
                seen.append(json.dumps(client.execute(query)))
            seen.append((short_dir / "state.json").read_text())
            time.sleep(0.05)
        seen.append(json.dumps(client.execute("luks-key-slot-list", {"node-name": "disk"})))
    pid = backend.process.pid
    seen.append(Path(f"/proc/{pid}/cmdline").read_text())
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert backend.stop() == 0
    said = "\n".join([*backend.log, *seen])
    assert "luks-reencrypt" in said
    [core] = [line.split() for line in limits.splitlines() if line.startswith("Max core")]
    assert core[4] == "0", "no core dump"
    new = run(new_key())
    assert new != old
    for secret in (words, other, old.hex(), new.hex()):
        assert secret not in said
    for key in (old, new):
        assert base64.b64encode(key).decode() not in said


@pytest.mark.skipif(
    not MAY_LOOK or shutil.which("gcore") is None, reason="needs root and gcore (gdb)"
)
@pytest.mark.parametrize("allowed", [False, True], ids=["as-it-is", "dumps-allowed"])
def test_a_core_dump(
    start_backend: Callable[..., BackendProcess],
    short_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: bool,
) -> None:
    """What root's debugger writes has neither passphrases nor keys, nor key schedules."""
    words, key = os.urandom(24).hex(), os.urandom(64)
    (short_dir / "key").write_text(words)
    image = short_dir / "image"
    image.touch()

    async def create() -> None:
        with open_storage(str(image), write=True) as storage:
            given = luks.CreateOptions(pbkdf_force_iterations=1000)
            with SecretBytes(key) as own:
                await luks.create(storage, words.encode(), given, key=own)
            os.truncate(image, 8 << 20)

    run(create())
    # Ours may be that of a process with secrets, and would be inherited.
    Path("/proc/self/coredump_filter").write_text("0x33")
    if allowed:
        monkeypatch.setenv("VHOSTBLK_CORE_DUMPS", "1")
    backend = start_backend(
        "--control", "{dir}/qmp.sock",
        "--object", "secret,id=s,file={dir}/key",
        "--blockdev", "luks,node-name=disk,key-secret=s,file.driver=file,file.filename={dir}/image",
        "--export", "vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,"
        "addr.path={dir}/e.sock",
    )  # fmt: skip
    with Device(str(short_dir / "e.sock")) as device:
        device.write(0, bytes(4096))
        pid = backend.process.pid
        # The ciphers' key schedules begin with the halves of the key.
        assert places(pid, key[:32]) > 0
        subprocess.run(
            ["gcore", "-o", short_dir / "core", str(pid)],
            check=True, capture_output=True, timeout=120, env=plain_environment(),
        )  # fmt: skip
        assert device.read(0, 4096) == bytes(4096)
    dump = (short_dir / f"core.{pid}").read_bytes()
    assert dump[:4] == b"\x7fELF"
    # What is in memory of its own is in no dump; with dumps allowed, OpenSSL's copies are.
    assert words.encode() not in dump
    assert key not in dump
    assert (key[:32] in dump) == allowed
    assert (key[32:] in dump) == allowed
    assert backend.stop() == 0


@pytest.mark.parametrize(
    "word",
    [
        "secret,id=s,data=hunter2,format=bad",
        "secret,id=s,data=hun,ter2",
        "secret,id=s,data=hunter2,file=/x",
        "qom-type=secret,id=s,data=hunter2,keyid=nobody,iv=x",
        '{"qom-type": "secret", "id": "s", "data": "hunter2"',
        '{"qom-type": "secret", "data": "hunter2", "id": "s", "format": "bad"}',
    ],
)
def test_a_command_line_that_is_wrong_is_not_repeated(word: str, tmp_path: Path) -> None:
    """What is on standard error is in the journal."""
    done = subprocess.run(
        [sys.executable, "-m", "vhostblk", "serve", "--control", tmp_path / "c", "--object", word],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "--object secret,id=s,…: " in done.stderr
    assert "hun" not in done.stdout + done.stderr
    assert "ter2" not in done.stdout + done.stderr
