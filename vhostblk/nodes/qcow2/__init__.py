# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2, QEMU's image format: driver.py is the node, the others are its parts."""

from vhostblk.nodes.qcow2.driver import Qcow2

__all__ = ["Qcow2"]
