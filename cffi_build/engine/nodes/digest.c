/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/digest.c: hashes blocks of Python's own on an I/O thread: those that a guest has written partly, with
 * what Python has put around (vhostblk/nodes/dedup). See dedup.api.h.
 */
#include "dedup_hash.h"

#include <errno.h>

struct digest_node {
    struct vb_node node;
    struct vb_dedup_hash hash;
};

static struct digest_node *of(struct vb_node *node)
{
    return vb_container_of(node, struct digest_node, node);
}

static int hash_memory(struct digest_node *digest, const struct vb_request *request)
{
    uint64_t size = (1ull << digest->hash.block_bits) + VB_DEDUP_DIGEST;
    uint64_t blocks = request->bytes / size;
    unsigned char *memory;

    if (request->op != VB_OP_READ || request->niov != 1 || request->bytes % size) {
        return -EINVAL;
    }
    memory = request->iov[0].iov_base;
    return vb_dedup_hash_blocks(&digest->hash, request->thread, memory, blocks,
                                memory + (blocks << digest->hash.block_bits))
               ? 0
               : -ENOMEM;
}

static void digest_submit(struct vb_node *node, struct vb_request *request)
{
    vb_complete(request, hash_memory(of(node), request));
}

static void digest_destroy(struct vb_node *node)
{
    vb_dedup_hash_destroy(&of(node)->hash);
}

static const struct vb_node_ops digest_ops = {
    .name = "digest",
    .submit = digest_submit,
    .destroy = digest_destroy,
};

struct vb_node *vb_node_digest_new(struct vb_engine *engine, uint8_t block_bits, bool sha256,
                                   char *error)
{
    struct digest_node *digest = vb_node_alloc(engine, &digest_ops, sizeof(*digest), error);

    if (digest && vb_dedup_hash_init(&digest->hash, block_bits, sha256, error) < 0) {
        vb_node_free(&digest->node);
        return NULL;
    }
    return digest ? &digest->node : NULL;
}
