/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/map_thread.c: how a map's I/O threads wait: for pending entries, and (../grace.h) until
 * everybody has finished what was begun before.
 */
#include "map_table.h"

#include <stdlib.h>
#include <stdio.h>

/* ---- pending entries ------------------------------------------------------------------------- */

/* In the scratch of a request that waits. */
struct waiting {
    struct vb_request *next;
    struct map_node *map;
};

static void run_wake(struct vb_message *message, void *context)
{
    struct map_thread *here = vb_container_of(message, struct map_thread, wake);
    struct vb_request *request;

    (void)context;
    /* Before the list is looked at: who changes an entry after that sends another message. */
    atomic_store(&here->waking, false);
    request = here->waiting;
    here->waiting = NULL;
    while (request) {
        struct waiting *waiting = (struct waiting *)request->scratch;
        struct vb_request *next = waiting->next;
        struct map_node *map = waiting->map;

        atomic_fetch_sub(&map->waiters, 1);
        map->node.ops->submit(&map->node, request); /* which may make it wait again */
        request = next;
    }
}

static void wake_thread(struct map_node *map, unsigned index)
{
    struct map_thread *there = atomic_load_explicit(&map->threads[index], memory_order_acquire);

    if (there && !atomic_exchange(&there->waking, true)) {
        vb_iothread_send(map->node.engine->iothreads[index], &there->wake);
    }
}

/* Sequentially consistent with map_wait(): one of the two sees the other. */
void map_wake(struct map_node *map)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load(&map->waiters) == 0) {
        return;
    }
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        wake_thread(map, i);
    }
}

void map_wait(struct map_node *map, struct vb_request *request, uint64_t unit)
{
    struct map_thread *here = map_thread(map, request->thread);
    struct waiting *waiting = (struct waiting *)request->scratch;
    _Atomic uint64_t *entry;

    *waiting = (struct waiting){.next = here->waiting, .map = map};
    here->waiting = request;
    atomic_fetch_add(&map->waiters, 1);
    atomic_thread_fence(memory_order_seq_cst);
    entry = map_entry(map, unit);
    if (!entry || (atomic_load(entry) & VB_MAP_TYPE) != VB_MAP_PENDING) {
        wake_thread(map, request->thread->index); /* it has changed just now */
    }
}

/* ---- grace ------------------------------------------------------------------------------------- */

static struct vb_epochs *epochs_of(struct vb_node *node, struct vb_iothread *thread)
{
    return &map_thread(map_node_of(node), thread)->epochs;
}

void vb_map_grace(struct vb_node *node, uint64_t cookie)
{
    vb_grace_ask(node, epochs_of, cookie);
}

/* ---- life ---------------------------------------------------------------------------------------- */

struct map_thread *map_thread(struct map_node *map, struct vb_iothread *thread)
{
    struct map_thread *here =
        atomic_load_explicit(&map->threads[thread->index], memory_order_relaxed);

    vb_assert(vb_in_iothread(thread));
    if (!here) {
        here = vb_must_alloc(sizeof(*here));
        here->wake.run = run_wake;
        /* Release: another thread may send its `wake` as soon as it sees it. */
        atomic_store_explicit(&map->threads[thread->index], here, memory_order_release);
    }
    return here;
}

/* A wake-up may still be on its way: freed behind it. */
void map_threads_free(struct map_node *map)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct map_thread *there = atomic_load_explicit(&map->threads[i], memory_order_relaxed);

        if (there) {
            vb_after_all_threads(map->node.engine, free, there);
        }
    }
}
