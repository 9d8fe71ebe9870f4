# SPDX-License-Identifier: GPL-2.0-or-later
"""The graph of block nodes: who is whose child, and how that may change."""

from vhostblk.graph.block_backend import BlockBackend, Device
from vhostblk.graph.graph import Edge, Graph

__all__ = ["BlockBackend", "Device", "Edge", "Graph"]
