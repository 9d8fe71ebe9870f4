/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/dedup_hash.c: BLAKE3 is the engine's own (../blake3.h), SHA-256 OpenSSL's.
 */
#include "dedup_hash.h"
#include "../blake3.h"

#include <errno.h>

int vb_dedup_hash_init(struct vb_dedup_hash *hash, uint8_t block_bits, bool sha256, char *error)
{
    hash->block_bits = block_bits;
    hash->sha256 = sha256 ? EVP_MD_fetch(NULL, "SHA256", NULL) : NULL;
    if (sha256 && !hash->sha256) {
        return vb_error(error, -ENOTSUP, "OpenSSL has no SHA-256 here");
    }
    return 0;
}

void vb_dedup_hash_destroy(struct vb_dedup_hash *hash)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        EVP_MD_CTX_free(hash->contexts[i]);
    }
    EVP_MD_free(hash->sha256);
}

bool vb_dedup_hash_blocks(struct vb_dedup_hash *hash, const struct vb_iothread *thread,
                          const unsigned char *data, uint64_t blocks, unsigned char *digests)
{
    EVP_MD_CTX **context = &hash->contexts[thread->index];
    size_t size = (size_t)1 << hash->block_bits;

    if (!hash->sha256) {
        vb_blake3(data, blocks, hash->block_bits, digests, 0);
        return true;
    }
    if (!*context && !(*context = EVP_MD_CTX_new())) {
        return false;
    }
    for (; blocks > 0; blocks--) {
        if (!EVP_DigestInit_ex(*context, hash->sha256, NULL) ||
            !EVP_DigestUpdate(*context, data, size) ||
            !EVP_DigestFinal_ex(*context, digests, NULL)) {
            return false;
        }
        data += size;
        digests += VB_DEDUP_DIGEST;
    }
    return true;
}
