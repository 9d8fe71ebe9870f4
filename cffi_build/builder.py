# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds ``vhostblk._engine``: the engine in C, libvhost-user under it, cffi's glue on top.

``engine/api.h``, ``engine/*.api.h`` and each node's ``engine/nodes/NAME.api.h`` are the cdef: what
they declare is what Python can call, and there is no second list to keep in step. libvhost-user is
compiled from a source tree that is not part of this repository, the first of:

* ``$VHOSTBLK_LIBVHOST_USER``, a directory with ``libvhost-user.c`` and what it includes,
* ``$VHOSTBLK_QEMU_SRC``, an unpacked QEMU source tree,
* ``build/libvhost-user``, where ``scripts/fetch-libvhost-user`` puts it.

Two more variables choose a kind of build: ``VHOSTBLK_SANITIZE`` (the value of gcc's
``-fsanitize=``) and ``VHOSTBLK_DEBUG`` (assertions about which thread runs what).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENGINE = HERE / "engine"

# Older versions have a stack overflow that a guest can reach (CVE-2026-6425).
OLDEST_QEMU = (10, 0, 13)


# cffi's glue leaves arguments unused; the warning stays on for what we write ourselves.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <stdbool.h>
#include <stdint.h>
"""


class BuildError(SystemExit):
    """A build that cannot work, and what to do about it."""

    def __init__(self, text: str) -> None:
        print(f"vhostblk: cannot build the engine: {text}", file=sys.stderr)
        super().__init__(1)


def libvhost_user_directory() -> Path:
    """The directory that holds libvhost-user.c."""
    direct = os.environ.get("VHOSTBLK_LIBVHOST_USER")
    qemu = os.environ.get("VHOSTBLK_QEMU_SRC")
    if direct:
        directory, origin = Path(direct), "VHOSTBLK_LIBVHOST_USER"
    elif qemu:
        directory, origin = Path(qemu, "subprojects", "libvhost-user"), "VHOSTBLK_QEMU_SRC"
    else:
        directory, origin = ROOT / "build" / "libvhost-user", ""
    if (directory / "libvhost-user.c").is_file():
        return directory.resolve()
    if origin:
        raise BuildError(f"{origin} is set, but there is no libvhost-user.c in {directory}")
    raise BuildError(
        "the source of libvhost-user is missing. On Debian, run scripts/fetch-libvhost-user; "
        "elsewhere set VHOSTBLK_QEMU_SRC to an unpacked QEMU source tree "
        f"({'.'.join(map(str, OLDEST_QEMU))} or later)"
    )


def libvhost_user_version(directory: Path) -> str:
    """What was compiled in, for ``query-version``: version if known, and the sources' sha256."""
    version = "unknown version"
    for candidate in (directory / "VERSION", directory.parent.parent / "VERSION"):
        if candidate.is_file():
            version = candidate.read_text().split("\n", 1)[0].strip()
            break
    numbers = re.match(r"(?:\d+:)?(\d+)\.(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_QEMU:
        raise BuildError(
            f"{directory} is from QEMU {version}; {'.'.join(map(str, OLDEST_QEMU))} or later is "
            "needed, because a guest can overflow the stack of older ones (CVE-2026-6425)"
        )
    if "backend_fd" not in (directory / "libvhost-user.h").read_text():
        raise BuildError(f"{directory} is an old libvhost-user (no backend_fd in its header)")
    digest = hashlib.sha256((directory / "libvhost-user.c").read_bytes()).hexdigest()
    return f"{version} (sha256 {digest})"


def compile_arguments() -> list[str]:
    """gcc's arguments, for the kind of build that the environment asks for."""
    arguments = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    arguments += ["-fno-strict-aliasing", "-fvisibility=hidden"]
    if "VHOSTBLK_DEBUG" in os.environ or "VHOSTBLK_SANITIZE" in os.environ:
        arguments += ["-DVB_DEBUG"]
    if "VHOSTBLK_SANITIZE" in os.environ:
        arguments += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitize_arguments()]
        # What is certain to be set at -O2 is not always at -O1 with instrumentation.
        arguments += ["-Wno-maybe-uninitialized"]
        # ThreadSanitizer does not model fences. The engine's only order accesses to memory
        # shared with the guest, another process, of which it knows nothing anyway.
        arguments += ["-Wno-tsan"] if "thread" in os.environ["VHOSTBLK_SANITIZE"] else []
    else:
        arguments += ["-O2", "-g1"]
    return arguments


def sanitize_arguments() -> list[str]:
    """The sanitizers asked for; undefined behaviour ends the process, as a test must see it."""
    kinds = os.environ.get("VHOSTBLK_SANITIZE")
    return [f"-fsanitize={kinds}", "-fno-sanitize-recover=all"] if kinds else []


def make_ffi() -> FFI:
    """The FFI object that setuptools' ``cffi_modules`` asks for."""
    source = libvhost_user_directory()
    ffi = FFI()
    declarations = [
        ENGINE / "api.h",
        *sorted(ENGINE.glob("*.api.h")),
        *sorted((ENGINE / "nodes").glob("*.api.h")),
    ]
    for header in declarations:
        ffi.cdef(re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL))
    ffi.set_source(
        "vhostblk._engine",
        PREAMBLE + "".join(f'#include "{path.relative_to(ENGINE)}"\n' for path in declarations),
        sources=[
            str(path.relative_to(ROOT))
            for path in sorted([*ENGINE.glob("*.c"), *(ENGINE / "nodes").glob("*.c")])
        ],
        include_dirs=[str(ENGINE), str(source), str(source / "include")],
        libraries=["uring", "crypto"],
        define_macros=[("VB_LIBVHOST_USER", f'"{libvhost_user_version(source)}"')],
        extra_compile_args=compile_arguments(),
        extra_link_args=["-pthread", *sanitize_arguments()],
        py_limited_api=True,
    )
    return ffi


ffibuilder = make_ffi()

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
