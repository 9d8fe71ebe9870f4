# SPDX-License-Identifier: GPL-2.0-or-later
"""The documentation names what there is, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vhostblk.cli import COMMANDS
from vhostblk.control.commands import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="installed without docs")


def test_every_command_is_described() -> None:
    text = (ROOT / "docs" / "control-socket.md").read_text()
    assert [name for name in registry.commands if f"`{name}`" not in text] == []


def test_every_subcommand_is_described() -> None:
    for page in ("docs/command-line.md", "README.md"):
        text = (ROOT / page).read_text()
        assert [name for name in COMMANDS if f"`{name}`" not in text] == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_sent(page: Path) -> None:
    for words in re.findall(r"vhostblk qmp ((?:--\S+ )*[^\s`]+)", page.read_text()):
        assert words.split()[-1] in registry.commands, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page: Path) -> None:
    text = page.read_text()
    for name, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if name.startswith("http"):
            continue
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in [_anchor(heading) for heading in headings], f"{name}{anchor}"
    pattern = r"`((?:vhostblk|cffi_build|scripts|tests|vm-tests)/[^`\s*]*)`"
    for name in re.findall(pattern, text):
        assert "NAME" in name or (ROOT / name).exists(), name


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
