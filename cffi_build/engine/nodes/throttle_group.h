/* SPDX-License-Identifier: GPL-2.0-or-later */
/* throttle_group.h: what throttle.c asks of a group of nodes with common limits. */
#ifndef VB_THROTTLE_GROUP_H
#define VB_THROTTLE_GROUP_H

#include "../engine.h"
#include "throttle.api.h"
#include "throttle_bucket.h"

enum throttle_direction { THROTTLE_READ, THROTTLE_WRITE, THROTTLE_FLUSH };

/* A request that waits: in its scratch. The group's, under its lock, until it is let go. */
struct throttle_waiter {
    struct vb_message message; /* to its thread: go on */
    struct throttle_waiter *next;
    struct vb_request *request;
    struct throttle_member *member;
    uint64_t since_ns;
};

/* Requests of one member in one direction, in order of arrival. Under the group's lock. */
struct throttle_queue {
    struct throttle_queue *next; /* the member whose turn comes after this one's */
    struct throttle_waiter *first, *last;
};

/* A node's place in its group. */
struct throttle_member {
    struct vb_node *node;
    struct vb_throttle_group *group;
    struct throttle_queue queues[VB_THROTTLE_DIRECTIONS];
    bool draining; /* under the group's lock */
};

/* Whether the request may pass now; then it has been counted. Takes no lock. */
bool throttle_pass(struct vb_throttle_group *group, enum throttle_direction direction,
                   const struct vb_request *request);
/* It may not: keeps it until it may, and hands it to the child of the member's node then. */
void throttle_wait(struct throttle_member *member, enum throttle_direction direction,
                   struct vb_request *request);
/* Control: see vb_throttle_drain(). */
void throttle_drain(struct throttle_member *member, bool begin);

#endif
