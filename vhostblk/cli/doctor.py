# SPDX-License-Identifier: GPL-2.0-or-later
"""`vhostblk doctor`: look for what will get in the way, and say how to remove it."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import grp
import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vhostblk.cli import places, qemu
from vhostblk.cli.parser import Parser
from vhostblk.cli.process import is_locked, read_pid
from vhostblk.cli.table import size
from vhostblk.control.client import ControlClient
from vhostblk.control.listen import is_alive
from vhostblk.schema import VhostblkError

DESCRIPTION = """\
Check the kernel, limits, permissions, QEMU, the disks and what dead backends
left behind. Every problem comes with its remedy. The status is 1 if there is
one, else 0; notes are things that are slower or less convenient than they
could be.
"""

EPILOG = """\
examples:
  vhostblk doctor
  vhostblk doctor /srv/web1.img          check access to an image and its file system too
"""

OK, NOTE, PROBLEM = "ok", "note", "problem"
_MIN_KERNEL = (5, 10)
# Since this version rings are not counted against RLIMIT_MEMLOCK.
_NO_MEMLOCK = (5, 12)
_MEMLOCK = 8 << 20
_MIN_QEMU = (5, 2)
_FILES = 4096
_KVM_GET_API_VERSION = 0xAE00
_LOW_SPACE = 0.05


@dataclass(frozen=True)
class Finding:
    """The outcome of one look."""

    check: str
    state: str
    text: str
    remedy: str = ""


Found = Iterator[Finding]


def configure(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="images to look at too")
    parser.add_argument(
        "--qemu",
        metavar="PROGRAM",
        default=qemu.DEFAULT_QEMU,
        help=f"the QEMU you use (default: {qemu.DEFAULT_QEMU})",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    findings = list(examine(args.qemu, args.image))
    problems = [finding for finding in findings if finding.state == PROBLEM]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.state:>7}  {finding.check}: {finding.text}")
            if finding.remedy:
                print(f"           -> {finding.remedy}")
        print(
            f"\n{len(problems)} problem{'s'[: len(problems) != 1]} found"
            if problems
            else "\nno problem found"
        )
    return 1 if problems else 0


def examine(qemu_program: str, images: list[str]) -> Found:
    """Make every check; one that fails itself is a finding, too."""
    checks: list[tuple[str, Callable[[], Found]]] = [
        ("kernel", check_kernel),
        ("io_uring", check_io_uring),
        ("memory locking", check_memlock),
        ("open files", check_files),
        ("sockets", check_sockets),
        ("left over", check_left_over),
        ("QEMU", lambda: check_qemu(qemu_program)),
        ("shared memory", check_shared_memory),
        ("KVM", check_kvm),
        ("libvirt", check_libvirt),
        ("disk use", lambda: check_disks(images)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except (OSError, VhostblkError) as error:
            text = error.desc if isinstance(error, VhostblkError) else str(error)
            yield Finding(name, NOTE, f"could not be checked: {text}")


def kernel_version() -> tuple[int, int]:
    """Major and minor version of the running kernel."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_kernel() -> Found:
    """Old kernels have io_uring with holes."""
    release = os.uname().release
    if kernel_version() < _MIN_KERNEL:
        yield Finding(
            "kernel",
            PROBLEM,
            f"{release} is older than {_MIN_KERNEL[0]}.{_MIN_KERNEL[1]}",
            "upgrade the distribution's kernel package and reboot",
        )
    else:
        yield Finding("kernel", OK, release)


def check_io_uring() -> Found:
    """Not what the kernel says it can, but whether it does."""
    from vhostblk.engine import Engine

    async def probe() -> tuple[str, str]:
        engine = Engine()
        try:
            thread = engine.new_iothread("doctor")
            try:
                return thread.info().aio.name, thread.fallback_reason
            finally:
                thread.free()
        finally:
            engine.close()

    used, reason = asyncio.run(probe())
    if not reason:
        yield Finding("io_uring", OK, f"works ({used.lower()})")
        return
    disabled = _read("/proc/sys/kernel/io_uring_disabled")
    if disabled not in ("", "0"):
        remedy = (
            "'sysctl -w kernel.io_uring_disabled=0', and the same line in "
            "/etc/sysctl.d/50-vhostblk.conf"
        )
    elif _seccomp():
        remedy = (
            "a seccomp filter is in force: allow io_uring_setup, io_uring_enter and "
            "io_uring_register in the container's profile (docker run "
            "--security-opt seccomp=PROFILE.json)"
        )
    else:
        remedy = "use a kernel with CONFIG_IO_URING=y"
    yield Finding(
        "io_uring",
        PROBLEM,
        f"cannot be used ({reason}); a slower pool of threads takes its place",
        remedy,
    )


def _seccomp() -> bool:
    return "\nSeccomp:\t2" in _read("/proc/self/status")


def check_memlock() -> Found:
    """Rings were locked memory once."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else size(soft)
    if soft == resource.RLIM_INFINITY or soft >= _MEMLOCK or kernel_version() >= _NO_MEMLOCK:
        yield Finding("memory locking", OK, f"limit {shown}, which this kernel does not need more")
    else:
        yield Finding(
            "memory locking",
            PROBLEM,
            f"limit {shown}; io_uring needs {size(_MEMLOCK)} here",
            "'LimitMEMLOCK=infinity' in the systemd unit, or a line '* - memlock unlimited' in "
            "/etc/security/limits.conf and a new login",
        )


def check_files() -> Found:
    """Each virtqueue takes two or three descriptors, each memory region one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _FILES:
        yield Finding("open files", OK, f"up to {hard} (the soft limit is raised at start)")
    else:
        yield Finding(
            "open files",
            PROBLEM,
            f"limit {hard}; many disks or queues need {_FILES} or more",
            f"'LimitNOFILE={_FILES * 16}' in the systemd unit, or a line '* - nofile "
            f"{_FILES * 16}' in /etc/security/limits.conf and a new login",
        )


def check_sockets() -> Found:
    """Where sockets are made, and who may use those there are."""
    base = places.runtime_dir()
    creates = base if os.path.exists(base) else base.parent
    if os.access(creates, os.W_OK | os.X_OK):
        yield Finding("sockets", OK, f"are made in {base}/vhostblk")
    else:
        yield Finding(
            "sockets",
            PROBLEM,
            f"cannot be made in {base}",
            _remedy_for(base),
        )
    for place in places.running_places():
        mode = stat.S_IMODE(os.stat(place.control_socket).st_mode)
        if mode & 0o007:
            yield Finding(
                "sockets",
                PROBLEM,
                f"anyone on this machine may command '{place.name}' ({place.control_socket} has "
                f"mode {mode:04o})",
                f"'chmod o= {place.control_socket}'",
            )
    try:
        members = grp.getgrnam("kvm").gr_mem
    except KeyError:
        return
    if os.geteuid() != 0 and "kvm" not in _my_groups():
        yield Finding(
            "sockets",
            NOTE,
            "you are not in group kvm; a QEMU of another user may not reach your sockets"
            + (f" (members: {', '.join(members)})" if members else ""),
            f"'usermod -aG kvm {_user()}' and a new login, if another user runs QEMU",
        )


def _remedy_for(base: Path) -> str:
    """Sockets cannot be made in this directory."""
    variable = places.runtime_variable()
    if variable is None:
        return "'export XDG_RUNTIME_DIR=DIRECTORY' with a directory of yours"
    try:
        owner = base.stat().st_uid
    except FileNotFoundError:
        return f"'install -d -m 0700 -o {os.geteuid()} {base}', or 'unset {variable}'"
    except OSError:
        return f"'unset {variable}': you cannot reach that directory"
    if owner == os.geteuid():
        return f"'chmod u+rwx {base}'"
    return f"'unset {variable}': that directory is another user's"


def _my_groups() -> set[str]:
    names = set()
    for gid in os.getgroups():
        try:
            names.add(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue
    return names


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def check_left_over() -> Found:
    """What a killed backend could not clean up."""
    found = False
    for base in places.search_dirs():
        try:
            entries = sorted(base.iterdir())
        except OSError:
            continue
        for directory in entries:
            place = places.Place(directory.name, directory)
            files = [
                path
                for path in (place.pidfile, place.control_socket, place.vhost_socket)
                if os.path.lexists(path)
            ]
            if not files or is_alive(place.control_socket) or is_locked(place.pidfile):
                continue
            found = True
            pid = read_pid(place.pidfile)
            was = f" (it was pid {pid})" if pid else ""
            yield Finding(
                "left over",
                PROBLEM,
                f"'{place.name}' ended without cleaning up{was}: "
                + ", ".join(os.path.basename(path) for path in files),
                f"start it again, or 'rm {' '.join(files)} && rmdir {directory}'",
            )
    if not found:
        yield Finding("left over", OK, "no stale pid files or sockets")


def check_qemu(program: str) -> Found:
    """Whether there is one, and whether it is recent."""
    found = qemu.version(program)
    if found is None:
        missing = shutil.which(program) is None
        yield Finding(
            "QEMU",
            PROBLEM,
            f"'{program}' is not installed" if missing else f"'{program}' does not run",
            "'apt-get install qemu-system-x86' (or your distribution's package), or name "
            "yours with --qemu PROGRAM",
        )
        return
    text = f"{program} {found[0]}.{found[1]}"
    if found < _MIN_QEMU:
        yield Finding(
            "QEMU", PROBLEM, f"{text} is older than {_MIN_QEMU[0]}.{_MIN_QEMU[1]}", "upgrade QEMU"
        )
        return
    option = "reconnect-ms=1000" if found >= (9, 2) else "reconnect=1"
    yield Finding("QEMU", OK, f"{text}; its chardev option is {option}")


def check_shared_memory() -> Found:
    """A vhost-user device without shared memory is the classic mistake."""
    import psutil

    seen = 0
    for process in psutil.process_iter(["cmdline"]):
        disks = qemu.RunningDisks.read(process.info["cmdline"] or [])
        if not disks.count:
            continue
        seen += 1
        yield from _check_running(process.pid, disks)
    shm = Path("/dev/shm")
    if not hasattr(os, "memfd_create"):
        yield Finding(
            "shared memory",
            PROBLEM,
            "memfd_create() is missing",
            f"use memory-backend-file,mem-path={shm},share=on instead",
        )
    else:
        os.close(os.memfd_create("doctor"))
        yield Finding(
            "shared memory",
            OK,
            f"memfd works; {seen} QEMU with vhost-user-blk running" if seen else "memfd works",
        )


def _check_running(pid: int, disks: qemu.RunningDisks) -> Found:
    who = f"QEMU (pid {pid})"
    if not disks.shared:
        yield Finding(
            "shared memory",
            PROBLEM,
            f"{who} has a vhost-user-blk device but no shared memory",
            f"add '-object memory-backend-memfd,id={qemu.MEMORY_ID},size=SIZE,share=on "
            f"-machine memory-backend={qemu.MEMORY_ID}' with the SIZE of -m "
            "('vhostblk qemu-args' prints it)",
        )
    elif not disks.guest or not set(disks.guest) <= set(disks.shared):
        yield Finding(
            "shared memory",
            PROBLEM,
            f"{who} has shared memory, but the guest's is elsewhere",
            f"add '-machine memory-backend={disks.shared[0]}' (or '-numa node,memdev=…' for each "
            "node), with the size of -m",
        )
    for chardev in disks.unsteady:
        yield Finding(
            "reconnect",
            PROBLEM,
            f"{who} does not connect chardev '{chardev}' again: a restart of the backend leaves "
            "the guest without its disk",
            "add 'reconnect=1' to the chardev, or 'reconnect-ms=1000' from QEMU 9.2 on "
            "('vhostblk qemu-args' prints it)",
        )


def check_kvm() -> Found:
    """Not ours to need, but a guest without it is slow, and people then blame the disk."""
    slow = "guests run emulated, which is slow whatever the disk does"
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield Finding(
            "KVM",
            NOTE,
            f"there is no /dev/kvm: {slow}",
            "enable virtualization in the firmware, or nested virtualization on the "
            "host, and 'modprobe kvm_intel' or 'modprobe kvm_amd'",
        )
        return
    except PermissionError:
        yield Finding(
            "KVM",
            NOTE,
            f"you may not open /dev/kvm: {slow}",
            f"'usermod -aG kvm {_user()}' and a new login",
        )
        return
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    finally:
        os.close(fd)
    flags = re.search(r"^flags\s*:.*$", _read("/proc/cpuinfo"), re.MULTILINE)
    hardware = flags is None or re.search(r"\b(vmx|svm)\b", flags[0]) is not None
    if version != 12:
        yield Finding(
            "KVM", NOTE, f"/dev/kvm speaks version {version}, not 12: {slow}", "upgrade the kernel"
        )
    elif not hardware:
        yield Finding(
            "KVM",
            NOTE,
            "/dev/kvm answers, but this CPU shows neither vmx nor svm: stock guests "
            "may not boot with it",
            "if they hang, use '-accel tcg'",
        )
    else:
        yield Finding("KVM", OK, "/dev/kvm answers")


def check_libvirt() -> Found:
    """Debian's AppArmor profile for libvirt's guests knows nothing of our sockets."""
    abstraction = Path("/etc/apparmor.d/abstractions/libvirt-qemu")
    if not abstraction.exists():
        return
    local = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")
    if "vhostblk" in _read(str(local)):
        yield Finding("libvirt", OK, "AppArmor lets its guests use our sockets")
        return
    yield Finding(
        "libvirt",
        NOTE,
        "AppArmor may keep libvirt's guests from our sockets",
        f"echo '/run/vhostblk/*/vhost.sock rw,' >>{local} and restart the guest",
    )


def check_disks(images: list[str]) -> Found:
    """File systems that are nearly full, and images that may fill them."""
    seen = False
    for where, path in [*_served_files(), *((image, image) for image in images)]:
        seen = True
        try:
            info = os.stat(path)
        except OSError as error:
            yield Finding(
                "disk use", PROBLEM, f"{where}: {error.strerror}", f"check the path '{path}'"
            )
            continue
        if not os.access(path, os.R_OK | os.W_OK):
            yield Finding(
                "disk use",
                PROBLEM,
                f"{where}: you may not read and write it",
                f"'chown {_user()} {path}', or serve it with --read-only",
            )
        if stat.S_ISBLK(info.st_mode):
            yield Finding("disk use", OK, f"{where}: a block device")
            continue
        room = os.statvfs(path)
        free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        may_grow = max(0, info.st_size - info.st_blocks * 512)
        text = f"{where}: {size(free)} free of {size(total)}"
        if total and free < total * _LOW_SPACE and may_grow:
            yield Finding(
                "disk use",
                PROBLEM,
                f"{text}, and the image may take {size(may_grow)} more",
                "free some space: a full file system is a write error in the guest",
            )
        elif may_grow > free:
            yield Finding(
                "disk use",
                NOTE,
                f"{text}, but the image may take {size(may_grow)} more",
                f"'fallocate -l {info.st_size} {path}' reserves it, or keep an eye on it",
            )
        else:
            yield Finding("disk use", OK, text)
    if not seen:
        yield Finding("disk use", OK, "nothing is served")


def _served_files() -> Iterator[tuple[str, str]]:
    for place in places.running_places():
        try:
            with ControlClient(place.control_socket, timeout=5) as client:
                nodes: list[dict[str, Any]] = client.execute("query-named-block-nodes")
        except (VhostblkError, TimeoutError):
            continue
        for node in nodes:
            if node.get("drv") == "file" and os.path.isabs(str(node.get("file", ""))):
                yield f"{place.name}/{node['node-name']}", node["file"]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
