# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors of this package; `data.code` says which kind one is."""

from __future__ import annotations

from vhostblk.schema import VhostblkError


def error(code: str, text: str, hint: str | None = None) -> VhostblkError:
    """An error with a code and what to do about it."""
    # What a header says may be meant to confuse a terminal.
    text = "".join(sign if sign.isprintable() else "?" for sign in text[:250])
    data = {"code": code}
    if hint is not None:
        data["hint"] = hint
        text = f"{text}; {hint}"
    return VhostblkError(text, data=data)


def not_luks() -> VhostblkError:
    """There is no header."""
    return error("not-luks", "there is no LUKS header")


def bad_header(text: str) -> VhostblkError:
    """The header is damaged, or was never right."""
    return error("bad-luks-header", f"LUKS header: {text}")


def bad_passphrase() -> VhostblkError:
    """QEMU's words, and nothing about why: neither which slots there are nor what was tried."""
    return error("bad-passphrase", "Invalid password, cannot unlock any keyslot")


def unsupported(text: str, hint: str | None = None) -> VhostblkError:
    """A cipher, hash or KDF that is not to be had here."""
    return error("luks-unsupported", text, hint)


def too_costly(text: str, hint: str | None = None) -> VhostblkError:
    """The header asks for more work or memory than the operator allows."""
    raised = "if the header can be trusted, raise the limit (max-memory, max-iterations)"
    return error("luks-cost", text, hint or raised)


def no_slot(text: str, hint: str | None = None) -> VhostblkError:
    """Something about key slots that cannot be."""
    return error("luks-slots", text, hint)


def bad_option(parameter: str, text: str) -> VhostblkError:
    """A value that an option cannot have."""
    return VhostblkError(
        f"Parameter '{parameter}': {text}", data={"code": "bad-value", "parameter": parameter}
    )
