/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/map_runs.c: the runs of clusters that C allocates from, which Python gives and takes back, and
 * the clusters that were taken out of them in vain.
 *
 * I/O threads take from the run in use with compare-and-exchange. One that is empty may still be looked at by
 * another thread when the spare one takes its place: it is freed when all of them have gone once round.
 */
#include "map_table.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

/* The spare run takes the place of an empty one. One thread at a time: the others ask Python. */
static bool use_spare(struct map_node *map, struct map_run *empty)
{
    struct map_run *spare;

    if (atomic_exchange(&map->switching, true)) {
        return false;
    }
    spare = atomic_load(&map->run) == empty ? atomic_exchange(&map->spare, NULL) : NULL;
    if (spare) {
        atomic_store(&map->run, spare);
        if (empty) { /* others may still be looking at it */
            vb_after_all_threads(map->node.engine, free, empty);
        }
    }
    atomic_store(&map->switching, false);
    return spare != NULL;
}

static uint64_t take_from(const struct map_node *map, struct map_run *run, uint64_t wanted,
                          uint64_t *host)
{
    uint64_t next = atomic_load_explicit(&run->next, memory_order_relaxed);
    uint64_t count;

    do {
        count = (run->end - next) >> map->options.cluster_bits;
        count = count < wanted ? count : wanted;
    } while (count > 0 &&
             !atomic_compare_exchange_weak(&run->next, &next,
                                           next + (count << map->options.cluster_bits)));
    *host = next;
    return count;
}

uint64_t map_take_clusters(struct map_node *map, uint64_t wanted, uint64_t *host)
{
    for (;;) {
        struct map_run *run = atomic_load(&map->run);
        uint64_t count = run ? take_from(map, run, wanted, host) : 0;

        if (count > 0) {
            if (!atomic_load_explicit(&map->spare, memory_order_relaxed)) {
                map_tell(map, VB_MAP_RUN_WANTED, &map->low_told);
            }
            return count;
        }
        if (!use_spare(map, run)) {
            if (atomic_load(&map->run) != run) {
                continue; /* another thread has just put the spare in its place */
            }
            map_tell(map, VB_MAP_RUN_WANTED, &map->low_told);
            return 0;
        }
    }
}

int vb_map_give(struct vb_node *node, uint64_t host, uint64_t bytes)
{
    struct map_node *map = map_node_of(node);
    struct map_run *run, *none = NULL;

    if (!atomic_load(&map->run)) {
        use_spare(map, NULL); /* nobody has taken anything yet */
    }
    if (atomic_load(&map->spare)) {
        return -EBUSY;
    }
    run = malloc(sizeof(*run));
    if (!run) {
        return -ENOMEM;
    }
    atomic_init(&run->next, host);
    run->end = host + bytes;
    atomic_compare_exchange_strong(&map->spare, &none, run); /* control alone fills it */
    atomic_store(&map->low_told, false);
    return 0;
}

/* The I/O threads go on. While `switching` is ours no run goes away that we look at. */
uint64_t vb_map_take(struct vb_node *node, uint64_t wanted, uint64_t *host)
{
    struct map_node *map = map_node_of(node);
    _Atomic(struct map_run *) *runs[2] = {&map->run, &map->spare};
    uint64_t count = 0;

    while (atomic_exchange(&map->switching, true)) {
        sched_yield(); /* a thread is a few instructions away from giving it back */
    }
    for (unsigned i = 0; i < 2 && count == 0; i++) {
        struct map_run *run = atomic_load(runs[i]);

        count = run ? take_from(map, run, wanted, host) : 0;
    }
    atomic_store(&map->switching, false);
    return count;
}

static void put_unused(struct map_node *map, struct map_unused *unused)
{
    unused->next = atomic_load_explicit(&map->unused, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&map->unused, &unused->next, unused,
                                                  memory_order_release, memory_order_relaxed)) {
    }
}

void map_give_back(struct map_node *map, uint64_t host, uint64_t clusters)
{
    struct map_unused *unused = malloc(sizeof(*unused));

    if (unused) {
        unused->host = host;
        unused->clusters = clusters;
        put_unused(map, unused);
    }
}

/* One at a time would race with those who put some in: all are taken, and the rest put back. */
bool vb_map_unused(struct vb_node *node, uint64_t *host, uint64_t *clusters)
{
    struct map_node *map = map_node_of(node);
    struct map_unused *unused = atomic_exchange_explicit(&map->unused, NULL, memory_order_acquire);

    if (!unused) {
        return false;
    }
    for (struct map_unused *rest = unused->next, *next; rest; rest = next) {
        next = rest->next;
        put_unused(map, rest);
    }
    *host = unused->host;
    *clusters = unused->clusters;
    free(unused);
    return true;
}

void vb_map_reclaim(struct vb_node *node, uint64_t left[4])
{
    struct map_node *map = map_node_of(node);
    struct map_run *runs[2] = {atomic_exchange(&map->run, NULL), atomic_exchange(&map->spare, NULL)};

    for (unsigned i = 0; i < 2; i++) {
        left[2 * i] = runs[i] ? atomic_load(&runs[i]->next) : 0;
        left[2 * i + 1] = runs[i] ? runs[i]->end - left[2 * i] : 0;
        if (runs[i]) {
            vb_after_all_threads(node->engine, free, runs[i]);
        }
    }
    atomic_store(&map->low_told, false);
}

void map_runs_free(struct map_node *map)
{
    uint64_t left[4];

    vb_map_reclaim(&map->node, left);
    for (struct map_unused *unused = atomic_load(&map->unused), *next; unused; unused = next) {
        next = unused->next;
        free(unused);
    }
}
