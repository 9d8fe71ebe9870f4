# SPDX-License-Identifier: GPL-2.0-or-later
"""Options and errors in QAPI's shape: one schema for key=value, JSON, YAML and QMP.

A `Model` describes the members of an object; `validate()` turns plain data into
an instance of one, or into a `VhostblkError` whose sentence names the
parameter, the value, what is allowed, and the nearest correct name.
"""

from vhostblk.schema.errors import (
    CommandNotFound,
    DeviceNotActive,
    DeviceNotFound,
    VhostblkError,
    did_you_mean,
)
from vhostblk.schema.model import (
    BlockdevRef,
    Identifier,
    Int,
    Model,
    NodeName,
    OnOff,
    Size,
    StrOrList,
    UInt16,
    UInt32,
    UInt63,
    UInt64,
    id_wellformed,
    in_range,
    json_types,
    parse_size,
)
from vhostblk.schema.validation import validate

__all__ = [
    "BlockdevRef",
    "CommandNotFound",
    "DeviceNotActive",
    "DeviceNotFound",
    "Identifier",
    "Int",
    "Model",
    "NodeName",
    "OnOff",
    "Size",
    "StrOrList",
    "UInt16",
    "UInt32",
    "UInt63",
    "UInt64",
    "VhostblkError",
    "did_you_mean",
    "id_wellformed",
    "in_range",
    "json_types",
    "parse_size",
    "validate",
]
