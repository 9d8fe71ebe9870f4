# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the bootable files are; scripts/build-guest-image makes them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 900


@dataclass(frozen=True)
class GuestImages:
    """The files of the two tiers of guests."""

    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def tiny_initrd(self) -> Path:
        """Holds a shell on the serial port and fio; needs no disk."""
        return self.directory / "tiny.img"

    @property
    def root_initrd(self) -> Path:
        """Mounts `root=` and starts its init."""
        return self.directory / "initrd.img"

    @property
    def debian_disk(self) -> Path:
        return self.directory / "disk.raw"

    @classmethod
    def existing(cls) -> GuestImages:
        """$VHOSTBLK_GUEST_DIR, or where scripts/build-guest-image puts its files."""
        return cls(Path(os.environ.get("VHOSTBLK_GUEST_DIR") or REPOSITORY / "build" / "guest"))

    @classmethod
    def build(cls, tier: str) -> None:
        """Make what is missing of a tier: seconds if everything is there."""
        images = cls.existing()
        if "VHOSTBLK_GUEST_DIR" in os.environ:
            return
        subprocess.run(
            [REPOSITORY / "scripts" / "build-guest-image", "--tier", tier, images.directory],
            check=True,
            timeout=BUILD_SECONDS,
            stdin=subprocess.DEVNULL,
        )
