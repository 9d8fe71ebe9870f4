/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/copy_on_read.c: keeps requests in C where nothing is left to be copied. What Python
 * (vhostblk/nodes/copy_on_read.py) knows to lie in the topmost image is marked in a bitmap, one
 * bit for each region; requests that touch another region go up, writes as well as reads: there
 * they are kept apart, so that no copy of old data lands on top of a guest's new ones.
 *
 * Marks are set by the control thread and never taken back while requests are under way. A
 * region is marked after the data have been written: whoever sees the mark (acquire) may pass
 * (the setting is a release). One that is not seen in time costs a trip to Python, nothing else.
 */
#include "../upcall.h"
#include "copy_on_read.api.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#define WORD_BITS 64

struct copy_on_read_node {
    struct vb_node node;
    struct vb_copy_on_read_options options;
    uint64_t regions;
    _Atomic uint64_t *marks; /* owned; memory that nobody has written to takes no space */
};

static struct copy_on_read_node *of(struct vb_node *node)
{
    return vb_container_of(node, struct copy_on_read_node, node);
}

/* Bits `first` to `last` of a word, both included. */
static uint64_t mask(unsigned first, unsigned last)
{
    return (~0ull << first) & (~0ull >> (WORD_BITS - 1 - last));
}

/* The part of regions `first` to `last` that is in word `word`. */
static uint64_t mask_in(uint64_t word, uint64_t first, uint64_t last)
{
    return mask(word == first / WORD_BITS ? first % WORD_BITS : 0,
                word == last / WORD_BITS ? last % WORD_BITS : WORD_BITS - 1);
}

static bool all_marked(const struct copy_on_read_node *cor, uint64_t first, uint64_t last)
{
    if (last >= cor->regions) {
        return false;
    }
    for (uint64_t word = first / WORD_BITS; word <= last / WORD_BITS; word++) {
        uint64_t wanted = mask_in(word, first, last);

        if ((atomic_load_explicit(&cor->marks[word], memory_order_acquire) & wanted) != wanted) {
            return false;
        }
    }
    return true;
}

static void copy_on_read_submit(struct vb_node *node, struct vb_request *request)
{
    struct copy_on_read_node *cor = of(node);
    uint64_t first = request->offset >> cor->options.region_bits;

    if (request->op == VB_OP_FLUSH || request->bytes == 0 ||
        all_marked(cor, first,
                   (request->offset + request->bytes - 1) >> cor->options.region_bits)) {
        vb_submit(node->children[0], request);
    } else {
        vb_upcall_post(node, cor->options.cookie, request);
    }
}

static void copy_on_read_destroy(struct vb_node *node)
{
    free(of(node)->marks);
}

static const struct vb_node_ops copy_on_read_ops = {
    .name = "copy-on-read",
    .submit = copy_on_read_submit,
    .destroy = copy_on_read_destroy,
};

struct vb_node *vb_node_copy_on_read_new(struct vb_engine *engine,
                                         const struct vb_copy_on_read_options *options, char *error)
{
    struct copy_on_read_node *cor =
        vb_node_alloc(engine, &copy_on_read_ops, sizeof(*cor), error);

    if (!cor) {
        return NULL;
    }
    cor->options.cookie = options->cookie;
    if (vb_copy_on_read_reset(&cor->node, options->size, options->region_bits, error) < 0) {
        vb_node_free(&cor->node);
        return NULL;
    }
    return &cor->node;
}

int vb_copy_on_read_reset(struct vb_node *node, uint64_t size, uint8_t region_bits, char *error)
{
    struct copy_on_read_node *cor = of(node);
    uint64_t regions = (size >> region_bits) + ((size & ((1ull << region_bits) - 1)) != 0);
    _Atomic uint64_t *marks = calloc(regions / WORD_BITS + 1, sizeof(*marks));

    if (!marks) {
        return vb_error(error, -ENOMEM, "no memory for the marks of %" PRIu64 " regions", regions);
    }
    free(cor->marks);
    cor->marks = marks;
    cor->regions = regions;
    cor->options.size = size;
    cor->options.region_bits = region_bits;
    return 0;
}

void vb_copy_on_read_mark(struct vb_node *node, uint64_t first, uint64_t count)
{
    struct copy_on_read_node *cor = of(node);
    uint64_t last = first + count - 1;

    if (count == 0) {
        return;
    }
    vb_assert(last < cor->regions);
    for (uint64_t word = first / WORD_BITS; word <= last / WORD_BITS; word++) {
        atomic_fetch_or_explicit(&cor->marks[word], mask_in(word, first, last),
                                 memory_order_release);
    }
}

uint64_t vb_copy_on_read_find(struct vb_node *node, uint64_t first, bool marked)
{
    struct copy_on_read_node *cor = of(node);

    for (uint64_t word = first / WORD_BITS; first < cor->regions; first = ++word * WORD_BITS) {
        /* The control thread alone writes to them, and it is the one that runs this. */
        uint64_t bits = atomic_load_explicit(&cor->marks[word], memory_order_relaxed);

        bits = (marked ? bits : ~bits) & mask(first % WORD_BITS, WORD_BITS - 1);
        if (bits) {
            uint64_t found = word * WORD_BITS + (unsigned)__builtin_ctzll(bits);
            return found < cor->regions ? found : cor->regions;
        }
    }
    return cor->regions;
}
