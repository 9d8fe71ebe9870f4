# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m vhostblk`, the same as the `vhostblk` command."""

import sys

from vhostblk.cli import main

sys.exit(main())
