# SPDX-License-Identifier: GPL-2.0-or-later
"""vhostblk: a vhost-user-blk backend with a live tree of block nodes behind a guest's disk."""

__version__ = "0.1.0"
