/* SPDX-License-Identifier: GPL-2.0-or-later */
/* timer.c: one binary heap of timers per I/O thread, earliest on top. */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>

static void place(struct vb_iothread *thread, struct vb_timer *timer, uint32_t slot)
{
    thread->timers[slot] = timer;
    timer->slot = slot;
}

static void sift_up(struct vb_iothread *thread, struct vb_timer *timer, uint32_t slot)
{
    while (slot > 0) {
        uint32_t parent = (slot - 1) / 2;

        if (thread->timers[parent]->deadline_ns <= timer->deadline_ns) {
            break;
        }
        place(thread, thread->timers[parent], slot);
        slot = parent;
    }
    place(thread, timer, slot);
}

static void sift_down(struct vb_iothread *thread, struct vb_timer *timer, uint32_t slot)
{
    for (;;) {
        uint32_t child = 2 * slot + 1;

        if (child >= thread->timers_used) {
            break;
        }
        if (child + 1 < thread->timers_used &&
            thread->timers[child + 1]->deadline_ns < thread->timers[child]->deadline_ns) {
            child++;
        }
        if (timer->deadline_ns <= thread->timers[child]->deadline_ns) {
            break;
        }
        place(thread, thread->timers[child], slot);
        slot = child;
    }
    place(thread, timer, slot);
}

void vb_timer_start(struct vb_iothread *thread, struct vb_timer *timer, uint64_t deadline_ns)
{
    vb_assert(vb_in_iothread(thread));
    vb_assert(timer->slot >= thread->timers_used || thread->timers[timer->slot] != timer);
    if (thread->timers_used == thread->timers_size) {
        uint32_t size = thread->timers_size ? 2 * thread->timers_size : 64;
        struct vb_timer **timers = realloc(thread->timers, size * sizeof(*timers));

        if (!timers) {
            fprintf(stderr, "vhostblk: out of memory for %u timers\n", size);
            abort();
        }
        thread->timers = timers;
        thread->timers_size = size;
    }
    timer->deadline_ns = deadline_ns;
    sift_up(thread, timer, thread->timers_used++);
}

void vb_timer_stop(struct vb_iothread *thread, struct vb_timer *timer)
{
    struct vb_timer *last = thread->timers[--thread->timers_used];
    uint32_t slot = timer->slot;

    vb_assert(vb_in_iothread(thread));
    if (last == timer) {
        return;
    }
    if (slot > 0 && last->deadline_ns < thread->timers[(slot - 1) / 2]->deadline_ns) {
        sift_up(thread, last, slot);
    } else {
        sift_down(thread, last, slot);
    }
}
