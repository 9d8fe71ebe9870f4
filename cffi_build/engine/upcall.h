/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * upcall.h: handing a request to Python. It comes back with one of the commands COMPLETE,
 * FORWARD (to a child of the node) and RETRY (to the node itself, which may know more now).
 */
#ifndef VB_UPCALL_H
#define VB_UPCALL_H

#include "engine.h"

/* In the scratch of a request that is with Python. */
struct vb_upcall {
    struct vb_message message;
    struct vb_request *request;
    struct vb_node *node;
    uint64_t cookie;
    int ret;
    uint32_t child;
};

_Static_assert(sizeof(struct vb_upcall) <= VB_SCRATCH_SIZE, "scratch too small");

/* The request's I/O thread: it becomes a VB_EVENT_UPCALL with `cookie`. */
void vb_upcall_post(struct vb_node *node, uint64_t cookie, struct vb_request *request);

#endif
