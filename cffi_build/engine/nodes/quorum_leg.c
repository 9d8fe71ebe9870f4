/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/quorum_leg.c: a leg's state and the map of what it has missed.
 *
 * Both are plain words in memory that Python gives, atomic because all I/O threads and the control
 * thread use them. Where that memory is a mapped file, a store is as good as written for whoever
 * comes after a kill -9; only a power cut needs more (see vhostblk/nodes/quorum/metadata.py).
 */
#include "quorum.h"

#include <errno.h>
#include <stdlib.h>

struct vb_quorum_leg *vb_quorum_leg_new(uint64_t state, uint64_t dirty, uint64_t bits,
                                        uint32_t region_bits)
{
    struct vb_quorum_leg *leg = calloc(1, sizeof(*leg));

    if (leg) {
        vb_quorum_leg_move(leg, state, dirty, bits);
        leg->region_bits = region_bits;
        atomic_init(&leg->users, 1);
    }
    return leg;
}

void vb_quorum_leg_move(struct vb_quorum_leg *leg, uint64_t state, uint64_t dirty, uint64_t bits)
{
    leg->state = (_Atomic uint32_t *)(uintptr_t)state;
    leg->dirty = (_Atomic uint64_t *)(uintptr_t)dirty;
    leg->bits = bits;
}

void leg_get(struct vb_quorum_leg *leg)
{
    atomic_fetch_add(&leg->users, 1);
}

void leg_put(struct vb_quorum_leg *leg)
{
    if (atomic_fetch_sub(&leg->users, 1) == 1) {
        free(leg);
    }
}

void vb_quorum_leg_free(struct vb_quorum_leg *leg)
{
    leg_put(leg);
}

uint32_t vb_quorum_leg_strays(struct vb_quorum_leg *leg)
{
    return atomic_load(&leg->users) - 1;
}

uint32_t vb_quorum_leg_state(struct vb_quorum_leg *leg)
{
    return atomic_load(leg->state);
}

bool vb_quorum_leg_change(struct vb_quorum_leg *leg, uint32_t from, uint32_t to)
{
    return atomic_compare_exchange_strong(leg->state, &from, to);
}

void vb_quorum_leg_set_forgets(struct vb_quorum_leg *leg, bool forgets)
{
    atomic_store(&leg->forgets, forgets);
}

bool vb_quorum_leg_is_recorded(struct vb_quorum_leg *leg)
{
    return atomic_load(&leg->recorded);
}

void vb_quorum_leg_set_recorded(struct vb_quorum_leg *leg, bool recorded)
{
    atomic_store(&leg->recorded, recorded);
}

/*
 * Not recorded before FAILED is seen: whoever misses the leg because of that waits. With `whole`
 * said in the same word, there is no moment at which less is known, neither for an operator nor
 * for whoever comes after a kill -9.
 */
bool leg_retire(struct vb_quorum_leg *leg, bool whole)
{
    uint32_t flag = whole || atomic_load(&leg->forgets) ? VB_LEG_WHOLE : 0;
    uint32_t state = atomic_load(leg->state), next;
    bool first;

    do {
        uint32_t plain = state & VB_LEG_STATE;

        first = plain == VB_LEG_IN_SYNC || plain == VB_LEG_REBUILDING;
        next = first ? VB_LEG_FAILED | flag : state | flag;
        if (first) {
            atomic_store(&leg->recorded, false);
        } else if (next == state) {
            return false;
        }
    } while (!atomic_compare_exchange_weak(leg->state, &state, next));
    return first;
}

/* ---- dirty regions ------------------------------------------------------------------------ */

/* The bits of regions [first, end) that are in the word of `first`. */
static uint64_t mask_of(uint64_t first, uint64_t end)
{
    uint64_t mask = ~0ull << (first & 63);

    if ((first | 63) >= end) {
        mask &= ~0ull >> (63 - ((end - 1) & 63));
    }
    return mask;
}

static uint64_t lesser(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

/* Of a region. */
static uint64_t bit_of(const struct vb_quorum_leg *leg, uint64_t region)
{
    return lesser(region, leg->bits - 1);
}

static bool is_dirty(struct vb_quorum_leg *leg, uint64_t bit)
{
    return atomic_load(&leg->dirty[bit >> 6]) >> (bit & 63) & 1;
}

void leg_missed(struct vb_quorum_leg *leg, uint64_t offset, uint64_t bytes)
{
    uint64_t first = bit_of(leg, offset >> leg->region_bits);
    uint64_t end = bit_of(leg, (offset + bytes - 1) >> leg->region_bits) + 1;

    if (bytes == 0) {
        return;
    }
    while (first < end) {
        _Atomic uint64_t *word = &leg->dirty[first >> 6];
        uint64_t mask = mask_of(first, end);

        /* Nearly always they are set already, and a load shares what a store would fight for. */
        if ((atomic_load_explicit(word, memory_order_relaxed) & mask) != mask) {
            atomic_fetch_or(word, mask);
        }
        first = (first | 63) + 1;
    }
}

void vb_quorum_leg_mark(struct vb_quorum_leg *leg, uint64_t region, uint64_t count, bool dirty)
{
    uint64_t end = count ? bit_of(leg, region + count - 1) + 1 : 0;

    region = bit_of(leg, region);
    while (region < end) {
        _Atomic uint64_t *word = &leg->dirty[region >> 6];
        uint64_t mask = mask_of(region, end);

        if (dirty) {
            atomic_fetch_or(word, mask);
        } else {
            atomic_fetch_and(word, ~mask);
        }
        region = (region | 63) + 1;
    }
}

uint64_t vb_quorum_leg_next(struct vb_quorum_leg *leg, uint64_t region, uint64_t end)
{
    while (region < lesser(end, leg->bits)) {
        uint64_t word = atomic_load(&leg->dirty[region >> 6]) & (~0ull << (region & 63));

        if (word) {
            region = (region & ~63ull) + (uint64_t)__builtin_ctzll(word);
            return lesser(region, end);
        }
        region = (region | 63) + 1;
    }
    return region < end && is_dirty(leg, leg->bits - 1) ? region : end;
}

uint64_t vb_quorum_leg_count(struct vb_quorum_leg *leg, uint64_t end)
{
    uint64_t count = 0, last = lesser(end, leg->bits);

    for (uint64_t region = 0; region < last; region += 64) {
        uint64_t word = atomic_load_explicit(&leg->dirty[region >> 6], memory_order_relaxed);

        count += (uint64_t)__builtin_popcountll(word & mask_of(region, last));
    }
    return last < end && is_dirty(leg, last - 1) ? count + end - last : count;
}
