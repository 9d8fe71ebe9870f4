# SPDX-License-Identifier: GPL-2.0-or-later
"""External snapshots: an overlay takes the place of a node, or of all legs of a drive at once.

`actions` says what the commands do, `overlay` makes images and nodes, `names`
gives both their names, `guest_agent` holds a guest's file systems still.
"""
