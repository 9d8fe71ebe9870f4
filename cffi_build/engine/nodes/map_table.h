/* SPDX-License-Identifier: GPL-2.0-or-later */
/* map_table.h: what the parts of the map node share. See map.c. */
#ifndef VB_MAP_TABLE_H
#define VB_MAP_TABLE_H

#include "../grace.h"
#include "../upcall.h"
#include "map.api.h"

/*
 * Entries of one table; Python installs and evicts it, I/O threads look at it without a lock. One
 * whose entries are all the same has only the first of them, until one is to be changed.
 */
struct map_table {
    struct map_table *before; /* owned; the one with all the same that this has replaced, or NULL */
    _Atomic bool used;
    bool same;
    _Atomic uint64_t entries[];
};

/* Reserved clusters [next, end) of the storage. */
struct map_run {
    _Atomic uint64_t next;
    uint64_t end;
};

/* Clusters that were taken in vain. */
struct map_unused {
    struct map_unused *next;
    uint64_t host, clusters;
};

/* One I/O thread's part of a map. Only that thread touches what is not atomic. */
struct map_thread {
    struct vb_message wake;
    _Atomic bool waking;            /* `wake` is on its way */
    struct vb_request *waiting;     /* for a pending entry; linked in their scratch */
    struct vb_epochs epochs;        /* of requests that use what an entry says */
};

struct map_node {
    struct vb_node node;
    struct vb_map_options options;
    uint64_t tables_count;
    _Atomic(struct map_table *) *tables;
    _Atomic(struct map_thread *) threads[VB_MAX_IOTHREADS];
    _Atomic uint32_t waiters;  /* requests in any thread's waiting list */
    _Atomic bool dirty;        /* Python's metadata */
    _Atomic(struct map_run *) run, spare;
    _Atomic bool switching;    /* a thread is replacing `run` */
    _Atomic bool low_told, half_told; /* VB_MAP_RUN_WANTED, VB_MAP_LOG_HALF have been said */
    _Atomic(struct map_unused *) unused; /* I/O threads put in, control takes all */
    struct vb_map_log *log;
    struct vb_map_record *records;
    void *own_log;             /* owned; NULL if the log is the caller's */
    _Atomic uint64_t taken;    /* records that Python has seen; only control writes */
};

static inline struct map_node *map_node_of(struct vb_node *node)
{
    return vb_container_of(node, struct map_node, node);
}

/* What an entry is, and where, if it says so. */
static inline uint64_t map_type_of(uint64_t entry)
{
    return entry & VB_MAP_TYPE;
}

static inline uint64_t map_host_of(uint64_t entry)
{
    return entry & ~511ull;
}

/* ---- map_table.c ------------------------------------------------------------------------ */

/* Any: the entry of a unit, or NULL if its table is not there. Valid until the next message. */
_Atomic uint64_t *map_entry(struct map_node *map, uint64_t unit);
/* The same, to change it. */
_Atomic uint64_t *map_own_entry(struct map_node *map, uint64_t unit);

/* I/O thread: a record in the log; false if that is full. */
bool map_log(struct map_node *map, uint64_t guest, uint64_t entry, uint64_t extra);
bool map_log_has_room(struct map_node *map, uint64_t records);
/* Flushes have to go up. */
bool map_is_dirty(struct map_node *map);

/* Any: tell Python (VB_MAP_RUN_WANTED, VB_MAP_LOG_HALF), once until `already` is made false. */
void map_tell(struct map_node *map, uint16_t what, _Atomic bool *already);

/* ---- map_runs.c ------------------------------------------------------------------------- */

/* I/O thread: up to `wanted` adjacent clusters; how many, 0 if there is none. */
uint64_t map_take_clusters(struct map_node *map, uint64_t wanted, uint64_t *host);
/* I/O thread: they are not needed after all. Without memory they are lost until the image is checked. */
void map_give_back(struct map_node *map, uint64_t host, uint64_t clusters);
void map_runs_free(struct map_node *map); /* control */

/* ---- map_place.c ------------------------------------------------------------------------ */

enum map_placing {
    MAP_PLACED,
    MAP_AGAIN,  /* somebody else is at it: look again */
    MAP_PYTHON, /* no cluster, no room in the log, or a place that is not ours alone */
};

/* Whether clusters have parts. */
bool map_has_subclusters(const struct map_node *map);
/* How many units there are from `unit` to the end of its cluster. */
uint64_t map_rest_of_cluster(const struct map_node *map, uint64_t unit);
/* Whether a unit with this entry can be written to here; if not, whether to wait, and for which. */
bool map_can_write(struct map_node *map, uint64_t unit, uint64_t entry, uint64_t *wait);

/*
 * I/O thread. Up to `wanted` units of this type, VB_MAP_ZERO or _BACKING, become pending, so that
 * nobody else allocates them; how many.
 */
uint64_t map_claim(struct map_node *map, uint64_t unit, uint64_t wanted, uint64_t type);
/* I/O thread: the opposite. The place of their cluster, if it has parts, stays. */
void map_unclaim(struct map_node *map, uint64_t unit, uint64_t count, uint64_t type);
/*
 * I/O thread: where claimed units, of one cluster if those have parts, are to be: one behind the
 * other from *host on. How many of them: the others have to do without.
 */
enum map_placing map_place(struct map_node *map, uint64_t unit, uint64_t *count, uint64_t *host);
/* I/O thread: claimed units are data from now on. How many: not all if the log is full. */
uint64_t map_publish(struct map_node *map, uint64_t unit, uint64_t count, uint64_t host);
/* I/O thread: nothing is there, and nobody is going to write there: map_unclaim(). */
void map_unplace(struct map_node *map, uint64_t unit, uint64_t count, uint64_t host, uint64_t type);

/* ---- map_thread.c ----------------------------------------------------------------------- */

struct map_thread *map_thread(struct map_node *map, struct vb_iothread *thread);
/* I/O thread: hand the request to the node again when an entry that was pending has changed. */
void map_wait(struct map_node *map, struct vb_request *request, uint64_t unit);
/* Any: an entry was pending and is not any more. */
void map_wake(struct map_node *map);
void map_threads_free(struct map_node *map); /* control */

#endif
