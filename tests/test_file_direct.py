# SPDX-License-Identifier: GPL-2.0-or-later
"""cache.direct=on where its blocks are larger than a guest's sectors, judged by QEMU's tools."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from backend_process import BackendProcess
from frontend.daemon import Daemon, vhostblk
from frontend.device import Device
from frontend.protocol import Type
from loop_devices import attached, mounted
from qemu_clock import quick_kdf

KIB, MIB = 1024, 1 << 20
BLOCK, SECTOR = 4096, 512
SIZE = 8 * MIB
QUEUES = 4
SECRET = "secret,id=key,data=passphrase"
IOTHREADS = ["--object", "iothread,id=io1", "--object", "iothread,id=io2"]


def qemu(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=quick_kdf(), timeout=60
    ).stdout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """With sectors of 4 KiB."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 * SIZE))
    with attached(image, sector=BLOCK) as device:
        yield device


def serve(*nodes: str) -> Daemon:
    """The last node is the guest's disk."""
    arguments = ["--object", SECRET, *IOTHREADS]
    for node in nodes:
        arguments += ["--blockdev", node]
    export = "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={dir}/e.sock,writable=on"
    export += f",num-queues={QUEUES},iothread.0=io1,iothread.1=io2"
    return vhostblk(*arguments, "--export", export)


def scribble(device: Device, expected: bytearray, rounds: int = 20) -> None:
    """Requests of a few sectors in all queues at once; what must be there afterwards."""
    for _ in range(rounds):
        at, started = random.randrange(64) * SECTOR, []
        while len(started) < 24:
            length = random.choice([1, 1, 2, 7, 8, 40]) * SECTOR
            data = random.randbytes(length)
            queue = len(started) % QUEUES
            started.append(device.submit(Type.OUT, at // SECTOR, data, queue=queue))
            expected[at : at + length] = data
            at += length
        for request in started:
            device.checked(request)
    assert device.read(0, MIB) == expected[:MIB]
    zeroes = ((SECTOR, 3 * SECTOR), (MIB - SECTOR, 17 * SECTOR), (2 * MIB, MIB + SECTOR))
    for offset, length in zeroes:
        device.write_zeroes(offset, length, unmap=True)
        expected[offset : offset + length] = bytes(length)
    device.discard((3 * MIB + SECTOR, BLOCK))
    for at in range(0, 5 * MIB, MIB):
        if at != 3 * MIB:
            assert device.read(at, MIB) == expected[at : at + MIB]
    assert device.read(3 * MIB, SECTOR) == expected[3 * MIB : 3 * MIB + SECTOR]
    end = 3 * MIB + SECTOR + BLOCK
    assert device.read(end, SECTOR) == expected[end : end + SECTOR]
    expected[3 * MIB : 3 * MIB + 4 * BLOCK] = device.read(3 * MIB, 4 * BLOCK)
    device.flush()


def test_one_sector_of_a_whole_disk(
    start_backend: Callable[..., BackendProcess], short_dir: Path, disk: str
) -> None:
    """What `serve --direct` on such a disk once did to the rest of the block."""
    before = Path(disk).read_bytes()
    process = start_backend("--direct", disk)
    [path] = short_dir.glob("vhostblk/*/vhost.sock")
    with Device(path) as device:
        device.write(0, b"a" * SECTOR)
        assert device.read(SECTOR, BLOCK) == before[SECTOR : SECTOR + BLOCK]
        device.write(SECTOR, b"b" * SECTOR)
        assert device.read(SECTOR, SECTOR) == b"b" * SECTOR
        device.flush()
    assert process.stop() == 0
    expected = b"a" * SECTOR + b"b" * SECTOR + before[2 * SECTOR :]
    judge = ["-c", "read -P 0x61 0 512", "-c", "read -P 0x62 512 512"]
    assert "failed" not in qemu("qemu-io", "-f", "raw", "-t", "none", *judge, disk)
    assert Path(disk).read_bytes() == expected


FORMATS = {
    "raw": ([], "driver=raw"),
    "qcow2": (["-f", "qcow2"], "driver=qcow2"),
    "qcow2 of sectors": (["-f", "qcow2", "-o", "cluster_size=512"], "driver=qcow2"),
    "qed": (["-f", "qed"], "driver=qed"),
    "luks": (
        ["-f", "luks", "--object", SECRET, "-o", "key-secret=key,iter-time=10"],
        "driver=luks,key-secret=key",
    ),
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("raw", "host_device"),
        ("qcow2", "host_device"),
        ("qcow2", "file"),
        ("qcow2 of sectors", "host_device"),
        ("qed", "file"),  # qemu-img creates none on devices
        ("luks", "host_device"),
    ],
)
def test_sectors_of_a_disk_of_larger_blocks(
    kind: str, place: str, disk: str, tmp_path: Path
) -> None:
    create, driver = FORMATS[kind]
    with ExitStack() as stack:
        if place == "file":
            stack.enter_context(mounted(disk, tmp_path / "mount"))
            disk = str(tmp_path / "mount" / "image")
        if create:
            qemu("qemu-img", "create", *create, disk, str(SIZE))
        file = f"driver={place},filename={disk},cache.direct=on,discard=unmap"
        nodes = [f"{file},node-name=f", f"{driver},node-name=disk,file=f,discard=unmap"]
        expected = bytearray(random.randbytes(SIZE))
        with serve(*nodes) as daemon, Device(daemon.socket("e"), queues=QUEUES) as device:
            for at in range(0, SIZE, MIB):
                device.write(at, bytes(expected[at : at + MIB]))
            scribble(device, expected)
            device.disconnect()
            assert daemon.terminate() == 0
        judge = f"{driver},file.driver={place},file.filename={disk},file.cache.direct=on"
        if kind.startswith("q"):
            qemu("qemu-img", "check", "--image-opts", judge)
        opened = ["--image-opts", *(["--object", SECRET] if kind == "luks" else [])]
        qemu("qemu-img", "convert", *opened, "-O", "raw", judge, str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes()[:SIZE] == expected


@pytest.mark.parametrize("sector", [SECTOR, BLOCK])
def test_a_disk_that_lies_askew(sector: int, tmp_path: Path) -> None:
    """raw with an offset that is not even a multiple of a sector: all of its requests are odd."""
    image = tmp_path / "image"
    before = os.urandom(2 * SIZE)
    image.write_bytes(before)
    with attached(image, sector=sector) as disk:
        file = f"driver=host_device,node-name=f,filename={disk},cache.direct=on,discard=unmap"
        raw = f"driver=raw,node-name=disk,file=f,offset=1000,size={SIZE},discard=unmap"
        expected = bytearray(before[1000 : 1000 + SIZE])
        with serve(file, raw) as daemon, Device(daemon.socket("e"), queues=QUEUES) as device:
            assert device.read(0, MIB) == expected[:MIB]
            scribble(device, expected)
            device.disconnect()
            assert daemon.terminate() == 0
        judge = f"driver=raw,offset=1000,size={SIZE},file.driver=host_device,file.filename={disk}"
        judge += ",file.cache.direct=on"
        qemu("qemu-img", "convert", "--image-opts", "-O", "raw", judge, str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == expected
        after = Path(disk).read_bytes()
    assert after[:1000] == before[:1000]
    assert after[1000 + SIZE :] == before[1000 + SIZE :]


def test_a_file_whose_beginning_is_a_hole(disk: str, tmp_path: Path) -> None:
    """The kernel takes any read of a hole: the file's disk tells what its blocks are."""
    with mounted(disk, tmp_path / "mount"):
        image = tmp_path / "mount" / "image"
        image.touch()
        os.truncate(image, MIB)
        nodes = [
            f"driver=file,node-name=f,filename={image},cache.direct=on",
            "driver=raw,node-name=disk,file=f",
        ]
        with serve(*nodes) as daemon, Device(daemon.socket("e")) as device:
            device.write(SECTOR, b"s" * SECTOR)
            device.flush()
            assert device.read(0, 2 * SECTOR) == bytes(SECTOR) + b"s" * SECTOR
        assert image.read_bytes() == (bytes(SECTOR) + b"s" * SECTOR).ljust(MIB, b"\0")
