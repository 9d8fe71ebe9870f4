/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * throttle_bucket.c: see throttle_bucket.h.
 *
 * Ticks of one limit mean nothing under another: a megabyte at a byte a second is twelve days. So a
 * change says CHANGING, then converts `empty`, then says what the new cost is; and a request reads
 * `empty` before the cost. If a change comes between that and its compare-and-swap, `empty` is not
 * what it was, and both are read again; if it reads an `empty` that is converted already, it
 * reads CHANGING, or the new cost, after it (release, and acquire). All else is relaxed.
 */
#include "throttle_bucket.h"

#define TICKS_PER_SECOND (1e9 * VB_TICKS_PER_NS)
/* Nothing is further ahead than this, two years: sums of debts must not come round to the past. */
#define FAR ((uint64_t)1 << 62)
#define CHANGING (-1.0)

static uint64_t ahead(struct vb_leak *leak, uint64_t now)
{
    uint64_t empty = atomic_load_explicit(&leak->empty, memory_order_relaxed);

    return empty > now ? empty - now : 0;
}

static uint64_t leak_wait(struct vb_leak *leak, uint64_t now)
{
    double cost = atomic_load_explicit(&leak->cost, memory_order_relaxed);
    uint64_t size, level;

    if (cost == 0) {
        return 0;
    }
    if (cost == CHANGING) {
        return 1; /* whoever waits takes the lock under which it changes, and asks again */
    }
    size = atomic_load_explicit(&leak->size, memory_order_relaxed);
    level = ahead(leak, now);
    return level > size ? level - size : 0;
}

/* `ticks` after `time`, which is not before now. */
static uint64_t later(uint64_t now, uint64_t time, double ticks)
{
    uint64_t far = now + FAR;

    return ticks < (double)FAR && time + (uint64_t)ticks < far ? time + (uint64_t)ticks : far;
}

static void leak_account(struct vb_leak *leak, uint64_t now, double units)
{
    uint64_t old, empty;
    double cost;

    if (atomic_load_explicit(&leak->cost, memory_order_relaxed) == 0) {
        return;
    }
    old = atomic_load_explicit(&leak->empty, memory_order_acquire);
    do {
        cost = atomic_load_explicit(&leak->cost, memory_order_relaxed);
        if (cost == 0 || cost == CHANGING) {
            return; /* it has passed already, and belongs to neither limit */
        }
        empty = later(now, old > now ? old : now, units * cost);
    } while (!atomic_compare_exchange_weak_explicit(&leak->empty, &old, empty,
                                                    memory_order_acquire, memory_order_acquire));
}

/*
 * What is in the bucket after its limit has changed, in units. What the old limit permitted is no
 * debt under the new one: it leaves a bucket at most full. Only what was taken too much is owed.
 */
static double kept(double level, double old_size, double size)
{
    double debt = level > old_size ? level - old_size : 0;
    double filled = level - debt;

    return (filled < size ? filled : size) + debt;
}

static void leak_set(struct vb_leak *leak, uint64_t now, double rate, double size)
{
    double cost = rate != 0 ? TICKS_PER_SECOND / rate : 0;
    double was = atomic_load_explicit(&leak->cost, memory_order_relaxed);
    double old_size = (double)atomic_load_explicit(&leak->size, memory_order_relaxed);
    uint64_t old, empty;

    atomic_store_explicit(&leak->cost, CHANGING, memory_order_relaxed);
    old = atomic_load_explicit(&leak->empty, memory_order_relaxed);
    do {
        double level = was != 0 && old > now ? (double)(old - now) / was : 0;

        empty = later(now, now, was != 0 ? kept(level, old_size / was, size) * cost : 0);
        empty -= empty == old && empty > 0; /* must be seen to have changed; 0: nothing was there */
    } while (!atomic_compare_exchange_weak_explicit(&leak->empty, &old, empty,
                                                    memory_order_release, memory_order_relaxed));
    atomic_store_explicit(&leak->size, later(0, 0, size * cost), memory_order_relaxed);
    atomic_store_explicit(&leak->cost, cost, memory_order_relaxed);
}

uint64_t vb_bucket_wait(struct vb_bucket *bucket, uint64_t now)
{
    uint64_t wait = leak_wait(&bucket->average, now);

    return wait ? wait : leak_wait(&bucket->burst, now);
}

void vb_bucket_account(struct vb_bucket *bucket, uint64_t now, double units)
{
    leak_account(&bucket->average, now, units);
    leak_account(&bucket->burst, now, units);
}

void vb_bucket_set(struct vb_bucket *bucket, uint64_t now, struct vb_throttle_limit limit)
{
    double avg = (double)limit.avg, max = (double)limit.max;

    leak_set(&bucket->average, now, avg, max != 0 ? max * (double)limit.burst_length : avg / 10);
    leak_set(&bucket->burst, now, limit.burst_length > 1 ? max : 0, max / 10);
}
