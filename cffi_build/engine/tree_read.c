/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * tree_read.c: looking things up in a file of tables.
 *
 * A reader keeps pages that it has read and found to be right. What it keeps is used only for a
 * pointer with the same checksum, so it need not be told when a page is used for something
 * else. Pages that lead to others are kept apart from leaves, which would displace them.
 */
#include "tree.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct cache {
    uint32_t pages; /* a power of two */
    struct vb_tree_pointer *at;
    unsigned char *memory;
};

struct vb_tree_reader {
    vb_tree *tree;
    struct vb_tree_reader *next, **link; /* under tree->lock */
    struct vb_tree_state state;          /* `number` changes under tree->lock */
    struct cache leaves, others;
};

static bool new_cache(struct cache *cache, uint32_t pages)
{
    cache->pages = pages;
    cache->at = calloc(pages, sizeof(*cache->at));
    cache->memory = malloc((size_t)pages * VB_TREE_PAGE);
    return cache->at != NULL && cache->memory != NULL;
}

static void free_cache(struct cache *cache)
{
    free(cache->at);
    free(cache->memory);
}

uint64_t vb_tree_oldest(const vb_tree *tree)
{
    uint64_t oldest = tree->now.number;
    for (const struct vb_tree_reader *reader = tree->readers; reader; reader = reader->next)
        oldest = reader->state.number < oldest ? reader->state.number : oldest;
    return oldest;
}

vb_tree_reader *vb_tree_reader_new(vb_tree *tree, uint32_t pages)
{
    vb_tree_reader *reader = calloc(1, sizeof(*reader));
    uint32_t half = 4;
    while (half * 4 <= pages)
        half *= 2;
    if (reader == NULL || !new_cache(&reader->leaves, half) ||
        !new_cache(&reader->others, half)) {
        if (reader != NULL) {
            free_cache(&reader->leaves);
            free_cache(&reader->others);
        }
        free(reader);
        return NULL;
    }
    reader->tree = tree;
    pthread_mutex_lock(&tree->lock);
    reader->state = tree->now;
    reader->next = tree->readers;
    reader->link = &tree->readers;
    if (reader->next)
        reader->next->link = &reader->next;
    tree->readers = reader;
    pthread_mutex_unlock(&tree->lock);
    return reader;
}

void vb_tree_reader_free(vb_tree_reader *reader)
{
    pthread_mutex_lock(&reader->tree->lock);
    *reader->link = reader->next;
    if (reader->next)
        reader->next->link = reader->link;
    pthread_mutex_unlock(&reader->tree->lock);
    free_cache(&reader->leaves);
    free_cache(&reader->others);
    free(reader);
}

void vb_tree_reader_renew(vb_tree_reader *reader)
{
    pthread_mutex_lock(&reader->tree->lock);
    reader->state = reader->tree->now;
    pthread_mutex_unlock(&reader->tree->lock);
}

uint64_t vb_tree_entries(vb_tree_reader *reader, uint32_t table)
{
    return reader->state.roots[table].entries;
}

/* A page that is as it was written, until the next call. */
static const unsigned char *page_at(vb_tree_reader *reader, const struct vb_tree_pointer *at,
                                    unsigned table, unsigned level, int *status, char *error)
{
    struct cache *cache = level ? &reader->others : &reader->leaves;
    uint32_t slot = (at->page * 0x9e3779b97f4a7c15ull >> 32) & (cache->pages - 1);
    struct vb_tree_pointer *kept = &cache->at[slot];
    unsigned char *page = cache->memory + (size_t)slot * VB_TREE_PAGE;
    if (kept->page == at->page && kept->check == at->check)
        return page;
    kept->page = 0;
    *status = vb_tree_load(reader->tree, at, table, level, page, error);
    if (*status < 0)
        return NULL;
    *kept = *at;
    return page;
}

/* The first entry whose key is not before `key`. */
static unsigned find(const struct vb_tree_node *node, const char *key, size_t length)
{
    unsigned low = 0, high = node->count;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        if (memcmp(node->entries + middle * node->size, key, length) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The entry of the page below which `key` is, if anywhere. */
static unsigned find_below(const struct vb_tree_node *node, const char *key, size_t length)
{
    unsigned index = find(node, key, length);
    bool same = index < node->count &&
                memcmp(node->entries + index * node->size, key, length) == 0;
    return same || index == 0 ? index : index - 1;
}

/*
 * The leaf where `key` belongs. In `next`, if there is a further one, the first key there,
 * and whether there is, in `more`.
 */
static int descend(vb_tree_reader *reader, unsigned table, const char *key,
                   struct vb_tree_node *leaf, char *next, bool *more, char *error)
{
    const vb_tree *tree = reader->tree;
    struct vb_tree_pointer at = reader->state.roots[table].at;
    size_t length = tree->shapes[table].key;
    int status = 0;
    *more = false;
    for (unsigned level = reader->state.roots[table].level;; level--) {
        const unsigned char *page = page_at(reader, &at, table, level, &status, error);
        if (page == NULL)
            return status;
        struct vb_tree_node node = vb_tree_node_of(tree, page, table, level);
        if (level == 0) {
            *leaf = node;
            return 0;
        }
        unsigned index = find_below(&node, key, length);
        if (index + 1 < node.count) {
            memcpy(next, node.entries + (index + 1) * node.size, length);
            *more = true;
        }
        at = vb_tree_pointer_of(&node, index, length);
    }
}

int vb_tree_get(vb_tree_reader *reader, uint32_t table, const char *key, char *value, char *error)
{
    char next[VB_TREE_KEY];
    struct vb_tree_node leaf;
    bool more;
    size_t length = reader->tree->shapes[table].key;
    if (reader->state.roots[table].at.page == 0)
        return 0;
    int status = descend(reader, table, key, &leaf, next, &more, error);
    if (status < 0)
        return status;
    unsigned index = find(&leaf, key, length);
    const unsigned char *entry = leaf.entries + index * leaf.size;
    if (index == leaf.count || memcmp(entry, key, length) != 0)
        return 0;
    memcpy(value, entry + length, leaf.size - length);
    return 1;
}

int64_t vb_tree_scan(vb_tree_reader *reader, uint32_t table, const char *key, char *entries,
                     uint32_t count, char *error)
{
    char from[VB_TREE_KEY], next[VB_TREE_KEY];
    struct vb_tree_node leaf;
    bool more = reader->state.roots[table].at.page != 0;
    size_t length = reader->tree->shapes[table].key;
    uint32_t found = 0;
    memcpy(from, key, length);
    while (more && found < count) {
        int status = descend(reader, table, from, &leaf, next, &more, error);
        if (status < 0)
            return status;
        unsigned index = find(&leaf, from, length);
        unsigned some = leaf.count - index;
        some = some < count - found ? some : count - found;
        memcpy(entries + found * leaf.size, leaf.entries + index * leaf.size, some * leaf.size);
        found += some;
        memcpy(from, next, length);
    }
    return found;
}
