/* SPDX-License-Identifier: GPL-2.0-or-later */
/* node.c: what all nodes have in common. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>

void *vb_node_alloc(struct vb_engine *engine, const struct vb_node_ops *ops, size_t size,
                    char *error)
{
    struct vb_node *node = calloc(1, size);

    if (!node) {
        vb_error(error, -ENOMEM, "no memory for a %s node", ops->name);
        return NULL;
    }
    node->ops = ops;
    node->engine = engine;
    return node;
}

/*
 * A plain store: every I/O thread that reads this pointer is paused, and the
 * messages that pause and resume it order the store before its next read.
 */
void vb_node_set_child(struct vb_node *node, uint32_t index, struct vb_node *child)
{
    node->children[index] = child;
}

void vb_node_stats(struct vb_node *node, struct vb_stats *stats)
{
    vb_stats_sum(node->stats, stats);
}

void vb_node_free(struct vb_node *node)
{
    if (node->ops->destroy) {
        node->ops->destroy(node);
    }
    vb_stats_free(node->stats);
    free(node);
}
