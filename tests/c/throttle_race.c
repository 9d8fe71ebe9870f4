/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * throttle_race.c: for test_throttle_bucket.py. Threads fill a bucket while its limit changes
 * between one unit a second and 10^9. What a request takes is a millisecond of the one and days of
 * the other: if it were counted at the wrong price, the wait under the fast limit would show it.
 */
#include <pthread.h>
#include <stdbool.h>

#include "throttle_bucket.h"

#define UNITS 1e6
#define THREADS 2

static struct vb_bucket bucket;
static _Atomic bool stop;
static _Atomic uint64_t clock_now; /* a nanosecond a change, at least, as in life */

static void *fill(void *unused)
{
    (void)unused;
    while (!stop) {
        vb_bucket_account(&bucket, clock_now, UNITS);
    }
    return NULL;
}

/* After how many of the changes somebody would have to wait longer than is possible. */
unsigned throttle_race(unsigned changes)
{
    const struct vb_throttle_limit slow = {1, 0, 1}, fast = {1000000000, 0, 1};
    const uint64_t second = UINT64_C(1000000000) * VB_TICKS_PER_NS;
    pthread_t threads[THREADS];
    unsigned wrong = 0;

    for (unsigned i = 0; i < THREADS; i++) {
        pthread_create(&threads[i], NULL, fill, NULL);
    }
    for (unsigned i = 0; i < changes; i++) {
        vb_bucket_set(&bucket, clock_now += VB_TICKS_PER_NS, slow);
        vb_bucket_set(&bucket, clock_now += VB_TICKS_PER_NS, fast);
        wrong += vb_bucket_wait(&bucket, clock_now) > 100000 * second;
    }
    stop = true;
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    return wrong;
}
