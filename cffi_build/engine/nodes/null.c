/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/null.c: the driver null-co. Completes every request at once or after a
 * fixed latency; keeps nothing. Its Python half is vhostblk/nodes/null.py.
 */
#include "../engine.h"
#include "null.api.h"

#include <string.h>

struct null_node {
    struct vb_node node;
    uint64_t latency_ns;
    bool read_zeroes;
};

/* In a request's scratch while it waits. */
struct null_wait {
    struct vb_timer timer;
    struct vb_request *request;
};

_Static_assert(sizeof(struct null_wait) <= VB_SCRATCH_SIZE, "scratch too small");

static void null_expired(struct vb_timer *timer)
{
    struct null_wait *wait = vb_container_of(timer, struct null_wait, timer);

    vb_complete(wait->request, 0);
}

static void null_submit(struct vb_node *node, struct vb_request *request)
{
    struct null_node *null = vb_container_of(node, struct null_node, node);

    if (null->read_zeroes && request->op == VB_OP_READ) {
        vb_guest_write_begin();
        for (uint32_t i = 0; i < request->niov; i++) {
            memset(request->iov[i].iov_base, 0, request->iov[i].iov_len);
        }
        vb_guest_write_end();
    }
    if (null->latency_ns) {
        struct null_wait *wait = (struct null_wait *)request->scratch;
        wait->request = request;
        wait->timer.expired = null_expired;
        vb_timer_start(request->thread, &wait->timer,
                       vb_deadline(request->thread, null->latency_ns));
        return;
    }
    vb_complete(request, 0);
}

static const struct vb_node_ops null_ops = {
    .name = "null-co",
    .submit = null_submit,
};

struct vb_node *vb_node_null_new(struct vb_engine *engine, uint64_t latency_ns, bool read_zeroes,
                                 char *error)
{
    struct null_node *null = vb_node_alloc(engine, &null_ops, sizeof(*null), error);

    if (!null) {
        return NULL;
    }
    null->latency_ns = latency_ns;
    null->read_zeroes = read_zeroes;
    return &null->node;
}
