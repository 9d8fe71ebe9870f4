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
    def build(cls, tier: str) -> GuestImages:
        """Make what is missing of a tier: seconds if everything is there."""
        directory = Path(os.environ.get("VHOSTBLK_GUEST_DIR") or REPOSITORY / "build" / "guest")
        images = cls(directory)
        if "VHOSTBLK_GUEST_DIR" not in os.environ:
            subprocess.run(
                [REPOSITORY / "scripts" / "build-guest-image", "--tier", tier, directory],
                check=True,
                timeout=BUILD_SECONDS,
                stdin=subprocess.DEVNULL,
            )
        wanted = [images.kernel, images.tiny_initrd]
        if tier == "debian":
            wanted = [images.kernel, images.root_initrd, images.debian_disk]
        for path in wanted:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: run scripts/build-guest-image")
        return images
