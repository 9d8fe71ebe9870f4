# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk create`, `info`, `map` and `check`, the latter on images in use."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from backend_process import BackendProcess
from crash.tools import plain_environment
from frontend import Device
from in_process import MIB, Host, refused, with_host

from vhostblk.cli import main

KIB = 1024


def qemu(*arguments: object) -> str:
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=True,
        env=plain_environment(),
    ).stdout


def qemu_map(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(qemu("qemu-img", "map", "-U", "--output=json", path))
    return found


def same_map(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Extent by extent; QEMU 7.2 does not say what is compressed."""
    keys = ("start", "length", "depth", "zero", "data", "offset", "present")
    cut = [{key: entry[key] for key in keys if key in entry} for entry in ours]
    assert cut == [{key: entry[key] for key in keys if key in entry} for entry in theirs]


def chain(directory: Path) -> Path:
    """An image with data, zeroes and holes over another one over a raw file."""
    rng = random.Random(3)
    base, middle, top = directory / "base.raw", directory / "middle.qcow2", directory / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "raw", base, "6M")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 1 1M 1M", base)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle, "8M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    for image in (middle, top):
        for _ in range(6):
            offset = rng.randrange(0, 7 * MIB, 64 * KIB)
            kind = rng.choice(("write -P 3", "write -z"))
            qemu("qemu-io", "-f", "qcow2", "-c", f"{kind} {offset} {64 * KIB}", image)
    return top


def test_map_of_an_image_in_use_is_that_of_qemu() -> None:
    async def test(host: Host) -> None:
        top = chain(host.directory)
        before = qemu_map(top)
        await host.add("qcow2", "d", file={"driver": "file", "filename": str(top)})
        answer = await host.backend.block_image_map("d", 0, None, 1000)
        same_map(answer["extents"], before)
        assert answer["size"] == 8 * MIB and "next-offset" not in answer
        # In pieces it is the same.
        pieces: list[dict[str, Any]] = []
        offset: int | None = 0
        while offset is not None:
            part = await host.backend.block_image_map("d", offset, None, 2)
            assert len(part["extents"]) <= 2
            pieces += part["extents"]
            offset = part.get("next-offset")
        assert sum(entry["length"] for entry in pieces) == 8 * MIB
        same_map(pieces, before)
        # What is not on disk yet is known.
        for cluster in range(0, 128, 5):
            await host.write("d", cluster * 64 * KIB, b"n" * 512)
        now = await host.backend.block_image_map("d", 0, None, 1000)
        own = [entry for entry in now["extents"] if entry["depth"] == 0 and entry["data"]]
        covered = {
            at for entry in own
            for at in range(entry["start"], entry["start"] + entry["length"], 64 * KIB)
        }  # fmt: skip
        assert {cluster * 64 * KIB for cluster in range(0, 128, 5)} <= covered
        await host.backend.blockdev_del("d")
        same_map(now["extents"], qemu_map(top))

    with_host(test)


def test_map_of_raw_files_and_through_filters() -> None:
    async def test(host: Host) -> None:
        path = Path(host.file("f", MIB))
        with path.open("r+b") as file:
            file.seek(256 * KIB)
            file.write(b"x" * 64 * KIB)
        await host.add("file", "f", filename=str(path))
        await host.add("raw", "r", file="f", offset=128 * KIB, size=512 * KIB)
        await host.add("delay", "d", file="r")
        same = [await host.backend.block_image_map(name, 0, None, 100) for name in ("r", "d")]
        assert same[0]["extents"] == same[1]["extents"]
        data = [entry for entry in same[0]["extents"] if entry["data"]]
        assert [(entry["start"], entry["offset"]) for entry in data] == [(128 * KIB, 256 * KIB)]
        with refused("not inside node 'r' of 524288 bytes"):
            await host.backend.block_image_map("r", MIB, None, 100)

    with_host(test)


def test_check_of_an_image_under_load() -> None:
    async def test(host: Host) -> None:
        path = host.directory / "a.qcow2"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "8M")
        await host.add("qcow2", "d", file={"driver": "file", "filename": str(path)})
        await host.export("d")
        async with host.device() as guest:
            for number in range(40):
                await guest.write(number * 100 * KIB, b"w" * 4096)
                if number % 8 == 0:
                    result = await host.backend.block_image_check("e")
                    assert result["node-name"] == "d"
                    assert not result.get("corruptions") and not result.get("leaks")
                    assert result["allocated-clusters"] == number + 1
            assert await guest.read(0, 4096) == b"w" * 4096
        await host.add("file", "f", filename=host.file("plain"))
        with refused("Block format 'file' used by node 'f' does not support checks"):
            await host.backend.block_image_check("f")

    with_host(test)


def test_check_finds_what_qemu_finds() -> None:
    async def test(host: Host) -> None:
        path = host.directory / "a.qcow2"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
        qemu("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
        with path.open("r+b") as file:
            file.seek(2 * 65536 + 2 * 9)  # a count in the first block
            file.write(b"\x00\x02")
        await host.add("qcow2", "d", file={"driver": "file", "filename": str(path)}, read_only=True)
        result = await host.backend.block_image_check("d")
        done = subprocess.run(
            ["qemu-img", "check", "-U", "--output=json", path],
            capture_output=True, check=False, env=plain_environment(),
        )  # fmt: skip
        report = json.loads(done.stdout)
        assert result.get("leaks", 0) == report.get("leaks", 0)
        assert bool(result.get("corruptions")) == bool(report.get("corruptions"))
        assert report.get("leaks", 0) + report.get("corruptions", 0) > 0

    with_host(test)


def test_an_image_in_use_is_what_qemu_says_it_is() -> None:
    """Snapshots, bitmaps, sizes: of one that QEMU made, and after changes of ours."""

    async def test(host: Host) -> None:
        path = host.directory / "a.qcow2"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
        qemu("qemu-io", "-f", "qcow2", "-c", "write 1M 1M", path)
        qemu("qemu-img", "snapshot", "-c", "first", path)
        qemu("qemu-img", "bitmap", "--add", path, "b0")
        qemu("qemu-img", "bitmap", "--add", "--disable", path, "b1")
        await host.add("qcow2", "d", file={"driver": "file", "filename": str(path)})
        await host.add("raw", "r", file="d")

        async def ours(name: str) -> dict[str, Any]:
            sizes = await host.backend.actual_sizes()
            found: dict[str, Any] = next(
                node["image"]
                for node in host.backend.query_named_block_nodes(sizes)
                if node["node-name"] == name
            )
            return found

        def theirs() -> dict[str, Any]:
            info = json.loads(qemu("qemu-img", "info", "-U", "--output=json", path))
            info.pop("children", None)  # of QEMU 8 and later
            return dict(info)

        assert await ours("d") == theirs()
        assert [entry["flags"] for entry in theirs()["format-specific"]["data"]["bitmaps"]] == [
            ["in-use", "auto"],
            [],
        ]
        await host.backend.internal_snapshot("d", "create", "second")
        assert [entry["name"] for entry in (await ours("d"))["snapshots"]] == ["first", "second"]
        assert await ours("d") == theirs()
        await host.backend.internal_snapshot("d", "delete", "first")
        await host.backend.block_resize("d", 16 * MIB)
        assert await ours("d") == theirs()
        assert (await ours("r"))["actual-size"] == path.stat().st_blocks * 512

    with_host(test)


def test_a_file_server_that_has_gone_does_not_hold_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes on the host are the one thing in the answer that has to be asked for."""

    async def test(host: Host) -> None:
        gone = threading.Event()
        await host.add("file", "f", filename=host.file("plain"))
        node = host.backend.graph.node("f")
        monkeypatch.setattr(node, "allocated", lambda: gone.wait(60) and 0)
        monkeypatch.setattr("vhostblk.backend._SIZES_PATIENCE", 0.05)
        try:
            for _ in range(3):  # and it is asked once
                assert await host.backend.actual_sizes() == {}
        finally:
            gone.set()
        await host.until(lambda: host.backend._sizing is not None and host.backend._sizing.done())
        monkeypatch.setattr("vhostblk.backend._SIZES_PATIENCE", 30.0)
        assert await host.backend.actual_sizes() == {node: 0}

    with_host(test)


# ---- the commands


def test_info_map_and_check_of_a_running_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    process = BackendProcess(
        tmp_path,
        "--blockdev",
        f"driver=qcow2,node-name=d,file.driver=file,file.filename={path}",
        "--export",
        "type=vhost-user-blk,id=vda,node-name=d,writable=on,addr.type=unix,addr.path={dir}/v.sock",
        "--control",
        "{dir}/c.sock",
    )
    try:
        process.wait_ready()
        with Device(str(tmp_path / "v.sock"), timeout=20) as device:
            device.write(MIB, b"x" * 64 * KIB)
            socket = ["--socket", str(tmp_path / "c.sock")]
            assert main(["info", *socket]) == 0
            text = capsys.readouterr().out
            assert "format: qcow2" in text and "virtual-size: 8388608" in text
            assert main(["info", "vda", "--json", *socket]) == 0
            assert json.loads(capsys.readouterr().out)["cluster-size"] == 65536
            assert main(["map", *socket]) == 0
            assert "data" in capsys.readouterr().out
            assert main(["map", "d", "--json", *socket]) == 0
            data = [entry for entry in json.loads(capsys.readouterr().out) if entry["data"]]
            assert [(entry["start"], entry["length"]) for entry in data] == [(MIB, 64 * KIB)]
            assert main(["check", *socket]) == 0
            assert "no errors were found" in capsys.readouterr().out
            assert main(["check", "nobody", *socket]) != 0
            assert "nobody" in capsys.readouterr().err
            assert device.read(MIB, 512) == b"x" * 512
    finally:
        process.close()


def test_create_makes_what_qemu_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    assert (
        main(["create", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", str(base), "4M"]) == 0
    )
    info = json.loads(qemu("qemu-img", "info", "--output=json", base))
    assert (info["virtual-size"], info["cluster-size"]) == (4 * MIB, 4096)
    assert info["format-specific"]["data"]["compat"] == "0.10"
    arguments = ["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "compression_type=zstd"]
    assert main(["create", *arguments, str(top), "8M"]) == 0
    info = json.loads(qemu("qemu-img", "info", "--output=json", top))
    assert info["backing-filename"] == "base.qcow2"
    assert info["format-specific"]["data"]["compression-type"] == "zstd"
    qemu("qemu-img", "check", "-q", top)
    raw = tmp_path / "disk.raw"
    assert main(["create", "-f", "raw", str(raw), "3M"]) == 0
    assert raw.stat().st_size == 3 * MIB
    qed = tmp_path / "disk.qed"
    for path in (qed, tmp_path / "again.qcow2"):
        words = ["-f", path.suffix[1:], "-o", "nocow=on,extent_size_hint=1M"]
        assert main(["create", *words, str(path), "3M"]) == 0
        qemu("qemu-img", "check", "-q", path)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-f", "qcow2", "there", "1M"], "exists and is not empty"),
        (["-f", "qcow2", "new", "many"], "is not a size"),
        (["-f", "qcow2", "-o", "cluster_size=5", "new", "1M"], "power of two"),
        (["-f", "qcow2", "-o", "clusters=5", "new", "1M"], "unexpected"),
        (["-f", "qcow2", "-o", "clusters", "new", "1M"], "not KEY=VALUE"),
        (["-f", "qcow2", "-o", "=1", "new", "1M"], "not KEY=VALUE"),
        (["-f", "qcow2", "-o", "encrypt.format=luks", "new", "1M"], "no terminal to ask"),
        (["-f", "qcow2", "-o", "encrypt.format=aes", "new", "1M"], "allowed: luks"),
        (["-f", "qcow2", "-o", "encrypt=luks", "new", "1M"], "encrypt.format=luks"),
        (["-f", "qcow2", "-o", "encrypt.key-secret=s", "new", "1M"], "read with --key-file"),
        (["-f", "qcow2", "--key-file", "there", "new", "1M"], "has no passphrase"),
        (["-f", "qed", "-o", "encrypt.format=luks", "new", "1M"], "unexpected"),
        (["-f", "qcow2", "--header", "there2", "new", "1M"], "no header of its own"),
        (["-f", "qcow2", "-o", "nocow=maybe", "new", "1M"], "'nocow'"),
        (["-f", "qcow2", "-b", "there", "new", "1M"], "-b needs -F"),
        (["-f", "qcow2", "-b", "missing", "-F", "raw", "new", "1M"], "does not exist"),
        (["-f", "raw", "-b", "there", "-F", "raw", "new", "1M"], "cannot have a backing file"),
        (["-f", "qcow2", "-b", "there", "-F", "rw", "new", "1M"], "did you mean 'raw'?"),
        (["-f", "qcow2", "-o", "data_file=there", "new", "1M"], "'there' exists and is not empty"),
        (["-f", "qcow2", "-o", "data_file=./new", "new", "1M"], "must be two files"),
        (["-f", "qcow2", "-o", "data_file=no/dir", "new", "1M"], "No such file or directory"),
        (["-f", "null-co", "new", "1M"], "is not one of raw, qcow2, qed, luks"),
        # What --force may replace stays when it cannot be replaced.
        (["--force", "-f", "qcow2", "-o", "cluster_size=3", "there", "1M"], "Cluster size"),
        (["--force", "-f", "qcow2", "-o", "cluster_size=512", "there", "9P"], "L1 table"),
        (["--force", "-f", "qcow2", "-o", "sise=3", "there", "1M"], "unexpected"),
        (["--force", "-f", "qed", "-o", "table_size=3", "there", "1M"], "table size"),
        (["--force", "-f", "raw", "-o", "preallocation=ful", "there", "1M"], "'full'"),
    ],
)
def test_create_refuses_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_bytes(b"data")
    assert main(["create", *arguments]) != 0
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error
    assert Path("there").read_bytes() == b"data"
    assert not Path("new").exists()


def test_create_rounds_up_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "a.raw"
    assert main(["create", "-f", "qcow2", "-o", f"data_file={data}", str(path), "1000"]) == 0
    assert "1024 bytes" in capsys.readouterr().out
    assert json.loads(qemu("qemu-img", "info", "--output=json", path))["virtual-size"] == 1024
    assert data.exists()


def test_map_of_a_quorum() -> None:
    """Data are where any leg that is in sync has them; one that is out has missed some."""

    async def test(host: Host) -> None:
        for name in "abc":
            await host.add("file", name, filename=host.file(name, MIB))
            await host.add("error-inject", f"leg-{name}", file=name, operations="discard")
        legs = [f"leg-{name}" for name in "abc"]
        await host.add("quorum", "q", children=legs, vote_threshold=2)

        async def map() -> list[tuple[int, int, str]]:
            extents = (await host.backend.block_image_map("q", 0, None, 100))["extents"]
            assert [e["data"] for e in extents] == [not e["zero"] for e in extents]
            return [
                (e["start"] // KIB, e["length"] // KIB, Path(e["filename"]).name)
                for e in extents
                if e["data"]
            ]

        assert await map() == []
        await host.write("q", 64 * KIB, b"x" * 64 * KIB)
        assert await map() == [(64, 64, "a")]
        await host.write("b", 96 * KIB, b"y" * 64 * KIB)  # nobody knows why
        assert await map() == [(64, 64, "a"), (128, 32, "b")]
        given = {"driver": "error-inject", "node-name": "leg-a", "file": "a"}
        await host.backend.blockdev_reopen([{**given, "operations": "write"}])
        await host.write("q", 512 * KIB, b"z" * 64 * KIB)
        assert await map() == [(64, 96, "b"), (512, 64, "b")]

    with_host(test)


def filled(directory: Path) -> Path:
    with contextlib.suppress(OSError), (directory / "full").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return directory


@pytest.mark.parametrize(
    "words",
    [
        ["-f", "qcow2"],
        ["-f", "qed"],
        ["-f", "raw", "-o", "preallocation=falloc"],
        ["-f", "luks", "-o", "iter-time=10", "--key-file", "{key}"],
    ],
    ids=lambda words: words[1],
)
def test_create_on_a_full_disk(
    small_disk: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is named, and not left behind in the way of the next attempt."""
    (tmp_path / "key").write_text("x")
    image = filled(small_disk) / "image"
    given = [word.replace("{key}", str(tmp_path / "key")) for word in words]
    assert main(["create", *given, str(image), "64M"]) == 1
    expected = f"vhostblk: Could not create '{image}': No space left on device; make room"
    assert capsys.readouterr().err.startswith(expected)
    assert not image.exists()


def test_a_snapshot_on_a_full_disk(small_disk: Path) -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("disk"))
        overlay = filled(small_disk) / "overlay"
        with refused(f"Could not create '{overlay}': No space left on device; make room"):
            await host.backend.transaction(
                [("blockdev-snapshot-sync", {"node-name": "f", "snapshot-file": str(overlay)})]
            )
        assert not overlay.exists()

    with_host(test)


def test_create_knows_its_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["create", "-f", "qcow", str(tmp_path / "image"), "1M"]) == 2
    text = "'qcow' is not one of raw, qcow2, qed, luks; did you mean 'qcow2'?"
    assert text in capsys.readouterr().err
