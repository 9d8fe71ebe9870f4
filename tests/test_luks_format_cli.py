# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk luks` and `vhostblk create -f luks`, as an operator types them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest
from luks_headers import cryptsetup, metadata, opens, sparse

ONE, TWO = b"first passphrase", b"second\nwith \x00 bytes \xff"
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


def vhostblk(*words: object, stdin: bytes = b"", status: int = 0) -> str:
    """Run it; what it printed."""
    done = fresh_process.run(
        [*fresh_process.COMMAND, *map(str, words)],
        input=stdin,
        capture_output=True,
        timeout=100,
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == status, said
    assert "Traceback" not in said
    for secret in (ONE, TWO):
        assert secret not in done.stdout + done.stderr
    return said


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One that we have made."""
    path = tmp_path / "disk.luks"
    options = "version=luks2,pbkdf=pbkdf2,pbkdf-force-iterations=1000"
    said = vhostblk("create", "-f", "luks", "-o", options, "--key-file", "-", path, "32M",
                    stdin=ONE)  # fmt: skip
    assert f"{path}: luks2, 33554432 bytes" in said
    assert path.stat().st_size == (16 + 32) << 20
    return path


def test_a_digest_takes_as_long_as_cryptsetups(image: Path) -> None:
    """Where it is measured: an eighth of a second, and not what tests within one process have."""
    assert metadata(image)["digests"]["0"]["iterations"] > 10_000


def test_the_life_of_a_passphrase(tmp_path: Path, image: Path) -> None:
    new = tmp_path / "new"
    new.write_bytes(TWO)
    assert "opens key slot 0" in vhostblk("luks", "test", image, "--key-file", "-", stdin=ONE)
    said = vhostblk("luks", "add", image, "--slot", 5, "--key-file", "-", "--new-key-file", new,
                    *CHEAP, stdin=ONE)  # fmt: skip
    assert "key slot 5" in said
    assert opens(image, ONE)
    assert opens(image, TWO)
    told = json.loads(vhostblk("luks", "list", image, "--json"))
    assert [(slot["slot"], slot["state"]) for slot in told["slots"]] == [
        (0, "active"), (5, "active")]  # fmt: skip
    shown = vhostblk("luks", "list", image)
    assert "LUKS2, aes-xts-plain64 with a key of 512 bits" in shown
    assert shown.count("pbkdf2-sha256, 1000 iterations") == 2
    third = tmp_path / "third"
    third.write_bytes(b"third")
    vhostblk("luks", "rotate", image, "--key-file", new, "--new-key-file", third, *CHEAP)
    assert not opens(image, TWO)
    assert opens(image, b"third")
    vhostblk("luks", "remove", image, "--slot", 0)
    assert not opens(image, ONE)
    said = vhostblk("luks", "remove", image, "--key-file", third, status=1)
    assert "last key slot" in said
    assert "force" in said
    vhostblk("luks", "remove", image, "--key-file", third, "--force")
    assert "nobody can read" in vhostblk("luks", "list", image)


def test_a_wrong_passphrase_says_nothing_else(image: Path) -> None:
    said = vhostblk("luks", "test", image, "--key-file", "-", stdin=TWO, status=1)
    assert said == "vhostblk: Invalid password, cannot unlock any keyslot\n"
    # And nothing has been asked for the new one, nor written.
    before = image.read_bytes()
    assert said == vhostblk("luks", "add", image, "--key-file", "-", stdin=TWO, status=1)
    assert image.read_bytes() == before


def test_the_terminal_is_asked_and_shows_nothing(image: Path) -> None:
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vhostblk", "luks", "test", str(image)],
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)
    seen = b""
    while b"Passphrase: " not in seen:
        seen += os.read(main, 1000)
    os.write(main, ONE + b"\n")
    while b"key slot 0" not in seen:
        seen += os.read(main, 1000)
    assert process.wait(30) == 0
    os.close(main)
    assert ONE not in seen


def test_without_a_terminal_it_says_what_to_do(image: Path) -> None:
    said = vhostblk("luks", "test", image, status=2)
    assert "--key-file" in said


def test_no_option_takes_a_passphrase() -> None:
    """Command lines are public: a passphrase is never in one."""
    for command in ("test", "add", "remove", "rotate"):
        said = vhostblk("luks", command, "--help")
        options = {word.strip("[],") for word in said.split() if word.startswith(("--", "[--"))}
        assert {"--key-file", "--key-fd", "--key-credential"} <= options
        assert not options & {"--key", "--passphrase", "--password", "--key-data"}


def test_an_image_in_use_is_left_alone(image: Path) -> None:
    from vhostblk.luks.file import open_storage

    with open_storage(str(image), write=True):
        said = vhostblk("luks", "list", image, status=1)
        assert "in use" in said
    with open_storage(str(image), write=False):
        vhostblk("luks", "list", image)
        said = vhostblk("luks", "remove", image, "--slot", 0, "--force", status=1)
        assert "in use" in said
    with open(image) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as cryptsetup does
        assert "in use" in vhostblk("luks", "list", image, status=1)


def test_repair(image: Path) -> None:
    good = image.read_bytes()
    assert "nothing to repair" in vhostblk("luks", "repair", image)
    with open(image, "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert "damage: first copy" in vhostblk("luks", "list", image)
    assert "repaired: first copy" in vhostblk("luks", "repair", image)
    assert "damage" not in vhostblk("luks", "list", image)
    cryptsetup("luksDump", image)
    assert opens(image, ONE)
    assert image.read_bytes()[32768:] == good[32768:]


def test_a_detached_header(tmp_path: Path) -> None:
    header, data = tmp_path / "header", tmp_path / "data"
    said = vhostblk("create", "-f", "luks", "-o", "pbkdf-force-iterations=1000", "--key-file", "-",
                    "--header", header, data, "8M", stdin=ONE)  # fmt: skip
    assert "luks1" in said
    assert data.read_bytes() == bytes(8 << 20)
    assert opens(data, ONE, "--header", header)
    assert "data from 0 B on" in vhostblk("luks", "list", header)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["luks", "lsit", "x"], "did you mean 'list'"),
        (["luks", "list", "/nonexistent/file"], "there is no file"),
        (["create", "-f", "luks", "-o", "vrsion=luks2", "X", "1M"], "did you mean 'version'"),
        (["create", "-f", "luks", "-o", "cipher-alg=serpent-256", "X", "1M"], "serpent"),
        (["create", "-f", "luks", "-o", "sector-size=4096", "X", "1M"], "LUKS1 does not"),
        (["create", "-f", "luks", "-o", "sector-size=4096,version=luks2", "X", "1000"],
         "not a multiple"),
        (["create", "-f", "raw", "--key-file", "-", "X", "1M"], "raw has no passphrase"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, words: list[str], said: str) -> None:
    target = tmp_path / "new"
    words = [str(target) if word == "X" else word for word in words]
    if words[0] == "create" and "--key-file" not in words:
        words += ["--key-file", "-"]
    done = fresh_process.run(
        [*fresh_process.COMMAND, *words], input=ONE, capture_output=True, timeout=60
    )
    assert done.returncode in (1, 2)
    assert said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert not target.exists()


def test_an_existing_image_is_not_overwritten(tmp_path: Path) -> None:
    path = sparse(tmp_path / "image")
    said = vhostblk("create", "-f", "luks", "--key-file", "-", path, "1M", stdin=ONE, status=1)
    assert "--force" in said


def test_what_was_there_before_does_not_come_back(tmp_path: Path) -> None:
    """The second copy of an older header would be found when the first is lost."""
    path = sparse(tmp_path / "image")
    cryptsetup("luksFormat", "--type", "luks2", "--luks2-metadata-size", "64k", *CHEAP, path,
               key=TWO)  # fmt: skip
    options = "version=luks2,pbkdf=pbkdf2,pbkdf-force-iterations=1000"
    vhostblk("create", "-f", "luks", "-o", options, "--force", "--key-file", "-", path, "16M",
             stdin=ONE)  # fmt: skip
    for magic in (b"LUKS\xba\xbe", b"SKUL\xba\xbe"):
        assert path.read_bytes().count(magic) == 1
