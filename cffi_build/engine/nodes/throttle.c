/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/throttle.c: lets requests through as the limits of its group allow. The limits and the
 * requests that wait are the group's (throttle_group.c); Python halves: vhostblk/nodes/throttle.py,
 * vhostblk/objects/throttle_group.py.
 */
#include "throttle_group.h"

struct throttle_node {
    struct vb_node node;
    struct throttle_member member;
};

static struct throttle_node *of(struct vb_node *node)
{
    return vb_container_of(node, struct throttle_node, node);
}

static enum throttle_direction direction_of(const struct vb_request *request)
{
    switch (request->op) {
    case VB_OP_READ:
        return THROTTLE_READ;
    case VB_OP_FLUSH:
        return THROTTLE_FLUSH;
    default: /* a discard or a zero write may cost the storage as much as a write */
        return THROTTLE_WRITE;
    }
}

static void throttle_submit(struct vb_node *node, struct vb_request *request)
{
    struct throttle_member *member = &of(node)->member;
    enum throttle_direction direction = direction_of(request);

    if (throttle_pass(member->group, direction, request)) {
        vb_submit(node->children[0], request);
    } else {
        throttle_wait(member, direction, request);
    }
}

static const struct vb_node_ops throttle_ops = {
    .name = "throttle",
    .submit = throttle_submit,
};

struct vb_node *vb_node_throttle_new(struct vb_engine *engine, struct vb_throttle_group *group,
                                     char *error)
{
    struct throttle_node *throttle = vb_node_alloc(engine, &throttle_ops, sizeof(*throttle), error);

    if (!throttle) {
        return NULL;
    }
    throttle->member.node = &throttle->node;
    throttle->member.group = group;
    return &throttle->node;
}

/* A plain store, as in vb_node_set_child(). */
void vb_throttle_set_group(struct vb_node *node, struct vb_throttle_group *group)
{
    of(node)->member.group = group;
}

void vb_throttle_drain(struct vb_node *node, bool begin)
{
    throttle_drain(&of(node)->member, begin);
}
