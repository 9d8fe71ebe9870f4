# SPDX-License-Identifier: GPL-2.0-or-later
"""The graph of block nodes: who is whose child, and how that may change."""

from vhostblk.graph.block_backend import BlockBackend, Device
from vhostblk.graph.change import Change
from vhostblk.graph.edge import Edge, Parent
from vhostblk.graph.graph import PAUSE_PATIENCE, Graph

__all__ = ["PAUSE_PATIENCE", "BlockBackend", "Change", "Device", "Edge", "Graph", "Parent"]
