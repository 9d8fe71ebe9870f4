/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * map_spread.c: for test_map_node.py. The tables of a map while the I/O threads are so fast that they
 * have always gone round their loops already. The control thread is not: it may be anywhere.
 * Compiled with free() as noted_free().
 */
#include "nodes/map_table.h"

#include <stdlib.h>

#undef free

static void *noted[16];
static unsigned notes;

void noted_free(void *pointer)
{
    if (pointer && notes < 16) {
        noted[notes++] = pointer; /* not freed: nothing else is to have its address */
    }
}

static bool is_freed(const void *pointer)
{
    for (unsigned i = 0; i < notes; i++) {
        if (noted[i] == pointer) {
            return true;
        }
    }
    return false;
}

void vb_after_all_threads(struct vb_engine *engine, void (*run)(void *argument), void *argument)
{
    (void)engine;
    run(argument);
}

void *vb_must_alloc(size_t size)
{
    return calloc(1, size);
}

void *vb_node_alloc(struct vb_engine *engine, const struct vb_node_ops *ops, size_t size,
                    char *error)
{
    struct vb_node *node = calloc(1, size);

    (void)error;
    node->engine = engine;
    node->ops = ops;
    return node;
}

int vb_error(char *error, int ret, const char *format, ...)
{
    (void)error;
    (void)format;
    return ret;
}

void vb_engine_post(struct vb_engine *engine, struct vb_message *message)
{
    (void)engine;
    (void)message;
}

void map_wake(struct map_node *map)
{
    (void)map;
}

void map_threads_free(struct map_node *map)
{
    (void)map;
}

void map_submit(struct vb_node *node, struct vb_request *request);

void map_submit(struct vb_node *node, struct vb_request *request)
{
    (void)node;
    (void)request;
}

/*
 * Bits: a table whose entries are all the same, and which the control thread looks at, was freed 1: when an
 * I/O thread changed an entry; 2: and the one in its place, when they were evicted. -1: something else is wrong.
 */
int map_spread(void)
{
    struct vb_map_options options = {
        .size = 1 << 20, .unit_bits = 12, .cluster_bits = 16, .table_bits = 4};
    uint64_t entries[16];
    struct vb_node *node;
    struct map_table *uniform, *own;
    struct map_node *map;
    int result;

    for (unsigned i = 0; i < 16; i++) {
        entries[i] = VB_MAP_BACKING;
    }
    node = vb_node_map_new(NULL, &options, NULL);
    if (!node || vb_map_install(node, 0, entries) < 0) {
        return -1;
    }
    map = vb_container_of(node, struct map_node, node);
    uniform = atomic_load(&map->tables[0]);
    atomic_store(map_own_entry(map, 3), VB_MAP_ZERO);
    own = atomic_load(&map->tables[0]);
    if (own == uniform || vb_map_get(node, 3) != VB_MAP_ZERO ||
        vb_map_get(node, 4) != VB_MAP_BACKING) {
        return -1;
    }
    result = is_freed(uniform);
    vb_map_evict(node, 0);
    return result | (is_freed(uniform) && is_freed(own)) << 1;
}
