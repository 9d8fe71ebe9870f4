# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the build that pyproject.toml cannot say: the engine is compiled by cffi.

Needs libvhost-user's source; cffi_build/builder.py says where it is looked for.
"""

from setuptools import setup

setup(
    cffi_modules=["cffi_build/builder.py:ffibuilder"],
    # One build serves every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
