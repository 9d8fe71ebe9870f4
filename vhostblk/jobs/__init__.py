# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs in the background: jobs, as QEMU knows them.

`job` is the life of one, `store` all there are, and each kind of job has a
module of its own.
"""

from vhostblk.jobs.job import Job, JobStatus
from vhostblk.jobs.store import JobStore

__all__ = ["Job", "JobStatus", "JobStore"]
