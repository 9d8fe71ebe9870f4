/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * grace.h: until all requests of a node that have begun before now are complete.
 *
 * Each I/O thread counts those that it has in flight in one of two epochs. Asked for grace, it starts
 * the other epoch and answers when the count of the old one has come to zero; a question that
 * comes while it still counts that down waits for the next turn.
 */
#ifndef VB_GRACE_H
#define VB_GRACE_H

#include "engine.h"

struct vb_grace_part;

/* One thread's of one node; only that thread touches it. Zeroed memory is one without requests. */
struct vb_epochs {
    uint32_t current; /* 0 or 1: where requests that begin now are counted */
    uint32_t inflight[2];
    struct vb_grace_part *draining; /* questions that wait for the other epoch's */
    struct vb_grace_part *next;     /* came meanwhile */
};

/* The epoch's number, for vb_epochs_end(). */
static inline uint32_t vb_epochs_begin(struct vb_epochs *epochs)
{
    epochs->inflight[epochs->current]++;
    return epochs->current;
}

void vb_epochs_drained(struct vb_epochs *epochs);

static inline void vb_epochs_end(struct vb_epochs *epochs, uint32_t epoch)
{
    if (--epochs->inflight[epoch] == 0 && epochs->draining && epoch != epochs->current) {
        vb_epochs_drained(epochs);
    }
}

/*
 * Control thread. What it has stored before is known to every request that begins after grace;
 * then VB_EVENT_DONE comes with the cookie. `find` gives the epochs of the thread it runs on.
 */
void vb_grace_ask(struct vb_node *node,
                  struct vb_epochs *(*find)(struct vb_node *node, struct vb_iothread *thread),
                  uint64_t cookie);

#endif
