# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a backend process: build the tree, open the sockets, wait, clean up.

`serve`, `run` and `vhostblk-backend` differ only in the `Plan` they make and
in what they do once the backend is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhostblk.cli.errors import CliError
from vhostblk.cli.places import Place
from vhostblk.cli.process import Background, Pidfile
from vhostblk.control.listen import group_id, inherited, listen, unlink
from vhostblk.garbage import leave_alone_what_is_there
from vhostblk.schema import VhostblkError

if TYPE_CHECKING:
    import socket

    from vhostblk.backend import Backend
    from vhostblk.control.server import ControlServer
    from vhostblk.state import StateFile

logger = logging.getLogger("vhostblk")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Step:
    """One thing to do at start, in order."""

    where: str  # the option as written, for messages
    kind: str  # object, blockdev or export
    options: dict[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    """Parameters that come from an option of their own, and that option as written."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What errors say of nodes' options, and what to say instead: IMAGE has others."""

    def error(self, error: VhostblkError) -> CliError:
        """`error` as it is told to who wrote the option."""
        data = dict(error.data or {})
        parameter = str(data.get("parameter", "")).partition(".")[0]
        if "hint" in data:
            data["hint"] = self._in_words(data["hint"])
        text = self._in_words(error.desc)
        return CliError(f"{self.sources.get(parameter, self.where)}: {text}", data=data)

    def _in_words(self, text: str) -> str:
        if not self.words:
            return text
        known = "|".join(map(re.escape, self.words))
        return re.sub(known, lambda found: self.words[found[0]], text)


@dataclass(frozen=True)
class Control:
    """A control socket to open: at a path, or on a listening descriptor we were given."""

    where: str  # the option as written, for messages
    group: str | None = None
    path: str | None = None
    fd: int | None = None

    def open(self) -> tuple[str | None, socket.socket]:
        """The path to remove at the end, and the socket."""
        if self.group is not None:
            with _said_by(f"--control-group {self.group}"):
                group_id(self.group)
        with _said_by(self.where):
            if self.fd is not None:
                return None, inherited(self.fd)
            assert self.path is not None
            path = os.path.abspath(self.path)
            return path, listen(path, self.group)


@dataclass
class Plan:
    """Everything a backend process is asked to be."""

    steps: list[Step] = field(default_factory=list)
    plugins: list[Path] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    place: Place | None = None
    pidfile: str | None = None
    daemonize: bool = False
    log_file: str | None = None
    state: str | None = None
    stop_timeout: float = 30.0
    stop_on_signals: tuple[signal.Signals, ...] = _STOP_SIGNALS


@dataclass
class Running:
    """A backend that is ready, for what is to be done while it runs."""

    backend: Backend
    stop: asyncio.Event


WhileReady = Callable[[Running], Awaitable[int]]


def serve(plan: Plan, while_ready: WhileReady | None = None) -> int:
    """Run a backend until it is told to stop; the exit status."""
    background = Background() if plan.daemonize else None
    _raise_file_limit()
    return asyncio.run(_Life(plan, background, while_ready or _wait).run())


def _raise_file_limit() -> None:
    """Every virtqueue takes descriptors; the usual soft limit is for select()'s sake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _wait(running: Running) -> int:
    await running.stop.wait()
    return 0


class _Life:
    def __init__(self, plan: Plan, background: Background | None, while_ready: WhileReady) -> None:
        self._plan = plan
        self._background = background
        self._while_ready = while_ready
        self._stop = asyncio.Event()
        self._signals = 0
        self._abandoned = False
        self._pidfiles: list[Pidfile] = []
        self._listeners: list[tuple[str | None, socket.socket]] = []
        self._servers: list[ControlServer] = []
        self._state: StateFile | None = None

    async def run(self) -> int:
        """From the first signal handler to the last unlink."""
        loop = asyncio.get_running_loop()
        for number in self._plan.stop_on_signals:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            return await self._run_in_place()
        finally:
            for path, listener in self._listeners:
                listener.close()
                if path is not None:
                    unlink(path)
            for pidfile in self._pidfiles:
                pidfile.remove()
            if self._plan.place is not None:
                self._plan.place.remove()
            if self._state is not None:
                self._state.close()
            if self._abandoned:
                os._exit(1)  # an orderly end would wait for the same requests

    async def _run_in_place(self) -> int:
        from vhostblk.backend import Backend

        plan = self._plan
        if plan.state is not None:
            with _said_by(self._where_state):
                self._state = _open_state(plan.state)
        if plan.place is not None:
            plan.place.create()
            self._pidfiles.append(_lock_place(plan.place))
            self._pidfiles[0].write()
        if plan.pidfile is not None:
            with _said_by(f"--pidfile {plan.pidfile}"):
                self._pidfiles.append(Pidfile(plan.pidfile))
        # Bound now, so that a path that cannot be had is an error before anything
        # is served; answered when ready, so that nobody sees half a tree.
        for control in plan.controls:
            self._listeners.append(control.open())
        backend = Backend(plugins=plan.plugins)
        try:
            await backend.start()
            backend.graph.state_path = None if self._state is None else self._state.path
            for step in await self._restore(backend):
                if self._stop.is_set():
                    return 0
                await apply(backend, step)
            if self._state is not None:
                with _said_by(self._where_state):
                    await backend.keep_state(self._state)
            await self._open_control(backend)
            if plan.pidfile is not None:
                with _said_by(f"--pidfile {plan.pidfile}"):
                    self._pidfiles[-1].write()
            leave_alone_what_is_there()
            self._announce(backend)
            return await self._while_ready(Running(backend, self._stop))
        finally:
            await self._close(backend)

    async def _restore(self, backend: Backend) -> list[Step]:
        """Make what the state file says; what is left to do of the plan."""
        steps = self._plan.steps
        if self._state is None:
            return steps
        from vhostblk.state import Document

        with _said_by(self._where_state):
            text = self._state.read()
            document = None if text is None else Document.parse(text, self._state)
        if document is None:
            return steps
        ignored = 0
        for step in steps:
            id = step.options.get("id")
            if step.kind == "object" and isinstance(id, str) and not document.has_object(id):
                await apply(backend, step)  # one with a secret, which is not in the file
            else:
                ignored += 1
        if ignored:
            logger.info("the tree is that of state file '%s'", self._state.path)
        with _said_by(self._where_state):
            await backend.restore_state(document, self._state)
        return []

    @property
    def _where_state(self) -> str:
        return f"--state {self._plan.state}"

    async def _open_control(self, backend: Backend) -> None:
        if not self._listeners:
            return
        from vhostblk.control.commands import registry
        from vhostblk.control.registry import Context
        from vhostblk.control.server import ControlServer

        for _, listener in self._listeners:
            server = ControlServer(Context(backend, registry, self._stop.set))
            await server.start(listener)
            self._servers.append(server)

    def _announce(self, backend: Backend) -> None:
        exports = [str(export["id"]) for export in backend.query_block_exports()]
        what = f"exports {', '.join(exports)}" if exports else "no exports"
        # Not a log record: who started us waits for this line at any log level.
        with contextlib.suppress(OSError):
            print(f"vhostblk: ready: {what}", file=sys.stderr, flush=True)
        if self._background is not None:
            self._background.ready(self._plan.log_file)

    async def _close(self, backend: Backend) -> None:
        for server in self._servers:
            server.refuse_commands()
        closing = asyncio.ensure_future(backend.close())
        done, _ = await asyncio.wait({closing}, timeout=self._plan.stop_timeout)
        if not done:
            # As safe as a kill: the front-end keeps the record of requests in flight, and
            # the next backend does them.
            logger.error(
                "requests in flight have not finished within %g seconds: stopping without them "
                "(storage that hangs, or a filter that holds them)",
                self._plan.stop_timeout,
            )
            self._abandoned = True
            return
        await closing
        for server in self._servers:
            await server.close()

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            logger.info("%s: stopping", number.name)
            self._stop.set()
            return
        # Whoever asks again does not want to wait for whatever we wait for.
        logger.warning("%s again: giving up at once", number.name)
        os._exit(1)


def _open_state(path: str) -> StateFile:
    from vhostblk.state import StateFile

    return StateFile(path)


def _lock_place(place: Place) -> Pidfile:
    try:
        return Pidfile(place.pidfile)
    except CliError as error:
        if (error.data or {}).get("code") != "pidfile-locked":
            raise
        raise CliError(
            f"A backend named '{place.name}' is already running; choose another name with "
            "--name, or look at it with 'vhostblk status " + place.name + "'"
        ) from None


async def apply(backend: Backend, step: Step) -> None:
    """Carry out one step; an error says which option it came from."""
    actions = {
        "object": backend.object_add,
        "blockdev": backend.blockdev_add,
        "export": backend.block_export_add,
    }
    try:
        await actions[step.kind](step.options)
    except VhostblkError as error:
        raise step.error(error) from None
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise CliError(f"{step.where}: {name}{error.strerror or error}") from None


@contextlib.contextmanager
def _said_by(where: str) -> Iterator[None]:
    """What goes wrong inside comes from this option."""
    try:
        yield
    except VhostblkError as error:
        raise CliError(f"{where}: {error.desc}", data=error.data) from None
