/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * quorum: children 0 to legs - 1 hold the same data. What a leg does wrong is told in
 * VB_EVENT_NODE events: leg `request` (or VB_QUORUM_ALL: the whole) was bad, for op, offset, bytes;
 * ret is its error, 0 if it was outvoted.
 */
#define VB_QUORUM_ALL 0xffffffff

struct vb_quorum_options {
    uint64_t cookie;        /* of the reports */
    uint32_t legs;          /* 1 to VB_MAX_CHILDREN */
    uint32_t threshold;     /* legs that must agree (reads) or succeed (everything else) */
    bool fifo;              /* a read is answered by the first leg that can, without a vote */
    bool rewrite_corrupted; /* legs that are outvoted get the winner's data */
};

vb_node *vb_node_quorum_new(vb_engine *engine, const struct vb_quorum_options *options, char *error);
/* Only while every export that reaches the node is paused. */
void vb_node_quorum_set(vb_node *node, const struct vb_quorum_options *options);
