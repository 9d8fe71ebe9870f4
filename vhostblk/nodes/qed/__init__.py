# SPDX-License-Identifier: GPL-2.0-or-later
"""qed: QEMU's enhanced disk format. See driver.py, and docs/images.md."""

from vhostblk.nodes.qed.driver import Qed

__all__ = ["Qed"]
