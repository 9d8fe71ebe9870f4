/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sorted tables in a file, all of whose pages have checksums: tree_file.c says how.
 *
 * Keys and values of a table have fixed lengths. One thread at a time may change a file. Each
 * reader sees all tables as they were at one moment, and belongs to one thread at a time. Functions
 * here wait for the file. They return a negative errno: -EBADMSG says that the file is damaged.
 */
#define VB_TREE_TABLES 8
#define VB_TREE_PAGE 4096
#define VB_TREE_ROOM 4080 /* bytes of entries in a page */

typedef struct vb_tree vb_tree;
typedef struct vb_tree_reader vb_tree_reader;
typedef struct vb_tree_change vb_tree_change;

struct vb_tree_shape {
    uint32_t key, value; /* bytes */
};

/* The checksum of a page. */
uint64_t vb_tree_check(const void *page);

/* An empty file becomes one with empty tables. Durable. */
int vb_tree_create(int fd, const struct vb_tree_shape *shapes, uint32_t tables, char *error);
/* `fd` is not owned. The file does not grow beyond `pages`. NULL: `*status` and `error` say why. */
vb_tree *vb_tree_open(int fd, const struct vb_tree_shape *shapes, uint32_t tables, uint64_t pages,
                      int *status, char *error);
void vb_tree_close(vb_tree *tree); /* without readers and changes */

/* As it is now. It remembers up to about `pages` pages. NULL: no memory. */
vb_tree_reader *vb_tree_reader_new(vb_tree *tree, uint32_t pages);
void vb_tree_reader_free(vb_tree_reader *reader);
void vb_tree_reader_renew(vb_tree_reader *reader); /* as it is now */
uint64_t vb_tree_entries(vb_tree_reader *reader, uint32_t table);
/* 1: the value is in `value`, 0: there is none. */
int vb_tree_get(vb_tree_reader *reader, uint32_t table, const char *key, char *value, char *error);
/* Up to `count` entries, each a key and a value, the first ones not before `key`; how many. */
int64_t vb_tree_scan(vb_tree_reader *reader, uint32_t table, const char *key, char *entries,
                     uint32_t count, char *error);

/* All that a reader sees comes into `tree`, which is empty. Durable. */
int vb_tree_copy(vb_tree_reader *reader, vb_tree *tree, char *error);

vb_tree_change *vb_tree_begin(vb_tree *tree); /* NULL: no memory */
/*
 * `count` changes, sorted, each of another key: the key, a byte, and the value; the
 * byte is 1, or 0 if the entry is to go. After an error the change can only be abandoned.
 */
int vb_tree_put(vb_tree_change *change, uint32_t table, const char *changes, uint64_t count,
                char *error);
/* All of it happens, durably, or none; `change` is gone either way. */
int vb_tree_commit(vb_tree_change *change, char *error);
void vb_tree_abandon(vb_tree_change *change);
