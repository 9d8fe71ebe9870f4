# SPDX-License-Identifier: GPL-2.0-or-later
"""Random hostile sessions against the message reader and the virtqueue parser.

A few seconds of it in every run of the tests; see README.md here for more.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from frontend.lab import Lab
from thoroughness import tries

from fuzz.sessions import Session

pytest_plugins = ["frontend.fixtures"]

EXPORTS = ("null", "disk", "many")
SECONDS = float(os.environ.get("VHOSTBLK_FUZZ_SECONDS", tries(4)))
SEED = os.environ.get("VHOSTBLK_FUZZ_SEED", "1")


@pytest.mark.timeout(SECONDS + 120)
def test_random_hostile_sessions(lab: Lab) -> None:
    seed = random.randrange(1 << 32) if SEED == "random" else int(SEED)
    lab.noise(*EXPORTS)
    end = time.monotonic() + SECONDS
    sessions = 0
    recent: list[int] = []
    while time.monotonic() < end:
        rng = random.Random(seed)
        export = rng.choice(EXPORTS)
        recent = [*recent[-4:], seed]
        Session(rng, lab.path(export)).run()
        sessions += 1
        if sessions % 20 == 0 or not lab.daemon.alive:
            try:
                for export in EXPORTS:
                    lab.works(export)
            except Exception as error:
                said = "\n".join(lab.daemon.lines()[-60:])
                raise AssertionError(
                    f"session {sessions}, one of the seeds {recent} or up to 20 before: {error}; "
                    f"the back-end said:\n{said}"
                ) from error
        seed += 1
    print(f"{sessions} sessions up to seed {seed - 1}")
    assert sessions


def has_address_sanitizer() -> bool:
    """gcc says a full path for a library it has."""
    command = ["gcc", "-print-file-name=libasan.so"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return answer.stdout.startswith("/")


@pytest.mark.skipif("VHOSTBLK_SANITIZED" in os.environ, reason="this is that run already")
@pytest.mark.skipif(not has_address_sanitizer(), reason="gcc has no libasan")
@pytest.mark.timeout(600 + tries(4))
def test_random_hostile_sessions_with_sanitizers() -> None:
    """The same, on an engine in which a wrong byte ends the process."""
    script = Path(__file__).parents[2] / "scripts" / "test"
    done = subprocess.run(
        [script, "--sanitize", "address,undefined", "tests/fuzz"],
        env={**os.environ, "VHOSTBLK_FUZZ_SECONDS": str(tries(4))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "1 passed" in done.stdout
