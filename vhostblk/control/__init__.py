# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: the QMP wire protocol, its commands and their schema."""
