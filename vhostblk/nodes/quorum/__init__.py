# SPDX-License-Identifier: GPL-2.0-or-later
"""quorum: the same data on several legs, read by vote.

driver.py     the node: options, events, what its legs do wrong
legs.py       a leg: its state and what it has missed
metadata.py   the file in which states survive
repair.py     copying: rebuilding a leg, comparing all of them
"""

from vhostblk.nodes.quorum.driver import Quorum

__all__ = ["Quorum"]
