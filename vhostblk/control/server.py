# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: a QMP server for many clients.

Each client has its own session: its own queue of commands, which run one at a
time and in order, and its own copy of the events. Nothing a client does or
fails to do holds up another: one that does not read its events is
disconnected once a bounded amount of them waits for it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import struct
from typing import Any

from vhostblk.control.events import RateLimiter
from vhostblk.control.jsonstream import BadMessage, JsonStream
from vhostblk.control.registry import Command, Context, error_object
from vhostblk.control.version import version_info
from vhostblk.events import Event
from vhostblk.schema import CommandNotFound, VhostblkError

logger = logging.getLogger(__name__)

# Commands of one client that may wait while one runs; then it is not read any more.
MAX_QUEUED = 8
# Bytes that may wait for a client that does not read before it is disconnected.
MAX_UNREAD = 8 << 20
# Clients at a time: a limit against leaks of descriptors, far above any use.
MAX_CLIENTS = 512
_READ_SIZE = 64 << 10
_CAPABILITIES = ("oob",)
_MEMBERS = ("execute", "exec-oob", "arguments", "id")


def encode(message: dict[str, Any]) -> bytes:
    """A message as it goes over the wire: one line of ASCII."""
    return json.dumps(message, separators=(", ", ": ")).encode("ascii") + b"\r\n"


class Session:
    """One connected client."""

    def __init__(
        self, server: ControlServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._negotiated = False
        self._oob = False
        self._queue: asyncio.Queue[Any] = asyncio.Queue(MAX_QUEUED)
        self.peer = _peer_name(writer)

    async def run(self) -> None:
        """Serve the client until it goes away."""
        self._send({"QMP": {"version": version_info(), "capabilities": list(_CAPABILITIES)}})
        worker = asyncio.create_task(self._work())
        try:
            await self._read()
            await self._queue.join()  # the client may have closed only its sending side
            await self._writer.drain()
        except OSError as error:
            logger.debug("control client %s is gone: %s", self.peer, error)
            while not self._queue.empty():
                self._queue.get_nowait()
        finally:
            # A command that has begun is carried out; only its answer is lost.
            await self._queue.put(None)
            await worker
            self._writer.close()

    def send_event(self, line: bytes) -> None:
        """Queue an event, or give up on a client that has stopped reading."""
        if not self._negotiated or self._writer.transport.is_closing():
            return
        if self._unread() + len(line) > MAX_UNREAD:
            logger.warning("control client %s does not read its events: disconnected", self.peer)
            self._writer.transport.abort()
            return
        self._writer.write(line)

    def abort(self) -> None:
        """End the connection now."""
        self._writer.transport.abort()

    def flush_and_close(self) -> None:
        """End the connection once what was sent has been delivered."""
        self._writer.close()

    def _unread(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    def _send(self, message: dict[str, Any]) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(encode(message))

    async def _read(self) -> None:
        stream = JsonStream()
        while data := await self._reader.read(_READ_SIZE):
            for message in stream.feed(data):
                # Answers are owed only as fast as they are read.
                await self._writer.drain()
                if self._is_oob(message):
                    await self._execute(message)
                else:
                    await self._queue.put(message)

    def _is_oob(self, message: Any) -> bool:
        return self._oob and isinstance(message, dict) and "exec-oob" in message

    async def _work(self) -> None:
        while (message := await self._queue.get()) is not None:
            try:
                await self._execute(message)
                await self._writer.drain()
            except OSError:
                pass  # the reader sees it too, and ends the session
            finally:
                self._queue.task_done()

    async def _execute(self, message: Any) -> None:
        """Carry out one message and answer it."""
        answer: dict[str, Any]
        try:
            if isinstance(message, BadMessage):
                raise VhostblkError(message.text)
            command, arguments = self._check(message)
            if command is None:
                answer = {"return": self._negotiate(arguments)}
            else:
                self._server.check_accepting()
                logger.debug("control client %s: %s", self.peer, command.name)
                answer = {"return": await command.run(self._server.context, arguments)}
        except VhostblkError as error:
            answer = {"error": error_object(error)}
        except OSError as error:  # a full disk, a file that has gone, a device that fails
            answer = {"error": error_object(_host_error(message, error))}
        except Exception as error:
            # A mistake of ours must not cost the operator the connection.
            logger.error(
                "control command failed: %s: %s",
                type(error).__name__,
                error,
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )
            text = f"Internal error: {type(error).__name__}: {error}"
            answer = {
                "error": {"class": "GenericError", "desc": text, "data": {"code": "internal-error"}}
            }
        if isinstance(message, dict) and "id" in message:
            answer["id"] = message["id"]
        self._send(answer)

    def _check(self, message: Any) -> tuple[Command | None, dict[str, Any]]:
        """The command a message asks for (None: negotiation) and its arguments."""
        if not isinstance(message, dict):
            raise VhostblkError("QMP input must be a JSON object")
        for member in message:
            if member not in _MEMBERS or (member == "exec-oob" and not self._oob):
                raise VhostblkError(f"QMP input member '{member}' is unexpected")
        if "execute" in message and "exec-oob" in message:
            raise VhostblkError("QMP input member 'execute' clashes with 'exec-oob'")
        oob = "exec-oob" in message
        if not oob and "execute" not in message:
            raise VhostblkError("QMP input lacks member 'execute'")
        member = "exec-oob" if oob else "execute"
        name, arguments = message[member], message.get("arguments", {})
        if not isinstance(name, str):
            raise VhostblkError(f"QMP input member '{member}' must be a string")
        if not isinstance(arguments, dict):
            raise VhostblkError("QMP input member 'arguments' must be an object")
        if not self._negotiated:
            if name == "qmp_capabilities":
                return None, arguments
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        if name == "qmp_capabilities":
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        command = self._server.registry.find(name)
        if oob and not command.allow_oob:
            raise VhostblkError(f"The command {name} does not support OOB")
        return command, arguments

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        for key in arguments:
            if key != "enable":
                raise VhostblkError(f"Parameter '{key}' is unexpected")
        wanted = arguments.get("enable", [])
        if not isinstance(wanted, list):
            raise VhostblkError("Invalid parameter type for 'enable', expected: array")
        for name in wanted:
            if name not in _CAPABILITIES:
                raise VhostblkError(f"Parameter 'enable' does not accept value '{name}'")
        self._negotiated = True
        self._oob = "oob" in wanted
        return {}


class ControlServer:
    """A listening control socket and its clients."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.registry = context.registry
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._limiter = RateLimiter(self._broadcast)
        self._ignore_events = context.backend.events.listen(self._on_event)
        self._refusing = False

    async def start(self, listener: socket.socket) -> None:
        """Begin to accept clients on a listening socket."""
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    def refuse_commands(self) -> None:
        """The backend is ending: clients still get events, but ask in vain."""
        self._refusing = True

    def check_accepting(self) -> None:
        """Raise if commands are refused."""
        if self._refusing:
            raise VhostblkError("The backend is shutting down", data={"code": "shutting-down"})

    def _on_event(self, happened: Event) -> None:
        microseconds = int(happened.timestamp * 1_000_000)
        event: dict[str, Any] = {
            "timestamp": {
                "seconds": microseconds // 1_000_000,
                "microseconds": microseconds % 1_000_000,
            },
            "event": happened.name,
        }
        if happened.data:
            event["data"] = happened.data
        self._limiter.emit(happened.name, happened.data, event)

    async def close(self) -> None:
        """Stop listening and disconnect everyone, answers first."""
        self._ignore_events()
        self._limiter.close()
        if self._server is not None:
            self._server.close()
        for session in self._sessions:
            session.flush_and_close()
        if self._tasks:
            # Those who do not read do not hold up the end.
            await asyncio.wait(self._tasks, timeout=1)
        for session in list(self._sessions):
            session.abort()

    def _broadcast(self, event: dict[str, Any]) -> None:
        line = encode(event)
        for session in list(self._sessions):
            session.send_event(line)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(self, reader, writer)
        if len(self._sessions) >= MAX_CLIENTS:
            logger.warning("control client %s refused: %d clients", session.peer, MAX_CLIENTS)
            writer.transport.abort()
            return
        logger.debug("control client %s connected", session.peer)
        self._sessions.add(session)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self._tasks.discard(task)
            logger.debug("control client %s disconnected", session.peer)


def _host_error(message: Any, error: OSError) -> VhostblkError:
    name = message.get("execute", message.get("exec-oob"))
    where = f"'{error.filename}': " if error.filename else ""
    data = {"code": "host-error", "errno": errno.errorcode.get(error.errno or 0, "EIO")}
    return VhostblkError(f"{name}: {where}{error.strerror or error}", data=data)


def _peer_name(writer: asyncio.StreamWriter) -> str:
    """Who is at the other end, for the log."""
    peer = writer.get_extra_info("socket")
    try:
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", raw)
    except OSError:
        return "?"
    return f"pid {pid} uid {uid} gid {gid}"
