# SPDX-License-Identifier: GPL-2.0-or-later
"""What only one kind of CPU has is asked for on that one only."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "cffi_build" / "engine"
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@needs_gcc
@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.c")), ids=lambda path: path.stem)
def test_x86_is_guarded(path: Path) -> None:
    """Without other files' text, what is left of the source when the CPU is another one."""
    text = re.sub(r"^#\s*include.*$", "", path.read_text(), flags=re.MULTILINE)
    done = subprocess.run(
        ["gcc", "-E", "-P", "-U__x86_64__", "-U__SSE2__", "-x", "c", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"\b(?:__builtin_ia32|_mm\d*_|__m\d+i)\w*", done.stdout)
    assert not found
