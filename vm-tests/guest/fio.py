# SPDX-License-Identifier: GPL-2.0-or-later
"""fio command lines for the guest: every job reads back and verifies what it has written."""

from __future__ import annotations


def fio(device: str, job: str) -> str:
    """A command that writes with O_DIRECT, then verifies; it fails on the first wrong block."""
    return (
        f"fio --name=job --filename={device} --eta=never --ioengine=libaio --direct=1"
        f" --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0 {job}"
    )
