# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree as last changed, kept in a file so that it survives the process.

`file` knows how to keep a document safe on disk, `document` what is in it.
"""

from vhostblk.state.document import (
    Document,
    describe,
    restore,
    unfinished,
    with_frozen_guests,
)
from vhostblk.state.file import StateFile

__all__ = ["Document", "StateFile", "describe", "restore", "unfinished", "with_frozen_guests"]
