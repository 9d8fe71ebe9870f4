/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * map: where guest data lives. Child 0 is the storage, child 1 (if has_backing) what an
 * unallocated cluster shows. The disk is a row of units of 2^unit_bits bytes; each has an entry,
 * and the entries come in tables of 2^table_bits, which Python installs and evicts. An
 * entry is a type and, for VB_MAP_DATA, the host offset (a multiple of 512).
 *
 * Units are clusters, or parts of clusters (qcow2's subclusters): then the cluster has one place in
 * the storage, in which each unit has its own. A cluster may have a place before its first unit
 * has: the entry of that, BACKING or ZERO, has the host offset then, and WRITABLE if the place is the
 * cluster's alone.
 */
#define VB_MAP_MISS 0      /* ask Python (also: the table is not installed) */
#define VB_MAP_DATA 1      /* at the host offset on child 0 */
#define VB_MAP_ZERO 2      /* reads as zeroes */
#define VB_MAP_BACKING 3   /* on child 1, at the guest's offset; zeroes beyond backing_size */
#define VB_MAP_PENDING 4   /* being allocated: requests wait until the entry changes */
#define VB_MAP_TYPE 7      /* mask */
#define VB_MAP_WRITABLE 8  /* DATA: may be overwritten in place; others: see above */

/*
 * What is mapped never leaves C. All of a request goes to Python (VB_EVENT_UPCALL) when one of its
 * entries is MISS, for discards and zero writes, and for writes that need more than a fresh
 * cluster or the place that it has. With `allocate` C takes those by itself from runs (vb_map_give),
 * for ZERO and for BACKING, and copies what is around the guest's data. An entry with a host
 * offset that is not WRITABLE (a place without data, or somebody else's, too) is Python's. Each
 * such allocation is a record in the log, written before anybody can see the new entry.
 */
struct vb_map_options {
    uint64_t cookie;
    uint64_t size;         /* bytes of the disk */
    uint64_t backing_size; /* bytes */
    uint64_t log;          /* address of a struct vb_map_log, the caller's; 0: the map has its own */
    uint32_t log_records;  /* its size: a power of two */
    uint8_t unit_bits;     /* 9 to 26 */
    uint8_t cluster_bits;  /* unit_bits to that and table_bits */
    uint8_t table_bits;    /* 0 to 20 */
    bool has_backing;
    bool allocate;         /* C may allocate clusters */
    uint8_t detect_zeroes; /* writes of zeroes are zero writes: 0 no, 1 yes, 2 that may unmap */
};

/*
 * The unit at `guest` has this entry now, and those behind it in the cluster, `units` in all, have the like.
 * BACKING: the cluster at `guest` has this place now, and nothing in it.
 */
struct vb_map_change {
    uint64_t guest;
    uint64_t entry;
    uint64_t units;
};

struct vb_map_record {
    uint64_t number; /* 1 + its place in the whole history; anything else: not written yet */
    uint64_t guest;  /* VB_MAP_RECORD_PYTHON: the other members are Python's business */
    uint64_t entry;
    uint64_t extra;  /* units behind the first that have the like */
};
#define VB_MAP_RECORD_PYTHON 1

/*
 * A ring of records. It may live in memory that outlives the process; then whoever comes next
 * finds there what is not on disk yet: records tail to head - 1, in order. Record n is in
 * slot n % log_records, which follow this header.
 */
struct vb_map_log {
    uint64_t identity[6]; /* Python's: whose log it is */
    uint64_t head;        /* records made so far */
    uint64_t tail;        /* records that are on disk, and all before them */
};

/*
 * Any: numbers from a format's table, masked, in ascending order, without the zeroes; how many are
 * left. Tables of hostile images are too long for lists of Python's.
 */
uint64_t vb_map_sort(uint64_t *numbers, uint64_t count, uint64_t mask);

vb_node *vb_node_map_new(vb_engine *engine, const struct vb_map_options *options, char *error);
/* Copies 2^table_bits entries. -EEXIST if the table is there already, -ENOMEM. */
int vb_map_install(vb_node *map, uint64_t table, const uint64_t *entries);
bool vb_map_evict(vb_node *map, uint64_t table); /* false if it was not there */
bool vb_map_used(vb_node *map, uint64_t table);  /* looked at since the last call */
uint64_t vb_map_get(vb_node *map, uint64_t unit);
/* Sets `count` entries; from unit to unit the host offset grows by `step`. Missing tables are left alone. */
void vb_map_set(vb_node *map, uint64_t unit, uint64_t count, uint64_t entry, uint64_t step);
/* Exchanges `expected` for VB_MAP_PENDING; false if that is not what is there. */
bool vb_map_claim(vb_node *map, uint64_t unit, uint64_t expected);
/*
 * A run of clusters for C to allocate: they read as zeroes, and nobody else uses them. There is place
 * for one in use and a spare one; -EBUSY otherwise. When more is wanted, VB_EVENT_NODE says so
 * with op VB_MAP_RUN_WANTED; with VB_MAP_LOG_HALF that half of the log is full.
 */
#define VB_MAP_RUN_WANTED 1
#define VB_MAP_LOG_HALF 2
int vb_map_give(vb_node *map, uint64_t host, uint64_t bytes);
/* Takes up to `wanted` clusters, at least one if any is left, out of the runs; how many, from *host on. */
uint64_t vb_map_take(vb_node *map, uint64_t wanted, uint64_t *host);
/* Clusters out of the runs that a write has failed on, no entry having ever named them; false: no more. */
bool vb_map_unused(vb_node *map, uint64_t *host, uint64_t *clusters);
/* Takes back what is left of the runs: 2 pairs of host offset and bytes. Nothing is in flight. */
void vb_map_reclaim(vb_node *map, uint64_t left[4]);
/* Up to `max` of C's records that were not taken before; marks the map dirty if there are any. */
int vb_map_take_log(vb_node *map, struct vb_map_change *changes, int max);
/* Python's own record; 0, or -ENOSPC if the log is full. */
int vb_map_log(vb_node *map, uint64_t guest, uint64_t entry, uint64_t extra);
uint64_t vb_map_log_taken(vb_node *map);            /* how many records have been taken so far */
void vb_map_log_done(vb_node *map, uint64_t taken); /* those before are on disk */
/* Metadata in Python are ahead of the disk. While that is so, or records wait, flushes go up. */
void vb_map_set_dirty(vb_node *map, bool dirty);
/* VB_EVENT_DONE with `cookie` once all requests that have looked at entries so far have completed. */
void vb_map_grace(vb_node *map, uint64_t cookie);
void vb_map_set_size(vb_node *map, uint64_t size, uint64_t backing_size); /* while drained */
/*
 * Another log, an empty one (see the options; 0: the map's own), when all records in the present one
 * are on disk. While drained. 0, or -ENOMEM.
 */
int vb_map_set_log(vb_node *map, uint64_t log, uint32_t records);
void vb_map_set_detect_zeroes(vb_node *map, uint8_t detect_zeroes);       /* while drained */
