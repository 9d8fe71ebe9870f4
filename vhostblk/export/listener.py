# SPDX-License-Identifier: GPL-2.0-or-later
"""A listening UNIX socket: at a path, or inherited as a file descriptor.

What is inherited may also be a connection that whoever started us has made already (QEMU's
vhost-user.rst, "Backend program conventions", leaves that open, and both are in use).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from typing import Literal

from pydantic import Field

from vhostblk.creating import why_not
from vhostblk.schema import Model, VhostblkError

# struct sockaddr_un has 108 bytes for the path, the terminating zero included.
MAX_PATH = 107


class SocketAddress(Model):
    """Where front-ends connect."""

    type: Literal["unix", "fd"]
    """unix: a path; fd: a socket that was inherited, listening or connected."""
    path: str | None = None
    """Path of the socket (type=unix)."""
    number: str | None = Field(default=None, alias="str")
    """Number of the file descriptor (type=fd)."""


class Listener:
    """A listening socket; at a path, the path is removed on close."""

    exhausted = False
    """No other connection will come."""

    def __init__(self, sock: socket.socket, path: str | None) -> None:
        self.socket = sock
        self.path = path
        self._inode = _inode(path) if path is not None else None

    def accept(self) -> socket.socket:
        """The next connection; to be called when the socket is readable."""
        return self.socket.accept()[0]

    def close(self) -> None:
        """Stop listening. What others have put at the path since then stays."""
        if self.path is not None and _inode(self.path) == self._inode:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.socket.close()


class Connection(Listener):
    """A socket that is connected already. It is readable when the front-end speaks."""

    def accept(self) -> socket.socket:
        self.exhausted = True
        return self.socket.dup()

    def close(self) -> None:
        """Hang up: the descriptor that was inherited keeps the connection open otherwise."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        super().close()


def listen(address: SocketAddress) -> Listener:
    """Begin to listen."""
    if address.type == "unix":
        if address.number is not None:
            raise _error("Parameter 'addr.str' is unexpected with addr.type=unix", "addr.str")
        if address.path is None:
            raise _error("Parameter 'addr.path' is missing", "addr.path")
        return _listen_at(address.path)
    if address.path is not None:
        raise _error("Parameter 'addr.path' is unexpected with addr.type=fd", "addr.path")
    if address.number is None:
        raise _error("Parameter 'addr.str' is missing", "addr.str")
    return _inherit(address.number)


def _listen_at(path: str) -> Listener:
    if not path:  # to the kernel, a name that it makes up
        raise _error("Parameter 'addr.path' expects the path of a socket, not ''", "addr.path")
    if len(os.fsencode(path)) > MAX_PATH:
        raise _error(
            f"Socket path '{path}' is too long: {len(os.fsencode(path))} bytes, "
            f"and a UNIX socket's path has at most {MAX_PATH}; use a shorter directory",
            "addr.path",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        sock.listen(16)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        reason = why_not(error, path)
        if error.errno == errno.EADDRINUSE:
            reason = "somebody else has just started to listen there"
        raise _error(f"Failed to listen on '{path}': {reason}", "addr.path") from None
    except BaseException:
        sock.close()
        raise
    return Listener(sock, path)


def _remove_stale(path: str) -> None:
    """Remove a socket that a dead process left; refuse if anything else is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _error(
            f"Failed to listen on '{path}': there is something that is not a socket", "addr.path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            pass  # full backlog, no permission: somebody listens
        owner = "another process" if _listener_of(probe) != os.getpid() else "this process itself"
    raise _error(
        f"Failed to listen on '{path}': {owner} listens there already; choose another path",
        "addr.path",
    )


def _listener_of(connected: socket.socket) -> int:
    """The process that listens at the other end; 0 if the kernel does not say."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", raw)[0])


def _inherit(text: str) -> Listener:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise _error(
            f"Parameter 'addr.str' expects the number of a file descriptor, not '{text}'",
            "addr.str",
        )
    fd = int(text)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise _error(f"File descriptor {fd} is not a socket", "addr.str")
        sock = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise _error(f"File descriptor {fd} cannot be used: {error.strerror}", "addr.str") from None
    os.set_inheritable(sock.fileno(), False)
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return Listener(sock, None)
        if _has_peer(sock):
            return Connection(sock, None)
    sock.close()
    raise _error(
        f"File descriptor {fd} is not a UNIX stream socket that listens or is connected",
        "addr.str",
    )


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _error(text: str, parameter: str) -> VhostblkError:
    return VhostblkError(text, data={"code": "bad-address", "parameter": parameter})
