# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/quickstart: the root disk of a real system, and what its first boot wrote."""

from __future__ import annotations

import hashlib
import os
import re
import signal

import pytest
from guest import GuestImages, Process, Workspace
from guest.disks import check_ext4, read_ext4
from guest.images import REPOSITORY
from guest.legs import qemu_img

SEED = REPOSITORY / "scripts" / "guest" / "seed"
# Done before what the quick start waits for.
FIRST = """runcmd:
  - - sh
    - -c
    - |
      {
          echo "VMTEST root=$(findmnt -no SOURCE /)"
          echo "VMTEST driver=$(basename $(readlink -f /sys/block/vda/device/driver))"
          echo "VMTEST serial=$(cat /sys/block/vda/serial)"
          dd if=/dev/urandom of=/root/data bs=1M count=32 conv=fsync
          sha256sum /root/data | sed 's/^/VMTEST sum=/'
      } >/dev/ttyS0
"""


@pytest.mark.timeout(420)
def test_the_first_boot_of_debian(workspace: Workspace, debian_images: GuestImages) -> None:
    """Cloud-init runs, the disk is limited and a snapshot of it taken; the power button ends it."""
    seed = workspace.path / "seed"
    seed.mkdir()
    (seed / "meta-data").write_text((SEED / "meta-data").read_text())
    user_data = (SEED / "user-data").read_text()
    assert user_data.count("runcmd:\n") == 1
    (seed / "user-data").write_text(user_data.replace("runcmd:\n", FIRST))
    disk = workspace.path / f"root-{os.getpid()}.raw"  # the backend is called by it
    process = Process(
        [
            *(str(REPOSITORY / "scripts" / "quickstart"), "--check"),
            *(f"--disk={disk}", f"--seed={seed}"),
        ],
        workspace.path / "quickstart.log",
        name="quickstart",
    )
    try:
        status = process.wait(380)
    finally:
        if process.alive():
            process.send_signal(signal.SIGTERM)  # it ends QEMU and the backend
            process.wait(30)
    said = process.output()
    assert status == 0, said[-2000:]
    assert "quickstart: warning" not in said  # the backend, too, has ended in order
    # Not only at the beginning of a line: getty's prompt may stand there.
    facts = dict(re.findall(r"VMTEST (\w+)=(\S+)", said))
    assert facts["root"] == "/dev/vda"
    assert facts["driver"] == "virtio_blk"
    assert facts["serial"] == "quickstart"
    # The image is as it was when the snapshot was taken; what came later is in the overlay.
    [overlay] = workspace.path.glob(f"{disk.stem}.*.qcow2")
    qemu_img("check", "-f", "qcow2", overlay)
    raw = workspace.path / "as-qemu-reads.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, raw)
    check_ext4(raw)
    assert hashlib.sha256(read_ext4(raw, "/root/data")).hexdigest() == facts["sum"]
