# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process with a tiny guest, and the disks in it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .console import Console, ConsoleError, Result
from .images import GuestImages
from .process import Process, ProcessError, wait_until
from .qmp import QmpClient, QmpError
from .workspace import Workspace

# Another QEMU than the installed one may be judged with the same tests.
QEMU = os.environ.get("VHOSTBLK_QEMU") or "qemu-system-x86_64"
BOOT_SECONDS = 60
BOOTS = 3
COMMAND_SECONDS = 60
# Under TCG a guest has no use for what these do, and they take seconds of its boot.
KERNEL_OPTIONS = (
    "console=ttyS0 quiet net.ifnames=0 mitigations=off no_timer_check tsc=reliable"
    " cryptomgr.notests random.trust_cpu=on panic=-1"
    # The driver's test for a bug of some serial ports can misjudge one whose interrupts come late,
    # as they do on a busy host. (Seen once in many runs: repeated and lost bytes after a reboot.)
    " 8250.skip_txen_test=1"
)


@cache
def qemu_version() -> tuple[int, int]:
    text = subprocess.run(
        [QEMU, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    if match is None:
        raise RuntimeError(f"{QEMU} --version says {text!r}")
    return int(match.group(1)), int(match.group(2))


@dataclass
class Disk:
    """A vhost-user-blk device of the guest: its backend's socket, and QEMU's options for it."""

    id: str
    socket: Path
    num_queues: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def chardev(self) -> dict[str, Any]:
        """Arguments of chardev-add: QEMU connects, and comes back after a second."""
        data: dict[str, Any] = {
            "addr": {"type": "unix", "data": {"path": str(self.socket)}},
            "server": False,
        }
        # reconnect counts seconds; later versions of QEMU know milliseconds alone.
        if qemu_version() >= (9, 2):
            data["reconnect-ms"] = 1000
        else:
            data["reconnect"] = 1
        return {"id": f"chr-{self.id}", "backend": {"type": "socket", "data": data}}

    def device(self, bus: str) -> dict[str, Any]:
        """Arguments of device_add."""
        device: dict[str, Any] = {
            "driver": "vhost-user-blk-pci",
            "id": self.id,
            "chardev": f"chr-{self.id}",
            "bus": bus,
            **self.options,
        }
        if self.num_queues is not None:
            device["num-queues"] = self.num_queues
        return device

    def argv(self, bus: str) -> list[str]:
        """The same for QEMU's command line."""
        reconnect = "reconnect-ms=1000" if qemu_version() >= (9, 2) else "reconnect=1"
        chardev = f"socket,id=chr-{self.id},path={self.socket},{reconnect}"
        options = self.device(bus)
        driver = options.pop("driver")
        device = ",".join([driver, *(f"{key}={value}" for key, value in options.items())])
        return ["-chardev", chardev, "-device", device]


class Job:
    """A command that runs in the guest's background."""

    def __init__(self, guest: Guest, number: int, command: str) -> None:
        self._guest = guest
        self._base = f"/tmp/job-{number}"
        self.command = command
        # A subshell keeps `exit` and `cd` of the command from reaching the status line.
        guest.check(f"( ( {command} ) >{self._base}.out 2>&1; echo $? >{self._base}.status ) &")

    def status(self) -> int | None:
        """Its exit status, or None while it runs."""
        result = self._guest.run(f"cat {self._base}.status")
        return int(result.output) if result.status == 0 and result.output else None

    def _ended(self) -> tuple[int] | None:
        """The status as something true, even if it is 0."""
        status = self.status()
        return None if status is None else (status,)

    def wait(self, timeout: float) -> int:
        """Wait for its end; its exit status."""
        what = f"the end of `{self.command}` in the guest"
        # Not too often: the questions themselves cost the guest time.
        (status,) = wait_until(self._ended, what, timeout, every=0.1)
        return status

    def check(self, timeout: float) -> None:
        """Wait for its end, which must be a success."""
        status = self.wait(timeout)
        if status:
            output = self._guest.check(f"tail -c 3000 {self._base}.out")
            raise ConsoleError(f"`{self.command}` ended with {status}:\n{output}")


class Load:
    """A command that the guest repeats in the background until told otherwise."""

    def __init__(self, guest: Guest, number: int, command: str) -> None:
        self._guest = guest
        self._flag = f"/tmp/load-{number}"
        guest.check(f"touch {self._flag}")
        self._job = guest.spawn(f"while [ -e {self._flag} ]; do {command} || exit 1; done")

    def finish(self, timeout: float = 60) -> None:
        """Let the last round end; every round must have been a success."""
        self._guest.check(f"rm {self._flag}")
        self._job.check(timeout)


class Guest:
    """QEMU, its monitor, and the shell inside the guest.

    Without `shared_memory`, `qemu_options` must see to it. `wrapper` is a command that starts
    QEMU, which then is not ours to kill.
    """

    def __init__(
        self,
        workspace: Workspace,
        images: GuestImages,
        accel: str,
        *,
        disks: Sequence[Disk] = (),
        smp: str = "2",
        memory: str = "512M",
        append: str = "vmtest.shell",
        initrd: Path | None = None,
        qemu_options: Sequence[str] = (),
        shared_memory: bool = True,
        wrapper: Sequence[str] = (),
        free_ports: int = 4,
        boot_timeout: float = BOOT_SECONDS,
        name: str = "guest",
    ) -> None:
        self.workspace = workspace
        self.name = name
        self.boot_timeout = boot_timeout
        self._jobs = itertools.count(1)
        self._process: Process | None = None
        self._console: Console | None = None
        self._qmp: QmpClient | None = None
        self._ports: dict[str, str | None] = {}
        cpu = "host" if accel.startswith("kvm") else "qemu64"
        self._wrapped = bool(wrapper)
        self._argv = [
            *wrapper,
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", accel, "-cpu", cpu, "-smp", smp, "-m", memory),
            *("-machine", "q35"),
            *("-action", "reboot=shutdown,panic=shutdown"),
            *("-kernel", str(images.kernel), "-initrd", str(initrd or images.tiny_initrd)),
            *("-append", f"{KERNEL_OPTIONS} {append}"),
            *(
                "-chardev",
                f"socket,id=serial,path={self._path('serial')},server=on,wait=on,"
                f"logfile={self._path('console.log')},logappend=on",
            ),
            *("-serial", "chardev:serial"),
            # The second port is the guest agent's.
            *("-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off"),
            *("-serial", "chardev:agent"),
            *("-chardev", f"socket,id=monitor,path={self._path('qmp')},server=on,wait=off"),
            *("-mon", "chardev=monitor,mode=control"),
        ]
        for number in range(len(disks) + free_ports):
            port = f"port{number}"
            disk = disks[number] if number < len(disks) else None
            self._ports[port] = disk.id if disk else None
            place = f"chassis={number + 1},slot={number + 1}"
            self._argv += ["-device", f"pcie-root-port,id={port},{place}"]
            if disk:
                self._argv += disk.argv(port)
        if shared_memory:
            self._argv += ["-object", f"memory-backend-memfd,id=mem,size={memory},share=on"]
            self._argv += ["-machine", "memory-backend=mem"]
        self._argv += qemu_options

    def _path(self, suffix: str) -> Path:
        return self.workspace.path / f"{self.name}.{suffix}"

    @property
    def agent(self) -> Path:
        """The socket of the guest's agent, for whoever wants to talk to it; see start_agent()."""
        return self._path("agent")

    # ---- life ----

    def start(self, *, wait_shell: bool = True) -> None:
        """Start QEMU and, unless told otherwise, wait for the guest's shell."""
        if not wait_shell:
            self._boot(wait_shell=False)
            return

        def boot() -> None:
            self.close()
            self._boot(wait_shell=True)

        self._until_clock_is_right(boot)

    def reboot(self, reset: Callable[[], object]) -> None:
        """Call what makes the running guest boot again, and wait for its shell."""

        def boot() -> None:
            reset()
            self.console.wait_ready(self.boot_timeout)

        self.qmp.command("set-action", {"reboot": "reset"})
        self._until_clock_is_right(boot)

    def _until_clock_is_right(self, boot: Callable[[], None]) -> None:
        """Boot, and do so again if the guest's seconds are too short.

        A kernel that is held up while it measures how fast its clock goes is wrong about that until
        its end: seconds that are too short make it complain about stalls.
        """
        for _ in range(BOOTS):
            begin = time.monotonic()
            boot()
            uptime = float(self.check("cat /proc/uptime").split()[0])
            if uptime < time.monotonic() - begin:
                return
        raise ConsoleError(f"the guest's clock goes too fast, even after {BOOTS} boots")

    def _boot(self, *, wait_shell: bool) -> None:
        self._process = Process(self._argv, self._path("qemu.log"), name=QEMU)
        process = self._process

        def serial() -> bool:
            process.check_alive()
            return self._path("serial").exists()

        # QEMU waits for a client of the serial port, so that nothing the guest says is lost.
        wait_until(serial, "QEMU's serial port", 20)
        self._console = Console(self._path("serial"))
        if wait_shell:
            self.console.wait_ready(self.boot_timeout)
        self._qmp = QmpClient(self._path("qmp"))

    def close(self) -> None:
        """End QEMU whatever its state."""
        if self._wrapped and self._process is not None and self._process.alive():
            # Killing the wrapper would leave QEMU behind.
            self._process.send_signal(signal.SIGTERM)
            with suppress(ProcessError):
                self._process.wait(10)
        for connection in (self._console, self._qmp):
            if connection is not None:
                connection.close()
        if self._process is not None:
            self._process.kill()
        for suffix in ("serial", "qmp", "agent"):
            self._path(suffix).unlink(missing_ok=True)
        self._console = self._qmp = self._process = None

    @property
    def process(self) -> Process:
        if self._process is None:
            raise ConsoleError("the guest is not running")
        return self._process

    @property
    def console(self) -> Console:
        if self._console is None:
            raise ConsoleError("the guest is not running")
        return self._console

    @property
    def qmp(self) -> QmpClient:
        if self._qmp is None:
            raise ConsoleError("the guest is not running")
        return self._qmp

    # ---- the shell ----

    def run(self, command: str, timeout: float = COMMAND_SECONDS) -> Result:
        return self.console.run(command, timeout)

    def check(self, command: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run a command that must succeed; its output without the last newline."""
        result = self.run(command, timeout)
        if result.status:
            raise ConsoleError(
                f"`{command}` ended with {result.status} in the guest:\n{result.output[-3000:]}"
            )
        return result.output.rstrip("\n")

    def spawn(self, command: str) -> Job:
        """Run a command in the guest's background."""
        return Job(self, next(self._jobs), command)

    def load(self, command: str) -> Load:
        """Repeat a command in the guest's background."""
        return Load(self, next(self._jobs), command)

    def start_agent(self) -> None:
        """qemu-ga, unless it runs already."""
        self.check(
            "kill -0 $(cat /run/qemu-ga.pid 2>/dev/null) 2>/dev/null ||"
            " qemu-ga --daemonize --method=isa-serial --path=/dev/ttyS1 --statedir=/run"
            " --pidfile=/run/qemu-ga.pid"
        )

    def kernel_errors(self) -> list[str]:
        """What the guest's kernel has complained about since the last call."""
        lines = self.check("dmesg -c").splitlines()
        pattern = re.compile(
            r"I/O error|error, dev|blocked for more than|EXT4-fs error|Call Trace|BUG:|soft lockup"
            r"|rcu.*stall|Buffer I/O|timed? ?out",
            re.IGNORECASE,
        )
        return [line for line in lines if pattern.search(line)]

    def block_devices(self) -> set[str]:
        """Names of the guest's virtio disks: vda, vdb, ..."""
        return set(self.check("ls /sys/block").split()) & {
            f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"
        }

    # ---- disks ----

    def plug(self, disk: Disk, timeout: float = 30) -> str:
        """Hot plug a disk; its name in the guest."""
        self.qmp.command("chardev-add", disk.chardev())
        try:
            return self._plug(disk.id, disk.device, timeout)
        except Exception:
            with suppress(QmpError):  # a device may have it
                self.qmp.command("chardev-remove", {"id": f"chr-{disk.id}"})
            raise

    def unplug(self, disk: Disk, timeout: float = 30) -> None:
        """Hot unplug a disk, as far as DEVICE_DELETED and the end of its connection."""
        self._unplug(disk.id, timeout)
        # The device lets go of its chardev a moment after the event.
        wait_until(lambda: self._remove_chardev(disk), f"chardev of {disk.id} to be free", timeout)

    @contextmanager
    def qemu_drive(self, options: Mapping[str, Any], timeout: float = 30) -> Iterator[str]:
        """A disk that QEMU itself serves, with its own block layer; its device in the guest.

        `options` are those of QEMU's blockdev-add, without a name.
        """
        id = f"drive{next(self._jobs)}"
        self.qmp.command("blockdev-add", {**options, "node-name": id})
        device = {"driver": "virtio-blk-pci", "id": f"{id}-device", "drive": id}
        yield "/dev/" + self._plug(device["id"], lambda bus: {**device, "bus": bus}, timeout)
        self._unplug(device["id"], timeout)
        self.qmp.command("blockdev-del", {"node-name": id})

    def _plug(self, id: str, device: Callable[[str], dict[str, Any]], timeout: float) -> str:
        port = next((name for name, user in self._ports.items() if user is None), None)
        if port is None:
            raise ConsoleError("no free port in this guest")
        before = self.block_devices()
        self.qmp.command("device_add", device(port))
        self._ports[port] = id
        new = wait_until(lambda: self.block_devices() - before, f"disk {id} in the guest", timeout)
        (name,) = new
        # The kernel lists the disk before it has read its partition table.
        wait_until(
            lambda: self.run(f"[ -b /dev/{name} ]").status == 0,
            f"/dev/{name} in the guest",
            timeout,
        )
        return name

    def _unplug(self, id: str, timeout: float) -> None:
        self.qmp.command("device_del", {"id": id})
        self.qmp.wait_event("DEVICE_DELETED", timeout, where=lambda d: d.get("device") == id)
        for port, user in self._ports.items():
            if user == id:
                self._ports[port] = None

    def _remove_chardev(self, disk: Disk) -> bool:
        try:
            self.qmp.command("chardev-remove", {"id": f"chr-{disk.id}"})
        except QmpError as error:
            if "busy" in str(error):
                return False
            raise
        return True

    def connected(self, disk: Disk) -> bool:
        """Whether QEMU is connected to the disk's backend."""
        for chardev in self.qmp.command("query-chardev"):
            if chardev["label"] == f"chr-{disk.id}":
                return not chardev["filename"].startswith("disconnected:")
        return False

    def used_indexes(self, disk: Disk) -> list[int]:
        """The device's side of each virtqueue that is in use, read from the guest's memory."""
        for entry in self.qmp.command("x-query-virtio"):
            path: str = entry["path"]
            if f"/{disk.id}/" in path:
                break
        else:
            raise ConsoleError(f"QEMU knows no virtio device {disk.id}")
        queues = self.qmp.command("x-query-virtio-status", {"path": path})["num-vqs"]
        indexes = []
        for queue in range(queues):
            status = self.qmp.command("x-query-virtio-queue-status", {"path": path, "queue": queue})
            if not status["vring-used"]:
                continue  # the guest does not use this queue
            address = status["vring-used"] + 2  # after the flags
            text = self.qmp.command(
                "human-monitor-command", {"command-line": f"xp /1hx {address:#x}"}
            )
            indexes.append(int(text.split(":")[1], 16))
        return indexes

    def stop(self) -> None:
        self.qmp.command("stop")

    def cont(self) -> None:
        self.qmp.command("cont")
