/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/quorum.h: what the files of the quorum node share.
 *
 *   quorum.c         requests: who is asked, the vote, the answer
 *   quorum_leg.c     legs: states, dirty maps
 *   quorum_thread.c  what waits: locks of ranges, writes that are late, grace, timeouts
 */
#ifndef VB_QUORUM_H
#define VB_QUORUM_H

#include "../engine.h"
#include "../grace.h"
#include "quorum.api.h"

#define QUORUM_LOCKS 16

struct quorum_node;
struct quorum_thread;
struct op;

/* ---- legs ------------------------------------------------------------------------------- */

struct vb_quorum_leg {
    _Atomic uint32_t *state;    /* Python's memory */
    _Atomic uint64_t *dirty;    /* the same */
    uint64_t bits;              /* of the map */
    uint32_t region_bits;
    _Atomic bool recorded;
    _Atomic bool forgets;
    _Atomic uint32_t users;     /* its owner, and each stray */
};

static inline uint32_t leg_state(const struct vb_quorum_leg *leg)
{
    /* Acquire: who sees that a leg is in sync sees what made it so. */
    return atomic_load_explicit(leg->state, memory_order_acquire) & VB_LEG_STATE;
}

/* Sets the bits of a range. */
void leg_missed(struct vb_quorum_leg *leg, uint64_t offset, uint64_t bytes);
/* IN_SYNC or REBUILDING becomes FAILED; false if it was something else. */
bool leg_retire(struct vb_quorum_leg *leg, bool whole);
void leg_get(struct vb_quorum_leg *leg);
void leg_put(struct vb_quorum_leg *leg);

/* ---- requests under way ------------------------------------------------------------------- */

/* One leg's part of a request. */
struct part {
    struct op *op;
    uint32_t leg;
    int ret;
    bool stray;                 /* given up: comes back some day */
    struct vb_request *request; /* from submission until it has come back */
    struct vb_quorum_leg *stray_leg;
    struct iovec iov;
    unsigned char *version;     /* reads: memory for what it gave */
    const unsigned char *data;  /* reads: where it has that in memory, while leg_taken() runs */
};

/* A request as this node sees it, in memory of its own: parts may outlive it. */
struct op {
    struct vb_request *request; /* NULL: has been answered */
    struct quorum_node *quorum;
    struct quorum_thread *here;
    struct vb_iothread *thread;
    struct op *next, *previous; /* with a timeout: those of this thread, oldest first */
    uint64_t started_ns;
    uint64_t offset, bytes;
    size_t size;                /* of this memory */
    uint8_t op;                 /* what the legs are asked for */
    uint16_t flags;
    bool starting;              /* parts are being submitted */
    bool listed;                /* in that list */
    bool counted;               /* for grace */
    bool direct;                /* a read whose first version is in guest memory */
    bool agreed;                /* a read, done with the data where the legs have them */
    bool worthless;             /* and it turned out that a leg had them no more */
    int8_t late;                /* number of its struct vb_quorum_late, or -1 */
    uint32_t epoch;
    uint32_t voters;            /* legs that were in sync when it began; bits, as what follows */
    uint32_t missed;            /* not asked: a change's legs that are out, a read's that are late */
    uint32_t asked;
    uint32_t unsubmitted;       /* asked, as soon as those before them have returned */
    uint32_t in_hand;           /* those whose leg_taken() runs */
    uint32_t waiting;           /* asked, and have not answered */
    uint32_t failed;            /* have answered with an error */
    uint32_t under_way;         /* parts that have not come back, strays included */
    struct part parts[];
};

struct range_lock {
    _Atomic uint64_t start, end; /* end 0: free */
};

struct quorum_node {
    struct vb_node node;
    struct vb_quorum_options options;
    struct vb_quorum_leg *legs[VB_MAX_CHILDREN];
    /* Locks and late writes. While it is 0, as nearly always, nothing stands in anybody's way. */
    _Atomic uint32_t obstacles;
    _Atomic uint32_t late;
    _Atomic uint32_t no_early;
    struct range_lock locks[QUORUM_LOCKS];
    _Atomic(struct quorum_thread *) threads[VB_MAX_IOTHREADS];
};

struct quorum_thread {
    struct quorum_node *quorum;
    struct vb_iothread *thread;
    struct vb_message wake;
    _Atomic bool waking;
    struct vb_request *held;     /* those that wait for an obstacle to go */
    _Atomic uint32_t holding;    /* how many */
    _Atomic uint64_t late_used;  /* bits: entries of this thread's part of the late table */
    struct vb_epochs epochs; /* of changes */
    struct op *oldest, *youngest;
    struct vb_timer timer;
    bool timing;
    struct vb_message end;
};

struct quorum_thread *quorum_thread(struct quorum_node *quorum, struct vb_iothread *thread);
void quorum_threads_free(struct quorum_node *quorum);

/* Changes in flight, counted for grace. */
void quorum_begin(struct op *op);
void quorum_end(struct op *op);

/* Whether the request has to wait for a lock or for a late write; then it is held. */
bool quorum_hold(struct quorum_node *quorum, struct vb_request *request);
void quorum_wake(struct quorum_node *quorum);
/* Legs that have not got all that was written to this range. */
uint32_t quorum_late_legs(struct quorum_node *quorum, uint64_t offset, uint64_t bytes);
/* Makes a write that is to be acknowledged now known as late; false: it cannot be now. */
bool quorum_late_begin(struct op *op);
void quorum_late_arrived(struct op *op, uint32_t legs);

/* With a timeout: op is watched until all of its legs have answered. */
void quorum_watch(struct op *op);
void quorum_unwatch(struct op *op);

/* quorum.c: a leg has taken too long for this request. */
void op_give_up(struct op *op, uint32_t leg);
void quorum_submit(struct vb_node *node, struct vb_request *request);

#endif
