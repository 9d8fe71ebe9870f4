# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's `dedup` node (cffi_build/engine/nodes/dedup.c), which hashes what is written, and
its `digest` node (digest.c), which hashes blocks of Python's own."""

from __future__ import annotations

import struct

from vhostblk._engine import ffi, lib
from vhostblk.engine import OP_READ, Engine, NodeHandle

DIGEST: int = lib.VB_DEDUP_DIGEST
_PIECE = struct.Struct("=QQ")  # struct iovec


def new_dedup(engine: Engine, block_bits: int, *, sha256: bool) -> NodeHandle:
    """A `dedup` node; its child 0 is the map of the disk."""
    return NodeHandle(
        engine, engine.made(lib.vb_node_dedup_new(engine.pointer, block_bits, sha256, engine.error))
    )


class Digester:
    """A `digest` node."""

    def __init__(self, engine: Engine, block_bits: int, *, sha256: bool) -> None:
        self._engine = engine
        self._bits = block_bits
        pointer = lib.vb_node_digest_new(engine.pointer, block_bits, sha256, engine.error)
        self._node = NodeHandle(engine, engine.made(pointer))

    async def digest(self, blocks: bytes | memoryview, request: int) -> list[bytes]:
        """Of each block, computed on the I/O thread of an upcall, which does not end before."""
        size = len(blocks)
        memory = bytearray(size + (size >> self._bits) * DIGEST)
        memory[:size] = blocks
        await self._engine.submit(self._node, OP_READ, 0, memory, request=request)
        return [bytes(memory[at : at + DIGEST]) for at in range(size, len(memory), DIGEST)]

    def free(self) -> None:
        """Give it back; nothing is being hashed."""
        self._node.free()


def written_digests(iov: int) -> bytes:
    """Of a write that the node has handed up, whose memory is at `iov` (dedup.api.h)."""
    base, length = _PIECE.unpack_from(ffi.buffer(ffi.cast("void *", iov), 2 * _PIECE.size), 16)
    return bytes(ffi.buffer(ffi.cast("char *", base), length))


def blake3(block: bytes | bytearray | memoryview, *, vector: int = 0) -> bytes:
    """BLAKE3 of a block of 2, 4, ... 64 KiB. `vector`: bytes of the CPU's vectors, 0 for all."""
    size = len(block)
    if size & (size - 1) or not 2 << 10 <= size <= 64 << 10:
        raise ValueError(f"a block of {size} bytes")
    digest = ffi.new("uint8_t[]", DIGEST)
    lib.vb_dedup_blake3(ffi.from_buffer(block), 1, size.bit_length() - 1, digest, vector)
    return bytes(ffi.buffer(digest))
