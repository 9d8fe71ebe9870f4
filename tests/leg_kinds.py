# SPDX-License-Identifier: GPL-2.0-or-later
"""Legs of a quorum with the same content, stored in every way there is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from dedup_lab import new_store, run_job
from in_process import MIB, Host
from luks_headers import CHEAP1, header

KIB = 1024
SIZE = 4 * MIB
PASSPHRASE = "the passphrase"

GRANULARITIES = {
    "raw": 1,
    "direct": 4 * KIB,  # or less: the file system says
    "window": 1,
    "device": 512,
    "qcow2": 64 * KIB,
    "small": 4 * KIB,
    "large": 2 * MIB,
    "extended": 64 * KIB,
    "v2": 64 * KIB,
    "kept": 64 * KIB,
    "encrypted": 64 * KIB,
    "data-file": 1,
    "overlay": 64 * KIB,
    "copy-on-read": 64 * KIB,
    "qed": 64 * KIB,
    "dedup": 4 * KIB,
    "nested": 64 * KIB,
}
UNABLE = ("ignore", "luks", "v2-overlay", "ignore-data-file", "qed-ignore", "qcow2-ignore")


async def make(host: Host, kind: str, name: str, content: bytes, device: str = "") -> str:
    """A leg, `name`, of this kind. Its files are called NAME.*."""
    simple = {
        "raw": {},
        "direct": {"cache": {"direct": True}},
        "ignore": {"discard": "ignore"},
    }
    if kind in simple:
        await _file(host, name, content, **simple[kind])
    elif kind == "device":
        given = {"filename": device, "discard": "unmap"}
        await host.add("host_device", name, **given)
        await host.write(name, 0, content)
    elif kind == "window":
        await _file(host, f"{name}-file", bytes(96 * KIB + 512) + content + bytes(MIB))
        given = {"file": f"{name}-file", "offset": 96 * KIB + 512, "size": SIZE}
        await host.add("raw", name, **given)
    elif kind == "luks":
        start = await asyncio.to_thread(header, PASSPHRASE, CHEAP1)
        await _file(host, f"{name}-file", start + bytes(SIZE))
        given = {"file": f"{name}-file", "key_secret": "s", "discard": "unmap"}
        await host.add("luks", name, **given)
        await host.write(name, 0, content)
    elif kind == "dedup":
        await _file(host, f"{name}-file", bytes(4 * SIZE))
        await new_store(host, f"{name}-file", f"{name}-meta", size=SIZE)
        given = {"file": f"{name}-file", "metadata": host.path(f"{name}-meta"), "discard": "unmap"}
        await host.add("dedup", name, **given)
        await host.write(name, 0, content)
    elif kind == "nested":
        legs = [await make(host, "raw", f"{name}-0", content)]
        legs.append(await make(host, "qcow2", f"{name}-1", content))
        given = {"children": legs, "vote_threshold": 2}
        await host.add("quorum", name, **given)
    elif kind == "copy-on-read":
        await make(host, "overlay", f"{name}-overlay", content)
        await host.add("copy-on-read", name, file=f"{name}-overlay")
    else:
        await _image(host, kind, name, content)
    return name


async def _file(host: Host, name: str, content: bytes, **options: Any) -> None:
    path = Path(host.path(f"{name}.raw"))
    path.write_bytes(content)
    await host.add("file", name, filename=str(path), **{"discard": "unmap", **options})


async def _image(host: Host, kind: str, name: str, content: bytes) -> None:
    """A format's. An overlay has the content below."""
    driver = "qed" if kind.startswith("qed") else "qcow2"
    create: dict[str, dict[str, Any]] = {
        "small": {"cluster-size": 4 * KIB},
        "large": {"cluster-size": 2 * MIB},
        "extended": {"extended-l2": True},
        "v2": {"version": "v2"},
        "v2-overlay": {"version": "v2"},
        "encrypted": {"encrypt": {"format": "luks", "key-secret": "s", **_cheap()}},
    }
    add: dict[str, dict[str, Any]] = {
        "kept": {"discard_no_unref": True},
        "encrypted": {"encrypt": {"format": "luks", "key-secret": "s"}},
    }
    given, options = create.get(kind, {}), {"discard": "unmap", **add.get(kind, {})}
    await _file(host, f"{name}-file", b"")
    if kind.endswith("data-file"):
        discard = "ignore" if kind.startswith("ignore") else "unmap"
        await _file(host, f"{name}-data", b"", discard=discard)
        given = {"data-file": f"{name}-data", "data-file-raw": True}
        options["data_file"] = f"{name}-data"
    if kind.endswith("overlay"):
        Path(host.path(f"{name}-base.raw")).write_bytes(content)
        given |= {"backing-file": host.path(f"{name}-base.raw"), "backing-fmt": "raw"}
        options["allow_backing_from"] = str(host.directory)
    if kind.endswith("-ignore"):
        options["discard"] = "ignore"
    await run_job(host, {"driver": driver, "file": f"{name}-file", "size": SIZE, **given})
    await host.add(driver, name, file=f"{name}-file", **options)
    if not kind.endswith("overlay"):
        await host.write(name, 0, content)


def _cheap() -> dict[str, Any]:
    return {"pbkdf-force-iterations": 1000}


async def secret(host: Host) -> None:
    """What encrypted legs need."""
    await host.backend.object_add({"qom-type": "secret", "id": "s", "data": PASSPHRASE})


def space(host: Host, name: str) -> int:
    """Bytes that a leg's files take."""
    return sum(path.stat().st_blocks * 512 for path in host.directory.glob(f"{name}*.raw"))


async def contents(host: Host, names: list[str]) -> list[bytes]:
    """What each leg has, asked by itself."""
    return await asyncio.gather(*(host.read(name, 0, SIZE) for name in names))
