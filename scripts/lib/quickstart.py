# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves the Debian guest's disk and boots QEMU from it; scripts/quickstart calls it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
GUEST = TOP / "build" / "guest"
SEED = GUEST / "seed"
SERIAL = "quickstart"
VHOSTBLK = TOP / ".venv" / "bin" / "vhostblk"
MEMORY = "1G"
# scripts/guest/seed/user-data prints it. A login prompt may stand before it on the line, and
# systemd may show the command that prints it, in which no path follows.
MARKER = "CLOUD-INIT-DONE root=/"
READY_SECONDS = 20
BOOT_SECONDS = 600
POWEROFF_SECONDS = 90

sys.path.insert(0, str(TOP / "vm-tests"))


class QuickstartError(Exception):
    """What went wrong, in a sentence for the operator."""


def say(text: str) -> None:
    print(f"quickstart: {text}", file=sys.stderr, flush=True)


def accelerator() -> str:
    """QEMU's -accel argument."""
    from guest.accel import PROBE_SECONDS, find_accelerator
    from guest.images import GuestImages

    if os.access("/dev/kvm", os.R_OK | os.W_OK) and "VHOSTBLK_ACCEL" not in os.environ:
        say(f"/dev/kvm is there; a tiny guest shows whether it works (at most {PROBE_SECONDS} s)")
    return find_accelerator(GuestImages(GUEST))


def forget(disk: Path) -> None:
    """What belongs to a disk: the snapshots of it, and how they hang together."""
    for kind in ("*.qcow2", "state*"):
        for file in disk.parent.glob(f"{disk.stem}.{kind}"):
            file.unlink()


def copy_of_disk(target: Path) -> Path:
    """The guest writes into a copy, which costs no space where the file system can share blocks."""
    part = target.with_suffix(".part")
    subprocess.run(
        ["cp", "--reflink=auto", "--sparse=always", GUEST / "disk.raw", part], check=True
    )
    part.replace(target)
    return target


def disk_to_keep(*, fresh: bool) -> Path:
    """The disk of the guest on the terminal, with what it wrote the last time."""
    disk, master = GUEST / "quickstart.raw", GUEST / "disk.raw"
    if fresh or not disk.exists() or disk.stat().st_mtime < master.stat().st_mtime:
        say("copying the image")
        forget(disk)
        copy_of_disk(disk)
    return disk


@contextlib.contextmanager
def serve(disk: Path) -> Iterator[str]:
    """A backend for `disk`, as long as the context lasts; gives its name."""
    name = disk.stem
    # The state file knows of the snapshots that the next start has to serve.
    command = [str(VHOSTBLK), "serve", str(disk), "--serial", SERIAL]
    command += ["--state", str(disk.with_suffix(".state"))]
    say(shlex.join(command))
    # A session of its own, so that Ctrl-C in the guest's terminal does not reach it.
    backend = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # QEMU's options; qemu_command() asks for them
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ready = threading.Event()

    def listen() -> None:
        assert backend.stderr is not None
        for line in backend.stderr:
            # The guest's terminal may be in raw mode.
            print(line.rstrip(), file=sys.stderr, end="\r\n", flush=True)
            if line.startswith("vhostblk: ready"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    try:
        if not ready.wait(READY_SECONDS):
            raise QuickstartError(f"vhostblk was not ready within {READY_SECONDS} s")
        time.sleep(0.1)
        if backend.poll() is not None:
            raise QuickstartError(f"vhostblk ended with status {backend.returncode}")
        yield name
    finally:
        if backend.poll() is None:
            backend.terminate()
        try:
            status = backend.wait(10)
        except subprocess.TimeoutExpired:
            backend.kill()
            status = backend.wait()
        reader.join(2)
        if status != 0:
            say(f"warning: vhostblk ended with status {status}")


def qemu_command(accel: str, name: str, seed: Path) -> list[str]:
    """QEMU with the served disk as its root, cloud-init's data beside it, and a network card."""
    ask = [str(VHOSTBLK), "qemu-args", name, "--memory", MEMORY]
    say(shlex.join(ask))
    answer = subprocess.run([*ask, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    kernel = "root=LABEL=root rw console=ttyS0 net.ifnames=0 panic=-1 quiet systemd.show_status=1"
    if accel.startswith("tcg"):
        kernel += " mitigations=off no_timer_check tsc=reliable cryptomgr.notests"
        kernel += " random.trust_cpu=on"
    cidata = f"driver=vvfat,node-name=seed,dir={seed},label=cidata,read-only=on"
    return [
        "qemu-system-x86_64",
        *("-accel", accel, "-cpu", "max", "-smp", "2", "-m", MEMORY, "-machine", "q35"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *json.loads(answer.stdout),
        *("-blockdev", cidata, "-device", "virtio-blk-pci,drive=seed"),
        *("-nic", "user,model=virtio-net-pci"),
        *("-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initrd.img")),
        *("-append", kernel),
    ]


def interactive(command: list[str]) -> int:
    """The guest on this terminal until it powers off."""
    say("booting; log in as debian, password vhostblk. To end: sudo poweroff, or Ctrl-A X")
    terminal = ["-chardev", "stdio,id=tty,mux=on,signal=off", "-serial", "chardev:tty"]
    return subprocess.call([*command, *terminal, "-mon", "chardev=tty,mode=readline"])


def check(command: list[str], monitor: Path, name: str) -> int:
    """Waits for the end of the first boot, changes the tree, powers off; 0 if all that worked."""
    begin = time.monotonic()
    qemu = subprocess.Popen(
        [*command, "-serial", "stdio", "-qmp", f"unix:{monitor},server=on,wait=off"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    limit = threading.Timer(BOOT_SECONDS, qemu.kill)
    limit.start()
    done = False
    try:
        assert qemu.stdout is not None
        for raw in qemu.stdout:
            line = raw.decode(errors="replace").rstrip()
            if line:
                print(f"[{time.monotonic() - begin:6.1f}] {line}", flush=True)
            if not done and MARKER in line:
                done = True
                say(f"cloud-init finished after {time.monotonic() - begin:.0f} s")
                tour(name)
                say("powering off")
                limit.cancel()
                limit = threading.Timer(POWEROFF_SECONDS, qemu.kill)
                limit.start()
                power_button(monitor)
        status = qemu.wait()
    finally:
        limit.cancel()
        if qemu.poll() is None:
            qemu.kill()
            qemu.wait()
    if not done:
        raise QuickstartError(
            f"the guest did not finish its first boot (QEMU's status {status}, "
            f"{time.monotonic() - begin:.0f} s)"
        )
    if status != 0:
        raise QuickstartError(f"the guest did not power off within {POWEROFF_SECONDS} s")
    say(f"the guest has powered off; all done in {time.monotonic() - begin:.0f} s")
    return 0


def tour(name: str) -> None:
    """What can be done to a disk in use: a filter, a snapshot below it, no filter any more."""
    for words in (
        ["throttle", "set", "--name", name, name, "iops=1000", "burst=4x"],
        ["qmp", "--name", name, "blockdev-snapshot-sync", f"device={name}"],
        ["graph", name],
        ["throttle", "show", "--name", name],
        ["qmp", "--name", name, "block-filter-remove", f"node-name=throttle-{name}"],
        ["graph", name],
    ):
        say(shlex.join(["vhostblk", *words]))
        subprocess.run([str(VHOSTBLK), *words], stdin=subprocess.DEVNULL, check=True)


def power_button(monitor: Path) -> None:
    """QEMU's power button, which makes the guest shut down in order."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(monitor))
        stream = client.makefile("rw", encoding="utf-8")
        stream.readline()
        for name in ("qmp_capabilities", "system_powerdown"):
            stream.write(json.dumps({"execute": name}) + "\n")
            stream.flush()
            while "return" not in (answer := json.loads(stream.readline())):
                if "error" in answer:
                    raise QuickstartError(f"QEMU refused {name}: {answer['error']['desc']}")


def boot_once(accel: str, disk: Path, seed: Path) -> int:
    """What --check does, with a disk that has never booted."""
    with serve(disk) as name, tempfile.TemporaryDirectory(prefix="vhostblk-") as directory:
        return check(qemu_command(accel, name, seed), Path(directory, "qemu.sock"), name)


def parser() -> argparse.ArgumentParser:
    """scripts/quickstart has the help."""
    result = argparse.ArgumentParser(prog="quickstart", add_help=False, allow_abbrev=False)
    for flag in ("--check", "--fresh", "--tour"):
        result.add_argument(flag, action="store_true")
    result.add_argument("--disk", type=Path)
    result.add_argument("--seed", type=Path, default=SEED)
    return result


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.tour:
        tour("quickstart")
        return 0
    checking = options.check
    if not checking and not (sys.stdin.isatty() and sys.stdout.isatty()):
        say("this is not a terminal: doing what --check does")
        checking = True
    accel = accelerator()
    say(f"accelerator: {accel}" + (", slow: a first boot takes a minute" if "tcg" in accel else ""))
    if not checking:
        with serve(disk_to_keep(fresh=options.fresh)) as name:
            say(f"in another terminal, try: {VHOSTBLK} status {name}; scripts/quickstart --tour")
            return interactive(qemu_command(accel, name, options.seed))
    if options.disk:
        forget(options.disk)
        return boot_once(accel, copy_of_disk(options.disk), options.seed)
    disk = copy_of_disk(GUEST / f"check-{os.getpid()}.raw")
    try:
        return boot_once(accel, disk, options.seed)
    finally:
        disk.unlink()
        forget(disk)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (QuickstartError, OSError, subprocess.SubprocessError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        sys.exit(1)
