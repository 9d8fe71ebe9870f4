/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/dedup.c: hashes what is written, on the I/O thread it arrives on. What becomes of it is decided in
 * Python (vhostblk/dedup/store.py).
 *
 * The data are copied first, and the copy is both hashed and stored: a guest that changed its memory
 * between the two could otherwise have something stored under the fingerprint of something
 * else, which other guests would be given later.
 */
#include "dedup_hash.h"
#include "../blake3.h"

#include <errno.h>
#include <string.h>

struct dedup_node {
    struct vb_node node;
    struct vb_dedup_hash hash;
};

/* A write on its way. Lies behind its data and digests, in the same memory. */
struct hashed {
    struct vb_request *request; /* the one from above */
    struct iovec iov[2];
    unsigned char *memory;
    size_t memory_size;
};

static struct dedup_node *of(struct vb_node *node)
{
    return vb_container_of(node, struct dedup_node, node);
}

static void hashed_done(struct vb_request *part)
{
    struct hashed *hashed = part->owner;
    struct vb_request *request = hashed->request;
    int ret = part->ret;

    vb_request_free(part);
    vb_buffer_put(request->thread, hashed->memory, hashed->memory_size);
    vb_complete(request, ret);
}

static void copy_data(const struct vb_request *request, unsigned char *to)
{
    for (uint32_t i = 0; i < request->niov; i++) {
        memcpy(to, request->iov[i].iov_base, request->iov[i].iov_len);
        to += request->iov[i].iov_len;
    }
}

/* Of the blocks that are covered; `digests` is full of zeroes. */
static bool hash_blocks(struct dedup_node *dedup, const struct vb_request *request,
                        const unsigned char *data, unsigned char *digests)
{
    uint64_t size = 1ull << dedup->hash.block_bits;
    uint64_t at = -request->offset & (size - 1); /* of the first whole block, in the data */

    if (at >= request->bytes) {
        return true;
    }
    return vb_dedup_hash_blocks(&dedup->hash, request->thread, data + at,
                                (request->bytes - at) >> dedup->hash.block_bits,
                                digests + (at ? VB_DEDUP_DIGEST : 0));
}

static void submit_write(struct dedup_node *dedup, struct vb_request *request)
{
    uint64_t first = request->offset >> dedup->hash.block_bits;
    uint64_t last = (request->offset + request->bytes - 1) >> dedup->hash.block_bits;
    size_t digests_size = (last - first + 1) * VB_DEDUP_DIGEST;
    size_t data_size = (request->bytes + 15) & ~(size_t)15;
    size_t memory_size = data_size + digests_size + sizeof(struct hashed);
    unsigned char *memory = vb_buffer_get(request->thread, memory_size);
    struct hashed *hashed;
    struct vb_request *part;

    if (!memory) {
        vb_complete(request, -ENOMEM);
        return;
    }
    copy_data(request, memory);
    memset(memory + data_size, 0, digests_size);
    if (!hash_blocks(dedup, request, memory, memory + data_size)) {
        vb_buffer_put(request->thread, memory, memory_size);
        vb_complete(request, -ENOMEM);
        return;
    }
    hashed = (struct hashed *)(memory + data_size + digests_size);
    hashed->request = request;
    hashed->iov[0] = (struct iovec){memory, request->bytes};
    hashed->iov[1] = (struct iovec){memory + data_size, digests_size};
    hashed->memory = memory;
    hashed->memory_size = memory_size;
    part = vb_request_new(request->thread);
    part->op = request->op;
    part->flags = request->flags;
    part->offset = request->offset;
    part->bytes = request->bytes;
    part->iov = hashed->iov;
    part->niov = 2;
    part->done = hashed_done;
    part->owner = hashed;
    vb_submit(dedup->node.children[0], part);
}

static void dedup_submit(struct vb_node *node, struct vb_request *request)
{
    if (request->op == VB_OP_WRITE && request->bytes > 0) {
        submit_write(of(node), request);
    } else {
        vb_submit(node->children[0], request);
    }
}

static void dedup_destroy(struct vb_node *node)
{
    vb_dedup_hash_destroy(&of(node)->hash);
}

static const struct vb_node_ops dedup_ops = {
    .name = "dedup",
    .submit = dedup_submit,
    .destroy = dedup_destroy,
};

struct vb_node *vb_node_dedup_new(struct vb_engine *engine, uint8_t block_bits, bool sha256,
                                  char *error)
{
    struct dedup_node *dedup = vb_node_alloc(engine, &dedup_ops, sizeof(*dedup), error);

    if (dedup && vb_dedup_hash_init(&dedup->hash, block_bits, sha256, error) < 0) {
        vb_node_free(&dedup->node);
        return NULL;
    }
    return dedup ? &dedup->node : NULL;
}

void vb_dedup_blake3(const void *data, size_t blocks, uint8_t block_bits, uint8_t *digests,
                     unsigned vector)
{
    vb_blake3(data, blocks, block_bits, digests, vector);
}
