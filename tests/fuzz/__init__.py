# SPDX-License-Identifier: GPL-2.0-or-later
"""Random hostile sessions; see README.md."""
