/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/map_words.c: from the log of a map into the L2 tables of its qcow2 image. A guest that writes
 * fast to what is unallocated makes some hundred thousand records a second.
 */
#include "map_table.h"

#include <errno.h>
#include <stdlib.h>

#define COPIED (1ull << 63)

struct slice {
    uint64_t *words; /* not ours */
    uint64_t call;   /* the last one that has told of it */
};

struct vb_map_words {
    uint8_t unit_bits, cluster_bits;
    uint64_t slice_entries;
    uint64_t call;
    uint64_t slices_count;
    struct slice *slices; /* owned */
};

struct vb_map_words *vb_map_words_new(uint8_t unit_bits, uint8_t cluster_bits,
                                      uint64_t slice_entries)
{
    struct vb_map_words *tables = calloc(1, sizeof(*tables));

    if (tables) {
        tables->unit_bits = unit_bits;
        tables->cluster_bits = cluster_bits;
        tables->slice_entries = slice_entries;
    }
    return tables;
}

void vb_map_words_free(struct vb_map_words *tables)
{
    free(tables->slices);
    free(tables);
}

/* What nobody has written to takes no memory: a disk may be large, and little of it in use. */
static int make_room(struct vb_map_words *tables, uint64_t slice)
{
    uint64_t count = slice + slice / 2 + 16;
    struct slice *slices = calloc(count, sizeof(*slices));

    if (!slices) {
        return -ENOMEM;
    }
    for (uint64_t i = 0; i < tables->slices_count; i++) {
        if (tables->slices[i].words) {
            slices[i] = tables->slices[i];
        }
    }
    free(tables->slices);
    tables->slices = slices;
    tables->slices_count = count;
    return 0;
}

int vb_map_words_set(struct vb_map_words *tables, uint64_t slice, uint64_t *words)
{
    if (slice >= tables->slices_count && make_room(tables, slice) < 0) {
        return -ENOMEM;
    }
    tables->slices[slice].words = words;
    return 0;
}

static uint64_t slice_of(const struct vb_map_words *tables, const struct vb_map_change *change)
{
    return (change->guest >> tables->cluster_bits) / tables->slice_entries;
}

void vb_map_words_enter(struct vb_map_words *tables, const struct vb_map_change *change)
{
    uint64_t index = (change->guest >> tables->cluster_bits) % tables->slice_entries;
    uint64_t in_cluster = change->guest & ((1ull << tables->cluster_bits) - 1);
    uint64_t *words = tables->slices[slice_of(tables, change)].words, mask;

    vb_assert(words);
    if (tables->cluster_bits == tables->unit_bits) {
        words[index] = map_host_of(change->entry) | COPIED;
        return;
    }
    words += 2 * index;
    words[0] = (map_host_of(change->entry) - in_cluster) | COPIED;
    if (map_type_of(change->entry) == VB_MAP_DATA) {
        mask = ((1ull << change->units) - 1) << (in_cluster >> tables->unit_bits);
        words[1] = (words[1] & ~(mask << 32)) | mask; /* allocated, and not zeroes any more */
    }
}

int vb_map_words_take_log(struct vb_map_words *tables, struct vb_node *map, uint64_t *slices,
                          int max)
{
    struct vb_map_change changes[64];
    int count = 0, taken;

    tables->call++;
    do {
        int room = max - count < 64 ? max - count : 64;

        taken = vb_map_take_log(map, changes, room);
        for (int i = 0; i < taken; i++) {
            struct slice *slice = &tables->slices[slice_of(tables, &changes[i])];

            vb_map_words_enter(tables, &changes[i]);
            if (slice->call != tables->call) {
                slice->call = tables->call;
                slices[count++] = slice_of(tables, &changes[i]);
            }
        }
    } while (taken > 0 && count < max);
    return count;
}
