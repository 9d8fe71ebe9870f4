# SPDX-License-Identifier: GPL-2.0-or-later
"""A power-cut harness: what may be on disk after a crash, and whether an image survives it.

A disk with a volatile cache keeps what was written before its last completed flush, and of what
came later any part, in any order, down to single sectors. So one run of a scenario stands for a
multitude of possible crashes:

* `recorder`, a filter between a format and its file, records every change of the file in order;
* `Recording` rebuilds the file as it could be on disk after a cut at any moment;
* `History` knows what the guest did, hence what each sector may read as after the cut;
* `Drive` is a guest that makes many requests at once and keeps its history;
* `PowerCut` chooses cuts (seeded) and lets QEMU's tools and our own driver judge the image;
* `Stage` puts all of them together for one test.
"""

from .drive import Drive, read_all
from .history import History, WrongContentError
from .judge import BrokenImageError, PowerCut, Report
from .recorder import Recorder
from .recording import Change, Clock, Recording, Survival
from .stage import Stage
from .tools import Tools, all_tools, newest_tools

__all__ = [
    "BrokenImageError",
    "Change",
    "Clock",
    "Drive",
    "History",
    "PowerCut",
    "Recorder",
    "Recording",
    "Report",
    "Stage",
    "Survival",
    "Tools",
    "WrongContentError",
    "all_tools",
    "newest_tools",
    "read_all",
]
