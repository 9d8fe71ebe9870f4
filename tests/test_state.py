# SPDX-License-Identifier: GPL-2.0-or-later
"""The state file: what is in it, what it brings back, and what is wrong with it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cow_driver import Cow, Mirror, Through
from graph_changes import act
from in_process import MIB, Host, refused

from vhostblk import objects
from vhostblk.schema import VhostblkError
from vhostblk.state import Document, StateFile
from vhostblk.state import file as file_module


@asynccontextmanager
async def kept(directory: Path, name: str = "s") -> AsyncIterator[Host]:
    """A backend with the state file `name` in `directory`, loaded if it is there."""
    host = Host(directory, (Cow, Mirror, Through))
    file = StateFile(str(directory / name))
    try:
        await host.backend.start()
        try:
            text = file.read()
            if text is not None:
                await host.backend.restore_state(Document.parse(text, file), file)
            await host.backend.keep_state(file)
            yield host
        finally:
            await host.backend.close()
    finally:
        file.close()


def run(test: Callable[[Path], Any]) -> None:
    async def limited(directory: Path) -> None:
        async with asyncio.timeout(60):
            await test(directory)

    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        asyncio.run(limited(Path(directory)))


def picture(host: Host) -> Any:
    """All that must be the same after a restart."""
    graph = host.backend.graph
    return {
        "graph": sorted(map(str, host.backend.query_block_graph()["edges"])),
        "nodes": {
            name: (
                node.options.to_options() | dict.fromkeys(("node-name", *node.child_roles)),
                node.size,
                node.read_only,
                graph.is_owned(node),
                sorted(set(graph.given_options(node)) - set(node.child_roles)),
                {role: child.node.name for role, child in node.children.items()},
            )
            for name, node in sorted(graph.nodes.items())
        },
        "exports": [export.state_options(export.backend.root) for export in host.backend.exports()],
        "objects": [
            host.backend.qom_get(f"/objects/{entry['name']}", "poll-max-ns")
            for entry in host.backend.qom_list("/objects")
        ],
    }


async def build(host: Host) -> None:
    """A tree with everything that is not simply what the options say."""
    backend = host.backend
    await backend.object_add({"qom-type": "iothread", "id": "t0", "poll-max-ns": "5000"})
    await backend.qom_set("/objects/t0", "poll-max-ns", 7000)
    inner = {"driver": "file", "filename": host.file("a")}
    await host.add("raw", "a", file=inner, discard="unmap", detect_zeroes="unmap")
    await host.add("file", "f", filename=host.file("b"), cache={"direct": True})
    await host.add("raw", "b", file="f", auto_read_only=True)
    await host.add("mirror", "m", children=["a", {"driver": "raw", "file": "b"}])
    await host.add("null-co", "n", size=1 << 20)
    await host.export("m", iothread="t0", serial="S1")
    await host.export("n", "e2", writable=False)
    # And then it changes.
    for arguments in (
        {"filter": {"driver": "through", "node-name": "top"}, "export-id": "e"},
        {
            "filter": {"driver": "through", "node-name": "x"},
            "node-name": "m",
            "child": "children.1",
        },
    ):
        await backend.transaction([("block-filter-insert", arguments)])
    await backend.blockdev_reopen([{"driver": "raw", "node-name": "b", "file": "f"}])


def test_the_same_tree_after_a_restart() -> None:
    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await build(host)
            before = picture(host)
        for _ in range(2):  # also from what the restored one wrote
            text = (directory / "s").read_text()
            async with kept(directory) as host:
                assert picture(host) == before
                assert (directory / "s").read_text() == text
                # Names that were made up do not clash with new ones.
                await host.add("raw", "r", file={"driver": "file", "filename": host.file("c")})
                await host.backend.blockdev_del("r")
        assert before["nodes"]["top"][-1] == {"file": "m"}
        assert before["exports"][0]["node-name"] == "top"

    run(test)


def test_children_go_with_their_parents_also_after_a_restart() -> None:
    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            file = {"driver": "file", "filename": host.file("a")}
            await host.add("raw", "a", file=file, read_only=True)
        async with kept(directory) as host:
            [inner] = [name for name in host.backend.graph.nodes if name != "a"]
            assert not host.backend.graph.is_owned(host.backend.graph.node(inner))
            await host.backend.blockdev_del("a")
            assert not host.backend.graph.nodes

    run(test)


def test_file_names_do_not_depend_on_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(directory: Path) -> None:
        monkeypatch.chdir(directory)
        async with kept(directory) as host:
            host.file("a")
            await host.add("file", "f", filename="a")
            await host.backend.block_export_add(
                {
                    "type": "vhost-user-blk",
                    "id": "e",
                    "node-name": "f",
                    "addr": {"type": "unix", "path": "e.sock"},
                }
            )
        monkeypatch.chdir("/")
        async with kept(directory) as host, host.device():
            assert host.backend.query_block_exports()[0]["connected"]

    run(test)


def test_every_change_is_in_the_file_when_its_success_is_known() -> None:
    async def test(directory: Path) -> None:
        def names(kind: str) -> list[str]:
            document = json.loads((directory / "s").read_text())
            return [entry.get("name") or entry["id"] for entry in document[kind]]

        async with kept(directory) as host:
            assert names("nodes") == []
            await host.null("n")
            assert names("nodes") == ["n"]
            await host.export("n")
            assert names("exports") == ["e"]
            await host.backend.object_add({"qom-type": "iothread", "id": "t"})
            assert names("objects") == ["t"]
            await host.backend.object_del("t")
            assert names("objects") == []
            await host.backend.block_export_del("e")
            assert names("exports") == []
            await host.backend.blockdev_del("n")
            assert names("nodes") == []
            assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o600
        assert sorted(os.listdir(directory)) == ["s", "s.lock"]

    run(test)


def test_what_is_not_a_change_is_not_written() -> None:
    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.null("n")
            before = (directory / "s").stat().st_ino
            with refused("Duplicate"):
                await host.null("n")
            host.backend.query_named_block_nodes()
            assert (directory / "s").stat().st_ino == before

    run(test)


def test_a_chain_of_200_comes_back() -> None:
    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.add("file", "f", filename=host.file("disk.img", 256 * 512))
            await host.export("f")
            for number in range(200):
                root = host.backend.graph.backend("e").root.name
                await host.write(root, number * 512, number.to_bytes(2) * 256)
                await act(host, "blockdev-snapshot-sync", device="e", format="cow")
            before = picture(host)
        async with kept(directory) as host:
            assert picture(host) == before
            root = host.backend.graph.backend("e").root.name
            assert root == "f-200"
            data = await host.read(root, 0, 200 * 512)
            assert data == b"".join(n.to_bytes(2) * 256 for n in range(200))

    run(test)


# ---- secrets


class Hidden(objects.ObjectOptions):
    data: str


class SecretObject(objects.BackendObject):
    qom_type = "test-secret"
    Options = Hidden
    settable: ClassVar[frozenset[str]] = frozenset()

    def state_options(self) -> dict[str, Any] | None:
        return None


def test_secrets_are_referred_to_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objects._types, "test-secret", SecretObject)

    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.backend.object_add({"qom-type": "test-secret", "id": "k", "data": "XYZZY"})
            await host.null("n")
        text = (directory / "s").read_text()
        assert "XYZZY" not in text and '"k"' in text
        with refused("refers to object 'k'", "holds a secret", "--object test-secret,id=k"):
            async with kept(directory):
                pass
        # Given again, as the command line does before the tree is loaded.
        host = Host(directory, ())
        file = StateFile(str(directory / "s"))
        await host.backend.start()
        await host.backend.object_add({"qom-type": "test-secret", "id": "k", "data": "XYZZY"})
        document = Document.parse(file.read() or "", file)
        assert not document.has_object("k")
        await host.backend.restore_state(document, file)
        assert list(host.backend.graph.nodes) == ["n"]
        await host.backend.close()
        file.close()

    run(test)


# ---- when it cannot be written


def test_a_change_that_cannot_be_recorded_is_undone() -> None:
    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.add("file", "f", filename=host.file("a"))
            await host.export("f")
            await host.null("g")
            before = picture(host)
            text = (directory / "s").read_text()
            (directory / "s.tmp").mkdir()  # nothing can be written there
            with refused("Cannot write state file"):
                await host.null("n")
            with refused("Cannot write state file"):
                await host.export("g", "e2")
            with refused("Cannot write state file"):
                await host.backend.object_add({"qom-type": "iothread", "id": "t"})
            with refused("Cannot write state file"):
                filter = {"driver": "through", "node-name": "t"}
                action = {"filter": filter, "export-id": "e"}
                await host.backend.transaction([("block-filter-insert", action)])
            assert picture(host) == before
            assert (directory / "s").read_text() == text
            async with host.device() as guest:
                await guest.write(0, b"x" * 512)
            # What cannot be undone says so.
            with refused("in force, but would not survive a restart", "Cannot write"):
                await host.backend.block_export_del("e", "hard")
            (directory / "s.tmp").rmdir()
            await host.null("n")
            document = json.loads((directory / "s").read_text())
            assert [entry["name"] for entry in document["nodes"]] == ["f", "g", "n"]
            assert document["exports"] == []

    run(test)


def test_a_directory_that_cannot_be_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new document is in place, but not for sure: the old one is put back."""

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.add("file", "f", filename=host.file("a"))
            await host.export("f")
            before, text = picture(host), (directory / "s").read_text()
            with monkeypatch.context() as patch:
                patch.setattr(file_module, "_sync_directory", fail)
                with refused("Cannot write state file", "Input/output error"):
                    await act(host, "blockdev-snapshot-sync", device="e", format="cow")
            assert picture(host) == before and (directory / "s").read_text() == text
            assert not list(directory.glob("*.cow"))
            await act(host, "blockdev-snapshot-sync", device="e", format="cow")
            assert "f-1" in (directory / "s").read_text()

    run(test)


def test_a_directory_that_cannot_be_synced_twice(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = StateFile(str(short_dir / "s"))
    file.write_now("one")
    monkeypatch.setattr(file_module, "_sync_directory", fail)
    for text in ("two", "three"):
        with refused("Cannot write state file", "Input/output error"):
            file.write_now(text)
        assert (short_dir / "s").read_text() == "one"
    file.close()


@pytest.mark.parametrize("where", ["_write_temporary", "_sync_directory"])
def test_a_file_system_that_hangs_holds_guests_up_for_a_while_only(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is undone. What was being written does not come back later."""
    answers = threading.Event()
    owner: Any = file_module if where == "_sync_directory" else StateFile
    real = getattr(owner, where)

    def hang(*arguments: Any) -> None:
        answers.wait(30)
        real(*arguments)

    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.add("file", "f", filename=host.file("a"))
            await host.export("f")
            before, text = picture(host), (directory / "s").read_text()
            async with host.device() as guest:
                with monkeypatch.context() as patch:
                    patch.setattr(file_module, "PATIENCE", 0.3)
                    patch.setattr(owner, where, hang)
                    with refused("Cannot write state file", "more than 0.3 s", "hang?"):
                        await act(host, "blockdev-snapshot-sync", device="e", format="cow")
                    assert picture(host) == before
                    await guest.write(0, b"x" * 512)
                    with refused("an earlier write to it still hangs"):
                        await host.null("n")
                    answers.set()
                    await host.until(lambda: "state" not in {t.name for t in threading.enumerate()})
                assert (directory / "s").read_text() == text
                await act(host, "blockdev-snapshot-sync", device="e", format="cow")
                assert "f-1" in (directory / "s").read_text()

    run(test)


def test_a_disk_without_storage_keeps_its_size() -> None:
    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.null("n", size=MIB)
            await host.backend.block_resize("n", 3 * MIB)
        async with kept(directory) as host:
            assert host.backend.graph.node("n").size == 3 * MIB

    run(test)


# ---- what is wrong with a file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["it is broken", "remove it"]),
        ('{"format": "vhostblk-st', ["it is broken"]),
        ("[]", ["another program"]),
        ('{"nodes": []}', ["another program", "choose another file"]),
        ('{"format": "vhostblk-state", "version": 2}', ["version 2", "the vhostblk that wrote it"]),
        ('{"format": "vhostblk-state", "version": 1, "nodes": 5}', ["'nodes'"]),
        ('{"format": "vhostblk-state", "version": 1, "nodez": []}', ["'nodez'", "nodes"]),
        ("[" * 100000, ["it is broken"]),
        (
            '{"format": "vhostblk-state", "version": 1, "nodes": [{"name": "x", "owned": true,'
            ' "options": {"driver": "nonesuch", "node-name": "x"}}]}',
            ["node 'x'", "'nonesuch'"],
        ),
        (
            '{"format": "vhostblk-state", "version": 1, "nodes": [{"name": "x", "owned": true,'
            ' "options": {"driver": "file", "node-name": "x", "filename": "/nonexistent/x"}}]}',
            ["node 'x'", "/nonexistent/x"],
        ),
        (
            '{"format": "vhostblk-state", "version": 1, "exports": [{"type": "vhost-user-blk",'
            ' "id": "e", "node-name": "x", "addr": {"type": "unix", "path": "/x"}}]}',
            ["export 'e'", "node-name='x'"],
        ),
    ],
)
def test_broken_files(text: str, words: list[str]) -> None:
    async def test(directory: Path) -> None:
        path = directory / "s"
        path.write_text(text)
        path.chmod(0o600)
        with refused(f"State file '{path}'", *words):
            async with kept(directory):
                pass
        assert path.read_text() == text  # whatever it is, it is not ours to change

    run(test)


def test_a_job_that_cannot_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """The disks are served all the same."""

    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await host.null("n")
        state = json.loads((directory / "s").read_text())
        state["jobs"] = [
            {"type": "stream", "id": "j", "filter-node-name": "gone", "speed": 0},
            {"type": "nonesuch", "id": "k"},
        ]
        (directory / "s").write_text(json.dumps(state))
        async with kept(directory) as host:
            assert "n" in host.backend.graph.nodes
            assert not list(host.backend.jobs)
        assert "job 'j': Failed to find node with node-name='gone'" in caplog.text
        assert "job 'k': A job of type 'nonesuch' cannot be restarted" in caplog.text

    run(test)


def test_any_document_is_loaded_or_refused_with_a_sentence() -> None:
    """A valid file with one thing changed, many times."""

    async def test(directory: Path) -> None:
        async with kept(directory) as host:
            await build(host)
        original = (directory / "s").read_text()
        rng = random.Random(5)
        loaded = 0
        for _ in range(150):
            data = json.loads(original)
            spoil(data, rng)
            (directory / "s").write_text(json.dumps(data))
            try:
                async with kept(directory):
                    loaded += 1
            except VhostblkError as error:
                assert str(directory / "s") in error.desc
        assert 0 < loaded < 100

    run(test)


def spoil(data: Any, rng: random.Random) -> None:
    """Remove, repeat or replace something somewhere inside."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            data.append({}) if isinstance(data, list) else data.update(x=1)
            return
        key = rng.choice(keys)
        if isinstance(data[key], dict | list) and rng.random() < 0.8:
            data = data[key]
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del data[key]
        elif kind == 1 and isinstance(data, list):
            data.append(data[key])
        elif kind == 2:
            values = [None, -1, 1 << 70, "", "x", "#block0", "a", [], {}, True, 1.5, "e" * 5000]
            data[key] = rng.choice(values)
        else:
            data[rng.choice(keys)] = data[key]
        return


def test_files_that_others_could_have_written(short_dir: Path) -> None:
    path = short_dir / "s"
    path.write_text("{}")
    path.chmod(0o620)
    file = StateFile(str(path))
    with refused("can be written by others", "chmod 600"):
        file.read()
    if os.geteuid() == 0:
        path.chmod(0o600)
        os.chown(path, 12345, -1)
        with refused("belongs to user 12345"):
            file.read()
    path.unlink()
    path.mkdir()
    with refused("not a regular file"):
        file.read()
    path.rmdir()
    os.mkfifo(path)
    with refused("not a regular file"):
        file.read()
    path.unlink()
    path.write_bytes(b"\xff\xfe\0")
    with refused("not text"):
        file.read()
    file.close()


def test_one_backend_has_it(short_dir: Path) -> None:
    path = str(short_dir / "s")
    file = StateFile(path)
    with refused("belongs to a running backend", f"pid {os.getpid()}"):
        StateFile(path)
    file.close()
    StateFile(path).close()
    with refused("Cannot create", "No such file or directory"):
        StateFile(str(short_dir / "nowhere" / "s"))


def test_a_link_stays_a_link_and_a_trap_is_not_written_through(short_dir: Path) -> None:
    (short_dir / "sub").mkdir()
    victim = short_dir / "victim"
    victim.write_text("precious")
    (short_dir / "s").symlink_to(short_dir / "sub" / "real")
    (short_dir / "sub" / "real.tmp").symlink_to(victim)
    file = StateFile(str(short_dir / "s"))
    file.write_now("one")
    assert (short_dir / "s").is_symlink() and (short_dir / "sub" / "real").read_text() == "one"
    assert victim.read_text() == "precious"
    assert file.read() == "one"
    file.close()
