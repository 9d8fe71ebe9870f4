/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fingerprints of blocks, as a dedup store wants them, computed on any I/O thread.
 */
#ifndef VB_DEDUP_HASH_H
#define VB_DEDUP_HASH_H

#include "../engine.h"
#include "dedup.api.h"

#include <openssl/evp.h>

struct vb_dedup_hash {
    uint8_t block_bits;
    EVP_MD *sha256;                         /* owned; NULL: BLAKE3 */
    EVP_MD_CTX *contexts[VB_MAX_IOTHREADS]; /* owned; each is made and used by its own I/O thread */
};

/* Control. 0, or -ENOTSUP with `error`. */
int vb_dedup_hash_init(struct vb_dedup_hash *hash, uint8_t block_bits, bool sha256, char *error);
void vb_dedup_hash_destroy(struct vb_dedup_hash *hash);
/* VB_DEDUP_DIGEST bytes for each of `blocks` blocks, which lie one after the other. False: no memory. */
bool vb_dedup_hash_blocks(struct vb_dedup_hash *hash, const struct vb_iothread *thread,
                          const unsigned char *data, uint64_t blocks, unsigned char *digests);

#endif
