# SPDX-License-Identifier: GPL-2.0-or-later
"""The listening end of a control socket: its path, owner and permissions."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat

from vhostblk.creating import why_not
from vhostblk.schema import VhostblkError

# sun_path has 108 bytes, one of them for the end.
MAX_PATH = 107
# To the kernel, "leave the group as it is": 32 bits of ones.
_NO_GROUP = (1 << 32) - 1
_MAX_DIGITS = 10


def listen(path: str, group: str | None = None) -> socket.socket:
    """A listening socket at `path`, for the owner only or for `group` too.

    What a dead process left at `path` is replaced; what a living one listens
    on, or what is not a socket, is left alone and reported.
    """
    raw = os.fsencode(path)
    if len(raw) > MAX_PATH:
        raise VhostblkError(
            f"Socket path '{path}' is {len(raw)} bytes long, and {MAX_PATH} is the most a "
            "socket can have; use a shorter one",
            data={"code": "path-too-long", "path": path},
        )
    gid = None if group is None else group_id(group)
    remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode is right from the start: between bind() and chmod() anyone who
    # may could connect.
    mask = os.umask(0o177)
    try:
        listener.bind(raw)
    except OSError as error:
        listener.close()
        raise VhostblkError(
            f"Cannot create socket '{path}': {why_not(error, path)}",
            data={"code": "socket", "path": path},
        ) from None
    finally:
        os.umask(mask)
    try:
        if gid is not None:
            os.chown(path, -1, gid)
            os.chmod(path, 0o660)
        listener.listen(128)
    except OSError as error:
        listener.close()
        unlink(path)
        raise VhostblkError(
            f"Cannot give socket '{path}' to group '{group}': {error.strerror}; "
            "only root and members of a group can do that",
            data={"code": "socket-group", "path": path},
        ) from None
    listener.setblocking(False)
    return listener


def inherited(fd: int) -> socket.socket:
    """A listening socket that whoever started us opened."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise VhostblkError(
            f"Descriptor {fd} is not an open socket: {error.strerror}", data={"code": "bad-fd"}
        ) from None
    if listener.family != socket.AF_UNIX or not listener.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        listener.detach()
        raise VhostblkError(
            f"Descriptor {fd} is not a listening Unix socket", data={"code": "bad-fd"}
        )
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def group_id(group: str) -> int:
    """The number of a group given by name or number."""
    if group.isdecimal() and group.isascii() and len(group) <= _MAX_DIGITS:
        gid = int(group)
        if gid < _NO_GROUP:
            return gid
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        import difflib

        near = difflib.get_close_matches(group, [entry.gr_name for entry in grp.getgrall()], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise VhostblkError(f"There is no group '{group}'{hint}") from None


def remove_stale(path: str) -> None:
    """Remove a socket nobody listens on; raise if somebody does."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise VhostblkError(f"Cannot use socket '{path}': {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise VhostblkError(
            f"'{path}' exists and is not a socket; remove it or choose another path",
            data={"code": "not-a-socket", "path": path},
        )
    if is_alive(path):
        raise VhostblkError(
            f"Socket '{path}' is in use by a running program; stop that one or choose another path",
            data={"code": "socket-in-use", "path": path},
        )
    unlink(path)


def is_alive(path: str) -> bool:
    """Whether something listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A full backlog must not stop us: then somebody is there, if busy.
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except BlockingIOError:
            return True
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # not ours to judge, so not ours to remove
    return True


def unlink(path: str) -> None:
    """Remove a socket file that may be gone already."""
    with contextlib.suppress(OSError):
        os.unlink(path)
