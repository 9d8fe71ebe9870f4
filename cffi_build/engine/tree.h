/* SPDX-License-Identifier: GPL-2.0-or-later */
/* tree.h: what tree_file.c, tree_read.c and tree_write.c share. tree_file.c says what is where. */
#ifndef VB_TREE_H
#define VB_TREE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tree.api.h"

#define VB_TREE_HEADS 4     /* pages at the beginning of the file */
#define VB_TREE_LEVELS 24   /* more than any tree has */
#define VB_TREE_KEY 16      /* bytes, at most */
#define VB_TREE_VALUE 1024
#define VB_TREE_POINTER 16  /* bytes: page and checksum */

/* Where a page is, and what must be in it. */
struct vb_tree_pointer {
    uint64_t page, check;
};

struct vb_tree_root {
    struct vb_tree_pointer at; /* page 0: the table is empty */
    uint64_t entries;
    uint64_t level;            /* of the page; leaves have 0 */
};

/* What a head says: all tables as one change has left them. */
struct vb_tree_state {
    uint64_t number; /* of the change */
    uint64_t pages;  /* of the file */
    struct vb_tree_root roots[VB_TREE_TABLES];
};

/* Pages that a change has left behind, which earlier readers may still need. */
struct vb_tree_left {
    struct vb_tree_left *next;
    uint64_t number; /* of the change */
    uint64_t *pages; /* owned */
    size_t count;
};

struct vb_tree {
    int fd;
    uint32_t tables;
    struct vb_tree_shape shapes[VB_TREE_TABLES];
    uint64_t most;             /* pages */
    /* Whoever makes a change: bits, one per page. */
    uint64_t *used, *fresh, *doubtful;
    uint64_t words;            /* of each */
    struct vb_tree_left *left; /* newest first */
    pthread_mutex_t lock;      /* of what follows */
    struct vb_tree_state now;
    struct vb_tree_reader *readers;
};

/* What is in a page, behind its header. */
struct vb_tree_node {
    unsigned count;
    size_t size;                  /* of an entry */
    const unsigned char *entries; /* each a key, then a value or a pointer */
};

/* Bytes of an entry, and how many of them a page has room for. */
size_t vb_tree_entry_size(const vb_tree *tree, unsigned table, unsigned level);
unsigned vb_tree_capacity(const vb_tree *tree, unsigned table, unsigned level);
/* The page as it is written: a header, and entries; what the pointer to it is to say. */
uint64_t vb_tree_seal(unsigned char *page, unsigned table, unsigned level, unsigned count);
/* Reads a page into `page`, and looks at it. 0 or a negative errno. */
int vb_tree_load(const vb_tree *tree, const struct vb_tree_pointer *at, unsigned table,
                 unsigned level, unsigned char *page, char *error);
/* What is in a page that vb_tree_load() has found to be right. */
struct vb_tree_node vb_tree_node_of(const vb_tree *tree, const unsigned char *page, unsigned table,
                                    unsigned level);
struct vb_tree_pointer vb_tree_pointer_of(const struct vb_tree_node *node, unsigned index,
                                          size_t key);
/* Writes the heads of a state, all of whose pages are on stable storage. Durable. */
int vb_tree_write_head(const vb_tree *tree, const struct vb_tree_state *state, char *error);
int vb_tree_error(char *error, int code, const char *what);

static inline bool vb_tree_bit(const uint64_t *bits, uint64_t page)
{
    return bits[page / 64] >> page % 64 & 1;
}

static inline void vb_tree_set_bit(uint64_t *bits, uint64_t page)
{
    bits[page / 64] |= 1ull << page % 64;
}

static inline void vb_tree_clear_bit(uint64_t *bits, uint64_t page)
{
    bits[page / 64] &= ~(1ull << page % 64);
}

/* The oldest change that a reader has not seen; called with the lock. */
uint64_t vb_tree_oldest(const vb_tree *tree);

#endif
