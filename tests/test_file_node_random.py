# SPDX-License-Identifier: GPL-2.0-or-later
"""Random requests with many odd buffers against the file node, compared with a model, in C.

The program (c/file_node.c) is compiled with the engine's own sources and gcc's sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bare_engine import AIO
from crash.tools import plain_environment

HERE = Path(__file__).resolve().parent
ENGINE = HERE.parent / "cffi_build" / "engine"
SOURCES = [
    "aio_threads.c",
    "aio_uring.c",
    "buffer.c",
    "file_map.c",
    "iothread.c",
    "mailbox.c",
    "node.c",
    "request.c",
    "round.c",
    "stats.c",
    "thread.c",
    "timer.c",
    "nodes/file.c",
    "nodes/file_align.c",
]
ODD_SIZE = 6_000_100
SMALL_SIZE = 120_100


@pytest.fixture(scope="session", params=["address,undefined", "thread"], ids=["asan", "tsan"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gcc = shutil.which("gcc")
    if not gcc:
        pytest.skip("needs gcc")
    path = tmp_path_factory.mktemp("file_node") / "file_node"
    subprocess.run(
        [
            gcc,
            "-std=gnu11",
            "-D_GNU_SOURCE",
            "-Wall",
            "-Wextra",
            "-fno-strict-aliasing",
            "-pthread",
            "-O1",
            "-g",
            "-DVB_DEBUG",
            f"-fsanitize={request.param}",
            "-fno-sanitize-recover=all",
            f"-I{ENGINE}",
            str(HERE / "c" / "file_node.c"),
            *(str(ENGINE / s) for s in SOURCES),
            "-o",
            str(path),
            "-luring",
        ],
        check=True,
    )
    return path


def run(
    program: Path,
    image: Path,
    size: int,
    aio: str,
    *,
    align: int = 0,
    unit: int = 1,
    detect_zeroes: int,
    threads: int = 1,
    rounds: int = 60,
) -> None:
    seed = int.from_bytes(os.urandom(3), "big")
    numbers = (AIO[aio], align, unit, detect_zeroes, threads, rounds, seed)
    try:
        image.touch()
        os.truncate(image, size)
        if align:
            try:
                os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
            except OSError:
                pytest.skip("no O_DIRECT on this file system")
        done = subprocess.run(
            [program, image, *map(str, numbers)],
            capture_output=True,
            text=True,
            timeout=100,
            env=plain_environment(),
        )
    finally:
        image.unlink()
    if "io_uring" in done.stderr and aio == "io_uring":
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.parametrize("aio", sorted(AIO))
@pytest.mark.parametrize("kind", ["buffered", "direct", "memory"])
@pytest.mark.parametrize("detect_zeroes", [0, 2])
def test_random_requests(
    program: Path, tmp_path: Path, aio: str, kind: str, detect_zeroes: int
) -> None:
    directory = Path("/dev/shm") if kind == "memory" else tmp_path
    image = directory / f"vhostblk-test-{os.getpid()}"
    direct = {"align": 512, "unit": 512} if kind == "direct" else {}
    run(program, image, ODD_SIZE, aio, detect_zeroes=detect_zeroes, **direct)


@pytest.mark.parametrize("aio", sorted(AIO))
@pytest.mark.parametrize(("align", "unit"), [(4096, 512), (4096, 1), (512, 1)])
@pytest.mark.parametrize("detect_zeroes", [0, 2])
def test_many_threads_in_the_same_blocks(
    program: Path, tmp_path: Path, aio: str, align: int, unit: int, detect_zeroes: int
) -> None:
    """A file so small that the requests of several threads always meet in some block."""
    image = tmp_path / "image"
    options = {"align": align, "unit": unit, "threads": 3, "rounds": 300}
    run(program, image, SMALL_SIZE, aio, detect_zeroes=detect_zeroes, **options)
