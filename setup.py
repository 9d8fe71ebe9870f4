# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the build that pyproject.toml cannot say.

The engine is compiled by cffi; it needs libvhost-user's source, and cffi_build/builder.py says
where that is looked for. And management software that starts vhost-user backends finds them through
a file which has to name an absolute path: that of the scripts of the Python that builds, or
`$VHOSTBLK_BINDIR` where a package is made for somewhere else.
"""

import json
import os
import sysconfig
from pathlib import Path

from setuptools import setup

# QEMU's docs/interop/vhost-user.json, "VhostUserBackend"; the number is for sorting.
DIRECTORY = "share/qemu/vhost-user"
DESCRIPTION = Path("build", DIRECTORY, "50-vhostblk.json")


def describe_backend() -> str:
    """Write the file; where it is."""
    scripts = os.environ.get("VHOSTBLK_BINDIR") or sysconfig.get_path("scripts")
    description = {
        "description": "vhostblk vhost-user-blk",
        "type": "block",
        "binary": os.path.join(os.path.abspath(scripts), "vhostblk-backend"),
    }
    DESCRIPTION.parent.mkdir(parents=True, exist_ok=True)
    DESCRIPTION.write_text(json.dumps(description, indent=2) + "\n")
    return str(DESCRIPTION)


setup(
    cffi_modules=["cffi_build/builder.py:ffibuilder"],
    data_files=[(DIRECTORY, [describe_backend()])],
    # One build serves every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
