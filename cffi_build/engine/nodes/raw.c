/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/raw.c: the driver raw. Its child, seen from `offset` on. The size is the
 * export's business: a request that gets here lies within the node. The Python
 * half is vhostblk/nodes/raw.py; a raw node without offset and size is left out
 * of the engine's picture altogether.
 */
#include "../engine.h"
#include "raw.api.h"

struct raw_node {
    struct vb_node node;
    uint64_t offset;
};

static void raw_submit(struct vb_node *node, struct vb_request *request)
{
    struct raw_node *raw = vb_container_of(node, struct raw_node, node);

    request->offset += raw->offset;
    vb_submit(node->children[0], request);
}

static const struct vb_node_ops raw_ops = {
    .name = "raw",
    .submit = raw_submit,
};

struct vb_node *vb_node_raw_new(struct vb_engine *engine, uint64_t offset, char *error)
{
    struct raw_node *raw = vb_node_alloc(engine, &raw_ops, sizeof(*raw), error);

    if (!raw) {
        return NULL;
    }
    raw->offset = offset;
    return &raw->node;
}
