# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about the key slots of encrypted disks in use.

Any node with a `volume` has them: luks, and qcow2 with LUKS inside. A passphrase is named by the
id of a secret object, or given in base64, which nothing remembers. Deriving keys takes seconds;
meanwhile the guest's I/O goes on, and so does the control socket for others.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vhostblk import luks
from vhostblk.control.registry import Context, Registry
from vhostblk.jobs.block_job import OnError
from vhostblk.luks.options import KdfOptions
from vhostblk.objects.secret import Secret
from vhostblk.schema import Model, OnOff, UInt32, UInt64, VhostblkError
from vhostblk.secret import SecretBytes, forbid_core_dumps

registry = Registry()
command = registry.command


class LuksNode(Model):
    """Arguments of luks-key-slot-list."""

    node_name: str
    """The encrypted node."""


@command("luks-key-slot-list")
async def luks_key_slot_list(context: Context, arguments: LuksNode) -> Any:
    """What the LUKS header of a node says, and its key slots. No passphrase is needed."""
    return luks.describe(_volume(context, arguments.node_name))


class LuksKeySlotTest(LuksNode):
    """Arguments of luks-key-slot-test."""

    key_secret: str | None = None
    """The secret with the passphrase."""
    key_data: str | None = None
    """Or the passphrase itself, in base64."""
    keyslot: UInt32 | None = None
    """The only slot to try."""


@command("luks-key-slot-test")
async def luks_key_slot_test(context: Context, arguments: LuksKeySlotTest) -> Any:
    """Whether a passphrase opens a key slot, and which one."""
    volume = _volume(context, arguments.node_name)
    with _Passphrases(context) as passphrases, _errors_of(arguments.node_name):
        key = passphrases.get("key", arguments.key_secret, arguments.key_data)
        return {"keyslot": await volume.test(key, arguments.keyslot)}


class LuksNewKeySlot(LuksNode, KdfOptions):
    """What the commands that make a slot have in common."""

    new_secret: str | None = None
    """The secret with the new passphrase."""
    new_data: str | None = None
    """Or the new passphrase itself, in base64."""


class LuksKeySlotAdd(LuksNewKeySlot):
    """Arguments of luks-key-slot-add."""

    key_secret: str | None = None
    """The secret with a passphrase that there is."""
    key_data: str | None = None
    """Or the passphrase itself, in base64."""
    keyslot: UInt32 | None = None
    """The slot to use; the first free one if absent."""


@command("luks-key-slot-add")
async def luks_key_slot_add(context: Context, arguments: LuksKeySlotAdd) -> Any:
    """Let one more passphrase unlock a disk."""
    volume = _writable(context, arguments.node_name)
    with _Passphrases(context) as passphrases, _errors_of(arguments.node_name):
        key = passphrases.get("key", arguments.key_secret, arguments.key_data)
        new = passphrases.get("new", arguments.new_secret, arguments.new_data)
        added = await volume.add_passphrase(key, new, arguments.keyslot, _kdf(arguments))
        return {"keyslot": added}


class LuksKeySlotRemove(LuksNode):
    """Arguments of luks-key-slot-remove."""

    keyslot: UInt32 | None = None
    """The slot to destroy."""
    old_secret: str | None = None
    """Or the secret with the passphrase whose slots are to be destroyed."""
    old_data: str | None = None
    """Or that passphrase, in base64."""
    force: OnOff = False
    """Even the last one, after which nobody can ever read the disk again."""


@command("luks-key-slot-remove")
async def luks_key_slot_remove(context: Context, arguments: LuksKeySlotRemove) -> Any:
    """Destroy a key slot, or all that a passphrase opens."""
    volume = _writable(context, arguments.node_name)
    if arguments.keyslot is not None:
        if arguments.old_secret is not None or arguments.old_data is not None:
            raise VhostblkError(
                "Give the key slot or a passphrase, not both", data={"code": "bad-value"}
            )
        with _errors_of(arguments.node_name):
            await volume.remove_slot(arguments.keyslot, force=arguments.force)
        return {"keyslots": [arguments.keyslot]}
    with _Passphrases(context) as passphrases:
        old = passphrases.get("old", arguments.old_secret, arguments.old_data)
        return {"keyslots": await volume.remove_passphrase(old, force=arguments.force)}


class LuksKeySlotRotate(LuksNewKeySlot):
    """Arguments of luks-key-slot-rotate."""

    old_secret: str | None = None
    """The secret with the passphrase to replace."""
    old_data: str | None = None
    """Or that passphrase, in base64."""
    keyslot: UInt32 | None = None
    """Its slot, if it has several."""


@command("luks-key-slot-rotate")
async def luks_key_slot_rotate(context: Context, arguments: LuksKeySlotRotate) -> Any:
    """Replace a passphrase: the new one works before the old one ceases to."""
    volume = _writable(context, arguments.node_name)
    with _Passphrases(context) as passphrases, _errors_of(arguments.node_name):
        old = passphrases.get("old", arguments.old_secret, arguments.old_data)
        new = passphrases.get("new", arguments.new_secret, arguments.new_data)
        return {"keyslot": await volume.rotate(old, new, arguments.keyslot, _kdf(arguments))}


@command("luks-convert")
async def luks_convert(context: Context, arguments: LuksNode) -> Any:
    """Make a LUKS1 header LUKS2: same key, same passphrases. QEMU cannot open it any more."""
    from vhostblk.jobs.luks_reencrypt import find_node

    node = find_node(context.backend, arguments.node_name)
    with _errors_of(node.name):
        node.volume = await luks.convert(node.volume)
    return luks.describe(node.volume)


class LuksReencrypt(LuksNode, KdfOptions):
    """Arguments of luks-reencrypt."""

    job_id: str | None = None
    """What the job is called; reencrypt-NODE if absent."""
    secrets: tuple[str, ...] = ()
    """Passphrases that the new key is to have, besides that of the node."""
    speed: UInt64 = 0
    """Bytes per second; 0: no limit."""
    on_error: OnError = "report"
    """What happens when something cannot be read or written."""
    force: OnOff = False
    """Although images behind an overlay can only be opened with the detached header as it is."""
    auto_finalize: OnOff = True
    auto_dismiss: OnOff = True


@command("luks-reencrypt")
async def luks_reencrypt(context: Context, arguments: LuksReencrypt) -> Any:
    """Begin a job that gives a disk another key, or its first one; or have it go on."""
    from vhostblk.jobs.luks_reencrypt import find_node, start_reencryption

    backend = context.backend
    async with backend.changing():
        node = find_node(backend, arguments.node_name)
        # What opens the node now has to open it at the next start.
        secrets = dict.fromkeys([node.options.key_secret, *arguments.secrets])
        names = ("speed", "on_error", "force", "auto_finalize", "auto_dismiss")
        options = {name: getattr(arguments, name) for name in names}
        job = start_reencryption(
            backend, node, list(secrets), arguments.job_id, kdf=_kdf(arguments), **options
        )
    return {"job-id": job.id}


def _kdf(arguments: KdfOptions) -> KdfOptions:
    """What trying the new passphrase is to cost."""
    return KdfOptions(**{name: getattr(arguments, name) for name in KdfOptions.model_fields})


def _volume(context: Context, name: str) -> luks.Volume:
    node = context.backend.graph.node(name)
    volume = getattr(node, "volume", None)
    if not isinstance(volume, luks.Volume):
        raise VhostblkError(
            f"Node '{name}' (driver {node.driver}) has no LUKS header",
            data={"code": "not-luks", "node-name": name},
        )
    return volume


def _writable(context: Context, name: str) -> luks.Volume:
    volume = _volume(context, name)
    if context.backend.graph.node(name).read_only:
        raise VhostblkError(
            f"Node '{name}' is read-only", data={"code": "read-only", "node-name": name}
        )
    return volume


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """What the storage says; the node may also have gone while a key was derived."""
    try:
        yield
    except OSError as error:
        raise VhostblkError(
            f"The LUKS header of node '{name}' cannot be read or written: {error.strerror}; what "
            "was to be changed may be changed or not",
            data={"code": "luks-io", "node-name": name},
        ) from None


class _Passphrases:
    """The passphrases of one command; secrets cannot be deleted while it runs."""

    def __init__(self, context: Context) -> None:
        self._objects = context.backend.objects
        self._stack = ExitStack()

    def __enter__(self) -> _Passphrases:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str, id: str | None, data: str | None) -> SecretBytes:
        """The passphrase that is meant by NAME-secret or NAME-data."""
        if (id is None) == (data is None):
            text = "not both" if id is not None else "it is missing"
            raise VhostblkError(
                f"Parameter '{name}-secret' or '{name}-data': {text}",
                data={"code": "missing-parameter", "parameter": f"{name}-secret"},
            )
        if data is not None:
            return self._stack.enter_context(_decoded(name, data))
        assert id is not None
        user = f"a command about key slots ({id:.40})"
        found = self._objects.use(id, Secret, user)
        self._stack.callback(self._objects.release, user, found)
        return found.data


@contextmanager
def _decoded(name: str, data: str) -> Iterator[SecretBytes]:
    forbid_core_dumps()
    try:
        words = b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise VhostblkError(
            f"Parameter '{name}-data' is not base64",
            data={"code": "bad-value", "parameter": f"{name}-data"},
        ) from None
    with SecretBytes(words) as secret:
        yield secret
