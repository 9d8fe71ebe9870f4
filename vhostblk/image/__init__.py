# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be said about the image behind a node while guests use it."""

from vhostblk.image.extent import Extent, agreed, merged

__all__ = ["Extent", "agreed", "merged"]
