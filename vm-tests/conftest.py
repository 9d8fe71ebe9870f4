# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the tests that boot real guests.

Most tests share one guest: each plugs disks of its own into it, served by backends of its own, and
takes them out again. A failure makes the next test boot a new guest, so that no test suffers from
another's damage.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest import DiskServer, Guest, GuestImages, Workspace
from guest.accel import find_accelerator
from guest.images import REPOSITORY

TEST_SECONDS = 240  # other tests may run at the same time
KEPT_LOGS = REPOSITORY / "build" / "vm-tests"


class Session:
    """What outlives one test: open workspaces, and whether the shared guest is still sound."""

    def __init__(self) -> None:
        self.workspaces: list[Workspace] = []
        self.finished: list[Workspace] = []
        self.guest_spoilt = False

    def workspace(self) -> Workspace:
        workspace = Workspace()
        self.workspaces.append(workspace)
        return workspace

    def finish(self, workspace: Workspace) -> None:
        """Its logs stay until the test's last report has been written."""
        self.finished.append(workspace)

    def sweep(self) -> None:
        for workspace in self.finished:
            workspace.remove()
            self.workspaces.remove(workspace)
        self.finished.clear()


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session()
    config.addinivalue_line("markers", "vm: boots a virtual machine")
    config.addinivalue_line("markers", "timeout(seconds): a limit for the test (pytest-timeout)")


def pytest_unconfigure(config: pytest.Config) -> None:
    session = config.stash[SESSION]
    for workspace in session.workspaces:
        workspace.remove()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the guest images first: that may take minutes, which no test's limit must pay for."""
    if session.config.option.collectonly:
        return
    names = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    for tier, fixture in (("tiny", "images"), ("debian", "debian_images")):
        if fixture in names:
            GuestImages.build(tier)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.vm)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    session = item.config.stash[SESSION]
    if report.failed:
        session.guest_spoilt = True
        kept = KEPT_LOGS / re.sub(r"[^\w.-]+", "_", item.name)
        shutil.rmtree(kept, ignore_errors=True)
        for workspace in session.workspaces:
            workspace.keep_logs(kept)
            report.sections.extend(workspace.log_tails())
    if report.when == "teardown":
        session.sweep()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long guests were held up."""
    stalls = [
        text
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, text in getattr(report, "user_properties", ())
        if name == "stall" and report.when == "call"
    ]
    if stalls:
        terminalreporter.section("stalls")
        for text in stalls:
            terminalreporter.line(text)


@pytest.fixture(scope="session")
def vm_session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def images() -> GuestImages:
    return GuestImages.existing()


@pytest.fixture(scope="session")
def debian_images() -> GuestImages:
    return GuestImages.existing()


@pytest.fixture(scope="session")
def accel(images: GuestImages) -> str:
    return find_accelerator(images)


@pytest.fixture
def workspace(vm_session: Session) -> Iterator[Workspace]:
    """The test's own directory."""
    workspace = vm_session.workspace()
    yield workspace
    vm_session.finish(workspace)


@pytest.fixture(scope="class")
def own_workspace(vm_session: Session) -> Iterator[Workspace]:
    """The directory of a class of tests with a guest of its own."""
    workspace = vm_session.workspace()
    yield workspace
    vm_session.finish(workspace)


class SharedGuest:
    """The guest most tests use, booted again if the last test spoilt it."""

    def __init__(self, session: Session, images: GuestImages, accel: str) -> None:
        self._session = session
        self._images = images
        self._accel = accel
        self._boots = itertools.count(1)
        self._guest: Guest | None = None
        self._workspace: Workspace | None = None

    def get(self) -> Guest:
        if self._session.guest_spoilt:
            self.close()
            self._session.guest_spoilt = False
        if self._guest is None:
            name = f"guest{next(self._boots)}"
            self._workspace = self._session.workspace()
            self._guest = Guest(self._workspace, self._images, self._accel, name=name)
            try:
                self._guest.start()
            except BaseException:
                self.close()
                raise
        return self._guest

    def close(self) -> None:
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        if self._workspace is not None:
            self._session.finish(self._workspace)
            self._workspace = None


@pytest.fixture(scope="session")
def shared_guest(vm_session: Session, images: GuestImages, accel: str) -> Iterator[SharedGuest]:
    shared = SharedGuest(vm_session, images, accel)
    yield shared
    shared.close()


@pytest.fixture
def guest(shared_guest: SharedGuest) -> Guest:
    """The shared guest, up and without disks."""
    guest = shared_guest.get()
    guest.check("dmesg -c >/dev/null; rm -rf /tmp/*")
    return guest


@pytest.fixture
def disks(vm_session: Session, guest: Guest, workspace: Workspace) -> Iterator[DiskServer]:
    """Serves disks to the shared guest and judges the end of each; see DiskServer.finish."""
    server = DiskServer(guest, workspace)
    try:
        yield server
        if not vm_session.guest_spoilt:  # one failure is enough: judge nothing after it
            server.finish()
    finally:
        server.close()
