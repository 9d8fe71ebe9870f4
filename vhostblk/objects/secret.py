# SPDX-License-Identifier: GPL-2.0-or-later
"""secret and secret_keyring: a passphrase or a key, for drivers that refer to it by id.

Options are QAPI's (SecretProperties, SecretKeyringProperties in qapi/crypto.json), with two more
places that a secret can come from: `fd` and `credential`. The secret itself is kept in locked
memory and never shown again; docs/luks.md says what is remembered over a restart.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from vhostblk.objects import BackendObject, ObjectOptions, register
from vhostblk.schema import Int, UInt32, VhostblkError
from vhostblk.secret import SecretBytes, forbid_core_dumps, source


class SecretCommonOptions(ObjectOptions):
    """Options of both types."""

    format: Literal["raw", "base64"] = "raw"
    """How the secret is written; what is written down is decoded."""
    keyid: str | None = None
    """Another secret, of 32 bytes, that this one is encrypted with (AES-256-CBC)."""
    iv: str | None = None
    """The initialization vector for that, in base64."""


class SecretOptions(SecretCommonOptions):
    """Options of secret."""

    data: str | None = None
    """The secret itself. On a command line everybody on the machine can read it: for tests."""
    file: str | None = None
    """A file with the secret; all of it, a newline at the end included."""
    fd: UInt32 | None = None
    """An open file to read it from, such as a pipe."""
    credential: str | None = None
    """A credential of systemd (LoadCredential=)."""


class SecretKeyringOptions(SecretCommonOptions):
    """Options of secret_keyring."""

    serial: Int
    """Serial number of the key in the kernel's keyring."""


class Secret(BackendObject):
    """A secret, whatever its type."""

    qom_type = "secret"
    options: SecretCommonOptions

    async def open(self) -> None:
        options = self.options
        if (options.keyid is None) != (options.iv is None):
            missing = "iv" if options.iv is None else "keyid"
            raise VhostblkError(
                f"Parameter '{missing}' is missing: an encrypted secret has keyid and iv",
                data={"code": "missing-parameter", "parameter": missing},
            )
        forbid_core_dumps()
        self._master: Secret | None = None
        found = self._load()
        try:
            if options.keyid is not None and options.iv is not None:
                # An encrypted secret is always base64 (crypto/secret_common.c).
                with found:
                    plain = source.decode_base64(found)
                found = plain
                self._master = self.store.use(options.keyid, Secret, f"object '{self.id}'")
                with found:
                    found = source.decrypt(plain, self._master.data.view(), options.iv)
            if options.format == "base64":
                with found:
                    found = source.decode_base64(found)
        except BaseException:
            found.close()
            self._release()
            raise
        self._data = found

    async def close(self) -> None:
        self._data.close()
        self._release()

    @property
    def data(self) -> SecretBytes:
        """The secret; the object wipes it when it is deleted."""
        return self._data

    def _load(self) -> SecretBytes:
        raise NotImplementedError

    def _release(self) -> None:
        if self._master is not None:
            self.store.release(f"object '{self.id}'", self._master)
            self._master = None


@register
class SecretObject(Secret):
    """A secret given as data, or found in a file, an open file, or a credential of systemd."""

    qom_type = "secret"
    Options = SecretOptions
    options: SecretOptions

    def _load(self) -> SecretBytes:
        options = self.options
        places = {
            "data": options.data,
            "file": options.file,
            "fd": options.fd,
            "credential": options.credential,
        }
        given = [name for name, value in places.items() if value is not None]
        if len(given) != 1:
            text = (
                f"give one of {' and '.join(given)}, not both"
                if given
                else "it has no content: give one of file, credential, fd, data"
            )
            raise VhostblkError(
                f"secret '{self.id}': {text}", data={"code": "bad-secret", "id": self.id}
            )
        if options.file is not None:
            try:
                return source.read_file(options.file)
            except OSError as error:
                raise VhostblkError(
                    f"secret '{self.id}': Unable to read {options.file}: {error.strerror}",
                    data={"code": "bad-secret", "id": self.id},
                ) from None
        if options.fd is not None:
            return source.read_fd(options.fd)
        if options.credential is not None:
            return source.read_credential(options.credential)
        assert options.data is not None
        secret = SecretBytes(options.data.encode())
        # What can be forgotten is forgotten; see memory.py about the rest.
        self.options = options.model_copy(update={"data": _GIVEN})
        return secret

    def properties(self) -> dict[str, Any]:
        shown = super().properties()
        del shown["data"]
        return shown

    def state_options(self) -> dict[str, Any] | None:
        options = self.options
        if options.data is not None or options.fd is not None:
            return None
        remembered = super().state_options()
        if remembered is not None and options.file is not None:
            remembered["file"] = os.path.abspath(options.file)
        return remembered


@register
class SecretKeyringObject(Secret):
    """A secret in the kernel's keyring."""

    qom_type = "secret_keyring"
    Options = SecretKeyringOptions
    options: SecretKeyringOptions

    def _load(self) -> SecretBytes:
        return source.read_keyring(self.options.serial)


_GIVEN = "***"
