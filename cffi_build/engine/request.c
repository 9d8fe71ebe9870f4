/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * request.c: how a request moves through the tree, and the pool that nodes take
 * requests of their own from.
 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *vb_must_alloc(size_t size)
{
    void *memory = calloc(1, size);

    if (!memory) {
        /* Losing one guest's write silently would be worse than this. */
        fprintf(stderr, "vhostblk: out of memory (%zu bytes)\n", size);
        abort();
    }
    return memory;
}

struct vb_request *vb_request_new(struct vb_iothread *thread)
{
    struct vb_request *request = thread->free_requests;

    vb_assert(vb_in_iothread(thread));
    if (request) {
        thread->free_requests = request->next;
    } else {
        request = vb_must_alloc(sizeof(*request));
    }
    request->thread = thread;
    request->depth = 0;
    request->flags = 0;
    request->iov = NULL;
    request->niov = 0;
    request->take = NULL;
    request->take_unit = 0;
    request->taken = false;
    request->start_ns = thread->now_ns;
    return request;
}

void vb_request_free(struct vb_request *request)
{
    struct vb_iothread *thread = request->thread;

    vb_assert(vb_in_iothread(thread));
    request->next = thread->free_requests;
    thread->free_requests = request;
}

void vb_request_fill(struct vb_request *request, const void *data)
{
    const unsigned char *from = data;

    vb_guest_write_begin();
    for (uint32_t i = 0; i < request->niov; i++) {
        memcpy(request->iov[i].iov_base, from, request->iov[i].iov_len);
        from += request->iov[i].iov_len;
    }
    vb_guest_write_end();
}

/* The buffer that has the byte at `position`, which then counts from its start. */
static const struct iovec *find_buffer(const struct vb_request *request, uint64_t *position)
{
    const struct iovec *iov = request->iov;

    for (; *position >= iov->iov_len; iov++) {
        *position -= iov->iov_len;
    }
    return iov;
}

void vb_request_get(const struct vb_request *request, uint64_t position, void *to, uint64_t bytes)
{
    unsigned char *at = to;

    for (const struct iovec *iov = find_buffer(request, &position); bytes > 0; iov++) {
        uint64_t here = iov->iov_len - position < bytes ? iov->iov_len - position : bytes;

        memcpy(at, (const char *)iov->iov_base + position, here);
        at += here;
        bytes -= here;
        position = 0;
    }
}

void vb_request_put(struct vb_request *request, uint64_t position, const void *from, uint64_t bytes)
{
    const unsigned char *at = from;

    vb_guest_write_begin();
    for (const struct iovec *iov = find_buffer(request, &position); bytes > 0; iov++) {
        uint64_t here = iov->iov_len - position < bytes ? iov->iov_len - position : bytes;

        memcpy((char *)iov->iov_base + position, at, here);
        at += here;
        bytes -= here;
        position = 0;
    }
    vb_guest_write_end();
}

/* Stops at the first block that is not zero; the compiler makes vector code of it. */
static bool memory_is_zero(const unsigned char *memory, size_t size)
{
    typedef uint64_t word __attribute__((aligned(1), may_alias));

    for (; size >= 64; memory += 64, size -= 64) {
        const word *words = (const word *)memory;
        uint64_t bits = 0;

        for (int i = 0; i < 8; i++) {
            bits |= words[i];
        }
        if (bits) {
            return false;
        }
    }
    while (size > 0 && memory[size - 1] == 0) {
        size--;
    }
    return size == 0;
}

bool vb_request_is_zero(const struct vb_request *request)
{
    for (uint32_t i = 0; i < request->niov; i++) {
        if (!memory_is_zero(request->iov[i].iov_base, request->iov[i].iov_len)) {
            return false;
        }
    }
    return true;
}

void vb_submit(struct vb_node *node, struct vb_request *request)
{
    vb_assert(vb_in_iothread(request->thread));
    /* A path longer than any sensible tree goes uncounted, not unserved. */
    if (request->depth < VB_PATH_MAX) {
        request->path[request->depth++] = node;
    }
    node->ops->submit(node, request);
}

void vb_complete(struct vb_request *request, int ret)
{
    uint64_t latency = request->thread->now_ns - request->start_ns;

    vb_assert(vb_in_iothread(request->thread));
    request->ret = ret;
    while (request->depth > 0) {
        struct vb_node *node = request->path[--request->depth];
        vb_stats_account(node->stats, request->thread, request->op, ret, request->bytes, latency);
    }
    request->done(request);
}
