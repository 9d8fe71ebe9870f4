/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * stats.c: counters and latency histograms. Each I/O thread has a block of its
 * own per node and per export, so counting is a plain add without a lock or a
 * shared cache line; the control thread sums the blocks with relaxed loads. A sum
 * may be a request behind in one of its numbers, never torn.
 */
#include "engine.h"

#include <stdlib.h>

/* The first bucket with a lower bound of its own starts at 2^7 = 128 ns. */
#define FIRST_OCTAVE 7
#define SUB_BITS 3

static unsigned bucket_of(uint64_t ns)
{
    unsigned octave, bucket;

    if (ns < (1u << FIRST_OCTAVE)) {
        return 0;
    }
    octave = 63 - (unsigned)__builtin_clzll(ns);
    bucket = 1 + ((octave - FIRST_OCTAVE) << SUB_BITS) +
             (unsigned)((ns >> (octave - SUB_BITS)) & ((1u << SUB_BITS) - 1));
    return bucket < VB_HISTOGRAM_BUCKETS ? bucket : VB_HISTOGRAM_BUCKETS - 1;
}

uint64_t vb_histogram_floor(uint32_t bucket)
{
    uint32_t octave, sub;

    if (bucket == 0) {
        return 0;
    }
    octave = FIRST_OCTAVE + ((bucket - 1) >> SUB_BITS);
    sub = (bucket - 1) & ((1u << SUB_BITS) - 1);
    return ((uint64_t)(1u << SUB_BITS) + sub) << (octave - SUB_BITS);
}

/* One writer per block: load and store need not be one step. */
static void add(uint64_t *counter, uint64_t n)
{
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

static struct vb_stats *stats_of_thread(_Atomic(struct vb_stats *) *stats, uint32_t index)
{
    struct vb_stats *mine = atomic_load_explicit(&stats[index], memory_order_relaxed);

    if (!mine) {
        mine = calloc(1, sizeof(*mine));
        atomic_store_explicit(&stats[index], mine, memory_order_release);
    }
    return mine;
}

void vb_stats_account(_Atomic(struct vb_stats *) *stats, const struct vb_iothread *thread,
                      unsigned op, int ret, uint64_t bytes, uint64_t latency_ns)
{
    struct vb_stats *mine = stats_of_thread(stats, thread->index);
    struct vb_stats_op *count;

    if (!mine) {
        return; /* no memory for counting is no reason to fail a request */
    }
    count = &mine->op[op];
    add(&count->ops, 1);
    if (ret < 0) {
        add(&count->errors, 1);
    } else {
        add(&count->bytes, bytes);
    }
    add(&count->total_ns, latency_ns);
    add(&count->histogram[bucket_of(latency_ns)], 1);
}

void vb_stats_refused(_Atomic(struct vb_stats *) *stats, const struct vb_iothread *thread,
                      unsigned op)
{
    struct vb_stats *mine = stats_of_thread(stats, thread->index);

    if (mine) {
        add(&mine->op[op].invalid, 1);
    }
}

void vb_stats_sum(_Atomic(struct vb_stats *) *stats, struct vb_stats *sum)
{
    uint64_t *to = (uint64_t *)sum;
    size_t words = sizeof(*sum) / sizeof(uint64_t);

    *sum = (struct vb_stats){0};
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct vb_stats *block = atomic_load_explicit(&stats[i], memory_order_acquire);
        uint64_t *from = (uint64_t *)block;

        for (size_t word = 0; block && word < words; word++) {
            to[word] += __atomic_load_n(&from[word], __ATOMIC_RELAXED);
        }
    }
}

void vb_stats_free(_Atomic(struct vb_stats *) *stats)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        free(atomic_load_explicit(&stats[i], memory_order_relaxed));
    }
}
