# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-create for qcow2: the nodes that create.py writes to."""

from __future__ import annotations

import contextlib

from vhostblk.nodes.driver import CreateHost
from vhostblk.nodes.qcow2 import create
from vhostblk.nodes.qcow2.encryption import new_luks_header
from vhostblk.nodes.qcow2.storage import ChildStorage
from vhostblk.objects.secret import Secret


class NewFile(ChildStorage):
    """The file that becomes an image."""

    async def allocate(self, offset: int, length: int) -> None:
        """Take the space of a range, which reads as zeroes afterwards."""
        await self.ensure(offset + length)
        await self.child.write_zeroes(offset, length)


async def create_image(host: CreateHost, options: create.Qcow2CreateOptions) -> None:
    """Create the image that `options` describe."""
    create.check(options)
    async with contextlib.AsyncExitStack() as opened:
        file = NewFile(await opened.enter_async_context(host.image(options.file)))
        data_file, name = None, None
        if options.data_file is not None:
            data_file = NewFile(await opened.enter_async_context(host.image(options.data_file)))
            name = data_file.child.node.filename()
        encryption = b""
        if options.encrypt is not None:
            secret = opened.enter_context(host.using(options.encrypt.key_secret, Secret))
            encryption = await new_luks_header(options.encrypt, secret.data)
        await create.create(options, file, data_file, name, encryption)
