# SPDX-License-Identifier: GPL-2.0-or-later
"""What throttle groups do. Limits are changed with qom-set, as in QEMU."""

from __future__ import annotations

from typing import Any

from vhostblk.control.registry import Context, NoArguments, Registry
from vhostblk.objects.throttle_group import ThrottleGroup

registry = Registry()


@registry.command("query-throttle-groups", oob=True)
async def query_throttle_groups(context: Context, arguments: NoArguments) -> Any:
    """Limits, users and statistics of all throttle groups.

    `statistics` has an entry for reads, writes (discards and zero writes included) and
    flushes: requests and bytes that have passed, requests that wait, those that had to, and for
    how many nanoseconds all together.
    """
    return [
        {
            "id": entry.id,
            "limits": entry.options.limits.model_dump(by_alias=True),
            "users": list(entry.users),
            "statistics": entry.statistics(),
        }
        for entry in context.backend.objects
        if isinstance(entry, ThrottleGroup)
    ]
