# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets: where they come from, and that they do not go anywhere else."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import Host, refused, with_host

from vhostblk.objects.secret import Secret
from vhostblk.secret import SecretBytes

WORDS = "correct horse battery staple"


def secret_of(host: Host, id: str = "s") -> bytes:
    return bytes(host.backend.objects.find(id, Secret).data.view())


async def add(host: Host, type: str = "secret", id: str = "s", **options: Any) -> None:
    await host.backend.object_add({"qom-type": type, "id": id, **options})


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def test_each_source() -> None:
    async def test(host: Host) -> None:
        file = Path(host.path("file"))
        file.write_text(WORDS + "\n")
        read, write = os.pipe()
        os.write(write, WORDS.encode())
        os.close(write)
        with environment(CREDENTIALS_DIRECTORY=str(host.directory)):
            await add(host, id="credential", credential="file")
        await add(host, id="data", data=WORDS)
        await add(host, id="file", file=str(file))
        await add(host, id="fd", fd=read)
        os.close(read)
        assert secret_of(host, "data") == secret_of(host, "fd") == WORDS.encode()
        # As with QEMU and cryptsetup --key-file, a newline is part of it.
        assert secret_of(host, "file") == secret_of(host, "credential") == WORDS.encode() + b"\n"

    with_host(test)


def test_base64() -> None:
    async def test(host: Host) -> None:
        key = os.urandom(64)
        text = base64.encodebytes(key).decode()
        await add(host, data=text, format="base64")
        assert secret_of(host) == key
        with refused("not base64"):
            await add(host, id="bad", data="%%%", format="base64")

    with_host(test)


def test_encrypted_with_another_secret() -> None:
    """As QEMU's documentation has it done with openssl."""

    async def test(host: Host) -> None:
        key, iv = os.urandom(32), os.urandom(16)
        encrypted = subprocess.run(
            ["openssl", "enc", "-aes-256-cbc", "-a", "-K", key.hex(), "-iv", iv.hex()],
            input=WORDS.encode(),
            capture_output=True,
            check=True,
        ).stdout.decode()
        await add(host, id="master", data=base64.b64encode(key).decode(), format="base64")
        given = {"data": encrypted, "iv": base64.b64encode(iv).decode()}
        await add(host, keyid="master", **given)
        assert secret_of(host) == WORDS.encode()
        with refused("in use", "object 's'"):
            await host.backend.object_del("master")
        await host.backend.object_del("s")
        await host.backend.object_del("master")
        with refused('secret "master" not found'):
            await add(host, keyid="master", **given)

    with_host(test)


def new_key(content: bytes) -> int:
    """A key in the keyring of this process (add_key(2), which has no wrapper in libc)."""
    number = {"x86_64": 248, "aarch64": 217}.get(platform.machine())
    if number is None:
        pytest.skip("the number of add_key on this machine is not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    process_keyring = -2
    serial = libc.syscall(
        ctypes.c_long(number), b"user", b"vhostblk-test", content,
        ctypes.c_size_t(len(content)), ctypes.c_int(process_keyring),
    )  # fmt: skip
    if serial < 0:
        pytest.skip(f"no keyring here: {os.strerror(ctypes.get_errno())}")
    return int(serial)


def test_keyring() -> None:
    async def test(host: Host) -> None:
        await add(host, "secret_keyring", serial=new_key(WORDS.encode()))
        assert secret_of(host) == WORDS.encode()
        with refused("keyring cannot be read"):
            await add(host, "secret_keyring", id="none", serial=1)

    with_host(test)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ("no content", "file, credential, fd, data")),
        ({"data": "a", "file": "b"}, ("data and file", "not both")),
        ({"file": "/nonexistent"}, ("Unable to read /nonexistent", "No such file")),
        ({"credential": "x"}, ("no credential 'x'",)),
        ({"fd": 1000}, ("file descriptor 1000", "Bad file descriptor")),
        ({"data": "a", "keyid": "k"}, ("'iv' is missing",)),
        ({"dta": "a"}, ("'dta' is unexpected", "did you mean 'data'?")),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], said: tuple[str, ...]) -> None:
    async def test(host: Host) -> None:
        with environment(CREDENTIALS_DIRECTORY=str(host.directory)), refused(*said):
            await add(host, **options)
        assert not host.backend.objects.has("s", "secret")

    with_host(test)


def test_no_query_shows_it() -> None:
    async def test(host: Host) -> None:
        await add(host, data=WORDS)
        [found] = list(host.backend.objects)
        assert WORDS not in repr(found.properties()) + repr(found.options) + repr(vars(found))
        with refused("not found"):
            host.backend.objects.qom_get("/objects/s", "data")
        assert found.state_options() is None

    with_host(test)


def test_it_is_wiped_when_it_is_deleted() -> None:
    async def test(host: Host) -> None:
        await add(host, data=WORDS)
        data = host.backend.objects.find("s", Secret).data
        view = data.view()
        await host.backend.object_del("s")
        assert bytes(view) == bytes(len(WORDS))
        with pytest.raises(ValueError, match="wiped"):
            data.view()

    with_host(test)


def flags_of(address: int) -> tuple[set[str], int]:
    """What the kernel says of the memory at an address: flags, and KiB that are locked."""
    with open("/proc/self/smaps") as smaps:
        inside, locked = False, 0
        for line in smaps:
            head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if head:
                inside = int(head[1], 16) <= address < int(head[2], 16)
            elif inside and line.startswith("Locked:"):
                locked = int(line.split()[1])
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:]), locked
    raise AssertionError("no such memory")


def test_memory_is_locked_and_stays_out_of_dumps_and_children() -> None:
    with SecretBytes(WORDS.encode()) as secret:
        flags, locked = flags_of(secret.address)
        assert {"lo", "dd", "wf"} <= flags  # locked, do not dump, wipe on fork
        assert locked >= 4
        child = os.fork()
        if child == 0:
            os._exit(0 if bytes(secret.view()) == bytes(len(secret)) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_secrets_do_not_tell_themselves() -> None:
    import copy
    import pickle

    with SecretBytes(WORDS.encode()) as secret:
        assert WORDS not in f"{secret} {secret!r}"
        for leak in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                leak(secret)
        assert secret == WORDS.encode()
        assert secret != b"other"
