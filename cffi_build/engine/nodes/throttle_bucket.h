/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * throttle_bucket.h: a leaky bucket, shared by all threads without a lock.
 *
 * QEMU's rules (util/throttle.c): what passes fills the bucket, which leaks `avg` units a second. A
 * request has to wait while the level is above the size of the bucket: `max` times the burst
 * length, or a tenth of `avg` if there is no `max`. Where bursts are longer than a second, a second
 * bucket that leaks `max` units a second and holds a tenth of them bounds the speed of the burst. A
 * request is counted when it passes, whole; what it takes too much, the next one waits for.
 *
 * Here a level is not stored in units but as the time when the bucket will have leaked dry. It
 * need not be touched as time goes by, and to fill it is one compare-and-swap.
 */
#ifndef VB_THROTTLE_BUCKET_H
#define VB_THROTTLE_BUCKET_H

#include <stdatomic.h>
#include <stdint.h>

/* Time in ticks: fine enough for the bytes of 10 GB/s, and 64 bits last nine years. */
#define VB_TICKS_PER_NS 64

/* One limit: QAPI's ThrottleLimits has six of them. */
struct vb_throttle_limit {
    uint64_t avg;          /* units a second; 0: no limit */
    uint64_t max;          /* units a second in a burst; 0: avg */
    uint64_t burst_length; /* seconds, at least 1 */
};

struct vb_leak {
    _Atomic double cost;    /* ticks that a unit takes to leak; 0: no limit */
    _Atomic uint64_t size;  /* ticks that a full bucket takes */
    _Atomic uint64_t empty; /* when it is empty */
};

struct vb_bucket {
    struct vb_leak average, burst;
};

/* Ticks until a request may pass; 0: now. */
uint64_t vb_bucket_wait(struct vb_bucket *bucket, uint64_t now);
/* Something passes. */
void vb_bucket_account(struct vb_bucket *bucket, uint64_t now, double units);
/* Another limit. The level stays, but what was permitted is no debt. One thread at a time. */
void vb_bucket_set(struct vb_bucket *bucket, uint64_t now, struct vb_throttle_limit limit);

#endif
