/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * quorum: children 0 to legs - 1 hold the same data, those of them that are in sync.
 *
 * VB_EVENT_NODE events, with the leg in `request`, op, offset and bytes: the leg failed (ret < 0)
 * or was outvoted (ret 0). VB_QUORUM_ALL: the request failed as a whole. VB_QUORUM_UNEVEN: it was a
 * change, and some legs may have it. VB_QUORUM_RETIRED + leg: the leg has become VB_LEG_FAILED.
 * Requests that go up (VB_EVENT_UPCALL): a read without a majority, which Python answers; and
 * anything else that has succeeded but has missed a leg of which that is not recorded yet: Python
 * records it, then completes the request.
 */
#define VB_QUORUM_ALL 0xffffffff
#define VB_QUORUM_UNEVEN 0xfffffffe
#define VB_QUORUM_RETIRED 0x80000000

/* States of a leg. C makes IN_SYNC and REBUILDING to FAILED, all else is Python's. */
#define VB_LEG_IN_SYNC 1    /* has everything, and votes */
#define VB_LEG_STALE 2      /* has missed something; gets nothing */
#define VB_LEG_FAILED 3     /* the same, and something is wrong with it */
#define VB_LEG_REBUILDING 4 /* gets all changes, but does not vote */
#define VB_LEG_STATE 0xff   /* mask */
#define VB_LEG_WHOLE 0x100  /* flag: nobody knows what it has missed, so all of it */

typedef struct vb_quorum_leg vb_quorum_leg;

/*
 * The state word and the dirty map (one bit for each region, set where the leg has missed a
 * change) are memory of Python's, a mapped file if they are to outlive the process. The map has
 * `bits` bits, a multiple of 64. Legs may grow at any time: the last one stands for its own region
 * and for all that are behind it.
 */
vb_quorum_leg *vb_quorum_leg_new(uint64_t state, uint64_t dirty, uint64_t bits,
                                 uint32_t region_bits);
/* The same in another place; nothing is in flight. */
void vb_quorum_leg_move(vb_quorum_leg *leg, uint64_t state, uint64_t dirty, uint64_t bits);
void vb_quorum_leg_free(vb_quorum_leg *leg);
uint32_t vb_quorum_leg_state(vb_quorum_leg *leg);
/* False if it is not `from`. */
bool vb_quorum_leg_change(vb_quorum_leg *leg, uint32_t from, uint32_t to);
/* Whether it may lose what it has acknowledged when it fails: then VB_LEG_WHOLE goes with that. */
void vb_quorum_leg_set_forgets(vb_quorum_leg *leg, bool forgets);
/* Whether all that miss the leg may complete, since everybody will know that they did. */
bool vb_quorum_leg_is_recorded(vb_quorum_leg *leg);
void vb_quorum_leg_set_recorded(vb_quorum_leg *leg, bool recorded);
void vb_quorum_leg_mark(vb_quorum_leg *leg, uint64_t region, uint64_t count, bool dirty);
/* The first region from `region` on, below `end`, that is dirty; `end` if there is none. */
uint64_t vb_quorum_leg_next(vb_quorum_leg *leg, uint64_t region, uint64_t end);
uint64_t vb_quorum_leg_count(vb_quorum_leg *leg, uint64_t end);
/* Requests that were given up: the leg's nodes must not go before they have come back. */
uint32_t vb_quorum_leg_strays(vb_quorum_leg *leg);

/* A write that was acknowledged before all legs had it. Valid if `legs` is not 0. */
struct vb_quorum_late {
    uint64_t start, end;
    uint64_t legs;     /* bits: those that it has not reached yet */
    uint64_t reserved;
};
#define VB_QUORUM_LATES 64    /* for each I/O thread */
#define VB_QUORUM_LATE_SIZE 131072 /* bytes of all of them */

struct vb_quorum_options {
    uint64_t cookie;          /* of the events */
    uint32_t legs;            /* 1 to VB_MAX_CHILDREN */
    uint32_t threshold;       /* legs that must agree (reads) or succeed (everything else) */
    uint32_t write_threshold; /* legs that must have a write before it is acknowledged; 0: all */
    uint64_t timeout_ns;      /* a leg that takes longer has failed; 0: never */
    uint64_t lates;           /* address of VB_QUORUM_LATE_SIZE bytes, the caller's */
    uint64_t discard_unit;    /* a power of two: of a discard, whole units are zeroed; 0: nothing */
    uint64_t size;            /* the last unit is whole if it ends here, or, legs having grown, behind */
    bool fifo;                /* a read is answered by the first leg that can, without a vote */
};

vb_node *vb_node_quorum_new(vb_engine *engine, const struct vb_quorum_options *options,
                            vb_quorum_leg *const *legs, char *error);
/* Only while every export that reaches the node is paused, and nothing is late. */
void vb_node_quorum_set(vb_node *node, const struct vb_quorum_options *options,
                        vb_quorum_leg *const *legs);
/* While `hold` is given more often than taken back, nothing is acknowledged early. */
void vb_quorum_hold_early(vb_node *node, bool hold);
uint32_t vb_quorum_late(vb_node *node); /* writes that have not reached all legs */
/*
 * No change of this range begins from here on; VB_EVENT_DONE with `cookie` says that none is in
 * flight any more. The number of the lock, or -EBUSY: there are too many.
 */
int vb_quorum_lock(vb_node *node, uint64_t offset, uint64_t bytes, uint64_t cookie);
void vb_quorum_unlock(vb_node *node, int lock);
