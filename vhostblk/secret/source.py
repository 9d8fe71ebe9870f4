# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a secret comes from: data, a file, an open file, a systemd credential, the keyring.

Whatever it is, what it says ends up in a `SecretBytes`, taken as it is: a newline at the end of a
file is part of the secret, as with QEMU and with cryptsetup's --key-file. (The encodings base64
and UTF-8 of data are QAPI's, see SecretProperties and SecretKeyringProperties in qapi/crypto.json.)
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import errno
import os
import platform
import stat
from pathlib import Path

from vhostblk.schema import VhostblkError
from vhostblk.secret.memory import Buffer, SecretBytes, wipe

LARGEST = 8 << 20  # cryptsetup's largest key file
_CREDENTIALS = "CREDENTIALS_DIRECTORY"
_KEYCTL_READ = 11
# The number of keyctl(2), which has no wrapper in libc.
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}


def read_file(path: str | os.PathLike[str]) -> SecretBytes:
    """All of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read_all(fd, f"'{os.fspath(path)}'")
    finally:
        os.close(fd)


def read_fd(fd: int) -> SecretBytes:
    """All there is to read from an open file, such as a pipe that the starter has filled."""
    if fd < 0:
        raise _error(f"fd {fd} is not a file descriptor")
    try:
        return _read_all(fd, f"file descriptor {fd}")
    except OSError as error:
        raise _error(f"file descriptor {fd} cannot be read: {error.strerror}") from None


def read_credential(name: str) -> SecretBytes:
    """A credential that systemd has passed to the service (LoadCredential= and its like)."""
    directory = os.environ.get(_CREDENTIALS)
    if not directory:
        raise _error(
            f"there is no credential '{name}': ${_CREDENTIALS} is not set",
            hint="start vhostblk as a systemd service with LoadCredential= or "
            "LoadCredentialEncrypted=, or with systemd-run -p",
        )
    if "/" in name or name in ("", ".", ".."):
        raise _error(f"'{name}' is not the name of a credential")
    try:
        return read_file(Path(directory) / name)
    except FileNotFoundError:
        known = ", ".join(sorted(os.listdir(directory))) or "none"
        raise _error(f"there is no credential '{name}'; those passed: {known}") from None


def read_keyring(serial: int) -> SecretBytes:
    """The payload of a key of type `user` in the kernel's keyring."""
    number = _SYS_KEYCTL.get(platform.machine())
    if number is None:
        raise _error(f"the kernel's keyring is not supported on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    length = 0
    while True:
        with SecretBytes(length) as room:
            found = libc.syscall(
                ctypes.c_long(number),
                ctypes.c_long(_KEYCTL_READ),
                ctypes.c_long(serial),
                ctypes.c_void_p(room.address),
                ctypes.c_size_t(length),
            )
            if found < 0:
                reason = os.strerror(ctypes.get_errno())
                raise _error(f"key {serial:#x} of the kernel's keyring cannot be read: {reason}")
            if found <= length:
                return SecretBytes(room.view()[:found])
        if found > LARGEST:
            raise _error(f"key {serial:#x} has more than {LARGEST} bytes")
        length = found


def decode_base64(secret: SecretBytes) -> SecretBytes:
    """What base64 text stands for; white space does not matter."""
    text = bytearray(secret.view())
    try:
        compact = text.translate(None, b" \t\r\n")
        try:
            return SecretBytes(base64.b64decode(compact, validate=True))
        finally:
            wipe(compact)
    except (binascii.Error, ValueError):
        raise _error("the secret is not base64") from None
    finally:
        wipe(text)


def decrypt(secret: SecretBytes, key: Buffer, iv: str) -> SecretBytes:
    """A secret encrypted with AES-256-CBC, as QEMU's `keyid` and `iv` describe."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if len(key) != 32:
        raise _error(f"a master key has 32 bytes, not {len(key)}")
    try:
        vector = base64.b64decode(iv, validate=True)
    except (binascii.Error, ValueError):
        raise _error("'iv' is not base64") from None
    if len(vector) != 16:
        raise _error(f"'iv' should be 16 bytes in length, not {len(vector)}")
    if not len(secret) or len(secret) % 16:
        raise _error("the encrypted secret is not a multiple of 16 bytes long")
    decryptor = Cipher(algorithms.AES(bytes(key)), modes.CBC(vector)).decryptor()
    with SecretBytes(len(secret) + 16) as plain:
        view = plain.view()
        length = decryptor.update_into(secret.view(), view)
        padding = view[length - 1]
        # QEMU looks at the last byte only; with a wrong key the others show it more often.
        if not 1 <= padding <= 16 or view[length - padding : length] != bytes([padding]) * padding:
            raise _error("the secret does not decrypt: wrong master key or iv")
        return SecretBytes(view[: length - padding])


def _read_all(fd: int, what: str) -> SecretBytes:
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), what)
    with SecretBytes(LARGEST + 1) if _is_large(fd) else SecretBytes(65536) as room:
        view, length = room.view(), 0
        while length < len(view):
            done = os.readv(fd, [view[length:]])
            if not done:
                return SecretBytes(view[:length])
            length += done
    raise _error(f"{what}: a secret has less than {length} bytes")


def _is_large(fd: int) -> bool:
    return os.fstat(fd).st_size >= 65536


def _error(text: str, hint: str | None = None) -> VhostblkError:
    data = {"code": "bad-secret"}
    if hint:
        data["hint"] = hint
        text = f"{text}; {hint}"
    return VhostblkError(text, data=data)
