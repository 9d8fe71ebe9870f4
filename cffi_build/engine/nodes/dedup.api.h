/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * dedup: stands above the `map` of a dedup disk (child 0), which hands all writes to Python. Each
 * write arrives there as two pieces of memory that nobody changes: the data, copied from the guest, and for
 * each block of 2^block_bits bytes that the write touches VB_DEDUP_DIGEST bytes: its BLAKE3
 * or SHA-256, or zeroes if the write does not cover the block. Everything else goes to the child as it is.
 */
#define VB_DEDUP_DIGEST 32

vb_node *vb_node_dedup_new(vb_engine *engine, uint8_t block_bits, bool sha256, char *error);

/*
 * digest: hashes blocks of Python's own on an I/O thread. A read of it leaves in the same memory, behind the
 * blocks that are there, VB_DEDUP_DIGEST bytes for each.
 */
vb_node *vb_node_digest_new(vb_engine *engine, uint8_t block_bits, bool sha256, char *error);

/* BLAKE3 of blocks of one size: blake3.h. */
void vb_dedup_blake3(const void *data, size_t blocks, uint8_t block_bits, uint8_t *digests,
                     unsigned vector);
