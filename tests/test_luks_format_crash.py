# SPDX-License-Identifier: GPL-2.0-or-later
"""Headers survive a crash at any moment of any change.

`Memory.cut` makes what a disk with a volatile cache may hold when the power fails: everything
that was flushed, and of the writes since then any sectors. The kills are of the real command.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import fresh_process
import pytest
from luks_headers import CHEAP1, CHEAP2, MIB, QUICK, Memory, cryptsetup, opens, run, write_image
from thoroughness import tries

from vhostblk import luks
from vhostblk.schema import VhostblkError

ONE, TWO, THREE = b"one", b"two", b"three"
VERSIONS = pytest.mark.parametrize("options", [CHEAP1, CHEAP2], ids=["luks1", "luks2"])
SEEDS = tries(2)
SIZE = 20 * MIB


Change = Callable[[luks.Volume], Coroutine[Any, Any, Any]]


async def volume_with(options: dict[str, Any], *passphrases: bytes) -> tuple[Memory, luks.Volume]:
    storage = Memory()
    volume = await luks.create(storage, passphrases[0], luks.CreateOptions(**options))
    for more in passphrases[1:]:
        await volume.add_passphrase(passphrases[0], more, None, QUICK)
    storage.mark()
    return storage, volume


async def works(volume: luks.Volume, passphrase: bytes) -> bool:
    try:
        await volume.test(passphrase)
    except VhostblkError as error:
        assert (error.data or {})["code"] == "bad-passphrase", error
        return False
    return True


async def at_each_cut(
    options: dict[str, Any],
    before: tuple[bytes, ...],
    change: Change,
    judge: Callable[[set[bytes], bool], None],
    path: Path,
) -> None:
    """Carry out a change, and let `judge` see which passphrases work after each possible cut.

    Its second argument says whether the change had ended. Whatever is found can be changed
    further, by us and by cryptsetup.
    """
    storage, volume = await volume_with(options, *before)
    await change(volume)
    assert storage.steps[-1] is None, "a change ends with a flush"
    steps = len(storage.steps)
    for after in range(steps + 1):
        for seed in range(SEEDS if after < steps else 1):
            content = storage.cut(after, random.Random(1000 * after + seed))
            left = Memory(content)
            found = await luks.open_volume(left)
            working = {words for words in (ONE, TWO, THREE) if await works(found, words)}
            judge(working, after == steps)
            assert bytes(left.content) == content, "opening writes nothing"
            if seed == 0:
                write_image(path, content, SIZE)
                for words in (ONE, TWO, THREE):
                    assert opens(path, words) == (words in working)
            if seed == 1:
                # Go on from there: the next change finds its feet, and cryptsetup what it left.
                known = next(iter(working))
                await found.add_passphrase(known, b"later", None, QUICK)
                assert not found.damage
                write_image(path, left.content, SIZE)
                assert opens(path, b"later")
                assert opens(path, known)


@VERSIONS
@pytest.mark.parametrize("slot", [1, 6])
def test_adding(options: dict[str, Any], slot: int, tmp_path: Path) -> None:
    """Slot 6 of LUKS1 lies in two sectors."""

    def judge(working: set[bytes], done: bool) -> None:
        assert ONE in working
        assert TWO in working or not done

    async def change(volume: luks.Volume) -> None:
        await volume.add_passphrase(ONE, TWO, slot, QUICK)

    run(at_each_cut(options, (ONE,), change, judge, tmp_path / "image"))


@VERSIONS
def test_removing(options: dict[str, Any], tmp_path: Path) -> None:
    def judge(working: set[bytes], done: bool) -> None:
        assert ONE in working
        assert TWO not in working or not done

    async def change(volume: luks.Volume) -> None:
        await volume.remove_passphrase(TWO)

    run(at_each_cut(options, (ONE, TWO), change, judge, tmp_path / "image"))


@VERSIONS
def test_rotating(options: dict[str, Any], tmp_path: Path) -> None:
    def judge(working: set[bytes], done: bool) -> None:
        assert ONE in working
        assert {TWO, THREE} & working
        if done:
            assert working == {ONE, THREE}

    async def change(volume: luks.Volume) -> None:
        await volume.rotate(TWO, THREE, kdf_options=QUICK)

    run(at_each_cut(options, (ONE, TWO), change, judge, tmp_path / "image"))


@VERSIONS
def test_rotating_the_only_passphrase(options: dict[str, Any], tmp_path: Path) -> None:
    def judge(working: set[bytes], done: bool) -> None:
        assert {ONE, TWO} & working
        assert working == {TWO} or not done

    async def change(volume: luks.Volume) -> None:
        await volume.rotate(ONE, TWO, kdf_options=QUICK)

    run(at_each_cut(options, (ONE,), change, judge, tmp_path / "image"))


@VERSIONS
def test_creating(options: dict[str, Any]) -> None:
    """A volume, or none at all; never one that the passphrase does not open."""

    async def work() -> None:
        # Over an old one, whose header must not become that of the new disk.
        storage, _ = await volume_with(CHEAP2 | {"metadata_size": 65536}, TWO)
        await luks.create(storage, ONE, luks.CreateOptions(**options))
        for after in range(len(storage.steps) + 1):
            for seed in range(SEEDS):
                left = Memory(storage.cut(after, random.Random(1000 * after + seed)))
                try:
                    found = await luks.open_volume(left)
                except VhostblkError as error:
                    assert (error.data or {})["code"] in ("not-luks", "bad-luks-header")
                    assert after < len(storage.steps)
                    continue
                old = not storage.steps[:after].count(None)
                assert await works(found, ONE) or (old and found.version == 2)

    run(work())


@pytest.mark.parametrize("copy", ["first", "second"])
def test_repairing(copy: str, tmp_path: Path) -> None:
    """The good copy is not touched while the damaged one is written again."""
    path = tmp_path / "image"

    async def work() -> None:
        storage, volume = await volume_with(CHEAP2, ONE)
        assert isinstance(volume, luks.Luks2)
        at = 0 if copy == "first" else volume.header_size
        storage.content[at + 5000 : at + 5010] = b"0123456789"
        storage.mark()
        found = await luks.open_volume(storage)
        assert len(found.damage) == 1
        assert copy in found.damage[0]
        # Any change repairs first.
        await found.add_passphrase(ONE, TWO, None, QUICK)
        assert not found.damage
        for after in range(len(storage.steps) + 1):
            for seed in range(SEEDS):
                left = await luks.open_volume(
                    Memory(storage.cut(after, random.Random(1000 * after + seed)))
                )
                assert await works(left, ONE)
        write_image(path, storage.content, SIZE)

    run(work())
    assert opens(path, ONE)
    assert opens(path, TWO)


def test_cryptsetup_repairs_what_we_cut(tmp_path: Path) -> None:
    """Either copy lost: `cryptsetup repair` and ours agree on what remains."""

    async def work() -> bytes:
        storage, _ = await volume_with(CHEAP2, ONE)
        return bytes(storage.content).ljust(SIZE, b"\0")

    content = run(work())
    for at in (4096 + 100, 16384 + 4096 + 100):
        path = tmp_path / "image"
        path.write_bytes(content[:at] + b"lost" + content[at + 4 :])
        cryptsetup("repair", path)
        repaired = path.read_bytes()

        async def check(repaired: bytes = repaired) -> None:
            found = await luks.open_volume(Memory(repaired))
            assert not found.damage
            assert await works(found, ONE)

        run(check())


def test_a_header_that_something_else_replaced_is_not_brought_back_by_itself() -> None:
    """A file system over the first copy: it may be meant. Only `repair` overwrites it."""

    async def work() -> None:
        storage, _ = await volume_with(CHEAP2, ONE)
        storage.content[:512] = b"ext4".ljust(512, b"\1")
        found = await luks.open_volume(storage)
        assert "first copy" in found.damage[0]
        assert await works(found, ONE)
        storage.mark()
        with pytest.raises(VhostblkError, match="overwritten with something else"):
            await found.add_passphrase(ONE, TWO, None, QUICK)
        assert not storage.steps
        assert await found.repair()
        assert not (await luks.open_volume(storage)).damage

    run(work())


def test_metadata_are_replaced_at_once() -> None:
    """What re-encryption relies on: either all of the JSON or nothing of it."""

    async def work() -> None:
        storage, volume = await volume_with(CHEAP2, ONE)
        assert isinstance(volume, luks.Luks2)
        before, after = volume.metadata, volume.metadata
        after["tokens"] = {"0": {"type": "test", "keyslots": ["0"], "text": "x" * 5000}}
        async with volume.changing:
            await volume.write_metadata(after)
        seen = set()
        for step in range(len(storage.steps) + 1):
            for seed in range(20):
                left = await luks.open_volume(Memory(storage.cut(step, random.Random(seed))))
                assert isinstance(left, luks.Luks2)
                assert left.metadata in (before, after)
                seen.add(bool(left.metadata["tokens"]))
                if step >= 2:  # after the first flush
                    assert left.metadata == after
        assert seen == {False, True}

    run(work())


# ---- kill -9


def command(path: Path, change: str, directory: Path, **environment: str) -> int:
    for name, words in (("one", ONE), ("two", TWO), ("three", THREE)):
        (directory / name).write_bytes(words)
    words = {
        "add": ["--key-file", "one", "--new-key-file", "three"],
        "remove": ["--key-file", "two"],
        "rotate": ["--key-file", "two", "--new-key-file", "three"],
        "convert": [],
    }[change]
    if change in ("add", "rotate"):
        words += ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    return fresh_process.run(
        [*fresh_process.COMMAND, "luks", change, str(path), *words],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        timeout=60,
    ).returncode


@pytest.mark.parametrize(
    ("options", "change"),
    [
        *(
            (options, change)
            for options in (CHEAP1, CHEAP2)
            for change in ("add", "remove", "rotate")
        ),
        (CHEAP1, "convert"),
    ],
    ids=lambda value: value["version"] if isinstance(value, dict) else value,
)
def test_the_command_is_killed(options: dict[str, Any], change: str, tmp_path: Path) -> None:
    async def fresh() -> bytes:
        storage, _ = await volume_with(options, ONE, TWO)
        return bytes(storage.content)

    content = run(fresh())
    path = tmp_path / "image"
    for point in ("luks-write", "luks-flush"):
        for count in range(1, 30):
            write_image(path, content, SIZE)
            status = command(path, change, tmp_path, VHOSTBLK_FAULT=f"{point}:{count}")
            assert opens(path, ONE)
            if change == "rotate":
                assert opens(path, TWO) or opens(path, THREE)
            if change == "convert":
                assert opens(path, TWO)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            # What the dead process has left is no obstacle to the next.
            assert command(path, "add", tmp_path) == 0
            assert opens(path, THREE)
        assert count > 2, "it was killed at no point"
        assert status == 0
